"""The bias-free UNet of Mohan et al. (arXiv 2010.12970), for any number of base channels.

Shapes: counts (B, 1, H, W) in, expected counts (B, 1, H, W) out; H and W multiples of
`multiple_px` inside `UNet`, anything through `train.export.CountsToIntensity`.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BiasFreeBatchNorm(nn.BatchNorm2d):
    """Batch normalisation that only divides: x * gamma / sd(x), nothing is subtracted or added.

    As in the published code the class keeps the shift of its parent, never used and
    zero, so that parameters count as in the paper's table.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            # Every fourth pixel of the large maps is plenty for one standard deviation.
            sample = x.detach() if x.shape[-1] < 128 else x[:, :, ::2, ::2]
            variance = sample.float().var(dim=(0, 2, 3), unbiased=False)
            with torch.no_grad():
                self.running_var.lerp_(variance, self.momentum)
        else:
            variance = self.running_var
        gain = self.weight * torch.rsqrt(variance + self.eps)
        return x * gain.to(x.dtype).view(1, -1, 1, 1)


class ReplicateConv(nn.Conv2d):
    """A 3x3 convolution without bias on a replication-padded map."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            # torch.compile cannot run the backward of replication_pad2d on channels-last maps.
            x = torch.cat([x[:, :, :1], x, x[:, :, -1:]], dim=2)
            x = torch.cat([x[:, :, :, :1], x, x[:, :, :, -1:]], dim=3)
        else:
            x = F.pad(x, (1, 1, 1, 1), mode="replicate")
        return F.conv2d(x, self.weight)


class DoubleConv(nn.Sequential):
    """Twice: replication pad, 3x3 convolution, bias-free batch norm, ReLU."""

    def __init__(self, inputs: int, between: int, outputs: int) -> None:
        layers: list[nn.Module] = []
        for a, b in ((inputs, between), (between, outputs)):
            layers.append(ReplicateConv(a, b))
            layers.append(BiasFreeBatchNorm(b))
            layers.append(nn.ReLU())
        super().__init__(*layers)


def encoder_channels(base: int, scales: int) -> list[int]:
    """Channels of the stem and of each coarser scale, as in the published code: C, C, C, 2C, 4C, 8C, 8C for six."""
    growing = [base, base] + [base * 2**n for n in range(scales - 2)]
    return [*growing, growing[-1]] if scales > 2 else [base] * 3


class UNet(nn.Module):
    """UNet of `scales` times halved maps, `base` channels at the finest.

    Bias-free, so f(a x) = a f(x) for a > 0 and one network serves every dose
    (Mohan et al., "Robust and interpretable blind image denoising", ICLR 2020).

    With `unshuffle` 2 the input's 2x2 pixels become four channels of half the size and
    the output's back again: the costly full-resolution convolutions are gone.
    """

    def __init__(self, base: int = 32, scales: int = 4, unshuffle: int = 1) -> None:
        super().__init__()
        self.base, self.scales, self.unshuffle = base, scales, unshuffle
        self.multiple_px = unshuffle * 2**scales
        c = encoder_channels(base, scales)
        self.stem = DoubleConv(unshuffle**2, c[0], c[0])
        self.down = nn.ModuleList([DoubleConv(a, b, b) for a, b in pairwise(c)])
        self.up = nn.ModuleList(
            [
                DoubleConv(2 * skip, skip, after)
                for skip, after in zip(c[-2::-1], [*c[-3::-1], base], strict=True)
            ]
        )
        self.head = nn.Conv2d(base, unshuffle**2, 1, bias=False)

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
