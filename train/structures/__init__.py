"""Atomic models: one module per material, and what all of them share.

A material is a module of this package, named in `MATERIALS`, with

    CELL_A              side of its square cell along x and y [A]
    random_specimen     (seed, defects) -> a specimen: a frozen dataclass of everything that decides one model
    build               (specimen) -> ase.Atoms

x is to the right in the image, y up, z along the beam. The atoms carry three arrays,
so that images come with the truth about their columns:

    column              int, atoms of one column share it, tilted or not
    particle            bool, the atom belongs to the particle and not to its support
    surface             bool, the atom's column lies on the particle's surface

Nothing beyond this package knows a material by name: the images, the data set, the
noise and the networks are the same for all. ``tests/train/test_structures.py`` runs
over every entry of `MATERIALS`; a new one is done when it passes.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, Protocol

import numpy as np
from ase import Atoms
from scipy.spatial import cKDTree

MATERIALS = ("pt_ceo2", "au_srtio3")
DEFECT_SETS = ("paper", "all")
CLOSEST_A = 1.0  # nothing but hydrogen comes closer than this

COLUMN = np.dtype(
    [("x", "<f4"), ("y", "<f4"), ("element", "u1"), ("particle", "?"), ("surface", "?")]
)  # element: atomic number of the column's heaviest atom


class SpecimenLike(Protocol):
    """What decides one atomic model; the values travel with every image."""

    @property
    def seed(self) -> int: ...

    def as_dict(self) -> dict[str, Any]: ...


class Material(Protocol):
    """A module of this package."""

    CELL_A: float

    def random_specimen(self, seed: int, defects: str = "paper") -> Any: ...

    def build(self, specimen: Any) -> Atoms: ...


def material(name: str) -> Material:
    """The module of a material in `MATERIALS`."""
    if name not in MATERIALS:
        raise ValueError(f"material must be one of {', '.join(MATERIALS)}, got {name!r}")
    return import_module(f"{__name__}.{name}")  # type: ignore[return-value]


def check_atoms(atoms: Atoms) -> None:
    """Raise ValueError unless `atoms` could be a specimen: none outside of a square cell, none in another.

    Neighbours are looked for across the cell's sides in x and y, where multislice
    repeats the specimen, and not along the beam, where it does not.
    """
    cell = atoms.cell.lengths()
    if len(atoms) == 0:
        raise ValueError("the specimen has no atoms")
    if not np.allclose(atoms.cell.array, np.diag(cell)) or not np.isclose(cell[0], cell[1]):
        raise ValueError(f"the cell must be square in x and y and upright, got {atoms.cell.array.tolist()} A")
    positions = atoms.positions
    if not np.isfinite(positions).all():
        raise ValueError("an atom's position is not a number")
    outside = ((positions < 0) | (positions >= cell)).any(axis=1)
    if outside.any():
        worst = int(np.flatnonzero(outside)[0])
        raise ValueError(
            f"{outside.sum()} atoms lie outside of the cell of {_text(cell)} A, "
            f"the first is {_name(atoms, worst)} A"
        )
    tree = cKDTree(positions, boxsize=[cell[0], cell[1], 1e6])
    distance, neighbour = tree.query(positions, k=2)
    worst = int(np.argmin(distance[:, 1]))
    if distance[worst, 1] < CLOSEST_A:
        raise ValueError(
            f"atoms are {distance[worst, 1]:.2f} A apart, nothing real comes closer than {CLOSEST_A} A: "
            f"{_name(atoms, worst)} A and {_name(atoms, int(neighbour[worst, 1]))} A"
        )


def _name(atoms: Atoms, number: int) -> str:
    return f"{atoms.symbols[number]} number {number} at {_text(atoms.positions[number])}"


def _text(values: np.ndarray) -> str:
    return "(" + ", ".join(f"{value:.2f}" for value in values) + ")"


def columns(positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Group atoms that stand behind one another along z.

    Returns the column's index of each atom (N,) and the columns' places (M, 2) [A].
    """
    keys = np.round(positions[:, :2] / 0.3).astype(int)
    _, index = np.unique(keys, axis=0, return_inverse=True)
    index = index.reshape(-1)
    counts = np.bincount(index)
    places = np.stack([np.bincount(index, positions[:, axis]) / counts for axis in (0, 1)], axis=1)
    return index, places


def projected_columns(atoms: Atoms) -> np.ndarray:
    """Where the columns of a built specimen show in the image: (M,) of dtype `COLUMN`, x and y in A.

    A tilted column shows as a streak; this is the streak's middle.
    """
    _, first, index = np.unique(atoms.arrays["column"], return_index=True, return_inverse=True)
    counts = np.bincount(index)
    found = np.zeros(len(first), COLUMN)
    for axis, name in enumerate("xy"):
        length = atoms.cell[axis, axis]
        coordinate = atoms.positions[:, axis]
        offset = coordinate - coordinate[first][index]
        offset -= length * np.round(offset / length)  # a column may cross the cell's side
        found[name] = (coordinate[first] + np.bincount(index, offset) / counts) % length
    np.maximum.at(found["element"], index, atoms.numbers.astype(np.uint8))
    for name in ("particle", "surface"):
        found[name] = atoms.arrays[name][first]
    return found
