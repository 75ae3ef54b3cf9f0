"""Watches what is published and says how far it can be trusted; in a thread of its own.

The publisher's thread copies a frame and the next one now and then, ten times a second at
most; what they tell (`emstream.trust`) is computed behind its back. Of a large frame it is a
part, another one each time: sixteen million pixels ten times a second would take a processor
of their own.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from dataclasses import dataclass
from queue import Empty, Full, Queue
from typing import Any

import numpy as np

from emstream.frame import FrameHeader, now_ns
from emstream.ring import Maker, Slot
from emstream.trust import Trust

log = logging.getLogger(__name__)
_PAIR_EVERY_NS = 100_000_000
_SOON = 8  # frames: some between are lost when the engine cannot keep up
_SPECTRUM_EVERY_NS = 500_000_000
_LARGEST_PX = 1024
_About = tuple[Any, ...]


def _about(header: FrameHeader, maker: Maker) -> _About:
    """What an estimate holds for: one network on one kind of frame. Empty when no network stands behind it."""
    if maker.dose_range is None:
        return ()
    return maker.identity.get("sha256"), header.source, header.shape, header.pixel_size_m


@dataclass(frozen=True)
class _First:
    """A denoised frame (H, W), or a part of it, that waits for the raw one after it."""

    header: FrameHeader
    maker: Maker
    part: tuple[slice, slice]
    denoised: np.ndarray

    def precedes(self, header: FrameHeader) -> bool:
        """Whether `header` is of the same scene, soon enough that little has moved."""
        mine = self.header
        same = (mine.source, mine.series, mine.shape) == (header.source, header.series, header.shape)
        return same and 0 < header.frame - mine.frame <= _SOON


@dataclass(frozen=True)
class _Pair:
    first: _First
    after: np.ndarray


class Observer:
    """Sees each published batch; `report_on` tells what is known by now of the next one."""

    def __init__(self) -> None:
        self._first: _First | None = None
        self._next_ns = 0
        self._spectrum_ns = 0
        self._places = np.random.default_rng(0)
        self._newest: _About = ()
        self._weighed: _About = ()
        self._trust: Trust | None = None
        self._queue: Queue[_Pair | None] = Queue(maxsize=4)
        self._thread = threading.Thread(target=self._run, name="observer", daemon=True)
        self._known: tuple[_About, dict[str, Any] | None] = ((), None)

    @property
    def report(self) -> dict[str, Any] | None:
        """Of the newest batch, as `Trust.report` gives it.

        None before its engine's first pair, and for engines that no network stands behind.
        """
        about, report = self._known
        return report if about == self._newest else None

    def report_on(self, slot: Slot) -> dict[str, Any] | None:
        """`report`, with this batch as the newest: never of another engine or another kind of frame."""
        assert slot.maker is not None, "the batch was not denoised"
        self._newest = _about(slot.headers[0], slot.maker)
        return self.report

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Forget what is not computed yet."""
        if self._thread.ident is None:
            return
        while True:
            try:
                self._queue.put_nowait(None)
                break
            except Full:
                with contextlib.suppress(Empty):  # its thread was quicker
                    self._queue.get_nowait()
        self._thread.join()

    def see(self, slot: Slot) -> None:
        """A batch that was published; its slot may be filled again when this returns. One thread calls it."""
        maker = slot.maker
        if maker is None or maker.dose_range is None:
            return
        for row, header in enumerate(slot.headers):
            if self._first is not None:
                if self._first.precedes(header):
                    self._hand_over(_Pair(self._first, slot.counts[row][self._first.part].copy()))
                self._first = None
            elif now_ns() >= self._next_ns:
                self._next_ns = now_ns() + _PAIR_EVERY_NS
                part = self._part_of(header.shape)
                self._first = _First(header, maker, part, slot.result[row][part].copy())

    def _part_of(self, shape: tuple[int, int]) -> tuple[slice, slice]:
        """What is weighed of a frame: all of it, or as much as may be, somewhere."""
        starts = [int(self._places.integers(max(0, side - _LARGEST_PX) + 1)) for side in shape]
        rows, columns = (slice(start, start + _LARGEST_PX) for start in starts)
        return rows, columns

    def _hand_over(self, pair: _Pair) -> None:
        try:
            self._queue.put_nowait(pair)
        except Full:
            log.debug("a pair of frames was left out: the observer is behind")

    def _run(self) -> None:
        while (pair := self._queue.get()) is not None:
            try:
                self._weigh(pair)
            except Exception:
                log.exception("the estimate of the picture's quality failed and begins anew")
                self._weighed, self._known = (), ((), None)

    def _weigh(self, pair: _Pair) -> None:
        if not np.isfinite(pair.first.denoised).all():  # such a picture was not published
            return
        about = _about(pair.first.header, pair.first.maker)
        if about != self._weighed:
            self._weighed, self._trust = about, Trust(pair.first.maker.spectra)
        assert self._trust is not None
        self._trust.pair(pair.first.denoised, pair.after)
        if now_ns() >= self._spectrum_ns:
            self._spectrum_ns = now_ns() + _SPECTRUM_EVERY_NS
            self._trust.raw(pair.after)
        self._known = about, self._trust.report()
