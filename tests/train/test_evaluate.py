"""Scores: groups, surfaces, speed and the tables beside the paper's."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the laboratory needs: pip install 'emstream[train]'")
pytest.importorskip("pywt", reason="the laboratory needs: pip install 'emstream[train]'")
pytest.importorskip("psutil", reason="the laboratory needs: pip install 'emstream[train]'")

from scipy.ndimage import gaussian_filter

from tests.train.toy import SIZE_PX, SPACING_PX, ToyColumns, ToyImages, draw, toy_columns
from train import baselines, evaluate, networks, plots, surface, tables
from train.dataset import group_of
from train.evaluate import grouped, measure_ms
from train.metrics import Spread, psnr_db, psnr_ssim
from train.models import DURR, DnCNN, Network, UNet, macs_per_pixel, parameters
from train.recipe import Recipe, save
from train.surface import Surface, SurfaceScore, boundary, match

ROOT = Path(__file__).parents[2]
DOSE = 0.45


# -- figures per image -----------------------------------------------------------------


def test_the_quick_psnr_is_the_papers() -> None:
    rng = np.random.default_rng(0)
    truth, estimate = rng.uniform(-0.1, 1.2, (64, 64)), rng.uniform(-0.1, 1.2, (64, 64))
    assert psnr_db(estimate, truth) == pytest.approx(psnr_ssim(estimate, truth)[0], abs=1e-6)


@pytest.mark.parametrize(
    ("key", "group"),
    [("thickness_nm", 4.0), ("tilt", 5.0), ("defocus_nm", 10.0), ("defect", "Ds"), ("contrast", "white")],
)
def test_images_fall_into_groups_like_the_papers_settings(key: str, group: float | str) -> None:
    parameters = {
        "thickness_nm": 3.6, "tilt_x_deg": -3.0, "tilt_y_deg": 4.0, "defocus_nm": 12.0, "defect": "Ds",
        "contrast": "white",
    }  # fmt: skip
    assert group_of(parameters, key) == group


def test_images_that_do_not_know_a_parameter_say_so() -> None:
    with pytest.raises(ValueError, match=r"do not know their contrast, only defect; simulate them again"):
        group_of({"defect": "D0"}, "contrast")


def test_one_image_has_no_spread() -> None:
    assert Spread.of([31.234]).text(2) == "31.23"
    assert Spread.of([30.0, 31.0]).text(2) == "30.50 +- 0.50"


def test_a_group_holds_the_spread_of_its_images() -> None:
    rows = [{"image": n, "psnr_db": 30.0 + n} for n in range(4)]
    assert grouped(rows, ToyImages(), "shape") == {"PtNp1": Spread(31, 1, 2), "PtNp2": Spread(32, 1, 2)}


def test_everything_is_timed_the_same_number_of_times() -> None:
    calls = {"a": 0, "b": 0}

    def denoiser(name: str) -> evaluate.Denoiser:
        def denoise(counts: np.ndarray) -> np.ndarray:
            calls[name] += 1
            return counts

        return denoise

    times = measure_ms({name: denoiser(name) for name in calls}, np.zeros((8, 8)), turns=3)
    assert set(times) == {"a", "b"}
    assert calls == {"a": 6, "b": 6}


# -- surfaces --------------------------------------------------------------------------


def score(found: np.ndarray, true: np.ndarray) -> SurfaceScore:
    return SurfaceScore(len(match(found, true)), len(found), len(true))


def ring(count: int) -> np.ndarray:
    angle = np.linspace(0, 2 * np.pi, count, endpoint=False)
    return 250 + 200 * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def test_one_wrong_surface_atom_takes_f1_to_0_933() -> None:
    true = ring(15)
    found = true.copy()
    found[4] += 25
    one = score(found, true)
    assert (one.matched, one.found, one.true) == (14, 15, 15)
    assert round(one.f1, 3) == 0.933
    assert one.precision == one.recall == pytest.approx(14 / 15)
    assert one.jaccard == pytest.approx(14 / 16)


def test_one_missing_surface_atom_costs_recall_alone() -> None:
    one = score(ring(8)[:7], ring(8))
    assert (one.precision, one.recall) == (1.0, 7 / 8)
    assert round(one.f1, 3) == 0.933


def test_one_extra_surface_atom_costs_precision_alone() -> None:
    one = score(np.concatenate([ring(8), [[0.0, 0.0]]]), ring(8))
    assert (one.precision, one.recall) == (8 / 9, 1.0)


def test_nothing_found_scores_nothing() -> None:
    one = score(np.empty((0, 2)), ring(8))
    assert (one.precision, one.recall, one.f1, one.jaccard) == (0, 0, 0, 0)


def test_a_true_column_is_matched_once() -> None:
    true = np.array([[0.0, 0.0]])
    found = np.array([[3.0, 0.0], [0.0, 1.0]])
    assert match(found, true).tolist() == [[1, 0]]


def test_matching_makes_as_many_pairs_as_there_can_be() -> None:
    # The nearest pair, 6 and 7, would leave 0 and 15 without partners.
    found, true = np.array([[6.0, 0.0], [15.0, 0.0]]), np.array([[0.0, 0.0], [7.0, 0.0]])
    assert sorted(match(found, true).tolist()) == [[0, 0], [1, 1]]


def lattice() -> np.ndarray:
    rows = [(SPACING_PX * (n + row % 2 / 2), 0.866 * SPACING_PX * row) for row in range(6) for n in range(6)]
    return np.array(rows)


def test_the_outline_of_a_lattice_is_its_boundary() -> None:
    points = lattice()
    inside = boundary(points).reshape(6, 6)
    assert inside[0].all()
    assert inside[-1].all()
    assert not inside[1:-1, 1:-1].any()


def test_a_missing_surface_atom_bares_the_atoms_below_it() -> None:
    points = np.delete(lattice(), 3, axis=0)
    assert boundary(points)[lattice().tolist().index(lattice()[6 + 3].tolist()) - 1]


def test_an_atom_far_out_is_a_surface_of_its_own() -> None:
    points = np.concatenate([lattice(), [[-300.0, -300.0]]])
    assert boundary(points)[-1]


@pytest.mark.parametrize("depth", [-0.4, 0.4])
def test_the_noiseless_picture_shows_every_surface_column(depth: float) -> None:
    columns = toy_columns()
    true = Surface(columns, (SIZE_PX, SIZE_PX), bright=depth > 0)
    assert len(true.positions) > 8
    assert true.score(DOSE * draw(columns.positions, depth=depth)).f1 == 1.0


def test_the_rule_for_surfaces_agrees_with_the_neighbours_that_columns_have() -> None:
    columns = toy_columns()
    own = Surface(columns, (SIZE_PX, SIZE_PX), bright=False).positions
    exposed = columns.positions[columns.on_surface]
    # By neighbours the row on the support is exposed, too, where the support has fewer columns.
    assert len(match(own, exposed, 1)) == len(own)


def test_a_picture_that_lacks_a_surface_atom_scores_less() -> None:
    columns = toy_columns()
    true = Surface(columns, (SIZE_PX, SIZE_PX), bright=False)
    middle = np.argmin(np.linalg.norm(columns.positions - true.positions[2], axis=1))
    lacking = np.delete(columns.positions, middle, axis=0)
    one = true.score(DOSE * draw(lacking))
    assert one.recall == pytest.approx(1 - 1 / one.true)
    assert one.precision < 1  # what lies below it faces vacuum now


def test_random_places_score_a_little_and_the_same_each_time() -> None:
    columns = toy_columns()
    true = Surface(columns, (SIZE_PX, SIZE_PX), bright=False)
    picture = DOSE * draw(columns.positions)
    number = len(true.columns(picture))
    chance = true.chance(number)
    assert chance == true.chance(number)
    assert chance.found > 0
    assert chance.f1 < 0.5 < true.score(picture).f1
    assert true.chance(0) == SurfaceScore(0, 0, len(true.positions))


def test_columns_of_the_support_do_not_count() -> None:
    columns = toy_columns()
    everything = ToyColumns(columns.positions, np.zeros(len(columns.positions), bool), columns.on_surface)
    true = Surface(everything, (SIZE_PX, SIZE_PX), bright=False)
    assert true.score(DOSE * draw(columns.positions)) == SurfaceScore(0, 0, 0)


def test_contrast_says_which_way_columns_look() -> None:
    image = DOSE * draw(toy_columns().positions)
    assert not surface.columns_are_bright(image)
    assert surface.columns_are_bright(image, "white")
    assert not surface.columns_are_bright(image, "intermediate")


# -- the command -----------------------------------------------------------------------


class Blur:
    """Stands in for an engine."""

    def __init__(self, path: Path) -> None:
        self.name, self.card = path.stem, None
        self.identity = {"name": self.name, "device": "none"}

    def denoise(self, counts: np.ndarray) -> np.ndarray:
        return gaussian_filter(counts.astype(np.float32), 6.0)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "Images", ToyImages)
    monkeypatch.setattr(evaluate, "load_engine", Blur)
    monkeypatch.setattr(evaluate, "VIEW_PX", SIZE_PX)
    monkeypatch.setattr(evaluate, "SPEED_TURNS", 1)


@pytest.mark.usefixtures("toy")
def test_without_a_folder_it_prints_a_line_per_dose(capsys: pytest.CaptureFixture[str]) -> None:
    evaluate.main(["blur.onnx", "toy", "--doses", "0.45", "3", "--every", "2"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["dose"] for line in lines] == [0.45, 3.0]
    assert lines[0]["engine"]["name"] == "blur"
    assert set(lines[0]["noisy"]) == {"psnr_db", "psnr_sd", "ssim", "ssim_sd", "images"}
    assert lines[1]["blur"]["psnr_db"] > lines[0]["blur"]["psnr_db"]


@pytest.mark.usefixtures("toy")
def test_with_a_folder_it_writes_tables_and_plots(tmp_path: Path) -> None:
    tuned = tmp_path / "tuned.json"
    choice = {
        "baseline": "gaussian",
        "parameters": {"width_px": 8.0},
        "psnr_db": 30.0,
        "views": 1,
        "at_edge": [],
    }
    tuned.write_text(json.dumps([choice | {"dose": dose} for dose in (0.45, 3.0)]))
    out = tmp_path / "out"
    evaluate.main(
        ["blur.onnx", "toy", "--doses", "0.45", "3", "--every", "3", "--baselines", str(tuned), "--surface", "--speed",
         "--by", "tilt", "shape", "--out", str(out)]
    )  # fmt: skip
    results = json.loads((out / "evaluate.json").read_text())
    assert results["command"].startswith("python -m train.evaluate blur.onnx toy")
    assert {entry["denoiser"] for entry in results["scores"]} == {"noisy", "blur", "gaussian"}
    assert {entry["group"] for entry in results["by"]["shape"]} == {"PtNp1", "PtNp2"}
    assert set(results["ms_per_frame"]) == {"blur", "gaussian"}
    clean = next(entry for entry in results["surface"] if entry["denoiser"] == "noiseless")
    assert clean["f1"] == 1.0
    assert clean["chance_f1"] < 0.5
    assert "F1 by chance" in (out / "evaluate.md").read_text()
    text = (out / "evaluate.md").read_text()
    assert "Tuned on 1 views." in text
    for heading in ("PSNR [dB]", "SSIM", "Columns on the surface", "by particle shape", "Quality and speed"):
        assert heading in text
    with (out / "images.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["denoiser"] for row in rows} == {"noisy", "blur", "gaussian", "noiseless"}
    for plot in ("psnr-against-dose", "psnr-by-0.45", "psnr-by-3", "quality-against-speed"):
        assert (out / f"{plot}.png").stat().st_size > 10_000


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--by", "tilt"], "need --out"),
        (["--doses", "0"], "doses must be positive"),
        (["--every", "0"], "at least 1"),
    ],
)
def test_wrong_use_is_explained(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        evaluate.main(["blur.onnx", "toy", *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("toy")
def test_baselines_tuned_at_other_doses_are_refused(tmp_path: Path) -> None:
    tuned = tmp_path / "tuned.json"
    choice = {"baseline": "gaussian", "dose": 1.0, "parameters": {"width_px": 8.0}, "psnr_db": 30.0}
    tuned.write_text(json.dumps([choice | {"views": 1, "at_edge": []}]))
    with pytest.raises(SystemExit, match=r"nothing tuned at \[0.45\] electrons/pixel"):
        evaluate.main(["blur.onnx", "toy", "--baselines", str(tuned)])


@pytest.mark.parametrize("command", ["tables", "evaluate"])
def test_baselines_tuned_on_the_test_images_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    for module in (tables, evaluate):
        monkeypatch.setattr(module, "Images", ToyImages)
    path = tmp_path / "tuned.json"
    narrow = replace(baselines.BASELINES["gaussian"], grid={"width_px": (5.0,)})
    path.write_text(json.dumps([vars(baselines.tune(narrow, ToyImages(), DOSE, views=1, size_px=96))]))
    arguments = ["engine.onnx", "toy"] if command == "evaluate" else ["--test", "toy", "--out", str(tmp_path)]
    with pytest.raises(
        SystemExit, match=r"tuned\.json was tuned on specimens 0-3 of pt_ceo2, .* show specimen 0"
    ):
        {"tables": tables, "evaluate": evaluate}[command].main([*arguments, "--baselines", str(path)])


def overlapping(texts: list[Any]) -> list[tuple[str, str]]:
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text()]
    return [(a, b) for n, (a, one) in enumerate(boxes) for b, other in boxes[:n] if one.overlaps(other)]


@pytest.mark.parametrize("networks_number", [2, 9])
@pytest.mark.parametrize("slowest_ms", [40.0, 400_000.0])
def test_names_and_ticks_of_the_speed_plot_do_not_collide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, networks_number: int, slowest_ms: float
) -> None:
    figures: list[Any] = []
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.append(figure))
    points = [
        {
            "name": f"network {n}",
            "psnr_db": 30 + 0.05 * n,
            "ms": ms,
            "macs_per_pixel": n * 10**n if n else None,
        }
        for n, ms in enumerate(np.geomspace(20, slowest_ms, networks_number + 1))
    ]
    plots.quality_against_speed(points, 512, tmp_path / "plot.png")
    (figure,) = figures
    assert len(figure.axes) == (2 if networks_number >= 3 else 1)
    for axis, names in zip(figure.axes, (networks_number + 1, networks_number), strict=False):
        assert len(axis.texts) == names
        assert overlapping(axis.texts) == []
        assert overlapping(axis.get_xticklabels()) == []


# -- the paper's tables ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("network", "model"),
    [
        (DnCNN(bias=True), "DnCNN"),
        (DURR(bias=True), "small UNet (DURR)"),
        (UNet(32, bias=True), "UNet, 32 channels, 4 scales"),
        (UNet(64, bias=True), "UNet, 64 channels, 4 scales"),
    ],
)
def test_published_networks_count_as_ours_do(network: Network, model: str) -> None:
    row = next(row for row in tables.published()["tem"] if row["model"] == model)
    assert parameters(network) == row["parameters"]
    assert macs_per_pixel(network) == row["macs_per_pixel"]


def trained(**change: object) -> networks.Trained:
    plain = networks.Trained(
        name="ours", path=Path("runs/ours/best.pt"), network=torch.nn.Identity(), multiple_px=1, parameters=352_000,
        bias_free=True, macs_per_pixel=54_176, field_of_view_px=221, steps=6266, hours=1.95, validation_psnr_db=33.0,
    )  # fmt: skip
    return replace(plain, **change)


def test_the_best_validated_network_takes_the_papers_row() -> None:
    rows = tables.published()["tem"]
    placed = tables.place(rows, [trained(), trained(name="better", validation_psnr_db=34.0)])
    assert [one.name if one else None for _, one in placed] == [None, None, "better", None, None, None]


def test_an_engine_is_ranked_by_its_card() -> None:
    engine = trained(name="engine", validation_psnr_db=None, card_psnr_db=34.0)
    placed = tables.place(tables.published()["tem"], [engine, trained(), trained(validation_psnr_db=None)])
    assert placed[2][1] is engine
    assert networks.load(ROOT / "engines" / "unet32.onnx").rank_db > 30


def test_a_network_of_another_field_of_view_gets_a_row_of_its_own() -> None:
    placed = tables.place(tables.published()["tem"], [trained(name="wide", field_of_view_px=442)])
    assert placed[2][1] is None
    assert [row["field_of_view_px"] for row, _ in placed] == [41, 45, 221, 221, 221, 442, 893]
    assert placed[5][0]["model"] == "wide"
    assert "psnr_db" not in placed[5][0]


def test_the_tables_say_what_is_missing_and_what_was_spent() -> None:
    ours = {"psnr_db": 33.15, "psnr_sd": 1.89, "ssim": 0.961, "ssim_sd": 0.012, "images": 256}
    rows = tables.place(tables.published()["tem"], [trained()])
    entries = [row | {"ours": ours if one else None} | tables.budget(one) for row, one in rows]
    lines = tables.markdown_a(entries).splitlines()
    assert sum("not trained" in line for line in lines) == 5
    row = next(line for line in lines if "32 channels" in line)
    for text in ("36.39 +- 0.77", "33.15 +- 1.89", "-3.24", "6,266", "1.95 h"):
        assert text in row


def test_a_few_minutes_are_said_in_minutes() -> None:
    row, _ = tables.place(tables.published()["tem"], [])[0]
    entry = row | {"ours": None} | tables.budget(trained(hours=0.0125))
    assert "| 0.8 min" in tables.markdown_a([entry])


def test_the_tables_say_where_the_order_is_not_the_papers_and_what_is_below_a_blur() -> None:
    def entry(model: str, theirs: float, ours: float, steps: int) -> dict[str, object]:
        return {
            "model": model, "psnr_db": theirs, "ours": {"psnr_db": ours}, "steps": steps, "field_of_view_px": 41,
        }  # fmt: skip

    blur = {"model": "blur", "ours": {"psnr_db": 29.0}, "steps": None, "field_of_view_px": None}
    order, below = tables.remarks_a([blur, entry("A", 30, 31, 2000), entry("B", 36, 28, 40)])
    assert order == (
        "In the paper B is above A, here it is below, 28.00 after 40 steps and 31.00 dB after 2,000 steps."
    )
    assert below == "Not trained long enough, below a Gaussian blur of the same images: B."
    assert tables.remarks_a([blur, entry("A", 30, 31, 2000), entry("B", 36, 32, 40)]) == []


def test_photographs_of_both_noises_stand_beside_the_papers() -> None:
    ours = {
        sigma: {"psnr_db": 28.0, "psnr_sd": 2.0, "ssim": 0.8, "ssim_sd": 0.1, "images": 5}
        for sigma in tables.SIGMAS
    }
    rows = tables.place(tables.published()["photographs"], [trained(recipe={"task": "photographs"})])
    entries = [row | {"ours": ours if one else None} | tables.budget(one) for row, one in rows]
    row = next(line for line in tables.markdown_b(entries).splitlines() if "4 scales" in line)
    for text in ("29.65 +- 2.76", "-1.65", "+1.92"):
        assert text in row


def test_a_network_generalises_worse_to_what_it_has_not_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "VIEW_PX", 96)
    images = ToyImages()
    means = {
        shape: DOSE * float(images.central_views(96, [n]).mean())
        for n, shape in enumerate(("PtNp1", "PtNp2"))
    }
    flat = {shape: (lambda counts, mean=mean: np.full_like(counts, mean)) for shape, mean in means.items()}
    matrix = tables.generalisation(flat, images, "shape")
    assert matrix["PtNp1"]["PtNp1"].mean > matrix["PtNp2"]["PtNp1"].mean
    assert matrix["PtNp2"]["PtNp2"].mean > matrix["PtNp1"]["PtNp2"].mean
    assert matrix["PtNp1"]["all"].images == 4
    text = tables.markdown_generalisation(matrix, "shape", {"PtNp1": 1200, "PtNp2": None})
    off = matrix["PtNp1"]["PtNp2"].mean - matrix["PtNp2"]["PtNp2"].mean
    row = next(line for line in text.splitlines() if line.startswith("| PtNp1"))
    assert "| 1,200 " in row
    assert f"({off:+.2f})" in row
    assert row.count("(") == 1
    assert "paper, on all shapes" in text
    assert "38.10" in text


def test_the_command_writes_every_table_also_when_nothing_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "Images", ToyImages)
    monkeypatch.setattr(tables, "VIEW_PX", 96)
    tables.main(["--test", "toy", "--out", str(tmp_path)])
    text = (tmp_path / "tables.md").read_text()
    assert text.count("not trained") == 6 + 2 * 3
    assert "| Gaussian blur, 7.3 px " in text
    with (tmp_path / "table-b.csv").open() as file:
        assert float(next(csv.DictReader(file))["psnr_db_30"]) == 29.67
    assert (tmp_path / "psnr-against-field-of-view.png").exists()


def test_a_matrix_alone_is_a_report_without_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "Images", ToyImages)
    monkeypatch.setattr(tables, "VIEW_PX", 96)
    network, out = best(tmp_path / "run"), tmp_path / "out"
    tables.main(["--test", "toy", "--out", str(out), "--generalisation", "shape", f"PtNp1={network}"])
    text = (out / "tables.md").read_text()
    assert "| PtNp1 " in text
    assert "(a)" not in text
    assert {path.name for path in out.iterdir()} == {
        "tables.md", "tables.json", "generalisation-shape.csv", "generalisation-shape.png",
    }  # fmt: skip


def best(folder: Path, **state: object) -> Path:
    """A checkpoint of a small network; `only` is its recipe's."""
    made = Recipe(
        network="UNet", base=4, scales=2, train="a", validate="b", steps=1, batch=1, crop_px=64, learning_rate=1e-3,
        only=state.pop("only", None),
    )  # fmt: skip
    folder.mkdir(parents=True)
    save(folder / "best.pt", made, network=made.build().state_dict(), step=7, spent_s=30.0, **state)
    return folder / "best.pt"


