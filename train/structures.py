"""Atomic models of a Pt nanoparticle on a CeO2 support, seen along [110].

Axes of every model, in angstrom::

    x   [11-2]   to the right in the image
    y   [111]    up in the image, normal to the Pt|CeO2 interface
    z   [1-10]   along the beam

Pt and CeO2 are both face-centred cubic and share these directions
(cube-on-cube epitaxy, {111} interface), as in the catalyst of Mohan et al.,
"Deep denoising for scientific discovery" (arXiv 2010.12970).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import numpy as np
from ase import Atoms
from ase.lattice.cubic import FaceCenteredCubic
from scipy.spatial import cKDTree

PT_LATTICE_A = 3.924
CEO2_LATTICE_A = 5.411
CEO2_PERIOD_X_A = CEO2_LATTICE_A * np.sqrt(6) / 2
CELL_A = 8 * CEO2_PERIOD_X_A  # the support repeats without a seam along x: 53.02 A
DIRECTIONS = ([1, 1, -2], [1, 1, 1], [1, -1, 0])
ROTATION = np.array([np.array(d) / np.linalg.norm(d) for d in DIRECTIONS])

SHAPES = ("PtNp1", "PtNp2", "PtNp3", "PtNp4")
DEFECTS = ("D0", "D1", "D2", "Dh", "Ds")
# Distance of the {100} facets over that of the {111} facets, and the height of the
# particle's centre above the interface over its {111} distance, for each shape.
SHAPE_RATIOS = {
    "PtNp1": (1.155, 0.35),
    "PtNp2": (1.000, 0.55),
    "PtNp3": (1.400, 0.20),
    "PtNp4": (1.155, 0.75),
}


@dataclass(frozen=True, kw_only=True)
class Specimen:
    """Everything that decides one atomic model.

    ``defect`` names what the particle's surface lacks or carries: D0 nothing,
    D1 one column missing, D2 two columns missing, Dh one column half empty,
    Ds a single extra column sitting on the surface.
    """

    seed: int
    shape: str = "PtNp1"
    defect: str = "D0"
    thickness_nm: float = 4.0
    radius_a: float = 11.0
    tilt_x_deg: float = 0.0
    tilt_y_deg: float = 0.0

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise ValueError(f"shape must be one of {', '.join(SHAPES)}, got {self.shape!r}")
        if self.defect not in DEFECTS:
            raise ValueError(f"defect must be one of {', '.join(DEFECTS)}, got {self.defect!r}")
        if not self.thickness_nm > 0:
            raise ValueError(f"thickness must be positive, got {self.thickness_nm} nm")
        if not 4 <= self.radius_a <= 18:
            raise ValueError(f"radius must lie in 4-18 A to fit the cell, got {self.radius_a} A")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def random_specimen(seed: int) -> Specimen:
    """Draw a specimen over the axes of the paper's data set: 3-6 nm thick, tilts of 0-4 degrees."""
    rng = np.random.default_rng(seed)
    return Specimen(
        seed=seed,
        shape=str(rng.choice(SHAPES)),
        defect=str(rng.choice(DEFECTS)),
        thickness_nm=float(rng.uniform(3.0, 6.0)),
        radius_a=float(rng.uniform(8.0, 14.0)),
        tilt_x_deg=float(rng.uniform(0.0, 4.0) * rng.choice([-1, 1])),
        tilt_y_deg=float(rng.uniform(0.0, 4.0) * rng.choice([-1, 1])),
    )


def _support(thickness_a: float, top_a: float, rng: np.random.Generator) -> Atoms:
    """CeO2 filling the cell from its bottom to `top_a`, with a one-layer step half of the time."""
    layers_z = max(1, round(thickness_a / (CEO2_LATTICE_A / np.sqrt(2))))
    blocks_y = int(np.ceil(CELL_A / (CEO2_LATTICE_A * np.sqrt(3)))) + 1
    cerium = FaceCenteredCubic(
        "Ce", directions=DIRECTIONS, size=(8, blocks_y, layers_z), latticeconstant=CEO2_LATTICE_A
    )
    bond = CEO2_LATTICE_A * np.sqrt(3) / 4  # oxygen sits straight above and below cerium in [111]
    trilayer = CEO2_LATTICE_A / np.sqrt(3)
    ce = cerium.positions.copy()
    ce[:, 1] += top_a - bond - np.floor((top_a - bond) / trilayer) * trilayer
    limit = np.full(len(ce), top_a - bond + 0.1)
    if rng.random() < 0.5:
        start, width = rng.uniform(0, CELL_A), rng.uniform(0.15, 0.4) * CELL_A
        limit[(ce[:, 0] - start) % CELL_A < width] -= trilayer
    ce = ce[(ce[:, 1] < limit) & (ce[:, 1] > bond)]
    above = np.array([0, bond, 0])
    oxygen = np.concatenate([ce + above, ce - above])
    return Atoms(
        ["Ce"] * len(ce) + ["O"] * len(oxygen),
        positions=np.concatenate([ce, oxygen]),
    )


