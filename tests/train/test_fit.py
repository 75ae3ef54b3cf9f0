"""One training run, in small, and every mistake that its recipe can hold."""

from __future__ import annotations

import copy
import csv
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the laboratory needs: pip install 'emstream[train]'")
pytest.importorskip("abtem", reason="the laboratory needs: pip install 'emstream[train]'")

from emstream.inference import EngineCard
from tests.train.discs import Discs
from train import fit, photographs
from train.export import write_pt2
from train.log import COLUMNS, Log
from train.losses import LOSSES
from train.metrics import psnr_db
from train.models import parameters
from train.models.folding import fold_norms
from train.recipe import Recipe, RecipeError, load, save

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "train/recipes").glob("*.toml"))
ROWS = {
    "dncnn": 668_225, "durr": 233_440, "unet32": 352_000, "unet64": 1_404_416, "unet128": 5_610_496,
    "unet128-six": 70_504_960, "wide64": 1_406_336, "photographs-two": 102_336, "photographs-four": 352_000,
    "photographs-six": 4_410_496, "unet32-two": 102_336, "unet32-six": 4_410_496,
}  # fmt: skip
TINY: dict[str, Any] = {
    "network": "UNet", "base": 4, "scales": 2, "train": "discs", "validate": "discs", "steps": 4, "batch": 2,
    "crop_px": 32, "learning_rate": 1e-3, "compile": False,
}  # fmt: skip
PHOTOGRAPHS: dict[str, Any] = {
    "task": "photographs",
    "noise_sigma": [0, 100],
    "train": None,
    "validate": None,
}


