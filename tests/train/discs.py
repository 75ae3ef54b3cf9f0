"""Images to train on that take no simulation: dark discs on a bright ground."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor


class Discs:
    """Stands in for `train.dataset.Images`."""

    def __init__(self, directory: Path) -> None:
        y, x = torch.meshgrid(torch.arange(128), torch.arange(128), indexing="ij")
        self.images = 1 - 0.5 * ((x % 16 - 8) ** 2 + (y % 16 - 8) ** 2 < 16).float()

    def random_views(self, count: int, size_px: int, generator: torch.Generator) -> Tensor:
        places = torch.randint(128 - size_px + 1, (count, 2), generator=generator).tolist()
        crops = [self.images[top : top + size_px, left : left + size_px] for top, left in places]
        return torch.stack(crops)[:, None]

    def central_views(self, size_px: int) -> Tensor:
        return self.images.expand(4, 1, 128, 128)
