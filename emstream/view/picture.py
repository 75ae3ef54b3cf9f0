"""Frames -> what a browser shows: averaged down, contrast by percentiles, 8 bit. Once per frame, not per viewer."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from emstream.frame import Frame
from emstream.view.receiver import STAGES, Pair, numbers

SHOWN_PX = 1024  # frames much larger than this are averaged down to about this side
PERCENTILES = (0.5, 99.5)  # what is shown black and white
_SCALE_FOLLOWS_NS = 300_000_000
_SAMPLE_PX = 50_000  # enough for a percentile that the eye cannot tell from the exact one


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """A pair ready to be sent."""

    pair: Pair
    header: dict[str, Any]
    pixels: bytes
    """raw, then denoised: uint8 (h, w) each"""


class Painter:
    """Turns pairs into pictures, in order; the grey scales follow the frames smoothly."""

    def __init__(self) -> None:
        self._series: tuple[Any, ...] | None = None
        self._raw, self._denoised = Scale(), Scale()

    def paint(self, pair: Pair) -> Picture:
        header = pair.raw.header
        series = (header.source, header.series, header.shape)
        if series != self._series:
            self._series, self._raw, self._denoised = series, Scale(), Scale()
        raw, denoised = shrink(pair.raw.data), shrink(pair.denoised.data)
        self._raw.follow(raw, pair.arrived_ns)
        self._denoised.follow(denoised, pair.arrived_ns)
        extra = pair.denoised.header.extra
        in_domain = extra.get("in_domain")
        facts = {
            "source": header.source,
            "series": header.series,
            "frame": header.frame,
            "frame_shape": header.shape,
            "shape": raw.shape,
            "units": header.units,
            "dose": numbers(extra, ["dose"]).get("dose"),
            "in_domain": in_domain if isinstance(in_domain, bool) else None,
            "latency_ms": _latency_ms(pair.denoised),
            "raw": {"low": self._raw.low, "high": self._raw.high},
            "denoised": {"low": self._denoised.low, "high": self._denoised.high},
        }
        return Picture(pair, facts, self._raw.grey(raw).tobytes() + self._denoised.grey(denoised).tobytes())


class Scale:
    """Which value is shown black and which white."""

    def __init__(self) -> None:
        self.low = self.high = math.nan
        self._followed_ns: int | None = None

    def follow(self, image: np.ndarray, at_ns: int) -> None:
        """Move towards the image's percentiles, so slowly that one frame's noise makes no flicker."""
        low, high = _percentiles(image)
        if self._followed_ns is None:
            self.low, self.high = low, high
        else:
            weight = -math.expm1((self._followed_ns - at_ns) / _SCALE_FOLLOWS_NS)
            self.low += weight * (low - self.low)
            self.high += weight * (high - self.high)
        self._followed_ns = at_ns

    @np.errstate(over="ignore", invalid="ignore")  # an engine may put out anything
    def grey(self, image: np.ndarray) -> np.ndarray:
        """`image` as uint8: `low` and what lies below is 0, `high` and what lies above 255."""
        grey = image.astype(np.float32)
        grey -= self.low
        grey *= 255 / (self.high - self.low)
        np.rint(grey, out=grey)
        np.clip(grey, 0, 255, out=grey)
        return grey.astype(np.uint8)


@np.errstate(over="ignore", invalid="ignore")
def shrink(image: np.ndarray) -> np.ndarray:
    """Average squares of pixels into one, so that the sides come out at about SHOWN_PX or less.

    Rows and columns at the end that fill no square are left out.
    """
    factor = min(max(1, round(max(image.shape) / SHOWN_PX)), *image.shape)
    if factor == 1:
        return image
    rows, columns = (length // factor * factor for length in image.shape)
    total = np.zeros((rows // factor, columns // factor), np.float32)
    for row in range(factor):  # strided sums: four times faster than mean() over a reshaped view
        for column in range(factor):
            total += image[row:rows:factor, column:columns:factor]
    total /= factor**2
    return total


@np.errstate(over="ignore", invalid="ignore")
def _percentiles(image: np.ndarray) -> tuple[float, float]:
    step = (image.size // _SAMPLE_PX) | 1  # odd, so as not to fall in step with the rows
    sample = image.reshape(-1)[::step].astype(np.float32)
    sample = sample[np.isfinite(sample)]
    if not sample.size:
        return 0.0, 1.0
    low, high = (float(value) for value in np.percentile(sample.astype(np.float64), PERCENTILES))
    magnitude = max(1.0, abs(low))
    return low, high if high - low > 1e-6 * magnitude else low + magnitude


def _latency_ms(frame: Frame) -> dict[str, float]:
    """The frame's own latencies [ms], named as the ledger names them."""
    at_ns = numbers(frame.header.extra.get("stages_ns"), STAGES)
    if len(at_ns) < len(STAGES):
        return {}
    spans = [*itertools.pairwise(STAGES), (STAGES[0], STAGES[-1])]
    latency = {f"{start}_to_{end}": round((at_ns[end] - at_ns[start]) / 1e6, 3) for start, end in spans}
    latency["total"] = latency.pop("received_to_published")
    return latency
