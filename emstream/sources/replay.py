"""``file:///abs/REC.h5?rate=original``: a recording stands in for the camera that it recorded.

The raw frames go out as they came: pixels, numbers, series and every header field, and the
marks of series between them. A key ``replayed_ns`` says that, and when. So the same engine on
the same machine makes the very same denoised frames.

Options: ``rate``, in frames/s or ``original`` (by the camera's timestamps, or, where it gave
none or its clock jumped, by the recorder's), by default as fast as they are taken;
``loop=true``; ``first`` and ``last`` row of the file (both included).

Each further pass of a loop is a series of its own: `` (pass 2)`` goes behind its name.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from emstream import wire
from emstream.errors import FileFormatError, MalformedFrame, SourceError
from emstream.frame import now_ns
from emstream.intake import Intake
from emstream.recording import Recording
from emstream.recording.layout import UNKNOWN
from emstream.sources import Url, wait_until

log = logging.getLogger(__name__)

ORIGINAL = "original"
_LONG_S = 10.0


def from_url(url: Url) -> ReplaySource:
    url.expect("rate", "loop", "first", "last")
    rate = url.options.get("rate")
    return ReplaySource(
        Path(url.path),
        rate_hz=rate if rate in (None, ORIGINAL) else url.number("rate", 1.0, "frames/s"),
        loop=url.flag("loop"),
        first=url.integer("first", 0),
        last=url.integer("last", 0) if "last" in url.options else None,
    )


class ReplaySource:
    """Sends the raw frames of a recording."""

    def __init__(
        self,
        path: Path,
        *,
        rate_hz: float | str | None = None,
        loop: bool = False,
        first: int = 0,
        last: int | None = None,
    ) -> None:
        """Check the recording and the choice of frames; `run` opens it again.

        `rate_hz` [frames/s] may be ``original``. Raises SourceError for a recording that cannot be
        read, ValueError for frames it does not have.
        """
        if isinstance(rate_hz, str) and rate_hz != ORIGINAL:
            raise ValueError(f"rate must be frames/s or {ORIGINAL}, got {rate_hz!r}")
        if isinstance(rate_hz, (int, float)) and not (math.isfinite(rate_hz) and rate_hz > 0):
            raise ValueError(f"rate must be positive, got {rate_hz} frames/s")
        self.path = path
        self.lossless = rate_hz is None
        self._loop = loop
        with self._open() as recording:
            frames = len(recording.raw)
            last = frames - 1 if last is None else last
            if not 0 <= first <= last < frames:
                raise ValueError(
                    f"{path} has frames 0-{frames - 1}; "
                    f"first and last must lie there in order, got {first} and {last}"
                )
            self._rows = range(first, last + 1)
            self._due_s = schedule(recording, self._rows, rate_hz)

    def run(self, intake: Intake, stop: threading.Event) -> None:
        """Send the frames until the last one, or `stop`. Raises SourceError when the file turns bad."""
        with self._open() as recording:
            if (nbytes := math.prod(recording.raw.shape[1:]) * recording.raw.dtype.itemsize) > (
                intake.max_frame_bytes
            ):
                raise SourceError(
                    f"{self.path} has frames of {nbytes} bytes, more than the limit of {intake.max_frame_bytes}"
                )
            start_s, passes = time.monotonic(), 0
            while not stop.is_set() and (self._loop or not passes):
                self._pass(recording, intake, stop, start_s + passes * self._due_s[-1], passes)
                passes += 1

    def _pass(
        self, recording: Recording, intake: Intake, stop: threading.Event, start_s: float, passes: int
    ) -> None:
        marks = [(row, mark) for row, mark in recording.marks if self._rows[0] <= row <= self._rows[-1] + 1]
        for n, row in enumerate(self._rows):
            while marks and marks[0][0] <= row:
                intake.mark(_of_pass(marks.pop(0)[1], passes))
            try:
                pixels = recording.raw[row]
                message = _of_pass(recording.raw.header(row), passes) | {"replayed_ns": now_ns()}
                header = wire.header_of(message, max_frame_bytes=intake.max_frame_bytes)
            except (FileFormatError, MalformedFrame) as error:
                raise SourceError(f"{self.path}: frame {row} is damaged: {error}") from None
            if header.shape != pixels.shape or header.dtype != pixels.dtype:
                raise SourceError(f"{self.path}: frame {row} and its header disagree about the frame's size")
            wait_s = start_s + self._due_s[n] - time.monotonic()
            if wait_s > _LONG_S:
                log.info("frame %d is due in %.0f s", row, wait_s)
            if wait_until(start_s + self._due_s[n], stop):
                return
            place = intake.offer(header)
            if place is not None:
                np.copyto(place, pixels)
                intake.accept()
        for _, mark in marks:
            intake.mark(_of_pass(mark, passes))

    def _open(self) -> Recording:
        try:
            return Recording(self.path)
        except FileFormatError as error:
            raise SourceError(str(error)) from None


def schedule(recording: Recording, rows: range, rate_hz: float | str | None) -> np.ndarray:
    """(frames + 1) [s] from the start until each frame is due, and until the next pass begins."""
    if rate_hz is None:
        return np.zeros(len(rows) + 1)
    if not isinstance(rate_hz, str):
        return np.arange(len(rows) + 1) / rate_hz
    chosen = slice(rows[0], rows[-1] + 1)
    steps_s = _steps_s(recording.raw.arrived_ns[chosen])
    if not ((times_ns := recording.raw.timestamps_ns[chosen]) == UNKNOWN).any():
        camera_s = _steps_s(times_ns)
        # One of the clocks jumped: the shorter step is the one that does not wait for that.
        is_wild = np.abs(camera_s - steps_s) > _LONG_S
        steps_s = np.where(is_wild, np.minimum(camera_s, steps_s), camera_s)
    usual_s = float(np.median(steps_s)) if len(steps_s) else 0.0
    due_s: np.ndarray = np.concatenate([[0.0], np.cumsum([*steps_s, usual_s])])
    return due_s


def _steps_s(times_ns: np.ndarray) -> np.ndarray:
    """[s] A clock that was set back does not stop the replay."""
    steps_s: np.ndarray = np.maximum(np.diff(times_ns), 0) / 1e9
    return steps_s


def _of_pass(message: dict[str, Any], passes: int) -> dict[str, Any]:
    """A header or mark as it is in the n-th pass of a loop, the first being 0."""
    return {**message, "series": f"{message.get('series', 0)} (pass {passes + 1})"} if passes else message
