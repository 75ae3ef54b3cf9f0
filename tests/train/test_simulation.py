"""From atomic models to a data set on disk, in small."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the laboratory needs: pip install 'emstream[train]'")
pytest.importorskip("abtem", reason="the laboratory needs: pip install 'emstream[train]'")

from distributed import Client, LocalCluster
from scipy.ndimage import map_coordinates

from train import shards
from train import simulate as simulation
from train.dataset import Images
from train.imaging import GRID_PX, Optics, contrast_class, exit_wave, image, in_pixels, use_device
from train.preview import caption, choose
from train.shards import Shard, ShardError
from train.simulate import Plan, missing, simulate, simulate_specimen, write_shard
from train.structures import COLUMN, MATERIALS, check_atoms, material, projected_columns
from train.structures.pt_ceo2 import Specimen, build

PLAN = Plan(images_each=2, defocus_nm=(-20, 20), defects="all")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One shard of two specimens."""
    folder = tmp_path_factory.mktemp("whole")
    write_shard(folder / "shard-000000.h5", {seed: simulate_specimen(seed, PLAN) for seed in (0, 1)}, PLAN)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """The same, to spoil."""
    shutil.copy(whole / "shard-000000.h5", tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with (
        LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            processes=False,
            protocol="tcp://",
            dashboard_address="127.0.0.1:0",
            host="127.0.0.1",
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client


def quick(seed: int, plan: Plan, device: str = "cpu") -> tuple[np.ndarray, list[str], np.ndarray]:
    """Stands in for `simulate_specimen`."""
    parameters = {"seed": seed, "defect": "D0"}
    return (
        np.full((plan.images_each, 4, 4), seed, np.float16),
        [json.dumps(parameters | {"defocus_nm": n}) for n in range(plan.images_each)],
        np.zeros(3, COLUMN),
    )


def one_shard(path: Path) -> Path:
    (found,) = path.glob("shard-*.h5")
    return found


@pytest.mark.parametrize("name", MATERIALS)
def test_images_show_columns_where_the_data_set_says(name: str) -> None:
    substance: Any = material(name)
    atoms = substance.build(substance.Specimen(seed=1, tilt_x_deg=1.0, tilt_y_deg=-0.5))
    check_atoms(atoms)
    columns = in_pixels(projected_columns(atoms), substance.CELL_A)
    own = columns[columns["particle"]]
    intensity = image(exit_wave(atoms), Optics(defocus_nm=6.0))
    assert intensity.shape == (GRID_PX, GRID_PX)
    assert contrast_class(intensity, columns) == "black"
    mean = {}
    for dx in (-6, -3, 0, 3, 6):
        for dy in (-6, -3, 0, 3, 6):
            mean[dx, dy] = map_coordinates(intensity, [own["y"] + dy, own["x"] + dx], order=1).mean()
    assert min(mean, key=lambda shift: mean[shift]) == (0, 0)


def test_columns_turn_white_at_overfocus() -> None:
    atoms = build(Specimen(seed=1))
    columns = in_pixels(projected_columns(atoms), atoms.cell[0, 0])
    wave = exit_wave(atoms)
    classes = [contrast_class(image(wave, Optics(defocus_nm=d)), columns) for d in (-16.0, 6.0)]
    assert classes == ["white", "black"]


@pytest.mark.parametrize(("level", "expected"), [(1.3, "white"), (0.7, "black"), (None, "intermediate")])
def test_contrast_is_that_of_most_of_the_particles_columns(level: float | None, expected: str) -> None:
    intensity = np.full((40, 40), 1.0, np.float32)
    columns = np.zeros(11, COLUMN)
    columns["x"], columns["y"] = 3 * np.arange(11) + 2, 20
    columns["particle"] = True
    columns["particle"][-1] = False
    intensity[20, 3 * np.arange(11) + 2] = np.where(np.arange(11) % 2, 1.3, 0.7) if level is None else level
    intensity[20, 2] = 2 - intensity[20, 2]  # one of ten is otherwise, and the support does not count
    intensity[20, 32] = 5.0
    assert contrast_class(intensity, columns) == expected


def test_every_image_knows_what_decided_it(whole: Path) -> None:
    images = Images(whole)
    assert len(images) == 4
    for parameters in images.parameters:
        assert set(parameters) == {
            "material", "contrast", "seed", "shape", "defect", "thickness_nm", "radius_a", "tilt_x_deg",
            "tilt_y_deg", "defocus_nm", "cs_um", "c5_mm", "focal_spread_nm", "convergence_mrad", "blur_a",
        }  # fmt: skip
        assert parameters["contrast"] in ("white", "black", "intermediate")
    settings = shards.settings(one_shard(whole))
    assert (settings["material"], settings["seeds"], settings["images_each"]) == ("pt_ceo2", [0, 1], 2)
    assert set(settings["versions"]) == {"abtem", "ase", "numpy"}


def test_columns_of_a_view_are_those_of_the_image(whole: Path) -> None:
    images = Images(whole)
    for index in (0, 3):
        columns = images.columns(index, 512)
        assert len(columns) == len(columns.positions) == len(columns.element) == len(columns.on_particle)
        assert set(columns.element[columns.on_particle]) == {"Pt"}
        assert set(columns.element[~columns.on_particle]) == {"Ce", "O"}
        view = images.central_views(512, [index])[0, 0].numpy()
        stored = images._columns[images.parameters[index]["seed"]]
        x, y = columns.positions.T
        inner = (x > 5) & (x < 506) & (y > 5) & (y < 506)
        seen = map_coordinates(view, [y, x], order=1)[inner & columns.on_particle]
        whole_image = images.images[index].float().numpy()
        own = stored[stored["particle"]]
        truth = map_coordinates(whole_image, [own["y"], own["x"]], order=1)
        assert np.isin(np.round(seen, 1), np.round(truth, 1)).mean() > 0.9
    small = images.columns(0, 128)
    assert len(small) < len(images.columns(0, 512))
    assert (small.positions > -0.5).all()
    assert (small.positions < 127.5).all()


def test_shards_come_back_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "shard-000000.h5"
    columns = np.array([(1.5, 2.5, 78, True, False), (3, 4, 8, False, False)], COLUMN)
    shard = Shard(
        images=np.arange(32, dtype=np.float16).reshape(2, 4, 4), parameters=['{"seed": 7}'] * 2,
        sampling_a=0.1, settings={"seeds": [7]}, columns={7: columns},
    )  # fmt: skip
    digest = shards.write(path, shard)
    back = shards.read(path)
    np.testing.assert_array_equal(back.images, shard.images)
    np.testing.assert_array_equal(back.columns[7], columns)
    assert (back.parameters, back.sampling_a, back.settings) == (shard.parameters, 0.1, {"seeds": [7]})
    assert back.sha256 == back.digest() == digest
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("part", ["images", "parameters", "columns"])
def test_changed_shard_is_named_with_both_checksums_and_the_remedy(folder: Path, part: str) -> None:
    path = one_shard(folder)
    with h5py.File(path, "r+") as file:
        was = file.attrs["sha256"]
        if part == "images":
            file["images"][1, 5, 5] = 2
        elif part == "parameters":
            file["parameters"][0] = file["parameters"].asstr()[0].replace("PtNp", "AuNp")
        else:
            columns = file["columns/1"][:]
            columns["x"][0] += 1
            file["columns/1"][:] = columns
    with pytest.raises(
        ShardError, match=rf"{path.name} has changed.*[0-9a-f]{{64}} and was {was}; delete it"
    ):
        Images(folder)


def test_half_a_shard_is_named_with_the_remedy(folder: Path) -> None:
    path = one_shard(folder)
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(ShardError, match=rf"{path.name} is no whole HDF5 file.*delete it and run"):
        Images(folder)


def test_shards_of_an_earlier_version_are_read_with_a_warning(folder: Path, whole: Path) -> None:
    path = one_shard(folder)
    with h5py.File(path, "r+") as file:
        del file["columns"], file.attrs["sha256"], file.attrs["settings"]
        for place, text in enumerate(file["parameters"].asstr()[:]):
            parameters = json.loads(text)
            del parameters["material"], parameters["contrast"]
            file["parameters"][place] = json.dumps(parameters)
    with pytest.warns(UserWarning, match="1 of 1 shards .* without checksums") as warned:
        images = Images(folder)
    assert len(warned) == 1
    assert shards.settings(path) == {
        "material": "pt_ceo2", "defects": "paper", "defocus_nm": [0, 20], "seeds": [0, 1], "images_each": 2,
    }  # fmt: skip
    for index in (0, 3):
        rebuilt, stored = images.columns(index, 512), Images(whole).columns(index, 512)
        np.testing.assert_allclose(rebuilt.positions, stored.positions, atol=1e-4)
        np.testing.assert_array_equal(rebuilt.on_particle, stored.on_particle)


def test_images_of_one_group_can_be_kept_alone(whole: Path) -> None:
    images = Images(whole)
    first = images.parameters[0]["shape"]
    number = sum(parameters["shape"] == first for parameters in images.parameters)
    before = images.images[0].clone()
    images.keep("shape", first)
    assert len(images) == len(images.images) == number
    assert {parameters["shape"] for parameters in images.parameters} == {first}
    assert torch.equal(images.images[0], before)
    with pytest.raises(ValueError, match=f"no image has the shape PtNp9, only {first}"):
        images.keep("shape", "PtNp9")


def test_two_materials_do_not_mix_in_a_directory(folder: Path) -> None:
    shard = shards.read(one_shard(folder))
    shards.write(folder / "shard-000008.h5", replace(shard, sampling_a=shard.sampling_a * 1.04))
    with pytest.raises(ShardError, match=r"differ in pixel size.*one directory per material"):
        Images(folder)


def test_simulation_that_dies_loses_its_last_shards_alone(
    tmp_path: Path, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan(images_each=21)
    fatal = 10

    def dying(seed: int, plan: Plan, device: str = "cpu") -> Any:
        if seed == fatal:
            raise ValueError("the lights went out")
        return quick(seed, plan)

    monkeypatch.setattr(simulation, "simulate_specimen", dying)
    todo = missing(tmp_path, range(15), plan)
    assert [len(seeds) for seeds in todo.values()] == [3, 3, 3, 3, 3]
    with pytest.raises(ValueError, match="the lights went out"):
        simulate(client, todo, plan, quiet=True)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert {path.suffix for path in kept} <= {".h5"}
    (tmp_path / "shard-000009.partial").write_bytes(b"half")

    monkeypatch.setattr(simulation, "simulate_specimen", quick)
    todo = missing(tmp_path, range(15), plan)
    assert not set(todo) & set(kept)
    simulate(client, todo, plan, quiet=True)
    assert missing(tmp_path, range(15), plan) == {}
    assert all(path.stat().st_mtime_ns == written for path, written in kept.items())
    assert sorted(p["seed"] for p in Images(tmp_path).parameters) == sorted(list(range(15)) * 21)


def test_what_is_not_enough_for_a_shard_survives_a_kill(
    tmp_path: Path, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan(images_each=2)
    data, asked = (tmp_path / name for name in ("data", "asked"))
    data.mkdir()
    asked.mkdir()

    def dying(seed: int, plan: Plan, device: str = "cpu") -> Any:
        if seed == 6:
            time.sleep(1)
            raise ValueError("the lights went out")
        return quick(seed, plan)

    def noted(seed: int, plan: Plan, device: str = "cpu") -> Any:
        (asked / str(seed)).touch()
        return quick(seed, plan)

    monkeypatch.setattr(simulation, "SAVE_S", -1)
    monkeypatch.setattr(simulation, "simulate_specimen", dying)
    with pytest.raises(ValueError, match="the lights went out"):
        simulate(client, missing(data, range(8), plan), plan, quiet=True)
    assert [path.name for path in data.iterdir()] == ["shard-000000.unfinished"]
    kept = shards.settings(data / "shard-000000.unfinished")["seeds"]
    assert len(kept) >= 1

    monkeypatch.setattr(simulation, "simulate_specimen", noted)
    simulate(client, missing(data, range(8), plan), plan, quiet=True)
    assert {int(path.name) for path in asked.iterdir()} == set(range(8)) - set(kept)
    assert [path.name for path in data.iterdir()] == ["shard-000000.h5"]
    images = Images(data)
    assert [p["seed"] for p in images.parameters] == [seed for seed in range(8) for _ in range(2)]
    assert images.images[:, 0, 0].tolist() == [p["seed"] for p in images.parameters]


def test_unfinished_shards_of_another_plan_do_not_count(tmp_path: Path) -> None:
    plan, path = Plan(images_each=2), tmp_path / "shard-000000.h5"
    write_shard(path.with_suffix(".unfinished"), {1: quick(1, plan)}, plan)
    assert list(simulation.read_unfinished(path, [0, 1], plan)) == [1]
    assert simulation.read_unfinished(path, [0, 1], replace(plan, defects="all")) == {}
    assert simulation.read_unfinished(path, [0], plan) == {}
    path.with_suffix(".unfinished").write_bytes(b"half")
    assert simulation.read_unfinished(path, [0, 1], plan) == {}


def test_specimens_beyond_what_was_asked_for_are_said(
    whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--specimens", "1", "--images-each", "2", "--defects", "all"]
    monkeypatch.setattr(sys, "argv", ["train.simulate", str(whole), *options])
    simulation.main()
    assert "also has 1 specimens that were not asked for, 1-1" in capsys.readouterr().err


def test_more_specimens_complete_the_last_shard(
    tmp_path: Path, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulation, "simulate_specimen", quick)
    plan = Plan(images_each=2)
    simulate(client, missing(tmp_path, range(3), plan), plan, quiet=True)
    todo = missing(tmp_path, range(10), plan)
    assert list(todo.values()) == [list(range(8)), [8, 9]]
    assert missing(tmp_path, range(2), plan) == {}


@pytest.mark.parametrize(
    ("plan", "text"),
    [
        (replace(PLAN, images_each=3), "images_each 2, and now images_each is to be 3: choose another"),
        (replace(PLAN, defects="paper"), "defects all, and now defects is to be paper"),
        (replace(PLAN, material="au_srtio3"), "material pt_ceo2, and now material is to be au_srtio3"),
        (replace(PLAN, defocus_nm=(0, 20)), r"defocus_nm \[-20, 20\], and now defocus_nm is to be \[0, 20\]"),
    ],
)
def test_directory_of_another_plan_is_refused(whole: Path, plan: Plan, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        missing(whole, range(2), plan)


def test_impossible_specimen_stops_the_simulation_with_its_seed(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crowded(specimen: Specimen) -> Any:
        atoms = build(specimen)
        atoms.positions[1] = atoms.positions[0] + [0, 0, 0.4]
        return atoms

    monkeypatch.setattr("train.structures.pt_ceo2.build", crowded)
    plan = Plan(images_each=1)
    with pytest.raises(ValueError, match=r"specimen 4 of pt_ceo2 is impossible: atoms are 0\.40 A apart"):
        simulate(client, missing(tmp_path, range(4, 5), plan), plan, quiet=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"images_each": 42}, "must lie in 1-41, the defoci of -20 to 20 nm, got 42"),
        ({"defocus_nm": (5, 1)}, "from low to high, got 5 to 1 nm"),
        ({"defects": "none"}, "defects must be one of paper, all"),
        ({"material": "wood"}, "material must be one of"),
    ],
)
def test_impossible_plans_are_refused(change: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Plan(**change)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--images-each", "42"], "must lie in 1-41"),
        (["--specimens", "0"], "--specimens must be at least 1, got 0"),
        (["--first-seed", "-1"], "--first-seed must be at least 0, got -1"),
        (["--workers", "2", "--scheduler", "tcp://127.0.0.1:1"], "brings its own"),
        (["--material", "wood"], "invalid choice: 'wood'"),
    ],
)
def test_wrong_use_is_explained(
    options: list[str], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["train.simulate", str(tmp_path), *options])
    with pytest.raises(SystemExit) as stopped:
        simulation.main()
    assert stopped.value.code == 2
    assert text in capsys.readouterr().err


def test_full_disk_is_found_before_the_work(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9, 10**6))
    monkeypatch.setattr(sys, "argv", ["train.simulate", str(tmp_path), "--specimens", "100"])
    with pytest.raises(SystemExit, match=r"the images take 0\.4 GB, and .* has 0\.0 GB left"):
        simulation.main()


def test_cluster_of_ones_own_does_the_work(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulation, "simulate_specimen", quick)
    options = [
        str(tmp_path),
        "--specimens",
        "3",
        "--images-each",
        "1",
        "--scheduler",
        client.scheduler.address,
    ]
    monkeypatch.setattr(sys, "argv", ["train.simulate", *options])
    simulation.main()
    assert len(Images(tmp_path)) == 3


def test_gpu_that_is_not_there_is_explained() -> None:
    try:
        import cupy  # noqa: F401
    except ImportError:
        with pytest.raises(RuntimeError, match=r"needs an NVIDIA GPU and CuPy .* use --device cpu"):
            use_device("gpu")
    with pytest.raises(ValueError, match="device must be cpu or gpu, got 'tpu'"):
        use_device("tpu")


def test_contact_sheet_shows_what_there_is(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sheet = tmp_path / "sheet.png"
    monkeypatch.setattr(sys, "argv", ["train.simulate", str(whole), "--preview", str(sheet)])
    simulation.main()
    assert sheet.read_bytes().startswith(b"\x89PNG")
    tiles = choose([one_shard(whole)], 3)
    assert len(tiles) == 3
    assert {tile.parameters["seed"] for tile in tiles} == {0, 1}
    parameters = tiles[0].parameters
    for shown in (parameters["defect"], parameters["shape"], parameters["contrast"], "nm thick"):
        assert shown in caption(parameters)


def test_contact_sheet_of_nothing_simulates_a_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sheet, folder = tmp_path / "sheet.png", tmp_path / "none"
    options = [str(folder), "--specimens", "1", "--material", "au_srtio3", "--preview", str(sheet)]
    monkeypatch.setattr(sys, "argv", ["train.simulate", *options])
    simulation.main()
    assert sheet.exists()
    assert not folder.exists()