@pytest.fixture
def toy_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "Images", ToyImages)
    monkeypatch.setattr(tables, "VIEW_PX", 96)


@pytest.mark.usefixtures("toy_tables")
def test_runs_on_one_group_alone_are_no_rows_of_the_tables(tmp_path: Path) -> None:
    best(tmp_path / "runs/PtNp1", only={"shape": "PtNp1"}, validation_psnr_db=40.0)
    best(tmp_path / "runs/plain", validation_psnr_db=30.0)
    tables.main([str(tmp_path / "runs"), "--test", "toy", "--out", str(tmp_path / "out")])
    results = json.loads((tmp_path / "out/tables.json").read_text())
    assert {entry["name"] for entry in results["tem"] if entry["ours"]} == {None, "plain"}
    assert results["tem"][0]["model"] == "Gaussian blur, 7.3 px"


@pytest.mark.usefixtures("toy_tables")
def test_the_blur_is_as_wide_as_it_was_tuned(tmp_path: Path) -> None:
    tuned = tmp_path / "tuned.json"
    choice = {"baseline": "gaussian", "dose": 0.45, "parameters": {"width_px": 5.5}, "psnr_db": 30.0}
    tuned.write_text(json.dumps([choice | {"views": 1, "at_edge": []}]))
    assert tables.blur(baselines.read(tuned))[0] == "Gaussian blur, 5.5 px"


