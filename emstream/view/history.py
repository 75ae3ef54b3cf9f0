"""The last seconds, so that an operator may pause and step back; it is bounded whatever viewers do."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

from emstream.view.pair import Pair

SPAN_NS = 10_000_000_000
LIMIT_BYTES = 256 * 1024**2  # ten seconds of 512x512 at 20 frames/s; of larger frames, fewer
MOST_HELD = 2  # viewers for whom the past stands still; beyond, the one who paused first goes without
_AT_LEAST = 2


class History:
    """Pairs of the last `SPAN_NS` and at most `LIMIT_BYTES`, each under its ``key``: 1, 2, 3, ...

    A viewer who pauses gets a past that stands still, `hold`; that of `MOST_HELD` viewers is kept,
    so the pasts end at (1 + MOST_HELD) * LIMIT_BYTES. Outside them the frames on each viewer's screen
    are kept, those of the last few pictures, and the raw ones of each average that somebody looks at.
    """

    def __init__(self, span_ns: int = SPAN_NS, limit_bytes: int = LIMIT_BYTES) -> None:
        self._span_ns, self._limit_bytes = span_ns, limit_bytes
        self._pairs: deque[Pair] = deque()
        self._held: dict[Hashable, tuple[Pair, ...]] = {}
        self._nbytes = 0
        self._lock = threading.Lock()

    @property
    def newest(self) -> Pair | None:
        with self._lock:
            return self._pairs[-1] if self._pairs else None

    @property
    def nbytes(self) -> int:
        """Pixels in the rolling past [bytes]."""
        return self._nbytes

    def add(self, pair: Pair) -> None:
        with self._lock:
            self._pairs.append(pair)
            self._nbytes += pair.nbytes
            while len(self._pairs) > _AT_LEAST and self._too_much(pair):
                self._nbytes -= self._pairs.popleft().nbytes

    def hold(self, viewer: Hashable) -> None:
        """From now on the past of `viewer` stands still."""
        with self._lock:
            self._held[viewer] = tuple(self._pairs)
            if len(self._held) > MOST_HELD:
                del self._held[next(iter(self._held))]

    def release(self, viewer: Hashable) -> None:
        with self._lock:
            self._held.pop(viewer, None)

    def of(self, viewer: Hashable) -> tuple[Pair, ...]:
        """The past that `viewer` may step through, oldest first."""
        with self._lock:
            return self._held.get(viewer) or tuple(self._pairs)

    def find(self, key: int) -> tuple[Pair, ...]:
        """The pair `key` with what is left of its past, oldest first; empty when it is gone."""
        with self._lock:
            for pairs in self._all():
                if pairs and pairs[0].key <= key <= pairs[-1].key:
                    return tuple(pair for pair in pairs if pair.key <= key)
        return ()

    def _all(self) -> Iterator[Sequence[Pair]]:
        yield self._pairs
        yield from self._held.values()

    def _too_much(self, newest: Pair) -> bool:
        oldest = self._pairs[0]
        return self._nbytes > self._limit_bytes or newest.arrived_ns - oldest.arrived_ns > self._span_ns


def extent(pairs: Sequence[Pair]) -> dict[str, Any]:
    """What the page's timeline shows of `pairs`: keys, span, and where something went wrong."""
    if not pairs:
        return {"first": 0, "last": 0, "seconds": 0.0, "faults": []}
    return {
        "first": pairs[0].key,
        "last": pairs[-1].key,
        "seconds": round((pairs[-1].arrived_ns - pairs[0].arrived_ns) / 1e9, 2),
        "faults": [pair.key for pair in pairs if pair.fault],
    }
