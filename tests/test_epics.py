"""PVAccess: every kind of NTNDArray, and whatever else a channel may hold.

EMSTREAM_FUZZ=100000 with ``-k damaged --timeout 0`` tries that many damaged updates.
"""

from __future__ import annotations

import os
import struct
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

for package in ("p4p", "numcodecs", "dectris.compression", "bitshuffle", "lz4"):
    pytest.importorskip(package, reason=f"{package} is missing: pip install 'emstream[cameras]'")

import bitshuffle
import lz4.block
from numcodecs import blosc
from p4p import Type, Value

from emstream import wire
from emstream.errors import SourceError
from emstream.sources import open_source
from emstream.sources.epics import Decoder
from tests.conftest import exact
from tests.contract.cameras import PvAccess
from tests.contract.test_sources import Receiver
from tests.dectris import lz4_framed, shuffled
from tests.desk import Desk
from tests.ndarray import TYPE, compressed, frame

SHAPE = (33, 47)
PIXELS = np.random.default_rng(0).poisson(3, SHAPE).astype(np.uint16)
MANY = int(os.environ.get("EMSTREAM_FUZZ", "300"))
LIMIT = 100_000  # bytes of a frame
TYPES = ["int8", "int16", "int32", "uint8", "uint16", "uint32", "float32", "float64"]
CODECS = {
    "lz4": lambda pixels: ("lz4", lz4.block.compress(pixels.tobytes(), store_size=False)),
    "lz4hdf5": lambda pixels: ("lz4hdf5", lz4_framed(pixels)),
    "lz4 out of an HDF5 file": lambda pixels: ("lz4", lz4_framed(pixels)),
    "bslz4": lambda pixels: ("bslz4", bitshuffle.compress_lz4(pixels).tobytes()),
    "bslz4 out of an HDF5 file": lambda pixels: ("bslz4", shuffled(pixels)),
    **{
        f"blosc, {inner}, {shuffle}": lambda pixels, inner=inner, shuffle=shuffle: (
            "blosc", blosc.compress(pixels.tobytes(), inner.encode(), 5, shuffle, typesize=pixels.itemsize)
        )
        for inner, shuffle in [("blosclz", 1), ("lz4", 2), ("lz4hc", 0), ("zlib", 1), ("zstd", 2)]
    },
}  # fmt: skip


def channel() -> Desk:
    return Desk(Decoder("cam:image"), LIMIT)


@pytest.mark.parametrize("kind", TYPES)
def test_picture_of_every_type_arrives_whole(kind: str) -> None:
    pixels = PIXELS.astype(kind)
    desk = channel().give(*(frame(n, pixels) for n in range(3)))
    for n, (head, got) in enumerate(desk.frames()):
        assert (head.frame, head.shape, head.type) == (n, SHAPE, kind)
        np.testing.assert_array_equal(got, pixels)
    assert not desk.reasons


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("codec", list(CODECS))
def test_compressed_picture_of_every_type_arrives_whole(codec: str, kind: str) -> None:
    pixels = PIXELS.astype(kind)
    desk = channel().give(*(compressed(n, pixels, *CODECS[codec](pixels)) for n in range(2)))
    frames = desk.frames()
    assert len(frames) == 2, desk.reasons
    for head, got in frames:
        assert head.type == kind
        np.testing.assert_array_equal(got, pixels)


def test_bytes_behind_the_compressed_ones_are_left_out() -> None:
    name, data = CODECS["blosc, lz4, 2"](PIXELS)
    update = compressed(0, PIXELS, name, data + bytes(50))
    update.compressedSize = len(data)
    ((_, got),) = channel().give(update).frames()
    np.testing.assert_array_equal(got, PIXELS)


def test_frame_of_zeros_is_not_too_small_to_be_true() -> None:
    zeros = np.zeros((200, 200), np.uint16)
    for n, codec in enumerate(["lz4", "bslz4", "blosc, zstd, 2"]):
        desk = channel().give(compressed(n, zeros, *CODECS[codec](zeros)))
        assert len(desk.frames()) == 1, desk.reasons


def test_header_says_what_the_channel_said() -> None:
    start, (head, _) = channel().give(frame(7, PIXELS)).items()
    assert (start["htype"], start["source"]) == (wire.START, "cam:image")
    assert (head.frame, head.source, head.series) == (7, "cam:image", start["series"])
    assert head.timestamp_ns == 1_772_366_407_000_000_005
    assert head.extra["ndattr"] == {"ColorMode": 0, "Temperature": -30.5}


