"""What every network here is, and the norms they share.

Shapes: counts (B, 1, H, W) in, expected counts (B, 1, H, W) out; H and W multiples of the
network's `multiple_px`, anything through `train.export.CountsToIntensity`.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor, nn


class Network(nn.Module):
    """A denoiser: one channel in, one out, each output pixel from a square of input pixels around it."""

    multiple_px: int
    """Height and width must be multiples of this."""
    bias_free: bool
    """No additive constant anywhere, so f(a x) = a f(x) for a > 0."""
    description: str
    """The architecture in words."""

    def narrow(self) -> Network:
        """A network of the same geometry with next to no channels."""
        raise NotImplementedError

    @cached_property
    def field_of_view_px(self) -> int:
        """Side of the square of input pixels that can move one output pixel, for the widest output pixel.

        Measured by the gradient of a twin whose weights are all positive, so that nothing cancels.
        """
        period = self.multiple_px
        columns, rows = (-(-width // period) * period for width in (1280, 64))
        middle = columns // 2 // period * period
        widest = 0
        with torch.enable_grad():
            twin = self.narrow().double().eval()
            for parameter in twin.parameters():
                nn.init.constant_(parameter, 0.1)
            for phase in range(period):
                x = torch.ones(1, 1, rows, columns, dtype=torch.float64, requires_grad=True)
                twin(x)[0, 0, rows // 2, middle + phase].backward()
                assert x.grad is not None
                widest = max(widest, int((x.grad[0, 0] != 0).any(dim=0).sum()))
        assert widest < columns - 4 * period
        return widest


class BiasFreeBatchNorm(nn.BatchNorm2d):
    """Batch normalisation that only divides: x * gamma / sd(x), nothing is subtracted or added.

    As in the published code the class keeps the shift of its parent, never used and
    zero, so that parameters count as in the paper's table.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.bias.requires_grad_(False)

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


def norm(channels: int, bias: bool) -> nn.BatchNorm2d:
    """Ordinary batch normalisation for biased networks, a division alone for bias-free ones."""
    return nn.BatchNorm2d(channels) if bias else BiasFreeBatchNorm(channels)


def at_least(least: int, **arguments: int) -> None:
    """Raise ValueError unless every argument is `least` or more."""
    for name, value in arguments.items():
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
