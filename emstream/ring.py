"""Preallocated batches between the source's thread and the engine's.

A slot is one batch, input (B, H, W) of the camera's type and output (B, H, W) float32,
in memory from `allocate` (page-locked when there is a GPU)::

    FREE -> FILLING -> READY -> IN_FLIGHT -> FREE

    slot 0   | row 0 | row 1 | row 2 | row 3 |   READY, full
    slot 1   | row 0 | row 1 | .     | .     |   FILLING, row 1 being written
    slot 2   | .     | .     | .     | .     |   FREE

The one producer reserves a row, writes it, then commits or cancels it. The one
consumer claims the oldest batch when it is full or its first frame has waited
`max_wait_ns`; until then, and for as long as the engine is busy, the batch goes on
filling. A slot being written or read is never FREE.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

import numpy as np

from emstream.frame import FrameHeader, now_ns
from emstream.trust import KnownSpectra

_MAX_MARKS = 100
_SLOT_NBYTES = 96 * 1024**2
Allocator = Callable[[int], np.ndarray]


def allocate_pageable(nbytes: int) -> np.ndarray:
    """Ordinary memory (nbytes,) uint8, touched so that no page fault is left for the hot path."""
    memory = np.empty(nbytes, np.uint8)
    memory.fill(0)
    return memory


def rows_for(shape: tuple[int, int], dtype: np.dtype[Any], max_batch: int) -> int:
    """Frames in a slot: `max_batch`, or as many as 96 MiB of input and output hold."""
    return max(1, min(max_batch, _SLOT_NBYTES // (shape[0] * shape[1] * (dtype.itemsize + 4))))


class State(Enum):
    FREE = auto()
    FILLING = auto()
    READY = auto()
    IN_FLIGHT = auto()


@dataclass(frozen=True)
class Maker:
    """The engine that denoised a batch, for its headers."""

    identity: Mapping[str, Any]
    """{name, sha256, device}."""
    dose_range: tuple[float, float] | None
    """[electrons/pixel] it was trained for; None without a network."""
    spectra: KnownSpectra | None = None
    """Of its training images; None if not known."""


@dataclass
class Slot:
    """One batch. The engine reads `counts` and writes `expected`; `headers[i]` belongs to row i."""

    index: int
    state: State = State.FREE
    shape: tuple[int, int] = (0, 0)
    dtype: np.dtype[Any] = field(default_factory=lambda: np.dtype(np.uint8))
    headers: list[FrameHeader] = field(default_factory=list)
    received_ns: list[int] = field(default_factory=list)
    batched_ns: int = 0
    inferred_ns: int = 0
    result: np.ndarray = field(default_factory=lambda: np.empty((0, 0, 0), np.float32))
    """(B, H, W) float32, what the engine returned: `expected`, or `counts` when it had nothing to do."""
    maker: Maker | None = None
    """Of the result."""
    _input: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint8))
    _output: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint8))
    _rows: np.ndarray = field(default_factory=lambda: np.empty((0, 0, 0)))
    _expected: np.ndarray = field(default_factory=lambda: np.empty((0, 0, 0), np.float32))

    def __len__(self) -> int:
        """Frames committed; a slot without any is false."""
        return len(self.headers)

    @property
    def capacity(self) -> int:
        return len(self._rows)

    @property
    def counts(self) -> np.ndarray:
        """(B, H, W) of the camera's type, the frames committed."""
        return self._rows[: len(self.headers)]

    @property
    def expected(self) -> np.ndarray:
        """(B, H, W) float32, expected electrons."""
        return self._expected[: len(self.headers)]

    def prepare(
        self, shape: tuple[int, int], dtype: np.dtype[Any], max_batch: int, allocate: Allocator
    ) -> None:
        """Make room for frames of `shape` and `dtype`; memory grows when needed and never shrinks."""
        if (shape, dtype) == (self.shape, self.dtype):
            return
        rows = rows_for(shape, dtype, max_batch)
        pixels = rows * shape[0] * shape[1]
        if self._input.nbytes < pixels * dtype.itemsize:
            self._input = allocate(pixels * dtype.itemsize)
        if self._output.nbytes < pixels * 4:
            self._output = allocate(pixels * 4)
        self._rows = self._input[: pixels * dtype.itemsize].view(dtype).reshape(rows, *shape)
        self._expected = self._output[: pixels * 4].view(np.float32).reshape(rows, *shape)
        self.shape, self.dtype = shape, dtype


@dataclass(frozen=True)
class SeriesMark:
    """The start or end of a series, in its place among the frames; `message` goes out as it came."""

    message: dict[str, Any]


