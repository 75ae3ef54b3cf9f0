"""Bytes <-> frames. The only module that knows the byte layout.

Native message, three parts::

    [topic, ASCII][header, msgpack map][pixels, raw, C order]

with ``htype`` emstream-frame-1.0 in the header; emstream-start-1.0 and
emstream-end-1.0 have a header and no pixels. Messages of the array-1.0 convention,
``[header, JSON][pixels]``, are understood too; the first byte, ``{``, tells them apart. With
empty pixels such a message stands for a frame that is not sent. The plugin of EPICS,
ADZMQ, adds ``timeStamp`` [s since 1990] and ``ndattr``; before its version 1.4 it wrote
the htype as a list and the shape backwards.

Nothing here trusts its input: every reader raises MalformedFrame and nothing else.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import msgpack  # type: ignore[import-untyped]

from emstream.errors import MalformedFrame
from emstream.frame import PIXEL_TYPES, FrameHeader

FRAME = "emstream-frame-1.0"
START = "emstream-start-1.0"
END = "emstream-end-1.0"
STATS = "emstream-stats-1.0"
ARRAY = "array-1.0"

DEFAULT_MAX_HEADER_BYTES = 64 * 1024
MOST_HEADER_BYTES = 16 * 1024**2
"""Of a limit that anybody may set, and of what a service publishes."""
DEFAULT_MAX_FRAME_BYTES = 256 * 1024**2
EPICS_EPOCH_S = 631_152_000  # 1990-01-01 since the Unix epoch
_MAX_DEPTH = 32  # what is nested deeper cannot be read back everywhere that headers go
_MAX_NUMBER = 2**53
_OWN_KEYS = {
    "htype", "source", "series", "frame", "shape", "type", "endianness", "endianess", "encoding",
    "timestamp_ns", "pixel_size_m", "exposure_s", "units",
}  # fmt: skip


def pack(message: Mapping[str, Any]) -> bytes:
    """A header as msgpack."""
    packed: bytes = msgpack.packb(message)
    return packed


def unpack(data: bytes, max_bytes: int = 2 * MOST_HEADER_BYTES) -> dict[str, Any]:
    """A msgpack or JSON map of at most `max_bytes` and 32 levels."""
    if len(data) > max_bytes:
        raise MalformedFrame(f"header of {len(data)} bytes exceeds the limit of {max_bytes}")
    try:
        if data[:1] == b"{":
            message = json.loads(data)
            pack(message)  # JSON holds numbers and texts that msgpack cannot carry on
        else:
            message = msgpack.unpackb(data)
    except Exception as error:  # both parsers raise a dozen types on garbage
        raise MalformedFrame(f"header is neither msgpack nor portable JSON: {type(error).__name__}") from None
    if not isinstance(message, dict) or not all(isinstance(key, str) for key in message):
        raise MalformedFrame("header is not a map with text keys")
    if _is_deeper(message, _MAX_DEPTH):
        raise MalformedFrame(f"header is nested more than {_MAX_DEPTH} deep")
    return message


def header_of(message: Mapping[str, Any], max_frame_bytes: int = DEFAULT_MAX_FRAME_BYTES) -> FrameHeader:
    """Check a native or array-1.0 frame header and return it."""
    htype, shape = message.get("htype"), message.get("shape")
    if htype == [ARRAY]:  # ADZMQ before 1.4: columns come first
        htype, shape = ARRAY, shape[::-1] if isinstance(shape, list) else shape
    if htype not in (FRAME, ARRAY):
        raise MalformedFrame(f"htype must be {FRAME} or {ARRAY}, got {_short(htype)}")
    if "engine" in message:
        raise MalformedFrame("frame is denoised already; subscribe to raw frames with ?topic=raw")
    kind = message.get("type")
    if not isinstance(kind, str) or kind not in PIXEL_TYPES:
        raise MalformedFrame(f"type must be one of {', '.join(PIXEL_TYPES)}, got {_short(kind)}")
    if message.get("encoding") not in (None, "", "raw", "none"):
        raise MalformedFrame(f"encoding must be raw, got {_short(message['encoding'])}")
    endianness = message.get("endianness", message.get("endianess", "little"))
    if endianness not in ("little", "big"):
        raise MalformedFrame(f"endianness must be little or big, got {_short(endianness)}")
    series = message.get("series", 0)
    if not (isinstance(series, str) and len(series) <= 256) and not _is_number(series):
        raise MalformedFrame(f"series must be a number or a short text, got {_short(series)}")
    source = message.get("source", "")
    units = message.get("units", "electrons")
    if not isinstance(source, str) or not isinstance(units, str) or len(source) + len(units) > 512:
        raise MalformedFrame("source and units must be short texts")
    if not _is_number(message.get("frame")):
        raise MalformedFrame(f"frame must be a number from 0, got {_short(message.get('frame'))}")
    header = FrameHeader(
        frame=message["frame"],
        shape=_shape(shape),
        type=kind,
        source=source,
        series=series,
        endianness=endianness,
        timestamp_ns=_timestamp(message),
        pixel_size_m=_positive(message, "pixel_size_m"),
        exposure_s=_positive(message, "exposure_s"),
        units=units,
        extra={key: value for key, value in message.items() if key not in _OWN_KEYS},
    )
    if header.nbytes > max_frame_bytes:
        raise MalformedFrame(
            f"frame of {header.shape[0]}x{header.shape[1]} {kind} is {header.nbytes} bytes, "
            f"more than the limit of {max_frame_bytes}"
        )
    return header


def map_of(header: FrameHeader) -> dict[str, Any]:
    """The native map of `header`; `header_of` turns it back."""
    message: dict[str, Any] = {
        **header.extra,
        "htype": FRAME,
        "source": header.source,
        "series": header.series,
        "frame": header.frame,
        "shape": header.shape,
        "type": header.type,
        "endianness": header.endianness,
        "encoding": "raw",
        "units": header.units,
    }
    for key in ("timestamp_ns", "pixel_size_m", "exposure_s"):
        value = getattr(header, key)
        if value is not None:
            message[key] = value
    return message


def numbers(message: Any, names: Iterable[str]) -> dict[str, float]:
    """The finite numbers among `names` in a map from the wire, which may be anything."""
    if not isinstance(message, dict):
        return {}
    values = {name: message.get(name) for name in names}
    return {
        name: value
        for name, value in values.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    }


def _is_deeper(value: dict[Any, Any] | list[Any], levels: int) -> bool:
    """Whether maps and lists in one another are more than `levels`, this one counted."""
    inner = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(
        isinstance(each, (dict, list)) and _is_deeper(each, levels - 1) for each in inner
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MAX_NUMBER


def _shape(value: Any) -> tuple[int, int]:
    """(H, W) of an array-1.0 shape [..., z, y, x] whose outer axes are all 1."""
    if isinstance(value, (list, tuple)) and 2 <= len(value) <= 8 and all(_is_number(n) for n in value):
        *outer, height, width = value
        if height > 0 and width > 0 and all(n == 1 for n in outer):
            return height, width
    raise MalformedFrame(f"shape must be [rows, columns] of one frame, got {_short(value)}")


def _positive(message: Mapping[str, Any], key: str) -> float | None:
    value = message.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise MalformedFrame(f"{key} must be a number, got {_short(value)}")
    if not 0 < value < _MAX_NUMBER:
        raise MalformedFrame(f"{key} must be positive, got {_short(value)}")
    return float(value)


def _timestamp(message: Mapping[str, Any]) -> int | None:
    value = message.get("timestamp_ns")
    if value is not None:
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
            raise MalformedFrame(f"timestamp_ns must be integer nanoseconds, got {_short(value)}")
        return value
    seconds = numbers(message, ["timeStamp"]).get("timeStamp", 0) if message["htype"] != FRAME else 0
    return round(seconds * 1e9) + EPICS_EPOCH_S * 10**9 if 0 < seconds < 2**32 else None


def _short(value: Any) -> str:
    if isinstance(value, (dict, list, tuple)):
        return f"a {type(value).__name__} of {len(value)}"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
