from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("ase", reason="the laboratory needs: pip install 'emstream[train]'")

from scipy.spatial import cKDTree

from train.structures import (
    CELL_A,
    DEFECTS,
    PT_LATTICE_A,
    SHAPES,
    Specimen,
    build,
    columns,
    random_specimen,
    surface_columns,
)


def platinum(specimen: Specimen) -> np.ndarray:
    atoms = build(specimen)
    return atoms.positions[atoms.symbols == "Pt"]


@pytest.mark.parametrize("seed", range(12))
def test_no_two_atoms_come_closer_than_a_bond(seed: int) -> None:
    atoms = build(random_specimen(seed))
    box = [CELL_A, CELL_A, atoms.cell[2, 2] * 2]
    nearest, _ = cKDTree(atoms.positions, boxsize=box).query(atoms.positions, k=2)
    assert nearest[:, 1].min() > 1.4  # Pt on O at the interface, [A]


@pytest.mark.parametrize("seed", range(12))
def test_atoms_lie_inside_the_cell(seed: int) -> None:
    atoms = build(random_specimen(seed))
    assert (atoms.positions >= 0).all()
    assert (atoms.positions < atoms.cell.lengths()).all()


def test_same_specimen_is_the_same_atoms() -> None:
    np.testing.assert_array_equal(build(random_specimen(5)).positions, build(random_specimen(5)).positions)


@pytest.mark.parametrize("shape", SHAPES)
def test_platinum_is_a_crystal_with_the_right_bond(shape: str) -> None:
    positions = platinum(Specimen(seed=1, shape=shape))
    nearest, _ = cKDTree(positions).query(positions, k=2)
    np.testing.assert_allclose(nearest[:, 1], PT_LATTICE_A / np.sqrt(2), rtol=1e-6)


def test_support_is_two_oxygen_to_one_cerium() -> None:
    symbols = build(Specimen(seed=1)).symbols
    assert (symbols == "O").sum() == 2 * (symbols == "Ce").sum()


def test_thicker_specimens_have_proportionally_more_support() -> None:
    cerium = [(build(Specimen(seed=1, thickness_nm=t)).symbols == "Ce").sum() for t in (3.0, 6.0)]
    assert cerium[1] / cerium[0] == pytest.approx(2, rel=0.15)


def test_every_defect_changes_the_surface_in_its_own_way() -> None:
    perfect = {defect: platinum(Specimen(seed=3, defect=defect)) for defect in DEFECTS}
    count = {defect: len(columns(positions)[1]) for defect, positions in perfect.items()}
    assert count["D1"] == count["D0"] - 1
    assert count["D2"] == count["D0"] - 2
    assert count["Dh"] == count["D0"]
    assert len(perfect["Dh"]) < len(perfect["D0"])
    assert count["Ds"] == count["D0"] + 1


def test_surface_columns_are_the_outer_ones() -> None:
    _, places = columns(platinum(Specimen(seed=1)))
    surface = surface_columns(places)
    assert 0 < len(surface) < len(places)
    centre = places.mean(axis=0)
    inner = np.argmin(np.linalg.norm(places - centre, axis=1))
    assert inner not in surface


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"thickness_nm": 0.0}, "thickness must be positive, got 0.0 nm"),
        ({"shape": "cube"}, "shape must be one of PtNp1, PtNp2, PtNp3, PtNp4, got 'cube'"),
        ({"defect": "D9"}, "defect must be one of"),
        ({"radius_a": 100.0}, "got 100.0 A"),
    ],
)
def test_impossible_specimens_are_refused(change: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Specimen(seed=0, **change)  # type: ignore[arg-type]
