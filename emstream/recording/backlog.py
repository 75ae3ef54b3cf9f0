"""What lies between receiving and writing: bounded memory, and raw wins over denoised.

::

    receiver ──put──▶ [raw and marks] ──take, in the order of arrival──▶ writer
                      [denoised     ]

The same memory is the look-back: until `begin`, nothing is taken, and what is older than
the look-back is forgotten.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass

from emstream.frame import Frame

_DENOISED_SHARE = 0.75  # of the memory; the rest is for raw frames alone
_LOOK_BACK_SHARE = 0.5  # so that what comes while it is written finds room


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """One message for the recording: a frame, or the mark of a series."""

    topic: str
    """raw or denoised"""
    header: bytes
    """msgpack, as it came."""
    frame: Frame | None
    """None is a mark."""
    arrived_ns: int

    @property
    def nbytes(self) -> int:
        return len(self.header) + (self.frame.data.nbytes if self.frame else 0)


class Backlog:
    """One thread puts, another one takes."""

    def __init__(self, limit_bytes: int, look_back_s: float = 0.0) -> None:
        """`look_back_s` is what is kept at least until `begin`, memory permitting."""
        if limit_bytes < 1:
            raise ValueError(f"the buffer must be positive, got {limit_bytes} bytes")
        self._limit_bytes = limit_bytes
        self._look_back_ns: int | None = int(look_back_s * 1e9)
        self._queues: dict[str, deque[tuple[int, Entry]]] = {"raw": deque(), "denoised": deque()}
        self._order = 0
        self._changed = threading.Condition()
        self._closed = False
        self.nbytes = 0
        self.lost = {"raw": 0, "denoised": 0}
        """Frames that found no room, because the disk is slower than they come."""

    def begin(self) -> None:
        """From now on entries are taken, and none is forgotten."""
        with self._changed:
            self._look_back_ns = None
            self._changed.notify()

    def put(self, entry: Entry) -> None:
        with self._changed:
            if self._look_back_ns is None:
                if not self._make_room(entry):
                    self.lost[entry.topic] += entry.frame is not None
                    return
            else:
                self._forget(entry)
            self._order += 1
            self._queues[entry.topic].append((self._order, entry))
            self.nbytes += entry.nbytes
            self._changed.notify()

    def take(self, timeout_s: float) -> Entry | None:
        """The oldest entry; None when there is none for `timeout_s`, or ever again."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or (self._open and self._oldest()), timeout_s)
            topic = self._oldest() if self._open else None
            if topic is None:
                return None
            entry = self._queues[topic].popleft()[1]
            self.nbytes -= entry.nbytes
            return entry

    def close(self) -> None:
        """Nothing more will be put."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def give_up(self) -> None:
        """Nothing more will be taken: what waits, and what may yet come, is lost; a look-back is forgotten."""
        with self._changed:
            self._closed = True
            for topic, queue in self._queues.items():
                if self._open:
                    self.lost[topic] += sum(entry.frame is not None for _, entry in queue)
                queue.clear()
            self._limit_bytes = self.nbytes = 0
            self._look_back_ns = None
            self._changed.notify()

    @property
    def is_done(self) -> bool:
        """Whether it was closed and everything taken."""
        with self._changed:
            return self._closed and (not self._open or self._oldest() is None)

    @property
    def since_ns(self) -> int | None:
        """When the oldest entry arrived; None without any."""
        with self._changed:
            topic = self._oldest()
            return self._queues[topic][0][1].arrived_ns if topic else None

    @property
    def span_s(self) -> float:
        """From the oldest entry to the newest [s]."""
        with self._changed:
            ends = [
                (queue[0][1].arrived_ns, queue[-1][1].arrived_ns) for queue in self._queues.values() if queue
            ]
            return (max(end for _, end in ends) - min(start for start, _ in ends)) / 1e9 if ends else 0.0

    @property
    def _open(self) -> bool:
        return self._look_back_ns is None

    def _oldest(self) -> str | None:
        topics = [topic for topic, queue in self._queues.items() if queue]
        return min(topics, key=lambda topic: self._queues[topic][0][0], default=None)

    def _make_room(self, entry: Entry) -> bool:
        if entry.topic == "denoised":
            return self.nbytes + entry.nbytes <= _DENOISED_SHARE * self._limit_bytes
        while self.nbytes + entry.nbytes > self._limit_bytes and self._queues["denoised"]:
            self.nbytes -= self._queues["denoised"].popleft()[1].nbytes
            self.lost["denoised"] += 1
        return self.nbytes + entry.nbytes <= self._limit_bytes

    def _forget(self, entry: Entry) -> None:
        """Drop what the look-back need not hold once `entry` is there."""
        assert self._look_back_ns is not None
        until_ns = entry.arrived_ns - self._look_back_ns
        limit_bytes = _LOOK_BACK_SHARE * self._limit_bytes - entry.nbytes
        while topic := self._oldest():
            oldest = self._queues[topic][0][1]
            if oldest.arrived_ns >= until_ns and self.nbytes <= limit_bytes:
                return
            self._queues[topic].popleft()
            self.nbytes -= oldest.nbytes
