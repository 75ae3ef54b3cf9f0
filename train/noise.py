"""Shot noise: the only noise of an electron-counting camera."""

from __future__ import annotations

import torch
from torch import Tensor

DOSE_RANGE = (0.1, 10.0)  # electrons per pixel and frame, the range every network learns
PAPER_DOSE = 0.45


def draw_doses(count: int, generator: torch.Generator) -> Tensor:
    """Doses (count,) [electrons/pixel]: half near the paper's 0.45, half log-uniform in 0.1-10."""
    low, high = torch.log(torch.tensor(DOSE_RANGE))
    wide = torch.exp(low + (high - low) * torch.rand(count, generator=generator))
    near = PAPER_DOSE * torch.exp(0.15 * torch.randn(count, generator=generator))
    return torch.where(torch.rand(count, generator=generator) < 0.5, near, wide)


def expose(intensity: Tensor, doses: Tensor, generator: torch.Generator) -> Tensor:
    """Draw electron counts (B, 1, H, W) of `intensity` (B, 1, H, W; 1 in vacuum) at `doses` (B,)."""
    return torch.poisson(intensity.clamp_min(0) * doses.view(-1, 1, 1, 1), generator=generator)
