"""DECTRIS' streams: every kind of image, and whatever else may come over the socket.

EMSTREAM_FUZZ=100000 with ``-k damaged_messages --timeout 0`` tries that many damaged messages of each stream.
"""

from __future__ import annotations

import os
import struct
import sys
import threading
import tracemalloc
from typing import Any

import numpy as np
import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

for package in ("dectris.compression", "bitshuffle", "cbor2", "lz4"):
    pytest.importorskip(package, reason=f"{package} is missing: pip install 'emstream[cameras]'")

import cbor2

import tests.desk
from emstream import wire
from emstream.errors import MalformedFrame, SourceError
from emstream.intake import Overrun
from emstream.sources import cbor, compressed, dectris, dectris1, open_source
from tests.conftest import exact
from tests.dectris import array, end, end1, header1, image, image1, lz4_framed, shuffled, start

SHAPE = (33, 47)
PIXELS = np.random.default_rng(0).poisson(3, SHAPE).astype(np.uint16)
MANY = int(os.environ.get("EMSTREAM_FUZZ", "300"))
LIMIT = 100_000  # bytes of a frame


class Desk(tests.desk.Desk):
    def __init__(self, decoder: Any = None) -> None:
        super().__init__(decoder or dectris.Decoder(), LIMIT)


@pytest.mark.parametrize("compression", ["bslz4", "lz4", None])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize(
    "kind", ["u1", "<u2", "<u4", ">u2", ">u4", "i1", "<i2", ">i4", "<f4", ">f4", "<f8", ">f8"]
)
def test_image_of_every_type_arrives_whole(kind: str, order: str, compression: str | None) -> None:
    pixels = PIXELS.astype(kind)
    desk = Desk().give(*(image(n, {"c": array(pixels, compression, order)}) for n in range(3)))
    frames = desk.frames()
    assert [head.frame for head, _ in frames] == [0, 1, 2]
    for head, got in frames:
        assert (head.shape, head.type) == (SHAPE, pixels.dtype.newbyteorder("=").name)
        np.testing.assert_array_equal(got, pixels)
    assert not desk.reasons


@given(st.integers(1, 70), st.integers(1, 70), st.sampled_from([np.uint8, np.uint16, np.uint32]))
def test_compressed_frames_of_any_size_arrive_whole(height: int, width: int, kind: Any) -> None:
    pixels = np.random.default_rng(height * width).integers(0, 200, (height, width)).astype(kind)
    out = np.empty_like(pixels)
    compressed.decompress("bslz4", shuffled(pixels), pixels.itemsize, out)
    np.testing.assert_array_equal(out, pixels)
    compressed.decompress("lz4", lz4_framed(pixels), 0, out)
    np.testing.assert_array_equal(out, pixels)


def test_pixels_are_decompressed_without_a_copy_where_the_library_lets_us() -> None:
    assert compressed._best().__name__ == "into"


def test_library_that_hides_its_function_is_used_with_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compressed, "_into_place", lambda *a: None)
    compressed._best.cache_clear()
    try:
        desk = Desk().give(image(0, PIXELS), image(1, PIXELS), image(2, PIXELS)[:-400] + bytes(400))
        assert all((got == PIXELS).all() for _, got in desk.frames())
        assert compressed._best().__name__ == "by_copy"
    finally:
        compressed._best.cache_clear()


def test_header_says_what_the_detector_said() -> None:
    ((about, (head, _), closing),) = [tuple(Desk().give(start(), image(4, PIXELS), end()).items())]
    assert (about["htype"], about["source"], about["series"]) == (wire.START, "ELA E-01", "one")
    assert (about["frames"], about["incident_energy_ev"], about["user_data"]) == (100, 3e5, {"sample": "Pt"})
    assert (head.frame, head.source, head.series) == (4, "ELA E-01", "one")
    assert head.exposure_s == pytest.approx(0.0009)
    assert head.timestamp_ns == 1_772_366_400_004_900_000
    assert head.extra["channel"] == "threshold_1"
    assert closing["htype"] == wire.END


