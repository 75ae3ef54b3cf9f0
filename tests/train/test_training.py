"""From simulated images to an engine, in small."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the laboratory needs: pip install 'emstream[train]'")
pytest.importorskip("abtem", reason="the laboratory needs: pip install 'emstream[train]'")

from train import shards
from train.dataset import Images
from train.evaluate import evaluate, psnr_ssim
from train.metrics import psnr_db
from train.noise import DOSE_RANGE, draw_doses, expose

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "train/recipes/unet32-cpu.toml"


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-m", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110, check=False)


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("simulated")
    done = run(
        "train.simulate", folder, "--specimens", 2, "--images-each", 2, "--workers", 1, "--first-seed", 5
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_images_are_one_in_vacuum_and_have_the_contrast_of_measured_ones(simulated: Path) -> None:
    images = Images(simulated)
    assert len(images) == len(images.parameters) == 4
    vacuum = images.images[:, 25:60].float()
    assert abs(vacuum.mean().item() - 1) < 0.05
    views = 0.45 * images.central_views(512)
    assert 0.005 < views.std(dim=(1, 2, 3)).min() < views.std(dim=(1, 2, 3)).max() < 0.2


def test_every_image_knows_its_parameters(simulated: Path) -> None:
    for parameters in Images(simulated).parameters:
        assert set(parameters) >= {"seed", "shape", "defect", "thickness_nm", "defocus_nm", "blur_a"}


def test_simulation_goes_on_where_it_was_killed(simulated: Path) -> None:
    shard = next(simulated.glob("shard-*.h5"))
    before = shard.stat().st_mtime_ns
    (simulated / "shard-999999.partial").write_bytes(b"half")
    assert (
        run("train.simulate", simulated, "--specimens", 2, "--images-each", 2, "--first-seed", 5).returncode
        == 0
    )
    assert shard.stat().st_mtime_ns == before


def test_missing_data_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"python -m train\.simulate"):
        Images(tmp_path)


def test_view_without_turning_is_the_image_itself(simulated: Path) -> None:
    images = Images(simulated)
    one, flat = torch.ones(1), torch.zeros(1)
    view = images.view(torch.tensor([0]), 128, one * images.sampling_a, flat, one, torch.zeros(1, 2))
    size = images.images.shape[-1]
    part = images.images[0, size // 2 - 64 : size // 2 + 64, size // 2 - 64 : size // 2 + 64].float()
    assert (view[0, 0] - part).abs().max() < 1e-2


def test_random_views_differ_and_repeat_with_the_generator(simulated: Path) -> None:
    images = Images(simulated)
    first, again = (images.random_views(3, 64, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first[0], first[1])


def test_crops_that_leave_the_image_are_refused(simulated: Path) -> None:
    images, generator = Images(simulated), torch.Generator().manual_seed(0)
    images.random_views(1, 512, generator)
    with pytest.raises(ValueError, match=r"crops of 640 px do not fit .* crop_px can be 516 at most"):
        images.random_views(1, 640, generator)


def test_doses_cover_the_range_and_favour_the_papers() -> None:
    doses = draw_doses(4000, torch.Generator().manual_seed(0))
    assert doses.min() >= DOSE_RANGE[0] * 0.99
    assert doses.max() <= DOSE_RANGE[1] * 1.01
    assert ((doses - 0.45).abs() < 0.15).float().mean() > 0.45


def test_noise_is_poisson() -> None:
    counts = expose(torch.ones(2, 1, 200, 200), torch.tensor([0.45, 5.0]), torch.Generator().manual_seed(0))
    for counted, dose in zip(counts, (0.45, 5.0), strict=True):
        assert counted.mean().item() == pytest.approx(dose, rel=0.03)
        assert (counted.var() / counted.mean()).item() == pytest.approx(1, rel=0.04)


def test_psnr_is_the_papers() -> None:
    truth = np.full((32, 32), 0.45)
    db, _ = psnr_ssim(truth + 0.03, truth)
    assert db == pytest.approx(30.46, abs=0.01)
    assert psnr_db(truth + 0.03, truth) == pytest.approx(db, abs=1e-3)


def test_evaluation_prefers_the_truth() -> None:
    view = np.random.default_rng(0).uniform(0.5, 1.5, (64, 64)).astype(np.float32)
    scores = evaluate({"noisy": lambda y: y, "mean": lambda y: np.full_like(y, y.mean())}, [view], 0.45)
    assert scores["mean"]["psnr_db"] > scores["noisy"]["psnr_db"]


def test_command_trains_on_simulated_images(simulated: Path, tmp_path: Path) -> None:
    others = shards.read(next(simulated.glob("shard-*.h5")))
    others.parameters = [text.replace('"seed": ', '"seed": 10') for text in others.parameters]
    (tmp_path / "val").mkdir()
    shards.write(tmp_path / "val" / "shard-000105.h5", others)
    values = tomllib.loads(RECIPE.read_text()) | {"train": str(simulated), "validate": str(tmp_path / "val")}
    values |= {"batch": 1, "crop_px": 64, "base": 4}
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items()))
    done = run("train.fit", recipe, tmp_path / "run", "--no-compile", "--steps", 5)
    assert done.returncode == 0, done.stderr
    assert torch.load(tmp_path / "run/best.pt", weights_only=True)["step"] == 5