class Specimens(Discs):
    """Of the seeds that the directory is named after."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.parameters = [{"seed": int(seed), "material": "pt_ceo2"} for seed in str(directory).split()]


def tiny(**change: Any) -> Recipe:
    return Recipe(**{**TINY, **change})


@pytest.fixture(autouse=True)
def discs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "Images", Discs)
    monkeypatch.setattr(fit, "CALIBRATION_BATCHES", 3)


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def write(path: Path, **values: Any) -> Path:
    def toml(value: Any) -> str:
        if isinstance(value, dict):
            return "{ " + ", ".join(f"{key} = {toml(inner)}" for key, inner in value.items()) + " }"
        return json.dumps(value)

    path.write_text("".join(f"{key} = {toml(value)}\n" for key, value in values.items() if value is not None))
    return path


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# -- recipes


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_a_row_of_the_tables(path: Path) -> None:
    row, _, machine = path.stem.replace("-further", "").rpartition("-")
    recipe = Recipe.read(path)
    assert parameters(recipe.outline()) == ROWS[row]
    assert machine in ("cpu", "gpu")
    assert (recipe.task == "photographs") == row.startswith("photographs")


@pytest.mark.parametrize("row", ROWS)
def test_every_row_has_a_recipe_for_a_gpu_and_one_for_a_cpu(row: str) -> None:
    assert {path.stem for path in RECIPES} >= {f"{row}-gpu", f"{row}-cpu"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": 3}, "unknown key colour; known: network, base"),
        ({"batch": None}, "missing key batch"),
        ({"train": None}, "missing key train"),
        ({"hours": 1.0}, r"give either hours or steps, got hours 1\.0 and steps 4"),
        ({"steps": None}, "give either hours or steps"),
        ({"steps": None, "hours": 0}, "hours must be positive, got 0"),
        ({"batch": "4"}, "batch must be int, got '4'"),
        ({"batch": True}, "batch must be int, got True"),
        ({"learning_rate": -1.0}, r"learning_rate must be positive, got -1\.0"),
        ({"loss": "mae"}, "loss must be one of mse, poisson, anscombe, got 'mae'"),
        ({"network": "VNet"}, "no network 'VNet'; there are UNet, DnCNN, DURR"),
        ({"network": "DnCNN"}, "DnCNN has no scales"),
        ({"crop_px": 34}, "crop_px must be a multiple of 4, got 34"),
        ({"noise_sigma": [0, 100]}, "noise_sigma is for photographs"),
        (
            {**PHOTOGRAPHS, "noise_sigma": None},
            r"photographs need noise_sigma = \[lowest, highest\], got None",
        ),
        ({**PHOTOGRAPHS, "noise_sigma": [50, 20]}, "photographs need noise_sigma"),
        ({**PHOTOGRAPHS, "noise_sigma": ["a", "b"]}, "photographs need noise_sigma"),
        ({**PHOTOGRAPHS, "loss": "poisson"}, "photographs have no doses"),
        ({**PHOTOGRAPHS, "only": {"shape": "PtNp1"}}, "photographs have no doses"),
        ({"only": {"shape": "PtNp1", "defect": "D0"}}, "only takes one group"),
        ({"only": "PtNp1"}, "only must be dict, got 'PtNp1'"),
        ({"seed": 10**20}, "seed must lie within .* got 100000000000000000000"),
        ({"distill_weight": 2.0}, r"distill_weight must be at most 1, got 2\.0"),
    ],
)
def test_bad_recipe_is_explained(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "bad.toml", **{**TINY, **change})
    with pytest.raises(RecipeError, match=message) as caught:
        Recipe.read(path)
    assert str(path) in str(caught.value)


def test_recipe_that_is_not_toml_or_not_there_is_explained(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("= 1")
    with pytest.raises(RecipeError, match=r"bad\.toml: Invalid"):
        Recipe.read(tmp_path / "bad.toml")
    with pytest.raises(RecipeError, match="No such file"):
        Recipe.read(tmp_path / "none.toml")


def test_recipes_of_earlier_checkpoints_are_read() -> None:
    earlier = {
        "network": "UNet", "base": 64, "scales": 4, "unshuffle": 2, "train": "data/train", "validate": "data/val",
        "hours": 1.9, "batch": 4, "crop_px": 320, "learning_rate": 5e-4, "seed": 1,
    }  # fmt: skip
    assert parameters(Recipe(**earlier).outline()) == ROWS["wide64"]
    assert Recipe(**earlier) == Recipe.read(ROOT / "train/recipes/wide64-cpu.toml")


def test_command_explains_a_bad_recipe_without_a_traceback(tmp_path: Path) -> None:
    path = write(tmp_path / "bad.toml", **TINY, colour=3)
    command = [sys.executable, "-W", "ignore", "-m", "train.fit", str(path), str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "unknown key colour" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


# -- training


def test_training_learns_and_logs(tmp_path: Path) -> None:
    recipe = tiny(base=8, steps=80, learning_rate=1e-2)
    fit.fit(recipe, tmp_path)
    read, network, state = load(tmp_path / "best.pt")
    (row,) = rows(tmp_path)
    assert (read, state["step"], row["step"]) == (recipe, 80, "80")
    assert tuple(row) == COLUMNS
    assert float(row["validation_psnr_db"]) == state["validation_psnr_db"]
    pairs = [pair for batch in fit.held_out(Discs(Path())) for pair in zip(*batch, strict=True)]
    noisy = sum(psnr_db(counts.numpy(), truth.numpy()) for counts, truth in pairs) / len(pairs)
    assert state["validation_psnr_db"] > noisy + 10
    assert network.bias_free


@pytest.mark.parametrize("network", ["UNet", "DnCNN", "DURR"])
@pytest.mark.parametrize("bias", [False, True])
def test_every_network_trains(tmp_path: Path, network: str, bias: bool) -> None:
    scales = 2 if network == "UNet" else None
    recipe = tiny(network=network, scales=scales, bias=bias, doses="paper" if bias else "range")
    trained = fit.fit(recipe, tmp_path)
    torch.manual_seed(recipe.seed)
    fresh = recipe.build()
    moved = [not torch.equal(a, b) for a, b in zip(trained.parameters(), fresh.parameters(), strict=True)]
    learning = [parameter.requires_grad for parameter in trained.parameters()]
    assert moved == learning


def norms(network: torch.nn.Module) -> list[torch.nn.BatchNorm2d]:
    return [module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)]


def test_bias_free_norms_are_set_from_data_and_then_stay(tmp_path: Path) -> None:
    short, long = (fit.fit(tiny(steps=steps), tmp_path / str(steps)) for steps in (1, 3))
    for a, b in zip(norms(short), norms(long), strict=True):
        assert not torch.equal(a.running_var, torch.ones_like(a.running_var))
        assert torch.equal(a.running_var, b.running_var)


def test_norms_of_biased_networks_follow_the_batches(tmp_path: Path) -> None:
    short, long = (
        fit.fit(tiny(steps=steps, bias=True, doses="paper"), tmp_path / str(steps)) for steps in (1, 3)
    )
    for a, b in zip(norms(short), norms(long), strict=True):
        assert not torch.equal(a.running_mean, b.running_mean)


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the middle of a step."""
    calls = iter(range(step))

    def interrupted(*tensors: torch.Tensor) -> torch.Tensor:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return LOSSES["mse"](*tensors)

    monkeypatch.setattr(fit, "LOSSES", {"mse": interrupted})