def test_first_channel_is_taken_unless_another_is_wanted() -> None:
    both = {"b": array(PIXELS), "a": array(PIXELS * 2)}
    for wanted, expected in {None: PIXELS * 2, "b": PIXELS, "sum": PIXELS * 3}.items():
        desk = Desk(dectris.Decoder(wanted)).give(start(channels=("a", "b")), image(0, both))
        ((head, got),) = desk.frames()
        np.testing.assert_array_equal(got, expected)
        assert head.extra["channel"] == (wanted or "a")


def test_sum_of_channels_does_not_overflow() -> None:
    full = np.full(SHAPE, 65534, np.uint16)
    ((head, got),) = (
        Desk(dectris.Decoder("sum")).give(image(0, {"a": array(full), "b": array(full)})).frames()
    )
    assert head.type == "uint32"
    assert (got == 2 * 65534).all()


def test_channel_that_is_not_there_is_rejected_by_name() -> None:
    desk = Desk(dectris.Decoder("threshold_2")).give(start(), image(0, PIXELS))
    assert desk.reasons == ["image has no channel 'threshold_2'; it has threshold_1"]


def test_masked_pixels_are_filled_from_their_neighbours() -> None:
    mask = np.zeros(SHAPE, np.uint32)
    mask[5, 5], mask[20:22, :] = 2, 1
    dead = np.where(mask, 65535, 3).astype(np.uint16)
    desk = Desk().give(start(pixel_mask={"threshold_1": array(mask)}), image(0, dead), image(1, dead))
    for head, got in desk.frames():
        assert (got == 3).all()
        assert head.extra["bad_pixels"] == 1 + 2 * SHAPE[1]


def test_mask_that_the_detector_leaves_out_of_the_start_is_found_in_the_first_image() -> None:
    dead = PIXELS.copy()
    dead[7, 7] = 65535
    later = dead.copy()
    later[7, 7] = 9
    near = [PIXELS[6, 7], PIXELS[8, 7], PIXELS[7, 6], PIXELS[7, 8]]
    for head, got in Desk().give(start(), image(0, dead), image(1, later)).frames():
        assert got[7, 7] in near
        assert head.extra["bad_pixels"] == 1


def test_mask_that_is_switched_off_is_left_aside() -> None:
    mask = np.ones(SHAPE, np.uint32)
    mask[0, 0] = 0
    opening = start(pixel_mask={"threshold_1": array(mask)}, pixel_mask_enabled=False)
    ((_, got),) = Desk().give(opening, image(0, PIXELS)).frames()
    np.testing.assert_array_equal(got, PIXELS)


def test_mask_of_mostly_bad_pixels_is_left_aside(caplog: pytest.LogCaptureFixture) -> None:
    mask = np.ones(SHAPE, np.uint32)
    mask[0] = 0
    ((_, got),) = Desk().give(start(pixel_mask={"threshold_1": array(mask)}), image(0, PIXELS)).frames()
    np.testing.assert_array_equal(got, PIXELS)
    assert "1504 of its 1551 pixels are bad" in caplog.text


def test_array_without_dimensions_has_those_of_the_start() -> None:
    bare = cbor2.CBORTag(69, PIXELS.tobytes())
    ((_, got),) = (
        Desk().give(start(image_size_x=47, image_size_y=33), image(0, {"threshold_1": bare})).frames()
    )
    np.testing.assert_array_equal(got, PIXELS)


def test_series_that_never_ends_is_closed_when_the_next_starts() -> None:
    desk = Desk().give(start("a"), image(0, PIXELS, "a"), start("b"), image(0, PIXELS, "b"), end("b"))
    assert desk.marks() == ["start", "frame", "end", "start", "frame", "end"]


def test_series_whose_start_was_lost_is_opened_by_its_first_image() -> None:
    desk = Desk().give(image(8, PIXELS, "a"), image(0, PIXELS, "b"), end("a"), end("b"))
    assert desk.marks() == ["start", "frame", "end", "start", "frame", "end"]


