"""Merlin's stream: every kind of frame, and whatever else may come over the socket.

EMSTREAM_FUZZ=100000 with ``-k damaged --timeout 0`` tries that many damaged streams.
"""

from __future__ import annotations

import io
import os
import socket
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emstream import wire
from emstream.sources import open_source
from emstream.sources.merlin import Decoder, Ended, Stream
from tests.conftest import exact
from tests.contract.cameras import Merlin
from tests.contract.test_sources import Receiver
from tests.desk import Desk
from tests.mib import acquisition, header, image, message, raw

SHAPE = (32, 64)
PIXELS = np.random.default_rng(0).poisson(3, SHAPE).astype(np.uint16)
MANY = int(os.environ.get("EMSTREAM_FUZZ", "300"))
LIMIT = 100_000  # bytes of a frame


class Line(Desk):
    """A decoder that is given bytes."""

    def __init__(self) -> None:
        super().__init__(Decoder(), LIMIT)

    def play(self, *messages: bytes, at_once: int = 10**9) -> Line:
        """The whole of a connection, `at_once` bytes at a time."""
        data = io.BytesIO(b"".join(messages))
        stream = Stream(lambda view: data.readinto(view[:at_once]))
        try:
            while True:
                self.decoder.decode(stream, self.intake)
        except Ended:
            return self

    def count(self, *names: str) -> tuple[int, ...]:
        return tuple(self.ledger.snapshot()[name] for name in names)


@pytest.mark.parametrize("at_once", [1, 100, 5000, 10**9])
@pytest.mark.parametrize("kind", ["uint8", "uint16", "uint32"])
def test_frame_of_every_type_arrives_whole(kind: str, at_once: int) -> None:
    pixels = (PIXELS * (1 if kind == "uint8" else 999)).astype(kind)
    frames = Line().play(acquisition(), *(image(n, pixels) for n in (1, 2, 3)), at_once=at_once).frames()
    assert [head.frame for head, _ in frames] == [1, 2, 3]
    for head, got in frames:
        assert (head.shape, head.type) == (SHAPE, kind)
        np.testing.assert_array_equal(got, pixels)


@pytest.mark.parametrize("bits", [1, 6, 12, 24])
@pytest.mark.parametrize("chips", [1, 4])
def test_raw_frame_is_unpacked(bits: int, chips: int) -> None:
    pixels = np.random.default_rng(bits).integers(0, 2**bits, (64, 128))
    line = Line().play(*(raw(n, pixels, bits, chips) for n in (1, 2)), image(3, PIXELS))
    if (bits, chips) == (24, 4):
        (said,) = line.reasons
        assert "raw pixels (R64) of 4 chips, '2x2', 24 bits, are not supported" in said
        assert "FILEFORMAT 0" in said
        assert line.count("received", "rejected") == (3, 2)
        return
    frames = line.frames()
    assert len(frames) == 3, line.reasons
    for head, got in frames[:2]:
        assert head.type == {1: "uint8", 6: "uint8", 12: "uint16", 24: "uint32"}[bits]
        np.testing.assert_array_equal(got, pixels)


def test_header_says_what_the_detector_said() -> None:
    start, (head, _) = Line().play(acquisition(200), image(1, PIXELS)).items()
    assert (start["htype"], start["source"], start["frames"]) == (wire.START, "Merlin", 200)
    assert start["acquisition"]["Chip ID"] == "W529_F5,-,-,-"
    assert (head.frame, head.series, head.exposure_s) == (1, start["series"], 0.001)
    assert head.timestamp_ns == 1_772_366_400_000_000_005
    assert head.extra == {"counter": 0}


def test_year_that_no_header_can_carry_is_left_out() -> None:
    data = image(1, PIXELS).replace(b"MQ1A,2026-", b"MQ1A,9999-")
    ((head, _),) = Line().play(data).frames()
    assert head.timestamp_ns is None
    wire.pack(wire.map_of(head))


def test_frame_without_the_extended_header_is_a_frame() -> None:
    ((head, _),) = Line().play(image(1, PIXELS, extended=False)).frames()
    assert (head.timestamp_ns, head.exposure_s) == (None, 0.001)


