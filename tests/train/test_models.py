"""The networks, against the figures of the paper's tables."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the laboratory needs: pip install 'emstream[train]'")
pytest.importorskip("abtem", reason="the laboratory needs: pip install 'emstream[train]'")

from emstream import load_engine
from emstream.inference import EngineCard
from emstream.trust import BAND_EDGES, KnownSpectra
from train import networks
from train.export import model_card, write_onnx, write_pt2
from train.models import BiasFreeBatchNorm, Network, UNet, build, macs_per_pixel, parameters
from train.models.folding import fold_norms
from train.models.unet import DoubleConv

# name, arguments, parameters bias-free and biased, field of view [px], multiplications per pixel
TABLES: list[tuple[str, dict[str, int], int, int, int, int]] = [
    ("DnCNN", {}, 667_008, 668_225, 41, 664_704),
    ("DURR", {}, 233_024, 233_440, 45, 87_104),
    ("UNet", {"base": 32}, 352_000, 352_737, 221, 54_176),
    ("UNet", {"base": 64}, 1_404_416, 1_405_889, 221, 216_064),
    ("UNet", {"base": 128}, 5_610_496, 5_613_441, 221, 862_976),
    ("UNet", {"base": 128, "scales": 6}, 70_504_960, 70_514_817, 893, 936_704),
    ("UNet", {"base": 32, "scales": 2}, 102_336, 102_657, 49, 49_856),
    ("UNet", {"base": 32, "scales": 6}, 4_410_496, 4_412_961, 893, 58_784),
    ("UNet", {"base": 64, "unshuffle": 2}, 1_406_336, 1_407_812, 442, 54_496),
]
SMALL: list[tuple[str, dict[str, Any]]] = [
    (name, {**arguments, "bias": bias})
    for name, arguments in (
        ("DnCNN", {"base": 4, "depth": 4}),
        ("DURR", {"base": 4}),
        ("UNet", {"base": 4, "scales": 3}),
        ("UNet", {"base": 4, "scales": 2, "unshuffle": 2}),
    )
    for bias in (False, True)
]
every_network = pytest.mark.parametrize(("name", "arguments"), SMALL)


def small(name: str, arguments: dict[str, Any]) -> Network:
    """A network whose norms and biases do something."""
    torch.manual_seed(0)
    network = build(name, **arguments).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_var.uniform_(0.02, 0.1)
            torch.nn.init.uniform_(module.weight, 0.5, 2)
            if not isinstance(module, BiasFreeBatchNorm):
                module.running_mean.uniform_(-0.1, 0.1)
                torch.nn.init.uniform_(module.bias, -0.1, 0.1)
    return network


@pytest.mark.parametrize(("name", "arguments", "bias_free", "biased", "field_px", "macs"), TABLES)
def test_networks_are_those_of_the_tables(
    name: str, arguments: dict[str, int], bias_free: int, biased: int, field_px: int, macs: int
) -> None:
    with torch.device("meta"):
        for bias, count in ((False, bias_free), (True, biased)):
            assert parameters(build(name, **arguments, bias=bias)) == count
        network = build(name, **arguments)
        assert macs_per_pixel(network) == macs
    assert network.field_of_view_px == field_px


@every_network
def test_every_network_runs_on_multiples_of_its_own(name: str, arguments: dict[str, Any]) -> None:
    network = small(name, arguments)
    x = torch.rand(2, 1, 3 * network.multiple_px, 5 * network.multiple_px)
    with torch.no_grad():
        assert network(x).shape == x.shape


@every_network
def test_bias_free_networks_scale_with_their_input_and_biased_ones_do_not(
    name: str, arguments: dict[str, Any]
) -> None:
    network = small(name, arguments)
    assert network.bias_free is not arguments["bias"]
    x = torch.rand(1, 1, 32, 32)
    with torch.no_grad():
        scaled, truth = network(7 * x), 7 * network(x)
    assert ((scaled - truth).abs().max() < 1e-4 * truth.abs().max()) == network.bias_free


@every_network
def test_bias_free_networks_have_no_additive_constant_of_any_kind(
    name: str, arguments: dict[str, Any]
) -> None:
    network = small(name, arguments)
    with torch.no_grad():
        of_nothing = network(torch.zeros(1, 1, 32, 32))
    assert (of_nothing.abs().max() == 0) == network.bias_free


@every_network
def test_training_and_inference_compute_the_same(name: str, arguments: dict[str, Any]) -> None:
    network = small(name, arguments)
    x = torch.rand(1, 1, 64, 64)
    with torch.no_grad():
        truth = network(x)
        network.train()
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
        torch.testing.assert_close(network(x), truth, rtol=1e-4, atol=1e-5 * truth.abs().max().item())


@every_network
def test_folding_the_norms_changes_nothing(name: str, arguments: dict[str, Any]) -> None:
    network = small(name, arguments)
    x = torch.rand(1, 1, 64, 64)
    with torch.no_grad():
        truth = network(x)
        fold_norms(network)
        torch.testing.assert_close(network(x), truth, rtol=1e-4, atol=1e-5 * truth.abs().max().item())
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in network.modules())


@every_network
def test_every_network_is_one_graph_to_the_compiler(name: str, arguments: dict[str, Any]) -> None:
    network = small(name, arguments).train()
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    x = torch.rand(1, 1, 32, 32).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        compiled(x).float().square().mean().backward()
    learning = [parameter for parameter in network.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None for parameter in learning)
    torch._dynamo.reset()


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile takes a C++ compiler on the CPU")
@pytest.mark.filterwarnings("ignore")
def test_padding_trains_when_compiled_for_the_cpu() -> None:
    block = DoubleConv(4, 4, 4, bias=False).to(memory_format=torch.channels_last).train()
    x = torch.rand(1, 4, 32, 32).to(memory_format=torch.channels_last).requires_grad_()
    torch.compile(block)(x).square().mean().backward()
    found = x.grad.clone()
    x.grad = None
    block(x).square().mean().backward()
    torch.testing.assert_close(found, x.grad, rtol=1e-3, atol=1e-6)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")
@every_network
def test_exported_engines_compute_what_the_network_does(
    name: str, arguments: dict[str, Any], tmp_path: Path
) -> None:
    network = small(name, arguments)
    card = EngineCard(
        name="small", architecture=network.description, parameters=parameters(network),
        field_of_view_px=network.field_of_view_px, multiple_px=network.multiple_px, bias_free=network.bias_free,
        dose_range=(0.1, 10.0), sampling_pm=6.2, psnr_db=0.0, ssim=0.0, trained="not", commit="none",
        training={"seeds": [0, 9], "materials": ["pt_ceo2"]},
        spectra=KnownSpectra.of(np.random.default_rng(0).uniform(0.1, 9, (200, len(BAND_EDGES) - 1))),
    )  # fmt: skip
    fold_norms(network)
    write_onnx(network, tmp_path / "small.onnx", card)
    write_pt2(network, tmp_path / "small.pt2", card)
    counts = np.random.default_rng(0).poisson(0.45, (96, 160)).astype(np.uint8)
    with torch.no_grad():
        truth = network(torch.from_numpy(counts)[None, None].float())[0, 0].numpy()
    for engine in (
        load_engine(tmp_path / "small.onnx", precision="f32"),
        load_engine(tmp_path / "small.pt2"),
    ):
        assert engine.card == card
        # Weights are rounded to half precision, to within 1e-3 each.
        assert np.linalg.norm(engine.denoise(counts) - truth) < 5e-3 * np.linalg.norm(truth)
    for file in ("small.onnx", "small.pt2"):
        with pytest.raises(ValueError, match=r"was trained on .* specimen 3"):
            networks.load(tmp_path / file).refuse_seen([{"seed": 3}])


def test_the_card_for_people_has_the_defocus_of_the_test_images() -> None:
    card = EngineCard(
        name="small", architecture="UNet", parameters=1, field_of_view_px=1, multiple_px=1, bias_free=True,
        dose_range=(0.1, 10.0), sampling_pm=6.2, psnr_db=0.0, ssim=0.0, trained="not", commit="none",
    )  # fmt: skip
    figures = {"images": 2, "psnr_db": 30.0, "psnr_sd": 1.0, "ssim": 0.9, "ssim_sd": 0.1}
    tests = [{"defocus_nm": -17.0}, {"defocus_nm": 12.0}]
    text = model_card(card, {"network": figures, "noisy": figures}, "CPU", tests)
    assert "defocus -17 to 12 nm" in text


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("unet", {}, "no network 'unet'; there are UNet, DnCNN, DURR"),
        ("DnCNN", {"scales": 4}, "DnCNN has no scales; it takes base, bias, depth"),
        ("UNet", {"scales": 1}, "scales must be at least 2, got 1"),
        ("UNet", {"base": 0}, "base must be at least 1, got 0"),
    ],
)
def test_networks_that_cannot_be_are_explained(name: str, arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(name, **arguments)


def test_weights_of_the_shipped_network_still_fit() -> None:
    keys = set(UNet(32).state_dict())
    assert len(keys) == 109
    assert {"stem.0.weight", "down.3.4.running_var", "up.0.1.bias", "head.weight"} <= keys
    assert not any(key.endswith(("0.bias", "3.bias")) for key in keys)
