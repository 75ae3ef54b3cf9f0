"""Atomic models of every material."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("ase", reason="the laboratory needs: pip install 'emstream[train]'")

from ase import Atoms
from scipy.spatial import cKDTree

from train.camera_stack import SPECIMEN, states
from train.structures import MATERIALS, check_atoms, columns, material, projected_columns
from train.structures.au_srtio3 import GOLD, SRTIO3_LATTICE_A
from train.structures.pt_ceo2 import PLATINUM
from train.structures.supported import DEFECTS, PAPER_DEFECTS, Metal, surface_columns

METALS = {"pt_ceo2": PLATINUM, "au_srtio3": GOLD}


def specimen(name: str, **values: Any) -> Any:
    return material(name).Specimen(**{"seed": 3} | values)  # type: ignore[attr-defined]


def particle(name: str, **values: Any) -> np.ndarray:
    atoms = material(name).build(specimen(name, **values))
    return atoms.positions[atoms.arrays["particle"]]


def neighbours(positions: np.ndarray, metal: Metal) -> list[list[int]]:
    return cKDTree(positions).query_ball_point(positions, 1.05 * metal.bond_a)


@pytest.mark.parametrize("name", MATERIALS)
@pytest.mark.parametrize("seed", range(12))
def test_drawn_specimens_are_possible(name: str, seed: int) -> None:
    atoms = material(name).build(material(name).random_specimen(seed, "all"))
    check_atoms(atoms)
    box = [*atoms.cell.lengths()[:2], atoms.cell[2, 2] * 2]
    nearest, _ = cKDTree(atoms.positions, boxsize=box).query(atoms.positions, k=2)
    assert nearest[:, 1].min() > 1.4  # atoms at the cell's bottom are the closest, [A]
    assert atoms.cell[0, 0] == atoms.cell[1, 1] == material(name).CELL_A


@pytest.mark.parametrize("seed", [91, 124, 217, 388])
def test_atoms_tilted_out_of_the_cell_do_not_collide_at_its_edge(seed: int) -> None:
    check_atoms(material("pt_ceo2").build(material("pt_ceo2").random_specimen(seed)))


@pytest.mark.parametrize("name", MATERIALS)
def test_same_specimen_is_the_same_atoms(name: str) -> None:
    one, other = (material(name).build(material(name).random_specimen(5, "all")) for _ in range(2))
    np.testing.assert_array_equal(one.positions, other.positions)


@pytest.mark.parametrize(
    ("seed", "defect", "atoms", "mean"),
    [
        (0, "Dh", 184, (23.8733, 28.7378, 23.2557)),
        (1, "D2", 166, (22.9982, 20.8473, 36.2436)),
        (2, "D1", 807, (26.4433, 33.4945, 24.8749)),
        (3, "D0", 762, (26.0839, 25.5437, 27.1474)),
    ],
)
def test_seeds_mean_the_same_specimens_as_ever(
    seed: int, defect: str, atoms: int, mean: tuple[float, float, float]
) -> None:
    drawn = material("pt_ceo2").random_specimen(seed)
    built = material("pt_ceo2").build(drawn)
    positions = built.positions[built.symbols == "Pt"]
    assert (drawn.defect, len(positions)) == (defect, atoms)
    np.testing.assert_allclose(positions.mean(axis=0), mean, atol=1e-3)


def test_specimen_of_the_simulated_camera_is_the_same_as_ever() -> None:
    models = states(SPECIMEN)
    assert [len(model) for model in models] == [1865] * 6
    np.testing.assert_allclose(models[0].positions[:1850].mean(axis=0), (26.9023, 9.6575, 19.2901), atol=1e-3)


def test_more_defects_leave_the_rest_of_a_specimen_as_it_is() -> None:
    kinds = set()
    for seed in range(60):
        paper, more = (material("pt_ceo2").random_specimen(seed, defects) for defects in ("paper", "all"))
        assert paper.as_dict() | {"defect": None} == more.as_dict() | {"defect": None}
        assert paper.defect in PAPER_DEFECTS
        kinds.add(more.defect)
    assert kinds == set(DEFECTS)


def test_drawn_specimens_cover_the_papers_ranges() -> None:
    drawn = [material("pt_ceo2").random_specimen(seed) for seed in range(200)]
    for name, low, high in (
        ("thickness_nm", 3, 6),
        ("radius_a", 8, 14),
        ("tilt_x_deg", -4, 4),
        ("tilt_y_deg", -4, 4),
    ):
        values = [getattr(one, name) for one in drawn]
        assert low <= min(values) < low + 0.1 * (high - low)
        assert high - 0.1 * (high - low) < max(values) <= high
    assert {one.shape for one in drawn} == {"PtNp1", "PtNp2", "PtNp3", "PtNp4"}


@pytest.mark.parametrize("name", MATERIALS)
@pytest.mark.parametrize("shape", range(4))
def test_particle_is_a_crystal_with_the_right_bond(name: str, shape: int) -> None:
    positions = particle(name, shape=material(name).Specimen.SHAPES[shape])  # type: ignore[attr-defined]
    nearest, _ = cKDTree(positions).query(positions, k=2)
    np.testing.assert_allclose(nearest[:, 1], METALS[name].bond_a, rtol=1e-6)


def test_ceria_is_two_oxygen_to_one_cerium() -> None:
    symbols = material("pt_ceo2").build(specimen("pt_ceo2")).symbols
    assert (symbols == "O").sum() == 2 * (symbols == "Ce").sum()


def test_titanate_has_the_bonds_of_a_perovskite_and_ends_in_titania() -> None:
    atoms = material("au_srtio3").build(specimen("au_srtio3"))
    inner = np.flatnonzero((atoms.positions[:, 1] < 10) & (atoms.positions[:, 1] > 4))
    inner = inner[np.abs(atoms.positions[inner, 2] - atoms.cell[2, 2] / 2) < 8]
    inner = inner[np.abs(atoms.positions[inner, 0] - atoms.cell[0, 0] / 2) < 20]
    oxygen = atoms.positions[atoms.symbols == "O"]
    for symbol, bond_a, count in (
        ("Ti", SRTIO3_LATTICE_A / 2, 6),
        ("Sr", SRTIO3_LATTICE_A / np.sqrt(2), 12),
    ):
        found = atoms.positions[[atom for atom in inner if atoms.symbols[atom] == symbol]]
        distance, _ = cKDTree(oxygen).query(found, k=count + 1)
        np.testing.assert_allclose(distance[:, :count], bond_a, rtol=1e-6)
        assert (distance[:, count] > 1.2 * bond_a).all()
    support = atoms[~atoms.arrays["particle"]]
    top = support.positions[:, 1] > support.positions[:, 1].max() - 0.1
    assert set(support.symbols[top]) == {"Ti", "O"}


@pytest.mark.parametrize("name", MATERIALS)
def test_thicker_specimens_have_proportionally_more_support(name: str) -> None:
    count = [
        (~material(name).build(specimen(name, thickness_nm=t)).arrays["particle"]).sum() for t in (3.0, 6.0)
    ]
    assert count[1] / count[0] == pytest.approx(2, rel=0.15)


@pytest.mark.parametrize("name", MATERIALS)
def test_every_defect_changes_the_surface_in_its_own_way(name: str) -> None:
    atoms = {defect: particle(name, defect=defect) for defect in DEFECTS}
    count = {defect: len(columns(positions)[1]) for defect, positions in atoms.items()}
    assert count["D1"] == count["D0"] - 1
    assert count["D2"] == count["D0"] - 2
    assert count["Dh"] == count["D0"]
    assert len(atoms["Dh"]) < len(atoms["D0"])
    assert count["Ds"] == count["D0"] + 1
    assert count["D0"] < count["adatoms"] <= count["D0"] + 3
    assert len(atoms["D0"]) < len(atoms["adatoms"]) <= len(atoms["D0"]) + 15
    assert count["row"] <= count["D0"] - 2
    assert count["step"] <= count["D0"] - 2


@pytest.mark.parametrize("name", MATERIALS)
@pytest.mark.parametrize("seed", range(4))
def test_adatoms_sit_in_hollow_sites(name: str, seed: int) -> None:
    positions = particle(name, seed=seed, defect="adatoms")
    bonds = neighbours(positions, METALS[name])
    # adatoms are those built last; each leans on three atoms at least
    adatoms = [atom for atom in range(len(positions) - 15, len(positions)) if len(bonds[atom]) - 1 <= 7]
    assert adatoms
    assert min(len(bonds[atom]) - 1 for atom in adatoms) >= 3


@pytest.mark.parametrize("name", MATERIALS)
@pytest.mark.parametrize("seed", range(4))
def test_missing_rows_and_steps_touch_a_facet_alone(name: str, seed: int) -> None:
    tops = {}
    for defect in ("D0", "row", "step"):
        positions = particle(name, seed=seed, defect=defect)
        _, places = columns(positions)
        tops[defect] = len(places)
        exposed = surface_columns(places - [0, places[:, 1].min()], METALS[name].lattice_a)
        assert len(exposed) < len(places)
    assert 2 <= tops["D0"] - tops["row"] <= 8
    assert 2 <= tops["D0"] - tops["step"] <= 12


@pytest.mark.parametrize("name", MATERIALS)
@pytest.mark.parametrize("seed", range(4))
def test_twin_is_two_crystals_that_share_a_close_packed_layer(name: str, seed: int) -> None:
    def directions(positions: np.ndarray) -> int:
        bonds = [
            np.round((positions[other] - positions[atom]) / METALS[name].bond_a, 2) + 0.0
            for atom, others in enumerate(neighbours(positions, METALS[name]))
            for other in others
            if other != atom
        ]
        return len(np.unique(bonds, axis=0))

    twin = particle(name, seed=seed, defect="twin")
    assert directions(particle(name, seed=seed)) == 12
    assert directions(twin) == 18  # six of the shared layer, six out of it for each crystal
    nearest, _ = cKDTree(twin).query(twin, k=2)
    np.testing.assert_allclose(nearest[:, 1], METALS[name].bond_a, rtol=1e-6)
    assert max(map(len, neighbours(twin, METALS[name]))) == 13


@pytest.mark.parametrize("name", MATERIALS)
def test_surface_columns_are_the_outer_ones(name: str) -> None:
    _, places = columns(particle(name))
    surface = surface_columns(places - [0, places[:, 1].min()], METALS[name].lattice_a)
    assert 0 < len(surface) < len(places)
    inner = np.argmin(np.linalg.norm(places - places.mean(axis=0), axis=1))
    assert inner not in surface


@pytest.mark.parametrize("name", MATERIALS)
def test_columns_are_known_when_they_are_tilted(name: str) -> None:
    upright, tilted = (
        material(name).build(specimen(name, tilt_x_deg=tilt, tilt_y_deg=-tilt)) for tilt in (0.0, 4.0)
    )
    straight, sheared = projected_columns(upright), projected_columns(tilted)
    particles = straight[straight["particle"]], sheared[sheared["particle"]]
    assert len(particles[0]) == len(particles[1])
    assert (particles[0]["surface"] == particles[1]["surface"]).all()
    assert np.abs(particles[0]["x"] - particles[1]["x"]).max() < 3
    assert set(particles[0]["element"]) == {upright.numbers.max()}
    assert not straight["surface"][~straight["particle"]].any()
    support = straight[~straight["particle"]]
    assert len(support) == len(columns(upright.positions[~upright.arrays["particle"]])[1])
    assert (straight["x"] < material(name).CELL_A).all()


def test_column_across_the_cells_side_is_one_column() -> None:
    atoms = Atoms("Pt3", positions=[[0.2, 5, 1], [0.0, 5, 4], [9.8, 5, 7]], cell=[10, 10, 9], pbc=True)
    for name, value in (("column", [7, 7, 7]), ("particle", [True] * 3), ("surface", [False] * 3)):
        atoms.set_array(name, np.array(value))
    (column,) = projected_columns(atoms)
    assert min(column["x"], 10 - column["x"]) == pytest.approx(0, abs=1e-5)
    assert (column["y"], column["element"]) == (5, 78)


@pytest.mark.parametrize(
    ("positions", "text"),
    [
        ([[1, 1, 1], [1, 1.5, 1]], r"0\.50 A apart.*O number 0 at \(1\.00, 1\.00, 1\.00\) A and Pt number 1"),
        ([[0.1, 1, 1], [9.8, 1, 1]], r"0\.30 A apart"),
        ([[1, 1, 1], [1, 11, 1]], r"1 atoms lie outside of the cell of \(10\.00, 10\.00, 5\.00\) A"),
        ([[1, 1, 1], [1, np.nan, 1]], "not a number"),
    ],
)
def test_impossible_atoms_are_named(positions: list[list[float]], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        check_atoms(Atoms("OPt", positions=positions, cell=[10, 10, 5], pbc=True))


def test_cells_that_cannot_be_imaged_are_refused() -> None:
    with pytest.raises(ValueError, match="no atoms"):
        check_atoms(Atoms(cell=[10, 10, 5]))
    with pytest.raises(ValueError, match="square in x and y"):
        check_atoms(Atoms("O", positions=[[1, 1, 1]], cell=[10, 11, 5]))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"thickness_nm": 0.0}, "thickness must be positive, got 0.0 nm"),
        ({"shape": "cube"}, "shape must be one of PtNp1, PtNp2, PtNp3, PtNp4, got 'cube'"),
        ({"defect": "D9"}, "defect must be one of"),
        ({"radius_a": 100.0}, "got 100.0 A"),
        ({"tilt_x_deg": 30.0}, "tilt about x must lie within 10.0 degrees, got 30.0 degrees"),
        ({"tilt_y_deg": float("nan")}, "tilt about y"),
    ],
)
def test_impossible_specimens_are_refused(change: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        specimen("pt_ceo2", **change)


def test_particle_too_small_for_its_defect_is_refused() -> None:
    with pytest.raises(ValueError, match="too small"):
        particle("pt_ceo2", seed=19, radius_a=4.0, defect="row", shape="PtNp4")


def test_unknown_names_are_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="material must be one of pt_ceo2, au_srtio3, got 'wood'"):
        material("wood")
    with pytest.raises(ValueError, match="defects must be paper or all, got 'some'"):
        material("pt_ceo2").random_specimen(0, "some")


@pytest.mark.parametrize("name", MATERIALS)
@pytest.mark.parametrize("defect", DEFECTS)
def test_no_defect_brings_metal_atoms_closer_than_their_bond(name: str, defect: str) -> None:
    for seed in range(12):
        drawn = replace(material(name).random_specimen(seed), defect=defect, tilt_x_deg=0.0, tilt_y_deg=0.0)
        atoms = material(name).build(drawn)
        metal = atoms.positions[atoms.arrays["particle"]]
        assert cKDTree(metal).query(metal, k=2)[0][:, 1].min() > 0.95 * METALS[name].bond_a
