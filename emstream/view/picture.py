"""Pairs -> what a browser shows: cut, averaged down, contrast, 8 bit. Once for all who ask for the same."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from emstream import wire
from emstream.frame import Frame
from emstream.view.average import RunningAverage
from emstream.view.pair import Pair
from emstream.view.receiver import STAGES
from emstream.view.request import AVERAGES, Contrast, Request
from emstream.view.scale import Scale, grey, histogram, sample
from emstream.view.shrink import cut, region_of
from emstream.view.spectrum import spectrum

_HISTOGRAM_PERCENTILES = (0.02, 99.98)
_SPECTRUM_PERCENTILES = (40.0, 99.95)
_MOST_SCALES = 64
_MOST_KEPT = 8


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """A pair ready to be sent."""

    pair: Pair
    header: dict[str, Any]
    pixels: bytes
    """uint8 (h, w) of each of the header's ``pictures``, one after another"""


class Painter:
    """Turns pairs into pictures, in order; the scales follow the frames smoothly. For one thread."""

    def __init__(self) -> None:
        self._series: tuple[Any, ...] | None = None
        self._scales: dict[tuple[str, tuple[float, float]], Scale] = {}
        self._averages: dict[int, RunningAverage] = {}
        self._painted: dict[tuple[int, Request], Picture] = {}

    def paint(self, pairs: Sequence[Pair], request: Request) -> Picture:
        """The last of `pairs` as `request` wants it; those before it are there to be averaged."""
        found = self._painted.get((pairs[-1].key, request))
        if found is None or found.pair is not pairs[-1]:
            found = self._paint(pairs, request)
            self._painted[pairs[-1].key, request] = found
            if len(self._painted) > _MOST_KEPT:
                del self._painted[next(iter(self._painted))]
        return found

    def keep_averages(self, widths: Collection[int]) -> None:
        """Forget the averages of other widths [frames], and the frames that they hold."""
        self._averages = {width: each for width, each in self._averages.items() if width in widths}

    def _paint(self, pairs: Sequence[Pair], request: Request) -> Picture:
        pair = pairs[-1]
        if pair.series != self._series or len(self._scales) > _MOST_SCALES:
            self._series, self._scales, self._averages = pair.series, {}, {}
        raw, averaged = pair.raw.data, 1
        if request.average > 1:
            raw, averaged = self._average(pairs, request.average)
        step = 1 / averaged if pair.raw.data.dtype.kind in "iu" else 0.0
        painted = [
            *self._paint_side("raw", raw, request, pair, step),
            *self._paint_side("denoised", pair.denoised.data, request, pair, 0.0),
        ]
        header = {**facts(pair), "averaged": averaged, "pictures": [about for about, _ in painted]}
        return Picture(pair, header, b"".join(pixels for _, pixels in painted))

    def _paint_side(
        self, side: str, image: np.ndarray, request: Request, pair: Pair, step: float
    ) -> Iterator[tuple[dict[str, Any], bytes]]:
        """What is said about each picture of a side, and its pixels; values of `image` are multiples of `step`."""
        # An average has a contrast of its own: it is that of a calmer picture.
        kind = f"{side}/{request.average}" if side == "raw" else side
        shown, region = cut(image, request)
        values = sample(image)
        low, high = self._contrast(kind, request.contrast(side), values, pair)
        ends = self._contrast(kind, ("percentiles", *_HISTOGRAM_PERCENTILES), values, pair)
        about = {"name": side, "shape": shown.shape, "region": region, "low": low, "high": high}
        about["histogram"] = histogram(values, *ends, step)
        yield about, grey(shown, low, high).tobytes()
        if side not in request.spectra:
            return
        top, left, height, width = region_of(image.shape, request)
        power = spectrum(image[top : top + height, left : left + width], request.halvings)
        kind = f"{kind} spectrum"
        low, high = self._contrast(kind, ("percentiles", *_SPECTRUM_PERCENTILES), sample(power), pair)
        about = {"name": f"{side}-spectrum", "shape": power.shape, "low": low, "high": high}
        yield {**about, "halvings": request.halvings}, grey(power, low, high).tobytes()

    def _average(self, pairs: Sequence[Pair], frames: int) -> tuple[np.ndarray, int]:
        # One that nobody looks at any more must not keep its frames.
        newest = pairs[-1].key
        self._averages = {
            n: each for n, each in self._averages.items() if newest - each.last_key < AVERAGES[-1]
        }
        return self._averages.setdefault(frames, RunningAverage()).of(pairs, frames)

    def _contrast(self, kind: str, contrast: Contrast, values: np.ndarray, pair: Pair) -> tuple[float, float]:
        """(low, high) of one side; those by percentiles follow the frames."""
        way, low, high = contrast
        if way == "values":
            return low, high
        scale = self._scales.setdefault((kind, (low, high)), Scale((low, high)))
        scale.follow(values, pair.arrived_ns)
        return scale.low, scale.high


def facts(pair: Pair) -> dict[str, Any]:
    """What the page says about a pair."""
    header, extra = pair.raw.header, pair.denoised.header.extra
    in_domain = extra.get("in_domain")
    return {
        "key": pair.key,
        "source": header.source,
        "series": header.series,
        "frame": header.frame,
        "frame_shape": header.shape,
        "pixel_size_m": header.pixel_size_m,
        "exposure_s": header.exposure_s,
        "units": header.units,
        "dose": wire.numbers(extra, ["dose"]).get("dose"),
        "in_domain": in_domain if isinstance(in_domain, bool) else None,
        "latency_ms": _latency_ms(pair),
    }


def _latency_ms(pair: Pair) -> dict[str, float]:
    """The frame's own latencies [ms], named as the ledger names them."""
    frame: Frame = pair.denoised
    at_ns = wire.numbers(frame.header.extra.get("stages_ns"), STAGES)
    if len(at_ns) < len(STAGES):
        return {}
    spans = [*itertools.pairwise(STAGES), (STAGES[0], STAGES[-1])]
    latency = {f"{start}_to_{end}": round((at_ns[end] - at_ns[start]) / 1e6, 3) for start, end in spans}
    latency["total"] = latency.pop("received_to_published")
    return latency
