"""What every source must do. A new source is done when it passes.

Each entry of SOURCES starts a camera of its kind that sends `frames` frames of known
pixels and returns the ``--input`` URL to receive it by.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq

from emstream import wire
from emstream.corrections import Corrections, Region
from emstream.frame import FrameHeader
from emstream.intake import Intake, Overrun
from emstream.ledger import Ledger
from emstream.ring import Ring, SeriesMark, Slot
from emstream.sources import open_source
from tests import mycam
from tests.conftest import message
from tests.recordings import raw, record

SHAPE = (33, 47)


def picture(number: int) -> np.ndarray:
    return np.random.default_rng(number).poisson(3.0, SHAPE).astype(np.uint16)


class Cameras:
    """Starts cameras and cleans up after them."""

    def __init__(self, context: zmq.Context[Any], folder: Path) -> None:
        self.context = context
        self.folder = folder
        self.sockets: list[zmq.Socket[bytes]] = []
        self.threads: list[threading.Thread] = []

    def push(self, messages: list[list[Any]], scheme: str = "pull+ipc") -> str:
        """Send once a receiver is there."""
        socket = self.socket(zmq.PUSH)

        def send() -> None:
            with contextlib.suppress(zmq.Again):  # the receiver has stopped before the end
                for parts in messages:
                    socket.send_multipart(parts)

        self.background(send)
        return f"{scheme}://{self.folder}/camera"

    def socket(self, kind: int) -> zmq.Socket[bytes]:
        socket = self.context.socket(kind)
        socket.linger = 0
        socket.sndhwm = 1000
        socket.sndtimeo = 1000
        socket.bind(f"ipc://{self.folder}/camera")
        self.sockets.append(socket)
        return socket

    def background(self, work: Callable[[], None]) -> None:
        self.threads.append(threading.Thread(target=work))
        self.threads[-1].start()

    def close(self) -> None:
        for thread in self.threads:
            thread.join(timeout=20)
        for socket in self.sockets:
            socket.close()


def pull(cameras: Cameras, frames: int) -> str:
    return cameras.push([message(n, picture(n)) for n in range(frames)])


def subscribed(cameras: Cameras, frames: int) -> str:
    socket = cameras.socket(zmq.XPUB)

    def send() -> None:
        if socket.poll(10_000):
            for n in range(frames):
                socket.send_multipart(message(n, picture(n)))

    cameras.background(send)
    return f"ipc://{cameras.folder}/camera"


def array_1_0(cameras: Cameras, frames: int) -> str:
    messages = []
    for n in range(frames):
        head = {
            "htype": "array-1.0",
            "shape": SHAPE,
            "type": "uint16",
            "frame": n,
            "source": "x",
            "endianness": "big",
        }
        messages.append([json.dumps(head).encode(), picture(n).astype(">u2").tobytes()])
    return cameras.push(messages)


def dectris_v2(cameras: Cameras, frames: int) -> str:
    dectris = messages_of_dectris()
    images = [[dectris.image(n, picture(n))] for n in range(frames)]
    return cameras.push([[dectris.start()], *images, [dectris.end()]], "dectris+ipc")


def messages_of_dectris() -> Any:
    for package in ("dectris.compression", "bitshuffle", "cbor2", "lz4"):
        pytest.importorskip(package, reason=f"{package} is missing: pip install 'emstream[cameras]'")
    from tests import dectris

    return dectris


def dectris_v1(cameras: Cameras, frames: int) -> str:
    dectris = messages_of_dectris()
    images = [dectris.image1(n, picture(n)) for n in range(frames)]
    return cameras.push([dectris.header1(), *images, dectris.end1()], "dectris1+ipc")


def file(cameras: Cameras, frames: int) -> str:
    path = cameras.folder / "movie.npy"
    np.save(path, np.stack([picture(n) for n in range(frames)]))
    return f"file://{path}?rate=2000"


def recording(cameras: Cameras, frames: int) -> str:
    path = cameras.folder / "recording.h5"
    record(path, [raw(n, shape=SHAPE) for n in range(frames)], compress=False)
    return f"file://{path}?rate=2000"


def simulated(cameras: Cameras, frames: int) -> str:
    return f"sim://?rate=500&height={SHAPE[0]}&width={SHAPE[1]}&frames={frames}"


def readme(cameras: Cameras, frames: int) -> str:
    return mycam.url(mycam.Camera(cameras.background, [mycam.frame(n, picture(n)) for n in range(frames)]))


SOURCES: dict[str, Callable[[Cameras, int], str]] = {
    "pull": pull, "sub": subscribed, "array-1.0": array_1_0, "dectris": dectris_v2, "dectris1": dectris_v1,
    "file": file, "recording": recording, "sim": simulated, "mycam of the README": readme,
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def _camera_of_the_readme(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with mycam.installed(tmp_path_factory.mktemp("mycam")):
        yield


@pytest.fixture
def cameras(context: zmq.Context[Any], tmp_path: Path) -> Iterator[Cameras]:
    made = Cameras(context, tmp_path)
    yield made
    made.close()


class Receiver:
    """A source running into a ring that the test empties."""

    def __init__(self, url: str, slots: int = 64, corrections: Corrections | None = None) -> None:
        self.ledger, self.ring = Ledger(), Ring(slots, max_batch=1)
        self.intake = Intake(self.ring, self.ledger, Overrun.block, corrections)
        self.stop = threading.Event()
        self.source = open_source(url)
        self.thread = threading.Thread(target=self.source.run, args=(self.intake, self.stop))
        self.thread.start()

    def frames(self, count: int) -> Iterator[tuple[FrameHeader, np.ndarray]]:
        while count:
            item = self.ring.claim()
            if isinstance(item, Slot):
                yield item.headers[0], item.counts[0].copy()
                self.ring.release(item)
                count -= 1

    def end(self) -> None:
        self.stop.set()
        self.intake.abort()
        self.thread.join(timeout=5)
        assert not self.thread.is_alive(), "the source did not stop"


@pytest.fixture(params=list(SOURCES))
def open_camera(request: pytest.FixtureRequest, cameras: Cameras) -> Iterator[Callable[[int], Receiver]]:
    receivers = []

    def start(frames: int, **options: Any) -> Receiver:
        receivers.append(Receiver(SOURCES[request.param](cameras, frames), **options))
        return receivers[-1]

    start.kind = request.param  # type: ignore[attr-defined]
    yield start
    for receiver in receivers:
        receiver.end()


def test_frames_arrive_in_order_and_whole(open_camera: Any) -> None:
    receiver = open_camera(20)
    for n, (head, pixels) in enumerate(receiver.frames(20)):
        assert (head.frame, head.shape) == (n, SHAPE)
        assert pixels.dtype == head.dtype
        if open_camera.kind != "sim":
            np.testing.assert_array_equal(pixels, picture(n))
    ledger = receiver.ledger.snapshot()
    assert (ledger["received"], ledger["missing"], ledger["rejected"]) == (20, 0, 0)


def test_frames_are_corrected_once_and_say_so(open_camera: Any) -> None:
    mask, dark = np.zeros(SHAPE, np.uint8), np.random.default_rng(0).uniform(0, 9, SHAPE)
    mask[4, 5] = 1
    corrections = Corrections(
        gain=2.0, offset=1.0, offset_map=dark, flat_field=dark + 1, mask=mask, binning=2,
        roi=Region(30, 40, 2, 4),
    )  # fmt: skip
    receiver = open_camera(5, corrections=corrections)
    for n, (head, pixels) in enumerate(receiver.frames(5)):
        assert (head.frame, head.shape, head.type, pixels.shape) == (n, (15, 20), "float32", (15, 20))
        (record,) = head.extra["corrections"]
        assert (record["gain"], record["offset"], record["binning"]) == (2.0, 1.0, 2)
        assert (record["roi"], record["bad_pixels"]) == ("30x40+2+4", 1)
        assert {"mask", "flat_field", "offset_map"} <= set(record)
        if open_camera.kind != "sim":
            expected = np.empty((15, 20), np.float32)
            corrections.apply(picture(n), expected)
            np.testing.assert_array_equal(pixels, expected)


def test_stop_ends_the_source_within_a_second(open_camera: Any) -> None:
    receiver = open_camera(5)
    list(receiver.frames(1))
    receiver.stop.set()
    receiver.thread.join(timeout=1)
    assert not receiver.thread.is_alive()


def test_stop_ends_a_source_that_waits_for_a_slot(open_camera: Any) -> None:
    receiver = open_camera(10, slots=2)
    list(receiver.frames(1))
    receiver.end()
    ledger = receiver.ledger.snapshot()
    assert ledger["received"] == 1 + ledger["dropped"] + (ledger["in_flight"] - 1)


def test_time_of_reception_never_runs_backwards(open_camera: Any) -> None:
    receiver = open_camera(10)
    times = []
    while len(times) < 10:
        item = receiver.ring.claim()
        if isinstance(item, Slot):
            times += item.received_ns
            receiver.ring.release(item)
    assert times == sorted(times)


@pytest.mark.parametrize("url", ["file:///movie.npy?rate=5", "sim://?frames=3&rate=500&height=16&width=16"])
def test_series_is_bracketed_by_marks(url: str, tmp_path: Path) -> None:
    np.save(tmp_path / "movie.npy", np.zeros((3, 4, 5), np.uint8))
    url = url.replace("/movie.npy?rate=5", f"{tmp_path}/movie.npy")
    receiver = Receiver(url)
    receiver.thread.join(timeout=20)
    receiver.ring.close()
    kinds = []
    while (item := receiver.ring.claim()) is not None:
        kinds.append(item.message["htype"] if isinstance(item, SeriesMark) else "frame")
    assert kinds == [wire.START, "frame", "frame", "frame", wire.END]