def test_gaps_in_image_ids_are_missing() -> None:
    desk = Desk().give(start(), *(image(n, PIXELS) for n in (0, 1, 5)), start("b"), image(0, PIXELS, "b"))
    assert desk.ledger.snapshot()["missing"] == 3


@pytest.mark.parametrize("version", [1, 2])
def test_first_images_of_a_series_that_do_not_come_are_missing(version: int) -> None:
    if version == 1:
        desk = first_stream(header1(), image1(3, PIXELS), header1(2), image1(2, PIXELS, series=2))
    else:
        desk = Desk().give(start(), image(3, PIXELS), start("b"), image(2, PIXELS, "b"))
    assert desk.ledger.snapshot()["missing"] == 5


def test_detector_that_starts_a_series_of_the_same_name_again_is_counted_anew() -> None:
    desk = Desk().give(start(), image(0, PIXELS), image(1, PIXELS), start(), image(1, PIXELS))
    assert desk.ledger.snapshot()["missing"] == 1


@pytest.mark.parametrize("version", [1, 2])
def test_image_whose_pixels_are_wrong_is_rejected_and_not_missing_too(version: int) -> None:
    other = np.zeros((20, 30), np.uint16)  # of another size, so that nothing of that size has come before
    if version == 1:
        bad = [*image1(2, other)[:2], shuffled(other)[:-9], b"{}"]
        desk = first_stream(header1(), *(image1(n, PIXELS) for n in (0, 1)), bad, image1(3, PIXELS))
    else:
        typed = cbor2.CBORTag(69, cbor2.CBORTag(56500, ["bslz4", 2, shuffled(other)[:-9]]))
        bad = image(2, {"threshold_1": cbor2.CBORTag(40, [[20, 30], typed])})
        desk = Desk().give(start(), image(0, PIXELS), image(1, PIXELS), bad, image(3, PIXELS))
    ledger = desk.ledger.snapshot()
    assert (ledger["rejected"], ledger["missing"]) == (1, 0)


def test_images_without_the_channel_that_is_wanted_are_rejected_and_not_missing_too() -> None:
    neither = [image(n, {"other": array(PIXELS)}) for n in (1, 2)]
    desk = Desk(dectris.Decoder("threshold_1")).give(start(), image(0, PIXELS), *neither, image(3, PIXELS))
    ledger = desk.ledger.snapshot()
    assert (ledger["rejected"], ledger["missing"]) == (2, 0)


def test_mask_that_does_not_fit_gives_way_to_what_the_first_image_marks(
    caplog: pytest.LogCaptureFixture,
) -> None:
    dead = np.full(SHAPE, 3, np.uint16)
    dead[7, 7] = 65535
    for wanted in (None, "sum"):
        desk = Desk(dectris.Decoder(wanted))
        desk.give(start(pixel_mask={"threshold_1": array(np.ones((5, 6), np.uint32))}), image(0, dead))
        ((head, got),) = desk.frames()
        assert (got == 3).all()
        assert head.extra["bad_pixels"] == 1
    assert "does not fit its frames of 33x47" in caplog.text


def test_start_may_have_null_where_nothing_is_to_say() -> None:
    desk = Desk().give(start(pixel_mask=None, channels=()), image(0, PIXELS))
    assert not desk.reasons
    assert len(desk.frames()) == 1


def test_masks_take_no_more_memory_than_one_of_them() -> None:
    small = array(np.zeros((150, 160), np.uint32))
    opening = start(pixel_mask={str(n): small for n in range(16)})
    desk = Desk().give(opening)  # loads the library
    tracemalloc.start()
    try:
        desk.give(opening)
        assert tracemalloc.get_traced_memory()[1] < 3 * 4 * 150 * 160
    finally:
        tracemalloc.stop()
    assert not desk.reasons


def bad_array(**change: Any) -> bytes:
    fields = {"shape": [2, 3], "order": 40, "type": 64, "data": b"123456"} | change
    typed = cbor2.CBORTag(fields["type"], fields["data"])
    return image(0, {"c": cbor2.CBORTag(fields["order"], [fields["shape"], typed])})