def _particle(specimen: Specimen, rng: np.random.Generator) -> np.ndarray:
    """Positions (N, 3) of a faceted Pt particle whose interface layer lies at y = 0."""
    ratio, height = SHAPE_RATIOS[specimen.shape]
    repeats = int(np.ceil(4 * specimen.radius_a / PT_LATTICE_A)) + 2
    lattice = FaceCenteredCubic(
        "Pt", directions=DIRECTIONS, size=(repeats, repeats, 2 * repeats), latticeconstant=PT_LATTICE_A
    )
    r = (
        lattice.positions
        - lattice.positions[np.argmin(np.linalg.norm(lattice.positions - lattice.positions.mean(0), axis=1))]
    )
    r = r + ROTATION @ (rng.choice([0.0, 0.25, 0.5], 3) * PT_LATTICE_A)
    inside = np.ones(len(r), bool)
    for signs in product((-1, 1), repeat=3):
        normal = ROTATION @ (np.array(signs) / np.sqrt(3))
        inside &= r @ normal <= specimen.radius_a * rng.uniform(0.88, 1.12)
    for axis, sign in product(range(3), (-1, 1)):
        normal = ROTATION[:, axis] * sign
        inside &= r @ normal <= specimen.radius_a * ratio * rng.uniform(0.88, 1.12)
    r = r[inside & (r[:, 1] >= -height * specimen.radius_a)]
    r[:, 1] -= r[:, 1].min()
    return r


def columns(positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Group atoms into columns along z.

    Returns the column's index of each atom (N,) and the columns' places (M, 2) [A].
    """
    keys = np.round(positions[:, :2] / 0.3).astype(int)
    _, index = np.unique(keys, axis=0, return_inverse=True)
    index = index.reshape(-1)
    counts = np.bincount(index)
    places = np.stack([np.bincount(index, positions[:, axis]) / counts for axis in (0, 1)], axis=1)
    return index, places


def surface_columns(places: np.ndarray) -> np.ndarray:
    """Columns (K,) with fewer than the bulk's six neighbours in projection, interface layer left out."""
    neighbours = cKDTree(places).query_ball_point(places, r=0.78 * PT_LATTICE_A, return_length=True)
    exposed = (neighbours - 1 < 6) & (places[:, 1] > 1.0)
    return np.flatnonzero(exposed)


def _apply_defect(r: np.ndarray, defect: str, rng: np.random.Generator) -> np.ndarray:
    index, places = columns(r)
    surface = surface_columns(places)
    if defect == "D0" or len(surface) < 4:
        return r
    if defect in ("D1", "D2"):
        gone = rng.choice(surface, size=int(defect[1]), replace=False)
        return r[~np.isin(index, gone)]
    column = rng.choice(surface)
    atoms = np.flatnonzero(index == column)
    if defect == "Dh":
        atoms = atoms[np.argsort(r[atoms, 2])]
        return np.delete(r, atoms[: len(atoms) // 2], axis=0)
    outward = places[column] - places.mean(axis=0)
    extra = r[atoms].copy()
    extra[:, :2] += outward / np.linalg.norm(outward) * PT_LATTICE_A / np.sqrt(3)
    keep = max(1, round(len(extra) * rng.uniform(0.3, 1.0)))
    return np.concatenate([r, extra[:keep]])


def build(specimen: Specimen) -> Atoms:
    """Build the atomic model of `specimen`.

    Returns atoms in a cell of (53.02, 53.02, thickness + 4) A, already tilted.

    Tilts shear the model instead of rotating it, x' = x + z tan(tilt): the same
    projection to first order at 4 degrees, and the support stays periodic.
    """
    rng = np.random.default_rng((specimen.seed, 1))
    thickness_a = 10 * specimen.thickness_nm
    top = rng.uniform(0.20, 0.42) * CELL_A
    support = _support(thickness_a, top, rng)
    support.positions[:, 2] -= support.positions[:, 2].mean()

    particle = _apply_defect(_particle(specimen, rng), specimen.defect, rng)
    particle[:, 0] *= rng.choice([-1, 1])
    particle[:, 0] += CELL_A * rng.uniform(0.35, 0.65) - particle[:, 0].mean()
    particle[:, 1] += top + rng.uniform(1.9, 2.4)  # Pt-O distance at the interface [A]
    particle[:, 2] += rng.uniform(-0.2, 0.2) * thickness_a - particle[:, 2].mean()

    atoms = support + Atoms("Pt" * len(particle), positions=particle)
    depth = np.ptp(atoms.positions[:, 2]) + 4.0
    x, y, z = atoms.positions.T
    atoms.positions = np.stack(
        [
            (x + z * np.tan(np.radians(specimen.tilt_x_deg))) % CELL_A,
            np.clip(y + z * np.tan(np.radians(specimen.tilt_y_deg)), 0, CELL_A - 1e-6),
            z - z.min() + 2.0,
        ],
        axis=1,
    )
    atoms.set_cell([CELL_A, CELL_A, depth])
    atoms.set_pbc(True)
    return atoms
