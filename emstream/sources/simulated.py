"""``sim://?rate=40&dose=0.45``: the simulated camera inside the service, with no socket between.

Options: ``rate`` [frames/s], ``dose`` [electrons/pixel], ``height`` and ``width`` [px],
``seed``, ``frames`` (then stop).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

from emstream import wire
from emstream.frame import FrameHeader, now_ns
from emstream.intake import Intake
from emstream.sources import Url, wait_until
from emstream.sources.specimen import MovingSpecimen

NAME = "simulated camera"


def from_url(url: Url) -> SimulatedSource:
    url.expect("rate", "dose", "height", "width", "seed", "frames")
    specimen = MovingSpecimen(
        seed=url.integer("seed", 0),
        dose=url.number("dose", 0.45, "electrons/pixel"),
        height=url.integer("height", 512),
        width=url.integer("width", 512),
    )
    return SimulatedSource(specimen, url.number("rate", 40.0, "frames/s"), url.integer("frames", 0) or None)


def start_message(series: int | str) -> dict[str, object]:
    return {"htype": wire.START, "source": NAME, "series": series}


def end_message(series: int | str) -> dict[str, object]:
    return {"htype": wire.END, "source": NAME, "series": series}


def header_for(specimen: MovingSpecimen, number: int, series: int | str, rate: float) -> FrameHeader:
    """The header of frame `number`; `extra` says how to recompute what the frame shows without noise."""
    return FrameHeader(
        frame=number,
        shape=(specimen.height, specimen.width),
        type=specimen.dtype.name,
        source=NAME,
        series=series,
        timestamp_ns=now_ns(),
        pixel_size_m=specimen.sampling_pm * 1e-12,
        exposure_s=1 / rate,
        extra={"simulated": {"seed": specimen.seed, "dose": specimen.dose}},
    )


def paced(rate: float, stop: threading.Event, frames: int | None = None) -> Iterator[int]:
    """Frame numbers 0, 1, ..., each at its time: number / rate after the start, however long the last took."""
    if not rate > 0:
        raise ValueError(f"rate must be positive, got {rate} frames/s")
    start = time.monotonic()
    number = 0
    while frames is None or number < frames:
        if wait_until(start + number / rate, stop):
            return
        yield number
        number += 1


class SimulatedSource:
    """Offers fresh frames of a moving specimen at an exact rate."""

    lossless = False

    def __init__(self, specimen: MovingSpecimen, rate: float, frames: int | None = None) -> None:
        self._specimen = specimen
        self._rate = rate
        self._frames = frames

    def run(self, intake: Intake, stop: threading.Event) -> None:
        series = now_ns() // 1_000_000
        intake.mark(start_message(series))
        for number in paced(self._rate, stop, self._frames):
            counts = self._specimen.counts(number)
            row = intake.offer(header_for(self._specimen, number, series, self._rate))
            if row is not None:
                row[:] = counts
                intake.accept()
        intake.mark(end_message(series))
