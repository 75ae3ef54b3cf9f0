"""The UNet of Mohan et al. (arXiv 2010.12970), of any width and any number of scales."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.models.network import Network, at_least, norm


class ReplicateConv(nn.Conv2d):
    """A 3x3 convolution on a replication-padded map."""

    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__(inputs, outputs, 3, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            # torch.compile cannot run the backward of replication_pad2d on channels-last maps.
            x = torch.cat([x[:, :, :1], x, x[:, :, -1:]], dim=2)
            x = torch.cat([x[:, :, :, :1], x, x[:, :, :, -1:]], dim=3)
        else:
            x = F.pad(x, (1, 1, 1, 1), mode="replicate")
        return F.conv2d(x, self.weight, self.bias)


class DoubleConv(nn.Sequential):
    """Twice: replication pad, 3x3 convolution, batch norm, ReLU."""

    def __init__(self, inputs: int, between: int, outputs: int, bias: bool) -> None:
        layers: list[nn.Module] = []
        for a, b in ((inputs, between), (between, outputs)):
            layers.append(ReplicateConv(a, b, bias))
            layers.append(norm(b, bias))
            layers.append(nn.ReLU())
        super().__init__(*layers)


def encoder_channels(base: int, scales: int) -> list[int]:
    """Channels of the stem and of each coarser scale, as in the published code: C, C, C, 2C, 4C, 8C, 8C for six."""
    growing = [base, base] + [base * 2**n for n in range(scales - 2)]
    return [*growing, growing[-1]] if scales > 2 else [base] * 3


class UNet(Network):
    """UNet of `scales` times halved maps, `base` channels at the finest.

    Without `bias`, f(a x) = a f(x) for a > 0 and one network serves every dose
    (Mohan et al., "Robust and interpretable blind image denoising", ICLR 2020).

    With `unshuffle` 2 the input's 2x2 pixels become four channels of half the size and
    the output's back again: the costly full-resolution convolutions are gone.
    """

    def __init__(self, base: int = 32, scales: int = 4, unshuffle: int = 1, bias: bool = False) -> None:
        super().__init__()
        at_least(1, base=base, unshuffle=unshuffle)
        at_least(2, scales=scales)
        self.base, self.scales, self.unshuffle, self.bias_free = base, scales, unshuffle, not bias
        self.multiple_px = unshuffle * 2**scales
        resolution = {1: "", 2: ", at half resolution"}.get(unshuffle, f", at 1/{unshuffle} resolution")
        self.description = f"UNet, {base} base channels, {scales} scales{resolution}"
        c = encoder_channels(base, scales)
        self.stem = DoubleConv(unshuffle**2, c[0], c[0], bias)
        self.down = nn.ModuleList([DoubleConv(a, b, b, bias) for a, b in pairwise(c)])
        self.up = nn.ModuleList(
            [
                DoubleConv(2 * skip, skip, after, bias)
                for skip, after in zip(c[-2::-1], [*c[-3::-1], base], strict=True)
            ]
        )
        self.head = nn.Conv2d(base, unshuffle**2, 1, bias=bias)

    def narrow(self) -> UNet:
        return UNet(1, self.scales, self.unshuffle, not self.bias_free)

    def forward(self, counts: Tensor) -> Tensor:
        x = F.pixel_unshuffle(counts, self.unshuffle) if self.unshuffle > 1 else counts
        skips = [self.stem(x)]
        for block in self.down:
            skips.append(block(F.max_pool2d(skips[-1], 2)))
        x = skips.pop()
        for block in self.up:
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
            x = block(torch.cat([skips.pop(), x], dim=1))
        x = self.head(x)
        return F.pixel_shuffle(x, self.unshuffle) if self.unshuffle > 1 else x