def test_stopped_training_goes_on_exactly_where_its_checkpoint_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny(steps=6)
    whole = fit.fit(recipe, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(fit, "CHECKPOINT_S", -1)  # a checkpoint after every step
        stop_at(3, patch)
        with pytest.raises(KeyboardInterrupt):
            fit.fit(recipe, tmp_path / "stopped")
    assert load(tmp_path / "stopped/checkpoint.pt")[2]["step"] == 3
    assert same(fit.fit(recipe, tmp_path / "stopped"), whole)
    assert load(tmp_path / "stopped/best.pt")[2]["step"] == 6


def test_a_minute_is_the_most_that_a_kill_costs() -> None:
    assert fit.CHECKPOINT_S < 60


def test_finished_training_goes_on_with_more_steps(tmp_path: Path) -> None:
    fit.fit(tiny(steps=2), tmp_path)
    fit.fit(tiny(steps=5), tmp_path)
    assert [row["step"] for row in rows(tmp_path)] == ["2", "5"]
    assert load(tmp_path / "checkpoint.pt")[2]["step"] == 5


def test_worse_network_does_not_replace_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit.fit(tiny(steps=2), tmp_path)
    before = (tmp_path / "best.pt").read_bytes()
    monkeypatch.setattr(fit, "validation_psnr", lambda *_: -100.0)
    fit.fit(tiny(steps=3), tmp_path)
    assert (tmp_path / "best.pt").read_bytes() == before


def test_training_by_the_clock_ends(tmp_path: Path) -> None:
    fit.fit(tiny(steps=None, hours=1e-4), tmp_path)
    assert load(tmp_path / "checkpoint.pt")[2]["spent_s"] >= 0.36


class Ticks:
    """A clock that moves on by `step_s` whenever it is read, and by a minute at first, as when it compiles."""

    def __init__(self, step_s: float) -> None:
        self.now_s, self.step_s, self.read = 0.0, step_s, 0

    def __call__(self, device: torch.device) -> float:
        self.read += 1
        self.now_s += 60 if self.read == 2 else self.step_s
        return self.now_s


@pytest.mark.parametrize("budget", [{"steps": 20}, {"steps": None, "hours": 79 / 3600}])
def test_a_run_of_twenty_steps_never_takes_the_whole_learning_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: dict[str, Any]
) -> None:
    monkeypatch.setattr(fit, "clock_s", Ticks(1.0))
    monkeypatch.setattr(fit, "LOG_EVERY", 1)
    fit.fit(tiny(**budget), tmp_path)
    rates = [float(row["learning_rate"]) / TINY["learning_rate"] for row in rows(tmp_path)]
    assert len(rates) == 20
    assert rates[2] <= 3 / 30
    assert max(rates) < 0.6


def test_long_runs_warm_up_for_300_steps_and_shorter_ones_for_a_tenth() -> None:
    assert [fit.warm_up(step, 40_000) for step in (0, 149, 299, 5000)] == [1 / 300, 0.5, 1, 1]
    assert [fit.warm_up(step, 1000) for step in (49, 99)] == [0.5, 1]
    assert fit.warm_up(14, 20) == 0.5
    assert fit.warm_up(0, math.inf) == 1 / 300


def test_a_loss_that_is_no_number_stops_training_and_names_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter(range(9))

    def diverging(*tensors: torch.Tensor) -> torch.Tensor:
        return LOSSES["mse"](*tensors) * (math.nan if next(calls) == 2 else 1)

    monkeypatch.setattr(fit, "LOSSES", {"mse": diverging})
    with pytest.raises(fit.Diverged, match=r"the loss is nan in step 3, at a learning rate of \d.*smaller"):
        fit.fit(tiny(steps=5), tmp_path)
    assert not (tmp_path / "checkpoint.pt").exists()


