"""What a network does with a frame: its filters, and whether the counts support what it draws."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the laboratory needs: pip install 'emstream[train]'")

from scipy.ndimage import gaussian_filter, minimum_filter
from scipy.stats import poisson

from tests.train.toy import SIZE_PX, ToyImages, draw, toy_columns
from train import explain, networks, recipe
from train.explain import TOLERANCE, VERDICTS, equivalent_filters, halves, likelihood_map, places
from train.models import UNet
from train.recipe import Recipe
from train.surface import Surface

ROOT = Path(__file__).parents[2]
DOSE = 0.45


@pytest.fixture
def counts() -> np.ndarray:
    return np.random.default_rng(0).poisson(DOSE, (64, 64)).astype(np.uint8)


def unet(bias: bool) -> UNet:
    torch.manual_seed(0)
    network = UNet(4, 2, bias=bias).eval()
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.uniform_(parameter, -0.2, 0.2)
    return network


def test_the_filter_of_a_convolution_is_its_kernel(counts: np.ndarray) -> None:
    layer = torch.nn.Conv2d(1, 1, 3, padding=1, bias=False)
    (one,) = equivalent_filters(layer, counts, [(20, 30)])
    np.testing.assert_allclose(one.weights[19:22, 29:32], layer.weight.detach()[0, 0], rtol=1e-6)
    assert np.count_nonzero(one.weights) == 9


def test_a_bias_free_network_is_its_filters(counts: np.ndarray) -> None:
    for one in equivalent_filters(unet(bias=False), counts, [(5, 9), (32, 32), (60, 20)]):
        assert one.value != 0
        assert one.error < TOLERANCE


def test_a_network_with_biases_adds_something_of_its_own(counts: np.ndarray) -> None:
    for one in equivalent_filters(unet(bias=True), counts, [(5, 9), (32, 32), (60, 20)]):
        assert one.error > 100 * TOLERANCE


def test_places_lie_where_their_names_say() -> None:
    columns = toy_columns()
    found = places(columns, Surface(columns, (SIZE_PX, SIZE_PX), bright=False).positions, (SIZE_PX, SIZE_PX))
    distance = {
        name: np.linalg.norm(columns.positions - (column, row), axis=1)
        for name, (row, column) in found.items()
    }
    assert distance["bulk"].min() < 1
    assert not columns.on_surface[np.argmin(distance["bulk"])]
    assert columns.on_surface[np.argmin(distance["surface"])]
    assert distance["vacuum"].min() > 40


def test_a_view_without_a_surface_is_explained() -> None:
    with pytest.raises(ValueError, match="shows no surface"):
        places(toy_columns(), np.empty((0, 2)), (SIZE_PX, SIZE_PX))


def test_the_likelihood_is_the_mean_difference_of_log_probabilities() -> None:
    rng = np.random.default_rng(1)
    counts, denoised = rng.poisson(DOSE, (60, 60)), rng.uniform(0.3, 0.4, (60, 60))
    found = likelihood_map(counts, denoised, np.array([[30.0, 25.0, 10.0]]), vacuum=DOSE)
    inside = np.isfinite(found.image)
    level = denoised[inside].mean()
    truth = poisson.logpmf(counts[inside], level) - poisson.logpmf(counts[inside], DOSE)
    assert found.ratios[0] == pytest.approx(truth.mean(), rel=1e-9)
    assert found.nats[0] == pytest.approx(truth.sum(), rel=1e-9)
    assert inside[25, 30]
    assert not inside[30, 20]


def test_counts_support_a_column_that_is_there_and_not_one_that_is_invented() -> None:
    columns = toy_columns()
    gone = int(np.flatnonzero(columns.on_surface)[2])
    truth = DOSE * draw(np.delete(columns.positions, gone, axis=0), depth=-0.6)
    counts = np.random.default_rng(2).poisson(truth)
    denoised = DOSE * draw(columns.positions, depth=-0.6)
    blobs = np.column_stack([columns.positions, np.full(len(columns.positions), 12.0)])
    ratios = likelihood_map(counts, denoised, blobs, vacuum=DOSE).ratios
    assert ratios[gone] < 0
    assert (np.delete(ratios, gone) > 0).all()


def test_halves_are_independent_frames_of_half_the_dose() -> None:
    rng = np.random.default_rng(3)
    counts = rng.poisson(DOSE, (300, 300)).astype(np.float32)
    one, other = halves(counts, rng)
    np.testing.assert_array_equal(one + other, counts)
    assert one.min() >= 0
    assert one.mean() == pytest.approx(DOSE / 2, rel=0.03)
    assert np.corrcoef(one.ravel(), other.ravel())[0, 1] == pytest.approx(0, abs=0.015)
    assert np.corrcoef(one.ravel(), counts.ravel())[0, 1] > 0.6


def test_columns_made_of_noise_have_the_support_of_their_own_counts_alone() -> None:
    rng = np.random.default_rng(4)
    seen, other = rng.poisson(DOSE, (2, 400, 400))
    blurred = gaussian_filter(seen.astype(float), 9)
    lowest = np.argwhere(blurred == minimum_filter(blurred, 61))
    blobs = np.column_stack([lowest[:, ::-1], np.full(len(lowest), 9.0)])
    own, independent = (likelihood_map(counts, blurred, blobs, vacuum=DOSE) for counts in (seen, other))
    assert (own.ratios > 0).all()
    assert independent.count()["supported"] < 0.2 * len(blobs)


def test_three_verdicts_follow_from_the_standard_error() -> None:
    counts = np.full((40, 120), DOSE)
    denoised = np.full((40, 120), 0.6 * DOSE)
    counts[:, :40] = 0.6 * DOSE
    counts[:, 40:80] = 0.785 * DOSE
    blobs = np.array([[20.0, 20.0, 15.0], [60.0, 20.0, 15.0], [100.0, 20.0, 15.0]])
    found = likelihood_map(counts, denoised, blobs, vacuum=DOSE)
    assert found.verdicts == list(VERDICTS)
    pixels = np.isfinite(found.image[:, :40]).sum()
    error = abs(np.log(0.6)) * np.sqrt(0.6 * DOSE / pixels)
    assert found.errors[0] == pytest.approx(error, rel=1e-6)


def test_vacuum_without_electrons_is_refused() -> None:
    with pytest.raises(ValueError, match="got 0 electrons/pixel"):
        likelihood_map(np.zeros((8, 8)), np.zeros((8, 8)), np.empty((0, 3)), vacuum=0)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "run" / "best.pt"
    path.parent.mkdir()
    made = Recipe(
        network="UNet",
        base=4,
        scales=2,
        train="a",
        validate="b",
        steps=1,
        batch=1,
        crop_px=64,
        learning_rate=1e-3,
    )
    state = unet(bias=False).state_dict()
    recipe.save(path, made, network=state, step=7, spent_s=1800.0, validation_psnr_db=20.0)
    return path


def test_a_run_is_read_with_what_was_spent_on_it(checkpoint: Path) -> None:
    trained = networks.load(checkpoint)
    assert (trained.name, trained.steps, trained.hours, trained.validation_psnr_db) == ("run", 7, 0.5, 20.0)
    assert trained.bias_free
    assert trained.field_of_view_px == UNet(4, 2).field_of_view_px


def test_a_networks_input_may_have_any_size(checkpoint: Path) -> None:
    trained = networks.load(checkpoint)
    counts = np.random.default_rng(0).poisson(DOSE, (37, 50)).astype(np.uint8)
    assert trained.denoise(counts).shape == counts.shape
    padded = np.pad(counts, ((0, 3), (0, 2)), mode="edge")
    with torch.no_grad():
        whole = trained.network(torch.from_numpy(padded.astype(np.float32))[None, None])[0, 0].numpy()
    np.testing.assert_allclose(trained.denoise(counts), whole[:37, :50], rtol=1e-5, atol=1e-6)


def test_the_shipped_engine_counts_as_its_card_says() -> None:
    trained = networks.load(ROOT / "engines" / "unet32.onnx")
    assert trained.path.suffix == ".pt2"
    assert (trained.parameters, trained.field_of_view_px, trained.macs_per_pixel) == (352_000, 221, 54_176)


@pytest.mark.parametrize("name", ["network.txt", "alone.onnx"])
def test_what_is_no_network_is_explained(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("")
    with pytest.raises(ValueError, match=r"expected \.pt|has no alone\.pt2 beside it"):
        networks.load(tmp_path / name)


def test_the_command_draws_filters_and_likelihoods(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(explain, "Images", ToyImages)
    monkeypatch.setattr(explain, "VIEW_PX", SIZE_PX)
    # Electrons as they come, blurred: a network that was trained for nothing draws thousands of blobs.
    blur = torch.nn.Conv2d(1, 1, 25, padding=12, bias=False)
    torch.nn.init.constant_(blur.weight, 1 / 625)
    monkeypatch.setattr(networks, "load", lambda path: networks.Trained(
        name="blur", path=path, network=blur, multiple_px=1, parameters=625, bias_free=True, macs_per_pixel=625,
        field_of_view_px=25,
    ))  # fmt: skip
    out = tmp_path / "out"
    explain.main([str(checkpoint), "toy", "--image", "1", "--doses", "3", "--out", str(out)])
    assert json.loads(capsys.readouterr().out)["linear"] is True
    result = json.loads((out / "explain.json").read_text())
    assert [entry["place"] for entry in result["filters"]] == ["bulk", "surface", "vacuum"]
    likelihood = result["likelihood"][0]
    assert likelihood["columns"] == sum(likelihood[verdict] for verdict in VERDICTS) > 0
    assert result["psnr_db"]["3.0"] > 20
    for name in ("filters.png", "likelihood-3.png"):
        assert (out / name).stat().st_size > 20_000


def test_an_image_that_is_not_there_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(explain, "Images", ToyImages)
    with pytest.raises(SystemExit):
        explain.main(["a.pt", "toy", "--image", "9", "--out", str(tmp_path)])
    assert "--image must lie in 0-3, got 9" in capsys.readouterr().err