@pytest.mark.usefixtures("toy_tables")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--generalisation", "shape", "PtNp1=none.pt"], r"error: none\.pt is no checkpoint"),
        (["--generalisation", "shape", "PtNp1=none.pt2"], "error: .*none.pt2"),
        (["none"], "error: none is no network"),
        (["--out", "file/out"], "error: file/out cannot be a folder"),
    ],
)
def test_what_is_missing_is_said_before_anything_is_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(tables, "score_tem", lambda *_: pytest.fail("scored"))
    with pytest.raises(SystemExit, match=message):
        tables.main(["--test", "toy", "--out", "out", *arguments])


@pytest.mark.usefixtures("toy", "toy_tables")
@pytest.mark.parametrize("command", ["tables", "evaluate"])
def test_networks_are_not_tested_on_specimens_that_they_were_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    class Seeded(ToyImages):
        def __init__(self, directory: Path | None = None) -> None:
            super().__init__()
            for n, one in enumerate(self.parameters):
                one |= {"seed": 98 + n, "material": "pt_ceo2"}

    for module in (tables, evaluate):
        monkeypatch.setattr(module, "Images", Seeded)
    path = best(tmp_path / "run", training={"seeds": [0, 99], "materials": ["pt_ceo2"]})
    arguments = [str(path), "--test", "toy"] if command == "tables" else [str(path), "toy"]
    with pytest.raises(
        SystemExit, match=r"error: .* was trained on specimens 0-99 of pt_ceo2, .* specimen 98"
    ):
        {"tables": tables, "evaluate": evaluate}[command].main([*arguments, "--out", str(tmp_path / "out")])
    networks.load(path).refuse_seen([{"seed": 98, "material": "au_srtio3"}, {"seed": 100}])