def test_a_network_that_gives_no_numbers_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "validation_psnr", lambda *_: math.nan)
    with pytest.raises(fit.Diverged, match="the network of step 2 validates with nan dB: take a recipe with"):
        fit.fit(tiny(steps=2), tmp_path)
    assert not (tmp_path / "best.pt").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 4, "seed": 2}, r"checkpoint\.pt is of another recipe: batch was 2 and is now 4, seed was 1 and is"),
        ({"train": "other"}, "train was 'discs' and is now 'other'; choose another OUTDIR"),
        ({"loss": "poisson"}, "loss was 'mse' and is now 'poisson'"),
    ],
)  # fmt: skip
def test_a_run_does_not_go_on_with_another_recipe(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    recipe = tiny()
    save(tmp_path / "checkpoint.pt", recipe, network=recipe.build().state_dict(), step=1)
    with pytest.raises(RecipeError, match=message):
        fit.fit(tiny(**change), tmp_path)


def test_a_run_that_has_had_its_budget_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit.fit(tiny(steps=2), tmp_path)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    fit.fit(tiny(steps=None, hours=1e-9), tmp_path)
    assert "nothing is left to do" in capsys.readouterr().out
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_a_best_network_that_was_deleted_is_made_again(tmp_path: Path) -> None:
    fit.fit(tiny(steps=2), tmp_path)
    (tmp_path / "best.pt").unlink()
    fit.fit(tiny(steps=2), tmp_path)
    assert load(tmp_path / "best.pt")[2]["step"] == 2
    assert [row["step"] for row in rows(tmp_path)] == ["2"]


def test_a_kill_while_validating_does_not_lose_the_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> float:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fit, "validation_psnr", killed)
        with pytest.raises(KeyboardInterrupt):
            fit.fit(tiny(steps=3), tmp_path)
    assert load(tmp_path / "checkpoint.pt")[2]["step"] == 3
    fit.fit(tiny(steps=3), tmp_path)
    assert load(tmp_path / "best.pt")[2]["step"] == 3
    assert [row["step"] for row in rows(tmp_path) if row["validation_psnr_db"]] == ["3"]
    assert not load(tmp_path / "checkpoint.pt")[2]["validation_due"]


def test_a_cpu_validates_on_a_few_views(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Discs, "central_views", lambda self, size_px: self.images.expand(90, 1, 128, 128))
    assert sum(len(noisy) for noisy, _ in fit.held_out(Discs(Path()))) == 45
    assert sum(len(noisy) for noisy, _ in fit.held_out(Discs(Path()), 16)) == 15


def test_the_best_network_knows_what_it_was_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "Images", Specimens)
    fit.fit(tiny(train="12 7 9", validate="100 103", steps=1), tmp_path)
    training = load(tmp_path / "best.pt")[2]["training"]
    assert (training["seeds"], training["materials"]) == ([7, 12], ["pt_ceo2"])
    assert training["validated_on"] == {"seeds": [100, 103], "materials": ["pt_ceo2"]}
    assert training["images"] == 128
    assert training["date"].startswith("20")
    assert "commit" in training
    assert load(tmp_path / "checkpoint.pt")[2]["training"] == training


def test_training_images_do_not_validate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "Images", Specimens)
    with pytest.raises(RecipeError, match=r"train = 1 2 and validate = 2 3 both show specimen 2 of pt_ceo2"):
        fit.fit(tiny(train="1 2", validate="2 3"), tmp_path)


def test_a_student_knows_what_its_teacher_has_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "Images", Specimens)
    fit.fit(tiny(train="1 2", validate="3", steps=1), tmp_path / "teacher")
    taught = tiny(train="5 6", validate="7", distill_from=str(tmp_path / "teacher/best.pt"), steps=1)
    fit.fit(taught, tmp_path / "student")
    assert load(tmp_path / "student/best.pt")[2]["training"]["taught_by"]["seeds"] == [1, 2]


@pytest.mark.parametrize(
    "change", [{"base": 8}, {"scales": 3}, {"bias": True}, {"unshuffle": 2}, PHOTOGRAPHS]
)
def test_checkpoint_of_another_network_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    recipe = tiny()
    save(tmp_path / "checkpoint.pt", recipe, network=recipe.build().state_dict(), step=1)
    with pytest.raises(
        RecipeError, match=r"UNet, 4 base channels, 2 scales, bias-free\); choose another OUTDIR"
    ):
        fit.fit(tiny(**change), tmp_path)


