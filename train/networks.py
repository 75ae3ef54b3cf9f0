"""Trained networks, wherever they are: a run's best.pt, or a shipped engine's .pt2.

Shapes: counts (B, 1, H, W) in, expected counts (B, 1, H, W) out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from emstream.inference.torch import read_program
from train import recipe
from train.dataset import refuse_made_from, specimens
from train.models import macs_per_pixel, parameters


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A network and what is known of its training."""

    name: str
    path: Path
    network: nn.Module
    multiple_px: int
    parameters: int
    bias_free: bool
    macs_per_pixel: int
    field_of_view_px: int
    recipe: dict[str, Any] = field(default_factory=dict)
    steps: int | None = None
    hours: float | None = None
    hardware: str | None = None
    trained: str | None = None
    """In words, where nothing else is known."""
    validation_psnr_db: float | None = None
    card_psnr_db: float | None = None
    """On the test images of an engine's card."""
    training: dict[str, Any] = field(default_factory=dict)
    """Commit and date, number of images, first and last seed and materials of the specimens, those of the validation
    images, and the same of the weights it began from and of its teacher; empty if not known."""

    @property
    def rank_db(self) -> float:
        """The PSNR that says which of several is the best."""
        known = (self.validation_psnr_db, self.card_psnr_db)
        return next((psnr_db for psnr_db in known if psnr_db is not None), -np.inf)

    def refuse_seen(self, parameters: Iterable[Mapping[str, Any]]) -> None:
        """Raise ValueError if a test image with one of the `parameters` shows a specimen that made the network.

        It was trained on it, or chosen by it, or its teacher was, or the weights that it began from.
        """
        if self.recipe.get("task") == "photographs":
            raise ValueError(
                f"{self.path} was trained on photographs: score it with train.photographs or train.tables"
            )
        refuse_made_from(str(self.path), self.training, specimens(parameters))

    def __call__(self, counts: Tensor) -> Tensor:
        """Run on counts of any H and W."""
        height, width = counts.shape[2:]
        # An exported program takes no fewer than two multiples.
        rows, columns = (
            max(2 * self.multiple_px, side + (-side) % self.multiple_px) for side in (height, width)
        )
        padded = F.pad(counts, (0, columns - width, 0, rows - height), mode="replicate")
        return self.network(padded)[:, :, :height, :width]

    @torch.no_grad()
    def denoise(self, counts: np.ndarray) -> np.ndarray:
        """Counts (H, W) of any size -> expected counts (H, W) float32."""
        device = next(self.network.parameters()).device
        x = torch.from_numpy(counts.astype(np.float32)).to(device)
        return self(x[None, None])[0, 0].cpu().numpy()


def load(path: Path, device: str = "cpu") -> Trained:
    """A run's best.pt or checkpoint.pt, an engine's .pt2, or an .onnx that has its .pt2 beside it."""
    path = Path(path)
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"there is no GPU for device {device}; take cpu")
    if path.suffix == ".onnx":
        if not path.with_suffix(".pt2").exists():
            raise ValueError(f"{path} has no {path.with_suffix('.pt2').name} beside it, which is needed here")
        path = path.with_suffix(".pt2")
    if path.suffix == ".pt2":
        trained = _load_program(path)
    elif path.suffix == ".pt":
        trained = _load_checkpoint(path)
    else:
        raise ValueError(f"{path} is no network: expected .pt, .pt2 or .onnx")
    trained.network.to(device)
    return trained


def _load_checkpoint(path: Path) -> Trained:
    read, network, state = recipe.load(path)
    network.eval()
    spent_s = state.get("spent_s")
    return Trained(
        name=path.parent.name, path=path, network=network, multiple_px=network.multiple_px,
        parameters=parameters(network), bias_free=network.bias_free, macs_per_pixel=macs_per_pixel(network),
        field_of_view_px=network.field_of_view_px, recipe=asdict(read), steps=state.get("step"),
        hours=None if spent_s is None else spent_s / 3600, hardware=state.get("hardware"),
        validation_psnr_db=state.get("validation_psnr_db"), training=state.get("training", {}),
    )  # fmt: skip


@torch.no_grad()
def _load_program(path: Path) -> Trained:
    program, card = read_program(path)
    network, side = program.module(), 2 * card.multiple_px
    with FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 1, side, side))
    return Trained(
        name=card.name, path=path, network=network, multiple_px=card.multiple_px, parameters=card.parameters,
        bias_free=card.bias_free, macs_per_pixel=counter.get_total_flops() // 2 // side**2,
        field_of_view_px=card.field_of_view_px, trained=card.trained,
        card_psnr_db=card.psnr_db, training=card.training or {},
    )  # fmt: skip
