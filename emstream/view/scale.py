"""Contrast: which value is shown black and which white; and the histogram to choose them by."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from emstream.view.request import PERCENTILES

BINS = 64
_SCALE_FOLLOWS_NS = 300_000_000
_SAMPLE_PX = 50_000  # enough for a percentile that the eye cannot tell from the exact one


class Scale:
    """Which value is shown black and which white, by percentiles that follow the frames smoothly."""

    def __init__(self, percentiles: tuple[float, float] = PERCENTILES) -> None:
        self.percentiles = percentiles
        self.low = self.high = math.nan
        self._followed_ns: int | None = None

    def follow(self, values: np.ndarray, at_ns: int) -> None:
        """Move towards the percentiles of `values`, so slowly that one frame's noise makes no flicker.

        An earlier frame than the last one moves nothing: stepping back keeps the contrast.
        """
        if self._followed_ns is not None and at_ns <= self._followed_ns:
            return
        low, high = _percentiles(values, self.percentiles)
        if self._followed_ns is None:
            self.low, self.high = low, high
        else:
            weight = -math.expm1((self._followed_ns - at_ns) / _SCALE_FOLLOWS_NS)
            self.low += weight * (low - self.low)
            self.high += weight * (high - self.high)
        self._followed_ns = at_ns


@np.errstate(over="ignore", invalid="ignore")  # an engine may put out anything
def grey(image: np.ndarray, low: float, high: float) -> np.ndarray:
    """`image` as uint8: `low` and what lies below is 0, `high` and what lies above 255."""
    shown = image.astype(np.float32)
    shown -= low
    shown *= 255 / (high - low)
    np.rint(shown, out=shown)
    np.clip(shown, 0, 255, out=shown)
    return shown.astype(np.uint8)


@np.errstate(over="ignore", invalid="ignore")
def sample(image: np.ndarray) -> np.ndarray:
    """About `_SAMPLE_PX` of the finite values of an image, float64."""
    step = (image.size // _SAMPLE_PX) | 1  # odd, so as not to fall in step with the rows
    values = image.reshape(-1)[::step].astype(np.float32)
    return values[np.isfinite(values)].astype(np.float64)


def histogram(values: np.ndarray, low: float, high: float, step: float = 0.0) -> dict[str, Any]:
    """Counts of `values` in at most about `BINS` bins from `low` to `high`: {"from", "to", "counts"}.

    Where values are multiples of `step`, such as counts, so many of them fall into every bin, in its middle.
    """
    margin = 0.05 * (high - low)
    start, end, bins = low - margin, high + margin, BINS
    if step:
        width = step * max(1, math.ceil((high - low + step) / step / BINS))
        start = (math.floor(low / step) - 0.5) * step
        bins = max(1, math.ceil((high + step / 2 - start) / width))
        end = start + bins * width
    counts, _ = np.histogram(values, bins, (start, end))
    return {"from": start, "to": end, "counts": counts.tolist()}


def _percentiles(values: np.ndarray, percentiles: tuple[float, float]) -> tuple[float, float]:
    if not values.size:
        return 0.0, 1.0
    low, high = (float(value) for value in np.percentile(values, percentiles))
    magnitude = max(1.0, abs(low))
    return low, high if high - low > 1e-6 * magnitude else low + magnitude