@pytest.mark.parametrize("content", [b"", b"rubbish", None])
def test_file_that_is_no_checkpoint_is_explained(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "checkpoint.pt"
    if content is None:
        torch.save({"weights": 3}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(RecipeError, match=r"checkpoint\.pt is no checkpoint of train\.fit"):
        load(path)


def test_log_forgets_what_a_kill_has_undone(tmp_path: Path) -> None:
    log = Log(tmp_path, 0)
    log.write(100, 10, "1e-3", "0.5", None)
    log.write(200, 20, "1e-3", "0.4", 30.0)
    log.close()
    Log(tmp_path, 100).close()
    assert [row["step"] for row in rows(tmp_path)] == ["100"]


# -- several processes


def test_two_processes_end_with_the_same_weights(tmp_path: Path) -> None:
    recipe = write(tmp_path / "recipe.toml", **TINY)
    script = tmp_path / "two.py"
    script.write_text(
        "import os, sys, torch\n"
        "from pathlib import Path\n"
        "from tests.train.discs import Discs\n"
        "from train import fit\n"
        "fit.Images, fit.CALIBRATION_BATCHES = Discs, 3\n"
        "network = fit.fit(fit.Recipe.read(Path(sys.argv[1])), Path(sys.argv[2]))\n"
        "torch.save(network.state_dict(), f'{sys.argv[2]}/{os.environ[\"RANK\"]}.pt')\n"
    )
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        *torchrun,
        str(script),
        str(recipe),
        str(tmp_path / "out"),
    ]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=110, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"out/{rank}.pt", weights_only=True) for rank in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    alone = fit.fit(tiny(), tmp_path / "alone").state_dict()
    assert not torch.equal(first["stem.0.weight"], alone["stem.0.weight"])
    assert load(tmp_path / "out/checkpoint.pt")[2]["step"] == TINY["steps"]


# -- losses and teachers


