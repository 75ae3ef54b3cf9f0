from __future__ import annotations

import json
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emstream import wire
from emstream.errors import MalformedFrame
from emstream.frame import PIXEL_TYPES, FrameHeader

VALID: dict[str, Any] = {"htype": wire.FRAME, "frame": 3, "shape": [4, 5], "type": "uint8"}

headers = st.builds(
    FrameHeader,
    frame=st.integers(0, 2**53 - 1),
    shape=st.tuples(st.integers(1, 9000), st.integers(1, 9000)).filter(lambda s: s[0] * s[1] * 8 < 2**28),
    type=st.sampled_from(sorted(PIXEL_TYPES)),
    source=st.text(max_size=50),
    series=st.integers(0, 2**53 - 1) | st.text(max_size=50),
    endianness=st.sampled_from(["little", "big"]),
    timestamp_ns=st.none() | st.integers(0, 2**63 - 1),
    pixel_size_m=st.none() | st.floats(1e-15, 1e-3),
    exposure_s=st.none() | st.floats(1e-9, 1e5),
    units=st.text(max_size=20),
    extra=st.dictionaries(st.text(min_size=1, max_size=9).map("x_".__add__), st.integers(-9, 9), max_size=3),
)


@given(headers)
def test_header_survives_the_wire(header: FrameHeader) -> None:
    assert wire.header_of(wire.unpack(wire.pack(wire.map_of(header)))) == header


@given(headers)
def test_header_survives_json_too(header: FrameHeader) -> None:
    text = json.dumps(wire.map_of(header)).encode()
    assert wire.header_of(wire.unpack(text)) == header


json_like = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats()
    | st.text(max_size=9)
    | st.binary(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=8,
)


@given(st.binary(max_size=300) | json_like.map(msgpack.packb))
def test_garbage_is_malformed_and_nothing_else(data: bytes) -> None:
    try:
        wire.header_of(wire.unpack(data))
    except MalformedFrame:
        return
    pytest.fail("garbage passed for a header")


@given(st.sampled_from(["htype", "frame", "shape", "type", "endianness", "encoding", "series", "source",
                        "timestamp_ns", "pixel_size_m", "exposure_s", "units"]), json_like)  # fmt: skip
def test_one_wild_value_gives_a_header_or_malformed(key: str, value: Any) -> None:
    try:
        header = wire.header_of(VALID | {key: value})
    except MalformedFrame:
        return
    assert header.nbytes <= wire.DEFAULT_MAX_FRAME_BYTES


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"htype": "image-9"}, "htype must be"),
        ({"shape": [100_000, 100_000]}, "more than the limit"),
        ({"shape": [4, 0]}, "shape must be"),
        ({"shape": [3, 4, 5]}, "shape must be"),
        ({"shape": "4x5"}, "shape must be"),
        ({"type": "complex64"}, "type must be"),
        ({"type": ["uint8"]}, "type must be"),
        ({"frame": -1}, "frame must be"),
        ({"frame": True}, "frame must be"),
        ({"frame": None}, "frame must be"),
        ({"encoding": "bs16-lz4<"}, "encoding must be raw"),
        ({"endianness": "middle"}, "endianness must be"),
        ({"pixel_size_m": float("nan")}, "pixel_size_m must be positive"),
        ({"timestamp_ns": 1.5}, "integer nanoseconds"),
        ({"engine": {}}, "denoised already"),
    ],
)
def test_bad_header_says_what_is_wrong(change: dict[str, Any], text: str) -> None:
    with pytest.raises(MalformedFrame, match=text):
        wire.header_of(VALID | change)


def test_ten_gigabyte_claim_allocates_nothing() -> None:
    with pytest.raises(MalformedFrame, match="10000000000 bytes"):
        wire.header_of(VALID | {"shape": [100_000, 100_000]})


def test_header_larger_than_the_limit_is_malformed() -> None:
    packed = wire.pack(VALID | {"note": "x" * 70_000})
    with pytest.raises(MalformedFrame, match=f"header of {len(packed)} bytes exceeds the limit of 65536"):
        wire.unpack(packed, wire.DEFAULT_MAX_HEADER_BYTES)
    assert wire.unpack(packed, len(packed))["note"] == "x" * 70_000


@pytest.mark.parametrize("key", ["endianness", "endianess"])
def test_both_spellings_of_endianness_are_read(key: str) -> None:
    assert wire.header_of(VALID | {key: "big"}).endianness == "big"


def test_leading_axes_of_one_are_dropped_from_a_shape() -> None:
    assert wire.header_of(VALID | {"shape": [1, 1, 4, 5]}).shape == (4, 5)


def test_pixel_types_are_those_of_numpy() -> None:
    assert all(np.dtype(name) == dtype for name, dtype in PIXEL_TYPES.items())


@pytest.mark.parametrize("pack", [msgpack.packb, lambda message: json.dumps(message).encode()])
@pytest.mark.parametrize("wrap", [lambda inner: [inner], lambda inner: {"x": inner}])
def test_header_nested_beyond_what_its_readers_bear_is_malformed(pack: Any, wrap: Any) -> None:
    nested: Any = {**VALID}
    for levels in range(2, 1000):
        nested = {**VALID, "x": wrap(nested["x"]) if levels > 2 else wrap(0)}
        if levels == 32:
            assert wire.unpack(pack(nested)) == nested
        if levels in (33, 500, 900):
            with pytest.raises(MalformedFrame, match="nested more than 32 deep"):
                wire.unpack(pack(nested))