def packed(data: bytes, algorithm: Any = "bslz4", element: Any = 2) -> bytes:
    return bad_array(shape=SHAPE, type=69, data=cbor2.CBORTag(56500, [algorithm, element, data]))


GOOD = shuffled(PIXELS)
BAD = {
    "nothing": b"",
    "garbage": b"\xff\xfe garbage",
    "a map cut short": start()[:-5],
    "bytes behind the end": start() + b"\0",
    "a number": cbor2.dumps(7),
    "no type": cbor2.dumps({"series_id": 1}),
    "an unknown type": cbor2.dumps({"type": "calibration", "series_id": 1}),
    "keys that are no texts": cbor2.dumps({1: 2}),
    "no series": cbor2.dumps({"type": "end"}),
    "a negative image_id": image(-1, PIXELS),
    "an image_id that is a text": image(0, PIXELS, image_id="1"),
    "no channels": image(0, {}),
    "channels without end": image(0, {str(n): 0 for n in range(17)}),
    "pixels that are a list": image(0, {"c": [1, 2, 3]}),
    "one dimension": bad_array(shape=[6]),
    "a dimension of 0": bad_array(shape=[0, 6]),
    "three frames at once": bad_array(shape=[3, 1, 2]),
    "a dimension that is a text": bad_array(shape=["2", 3]),
    "a claim of ten gigabytes": bad_array(shape=[100_000, 100_000]),
    "64-bit pixels": bad_array(type=71, data=bytes(48)),
    "an unknown tag": bad_array(type=999),
    "a byte too few": bad_array(data=b"12345"),
    "a byte too many": bad_array(data=b"1234567"),
    "no bytes at all": bad_array(data=7),
    "an array of half a pair": image(0, {"c": cbor2.CBORTag(40, [[2, 3]])}),
    "an unknown compression": packed(GOOD, "zip"),
    "a compression that is a list": packed(GOOD, []),
    "an element of 3 bytes": packed(GOOD, element=3),
    "compressed pixels cut short": packed(GOOD[:-40]),
    "compressed pixels without a header": packed(GOOD[:8]),
    "compressed pixels of another size": packed(struct.pack(">Q", 17) + GOOD[8:]),
    "blocks of no bytes": packed(GOOD[:8] + bytes(4) + GOOD[12:]),
    "blocks of two gigabytes": packed(GOOD[:8] + b"\x7f\xff\xff\xf0" + GOOD[12:]),
    "compressed pixels that are garbage": packed(GOOD[:16] + bytes(len(GOOD) - 16)),
    "a bomb": bad_array(
        shape=[200, 200], data=cbor2.CBORTag(56500, ["lz4", 0, struct.pack(">QI", 40_000, 8192)])
    ),
    "a nest": b"\x81" * 1000,
    "items without end": b"\x9f" + b"\x00" * 200_000,
    "a length beyond all": b"\x5b" + b"\xff" * 8,
    "a text that is not UTF-8": b"\xa1\x61\xff\x00",
    "a mask of another kind": start(pixel_mask=[1]),
    "a mask cut short": start(pixel_mask={"c": cbor2.CBORTag(40, [[9, 9], cbor2.CBORTag(70, b"")])}),
    "channels of numbers": start(channels=(1, 2)),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("kind", list(BAD))
def test_malformed_message_is_rejected_and_the_next_one_is_not(kind: str) -> None:
    desk = Desk().give(start(), image(0, PIXELS), BAD[kind], image(1, PIXELS))
    ledger = desk.ledger.snapshot()
    assert ledger["rejected"] == 1
    assert exact(ledger)
    assert len(desk.frames()) == 2
    assert desk.reasons[0]


def test_user_data_that_no_header_can_carry_costs_nothing_else() -> None:
    for data in ({"big": 2**80}, "x" * 10_000, [cbor2.CBORTag(40, [1])] * 5000, {"nan": float("nan")}):
        desk = Desk().give(start(user_data=data), image(0, PIXELS, user_data=data))
        items = list(desk.items())
        assert len(items) == 2
        wire.pack(items[0])
        wire.pack(wire.map_of(items[1][0]))


def chunked(text: str) -> bytes:
    """As a text of indefinite length has it."""
    return b"\x7f" + b"".join(cbor2.dumps(text[at : at + 100]) for at in range(0, len(text), 100)) + b"\xff"


LONG: dict[str, Any] = {
    "a text": "x" * 3000,
    "bytes": bytes(3000),
    "bytes in a tag": cbor2.CBORTag(4711, bytes(3000)),
    "numbers": [2**32] * 400,
    "names": {f"{n:020}": None for n in range(200)},
    "a text behind an array": [cbor2.CBORTag(64, bytes(3000)), "x" * 3000],
}


@pytest.mark.parametrize("kind", list(LONG))
def test_what_is_no_array_counts_as_header_and_has_its_limit(kind: str) -> None:
    desk = Desk()
    desk.intake.max_header_bytes = 2048
    flat = array(np.ones(SHAPE, np.float32), None)
    opening = start(
        pixel_mask={"threshold_1": array(np.zeros(SHAPE, np.uint32))}, flatfield={"threshold_1": flat}
    )
    assert len(opening) > 3 * 2048
    desk.give(opening, image(0, PIXELS), image(1, {"threshold_1": array(PIXELS, None)}))
    assert not desk.reasons
    desk.give(image(2, PIXELS, user_data=LONG[kind]), start("two", user_data=LONG[kind]))
    assert desk.ledger.snapshot()["rejected"] == 2
    assert desk.reasons == ["header, all but the arrays, exceeds the limit of 2048 bytes"]
    desk.intake.max_header_bytes = 8192
    desk.give(image(3, PIXELS, user_data=LONG[kind]), start("two", user_data=LONG[kind]))
    assert [head.frame for head, _ in desk.frames()] == [0, 1, 3]


def test_long_text_is_refused_before_it_is_read() -> None:
    message = cbor2.dumps({"type": "image", "user_data": "x" * 10_000_000})
    tracemalloc.start()
    try:
        with pytest.raises(MalformedFrame, match="exceeds the limit of 65536 bytes"):
            cbor.loads(message)
        with pytest.raises(MalformedFrame, match="exceeds the limit of 65536 bytes"):
            cbor.loads(chunked("x" * 1_000_000))
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


def test_flat_field_larger_than_a_frame_may_be_is_refused() -> None:
    for side, refused in ((150, False), (160, True)):  # LIMIT lies between
        flat = array(np.ones((side, side), np.float32), None)
        desk = Desk().give(start(flatfield={"threshold_1": flat}))
        assert desk.reasons == (["array is larger than the limit of 100000 bytes"] if refused else [])


def test_noise_that_compression_makes_larger_is_taken_up_to_the_limit() -> None:
    noise = np.random.default_rng(0).integers(0, 2**16 - 1, (250, 200)).astype(np.uint16)
    assert len(shuffled(noise)) > noise.nbytes == LIMIT
    desk = Desk().give(image(0, noise))
    ((_, pixels),) = desk.frames()
    np.testing.assert_array_equal(pixels, noise)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**64), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=20,
)


