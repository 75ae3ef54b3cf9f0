"""Watches what is published and says how far it can be trusted; in a thread of its own.

The publisher's thread copies a frame and the next one now and then, ten times a second at
most; what they tell (`emstream.trust`) is computed behind its back.
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


@dataclass(frozen=True)
class _First:
    """A denoised frame (H, W) that waits for the raw one after it."""

    header: FrameHeader
    maker: Maker
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
    """Sees each published batch; `report` tells what is known by now."""

    def __init__(self) -> None:
        self._first: _First | None = None
        self._next_ns = 0
        self._spectrum_ns = 0
        self._about: tuple[Any, ...] = ()
        self._trust: Trust | None = None
        self._queue: Queue[_Pair | None] = Queue(maxsize=4)
        self._thread = threading.Thread(target=self._run, name="observer", daemon=True)
        self._report: dict[str, Any] | None = None

    @property
    def report(self) -> dict[str, Any] | None:
        """As `Trust.report` gives it; None before the first pair, and for engines that no network stands behind."""
        return self._report

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
                    self._hand_over(_Pair(self._first, slot.counts[row].copy()))
                self._first = None
            elif now_ns() >= self._next_ns:
                self._next_ns = now_ns() + _PAIR_EVERY_NS
                self._first = _First(header, maker, slot.result[row].copy())

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
                self._about = ()

    def _weigh(self, pair: _Pair) -> None:
        header, maker = pair.first.header, pair.first.maker
        about = (maker.identity.get("sha256"), header.source, header.shape, header.pixel_size_m)
        if about != self._about:
            self._about, self._trust = about, Trust(maker.spectra)
        assert self._trust is not None
        self._trust.pair(pair.first.denoised, pair.after)
        if now_ns() >= self._spectrum_ns:
            self._spectrum_ns = now_ns() + _SPECTRUM_EVERY_NS
            self._trust.raw(pair.after)
        self._report = self._trust.report()
