"""The processes around a service under test, and how they talk.

::

    camera ──PUSH──▶ service or relay ──XPUB──▶ subscriber
       ▲                                            │
       └───── PUSH: how many frames have come ◀─────┘

The camera sends the start of a series again and again until the subscriber says that it
heard: from then on the whole line is connected and no frame can be lost to a slow joiner.
Frames are made beforehand and sent without a copy, so that the camera costs next to nothing.
"""

from __future__ import annotations

import multiprocessing
import struct
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, Self

import msgpack
import numpy as np
import psutil
import zmq

from emstream import wire
from emstream.frame import now_ns
from emstream.publish import DENOISED
from emstream.publish import QUEUE_FRAMES as OUTPUT_QUEUE_FRAMES
from emstream.serve import Settings, build, stop_on_signals
from emstream.sources.zmq import QUEUE_FRAMES as INPUT_QUEUE_FRAMES

SOURCE, SERIES = "bench", 0
PATTERNS = 16  # different frames; frame n is pattern n % PATTERNS
ANYWHERE = "tcp://127.0.0.1:0"
DOSE = 0.45  # electrons/pixel
_PATIENCE_MS = 30_000
_COUNT = struct.Struct("<Q")
_SPAWN = multiprocessing.get_context("spawn")


# -- in the bench's own process --------------------------------------------------


@dataclass(frozen=True)
class _Fault:
    text: str