@given(VALUES)
def test_our_cbor_reads_what_cbor2_writes(value: Any) -> None:
    assert cbor.loads(cbor2.dumps(value)) == value


@given(VALUES)
def test_our_cbor_reads_indefinite_lengths(value: Any) -> None:
    assert cbor.loads(cbor2.dumps([value], indefinite_containers=True)) == [value]


MESSAGES = [start(pixel_mask={"threshold_1": array(np.zeros((4, 5), np.uint32))}), image(0, PIXELS), end(),
            image(1, {"c": array(PIXELS, "lz4")}), image(2, {"c": array(PIXELS, None)})]  # fmt: skip


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A message with bytes changed, cut out, doubled or put in; or no message at all."""
    message = bytearray(draw(st.sampled_from(MESSAGES) | st.binary(max_size=60)))
    for _ in range(draw(st.integers(0, 4))):
        # Most of the meaning is at the front.
        at = draw(st.integers(0, len(message)) | st.integers(0, min(len(message), 120)))
        kind = draw(st.sampled_from(["change", "cut", "put", "end"]))
        if kind == "change" and at < len(message):
            message[at] = draw(st.integers(0, 255))
        elif kind == "cut":
            del message[at : at + draw(st.integers(1, 9))]
        elif kind == "put":
            message[at:at] = draw(st.binary(max_size=9))
        else:
            del message[at:]
    return bytes(message)


@settings(max_examples=MANY)
@given(st.lists(damaged(), min_size=1, max_size=3))
def test_damaged_messages_never_upset_the_decoder(messages: list[bytes]) -> None:
    desk = Desk(dectris.Decoder("sum") if len(messages) == 2 else None)
    for message in messages:
        desk.give(message)
        ledger = desk.ledger.snapshot()
        assert exact(ledger)
        for item in desk.items():
            wire.pack(item if isinstance(item, dict) else wire.map_of(item[0]))


PARTS = [header1(), image1(0, PIXELS), image1(1, PIXELS, "lz4<"), image1(2, PIXELS, "<"), end1()]


@settings(max_examples=MANY)
@given(st.data())
def test_damaged_messages_never_upset_the_decoder_of_the_first_stream(data: st.DataObject) -> None:
    desk = Desk(dectris1.Decoder())
    for _ in range(2):
        parts = [bytearray(part) for part in data.draw(st.sampled_from(PARTS))]
        part = data.draw(st.sampled_from(parts))
        at = data.draw(st.integers(0, len(part)) | st.integers(0, min(len(part), 40)))
        part[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=6))
        desk.give([memoryview(bytes(part)) for part in parts][: data.draw(st.integers(1, 4))])
        assert exact(desk.ledger.snapshot())
        for item in desk.items():
            wire.pack(item if isinstance(item, dict) else wire.map_of(item[0]))


def first_stream(*messages: list[bytes]) -> Desk:
    return Desk(dectris1.Decoder()).give(*([memoryview(part) for part in parts] for parts in messages))


@pytest.mark.parametrize(
    ("encoding", "kind"),
    [
        ("bs16-lz4<", "u2"),
        ("bs32-lz4<", "u4"),
        ("bs8-lz4<", "u1"),
        ("lz4<", "u2"),
        ("lz4<", "u4"),
        ("<", "u2"),
    ],
)
def test_image_of_the_first_stream_arrives_whole(encoding: str, kind: str) -> None:
    pixels = PIXELS.astype(kind)
    desk = first_stream(header1(), *(image1(n, pixels, encoding) for n in range(2)), end1())
    items = list(desk.items())
    assert items[0]["source"] == "QUADRO E-02"
    assert items[0]["frames"] == 20
    for n, (head, got) in enumerate(items[1:3]):
        np.testing.assert_array_equal(got, pixels)
        assert (head.frame, head.series, head.exposure_s) == (n, 1, 0.001)
    assert items[3]["htype"] == wire.END


def test_first_streams_empty_bitshuffle_header_stands_for_the_usual_blocks() -> None:
    parts = image1(0, PIXELS)
    parts[2] = bytes(12) + parts[2][12:]
    ((_, got),) = first_stream(parts).frames()
    np.testing.assert_array_equal(got, PIXELS)


def test_first_streams_configuration_may_come_in_a_message_of_its_own() -> None:
    head, config = header1()
    items = list(first_stream([head], [config], image1(0, PIXELS)).items())
    assert items[0]["source"] == items[1][0].source == "QUADRO E-02"


@pytest.mark.parametrize("frames", [0.2, 1e308, -1, 2**60, "many", None])
def test_first_streams_length_that_makes_no_sense_is_left_out(frames: Any) -> None:
    (opening, _) = first_stream(header1(nimages=frames), image1(0, PIXELS)).items()
    assert "frames" not in opening


def test_first_streams_mask_is_applied() -> None:
    mask = np.zeros(SHAPE, np.uint32)
    mask[3, 3] = 1
    about = b'{"htype": "dpixelmask-1.0", "shape": [47, 33], "type": "uint32"}'
    pixels = np.where(mask, 65535, 4).astype(np.uint16)
    ((head, got),) = first_stream(header1(1, about, mask.tobytes()), image1(0, pixels)).frames()
    assert (got == 4).all()
    assert head.extra["bad_pixels"] == 1


@pytest.mark.parametrize(
    "parts",
    [
        [b""], [b"{"], [b"[]"], [b'{"htype": "dother-1.0"}'], [b"{}"], image1(0, PIXELS)[:2],
        [*image1(0, PIXELS)[:2], b"short"], image1(-1, PIXELS), [b'{"htype": "dheader-1.0"}'],
        [*header1(), b'{"htype": "dpixelmask-1.0", "shape": [9, 9], "type": "uint32"}', b"1"],
        [image1(0, PIXELS)[0], b'{"shape": [100000, 100000], "type": "uint16", "encoding": "bs16-lz4<"}', GOOD],
        [image1(0, PIXELS)[0], b'{"shape": [47, 33], "type": "uint16", "encoding": "bs16<"}', GOOD],
    ],
)  # fmt: skip
def test_malformed_message_of_the_first_stream_is_rejected(parts: list[bytes]) -> None:
    desk = first_stream(parts, image1(0, PIXELS))
    assert desk.ledger.snapshot()["rejected"] == 1
    assert len(desk.frames()) == 1


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("dectris://", "expected dectris://HOST:PORT"),
        ("dectris://host:99999", "expected dectris://HOST:PORT"),
        ("dectris://host?threshold=1", "unknown option threshold; known: channel"),
        ("dectris1://host?channel=1", "unknown option channel; known: none"),
    ],
)
def test_senseless_detector_is_explained(url: str, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        open_source(url)


@pytest.mark.parametrize(("url", "port"), [("dectris://[::1]", 31001), ("dectris1://127.0.0.1", 9999)])
def test_port_of_the_detector_need_not_be_given(url: str, port: int) -> None:
    source: Any = open_source(url)
    assert source._connection.endpoint == f"tcp://{url.partition('//')[2]}:{port}"
    stop = threading.Event()
    stop.set()
    source.run(Desk().intake, stop)


def test_detector_that_dies_and_comes_back_is_received_again(rig: Any, context: Any, tmp_path: Any) -> None:
    run = rig({"input": f"dectris+ipc://{tmp_path}/camera", "overrun": Overrun.block})
    run.start()
    address = run.camera.last_endpoint.decode().rstrip("\0")
    for message in (start("before"), *(image(n, PIXELS, "before") for n in range(5))):
        run.camera.send(message)
    run.wait(lambda ledger: ledger["published"] == 5)
    run.camera.close()
    run.camera = context.socket(zmq.PUSH)
    run.camera.linger = 0
    run.camera.bind(address)
    for message in (start("after"), *(image(n, PIXELS, "after") for n in range(5))):
        run.camera.send(message)
    ledger = run.wait(lambda ledger: ledger["published"] == 10)
    assert ledger["missing"] == ledger["rejected"] == 0


def test_message_of_two_parts_is_rejected(rig: Any, tmp_path: Any) -> None:
    run = rig({"input": f"dectris+ipc://{tmp_path}/camera", "overrun": Overrun.block})
    run.start()
    run.camera.send_multipart([image(0, PIXELS), b"more"])
    run.camera.send(image(1, PIXELS))
    ledger = run.wait(lambda ledger: ledger["published"] == 1)
    assert ledger["rejected"] == 1


def test_missing_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dectris.compression", None)
    compressed._best.cache_clear()
    try:
        with pytest.raises(SourceError, match=r"pip install 'emstream\[cameras\]'"):
            Desk().give(image(0, PIXELS))
    finally:
        compressed._best.cache_clear()


def test_decoder_raises_nothing_but_malformed_frame() -> None:
    with pytest.raises(MalformedFrame):
        cbor.loads(b"\x1c")
