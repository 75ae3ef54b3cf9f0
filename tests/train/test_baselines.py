"""What one would use without a network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="the laboratory needs: pip install 'emstream[train]'")
pywt = pytest.importorskip("pywt", reason="the laboratory needs: pip install 'emstream[train]'")

from tests.train.toy import ToyImages, draw, toy_columns
from train import baselines
from train.baselines import BASELINES, Baseline, anscombe, exact_unbiased_inverse, tune
from train.metrics import psnr_db

DOSE = 0.45
TYPICAL = {
    "gaussian": {"width_px": 8.0},
    "wiener": {"size_px": 27, "noise": 2.0},
    "wiener_fourier": {"smooth_px": 1.5, "noise": 1.7},
    "fourier_spots": {"spot_px": 1.4, "threshold": 2.5, "resolution_px": 120},
    "wavelet": {"bin_px": 4, "name": "sym4", "coarsest_px": 64, "threshold": 3.5, "mode": "hard"},
    "nlm": {"bin_px": 6, "patch_px": 40, "reach_px": 80, "strength": 0.5},
    "pure_let": {"levels": 6},
}


@pytest.fixture(scope="module")
def truth() -> np.ndarray:
    return DOSE * draw(toy_columns().positions)


@pytest.fixture(scope="module")
def counts(truth: np.ndarray) -> np.ndarray:
    return np.random.default_rng(0).poisson(truth).astype(np.float32)


@pytest.mark.parametrize("mean", [0.05, 0.45, 3.0, 40.0, 300.0])
def test_the_exact_inverse_takes_averages_of_roots_back_to_the_mean(mean: float) -> None:
    averaged = anscombe(np.random.default_rng(1).poisson(mean, 400_000)).mean()
    assert exact_unbiased_inverse(averaged) == pytest.approx(mean, rel=0.02)


def test_the_plain_inverse_would_be_too_dark_at_low_counts() -> None:
    averaged = anscombe(np.random.default_rng(1).poisson(0.45, 100_000)).mean()
    assert (averaged / 2) ** 2 - 3 / 8 < 0.8 * 0.45


@pytest.mark.parametrize("name", list(BASELINES))
def test_every_baseline_comes_nearer_to_the_truth(name: str, counts: np.ndarray, truth: np.ndarray) -> None:
    estimate = BASELINES[name].function(counts, **TYPICAL[name])
    assert estimate.shape == counts.shape
    assert estimate.dtype == np.float32
    assert psnr_db(estimate, truth) > psnr_db(counts, truth) + 12
    assert estimate.mean() == pytest.approx(truth.mean(), rel=0.02)


@pytest.mark.parametrize("name", list(BASELINES))
def test_every_baseline_takes_any_size_and_type(name: str) -> None:
    counts = np.random.default_rng(2).poisson(2.0, (97, 130)).astype(np.uint8)
    estimate = BASELINES[name].function(counts, **BASELINES[name].choices()[0])
    assert estimate.shape == counts.shape
    assert np.isfinite(estimate).all()


@pytest.mark.parametrize("name", list(BASELINES))
def test_no_baseline_stumbles_over_an_empty_frame(name: str) -> None:
    estimate = BASELINES[name].function(np.zeros((96, 96), np.uint8), **BASELINES[name].choices()[0])
    np.testing.assert_allclose(estimate, 0, atol=1e-6)


def test_the_noise_of_undecimated_wavelets_halves_with_every_level() -> None:
    noise = np.random.default_rng(3).normal(size=(256, 256))
    _, *details = pywt.swt2(noise, "sym4", level=3, norm=True, trim_approx=True)
    for level, bands in zip((3, 2, 1), details, strict=True):
        for band in bands:
            assert band.std() == pytest.approx(0.5**level, rel=0.1)


def test_pure_let_finds_the_best_weights_without_the_truth() -> None:
    rng = np.random.default_rng(4)
    y = np.linspace(0, 12, 128)
    means = 6 + 4 * np.sin(y)[:, None] * np.sin(y)[None]
    low, high = rng.poisson(means), rng.poisson(1.3 * means)
    detail, total = (high - low).astype(float), (high + low).astype(float)
    true = 0.3 * means
    predictor = true + rng.normal(0, 2, true.shape)
    estimate = baselines._shrink(detail, total, predictor)
    error = np.mean((estimate - true) ** 2)
    assert error < 0.3 * np.mean((detail - true) ** 2)
    # The least that the same functions could reach, knowing the truth, on detail and predictor alone.
    both = np.stack([detail.ravel(), predictor.ravel()])
    weights = np.linalg.lstsq(both.T, true.ravel(), rcond=None)[0]
    assert error < 1.05 * np.mean((weights @ both - true.ravel()) ** 2)


def test_a_band_of_few_coefficients_is_left_as_it_is() -> None:
    rng = np.random.default_rng(5)
    total = rng.poisson(4000.0, (4, 4)).astype(float)
    detail, predictor = rng.normal(0, 60, (2, 4, 4))
    assert baselines._shrink(detail, total, predictor) is detail


def test_coarser_wavelets_do_not_make_pure_let_worse() -> None:
    truth = DOSE * draw(toy_columns(512).positions, 512)
    counts = np.random.default_rng(0).poisson(truth)
    scores = [psnr_db(baselines.pure_let(counts, levels=levels), truth) for levels in (5, 6, 7, 8)]
    assert scores == sorted(scores)


def test_tuning_takes_the_best_on_the_views_and_says_when_the_grid_is_too_narrow() -> None:
    def scaled(counts: np.ndarray, *, gain: float, word: str) -> np.ndarray:
        return gain * np.full_like(counts, counts.mean())

    grid = {"gain": (0.5, 0.9, 1.0, 1.1), "word": ("a", "b", "c")}
    made = Baseline(name="scaled", label="scaled", library="NumPy", function=scaled, grid=grid)
    chosen = tune(made, ToyImages(), DOSE, views=2, size_px=96)
    assert chosen.parameters["gain"] == 1.0
    assert (chosen.views, chosen.at_edge) == (2, ())
    narrow = Baseline(
        name="scaled", label="scaled", library="NumPy", function=scaled,
        grid={"gain": (0.5, 0.8, 0.9), "word": ("a",)},
    )  # fmt: skip
    assert tune(narrow, ToyImages(), DOSE, views=2, size_px=96).at_edge == ("gain",)


def test_the_command_writes_choices_that_can_be_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counts: np.ndarray
) -> None:
    monkeypatch.setattr(baselines, "Images", ToyImages)
    monkeypatch.setattr(baselines, "VIEW_PX", 96)
    out = tmp_path / "tuned.json"
    baselines.main(["toy", "--only", "gaussian", "--doses", "0.45", "3", "--views", "2", "--out", str(out)])
    tuned = baselines.read(out)
    assert [(one.baseline, one.dose) for one in tuned] == [("gaussian", 0.45), ("gaussian", 3.0)]
    assert tuned[0].parameters["width_px"] > tuned[1].parameters["width_px"]
    assert tuned[0].denoise(counts).shape == counts.shape


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"baseline": "magic"}]', "unknown baseline magic"),
        ('[{"baseline": "gaussian", "dose": 0.45}]', "an entry lacks parameters, psnr_db, views, at_edge; make it"),
        ('{"baseline": "gaussian"}', "is no list of tuned baselines"),
        ("[3]", "is no list of tuned baselines"),
        ("half a fi", r"tuned\.json is no JSON"),
    ],
)  # fmt: skip
def test_a_file_that_holds_no_choices_is_explained(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "tuned.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        baselines.read(tmp_path / "tuned.json")


def test_where_nothing_can_be_written_no_tuning_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(baselines, "Images", ToyImages)
    monkeypatch.setattr(baselines, "tune", lambda *_, **__: pytest.fail("tuned"))
    with pytest.raises(SystemExit, match=r"error: .*file cannot be a folder, since a file is in its place"):
        baselines.main(["toy", "--out", str(tmp_path / "file" / "tuned.json")])
    with pytest.raises(SystemExit, match=r"error: .* is a folder; name a file in it"):
        baselines.main(["toy", "--out", str(tmp_path)])
