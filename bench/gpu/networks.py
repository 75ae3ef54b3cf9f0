"""The networks: their files, what they cost, and what they should say.

Shipped networks have trained weights. The others have random ones of a fixed seed, which cost the
same time and are as good a test of arithmetic; their files are made when first needed.
"""

from __future__ import annotations

import re
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench.gpu.stage import Context, NotMeasured, Setting, last_line
from emstream.errors import EmstreamError
from emstream.inference import EngineCard, default_engine
from emstream.inference.engine import sha256_of

DOSE = 0.45  # electrons/pixel
_SAME = 1e-6  # both results are rounded to float32 in the end
_WIDENED = 14  # field of view in multiples of the coarsest pixel, from above; 221 px measured at 16


@dataclass(frozen=True)
class Shape:
    """What makes a `train.models.unet.UNet`."""

    base: int
    scales: int = 4
    unshuffle: int = 1

    def network(self) -> Any:
        from train.models.unet import UNet

        return UNet(self.base, self.scales, self.unshuffle)


RANDOM = {"unet64": Shape(64), "unet128": Shape(128), "unet128x6": Shape(128, 6), "unet8": Shape(8, 3)}
SHIPPED = ("unet32", "wide64")


@dataclass(frozen=True)
class Files:
    onnx: Path
    pt2: Path


def files(setting: Setting, name: str) -> Files:
    """Where a network's files are, or will be."""
    folder = setting.models if name in RANDOM else default_engine().parent
    made = setting.models / f"{name}.pt2"  # where the shipped one is not readable by this PyTorch
    return Files(folder / f"{name}.onnx", made if made.exists() else folder / f"{name}.pt2")


def ensure(context: Context, names: Sequence[str], references: Sequence[Reference] = ()) -> list[str]:
    """Make what files and references are missing, in one process; returns the networks that there are."""
    setting = context.setting
    missing = [name for name in names if not _ready(setting, name).exists()]
    unknown = [each for each in references if not each.file(setting).exists()]
    reasons: dict[str, str] = {}
    if missing or unknown:
        try:
            reasons = context.isolated(make, missing, unknown, limit_s=120)
        except (NotMeasured, RuntimeError) as error:
            context.note(f"Making networks and references: {error}")
    for what, reason in reasons.items():
        context.note(f"{what}: {reason}")
    there = []
    for name in names:
        if files(setting, name).onnx.exists():
            there.append(name)
        elif name not in reasons:
            context.note(f"{name} is not measured: it has no file.")
    return there


def make(setting: Setting, names: Sequence[str], references: Sequence[Reference]) -> dict[str, str]:
    """Write files of networks and references; returns what there is to say about which of them."""
    setting.models.mkdir(parents=True, exist_ok=True)
    said = {}
    works = {name: partial(_make_files, setting, name) for name in names}
    works |= {f"reference for {each}": partial(_make_reference, setting, each) for each in references}
    for what, work in works.items():
        start_s = time.monotonic()
        try:
            if news := work():
                said[what] = news
        except NotMeasured as reason:
            said[what] = str(reason)
        except Exception as error:  # one that cannot be made must not cost the others
            traceback.print_exc()
            said[what] = f"not made: {type(error).__name__}: {last_line(str(error))}"
        print(f"{what}: {time.monotonic() - start_s:.1f} s")
    return said


def _ready(setting: Setting, name: str) -> Path:
    """Stands where a network's files were made, or found to be readable here."""
    return setting.models / f"{name}.ready"


def _make_files(setting: Setting, name: str) -> str | None:
    """Files of a random network; for a shipped one a .pt2, if its own cannot be read here."""
    if name in SHIPPED and not files(setting, name).onnx.exists():
        return f"there is no engines/{name}.onnx"
    torch = _torch()
    pt2 = setting.models / f"{name}.pt2"
    said = None
    if name in RANDOM:
        from train.export import write_onnx, write_pt2

        network, card = random_network(name), _card(name)
        write_onnx(network, setting.models / f"{name}.onnx", card)
        write_pt2(network, pt2, card)
    else:
        found = files(setting, name)
        try:
            torch.export.load(found.pt2)
        except Exception as error:  # torch raises whatever its zip and JSON readers raise
            from emstream.inference.build import read_card
            from train.export import write_pt2

            write_pt2(_from_onnx(found.onnx), pt2, read_card(found.onnx))
            said = f"PyTorch {torch.__version__} cannot read {found.pt2.name} ({type(error).__name__}); wrote another"
    _ready(setting, name).touch()
    return said


def random_network(name: str) -> Any:
    """Folded, in eval mode, its maps about as large at the end as at the start."""
    torch = _torch()
    from train.models.folding import fold_norms

    torch.manual_seed(0)
    network = RANDOM[name].network().eval()
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, torch.nn.Conv2d):
                fan_in = module.weight[0].numel()
                module.weight.normal_(0, (2 / fan_in) ** 0.5)
    fold_norms(network)
    return network


def exact_network(setting: Setting, name: str) -> Any:
    """Raw counts (B, H, W) -> expected counts (B, H, W) in double precision, with the weights of the files."""
    from train.export import CountsToIntensity

    return CountsToIntensity(_network(setting, name).double()).eval()


