"""The processes around a service under test, and how they talk.

::

    camera ──PUSH──▶ service or relay ──XPUB──▶ subscriber
       ▲                                            │
       └───────── PUSH: frame n has come ◀──────────┘

The camera sends the start of a series again and again until the subscriber says that it
heard: from then on the whole line is connected and no frame can be lost to a slow joiner.
Frames are made beforehand and sent without a copy, so that the camera costs next to nothing.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import struct
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
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
from emstream.endpoint import connect, last_endpoint
from emstream.frame import now_ns
from emstream.keys import Peer
from emstream.publish import DENOISED
from emstream.serve import Settings, build
from emstream.signals import stop_on_signals
from emstream.sources.zmq import QUEUE_FRAMES as INPUT_QUEUE_FRAMES

SOURCE, SERIES = "bench", 0
PATTERNS = 16  # different frames; frame n is pattern n % PATTERNS
ANYWHERE = "tcp://127.0.0.1:0"
DOSE = 0.45  # electrons/pixel
_PATIENCE_MS = 30_000
_READY_S = 600  # for a service that compiles its network first
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
        self._process: BaseProcess = _SPAWN.Process(
            target=_run, args=(work, theirs, *arguments), name=self.name
        )
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
            self._process.join(timeout=5)
            code = self._process.exitcode
            raise RuntimeError(f"{self.name} ended without an answer, exit code {code}") from None
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
        return int(psutil.Process(self._process.pid).memory_info().rss)

    @property
    def cpu_s(self) -> float:
        """Processor time used so far, user and system, all threads."""
        times = psutil.Process(self._process.pid).cpu_times()
        return float(times.user + times.system)

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
    threading.Thread(target=_die_with_parent, daemon=True).start()
    try:
        work(pipe, *arguments)
    except Exception:
        pipe.send(_Fault(traceback.format_exc()))
        raise


def _die_with_parent() -> None:
    """A bench that was killed leaves no camera or service behind."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


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
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._epoch_ns = epoch_ns()
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
        self._receipts = context.socket(zmq.PULL)
        self._receipts.bind(ANYWHERE)
        self.endpoint = last_endpoint(self._output)
        self.receipts_endpoint = last_endpoint(self._receipts)
        self._arrived = 0

    def greet(self) -> None:
        """Return as soon as the whole line hears."""
        deadline = time.monotonic() + _READY_S
        while time.monotonic() < deadline:
            with contextlib.suppress(zmq.Again):  # nobody is connected yet
                self._mark(wire.START)
            if self._receipts.poll(50):
                return
        raise RuntimeError("the subscriber never heard of the series")

    def send(self, number: int, *, scheduled_ns: int | None = None, receipt: bool = False) -> None:
        """Send frame `number`, due at `scheduled_ns` [monotonic clock], now by default; ask for a `receipt`."""
        scheduled_ns = time.monotonic_ns() if scheduled_ns is None else scheduled_ns
        header = {
            **self._header,
            "frame": number,
            "timestamp_ns": scheduled_ns + self._epoch_ns,
            "scheduled_ns": scheduled_ns,
            "receipt": receipt,
        }
        try:
            self._output.send(DENOISED, zmq.SNDMORE)
        except zmq.Again:
            raise RuntimeError(f"nobody took frame {number} within {_PATIENCE_MS / 1000:.0f} s") from None
        self._output.send(msgpack.packb(header), zmq.SNDMORE)
        self._output.send(self._pixels[number % PATTERNS], copy=False)

    def send_parts(self, parts: Sequence[bytes]) -> None:
        """Send what may be no frame at all."""
        self._output.send_multipart(parts)

    def wait_arrived(self, number: int, patience_s: float = _PATIENCE_MS / 1000) -> bool:
        """Wait for the receipt of frame `number` or a later one; False when none comes."""
        while self._arrived <= number:
            if not self._receipts.poll(round(1000 * patience_s)):
                return False
            self._arrived = max(self._arrived, _COUNT.unpack(self._receipts.recv())[0])
        return True

    def warm_up(self, frames: int) -> None:
        """Send the first `frames`, each when the one before has arrived."""
        for number in range(frames):
            self.send(number, receipt=True)
            if not self.wait_arrived(number):
                raise RuntimeError(f"warm-up frame {number} never arrived")

    def play(self, first: int, frames: int, rate: float, start_ns: int) -> list[float]:
        """Send `frames` from number `first` on, `rate` [frames/s] from `start_ns` [monotonic clock] on.

        Returns how late each was sent [ms].
        """
        late_ms = []
        for number in range(frames):
            due_ns = start_ns + round(number / rate * 1e9)
            while (wait_ns := due_ns - time.monotonic_ns()) > 0:
                time.sleep(wait_ns / 1e9)
            late_ms.append(-wait_ns / 1e6)
            self.send(first + number, scheduled_ns=due_ns)
        return late_ms

    def end(self) -> None:
        self._mark(wire.END)

    def close(self) -> None:
        self._output.close()
        self._receipts.close(linger=0)

    def _mark(self, htype: str) -> None:
        self._output.send_multipart(
            [DENOISED, wire.pack({"htype": htype, "source": SOURCE, "series": SERIES})]
        )


class Subscriber:
    """Receives what is published as ``denoised`` and gives the camera the receipts it asks for."""

    def __init__(self, endpoint: str, receipts_endpoint: str, peer: Peer | None = None) -> None:
        """`peer` is a service that takes keys."""
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._input = context.socket(zmq.SUB)
        self._input.rcvhwm = INPUT_QUEUE_FRAMES
        self._input.rcvtimeo = _PATIENCE_MS
        connect(self._input, endpoint, peer)
        self._input.subscribe(DENOISED)
        self._receipts = context.socket(zmq.PUSH)
        self._receipts.connect(receipts_endpoint)
        self._receipts.linger = 0
        self.arrived = 0

    def frames(self) -> Iterator[tuple[int, dict[str, Any], memoryview]]:
        """(time of receipt [ns, monotonic clock], header, pixels) of each frame until the series ends."""
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
                self._receipts.send(_COUNT.pack(0))
            elif header["htype"] == wire.END:
                if self.arrived:
                    return
            else:
                self.arrived += 1
                if header["receipt"]:
                    self._receipts.send(_COUNT.pack(header["frame"] + 1))
                yield received_ns, header, parts[2].buffer

    def close(self) -> None:
        self._input.close(linger=0)
        self._receipts.close()
