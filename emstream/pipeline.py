"""Receive, batch, infer, publish, drain: the loop over injected parts.

::

    source ──▶ intake ──▶ ring ──▶ engine: submit ──▶ engine: collect ──▶ publisher
    (thread)              slots    (thread)           (thread)

Batches go into the engine as soon as it has room, whether or not one before them is
being waited for: that keeps a GPU busy. Each of the three threads spends its time in
ZeroMQ, NumPy or the engine, all of which release the interpreter's lock.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable
from enum import Enum, auto
from queue import Empty, SimpleQueue
from typing import Any

from emstream.errors import CudaError, EmstreamError, Stalled
from emstream.frame import now_ns
from emstream.inference.supervised import SupervisedEngine, Ticket
from emstream.intake import Intake, Source
from emstream.ledger import Ledger
from emstream.observe import Observer
from emstream.publish import Publisher
from emstream.ring import Ring, SeriesMark, Slot
from emstream.seldom import Seldom
from emstream.watchdog import Watchdog

log = logging.getLogger(__name__)
STATS_EVERY_S = 1.0
_STATS_LATE_S = 0.3  # then not the thread that publishes says how things stand: it waits for the engine
_FIRST_BATCH_S = 60.0
_GPU_IS_LOST = 20  # batches in a row that CUDA refused: what such an error spoils only a new process mends


class _News(Enum):
    """What is to be said at once on the stats topic."""

    recording = auto()


class Pipeline:
    """One source through one engine to one publisher.

    It ends when the source does, after `frames` published frames, or on `stop`; either
    way every frame received by then is settled before `run` returns: after a stop, what is
    not done within `drain_s` is dropped.
    """

    def __init__(
        self,
        *,
        source: Source,
        intake: Intake,
        ring: Ring,
        engine: SupervisedEngine,
        publisher: Publisher,
        ledger: Ledger,
        frames: int | None = None,
        drain_s: float = 10.0,
        stall_limit_s: float = 120.0,
        watchdog: Watchdog | None = None,
    ) -> None:
        self._source = source
        self._intake = intake
        self._ring = ring
        self._engine = engine
        self._publisher = publisher
        self._ledger = ledger
        self._frames = frames
        self._drain_s = drain_s
        self._stall_limit_s = stall_limit_s
        self._watchdog = watchdog or Watchdog()
        self._observer = Observer()
        self._engine_s: dict[tuple[int, int], float] = {}
        self._drain_until_ns: int | None = None
        self._submitted: SimpleQueue[tuple[Ticket, Slot] | SeriesMark | _News | None] = SimpleQueue()
        self._recording: dict[str, Any] | None = None
        self._publishing = threading.Lock()
        self._next_stats_ns = 0
        self._in_engine = 0
        self._room = threading.Condition()
        self._stopping = threading.Event()
        self._aborting = threading.Event()
        self._fault: BaseException | None = None
        self._failures = Seldom()
        self._refused = 0  # batches in a row, by CUDA
        self._first_published_ns = self._last_published_ns = 0

    def stop(self) -> None:
        """Take no more frames, finish those received. Called a second time: drop those, too."""
        if self._stopping.is_set():
            self._abort()
        self._stopping.set()

    @property
    def is_stopping(self) -> bool:
        """Whether it takes no more frames, or never will."""
        return self._stopping.is_set()

    def note_recording(self, status: dict[str, Any]) -> None:
        """Say from now on, and at once, how the recorder beside this service fares. Any thread may call it."""
        self._recording = status
        self._submitted.put(_News.recording)

    def run(self) -> None:
        """Run to the end. Raises EmstreamError when a thread died before its time."""
        receive, submit, publish = (
            threading.Thread(target=self._guard, args=(work,), name=work.__name__.strip("_"), daemon=True)
            for work in (self._receive, self._submit, self._publish)
        )
        self._observer.start()
        for thread in (publish, submit, receive):
            thread.start()
        # Short waits, so that the main thread gets to run signal handlers.
        for thread in (receive, submit, publish):
            while thread.is_alive():
                thread.join(timeout=0.2)
                self._watch_the_drain()
                self._watch_the_stages()
                self._say_if_late()
        self._observer.close()
        if isinstance(self._fault, EmstreamError):
            raise self._fault
        if self._fault is not None:
            cause = f"{type(self._fault).__name__}: {self._fault}"
            raise EmstreamError(f"the pipeline broke down, which it never should: {cause}") from self._fault

    def _watch_the_drain(self) -> None:
        """Once stopped, say what is left to do, and give it up after `drain_s`."""
        if not self._stopping.is_set() or self._aborting.is_set():
            return
        if self._drain_until_ns is None:
            self._drain_until_ns = now_ns() + int(self._drain_s * 1e9)
            if left := self._ledger.in_flight:
                log.info("finishing %d frames; stop again to drop them", left)
        elif now_ns() > self._drain_until_ns:
            log.warning("dropping what is left after %g s: %d frames", self._drain_s, self._ledger.in_flight)
            self._abort()

    def _watch_the_stages(self) -> None:
        """Raise `Stalled` once a stage has been stalled for too long: only a new process helps."""
        for stage, seconds in self._watchdog.look().items():
            if seconds > self._stall_limit_s:
                self._abort()
                raise Stalled(
                    f"the {stage} has been stalled for {seconds:.0f} s, {self._ledger.in_flight} frames are in flight; "
                    "start the service again (a service manager does by itself)"
                )

    @property
    def stalled(self) -> dict[str, float]:
        """Stages that do not come to an end, and for how long they have been at work [s]."""
        return self._watchdog.stalled

    @property
    def frames_per_s(self) -> float | None:
        """Mean rate between the first and the last published frame."""
        span_ns = self._last_published_ns - self._first_published_ns
        published = self._ledger.published
        return (published - 1) / span_ns * 1e9 if published > 1 and span_ns > 0 else None

    # -- threads ----------------------------------------------------------------

    def _receive(self) -> None:
        try:
            self._source.run(self._intake, self._stopping)
        finally:
            self._ring.close()

    def _submit(self) -> None:
        depth = self._engine.current.depth
        try:
            while True:
                # A batch goes on filling until the engine has room for it.
                self._wait_for_room(depth)
                item = self._ring.claim()
                if item is None:
                    return
                if isinstance(item, SeriesMark):
                    self._submitted.put(item)
                    continue
                depth = self._engine.current.depth_for(item.shape)
                self._wait_for_room(depth)
                if self._aborting.is_set():
                    self._settle(item, self._ledger.drop)
                    continue
                self._watchdog.begin("engine's input", self._engine_limit_s(item))
                ticket = self._engine.submit(item.counts, item.expected)
                self._watchdog.end("engine's input")
                with self._room:
                    self._in_engine += 1
                self._submitted.put((ticket, item))
        finally:
            self._submitted.put(None)

    def _wait_for_room(self, depth: int) -> None:
        with self._room:
            self._room.wait_for(lambda: self._in_engine < depth or self._aborting.is_set())

    def _publish(self) -> None:
        while True:
            with contextlib.suppress(Empty):
                submitted = self._submitted.get(timeout=STATS_EVERY_S)
                if submitted is None:
                    with self._publishing:
                        self._say()
                    return
                if isinstance(submitted, _News):
                    self._next_stats_ns = 0
                elif isinstance(submitted, SeriesMark):
                    with self._publishing:
                        self._publisher.mark(submitted)
                elif self._collect(*submitted):
                    with self._publishing:
                        self._publish_slot(submitted[1])
            if now_ns() >= self._next_stats_ns:
                with self._publishing:
                    self._say()

    def _say(self) -> None:
        self._next_stats_ns = now_ns() + int(STATS_EVERY_S * 1e9)
        self._publisher.stats(self.report())

    def _say_if_late(self) -> None:
        """Statistics come while the engine hangs, too, and name it."""
        late = now_ns() > self._next_stats_ns + int(_STATS_LATE_S * 1e9)
        if late and self._publishing.acquire(blocking=False):
            try:
                self._say()
            finally:
                self._publishing.release()

    def _collect(self, ticket: Ticket, slot: Slot) -> bool:
        """Wait for a batch; False when the engine failed on it, which costs the batch."""
        begin_ns = now_ns()
        self._watchdog.begin("engine", self._engine_limit_s(slot))
        try:
            slot.result = self._engine.collect(ticket)
        except Exception as error:
            self._say_failed(slot, error)
            self._settle(slot, self._ledger.fail)
            self._note_refusal(error)
            return False
        finally:
            self._watchdog.end("engine")
            with self._room:
                self._in_engine -= 1
                self._room.notify()
        self._refused = 0
        self._engine_s[slot.shape] = (now_ns() - begin_ns) / 1e9
        slot.maker, slot.inferred_ns = self._engine.maker_of(ticket), now_ns()
        return True

    def _engine_limit_s(self, slot: Slot) -> float:
        """How long a batch may take: the first of a frame size, which may have to be compiled, very long."""
        before_s = self._engine_s.get(slot.shape)
        return _FIRST_BATCH_S if before_s is None else max(1.0, 5 * before_s)

    def _publish_slot(self, slot: Slot) -> None:
        left = None if self._frames is None else self._frames - self._ledger.published
        self._watchdog.begin("publisher")
        self._publisher.trust = self._observer.report_on(slot)
        sent = self._publisher.publish(slot, left)
        self._watchdog.end("publisher")
        self._observer.see(slot)
        if sent < len(slot):
            self._ledger.drop(len(slot) - sent)
        self._last_published_ns = now_ns()
        self._first_published_ns = self._first_published_ns or self._last_published_ns
        self._ring.release(slot)
        if self._frames is not None and self._ledger.published >= self._frames:
            self._abort()

    # -- faults -----------------------------------------------------------------

    def _note_refusal(self, error: Exception) -> None:
        self._refused = self._refused + 1 if isinstance(error, CudaError) else 0
        if self._refused >= _GPU_IS_LOST and self._fault is None:
            self._fault = CudaError(f"the GPU is lost, {self._refused} batches failed in a row: {error}")
            self._abort()

    def _say_failed(self, slot: Slot, error: Exception) -> None:
        """A new kind of failure whole, one that goes on as a line now and then."""
        said = self._failures.note(f"{type(error).__name__}: {error}", len(slot))
        if said is None:
            return
        frames, first = said
        log.error(
            "engine failed on %d frames up to frame %d: %s",
            frames,
            slot.headers[-1].frame,
            error,
            exc_info=error if first and not isinstance(error, EmstreamError) else None,
        )

    def _settle(self, slot: Slot, count: Callable[[int], None]) -> None:
        count(len(slot))
        self._ring.release(slot)

    def _abort(self) -> None:
        """What still waits in the ring is dropped, not denoised."""
        self._stopping.set()
        self._aborting.set()
        self._intake.abort()
        with self._room:
            self._room.notify()

    def _guard(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self._fault = self._fault or error
            self._abort()

    def report(self) -> dict[str, Any]:
        """Ledger, latencies [ms] and rate, as ``--json`` prints them; with a recorder, how it fares."""
        rate = self.frames_per_s
        recording = {} if self._recording is None else {"recording": self._recording}
        outputs = self._publisher.outputs
        return {
            "ledger": self._ledger.snapshot(),
            "latency_ms": self._ledger.latency_ms(),
            "frames_per_s": None if rate is None else round(rate, 3),
            "rejected_because": self._ledger.reasons(),
            "engine": self._engine.identity,
            "stalled": self._watchdog.stalled,
            "trust": self._observer.report,
            **recording,
            **({"outputs": outputs} if outputs else {}),
        }
