"""The live Fourier transform: lattice planes, thon rings and drift at a glance."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from emstream.view.shrink import average_squares

LARGEST_PX = 1024  # of a side that is transformed; of a larger region the middle
SHOWN_PX = 256


@np.errstate(over="ignore", invalid="ignore", divide="ignore")
def spectrum(image: np.ndarray, halvings: int = 0) -> np.ndarray:
    """Power spectrum (h, w), float32 [log10], zero frequency at (h // 2, w // 2).

    The edges lie at Nyquist, halved `halvings` times: with small pixels all there is to see lies
    far inside.

    The image (H, W) is windowed (Hann) against the cross that its edges would make. Neighbouring
    powers are averaged until a side has at most about `SHOWN_PX`, which calms the noise, too.
    """
    image = _middle(image, [min(length, LARGEST_PX) for length in image.shape]).astype(np.float32)
    rows, columns = image.shape
    image -= image.mean()
    image *= np.hanning(rows + 1)[:rows, None].astype(np.float32)
    image *= np.hanning(columns + 1)[:columns].astype(np.float32)
    amplitude = np.fft.fftshift(np.fft.fft2(image))
    power = np.square(amplitude.real) + np.square(amplitude.imag)
    power /= image.size  # noise is as bright whatever the region
    power = _middle(power, [length >> halvings for length in power.shape])
    power = average_squares(power, max(1, round(max(power.shape) / SHOWN_PX)))
    logarithm: np.ndarray = np.log10(np.maximum(power, np.float32(1e-12))).astype(np.float32)
    return logarithm


def _middle(image: np.ndarray, sides: Sequence[int]) -> np.ndarray:
    """The middle of an image, sides made even."""
    rows, columns = (max(1, side // 2 * 2) for side in sides)
    top, left = (image.shape[0] - rows) // 2, (image.shape[1] - columns) // 2
    return image[top : top + rows, left : left + columns]
