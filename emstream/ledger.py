"""Every frame accounted for, and how long it took.

At every moment: received == published + dropped + rejected + failed + in_flight.
"""

from __future__ import annotations

import math
import threading
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any

_STEP = math.log(1.01)
_BUCKETS = 3200  # 1 % steps from 1 ns to about 18 hours
_MAX_GAPS = 1000
_MAX_REASONS = 50
_REPEAT_WINDOW = 64
_LARGEST_GAP = 1_000_000
_MAX_SERIES = 16


class Histogram:
    """Durations in buckets of 1 %: constant memory, percentiles good to 1 %."""

    def __init__(self) -> None:
        self._counts = [0] * _BUCKETS
        self._total = 0
        self._sum = 0
        self._max = 0

    def add(self, duration_ns: int) -> None:
        bucket = int(math.log(duration_ns) / _STEP) if duration_ns > 1 else 0
        self._counts[min(bucket, _BUCKETS - 1)] += 1
        self._total += 1
        self._sum += duration_ns
        if duration_ns > self._max:
            self._max = duration_ns

    def percentile_ms(self, percent: float) -> float | None:
        """The duration [ms] that `percent` of the frames did not exceed; None without frames."""
        if not self._total:
            return None
        rank, seen = math.ceil(self._total * percent / 100), 0
        for bucket, count in enumerate(self._counts):
            seen += count
            if seen >= rank:
                return min(math.exp((bucket + 1) * _STEP), self._max) / 1e6
        return self._max / 1e6

    def cumulative(self, bounds_s: Sequence[float]) -> tuple[list[int], float]:
        """How many durations were at most as long as each of the bounds [s], rising, and in all; and their sum [s].

        Good to 1 %, as everything here.
        """
        counts = self._counts.copy()
        below, begin, seen = [], 0, 0
        for bound_s in bounds_s:
            end = min(int(math.log(bound_s * 1e9) / _STEP), _BUCKETS)
            seen += sum(counts[begin:end])
            below.append(seen)
            begin = end
        return [*below, seen + sum(counts[begin:])], self._sum / 1e9

    def summary_ms(self) -> dict[str, float | None]:
        percentiles = {"p50": 50, "p99": 99, "p99_9": 99.9, "max": 100}
        return {name: _round(self.percentile_ms(value)) for name, value in percentiles.items()}


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


class _Numbers:
    """The frame numbers of one series: the last one, and the gaps before it."""

    def __init__(self, last: int, begun: bool = False) -> None:
        """`begun`: the camera said that the series begins, so that a lower number never means another one."""
        self._last = last
        self._begun = begun
        self._gaps: deque[tuple[int, int]] = deque(maxlen=_MAX_GAPS)

    def note(self, frame: int) -> int:
        """Returns by how much the frames missing have grown or shrunk."""
        ahead = frame - self._last
        if 0 < ahead <= _LARGEST_GAP:
            if ahead > 1:
                self._gaps.append((self._last + 1, frame - 1))
            self._last = frame
            return ahead - 1
        if self._close_gap(frame):
            return -1
        if ahead > 0 or (not self._begun and (frame == 0 or -ahead > _REPEAT_WINDOW)):
            self._gaps.clear()
            self._last, self._begun = frame, False
        return 0

    def skip(self, frame: int) -> int:
        """The camera says that `frame` does not come, though it still may; returns as `note` does."""
        last, missing = self._last, self.note(frame)
        if missing == 0 and self._last == last:
            return 0  # it has come already
        self._gaps.append((frame, frame))
        return missing + 1

    def _close_gap(self, frame: int) -> bool:
        for i, (first, last) in enumerate(self._gaps):
            if first <= frame <= last:
                pieces = [(first, frame - 1), (frame + 1, last)]
                del self._gaps[i]
                self._gaps.extend(piece for piece in pieces if piece[0] <= piece[1])
                return True
        return False


class Ledger:
    """Counters that any thread may write; each frame is received once and settled once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._received = self._published = self._dropped = self._rejected = self._failed = 0
        self._missing = 0
        self._reasons: Counter[str] = Counter()
        self._numbers: dict[tuple[str, int | str], _Numbers] = {}
        self.latency = {
            "total": Histogram(),
            "camera_to_received": Histogram(),
            "received_to_batched": Histogram(),
            "batched_to_inferred": Histogram(),
            "inferred_to_published": Histogram(),
        }

    def receive(self) -> None:
        with self._lock:
            self._received += 1

    def publish(self) -> None:
        with self._lock:
            self._published += 1

    def drop(self, frames: int = 1) -> None:
        with self._lock:
            self._dropped += frames

    def fail(self, frames: int) -> None:
        with self._lock:
            self._failed += frames

    def reject(self, reason: str) -> bool:
        """Returns whether this reason is a new one."""
        with self._lock:
            self._rejected += 1
            new = reason not in self._reasons
            if new and len(self._reasons) >= _MAX_REASONS:
                return False
            self._reasons[reason] += 1
            return new

    def number(self, source: str, series: int | str, frame: int) -> None:
        """Note the camera's own number of a received frame; gaps count as missing.

        A late frame closes its gap and a repeated one changes nothing. A number of 0, or
        one far behind or absurdly far ahead, means that the camera began again.
        """
        with self._lock:
            self._missing += self._numbers_of(source, series, frame).note(frame)

    def begin(self, source: str, series: int | str, first: int) -> None:
        """The camera begins a series, numbered from `first` on: what lies before the first to come is missing, too."""
        with self._lock:
            self._numbers.pop((source, series), None)
            self._numbers[source, series] = _Numbers(first - 1, begun=True)
            self._forget_old()

    def skip(self, source: str, series: int | str, frame: int) -> None:
        """Note a frame that the camera numbered but says it does not send: it is missing."""
        with self._lock:
            self._missing += self._numbers_of(source, series, frame).skip(frame)

    def _numbers_of(self, source: str, series: int | str, frame: int) -> _Numbers:
        numbers = self._numbers.setdefault((source, series), _Numbers(frame - 1))
        self._forget_old()
        return numbers

    def _forget_old(self) -> None:
        if len(self._numbers) > _MAX_SERIES:
            del self._numbers[next(iter(self._numbers))]

    @property
    def published(self) -> int:
        return self._published

    @property
    def in_flight(self) -> int:
        return self.snapshot()["in_flight"]

    def snapshot(self, publishing: int = 0) -> dict[str, int]:
        """All counters at one moment, as they are once so many frames in flight are published."""
        with self._lock:
            published = self._published + publishing
            settled = published + self._dropped + self._rejected + self._failed
            return {
                "received": self._received,
                "published": published,
                "dropped": self._dropped,
                "rejected": self._rejected,
                "failed": self._failed,
                "in_flight": self._received - settled,
                "missing": self._missing,
            }

    def reasons(self) -> dict[str, int]:
        """Why frames were rejected, most frequent first."""
        with self._lock:
            return dict(self._reasons.most_common())

    def latency_ms(self) -> dict[str, Any]:
        """Percentiles [ms] from received to published, and of each stage on the way."""
        stages = {name: histogram.summary_ms() for name, histogram in self.latency.items() if name != "total"}
        return {**self.latency["total"].summary_ms(), **stages}