def half_network(setting: Setting, name: str) -> Any:
    """The same in half precision (dry: single, which CPUs are good at)."""
    from train.export import CountsToIntensity

    network = _network(setting, name)
    return CountsToIntensity(network if setting.dry else network.half()).eval()


def _network(setting: Setting, name: str) -> Any:
    torch = _torch()
    from train.export import halve
    from train.models.folding import fold_norms

    if name in RANDOM:
        return halve(random_network(name)).float()
    found = files(setting, name)
    try:
        program = torch.export.load(found.pt2)
    except Exception:  # torch raises whatever its zip and JSON readers raise
        return _from_onnx(found.onnx)
    network = shape_of(found.onnx).network().eval()
    fold_norms(network)
    network.load_state_dict(program.state_dict)
    return network


def shape_of(onnx: Path) -> Shape:
    """The network's shape from its card."""
    from emstream.inference.build import read_card

    text = read_card(onnx).architecture
    base, scales = re.search(r"(\d+) base channels", text), re.search(r"(\d+) scales", text)
    if not (text.startswith("UNet") and base and scales):
        raise NotMeasured(f"{onnx.name} says it is a {text!r}, which this bench does not know")
    return Shape(int(base[1]), int(scales[1]), 2 if "half resolution" in text else 1)


def _from_onnx(path: Path) -> Any:
    """The network with the weights that the ONNX file holds, rounded as they are there."""
    import onnx
    from onnx import numpy_helper

    torch = _torch()
    from train.models.folding import fold_norms

    network = shape_of(path).network().eval()
    fold_norms(network)
    held = {each.name: numpy_helper.to_array(each) for each in onnx.load(path).graph.initializer}
    state = {
        name: torch.from_numpy(held[f"network.{name}"].astype(np.float32)) for name in network.state_dict()
    }
    network.load_state_dict(state)
    return network


def _card(name: str) -> EngineCard:
    shape = RANDOM[name]
    network = shape.network()
    return EngineCard(
        name=name,
        architecture=f"UNet, {shape.base} base channels, {shape.scales} scales",
        parameters=sum(each.numel() for each in network.parameters()),
        field_of_view_px=_WIDENED * network.multiple_px,
        multiple_px=network.multiple_px,
        bias_free=True,
        dose_range=(0.1, 10.0),
        sampling_pm=6.2,
        psnr_db=0.0,
        ssim=0.0,
        trained="not at all: random weights, for measuring time and rounding",
        commit="",
    )


# -- what they cost -----------------------------------------------------------------


def macs_per_pixel(shape: Shape) -> int:
    """Multiplications with additions per pixel of the frame, counted over the convolutions."""
    torch = _torch()
    with torch.device("meta"):
        network = shape.network().eval()
        side = 2 * network.multiple_px
        total = 0

        def count(module: Any, _: Any, output: Any) -> None:
            nonlocal total
            total += module.weight[0].numel() * output.numel()

        for module in network.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.register_forward_hook(count)
        network(torch.zeros(1, 1, side, side))
    return total // side**2


def costs(setting: Setting, names: Sequence[str]) -> dict[str, int]:
    """`macs_per_pixel` of networks by name."""
    return {name: macs_per_pixel(RANDOM.get(name) or shape_of(files(setting, name).onnx)) for name in names}


# -- what they should say -----------------------------------------------------------


def poisson(frames: int, height: int, width: int) -> np.ndarray:
    """Counts (frames, height, width) uint8, always the same."""
    return np.random.default_rng(0).poisson(DOSE, (frames, height, width)).astype(np.uint8)


@dataclass(frozen=True)
class Reference:
    """What a network should say to the first `frames` of `poisson`."""

    name: str
    height: int
    width: int
    frames: int

    def file(self, setting: Setting) -> Path:
        """Named after the weights, too: a shipped network may be trained anew."""
        onnx = files(setting, self.name).onnx
        weights = sha256_of(onnx)[:8] if onnx.exists() else "none"
        return setting.models / f"{self.name}-{weights}-{self.height}x{self.width}.npy"

    def __str__(self) -> str:
        return f"{self.name} {self.height}x{self.width}"


def _make_reference(setting: Setting, wanted: Reference) -> None:
    """Keep the expected counts (frames, H, W) in double precision.

    On the GPU, which takes seconds where a CPU takes minutes, if one small frame comes out the same
    on the CPU.
    """
    torch = _torch()
    network = exact_network(setting, wanted.name)
    counts = torch.from_numpy(poisson(wanted.frames, wanted.height, wanted.width))
    with torch.inference_mode():
        if torch.cuda.is_available() and not setting.dry:
            small = torch.from_numpy(poisson(1, 64, 64))
            on_cpu = network(small)
            network, counts = network.cuda(), counts.cuda()
            on_gpu = network(small.cuda()).cpu()
            apart = float((on_gpu - on_cpu).abs().max() / on_cpu.abs().max())
            print(f"{wanted}: double precision on the GPU is {apart:.1e} from the CPU's")
            if not apart < _SAME:
                raise EmstreamError(f"double precision on the GPU is {apart:.1e} from the CPU's")
        expected = np.concatenate([network(frame[None]).cpu().numpy() for frame in counts])
    np.save(wanted.file(setting), expected)


def _torch() -> Any:
    try:
        import torch
    except ImportError:
        raise NotMeasured("PyTorch is not installed") from None
    return torch
