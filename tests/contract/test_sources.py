"""What every source must do. A new source is done when it passes: see `tests.contract.cameras`."""

from __future__ import annotations

import contextlib
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
from tests.contract.cameras import LIVE, PLAYED, SHAPE, Camera, picture


@pytest.fixture(autouse=True, scope="module")
def _camera_of_the_readme(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with mycam.installed(tmp_path_factory.mktemp("mycam")):
        yield


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

    def wait(self, received: int) -> dict[str, int]:
        """Until `received` are in the ledger."""
        turn = threading.Event()
        for _ in range(4000):
            if (counted := self.ledger.snapshot())["received"] >= received:
                return counted
            turn.wait(0.005)
        raise AssertionError(f"still waiting with {counted}, {self.ledger.reasons()}")

    def ends_within_a_second(self) -> bool:
        self.stop.set()
        self.thread.join(timeout=1)
        return not self.thread.is_alive()

    def end(self) -> None:
        self.stop.set()
        self.intake.abort()
        self.thread.join(timeout=5)
        assert not self.thread.is_alive(), "the source did not stop"


class Stage:
    """A live camera and its receiver."""

    def __init__(self, camera: Camera) -> None:
        self.camera = camera
        self.receiver = Receiver(camera.url)
        camera.watch(self.receiver.ledger)

    def send(self, *numbers: int) -> None:
        for number in numbers:
            self.camera.send(number, picture(number))

    def close(self) -> None:
        self.receiver.end()
        self.camera.vanish()


@pytest.fixture(params=list(LIVE))
def stage(request: pytest.FixtureRequest, context: zmq.Context[Any], tmp_path: Path) -> Iterator[Stage]:
    made = Stage(LIVE[request.param](context, tmp_path))
    yield made
    made.close()


@pytest.fixture(params=[*LIVE, *PLAYED])
def open_camera(
    request: pytest.FixtureRequest, context: zmq.Context[Any], tmp_path: Path
) -> Iterator[Callable[..., Receiver]]:
    """Start a camera that sends `frames` frames by itself, and return what receives them."""
    ends: list[Callable[[], None]] = []

    def start(frames: int, **options: Any) -> Receiver:
        if request.param in PLAYED:
            receiver = Receiver(PLAYED[request.param](tmp_path, frames), **options)
            ends.append(receiver.end)
            return receiver
        camera = LIVE[request.param](context, tmp_path)
        receiver = Receiver(camera.url, **options)
        camera.watch(receiver.ledger)

        def play() -> None:
            with contextlib.suppress(zmq.Again, OSError):  # the receiver has stopped before the end
                camera.appear()
                for n in range(frames):
                    camera.send(n, picture(n))

        thread = threading.Thread(target=play)
        thread.start()
        ends.extend([receiver.end, lambda: thread.join(timeout=20), camera.vanish])
        return receiver

    start.kind = request.param  # type: ignore[attr-defined]
    yield start
    for end in ends:
        end()


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
    assert receiver.ends_within_a_second()


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


def test_gaps_in_the_cameras_numbers_are_missing(stage: Stage) -> None:
    stage.camera.appear()
    stage.send(3, 4, 8, 9, 11)
    ledger = stage.receiver.wait(5)
    missing = 4 + (3 if stage.camera.says_when_it_begins else 0)
    assert (ledger["received"], ledger["missing"], ledger["rejected"]) == (5, missing, 0)


def test_frames_may_change_their_size(stage: Stage) -> None:
    stage.camera.appear()
    shapes = [SHAPE, SHAPE, (64, 40), (16, 24), (16, 24), SHAPE]
    for n, shape in enumerate(shapes):
        stage.camera.send(n, picture(n, shape))
    for n, (head, pixels) in enumerate(stage.receiver.frames(len(shapes))):
        assert head.shape == shapes[n]
        np.testing.assert_array_equal(pixels, picture(n, shapes[n]))
    assert stage.receiver.ledger.snapshot()["missing"] == 0


def test_camera_may_pause(stage: Stage) -> None:
    stage.camera.appear()
    stage.send(0, 1, 2)
    stage.receiver.wait(3)
    threading.Event().wait(0.5)  # longer than a source waits before it looks around
    stage.send(3, 4, 5)
    ledger = stage.receiver.wait(6)
    assert (ledger["received"], ledger["missing"], ledger["rejected"]) == (6, 0, 0)


def test_garbage_is_rejected_and_the_next_frame_arrives(stage: Stage) -> None:
    stage.camera.appear()
    stage.send(0, 1)
    stage.camera.garbage()
    stage.send(2, 3)
    ledger = stage.receiver.wait(5)
    assert (ledger["rejected"], ledger["missing"]) == (1, 0), stage.receiver.ledger.reasons()
    assert [head.frame for head, _ in stage.receiver.frames(4)] == [0, 1, 2, 3]


def test_camera_that_dies_and_comes_back_is_received_again(stage: Stage) -> None:
    stage.camera.appear()
    stage.send(*range(5))
    stage.receiver.wait(5)
    stage.camera.vanish()
    stage.camera.appear()
    stage.send(*range(4))
    ledger = stage.receiver.wait(9)
    assert (ledger["received"], ledger["missing"], ledger["rejected"]) == (9, 0, 0)
    heads = [head for head, _ in stage.receiver.frames(9)]
    assert [head.frame for head in heads] == [0, 1, 2, 3, 4, 0, 1, 2, 3]
    names = [(head.source, head.series) for head in heads]
    assert len(set(names[:5])) == len(set(names[5:])) == 1
    assert names[0] != names[5]


@pytest.mark.parametrize("when", ["nobody was ever there", "the camera pauses", "the camera is gone"])
def test_stop_ends_a_source_that_waits_for_its_camera(stage: Stage, when: str) -> None:
    if when != "nobody was ever there":
        stage.camera.appear()
        stage.send(0)
        stage.receiver.wait(1)
    if when == "the camera is gone":
        stage.camera.vanish()
    assert stage.receiver.ends_within_a_second()