class Child:
    """A process that says what it found over a pipe."""

    def __init__(self, work: Callable[..., None], *arguments: Any) -> None:
        self.name = work.__name__
        self._pipe, theirs = _SPAWN.Pipe()
        self._process: BaseProcess = _SPAWN.Process(target=_run, args=(work, theirs, *arguments), name=self.name)
        self._process.start()
        theirs.close()

    def says(self, wait_s: float) -> bool:
        """Wait up to `wait_s` for something to read with `answer`."""
        if self._pipe.poll(wait_s):
            return True
        if not self._process.is_alive() and not self._pipe.poll(0):
            raise RuntimeError(f"{self.name} ended with exit code {self._process.exitcode}")
        return False

    def answer(self, within_s: float = 60.0) -> Any:
        deadline = time.monotonic() + within_s
        while not self.says(min(1.0, max(0.0, deadline - time.monotonic()))):
            if time.monotonic() >= deadline:
                raise RuntimeError(f"{self.name} said nothing for {within_s:.0f} s")
        try:
            said = self._pipe.recv()
        except EOFError:
            raise RuntimeError(f"{self.name} ended without an answer") from None
        if isinstance(said, _Fault):
            raise RuntimeError(f"{self.name} failed:\n{said.text}")
        return said

    def tell(self, message: Any) -> None:
        self._pipe.send(message)

    def stop(self) -> None:
        """Ask it to finish, as a service manager would: SIGTERM."""
        self._process.terminate()

    @property
    def rss_bytes(self) -> int:
        return psutil.Process(self._process.pid).memory_info().rss

    @property
    def cpu_s(self) -> float:
        """Processor time used so far, user and system, all threads."""
        times = psutil.Process(self._process.pid).cpu_times()
        return times.user + times.system

    def close(self) -> None:
        self._process.join(timeout=5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._process.close()
        self._pipe.close()


class Children:
    """Processes that all end with the ``with`` block."""

    def __init__(self) -> None:
        self._children: list[Child] = []

    def start(self, work: Callable[..., None], *arguments: Any) -> Child:
        child = Child(work, *arguments)
        self._children.append(child)
        return child

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for child in self._children:
            child.stop()
        for child in self._children:
            child.close()


def _run(work: Callable[..., None], pipe: Connection, *arguments: Any) -> None:
    try:
        work(pipe, *arguments)
    except Exception:
        pipe.send(_Fault(traceback.format_exc()))
        raise


# -- the service -----------------------------------------------------------------


def service(pipe: Connection, settings: Settings) -> None:
    """``emstream serve`` until SIGTERM. Says its endpoint and its clock's offset, in the end its report."""
    made = build(settings)
    try:
        with stop_on_signals(made.pipeline.stop):
            pipe.send((made.publisher.endpoint, epoch_ns()))
            made.pipeline.run()
    finally:
        made.close()
    pipe.send(made.pipeline.report())


def epoch_ns() -> int:
    """What this process's wall clock, `now_ns`, is ahead of the monotonic clock that all processes share."""
    readings = []
    for _ in range(100):
        before = time.monotonic_ns()
        wall = now_ns()
        after = time.monotonic_ns()
        readings.append((after - before, wall - (before + after) // 2))
    return min(readings)[1]


# -- camera and subscriber ---------------------------------------------------------


def patterns(size: int, kind: str) -> np.ndarray:
    """Frames (PATTERNS, size, size) of Poisson counts; pixel (0, 0) says which pattern it is."""
    counts = np.random.default_rng(0).poisson(DOSE, (PATTERNS, size, size)).astype(kind)
    counts[:, 0, 0] = np.arange(PATTERNS)
    return counts


class Camera:
    """Sends frames made beforehand."""

    def __init__(self, size: int, kind: str) -> None:
        context = zmq.Context.instance()
        self._header = {
            "htype": wire.FRAME,
            "source": SOURCE,
            "series": SERIES,
            "shape": (size, size),
            "type": kind,
            "endianness": "little",
            "encoding": "raw",
        }
        self._pixels = [zmq.Frame(pattern.tobytes()) for pattern in patterns(size, kind)]
        self._output = context.socket(zmq.PUSH)
        self._output.sndhwm = INPUT_QUEUE_FRAMES
        self._output.sndtimeo = _PATIENCE_MS
        self._output.linger = _PATIENCE_MS
        self._output.bind(ANYWHERE)
        self._counts = context.socket(zmq.PULL)
        self._counts.bind(ANYWHERE)
        self.endpoint: str = self._output.last_endpoint.decode().rstrip("\0")
        self.counts_endpoint: str = self._counts.last_endpoint.decode().rstrip("\0")
        self.arrived = 0

    def greet(self) -> None:
        """Return as soon as the whole line hears."""
        deadline = time.monotonic() + _PATIENCE_MS / 1000
        while time.monotonic() < deadline:
            self._mark(wire.START)
            if self._counts.poll(50):
                return
        raise RuntimeError("the subscriber never heard of the series")

    def send(self, number: int, scheduled_ns: int = 0, wait: bool = True) -> bool:
        """Send frame `number`; `scheduled_ns` is on the monotonic clock. False when the queue is full."""
        header = {
            **self._header,
            "frame": number,
            "timestamp_ns": now_ns() if not scheduled_ns else scheduled_ns + _EPOCH_NS,
            "scheduled_ns": scheduled_ns,
        }
        try:
            self._output.send(DENOISED, zmq.SNDMORE if wait else zmq.SNDMORE | zmq.DONTWAIT)
        except zmq.Again:
            if wait:
                raise RuntimeError(f"nobody took frame {number} within {_PATIENCE_MS / 1000:.0f} s") from None
            return False
        self._output.send(msgpack.packb(header), zmq.SNDMORE)
        self._output.send(self._pixels[number % PATTERNS], copy=False)
        return True

    def wait_arrived(self, frames: int) -> None:
        """Wait until the subscriber has got `frames` frames."""
        while self.arrived < frames:
            if not self._counts.poll(_PATIENCE_MS):
                raise RuntimeError(f"no frame arrived for {_PATIENCE_MS / 1000:.0f} s, {self.arrived} had before")
            self.hear()

    def hear(self) -> None:
        """Take the subscriber's counts that have come."""
        while self._counts.poll(0):
            self.arrived = max(self.arrived, _COUNT.unpack(self._counts.recv())[0])

    def end(self) -> None:
        self._mark(wire.END)

    def close(self) -> None:
        self._output.close()
        self._counts.close(linger=0)

    def _mark(self, htype: str) -> None:
        self._output.send_multipart([DENOISED, wire.pack({"htype": htype, "source": SOURCE, "series": SERIES})])


_EPOCH_NS = epoch_ns()


class Subscriber:
    """Receives what is published as ``denoised`` and tells the camera how many frames have come."""

    def __init__(self, endpoint: str, counts_endpoint: str, tell_every: int) -> None:
        context = zmq.Context.instance()
        self._input = context.socket(zmq.SUB)
        self._input.rcvhwm = OUTPUT_QUEUE_FRAMES
        self._input.rcvtimeo = _PATIENCE_MS
        self._input.connect(endpoint)
        self._input.subscribe(DENOISED)
        self._counts = context.socket(zmq.PUSH)
        self._counts.connect(counts_endpoint)
        self._counts.linger = 0
        self._tell_every = tell_every
        self.arrived = 0

    def frames(self) -> Iterator[tuple[int, dict[str, Any], memoryview]]:
        """(time of receipt [ns, monotonic], header, pixels) of each frame until the series ends."""
        while True:
            try:
                parts = self._input.recv_multipart(copy=False)
            except zmq.Again:
                raise RuntimeError(
                    f"nothing came for {_PATIENCE_MS / 1000:.0f} s after {self.arrived} frames"
                ) from None
            received_ns = time.monotonic_ns()
            header = msgpack.unpackb(parts[1].buffer)
            if header["htype"] == wire.START:
                self._counts.send(_COUNT.pack(self.arrived))
            elif header["htype"] == wire.END:
                if self.arrived:
                    return
            else:
                self.arrived += 1
                if self.arrived % self._tell_every == 0:
                    self._counts.send(_COUNT.pack(self.arrived))
                yield received_ns, header, parts[2].buffer

    def close(self) -> None:
        self._input.close(linger=0)
        self._counts.close()
