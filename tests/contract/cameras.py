"""Cameras for the contract that every source fulfils: one class for each kind, which a test plays frame by frame.

A new kind is a class here and a line in LIVE (or, for what plays by itself, a function in PLAYED).
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
import zmq

from emstream import wire
from emstream.ledger import Ledger
from tests import mycam
from tests.conftest import message
from tests.recordings import raw, record

SHAPE = (33, 47)


def picture(number: int, shape: tuple[int, int] = SHAPE) -> np.ndarray:
    return np.random.default_rng(number).poisson(3.0, shape).astype(np.uint16)


class Camera(Protocol):
    """A camera in the hands of a test."""

    url: str
    says_when_it_begins: bool
    """Whether it announces series whose frames are numbered from 0, so that a gap before the first shows."""

    def watch(self, ledger: Ledger) -> None:
        """The ledger behind the source, for cameras that must know when they are heard."""

    def appear(self) -> None:
        """Be there, in a new series; return when the source is connected, if that can be told."""

    def send(self, number: int, pixels: np.ndarray) -> None: ...

    def garbage(self) -> None:
        """Send one thing that is no frame."""

    def vanish(self) -> None:
        """As after a crash: connections break."""


class Heard:
    """Waits for the ledger, for cameras that lose what is sent too early."""

    says_when_it_begins = False

    def __init__(self) -> None:
        self.ledger = Ledger()

    def watch(self, ledger: Ledger) -> None:
        self.ledger = ledger

    def wait(self, condition: Callable[[dict[str, int]], bool], timeout_s: float = 20) -> None:
        turn = threading.Event()
        for _ in range(round(timeout_s / 0.005)):
            if condition(self.ledger.snapshot()):
                return
            turn.wait(0.005)
        raise AssertionError(f"still waiting with {self.ledger.snapshot()}")


class Pushed(Heard):
    """A PUSH socket with the native format, and what others send instead."""

    kind, scheme = zmq.PUSH, "pull+ipc"

    def __init__(self, context: zmq.Context[Any], folder: Path) -> None:
        super().__init__()
        self.context, self.endpoint = context, f"ipc://{folder}/camera"
        self.url = f"{self.scheme}://{folder}/camera"
        self.series = 0
        self.socket: zmq.Socket[bytes] | None = None

    def appear(self) -> None:
        self.socket = self.context.socket(self.kind)
        self.socket.linger = 0
        self.socket.sndhwm = 1000
        self.socket.sndtimeo = 1000
        self.socket.bind(self.endpoint)
        self.series += 1
        self.greet()

    def greet(self) -> None:
        pass

    def put(self, parts: list[Any]) -> None:
        assert self.socket
        self.socket.send_multipart(parts)

    def send(self, number: int, pixels: np.ndarray) -> None:
        self.put(message(number, pixels, series=self.series))

    def garbage(self) -> None:
        self.put([b"raw", b"\xc1 garbage", b"123456"])

    def vanish(self) -> None:
        if self.socket:
            self.socket.close()
            self.socket = None


class Published(Pushed):
    kind, scheme = zmq.XPUB, "ipc"

    def greet(self) -> None:
        assert self.socket
        assert self.socket.poll(20_000), "nobody subscribes"
        self.socket.recv()


class Array10(Pushed):
    def send(self, number: int, pixels: np.ndarray) -> None:
        head = {"htype": wire.ARRAY, "shape": pixels.shape, "type": "uint16", "frame": number,
                "source": f"x{self.series}", "endianness": "big"}  # fmt: skip
        self.put([json.dumps(head).encode(), pixels.astype(">u2").tobytes()])


class Dectris2(Pushed):
    scheme = "dectris+ipc"
    says_when_it_begins = True

    def __init__(self, context: zmq.Context[Any], folder: Path) -> None:
        super().__init__(context, folder)
        self.messages = messages_of_dectris()

    def greet(self) -> None:
        self.put([self.messages.start(f"series {self.series}")])

    def send(self, number: int, pixels: np.ndarray) -> None:
        self.put([self.messages.image(number, pixels, f"series {self.series}")])


class Dectris1(Dectris2):
    scheme = "dectris1+ipc"

    def greet(self) -> None:
        self.put(self.messages.header1(self.series))

    def send(self, number: int, pixels: np.ndarray) -> None:
        self.put(self.messages.image1(number, pixels, series=self.series))


class PvAccess(Heard):
    """A channel, found by the address of its server."""

    def __init__(self, context: zmq.Context[Any], folder: Path) -> None:
        super().__init__()
        pytest.importorskip("p4p", reason="p4p is missing: pip install 'emstream[cameras]'")
        from tests import ndarray

        self.make = ndarray
        self.server: Any = None
        self.port = _free_port()
        self.url = f"pva://test:image?server=127.0.0.1:{self.port}"

    def appear(self) -> None:
        self.server = self.make.Channel("test:image", self.port)

    def send(self, number: int, pixels: np.ndarray) -> None:
        before = self.ledger.snapshot()["received"]
        first = not self.server.is_open
        self.server.post(self.make.frame(number, pixels))
        if first:  # from then on the source gets every update
            self.wait(lambda ledger: ledger["received"] > before)

    def garbage(self) -> None:
        self.server.post(self.make.frame(0, picture(0), dimension=[{"size": 1}, {"size": 2}]))

    def vanish(self) -> None:
        if self.server:
            self.server.close()
            self.server = None


class Merlin(Heard):
    """A TCP server that takes one client."""

    def __init__(self, context: zmq.Context[Any], folder: Path) -> None:
        super().__init__()
        from tests import mib

        self.make = mib
        self.port = _free_port()
        self.url = f"merlin://127.0.0.1:{self.port}"
        self.sockets: list[socket.socket] = []

    def appear(self) -> None:
        listener = socket.create_server(("127.0.0.1", self.port))
        self.sockets.append(listener)
        listener.settimeout(20)
        self.sockets.append(listener.accept()[0])
        self.sockets[-1].settimeout(1)
        self.sockets[-1].sendall(self.make.acquisition())

    def send(self, number: int, pixels: np.ndarray) -> None:
        self.sockets[-1].sendall(self.make.image(number, pixels))

    def garbage(self) -> None:
        self.sockets[-1].sendall(b"GARBAGE MPX,0000000001" * 500)

    def vanish(self) -> None:
        while self.sockets:
            self.sockets.pop().close()


def messages_of_dectris() -> Any:
    for package in ("dectris.compression", "bitshuffle", "cbor2", "lz4"):
        pytest.importorskip(package, reason=f"{package} is missing: pip install 'emstream[cameras]'")
    from tests import dectris

    return dectris


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
        return port


LIVE: dict[str, Callable[[zmq.Context[Any], Path], Camera]] = {
    "pull": Pushed, "sub": Published, "array-1.0": Array10, "dectris": Dectris2, "dectris1": Dectris1,
    "pva": PvAccess, "merlin": Merlin,
}  # fmt: skip


def file(folder: Path, frames: int) -> str:
    path = folder / "movie.npy"
    np.save(path, np.stack([picture(n) for n in range(frames)]))
    return f"file://{path}?rate=2000"


def recording(folder: Path, frames: int) -> str:
    path = folder / "recording.h5"
    record(path, [raw(n, shape=SHAPE) for n in range(frames)], compress=False)
    return f"file://{path}?rate=2000"


def simulated(folder: Path, frames: int) -> str:
    return f"sim://?rate=500&height={SHAPE[0]}&width={SHAPE[1]}&frames={frames}"


def readme(folder: Path, frames: int) -> str:
    """The camera of the guide, whose source the README shows."""
    camera = mycam.Camera(
        lambda work: threading.Thread(target=work, daemon=True).start(),
        [mycam.frame(n, picture(n)) for n in range(frames)],
    )
    return mycam.url(camera)


PLAYED: dict[str, Callable[[Path, int], str]] = {
    "file": file, "recording": recording, "sim": simulated, "mycam of the README": readme,
}  # fmt: skip
