"""The small UNet of DURR (Zhang et al., arXiv 1805.07709): one scale, dilated in the middle, no norms."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from train.models.network import Network, at_least


class DURR(Network):
    """Two layers at full resolution, four at half (dilated 1, 1, 2, 4), back up, one skip.

    As published, the last layer has no bias in the biased network either.
    """

    multiple_px = 2

    def __init__(self, base: int = 32, bias: bool = False) -> None:
        super().__init__()
        at_least(1, base=base)
        self.bias_free = not bias
        self.description = f"small UNet of DURR, {base} base channels"
        c = base
        self.fine = nn.Sequential(
            nn.Conv2d(1, c, 5, padding=2, bias=bias), nn.ReLU(),
            nn.Conv2d(c, c, 3, padding=1, bias=bias), nn.ReLU(),
        )  # fmt: skip
        self.coarse = nn.Sequential(
            nn.Conv2d(c, 2 * c, 3, stride=2, padding=1, bias=bias), nn.ReLU(),
            nn.Conv2d(2 * c, 2 * c, 3, padding=1, bias=bias), nn.ReLU(),
            nn.Conv2d(2 * c, 2 * c, 3, dilation=2, padding=2, bias=bias), nn.ReLU(),
            nn.Conv2d(2 * c, 2 * c, 3, dilation=4, padding=4, bias=bias), nn.ReLU(),
            nn.ConvTranspose2d(2 * c, 2 * c, 4, stride=2, padding=1, bias=bias), nn.ReLU(),
        )  # fmt: skip
        self.merge = nn.Sequential(
            nn.Conv2d(3 * c, c, 3, padding=1, bias=bias), nn.ReLU(),
            nn.Conv2d(c, 1, 5, padding=2, bias=False),
        )  # fmt: skip

    def narrow(self) -> DURR:
        return DURR(1, not self.bias_free)

    def forward(self, counts: Tensor) -> Tensor:
        fine = self.fine(counts)
        return self.merge(torch.cat([self.coarse(fine), fine], dim=1))
