"""Checkpoint -> engine: ``python -m train.export RUN/best.pt engines/unet32.onnx --test data/test``.

Writes three files side by side: NAME.onnx (for OpenVINO and TensorRT), NAME.pt2 (for
PyTorch) and NAME.md, the model card for people. What the network is for travels in
both model files.

The ONNX graph takes raw counts (B, H, W) of any H and W and returns expected counts
(B, H, W): it pads to the network's multiple and crops back by itself. Batch norms are
folded into the convolutions. Weights are half precision, which costs nothing measurable:
a GPU computes as the file says, OpenVINO in whatever this processor is best at.
"""

from __future__ import annotations

import argparse
import copy
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from bench import report
from emstream import load_engine
from emstream.inference import Engine, EngineCard
from emstream.trust import SPECTRUM_PX, KnownSpectra, spectrum
from train import networks
from train.command import explained, writable_file
from train.dataset import SAMPLING_A, Images
from train.evaluate import VIEW_PX, evaluate
from train.fit import EMA_DECAY
from train.models import Network, parameters
from train.models.folding import fold_norms
from train.noise import DOSE_RANGE, PAPER_DOSE
from train.recipe import load

LARGEST_PX = 8192
SPECTRA = 384  # images that the card knows the spectra of
NEAR_PAPER_DOSE = (0.8 * PAPER_DOSE, 1.2 * PAPER_DOSE)  # mean counts of a frame vary with what it shows
HOT_PIXEL = 1024.0  # times the mean level: beyond it half precision might overflow


class CountsToIntensity(nn.Module):
    """Raw counts (B, H, W) -> expected counts (B, H, W), any H and W.

    Half precision reaches from 6e-8 to 65504, doses and their sums farther. A bias-free network
    is homogeneous, so each frame is brought near 1 first, by a power of two, which is exact.
    """

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network
        self.dtype = next(network.parameters()).dtype
        self.multiple_px = network.multiple_px

    def forward(self, counts: Tensor) -> Tensor:
        height, width = counts.shape[1], counts.shape[2]
        x = counts.to(torch.float32)[:, None]
        level = x.abs().mean(dim=(2, 3), keepdim=True).clamp_min(1e-20)
        level = torch.pow(2.0, torch.floor(torch.log2(level)))
        if not self.network.bias_free:
            level = torch.ones_like(level)
        x = (x / level).clamp(-HOT_PIXEL, HOT_PIXEL).to(self.dtype)
        x = F.pad(x, (0, (-width) % self.multiple_px, 0, (-height) % self.multiple_px), mode="replicate")
        return self.network(x)[:, 0, :height, :width].to(torch.float32) * level[:, 0]


@torch.no_grad()
def halve(network: Network) -> Network:
    """A copy in half precision, rounded to odd: rounding once more, to bfloat16, then does no further harm.

    (Boldo and Melquiond, "Emulation of a FMA and correctly rounded sums: proved algorithms
    using rounding to odd", IEEE Transactions on Computers 57, 2008.)
    """
    half = copy.deepcopy(network).half()
    for exact, rounded in zip(network.parameters(), half.parameters(), strict=True):
        bits = rounded.view(torch.int16)
        bits.sub_((rounded.float().abs() > exact.abs()).to(torch.int16))  # towards zero
        bits.bitwise_or_((rounded.float() != exact).to(torch.int16))
    return half


def write_onnx(network: Network, path: Path, card: EngineCard) -> None:
    """Write `network` (folded, in eval mode) as ONNX with free batch, height and width."""
    network = halve(network)
    axes = {0: "batch", 1: "height", 2: "width"}
    with warnings.catch_warnings():
        # The newer exporter refuses the padding of a free size; this one warns that it is the older.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            CountsToIntensity(network).eval(), (torch.zeros(1, 64, 64),), str(path), dynamo=False,
            opset_version=17, input_names=["counts"], output_names=["expected_counts"],
            dynamic_axes={"counts": axes, "expected_counts": axes},
        )  # fmt: skip
    model = onnx.load(path)
    onnx.helper.set_model_props(model, card.to_metadata())
    onnx.save(model, path)


