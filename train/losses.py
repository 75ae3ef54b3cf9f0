"""What training minimises.

Estimates and truths (B, 1, H, W) are 1 in vacuum, doses (B, 1, 1, 1) in electrons per pixel.
All losses are close to (dose / 0.45) (estimate - truth)^2 near the truth, so that one learning
rate does for all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from train.noise import PAPER_DOSE

STRAIGHT_BELOW = (
    0.05  # of vacuum: there the logarithm goes on as its tangent, and pulls negative estimates back
)


def mse(estimate: Tensor, truth: Tensor, doses: Tensor) -> Tensor:
    """Squared errors. At low dose no network can be right: they are weighed by about what is attainable."""
    return ((doses / PAPER_DOSE) ** 0.7 * (estimate - truth).square()).mean()


def poisson(estimate: Tensor, truth: Tensor, doses: Tensor) -> Tensor:
    """Twice the Kullback-Leibler divergence between the Poisson distributions of truth and estimate."""
    safe = estimate.clamp_min(STRAIGHT_BELOW)
    logarithm = safe.log() + (estimate - safe) / safe
    return (
        doses / PAPER_DOSE * 2 * (torch.xlogy(truth, truth) - truth * logarithm - truth + estimate)
    ).mean()


def anscombe(estimate: Tensor, truth: Tensor, doses: Tensor) -> Tensor:
    """Squared errors of 2 sqrt(counts + 3/8), whose noise has the same variance at every brightness."""

    def stable(intensity: Tensor) -> Tensor:
        safe = intensity.clamp_min(0)
        root = torch.sqrt(doses * safe + 3 / 8)
        return 2 * root + doses * (intensity - safe) / root  # the tangent, below zero

    return (stable(estimate) - stable(truth)).square().mean() / PAPER_DOSE


LOSSES = {"mse": mse, "poisson": poisson, "anscombe": anscombe}
