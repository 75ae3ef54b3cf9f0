"""PSNR and SSIM as the paper has them: peak 1 electron, estimate and truth clipped to [0, 1].

Mohan et al. (arXiv 2010.12970) multiply both by 255 and score with a data range of 255, image
by image, then take mean and standard deviation over the images.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

VIEW_PX = 512  # side of what is scored, the central view of an image


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over images."""

    mean: float
    sd: float
    images: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        array = np.fromiter(values, float)
        return cls(float(array.mean()), float(array.std()), len(array))

    def text(self, digits: int) -> str:
        """Mean +- standard deviation; of one image, which has no spread, itself."""
        return f"{self.mean:.{digits}f}" + (f" +- {self.sd:.{digits}f}" if self.images > 1 else "")


def psnr_db(estimate: np.ndarray, truth: np.ndarray) -> float:
    """PSNR [dB] of one image (H, W) in electrons, peak 1 electron."""
    error = np.clip(estimate, 0, 1).astype(np.float64) - np.clip(truth, 0, 1)
    return float(-10 * np.log10(np.mean(error**2)))


def psnr_ssim(estimate: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """PSNR [dB] and SSIM of one image (H, W) in electrons, peak 1 electron."""
    a, b = (255.0 * np.clip(image, 0, 1) for image in (truth, estimate))
    return (
        float(peak_signal_noise_ratio(a, b, data_range=255)),
        float(structural_similarity(a, b, data_range=255)),
    )
