"""The source in the README's guide does what every source must, and is found as a stranger's package."""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emstream import sources
from emstream.errors import SourceError
from emstream.intake import Overrun
from emstream.sources import open_source
from tests import mycam
from tests.conftest import Rig, exact


@pytest.fixture(autouse=True)
def _installed(tmp_path: Path) -> Iterator[None]:
    with mycam.installed(tmp_path):
        yield


def picture(number: int, shape: tuple[int, int] = (20, 30)) -> np.ndarray:
    return np.random.default_rng(number).poisson(3.0, shape).astype(np.uint16)


class Bench:
    """A service on that camera."""

    def __init__(self, rig: Any) -> None:
        self._rig = rig
        self._threads: list[threading.Thread] = []
        self._runs: list[Rig] = []

    def start(self, messages: list[bytes | None], **settings: Any) -> Rig:
        camera = mycam.Camera(self._background, messages)
        run: Rig = self._rig({"input": mycam.url(camera), "overrun": Overrun.block, **settings})
        run.start()
        self._runs.append(run)
        return run

    def _background(self, work: Callable[[], None]) -> None:
        self._threads.append(threading.Thread(target=work))
        self._threads[-1].start()

    def join(self) -> None:
        for run in self._runs:
            run.stop()
        for thread in self._threads:
            thread.join(timeout=20)


@pytest.fixture
def bench(rig: Any) -> Iterator[Bench]:
    made = Bench(rig)
    yield made
    made.join()


def frames(*numbers: int) -> list[bytes | None]:
    return [mycam.frame(n, picture(n)) for n in numbers]


def test_guide_is_sixty_lines_at_most() -> None:
    assert len(mycam.guide().strip().splitlines()) <= 60


def test_frames_come_in_order_with_their_gaps_counted(bench: Bench) -> None:
    run = bench.start(frames(0, 1, 4, 5), frames=4)
    run.join()
    published = run.published(b"raw")
    assert [head["frame"] for head, _ in published] == [0, 1, 4, 5]
    for head, pixels in published:
        np.testing.assert_array_equal(pixels, picture(head["frame"]))
        assert head["source"] == "mycam"
    assert run.ledger["missing"] == 2


def test_size_may_change_from_frame_to_frame(bench: Bench) -> None:
    shapes = [(4, 6), (40, 30), (1, 1), (4, 6)]
    run = bench.start([mycam.frame(n, picture(n, shape)) for n, shape in enumerate(shapes)], frames=4)
    run.join()
    assert [pixels.shape for _, pixels in run.published(b"raw")] == shapes


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        struct.pack("<4sIHH", b"MYC1", 9, 0, 5),
        struct.pack("<4sIHH", b"MYC1", 9, 65535, 65535),
    ],
)
def test_garbage_is_rejected_and_the_next_connection_is_good(bench: Bench, garbage: bytes) -> None:
    run = bench.start([*frames(0), garbage, None, *frames(1, 2)])
    ledger = run.wait(lambda ledger: ledger["published"] == 3)
    assert ledger["rejected"] == 1
    assert exact(ledger)


def test_frame_cut_short_is_rejected_and_the_camera_is_connected_again(bench: Bench) -> None:
    whole = mycam.frame(1, picture(1))
    run = bench.start([*frames(0), whole[:-1], None, whole[:5], None, *frames(2, 3)])
    ledger = run.wait(lambda ledger: ledger["published"] == 3)
    assert (ledger["rejected"], ledger["missing"]) == (1, 0)
    assert run.service.ledger.reasons() == {"frame ends before its time": 1}


def test_camera_that_stalls_in_mid_frame_can_be_stopped_at_once(bench: Bench) -> None:
    run = bench.start([*frames(0), mycam.frame(1, picture(1))[:40]])
    run.wait(lambda ledger: ledger["received"] == 2)
    start_s = time.monotonic()
    run.stop()
    assert time.monotonic() - start_s < 1.5
    assert run.ledger["rejected"] == 1
    assert exact(run.ledger)


def test_frames_without_room_are_dropped_and_what_follows_is_whole(bench: Bench) -> None:
    run = bench.start(frames(*range(300)), overrun=Overrun.drop_newest, slots=2, max_batch=1)
    ledger = run.wait(lambda ledger: ledger["received"] == 300 and ledger["in_flight"] == 0)
    assert ledger["published"] + ledger["dropped"] == 300
    for head, pixels in run.published(b"raw"):
        np.testing.assert_array_equal(pixels, picture(head["frame"]))


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("mycam://127.0.0.1", "expected mycam://HOST:PORT"),
        ("mycam://host:99999", "expected mycam://HOST:PORT"),
        ("mycam://host:1?rate=4", "unknown option rate; known: none"),
        ("yourcam://host:1", "scheme must be one of tcp, .*, mycam"),
    ],
)
def test_senseless_address_is_explained(url: str, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        open_source(url)


def test_package_that_does_not_load_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = EntryPoint("broken", "no.such.module:Camera", sources.GROUP)
    monkeypatch.setattr(sources, "entry_points", lambda group: [broken])
    with pytest.raises(
        SourceError, match=r"'no\.such\.module:Camera' of a package, which does not load: Mod"
    ):
        open_source("broken://host:1")
