"""From a noiseless image to a frame of the camera: shot noise, and what cameras add to it.

Without a camera, counts are Poisson: an ideal counting camera, the one in the paper. `Camera`
adds what a real one does. The order matters, and differs between the two kinds:

*Counting* cameras find each electron's cloud of charge and count it once, in one pixel, though
not always the right one. So the misplacement blurs the expected intensity, and counts are
Poisson still, independent from pixel to pixel, without read noise.

*Integrating* cameras add up all charge. Each electron's cloud lies in several pixels, so it is
the counts that are blurred, after the shot noise: neighbours are correlated, and their
variance is below the mean. Then comes read noise, then the gain.

Then, for both, the gain of each pixel, the offset, and pixels that are dead or hot.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

DOSE_RANGE = (0.1, 10.0)  # electrons per pixel and frame, the range every network learns
PAPER_DOSE = 0.45


@dataclass(frozen=True, kw_only=True)
class Camera:
    """What a camera does to electrons; by default nothing."""

    counting: bool = True
    """False: an integrating camera."""
    mtf_nyquist: float = 1.0
    """Modulation transfer at half a cycle per pixel, in 0-1; 1 for no blur. The images' own blur
    (`Optics.blur_a`) holds a camera's already: this comes on top."""
    read_noise_e: float = 0.0
    """Standard deviation of a pixel's read noise [electrons]; integrating cameras only."""
    gain: float = 1.0
    """ADU per electron."""
    gain_spread: float = 0.0
    """Standard deviation of the pixels' gains over their mean: an imperfect flat field."""
    offset: float = 0.0
    """ADU without electrons."""
    dead_pixel_fraction: float = 0.0
    """Share of pixels that always read the offset."""
    hot_pixel_fraction: float = 0.0
    """Share of pixels that see electrons of their own ..."""
    hot_pixel_e: float = 20.0
    """... this many on average [electrons per frame]."""

    def __post_init__(self) -> None:
        for name in ("mtf_nyquist", "dead_pixel_fraction", "hot_pixel_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in 0-1, got {getattr(self, name)}")
        for name, unit in (
            ("read_noise_e", " electrons"),
            ("gain_spread", ""),
            ("hot_pixel_e", " electrons"),
        ):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}{unit}")
        if not 0 < self.gain < float("inf"):
            raise ValueError(f"gain must be positive, got {self.gain} ADU per electron")
        if not abs(self.offset) < float("inf"):
            raise ValueError(f"offset must be finite, got {self.offset} ADU")
        if self.counting and self.read_noise_e > 0:
            raise ValueError(
                f"a counting camera has no read noise, got {self.read_noise_e} electrons; "
                "for an integrating one say counting=False"
            )

    def electrons(self, adu: Tensor) -> Tensor:
        """What a network is given: frames in electrons, hot and dead pixels and all."""
        return (adu - self.offset) / self.gain


def draw_doses(
    count: int, generator: torch.Generator, dose_range: tuple[float, float] = DOSE_RANGE
) -> Tensor:
    """Doses (count,) [electrons/pixel]: half near the paper's 0.45, half log-uniform in `dose_range`."""
    if not 0 < dose_range[0] <= dose_range[1] < float("inf"):
        raise ValueError(
            f"doses must be positive, from low to high, got {dose_range[0]} to {dose_range[1]} electrons/pixel"
        )
    low, high = torch.log(torch.tensor(dose_range))
    wide = torch.exp(low + (high - low) * torch.rand(count, generator=generator))
    near = PAPER_DOSE * torch.exp(0.15 * torch.randn(count, generator=generator))
    return torch.where(torch.rand(count, generator=generator) < 0.5, near, wide)


def expose(
    intensity: Tensor, doses: Tensor, generator: torch.Generator, camera: Camera | None = None
) -> Tensor:
    """Take frames (B, 1, H, W) of `intensity` (B, 1, H, W; 1 in vacuum) at `doses` (B,) [electrons/pixel].

    Returns electron counts, or with a `camera` its ADU. Every frame has its own dead and hot
    pixels and gains, so that no network learns where they are.
    """
    possible = (doses >= 0) & doses.isfinite()
    if not possible.all():
        raise ValueError(f"a dose cannot be {doses[~possible][0].item()} electrons/pixel")
    expected = intensity.clamp_min(0) * doses.view(-1, 1, 1, 1)
    if camera is None:
        return torch.poisson(expected, generator=generator)
    if camera.counting:
        signal = torch.poisson(blur(expected, camera.mtf_nyquist), generator=generator)
    else:
        signal = blur(torch.poisson(expected, generator=generator), camera.mtf_nyquist)

    def normal() -> Tensor:
        return torch.randn(signal.shape, generator=generator, device=signal.device)

    def chosen(fraction: float) -> Tensor:
        return torch.rand(signal.shape, generator=generator, device=signal.device) < fraction

    if camera.hot_pixel_fraction:
        dark = torch.poisson(torch.full_like(signal, camera.hot_pixel_e), generator=generator)
        signal = signal + torch.where(chosen(camera.hot_pixel_fraction), dark, 0)
    if camera.read_noise_e:
        signal = signal + camera.read_noise_e * normal()
    gain = camera.gain * (1 + camera.gain_spread * normal()) if camera.gain_spread else camera.gain
    adu = gain * signal + camera.offset
    if camera.dead_pixel_fraction:
        adu = torch.where(chosen(camera.dead_pixel_fraction), camera.offset, adu)
    return adu


def blur(image: Tensor, mtf_nyquist: float) -> Tensor:
    """Spread every pixel of `image` (B, 1, H, W) over its neighbours.

    Along rows and columns (k, 1 - 2k, k) with k = (1 - MTF) / 4: never negative, so that charge
    stays charge, exactly `mtf_nyquist` at Nyquist, and at lower frequencies within 0.11 of the
    Gaussian that has the same value there.
    """
    if mtf_nyquist == 1:
        return image
    k = (1 - mtf_nyquist) / 4
    row = torch.tensor([k, 1 - 2 * k, k], dtype=image.dtype, device=image.device)
    padded = F.pad(image, (1, 1, 1, 1), mode="reflect")
    return F.conv2d(padded, torch.outer(row, row)[None, None])
