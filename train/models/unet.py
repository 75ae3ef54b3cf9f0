"""The bias-free UNet of Mohan et al. (arXiv 2010.12970), for any number of base channels.

Shapes: counts (B, 1, H, W) in, expected counts (B, 1, H, W) out; H and W multiples
of 16 inside `UNet`, anything through `CountsToIntensity`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SCALES = 4
MULTIPLE_PX = 2**SCALES


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


class UNet(nn.Module):
    """UNet at four scales; `base` 32, 64 or 128 channels give 352 K, 1.41 M and 5.61 M parameters.

    Bias-free, so f(a x) = a f(x) for a > 0 and one network serves every dose
    (Mohan et al., "Robust and interpretable blind image denoising", ICLR 2020).
    """

    def __init__(self, base: int = 32) -> None:
        super().__init__()
        c = base
        self.base = base
        self.stem = DoubleConv(1, c, c)
        self.down = nn.ModuleList(
            [DoubleConv(a, b, b) for a, b in ((c, c), (c, c), (c, 2 * c), (2 * c, 2 * c))]
        )
        self.up = nn.ModuleList(
            [DoubleConv(4 * c, 2 * c, c)] + [DoubleConv(2 * c, c, c) for _ in range(SCALES - 1)]
        )
        self.head = nn.Conv2d(c, 1, 1, bias=False)

    def forward(self, counts: Tensor) -> Tensor:
        skips = [self.stem(counts)]
        for block in self.down:
            skips.append(block(F.max_pool2d(skips[-1], 2)))
        x = skips.pop()
        for block in self.up:
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
            x = block(torch.cat([skips.pop(), x], dim=1))
        return self.head(x)
