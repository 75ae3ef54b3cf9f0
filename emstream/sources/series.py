"""Which series a camera is in: each has a start and an end, whatever the camera says or forgets."""

from __future__ import annotations

from typing import Any

import msgpack  # type: ignore[import-untyped]

from emstream import wire
from emstream.frame import now_ns
from emstream.intake import Intake

_LARGEST_EXTRA = 4096  # [bytes]


class SeriesTracker:
    """Puts the marks of series among the frames. A series that never ends is closed by the next."""

    def __init__(self) -> None:
        self.open: tuple[str, int | str] | None = None
        """Name of the camera, and the series under way."""

    def start(
        self, intake: Intake, source: str, series: int | str, *, first: int | None = None, **about: Any
    ) -> None:
        """`first`: number of its first frame, where the camera itself said that the series starts."""
        if self.open:
            self._mark(intake, wire.END, unfinished=True)
        self.open = (source, series)
        if first is not None:
            intake.begin(source, series, first)
        self._mark(intake, wire.START, **about)

    def end(self, intake: Intake, series: int | str) -> None:
        """The end of a series that is not under way says nothing."""
        if self.open and self.open[1] == series:
            self._mark(intake, wire.END)
            self.open = None

    def _mark(self, intake: Intake, htype: str, **about: Any) -> None:
        assert self.open
        source, series = self.open
        known = {key: value for key, value in about.items() if value is not None}
        intake.mark({**known, "htype": htype, "source": source, "series": series})


class NumberedSeries:
    """The series of a camera that only numbers its frames: another begins where the numbers fall back.

    A connection that was lost and made again goes on with the series, if the numbers do: what lies
    between is missing.
    """

    def __init__(self, latest: int = 0) -> None:
        """`latest`: by how many numbers a frame may come late, and take the place left out for it."""
        self._latest = latest
        self._tracker = SeriesTracker()
        self._series = 0
        self._last = -1
        self._left_out: set[int] = set()
        self._length = 0

    def begin(self, intake: Intake, source: str, length: int = 0, **about: Any) -> None:
        """The camera says so; it announces `length` frames, or 0 where it does not say how many."""
        if self._last >= self._length:
            self._tracker.end(intake, self._series)
        self._series = max(self._series + 1, now_ns() // 1_000_000)
        self._last, self._length = -1, length
        self._left_out.clear()
        self._tracker.start(intake, source, self._series, frames=length or None, **about)

    def reconnect(self) -> None:
        """Nothing comes late from before."""
        self._left_out.clear()

    def of(self, intake: Intake, source: str, number: int) -> int:
        """The series of frame `number`."""
        if number in self._left_out:
            self._left_out.remove(number)
            return self._series
        if self._tracker.open is None or number < self._last:
            self.begin(intake, source)
        elif number > self._last + 1:
            oldest = number - self._latest
            kept = {each for each in self._left_out if each >= oldest}
            self._left_out = kept.union(range(max(self._last + 1, oldest), number))
        self._last = number
        return self._series


def portable(value: Any) -> Any:
    """What a user attached to a series or frame, where a header can carry it, else None."""
    try:
        packed = msgpack.packb(value)
        return msgpack.unpackb(packed) if len(packed) <= _LARGEST_EXTRA else None
    except (TypeError, ValueError, OverflowError, RecursionError):
        return None