def test_time_of_sending_stands_in_for_that_of_taking() -> None:
    update = frame(0, PIXELS, dataTimeStamp={}, timeStamp={"secondsPastEpoch": 12, "nanoseconds": 3})
    ((head, _),) = channel().give(update).frames()
    assert head.timestamp_ns == 12_000_000_003


def test_largest_value_is_a_count_like_any_other() -> None:
    pixels = PIXELS.copy()
    pixels[3, 4] = 65535
    ((head, got),) = channel().give(frame(0, pixels)).frames()
    assert got[3, 4] == 65535
    assert "bad_pixels" not in head.extra


def test_channel_without_a_picture_says_nothing() -> None:
    desk = channel().give(Value(TYPE), frame(1, PIXELS))
    assert len(desk.frames()) == 1
    assert desk.ledger.snapshot()["received"] == 1


def test_another_series_begins_where_the_numbers_fall_back() -> None:
    desk = channel().give(*(frame(n, PIXELS) for n in (5, 6, 8, 1, 2)))
    assert desk.ledger.snapshot()["missing"] == 1
    assert desk.marks() == ["start", "frame", "frame", "frame", "end", "start", "frame", "frame"]


def test_frame_that_comes_late_stays_in_its_series() -> None:
    desk = channel().give(*(frame(n, PIXELS) for n in (5, 6, 8, 10, 7, 9, 11)))
    assert desk.ledger.snapshot()["missing"] == 0
    assert desk.marks() == ["start", *["frame"] * 7]


def test_number_left_out_before_the_connection_was_lost_is_not_late() -> None:
    desk = channel().give(*(frame(n, PIXELS) for n in (5, 6, 8)))
    desk.decoder.decode(frame(7, PIXELS), desk.intake, again=True)
    assert desk.marks() == ["start", "frame", "frame", "frame", "end", "start", "frame"]
    assert desk.ledger.snapshot()["missing"] == 1


def test_picture_that_is_damaged_is_rejected_and_not_missing_too() -> None:
    other = np.zeros((300, 20), np.uint16)
    data = bitshuffle.compress_lz4(other).tobytes()[:-9]
    desk = channel().give(frame(0, PIXELS), compressed(1, other, "bslz4", data), frame(2, PIXELS))
    ledger = desk.ledger.snapshot()
    assert (ledger["rejected"], ledger["missing"]) == (1, 0)


def test_numbers_go_on_where_32_bits_turn_negative() -> None:
    desk = channel().give(*(frame(n, PIXELS) for n in (2**31 - 1, -(2**31), -(2**31) + 1)))
    assert [head.frame for head, _ in desk.frames()] == [2**31 - 1, 2**31, 2**31 + 1]
    assert desk.ledger.snapshot()["missing"] == 0


def test_picture_that_comes_again_with_a_new_connection_is_the_same() -> None:
    desk = channel().give(frame(3, PIXELS))
    desk.decoder.decode(frame(3, PIXELS), desk.intake, again=True)
    assert desk.ledger.snapshot()["received"] == 1
    desk.decoder.decode(frame(5, PIXELS), desk.intake, again=True)
    assert (desk.ledger.snapshot()["received"], desk.ledger.snapshot()["missing"]) == (2, 1)


def test_outer_dimensions_of_one_are_left_out() -> None:
    ((head, got),) = channel().give(frame(0, PIXELS.reshape(1, 1, *SHAPE))).frames()
    assert head.shape == SHAPE
    np.testing.assert_array_equal(got, PIXELS)


