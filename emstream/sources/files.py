"""``file:///abs/movie.mrc?rate=40``: a movie stands in for the camera.

Options: ``rate`` [frames/s] (by default as fast as they are taken), ``loop=true`` to begin
again at the end, ``first`` and ``last`` frame (both included), ``dataset`` within the file.
``file://movie.npy`` is relative to the working folder. A recording of `emstream record` is
replayed: `emstream.sources.replay`.

Without a rate the file waits for the engine and loses nothing; with one it is a camera
like any other, and loses what the engine cannot keep up with, unless ``--overrun block``.
"""

from __future__ import annotations

import math
import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from emstream import wire
from emstream.errors import FileFormatError, SourceError
from emstream.frame import FrameHeader, now_ns
from emstream.intake import Intake, Source
from emstream.movies import Movie, open_movie
from emstream.recording import is_recording
from emstream.sources import Url, replay, wait_until


def from_url(url: Url) -> Source:
    if not url.path:
        raise ValueError(f"--input {url.text!r}: expected file:///PATH or file://PATH")
    if "dataset" not in url.options and is_recording(Path(url.path)):
        return replay.from_url(url)
    url.expect("rate", "loop", "first", "last", "dataset")
    given = url.options
    return FileSource(
        Path(url.path),
        rate_hz=url.number("rate", 1.0, "frames/s") if "rate" in given else None,
        loop=url.flag("loop"),
        first=url.integer("first", 0),
        last=url.integer("last", 0) if "last" in given else None,
        dataset=given.get("dataset"),
    )


class FileSource:
    """Sends the frames of a movie, numbered as in the file; each pass over it is a series of its own."""

    def __init__(
        self,
        path: Path,
        *,
        rate_hz: float | None = None,
        loop: bool = False,
        first: int = 0,
        last: int | None = None,
        dataset: str | None = None,
    ) -> None:
        """Check the movie and the choice of frames; `run` opens it again.

        Raises SourceError for a file that cannot be read, ValueError for frames it does not have.
        """
        if rate_hz is not None and not (math.isfinite(rate_hz) and rate_hz > 0):
            raise ValueError(f"rate must be positive, got {rate_hz} frames/s")
        self.path = path
        self.lossless = rate_hz is None
        self._rate_hz = rate_hz
        self._loop = loop
        self._dataset = dataset
        with self._open() as movie:
            frames = len(movie)
        last = frames - 1 if last is None else last
        if not 0 <= first <= last < frames:
            raise ValueError(
                f"{path} has frames 0-{frames - 1}; "
                f"first and last must lie there in order, got {first} and {last}"
            )
        self._numbers = range(first, last + 1)
        # Undecodable bytes of a file name would not go into a header.
        self._name = os.fsencode(path.name).decode("utf-8", "replace")

    def run(self, intake: Intake, stop: threading.Event) -> None:
        """Send the frames until the last one, or `stop`. Raises SourceError when the file turns bad."""
        with self._open() as movie:
            header = FrameHeader(0, movie.shape[1:], movie.dtype.name)
            if header.nbytes > intake.max_frame_bytes:
                raise SourceError(
                    f"{self.path} has frames of {header.nbytes} bytes, "
                    f"more than the limit of {intake.max_frame_bytes}"
                )
            start_s, sent, series = time.monotonic(), 0, 0
            while not stop.is_set() and (self._loop or not series):
                intake.mark(self._mark(wire.START, series, len(self._numbers)))
                before = sent
                for number in self._numbers:
                    pixels = self._read(movie, number)
                    # An absolute schedule: a late frame does not delay those after it.
                    due_s = start_s + sent / self._rate_hz if self._rate_hz else start_s
                    if wait_until(due_s, stop):
                        break
                    self._send(intake, movie, series, number, pixels)
                    sent += 1
                intake.mark(self._mark(wire.END, series, sent - before))
                series += 1

    def _send(self, intake: Intake, movie: Movie, series: int, number: int, pixels: np.ndarray) -> None:
        row = intake.offer(
            FrameHeader(
                frame=number,
                shape=movie.shape[1:],
                type=movie.dtype.name,
                source=self._name,
                series=series,
                timestamp_ns=now_ns(),
                pixel_size_m=movie.pixel_size_m,
                units=movie.units,
            )
        )
        if row is not None:
            np.copyto(row, pixels)
            intake.accept()

    def _mark(self, htype: str, series: int, frames: int) -> dict[str, Any]:
        return {"htype": htype, "source": self._name, "series": series, "frames": frames}

    def _open(self) -> Movie:
        try:
            return open_movie(self.path, self._dataset)
        except FileFormatError as error:
            raise SourceError(str(error)) from None

    def _read(self, movie: Movie, number: int) -> np.ndarray:
        try:
            return movie[number]
        except FileFormatError as error:
            raise SourceError(str(error)) from None