class Ring:
    """`slots` batches of up to `max_batch` frames. One producer thread, one consumer thread."""

    def __init__(
        self,
        slots: int,
        max_batch: int,
        max_wait_ns: int = 0,
        allocate: Allocator = allocate_pageable,
    ) -> None:
        if slots < 2:
            raise ValueError(f"a ring needs at least 2 slots, got {slots}")
        if max_batch < 1:
            raise ValueError(f"max_batch must be at least 1 frame, got {max_batch}")
        if max_wait_ns < 0:
            raise ValueError(f"max_wait must not be negative, got {max_wait_ns / 1e6} ms")
        self.max_batch = max_batch
        self.newest: tuple[tuple[int, int], np.dtype[Any]] | None = None
        """Size (H, W) and type of the frames that come; None before the first."""
        self._max_wait_ns = max_wait_ns
        self._max_waiting = slots + _MAX_MARKS
        self._allocate = allocate
        lock = threading.Lock()
        self._changed = threading.Condition(lock)  # for the consumer
        self._freed = threading.Condition(lock)  # for the producer
        self._free = deque(Slot(index) for index in range(slots))
        self._waiting: deque[Slot | SeriesMark] = deque()
        self._filling: Slot | None = None
        self._writing = False
        self._closed = False

    def prepare(self, shape: tuple[int, int], dtype: np.dtype[Any]) -> None:
        """Before the first frame: allocate every slot for frames of `shape` and `dtype`."""
        with self._changed:
            for slot in self._free:
                slot.prepare(shape, dtype, self.max_batch, self._allocate)

    # -- producer ---------------------------------------------------------------

    def reserve(self, shape: tuple[int, int], dtype: np.dtype[Any]) -> np.ndarray | None:
        """A row (H, W) to write the next frame into, or None when every slot is taken."""
        with self._changed:
            slot = self._filling
            if slot is not None and (slot.shape != shape or slot.dtype != dtype):
                self._close_filling()
                slot = None
            self._writing = slot is not None
            if slot is None:
                if not self._free:
                    return None
                slot = self._free.popleft()
        if not self._writing:
            self._begin(slot, shape, dtype)
        row: np.ndarray = slot._rows[len(slot)]
        return row

    def commit(self, header: FrameHeader, received_ns: int) -> None:
        """The reserved row is whole."""
        with self._changed:
            slot = self._filling
            assert slot is not None
            assert self._writing
            self._writing = False
            slot.headers.append(header)
            slot.received_ns.append(received_ns)
            if len(slot) == slot.capacity:
                self._close_filling()
            self._changed.notify_all()

    def cancel(self) -> None:
        """The reserved row stays unused."""
        with self._changed:
            self._writing = False
            if self._filling is not None and not len(self._filling):
                self._release(self._filling)
                self._filling = None
            self._changed.notify_all()

    def mark(self, mark: SeriesMark) -> None:
        """Put the start or end of a series behind all frames so far."""
        with self._changed:
            self._close_filling()
            self._waiting.append(mark)
            if len(self._waiting) > self._max_waiting:
                # A camera that only starts and ends series: forget the oldest mark.
                self._waiting.remove(next(item for item in self._waiting if isinstance(item, SeriesMark)))
            self._changed.notify_all()

    def evict(self) -> int:
        """Free the oldest batch that still waits; returns how many frames that loses."""
        with self._changed:
            for item in self._waiting:
                if isinstance(item, Slot):
                    self._waiting.remove(item)
                    lost = len(item)
                    self._release(item)
                    return lost
            return 0

    def wait_free(self, timeout_s: float) -> None:
        """Wait until there may be a free slot."""
        with self._changed:
            if not self._free:
                self._freed.wait(timeout_s)

    def close(self) -> None:
        """No more frames: what waits can still be claimed, then `claim` returns None at once."""
        with self._changed:
            self._close_filling()
            self._closed = True
            self._changed.notify_all()

    # -- consumer ---------------------------------------------------------------

    def claim(self, block: bool = True) -> Slot | SeriesMark | None:
        """The oldest batch that is due, or a mark; None when closed and empty, or when nothing is due.

        With `block` it waits for one or the other.
        """
        with self._changed:
            while True:
                wait_s: float | None = None
                # A row being written announces itself by its commit.
                if not self._waiting and self._filling and not self._writing:
                    wait_s = (self._filling.received_ns[0] + self._max_wait_ns - now_ns()) / 1e9
                    if wait_s <= 0:
                        self._close_filling()
                if self._waiting:
                    item = self._waiting.popleft()
                    if isinstance(item, Slot):
                        item.state = State.IN_FLIGHT
                        item.batched_ns = now_ns()
                    return item
                if self._closed or not block:
                    return None
                self._changed.wait(wait_s)

    def release(self, slot: Slot) -> None:
        """The batch is published: its slot may be filled again."""
        with self._changed:
            self._release(slot)
            self._freed.notify()

    @property
    def frames(self) -> int:
        """Frames that wait to be claimed."""
        with self._changed:
            waiting = sum(len(item) for item in self._waiting if isinstance(item, Slot))
            return waiting + (len(self._filling) if self._filling else 0)

    def _begin(self, slot: Slot, shape: tuple[int, int], dtype: np.dtype[Any]) -> None:
        """Fill this slot from now on. Its memory may take a while: the engine's threads go on meanwhile."""
        try:
            slot.prepare(shape, dtype, self.max_batch, self._allocate)
        except BaseException:
            with self._changed:
                self._release(slot)
            raise
        with self._changed:
            slot.state = State.FILLING
            self._filling, self._writing = slot, True
            self.newest = shape, dtype

    # -- both, lock held --------------------------------------------------------

    def _close_filling(self) -> None:
        if self._filling:
            self._filling.state = State.READY
            self._waiting.append(self._filling)
            self._filling = None

    def _release(self, slot: Slot) -> None:
        slot.headers.clear()
        slot.received_ns.clear()
        slot.state = State.FREE
        self._free.appendleft(slot)  # the one used last is still in the cache