COLOURED = np.zeros((4, 5, 3), np.uint8)
REFUSED: dict[str, tuple[Any, str]] = {
    "RGB1": (frame(0, COLOURED, colour=2), "in colour (RGB1): set the camera's ColorMode to Mono"),
    "Bayer": (frame(0, PIXELS, colour=1), "in colour (Bayer)"),
    "colour that says nothing": (frame(0, COLOURED), "must be monochrome, [columns, rows], got dimensions 3 x 5 x 4"),
    "a line": (frame(0, PIXELS.reshape(-1)), "got dimensions 1551"),
    "64 bits": (frame(0, PIXELS.astype(np.int64)), "got int64"),
    "truths": (frame(0, PIXELS > 2), "got bool"),
    "64 bits, compressed": (compressed(0, PIXELS.astype(np.uint64), "lz4", b"123"), "got uint64"),
    "jpeg": (compressed(0, PIXELS, "jpeg", b"123"), "or none, got 'jpeg'"),
    "too few pixels": (frame(0, PIXELS, value=("ushortValue", PIXELS[:9].reshape(-1))), "size disagree"),
    "a frame above the limit": (frame(0, np.zeros((300, 300), np.uint16)), "limit of 100000 bytes"),
    "a claim of terabytes": (compressed(0, PIXELS, "lz4", b"1", dimension=[{"size": 2**31 - 1}] * 2), "limit of"),
    "negative sizes": (frame(0, PIXELS, dimension=[{"size": -47}, {"size": -33}]), "positive size"),
    "too many dimensions": (frame(0, PIXELS, dimension=[{"size": 1}] * 11), "at most 10"),
    "not a number": (frame(0, np.full((2, 2), np.nan, np.float32)), "not numbers"),
    "a codec of numbers": (
        Value(Type([("value", "aH"), ("uniqueId", "i"), ("dimension", ("aS", None, [("size", "i")])),
                    ("codec", ("S", None, [("name", "ad")]))]),
              {"value": PIXELS.reshape(-1), "dimension": [{"size": 47}, {"size": 33}], "codec": {"name": [1.0, 2.0]}}),
        "codec must be one of",
    ),
    "a scalar": (Value(Type([("value", "d")]), {"value": 3.5}), "holds no NTNDArray"),
    "a table": (Value(Type([("value", ("S", None, [("a", "ad")])), ("labels", "as")])), "holds no NTNDArray"),
    "texts for pixels": (
        Value(Type([("value", "as"), ("dimension", ("aS", None, [("size", "s")])), ("uniqueId", "i")]),
              {"value": ["a"], "dimension": [{"size": "x"}]}), "no array of pixels",
    ),
    "damaged blosc": (compressed(0, PIXELS, "blosc", CODECS["blosc, lz4, 2"](PIXELS)[1][:-9]), "as they say"),
    "blosc of another size": (compressed(0, PIXELS, *CODECS["blosc, lz4, 2"](PIXELS[1:])), "size disagree"),
    "damaged bslz4": (compressed(0, PIXELS, "bslz4", CODECS["bslz4"](PIXELS)[1][:-9]), "damaged"),
    "damaged lz4": (compressed(0, PIXELS, "lz4", CODECS["lz4"](PIXELS)[1][:-9]), "damaged"),
    "two bytes": (compressed(0, PIXELS, "blosc", b"12"), "shorter than their header"),
    "no bytes": (compressed(0, PIXELS, "blosc", b""), "no array of pixels"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_is_no_frame_is_rejected_with_its_reason(name: str) -> None:
    update, reason = REFUSED[name]
    desk = channel().give(update, frame(1, PIXELS))
    (said,) = desk.reasons
    assert reason in said
    assert len(desk.frames()) == 1
    assert desk.ledger.snapshot()["received"] == 2


def test_updates_of_some_fields_are_completed(tmp_path: Any) -> None:
    camera = PvAccess(None, tmp_path)  # type: ignore[arg-type]
    receiver = Receiver(camera.url)
    camera.watch(receiver.ledger)
    camera.appear()
    try:
        camera.send(1, PIXELS)
        camera.server.post(Value(TYPE, {"uniqueId": 2}))
        frames = list(receiver.frames(2))
        assert [head.frame for head, _ in frames] == [1, 2]
        assert all((got == PIXELS).all() for _, got in frames)
    finally:
        receiver.end()
        camera.vanish()


def test_what_overruns_the_queue_is_missing(tmp_path: Any) -> None:
    camera = PvAccess(None, tmp_path)  # type: ignore[arg-type]
    camera.url += "&queue=4"
    receiver = Receiver(camera.url, slots=2)
    camera.watch(receiver.ledger)
    camera.appear()
    try:
        camera.send(0, PIXELS)
        for n in range(1, 200):
            camera.server.post(frame(n, PIXELS))
        got = []
        while not got or got[-1] != 199:
            got += [head.frame for head, _ in receiver.frames(1)]
        ledger = receiver.ledger.snapshot()
        assert got == sorted(set(got))
        assert ledger["received"] == len(got) < 150
        assert ledger["missing"] == 200 - len(got)
    finally:
        receiver.end()
        camera.vanish()


def test_channel_of_something_else_is_rejected_and_heard_on(tmp_path: Any) -> None:
    camera = PvAccess(None, tmp_path)  # type: ignore[arg-type]
    receiver = Receiver(camera.url)
    camera.appear()
    camera.server.post(Value(Type([("value", "d")]), {"value": 3.5}))
    try:
        assert receiver.wait(1)["rejected"] == 1
        assert receiver.ledger.reasons() == {"the channel holds no NTNDArray": 1}
    finally:
        receiver.end()
        camera.vanish()


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("pva://", "expected pva://CHANNEL"),
        ("pva://a:b?rate=3", "unknown option rate; known: server, queue"),
        ("pva://a:b?queue=1", "queue must be at least 2 frames, got 1"),
        ("pva://a:b?queue=many", "queue must be a number"),
        ("pva://a:b?server=http://x", "server must be HOST or HOST:PORT"),
    ],
)
def test_senseless_channel_is_explained(url: str, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        open_source(url)


def test_missing_libraries_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numcodecs", None)
    with pytest.raises(SourceError, match=r"blosc, which needs: pip install 'emstream\[cameras\]'"):
        channel().give(compressed(0, PIXELS, *CODECS["blosc, lz4, 2"](PIXELS)))
    monkeypatch.setitem(sys.modules, "p4p.client.raw", None)
    with pytest.raises(SourceError, match=r"pip install 'emstream\[cameras\]'"):
        open_source("pva://a:b")


def test_environment_says_where_to_search(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    camera = PvAccess(None, tmp_path)  # type: ignore[arg-type]
    monkeypatch.setenv("EPICS_PVA_AUTO_ADDR_LIST", "NO")
    monkeypatch.setenv("EPICS_PVA_NAME_SERVERS", f"127.0.0.1:{camera.port}")
    receiver = Receiver("pva://test:image")
    camera.watch(receiver.ledger)
    camera.appear()
    try:
        camera.send(1, PIXELS)
        assert len(list(receiver.frames(1))) == 1
    finally:
        receiver.end()
        camera.vanish()


@st.composite
def damaged(draw: st.DrawFn) -> Any:
    """An NTNDArray with fields that lie, and compressed bytes that are changed, cut or doubled."""
    codec = draw(st.sampled_from([None, *CODECS]))
    pixels = PIXELS.astype(draw(st.sampled_from(TYPES)))
    name, data = CODECS[codec](pixels) if codec else ("", pixels.tobytes())
    wrong = bytearray(data)
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(wrong)) | st.integers(0, min(len(wrong), 40)))
        wrong[at : at + draw(st.integers(0, 4))] = draw(st.binary(max_size=6))
    update = compressed(draw(st.integers(-(2**31), 2**31 - 1)), pixels, name, bytes(wrong))
    if draw(st.booleans()):
        update["codec.name"] = draw(
            st.sampled_from(["", "lz4", "bslz4", "blosc", "lz4hdf5", "zip", "\ud7ff" * 30])
        )
    if draw(st.booleans()):
        update["codec.parameters"] = draw(st.integers(-1, 12) | st.text(max_size=5) | st.floats())
    if draw(st.booleans()):
        sizes = st.integers(-(2**31), 2**31 - 1) | st.integers(0, 50)
        update.dimension = [{"size": draw(sizes)} for _ in range(draw(st.integers(0, 11)))]
    if draw(st.booleans()):
        update.compressedSize = draw(st.integers(-(2**63), 2**63 - 1) | st.integers(0, 4000))
    if draw(st.booleans()):
        update.dataTimeStamp = {"secondsPastEpoch": draw(st.integers(-(2**63), 2**63 - 1)), "nanoseconds": -1}
    if draw(st.booleans()):
        contents = (
            st.integers(-9, 9) | st.text(max_size=9) | st.floats() | st.lists(st.text(max_size=3), max_size=2)
        )
        update.attribute = [
            {"name": draw(st.sampled_from(["ColorMode", "", "x" * 999])), "value": draw(contents)}
        ]
    return update


@settings(max_examples=MANY)
@given(st.lists(damaged(), min_size=1, max_size=3))
def test_damaged_updates_never_upset_the_decoder(updates: list[Any]) -> None:
    desk = channel()
    for update in updates:
        desk.give(update)
        assert exact(desk.ledger.snapshot())
        for item in desk.items():
            wire.pack(item if isinstance(item, dict) else wire.map_of(item[0]))


def test_blosc_that_lies_about_its_blocks_is_rejected() -> None:
    data = bytearray(CODECS["blosc, lz4, 2"](PIXELS)[1])
    struct.pack_into("<I", data, 8, 2**31)
    (said,) = channel().give(compressed(0, PIXELS, "blosc", bytes(data))).reasons
    assert "impossible size" in said
