"""Where a source hands over its frames.

A source calls, for each message it gets::

    row = intake.offer(header)     a place for the pixels, or None: read and forget them
    ...write row...
    intake.accept()                or intake.refuse(reason)

and `malformed(reason)` for a message without a usable header, `skip(header)` for a frame that
the camera says it does not send, `mark(message)` for the start or end of a series. The overrun
policy, the corrections (`emstream.corrections`) and the checks that a frame is no larger than
allowed, comes no sooner and its pixels are numbers live here, so that every source has them alike.
"""

from __future__ import annotations

import logging
import threading
from typing import Any, Protocol

import numpy as np

from emstream.corrections import Corrections
from emstream.errors import EngineError, MalformedFrame
from emstream.frame import PIXEL_TYPES, FrameHeader, now_ns
from emstream.ledger import Ledger
from emstream.overrun import Overrun as Overrun
from emstream.ring import Ring, SeriesMark
from emstream.watchdog import Watchdog
from emstream.wire import DEFAULT_MAX_FRAME_BYTES, DEFAULT_MAX_HEADER_BYTES

log = logging.getLogger(__name__)


class Source(Protocol):
    """What receives from a camera. Runs in a thread of its own."""

    lossless: bool
    """Whether it can be made to wait, and so loses nothing when it is."""

    def run(self, intake: Intake, stop: threading.Event) -> None:
        """Hand frames to `intake` until the camera is done or `stop` is set; then return within a second."""


def _all_finite(pixels: np.ndarray) -> bool:
    """Whether no pixel is NaN or infinite in float32. The sums of the columns tell, nearly always."""
    with np.errstate(over="ignore", invalid="ignore"):
        if pixels.dtype == np.float64:
            return bool(np.isfinite(pixels.astype(np.float32)).all())
        if np.isfinite(np.add.reduce(pixels, axis=0)).all():
            return True
    return bool(np.isfinite(pixels).all())


