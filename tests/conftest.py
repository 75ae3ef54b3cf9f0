"""Fixtures shared by all tests. Sockets live on ipc:// in a temporary folder, or on port 0."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq
from hypothesis import settings as hypothesis_settings

from emstream import wire
from emstream.frame import FrameHeader
from emstream.inference import default_engine
from emstream.serve import Service, Settings, build

# How long an example takes is this machine's affair.
hypothesis_settings.register_profile("any machine", deadline=None)
hypothesis_settings.load_profile("any machine")


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    """A ZeroMQ context of the test's own; leaving it checks that every socket was closed."""
    own: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    yield own
    own.destroy(linger=0)


@pytest.fixture
def engine_path() -> Path:
    return default_engine()


def header(frame: int, shape: tuple[int, int] = (32, 48), kind: str = "uint8", **fields: Any) -> FrameHeader:
    return FrameHeader(frame=frame, shape=shape, type=kind, source="test", series=1, **fields)


def message(frame: int, pixels: np.ndarray, **fields: Any) -> list[Any]:
    """A native three-part message."""
    fields = {"source": "test", "series": 1} | fields
    head = FrameHeader(frame=frame, shape=pixels.shape, type=pixels.dtype.name, **fields)
    return [b"raw", wire.pack(wire.map_of(head)), np.ascontiguousarray(pixels)]


class Rig:
    """A running service with a PUSH camera in front and everything it publishes on record."""

    def __init__(
        self, folder: Path, context: zmq.Context[Any], settings: dict[str, Any], **parts: Any
    ) -> None:
        self.camera = context.socket(zmq.PUSH)
        self.camera.linger = 0
        self.camera.sndhwm = 10_000
        address = f"ipc://{folder}/camera"
        self.camera.bind(address)
        self.service: Service = build(
            Settings(
                **{
                    "input": f"pull+{address}",
                    "output": f"ipc://{folder}/out",
                    "engine": "identity",
                    "queue": 10_000,
                    "queue_bytes": 2**40,
                }
                | settings
            ),
            **parts,
        )
        self.out = context.socket(zmq.SUB)
        self.out.linger = 0
        self.out.rcvhwm = 0
        self.out.connect(self.service.publisher.endpoint)
        self.out.subscribe(b"")
        self._thread = threading.Thread(target=self.service.pipeline.run)

    def start(self) -> None:
        # The publisher has the subscription before the first frame is there.
        assert self.service.publisher.wait_for(b"", 20)
        self._thread.start()

    def stop(self) -> None:
        self.service.pipeline.stop()
        self.join()

    def join(self) -> None:
        self._thread.join(timeout=30)
        assert not self._thread.is_alive(), "the pipeline did not end"

    def close(self) -> None:
        if self._thread.is_alive():
            self.stop()
        self.service.close()
        self.camera.close()
        self.out.close()

    @property
    def ledger(self) -> dict[str, int]:
        return self.service.ledger.snapshot()

    def wait(self, condition: Callable[[dict[str, int]], bool], timeout_s: float = 20) -> dict[str, int]:
        """Wait until the ledger fulfils `condition`."""
        deadline = threading.Event()
        timer = threading.Timer(timeout_s, deadline.set)
        timer.start()
        try:
            while not condition(ledger := self.ledger):
                assert not deadline.is_set(), f"still waiting with {ledger}"
                deadline.wait(0.002)
            return ledger
        finally:
            timer.cancel()
            timer.join()

    def published(self, topic: bytes = b"denoised") -> list[tuple[dict[str, Any], np.ndarray]]:
        """Everything published so far on `topic`: headers and pixels."""
        found = []
        while self.out.poll(100):
            parts = self.out.recv_multipart()
            head = wire.unpack(parts[1])
            if parts[0] == topic and head["htype"] == wire.FRAME:
                pixels = np.frombuffer(parts[2], head["type"]).reshape(head["shape"])
                found.append((head, pixels))
        return found


@pytest.fixture
def rig(tmp_path: Path, context: zmq.Context[Any]) -> Iterator[Callable[..., Rig]]:
    """Make a `Rig`: ``rig(settings, engine=...)``."""
    made: list[Rig] = []

    def make(settings: dict[str, Any] | None = None, **parts: Any) -> Rig:
        made.append(Rig(tmp_path, context, settings or {}, **parts))
        return made[-1]

    yield make
    for each in made:
        each.close()


def exact(ledger: dict[str, int]) -> bool:
    """The ledger's one law."""
    settled = sum(ledger[key] for key in ("published", "dropped", "rejected", "failed", "in_flight"))
    return ledger["received"] == settled


@pytest.fixture
def heeds_ctrl_c() -> Iterator[None]:
    """Also where the tests run in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