def test_engines_are_not_tested_on_specimens_that_their_cards_name(monkeypatch: pytest.MonkeyPatch) -> None:
    class Seeded(ToyImages):
        def __init__(self, directory: Path | None = None) -> None:
            super().__init__()
            for one in self.parameters:
                one |= {"seed": 959, "material": "pt_ceo2"}

    monkeypatch.setattr(evaluate, "Images", Seeded)
    with pytest.raises(SystemExit, match=r"error: wide64 was trained on specimens 0-959 of pt_ceo2, .* 959"):
        evaluate.main([str(Path(__file__).parents[2] / "engines/wide64.onnx"), "toy"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_device_that_is_not_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "Images", ToyImages)
    path = best(tmp_path / "run")
    with pytest.raises(SystemExit, match="there is no GPU for device cuda; take cpu"):
        evaluate.main([str(path), "toy", "--device", "cuda"])


def test_specimens_of_the_weights_it_began_from_count_as_seen(tmp_path: Path) -> None:
    began = {"seeds": [0, 9], "materials": ["pt_ceo2"]}
    training = {"seeds": [10, 19], "materials": ["pt_ceo2"], "began_from": began}
    network = networks.load(best(tmp_path / "run", training=training))
    network.refuse_seen([{"seed": 20}])
    for seed in (3, 13):
        with pytest.raises(ValueError, match=f"shows? specimen {seed}"):
            network.refuse_seen(iter([{"seed": 20}, {"seed": seed}]))


def test_specimens_that_chose_or_taught_the_network_count_as_seen(tmp_path: Path) -> None:
    validated = {"seeds": [30, 31], "materials": ["pt_ceo2"]}
    teacher = {"seeds": [40, 41], "materials": ["pt_ceo2"]}
    network = networks.load(
        best(tmp_path / "run", training={"validated_on": validated, "taught_by": teacher})
    )
    with pytest.raises(ValueError, match=r"was validated on specimens 30-31 .* show specimen 30"):
        network.refuse_seen([{"seed": 30}])
    with pytest.raises(ValueError, match=r"was trained on specimens 40-41 .* show specimen 41"):
        network.refuse_seen([{"seed": 41}])


def test_networks_of_photographs_are_not_scored_on_electrons(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "Images", ToyImages)
    made = Recipe(
        network="UNet", base=4, scales=2, task="photographs", noise_sigma=[0, 100], steps=1, batch=1, crop_px=64,
        learning_rate=1e-3,
    )  # fmt: skip
    path = tmp_path / "best.pt"
    save(path, made, network=made.build().state_dict())
    with pytest.raises(SystemExit, match=r"best\.pt was trained on photographs: score it with"):
        evaluate.main([str(path), "toy"])


@pytest.mark.usefixtures("toy")
def test_networks_of_one_name_are_all_scored(tmp_path: Path) -> None:
    names = ["a/blur.onnx", "b/blur.onnx", "gaussian.onnx"]
    evaluate.main([*names, "toy", "--every", "9", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "evaluate.json").read_text())
    assert [entry["denoiser"] for entry in results["scores"]] == [
        "noisy", "a/blur.onnx", "b/blur.onnx", "gaussian.onnx",
    ]  # fmt: skip


@pytest.mark.usefixtures("toy")
def test_the_same_network_twice_is_refused() -> None:
    with pytest.raises(SystemExit, match=r"error: blur\.onnx is named twice"):
        evaluate.main(["blur.onnx", "blur.onnx", "toy"])


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize(("load", "warned"), [(0.5, False), (900.0, True)])
def test_times_on_a_busy_machine_come_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load: float, warned: bool
) -> None:
    monkeypatch.setattr(evaluate.report.os, "getloadavg", lambda: (load, 0, 0))
    evaluate.main(["blur.onnx", "toy", "--every", "4", "--speed", "--out", str(tmp_path)])
    assert ("These times are too long" in (tmp_path / "evaluate.md").read_text()) == warned


@pytest.mark.parametrize("arguments", [["none.pt", "none"], ["none.onnx", "toy"], ["none.pt", "toy"]])
def test_evaluating_what_is_not_there_is_explained(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    if arguments[1] == "toy":
        monkeypatch.setattr(evaluate, "Images", ToyImages)
    with pytest.raises(SystemExit, match=r"^error: [^\n]*none"):
        evaluate.main(arguments)


def test_an_empty_folder_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no best\.pt and no \.pt2 in"):
        tables.find([tmp_path])
