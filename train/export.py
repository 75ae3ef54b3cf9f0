"""Checkpoint -> ONNX engine: ``python -m train.export RUN/best.pt engines/unet32.onnx``.

The graph takes raw counts (B, H, W) of any H and W and returns expected counts
(B, H, W): it pads to the network's multiple and crops back by itself. Batch norms
are folded into the convolutions. What the network is for travels in the file as
ONNX metadata, one entry per field of the card.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.models.unet import MULTIPLE_PX, BiasFreeBatchNorm, DoubleConv


@torch.no_grad()
def fold_norms(network: nn.Module) -> None:
    """Multiply each batch norm's gain into the convolution before it, and drop the norm."""
    for block in [m for m in network.modules() if isinstance(m, DoubleConv)]:
        for place, module in enumerate(block):
            if isinstance(module, BiasFreeBatchNorm):
                gain = module.weight * torch.rsqrt(module.running_var + module.eps)
                block[place - 1].weight.mul_(gain[:, None, None, None])
                block[place] = nn.Identity()


class CountsToIntensity(nn.Module):
    """Raw counts (B, H, W) -> expected counts (B, H, W), any H and W."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, counts: Tensor) -> Tensor:
        height, width = counts.shape[1], counts.shape[2]
        x = counts.to(torch.float32)[:, None]
        x = F.pad(x, (0, (-width) % MULTIPLE_PX, 0, (-height) % MULTIPLE_PX), mode="replicate")
        return self.network(x)[:, 0, :height, :width]


def to_onnx(network: nn.Module, path: str) -> None:
    """Write `network` (folded, in eval mode) as an ONNX file with free batch, height and width."""
    torch.onnx.export(
        CountsToIntensity(network).eval(),
        (torch.zeros(1, 64, 64),),
        path,
        dynamo=False,
        opset_version=17,
        input_names=["counts"],
        output_names=["expected_counts"],
        dynamic_axes={
            "counts": {0: "batch", 1: "height", 2: "width"},
            "expected_counts": {0: "batch", 1: "height", 2: "width"},
        },
    )