def write_pt2(network: Network, path: Path, card: EngineCard) -> None:
    """Write `network` (folded, in eval mode) as a torch.export program for sizes that are multiples of its own.

    From two multiples up: torch.export will not believe in a size of one. Single precision,
    and the very numbers that the ONNX holds in half.
    """
    network = halve(network).float()
    multiple = network.multiple_px
    sizes = [
        multiple * torch.export.Dim(axis, min=2, max=LARGEST_PX // multiple) for axis in ("rows", "columns")
    ]
    batch = torch.export.Dim("batch", min=1, max=1024)
    example = torch.zeros(2, 1, 4 * multiple, 6 * multiple)
    program = torch.export.export(
        network.eval(), (example,), dynamic_shapes=({0: batch, 2: sizes[0], 3: sizes[1]},)
    )
    torch.export.save(program, path, extra_files={"card.json": json.dumps(card.to_metadata())})


def spectra(directory: Path) -> KnownSpectra:
    """Of clean images that the network was trained on, or of others like them."""
    images = Images(directory)
    order = np.random.default_rng(0).permutation(len(images))[:SPECTRA]
    if len(order) < SPECTRA:
        raise ValueError(f"{directory} holds {len(images)} images; spectra are taken of {SPECTRA}")
    powers = []
    for index in tqdm(order, unit="image", desc="spectra", mininterval=5):
        power = spectrum(
            images.central_views(SPECTRUM_PX, [int(index)])[0, 0].clamp_min(0).numpy(), poisson=False
        )
        assert power is not None, "a simulated image without electrons"
        powers.append(power)
    return KnownSpectra.of(np.array(powers))


def began_from(began: Mapping[str, Any]) -> str:
    """What the training began from, in words."""
    if "engine" in began:
        return f"the engine {began['engine']} ({began['trained']})"
    return f"weights of {began['steps']} steps in {began['spent_s'] / 3600:.2f} h"


def score(engine: Engine, images: Images) -> dict[str, Any]:
    """Test-set figures at 0.45 electrons/pixel of the engine as it runs here, and of the noisy frames."""
    views = (images.central_views(VIEW_PX, [index])[0, 0].numpy() for index in range(len(images)))
    views = tqdm(views, total=len(images), unit="image", desc="test", mininterval=5)
    return evaluate({"noisy": lambda counts: counts, "network": engine.denoise}, views, PAPER_DOSE)


def model_card(
    card: EngineCard, scores: dict[str, Any], device: str, tests: Sequence[Mapping[str, Any]]
) -> str:
    """The card as Markdown; `tests` are the parameters of the test images."""
    network, noisy = scores["network"], scores["noisy"]
    defoci_nm = [one["defocus_nm"] for one in tests]
    defocus = f"{min(defoci_nm):.0f} to {max(defoci_nm):.0f} nm"
    return f"""# {card.name}

{card.architecture}, {card.parameters:,} parameters, field of view {card.field_of_view_px} px,
bias-free: {"yes" if card.bias_free else "no"}. Files: `{card.name}.onnx` (OpenVINO), `{card.name}.pt2` (PyTorch).

- **Input** electron counts (B, H, W), any size; **output** expected electrons per pixel, float32.
- **Trained for** {card.dose_range[0]}-{card.dose_range[1]} electrons/pixel/frame, pixels of {card.sampling_pm} pm,
  Pt on CeO2 in [110], 300 kV, thickness 3-6 nm, tilt up to 4 degrees, defocus {defocus}, any in-plane rotation.
- **Training** {card.trained}.
- **Test** on {network["images"]} images of specimens it has not seen, {PAPER_DOSE} electrons/pixel, peak 1 electron,
  on {device}: PSNR {network["psnr_db"]} +- {network["psnr_sd"]} dB, SSIM {network["ssim"]} +- {network["ssim_sd"]}
  (the noisy frames: {noisy["psnr_db"]} +- {noisy["psnr_sd"]} dB, {noisy["ssim"]}).
- **Not for** specimens unlike these: outside its training a network invents the structure it knows.
  A single column on the surface is the hardest case; look at the raw counts, too.
- **Trained from** commit {card.commit} by `python -m train.fit` and written by `python -m train.export`.
"""


@explained
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("output", type=Path, help="NAME.onnx")
    parser.add_argument("--test", type=Path, required=True, help="made by train.simulate, of unseen seeds")
    parser.add_argument("--spectra", type=Path, help="images it was trained on [default: the recipe's]")
    parser.add_argument("--data", default="", help="what it was trained on, in words")
    parser.add_argument("--hardware", default="", help="and on what, if the checkpoint does not say it well")
    arguments = parser.parse_args()
    if arguments.output.suffix != ".onnx":
        parser.error(f"output must end in .onnx, got {arguments.output}")

    writable_file(arguments.output)
    recipe, network, state = load(arguments.checkpoint)
    if recipe.task != "tem":
        raise ValueError(
            f"{arguments.checkpoint} was trained on {recipe.task}; an engine takes electron counts"
        )
    images = Images(arguments.test)
    networks.load(arguments.checkpoint).refuse_seen(images.parameters)
    network.eval()
    count = parameters(network)
    hardware = arguments.hardware or state.get("hardware", "")
    training = state.get("training", {})
    began = training.get("began_from")
    fold_norms(network)
    card = EngineCard(
        name=arguments.output.stem,
        architecture=network.description,
        parameters=count,
        field_of_view_px=network.field_of_view_px,
        multiple_px=network.multiple_px,
        bias_free=network.bias_free,
        dose_range=DOSE_RANGE if recipe.doses == "range" else NEAR_PAPER_DOSE,
        sampling_pm=100 * SAMPLING_A,
        psnr_db=0.0,  # not yet scored
        ssim=0.0,
        training=training,
        spectra=spectra(arguments.spectra or Path(recipe.train or "")),
        trained=(
            f"{arguments.data or recipe.train}; {state['step']} steps of {recipe.batch} crops of "
            f"{recipe.crop_px} px in {state['spent_s'] / 3600:.2f} h"
            f"{' on ' + hardware if hardware else ''}; AdamW, peak rate "
            f"{recipe.learning_rate}, cosine schedule, EMA {EMA_DECAY}, loss {recipe.loss}"
            + (f"; began from {began_from(began)}" if began else "")
        ),
        commit=training.get("commit") or report.stamp("export", ())["commit"] or "unknown",
    )
    write_onnx(network, arguments.output, card)
    engine = load_engine(arguments.output)
    scores = score(engine, images)
    card = replace(card, psnr_db=scores["network"]["psnr_db"], ssim=scores["network"]["ssim"])
    write_onnx(network, arguments.output, card)
    write_pt2(network, arguments.output.with_suffix(".pt2"), card)
    arguments.output.with_suffix(".md").write_text(model_card(card, scores, engine.device, images.parameters))
    print(json.dumps(scores))


if __name__ == "__main__":
    main()