@pytest.mark.parametrize("name", LOSSES)
def test_losses_vanish_at_the_truth_and_agree_near_it(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    truth = 0.8 + 0.4 * torch.rand(2, 1, 32, 32, generator=generator, dtype=torch.float64)
    near = truth + 0.01 * torch.randn(truth.shape, generator=generator, dtype=torch.float64)
    doses = torch.full((2, 1, 1, 1), 0.45, dtype=torch.float64)
    assert LOSSES[name](truth, truth, doses).item() == pytest.approx(0, abs=1e-12)
    assert 0.3 < LOSSES[name](near, truth, doses).item() / 1e-4 < 1.5


@pytest.mark.parametrize("name", LOSSES)
def test_losses_pull_negative_estimates_up(name: str) -> None:
    estimate = torch.full((1, 1, 4, 4), -2.0, requires_grad=True)
    LOSSES[name](estimate, torch.zeros(1, 1, 4, 4) + 0.5, torch.ones(1, 1, 1, 1)).backward()
    assert (estimate.grad < 0).all()
    assert estimate.grad.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_trains(tmp_path: Path, name: str) -> None:
    fit.fit(tiny(loss=name), tmp_path)
    assert float(rows(tmp_path)[0]["loss"]) > 0


def test_a_recipes_camera_makes_the_frames_in_electrons(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    camera = {
        "counting": False,
        "mtf_nyquist": 0.5,
        "gain": 30.0,
        "offset": 100.0,
        "dead_pixel_fraction": 0.01,
    }
    made = tiny(camera=camera, crop_px=128, doses="paper", batch=8)
    images = Discs(Path())
    counts, truth, _ = fit.draw_batch(images, made, torch.Generator().manual_seed(0))
    ideal = fit.draw_batch(images, replace(made, camera=None), torch.Generator().manual_seed(0))[0]
    vacuum = truth == 1
    assert counts.mean() == pytest.approx(0.99 * ideal.mean().item(), rel=0.02)
    assert counts[vacuum].var() < 0.7 * ideal[vacuum].var()  # charge is shared by neighbours
    assert not torch.equal(counts, counts.round())
    ((noisy, _),) = fit.held_out(images, camera=fit.Camera(**camera))
    assert not torch.equal(noisy, noisy.round())
    assert noisy.mean() == pytest.approx(0.99 * fit.held_out(images)[0][0].mean().item(), rel=0.03)
    path = write(tmp_path / "recipe.toml", **TINY, camera={"mtf": 0.5})
    with pytest.raises(RecipeError, match=r"recipe\.toml: camera has no mtf; it takes counting, mtf_nyquist"):
        Recipe.read(path)
    write(path, **TINY, camera={"gain": -2.0})
    with pytest.raises(RecipeError, match=r"gain must be positive, got -2.0 ADU per electron"):
        Recipe.read(path)


def test_starts_from_the_weights_of_another_run(tmp_path: Path) -> None:
    first = fit.fit(tiny(steps=3), tmp_path / "first")
    on = tiny(steps=1, learning_rate=1e-30, start_from=str(tmp_path / "first/best.pt"))
    second = fit.fit(on, tmp_path / "second")
    ema = load(tmp_path / "first/best.pt")[1]
    assert same(second, ema)
    assert not same(second, first)
    began = load(tmp_path / "second/best.pt")[2]["training"]["began_from"]
    assert began["steps"] == 3
    (tmp_path / "first/best.pt").unlink()  # needed once alone
    fit.fit(replace(on, steps=2), tmp_path / "second")  # resumes
    assert same(load(tmp_path / "second/best.pt")[1], ema)
    assert load(tmp_path / "second/best.pt")[2]["training"]["began_from"] == began


def test_start_from_another_network_is_refused(tmp_path: Path) -> None:
    fit.fit(tiny(base=8, steps=1), tmp_path / "first")
    with pytest.raises(RecipeError, match=r"start_from = .*best.pt, which holds another network .*8 base"):
        fit.fit(tiny(start_from=str(tmp_path / "first/best.pt")), tmp_path / "second")
    with pytest.raises(RecipeError, match="No such file"):
        fit.fit(tiny(start_from=str(tmp_path / "none.pt")), tmp_path / "second")


@pytest.mark.filterwarnings("ignore:No complete tensor:UserWarning")  # torch.export's own
def test_starts_from_the_weights_of_an_engine(tmp_path: Path) -> None:
    fit.fit(tiny(steps=3), tmp_path / "first")
    _, trained, _ = load(tmp_path / "first/best.pt")
    folded = copy.deepcopy(trained).eval()
    fold_norms(folded)
    card = EngineCard(
        name="tiny", architecture=trained.description, parameters=1, field_of_view_px=29, multiple_px=4,
        bias_free=True, dose_range=(0.1, 10.0), sampling_pm=6.2, psnr_db=30.0, ssim=0.9, trained="3 steps",
        commit="abc", training={"seeds": [0, 1], "materials": ["pt_ceo2"]},
    )  # fmt: skip
    write_pt2(folded, tmp_path / "tiny.pt2", card)
    on = tiny(steps=1, learning_rate=1e-30, start_from=str(tmp_path / "tiny.pt2"))
    second = fit.fit(on, tmp_path / "second").eval()
    counts = torch.poisson(torch.full((1, 1, 64, 64), 0.45))
    with torch.no_grad():
        torch.testing.assert_close(
            second(counts), trained.eval()(counts), rtol=5e-3, atol=1e-3
        )  # halved weights
        assert not torch.allclose(second(counts), tiny().build().eval()(counts), rtol=5e-3, atol=1e-3)
    assert any(parameter.requires_grad for parameter in second.parameters())
    began = load(tmp_path / "second/best.pt")[2]["training"]["began_from"]
    assert began == {"engine": "tiny", "trained": "3 steps", "seeds": [0, 1], "materials": ["pt_ceo2"]}
    (tmp_path / "tiny.pt2").unlink()  # needed once alone
    fit.fit(replace(on, steps=2), tmp_path / "second")  # resumes


def test_start_from_an_unfit_engine_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"unet32.pt2, which holds another network .*32 base channels"):
        fit.fit(tiny(start_from=str(ROOT / "engines/unet32.pt2")), tmp_path / "run")
    (tmp_path / "rubbish.pt2").write_bytes(b"rubbish")
    with pytest.raises(RecipeError, match=r"start_from = .*rubbish.pt2 is no engine of train.export"):
        fit.fit(tiny(start_from=str(tmp_path / "rubbish.pt2")), tmp_path / "run")


def test_student_follows_its_teacher(tmp_path: Path) -> None:
    fit.fit(tiny(base=8, steps=2), tmp_path / "teacher")
    taught = tiny(distill_from=str(tmp_path / "teacher/best.pt"))
    student = fit.fit(taught, tmp_path / "student")
    alone = fit.fit(tiny(), tmp_path / "alone")
    assert not same(student, alone)
    assert same(fit.fit(replace(taught, distill_weight=1e-30), tmp_path / "hardly"), alone)


def test_biased_teacher_sees_raw_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit.fit(tiny(bias=True, steps=1), tmp_path / "teacher")
    seen = []
    forward = fit.predict
    monkeypatch.setattr(fit, "predict", lambda *a: seen.append((a[0].training, a[3])) or forward(*a))
    fit.fit(tiny(distill_from=str(tmp_path / "teacher/best.pt"), steps=1), tmp_path / "student")
    assert seen[-2:] == [(True, True), (False, False)]


def test_teacher_of_another_task_is_refused(tmp_path: Path) -> None:
    recipe = tiny(**PHOTOGRAPHS)
    save(tmp_path / "best.pt", recipe, network=recipe.build().state_dict())
    with pytest.raises(RecipeError, match="cannot teach here: it is for photographs"):
        fit.fit(tiny(distill_from=str(tmp_path / "best.pt")), tmp_path / "out")
    with pytest.raises(RecipeError, match="No such file"):
        fit.fit(tiny(distill_from=str(tmp_path / "none.pt")), tmp_path / "out")


# -- photographs


def test_no_photograph_is_on_two_sides() -> None:
    sides = [photographs.TRAINING, photographs.VALIDATION, photographs.TEST]
    names = [name for side in sides for name in side]
    assert len(names) == len(set(names))
    stems = [Path(name).stem for name in names]
    assert len(stems) == len(set(stems)), "PyWavelets and scikit-image ship some of the same pictures"


@pytest.fixture
def packages() -> None:
    for module in ("skimage", "sklearn", "pywt", "matplotlib"):
        pytest.importorskip(module)


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize("name", photographs.TRAINING + photographs.VALIDATION + photographs.TEST)
def test_photographs_are_grey_levels(name: str) -> None:
    image = photographs.read(name)
    assert min(image.shape) >= 300
    assert 0 <= image.min() < 70
    assert 150 < image.max() <= 255


@pytest.mark.usefixtures("packages")
def test_crops_of_photographs_differ_and_repeat_with_the_generator() -> None:
    images = photographs.Photographs(photographs.TRAINING[:2])
    first, again = (images.random_views(3, 64, torch.Generator().manual_seed(3)) for _ in range(2))
    assert first.shape == (3, 1, 64, 64)
    assert torch.equal(first, again)
    assert not torch.equal(first[0], first[1])
    with pytest.raises(ValueError, match="no photograph has 600 x 600 pixels"):
        images.random_views(1, 600, torch.Generator())


@pytest.mark.usefixtures("packages")
def test_photographs_train_and_are_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(photographs, "TRAINING", photographs.TRAINING[:1])
    monkeypatch.setattr(photographs, "VALIDATION", photographs.VALIDATION[:1])
    monkeypatch.setattr(photographs, "TEST", ("scikit-image/chelsea.png",))
    fit.fit(tiny(**PHOTOGRAPHS, steps=3), tmp_path)
    assert float(rows(tmp_path)[0]["validation_psnr_db"]) > 0
    monkeypatch.setattr(sys, "argv", ["photographs", str(tmp_path / "best.pt")])
    photographs.main()
    scores = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert scores["noisy"]["30"]["psnr_db"] == pytest.approx(18.6, abs=0.1)
    assert scores["noisy"]["70"]["psnr_db"] < scores["noisy"]["30"]["psnr_db"]
    assert set(scores["network"]["70"]) == {"psnr_db", "psnr_sd", "ssim", "ssim_sd", "images"}


# -- a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_training_runs_on_the_gpu(tmp_path: Path) -> None:
    trained = fit.fit(tiny(steps=3), tmp_path)
    assert all(parameter.is_cuda for parameter in trained.parameters())