def test_acquisition_header_begins_a_series() -> None:
    line = Line().play(acquisition(2), image(1, PIXELS), image(2, PIXELS), acquisition(2), image(1, PIXELS))
    assert line.marks() == ["start", "frame", "frame", "end", "start", "frame"]
    ends = [item for item in Line().play(acquisition(3), image(1, PIXELS), acquisition(3)).items()
            if isinstance(item, dict) and item["htype"] == wire.END]  # fmt: skip
    assert [item.get("unfinished") for item in ends] == [True]


def test_series_without_a_header_begins_where_the_numbers_fall_back() -> None:
    line = Line().play(*(image(n, PIXELS) for n in (4, 5, 9, 1)))
    assert line.count("missing") == (3,)
    assert line.marks() == ["start", "frame", "frame", "frame", "end", "start", "frame"]


def test_connection_that_comes_back_goes_on_with_its_series() -> None:
    line = Line().play(acquisition(), image(1, PIXELS)).play(image(4, PIXELS)).play(image(2, PIXELS))
    assert line.marks() == ["start", "frame", "frame", "end", "start", "frame"]
    assert line.count("missing", "rejected") == (2, 0)


GOOD = image(7, PIXELS)
BAD: dict[str, tuple[bytes, str]] = {
    "noise": (bytes(range(256)) * 30, "bytes that are no message"),
    "half a prefix": (b"MPX,00000", "bytes that are no message"),
    "another kind of message": (message(b"PR1,000001"), "or none that is known"),
    "a length that is no number": (GOOD.replace(b"MPX,0", b"MPX,-"), "bytes that are no message"),
    "a message longer than its frame": (message(GOOD[15:] + b"1"), "size disagree"),
    "a message shorter than its frame": (message(GOOD[15:-1]), "size disagree"),
    "a claim of 10 GB": (b"MPX,9999999999," + GOOD[15:], "size disagree"),
    "an endless acquisition header": (b"MPX,9999999999,HDR,", "at most 65536 bytes"),
    "a frame above the limit": (message(header(1, (300, 300), "U16")), "limit of 100000 bytes"),
    "raw pixels above the limit": (message(header(1, (1000, 600), "R64", bits=1)), "limit of 100000 bytes"),
    "64 bits": (message(header(1, SHAPE, "U64")), "U08, U16, U32 or R64, got 'U64'"),
    "no rows": (message(header(1, (0, 64), "U08")), "all positive"),
    "raw, 7 bits": (message(header(1, SHAPE, "R64", bits=7)), "1, 6, 12 or 24 bits"),
    "raw, nobody knows": (message(header(1, SHAPE, "R64", extended=False)), "1, 6, 12 or 24 bits"),
    "raw, a row of chips": (message(header(1, SHAPE, "R64", chips=4, layout="   Nx1")), "4 chips, 'Nx1'"),
    "raw, half words": (message(header(1, (3, 3), "R64", bits=6)), "must fill words"),
    "a header of nothing": (message(header(1, SHAPE, "U08", offset=0)), "how long it is"),
    "a header of a megabyte": (message(header(1, SHAPE, "U08", offset=99_999)), "exceeds the limit of 65536"),
    "a header without end": (message(b"MQ1,000001,00384,01,".ljust(500, b"\0")), "seven fields more"),
    "a frame without number": (GOOD.replace(b"MQ1,000007", b"MQ1,00x007"), "no number"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_what_is_no_frame_is_rejected_with_its_reason_and_the_next_frame_arrives(name: str) -> None:
    bad, reason = BAD[name]
    line = Line().play(image(1, PIXELS), bad, image(2, PIXELS), image(3, PIXELS))
    (said,) = line.reasons
    assert reason in said
    assert line.count("received", "rejected", "missing") == (4, 1, 0)
    frames = line.frames()
    assert [head.frame for head, _ in frames] == [1, 2, 3]
    assert all((got == PIXELS).all() for _, got in frames)


@pytest.mark.parametrize("left", [1, 10, 17, 18, 40, 300, 390, 405, 3000])
def test_frame_that_is_cut_by_the_end_of_the_connection_is_rejected(left: int) -> None:
    for before in ((), (image(1, PIXELS),)):  # the first frame of a size takes another way
        line = Line().play(*before, image(2, PIXELS)[:left])
        assert line.count("received", "rejected") == (len(before) + 1, 1)
        assert "connection ended within a" in line.reasons[0]
        line.play(image(3, PIXELS))
        assert len(line.frames()) == len(before) + 1
        assert exact(line.ledger.snapshot() | {"published": len(before) + 1, "in_flight": 0})


def test_header_that_lies_takes_no_memory_before_its_pixels_are_there() -> None:
    line = Line()
    before = sum(slot._input.nbytes for slot in line.ring._free)
    line.play(message(header(1, (300, 300), "U08") + bytes(90_000))[:5000])
    assert line.reasons == ["connection ended within a frame"]
    assert sum(slot._input.nbytes for slot in line.ring._free) == before


def test_dropped_frame_leaves_the_stream_in_step() -> None:
    line = Line().play(*(image(n, PIXELS) for n in range(1, 12)))
    assert line.count("received", "rejected") == (11, 0)
    assert line.count("dropped")[0] == 3  # of eight slots the oldest gave way
    assert [head.frame for head, _ in line.frames()] == list(range(4, 12))


def test_stop_in_the_middle_of_a_frame_ends_the_source(tmp_path: Path) -> None:
    camera = Merlin(None, tmp_path)  # type: ignore[arg-type]
    receiver = Receiver(camera.url)
    camera.appear()
    camera.send(1, PIXELS)
    receiver.wait(1)
    camera.sockets[-1].sendall(image(2, PIXELS)[:2000])
    receiver.wait(2)
    assert receiver.ends_within_a_second()
    assert receiver.ledger.reasons() == {"connection ended within a frame": 1}
    camera.vanish()


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("merlin://", "expected merlin://HOST:PORT"),
        ("merlin://host:99999", "expected merlin://HOST:PORT"),
        ("merlin://host:6342/run", "expected merlin://HOST:PORT"),
        ("merlin://host?rate=3", "unknown option rate; known: none"),
    ],
)
def test_senseless_address_is_explained(url: str, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        open_source(url)


def test_port_has_a_default_and_unknown_hosts_are_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    source: Any = open_source("merlin://[::1]")
    assert source.endpoint == "merlin://[::1]:6342"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    receiver = Receiver(f"merlin://127.0.0.1:{port}")
    while "cannot connect" not in caplog.text:
        receiver.stop.wait(0.01)
    assert receiver.ends_within_a_second()


def test_name_server_that_does_not_answer_keeps_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, answers = threading.Event(), threading.Event()

    def getaddrinfo(*args: Any, **options: Any) -> Any:
        asked.set()
        answers.wait(20)
        raise socket.gaierror("no answer")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    receiver = Receiver("merlin://camera.test:6342")
    assert asked.wait(20)
    ended = receiver.ends_within_a_second()
    answers.set()
    assert ended


def test_name_that_cannot_be_one_is_said_and_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    receiver = Receiver("merlin://a..b:6342")
    while "cannot connect to merlin://a..b:6342" not in caplog.text:
        assert receiver.thread.is_alive()
        receiver.stop.wait(0.01)
    assert receiver.ends_within_a_second()


WHOLE = [acquisition(), image(1, PIXELS), raw(2, PIXELS, 12), raw(3, PIXELS % 2, 1), raw(4, PIXELS, 6, 4)]


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A connection's bytes, some changed, cut out, doubled or put in."""
    data = bytearray(b"".join(draw(st.lists(st.sampled_from(WHOLE) | st.binary(max_size=60), max_size=3))))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)) | st.integers(0, min(len(data), 450)))
        kind = draw(st.sampled_from(["change", "cut", "put", "digit", "end"]))
        if kind == "change":
            data[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
        elif kind == "cut":
            del data[at : at + draw(st.integers(1, 9))]
        elif kind == "put":
            data[at:at] = draw(
                st.binary(max_size=9) | st.sampled_from([b",", b"MPX,", b"MQ1,", b"-1,", b"\xb2"])
            )
        elif kind == "digit":
            data[at : at + 1] = draw(st.sampled_from([b"0", b"9", b",", b" "]))
        else:
            del data[at:]
    return bytes(data)


@settings(max_examples=MANY)
@given(st.lists(damaged(), min_size=1, max_size=2))
def test_damaged_streams_never_upset_the_decoder(connections: list[bytes]) -> None:
    line = Line()
    for data in connections:
        line.play(data)
        assert exact(line.ledger.snapshot())
        for item in line.items():
            wire.pack(item if isinstance(item, dict) else wire.map_of(item[0]))