class Intake:
    """The producer's side of the pipeline; one source thread calls it."""

    def __init__(
        self,
        ring: Ring,
        ledger: Ledger,
        overrun: Overrun = Overrun.drop_oldest,
        corrections: Corrections | None = None,
        max_frame_bytes: int = DEFAULT_MAX_FRAME_BYTES,
        watchdog: Watchdog | None = None,
        max_header_bytes: int = DEFAULT_MAX_HEADER_BYTES,
        max_rate: float | None = None,
    ) -> None:
        """`max_rate` [frames/s]: frames beyond are rejected, once a second's worth of them has come at one time."""
        if max_frame_bytes < 1:
            raise ValueError(f"the largest frame must be positive, got {max_frame_bytes} bytes")
        self.max_frame_bytes = max_frame_bytes
        self.max_header_bytes = max_header_bytes
        """What a source takes as the header of a message; sources check it themselves."""
        self._max_rate = max_rate
        self._step_ns = int(1e9 / max_rate) if max_rate else 0
        self._ahead_ns = max(0, 1_000_000_000 - self._step_ns)
        self._next_ns = 0  # when the next frame would come, did they come evenly
        self._ring = ring
        self._ledger = ledger
        self._overrun = overrun
        self._corrections = corrections or Corrections()
        self._watchdog = watchdog or Watchdog()
        self._aborted = threading.Event()
        self._header: FrameHeader | None = None
        self._received_ns = 0
        self._row = self._raw = np.empty((0, 0))

    def abort(self) -> None:
        """Stop waiting for a free slot, whatever the policy."""
        self._aborted.set()

    def offer(self, header: FrameHeader) -> np.ndarray | None:
        """A frame is here: a row (H, W) of its type for its pixels, or None when it is dropped."""
        assert self._header is None, "the frame before was neither accepted nor refused"
        self._received_ns = now_ns()
        self._ledger.receive()
        self._ledger.number(header.source, header.series, header.frame)
        if self._step_ns and not self._is_due():
            self._count_rejected(f"more than {self._max_rate:g} frames/s, the limit of --max-rate")
            return None
        try:
            row = self._reserve(header)
        except MalformedFrame as error:
            self._count_rejected(str(error))
            return None
        except (MemoryError, EngineError) as error:
            log.debug("%r", error)
            self._count_rejected(
                f"no memory for a frame of {header.shape[0]}x{header.shape[1]} {header.type}"
            )
            return None
        if row is None:
            self._ledger.drop()
            return None
        self._watchdog.begin("source")
        self._header, self._row = header, row
        if not self._corrections.moves:
            return row
        if (self._raw.shape, self._raw.dtype) != (header.shape, header.dtype):
            self._raw = np.empty(header.shape, header.dtype)
        return self._raw

    def accept(self) -> None:
        """The row offered last is written."""
        header, row = self._take_header(), self._row
        written = self._raw if self._corrections.moves else row
        if header.endianness != "little":
            written.byteswap(inplace=True)
            header.endianness = "little"
        self._corrections.apply(written, row)
        # Afterwards: bad pixels, which the mask takes away, may well be NaN.
        if written.dtype.kind == "f" and not _all_finite(row):
            self._ring.cancel()
            self._count_rejected("pixels are not numbers (NaN or infinite)")
            return
        header = self._corrections.header(header)
        self._ring.commit(header, self._received_ns)

    def refuse(self, reason: str) -> None:
        """The frame offered last turned out to be malformed."""
        self._take_header()
        self._ring.cancel()
        self._count_rejected(reason)

    def malformed(self, reason: str, header: FrameHeader | None = None) -> None:
        """A message came that never got as far as an offer.

        `header` is that of a frame whose pixels are what is wrong: such a frame is rejected, and not missing, too.
        """
        self._ledger.receive()
        if header is not None:
            self._ledger.number(header.source, header.series, header.frame)
        self._count_rejected(reason)

    def skip(self, header: FrameHeader) -> None:
        """The camera numbered this frame but does not send it: it was not received, it is missing."""
        self._ledger.skip(header.source, header.series, header.frame)

    def mark(self, message: dict[str, Any]) -> None:
        """A series starts or ends, after all frames offered so far."""
        self._ring.mark(SeriesMark(message))

    def begin(self, source: str, series: int | str, first: int) -> None:
        """The camera says that a series begins with frame `first`: those before the one that comes are missing."""
        self._ledger.begin(source, series, first)

    def _is_due(self) -> bool:
        """Whether the frame received now is within the rate allowed."""
        if self._next_ns - self._received_ns > self._ahead_ns:
            return False
        self._next_ns = max(self._next_ns, self._received_ns) + self._step_ns
        return True

    def _reserve(self, header: FrameHeader) -> np.ndarray | None:
        self._check(header)
        shape, dtype = self._corrections.shape_of(header.shape), self._corrections.type_of(header.dtype)
        row = self._ring.reserve(shape, dtype)
        if row is None and self._overrun is Overrun.drop_oldest and (lost := self._ring.evict()):
            self._ledger.drop(lost)
            row = self._ring.reserve(shape, dtype)
        while row is None and self._overrun is Overrun.block and not self._aborted.is_set():
            self._ring.wait_free(timeout_s=0.1)
            row = self._ring.reserve(shape, dtype)
        return row

    def _check(self, header: FrameHeader) -> None:
        """Refuse a size or type that no frame has, whatever its source has looked at."""
        if header.type not in PIXEL_TYPES:
            raise MalformedFrame(f"type must be one of {', '.join(PIXEL_TYPES)}, got {header.type[:60]!r}")
        height, width = header.shape
        if height < 1 or width < 1:
            raise MalformedFrame(f"shape must be [rows, columns] of one frame, got {height}x{width}")
        if header.nbytes > self.max_frame_bytes:
            raise MalformedFrame(
                f"frame of {height}x{width} {header.type} is {header.nbytes} bytes, "
                f"more than the limit of {self.max_frame_bytes}"
            )

    def _take_header(self) -> FrameHeader:
        self._watchdog.end("source")
        header, self._header = self._header, None
        assert header is not None, "no frame was offered"
        return header

    def _count_rejected(self, reason: str) -> None:
        level = logging.WARNING if self._ledger.reject(reason) else logging.DEBUG
        log.log(level, "frame rejected: %s", reason)
