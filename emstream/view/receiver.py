"""Subscribes to a running emstream and keeps the last pairs: what the camera sent, what the engine made of it."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import zmq

from emstream import client, recorded, trusted, wire
from emstream.endpoint import connect
from emstream.errors import MalformedFrame
from emstream.frame import Frame, now_ns
from emstream.keys import Peer
from emstream.publish import DENOISED, RAW, STATS
from emstream.view.history import History
from emstream.view.pair import Pair

QUIET_NS = 2_000_000_000  # without a frame for this long, the page says so
_SILENT_NS = 3_000_000_000  # `emstream serve` says something every second
_RATE_SPAN_NS = 2_000_000_000
_POLL_MS = 100  # how soon a stop is noticed
STAGES = ("received", "batched", "inferred", "published")
FAULTS = ("dropped", "rejected", "failed", "missing")
_COUNTERS = ("received", "published", "in_flight", *FAULTS)
_PERCENTILES = ("p50", "p99", "max")


class Receiver:
    """Keeps the last pairs of a running emstream. One thread writes, any thread reads."""

    def __init__(
        self, endpoint: str, on_pair: Callable[[], None] = lambda: None, peer: Peer | None = None
    ) -> None:
        self.endpoint, self._peer = endpoint, peer
        self.history = History()
        self._on_pair = on_pair
        self._raw: Frame | None = None
        self._heard_ns: int | None = None
        self._ledger: dict[str, float] = {}
        self._engine: dict[str, str] = {}
        self._recording: dict[str, Any] | None = None
        self._trust: dict[str, Any] | None = None
        self._percentiles_ms: dict[str, float] = {}
        self._faults: float | None = None
        self._keys = itertools.count(1)
        self._published: deque[tuple[int, int]] = deque()
        self._frames_per_s: float | None = None
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def newest(self) -> Pair | None:
        return self.history.newest

    def start(self) -> None:
        """Subscribe, and receive in a thread. An emstream that is not there yet is waited for."""
        subscriber: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.SUB)
        subscriber.linger = 0
        subscriber.rcvhwm = client.QUEUE_FRAMES
        connect(subscriber, self.endpoint, self._peer)
        for topic in (RAW, DENOISED, STATS):
            subscriber.subscribe(topic)
        self._thread = threading.Thread(
            target=self._run, args=(subscriber,), name="view-receiver", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        if self._thread:
            self._thread.join()

    def status(self) -> dict[str, Any]:
        """What there is to say without a picture."""
        now, pair = now_ns(), self.newest
        quiet_ns = now - pair.arrived_ns if pair else None
        quiet = quiet_ns is not None and quiet_ns > QUIET_NS
        serving = self._heard_ns is not None and now - self._heard_ns < _SILENT_NS
        return {
            "state": "waiting" if pair is None else "quiet" if quiet else "live",
            "input": self.endpoint,
            "serving": serving,
            "quiet_s": None if quiet_ns is None else round(quiet_ns / 1e9, 1),
            "frames_per_s": 0.0 if quiet else self._frames_per_s,
            "ledger": self._ledger,
            "latency_so_far_ms": self._percentiles_ms,
            "engine": self._engine,
            "recording": self._recording if serving else None,
            "trust": self._trust if serving else None,
        }

    def _run(self, subscriber: zmq.Socket[bytes]) -> None:
        try:
            while not self._stopping.is_set():
                if subscriber.poll(_POLL_MS):
                    with contextlib.suppress(MalformedFrame):
                        self._receive(subscriber.recv_multipart(copy=False))
        finally:
            subscriber.close()

    def _receive(self, parts: list[zmq.Frame]) -> None:
        self._heard_ns = now_ns()
        if parts[0].bytes == STATS and len(parts) > 1:
            message = wire.unpack(parts[1].bytes)
            self._note(message)
            self._percentiles_ms = wire.numbers(message.get("latency_ms"), _PERCENTILES)
            self._recording = recorded.recording_of(message)
            self._trust = trusted.trust_of(message)
            return
        frame, _ = client.read(parts)
        if frame is None:
            return
        if frame.topic == RAW.decode():
            self._raw = frame
            return
        self._note(frame.header.extra)
        self._note_rate(frame)
        # The raw frame is published just before its denoised one.
        if self._raw is not None and _identity(self._raw) == _identity(frame):
            pair = Pair(self._raw, frame, self._heard_ns, next(self._keys), self._is_faulty(frame))
            self.history.add(pair)
            self._on_pair()

    def _is_faulty(self, frame: Frame) -> bool:
        """Whether this frame is outside the domain, or the first to tell of a frame that went wrong."""
        before, self._faults = self._faults, sum(self._ledger.get(name, 0) for name in FAULTS)
        risen = before is not None and self._faults > before
        return risen or frame.header.extra.get("in_domain") is False

    def _note(self, message: dict[str, Any]) -> None:
        self._ledger = wire.numbers(message.get("ledger"), _COUNTERS) or self._ledger
        engine = message.get("engine")
        if isinstance(engine, dict):
            self._engine = {
                key: engine[key][:200]
                for key in ("name", "sha256", "device")
                if isinstance(engine.get(key), str)
            }

    def _note_rate(self, frame: Frame) -> None:
        """Frames per second that were published, whether or not they came here."""
        published_ns = wire.numbers(frame.header.extra.get("stages_ns"), STAGES).get("published")
        published = self._ledger.get("published")
        if published_ns is None or published is None:
            return
        samples = self._published
        if samples and published <= samples[-1][1]:  # another run of the service
            samples.clear()
        samples.append((int(published_ns), int(published)))
        while published_ns - samples[0][0] > _RATE_SPAN_NS:
            samples.popleft()
        span_ns = samples[-1][0] - samples[0][0]
        self._frames_per_s = (samples[-1][1] - samples[0][1]) / span_ns * 1e9 if span_ns > 0 else None


def _identity(frame: Frame) -> tuple[Any, ...]:
    header = frame.header
    return header.source, header.series, header.frame, header.shape
