"""DECTRIS Stream V2: bytes -> messages. The only module that knows their layout.

One part, a CBOR map that begins with its ``type``:

    start   series, size, channels (thresholds), pixel mask, energies ...
    image   ``data``, a map from channel to array, ``image_id``, times
    end     series

An array is ``40([[rows, columns], typed])`` (1040: column-major), a typed array a tag of
RFC 8746 around its bytes, and compressed bytes are ``56500([algorithm, element, bytes])``.

Nothing here trusts its input: every reader raises MalformedFrame and nothing else.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, TypeGuard

from emstream.errors import MalformedFrame
from emstream.frame import PIXEL_TYPES
from emstream.sources.cbor import COMPRESSED, Tag, loads
from emstream.sources.compressed import ALGORITHMS
from emstream.sources.delivery import Array
from emstream.sources.series import portable

ROW_MAJOR, COLUMN_MAJOR = 40, 1040
# Tags of RFC 8746 whose types a frame may have.
TYPED = {
    64: ("uint8", "little"), 68: ("uint8", "little"), 72: ("int8", "little"),
    65: ("uint16", "big"), 66: ("uint32", "big"), 73: ("int16", "big"), 74: ("int32", "big"),
    69: ("uint16", "little"), 70: ("uint32", "little"), 77: ("int16", "little"), 78: ("int32", "little"),
    81: ("float32", "big"), 82: ("float64", "big"), 85: ("float32", "little"), 86: ("float64", "little"),
}  # fmt: skip
_LARGEST_NUMBER = 2**53
_MOST_CHANNELS = 16
_Size = tuple[int, int]


@dataclass(frozen=True)
class Start:
    """A series begins."""

    series: int | str
    source: str
    channels: list[str]
    masks: dict[str, Array]
    """Of each channel, unless the detector is told to go without."""
    size: _Size | None
    exposure_s: float | None
    about: dict[str, Any]
    """Whatever else is worth passing on."""


@dataclass(slots=True)
class Image:
    """One exposure, all its channels."""

    series: int | str
    number: int
    channels: dict[str, Any]
    timestamp_ns: int | None
    exposure_s: float | None
    about: dict[str, Any]


@dataclass(frozen=True)
class End:
    series: int | str


def parse(message: bytes | memoryview, max_frame_bytes: int, max_header_bytes: int) -> Start | Image | End:
    """One message of the stream, checked, its pixels not yet touched."""
    fields = loads(message, max_header_bytes, max_frame_bytes)
    if not isinstance(fields, dict):
        raise MalformedFrame("message is not a CBOR map")
    kind = fields.get("type")
    if kind == "image":
        return _image(fields)
    if kind == "start":
        return _start(fields, max_frame_bytes)
    if kind == "end":
        return End(_series(fields))
    raise MalformedFrame("message's type must be start, image or end")


def array(value: Any, max_frame_bytes: int, size: _Size | None = None) -> Array:
    """The array that a message holds; `size` (H, W) is that of arrays that do not say."""
    order = ROW_MAJOR
    if isinstance(value, Tag) and value.number in (ROW_MAJOR, COLUMN_MAJOR):
        order = value.number
        if not isinstance(value.value, list) or len(value.value) != 2:
            raise MalformedFrame("array must hold its dimensions and its values")
        size, value = _size(value.value[0]), value.value[1]
    if size is None:
        raise MalformedFrame("array has no dimensions, and no start of a series gave any")
    if not isinstance(value, Tag) or value.number not in TYPED:
        raise MalformedFrame(f"array must be typed, as one of {', '.join(PIXEL_TYPES)}")
    kind, endianness = TYPED[value.number]
    algorithm, element, data = None, PIXEL_TYPES[kind].itemsize, value.value
    if isinstance(data, Tag) and data.number == COMPRESSED:
        algorithm, element, data = _compressed(data.value)
    if not isinstance(data, memoryview):
        raise MalformedFrame("typed array must hold bytes")
    found = Array(size, kind, endianness, algorithm, element, data, order == COLUMN_MAJOR)
    found.check(max_frame_bytes)
    return found


def _compressed(value: Any) -> tuple[str, int, Any]:
    if not isinstance(value, list) or len(value) != 3:
        raise MalformedFrame("compressed bytes must come with algorithm and element size")
    algorithm, element, data = value
    if not isinstance(algorithm, str) or algorithm not in ALGORITHMS:
        raise MalformedFrame(f"compression must be one of {', '.join(ALGORITHMS)}, or none")
    return algorithm, element if _is_number(element) else 0, data


def _start(fields: dict[str, Any], max_frame_bytes: int) -> Start:
    channels = fields.get("channels") or []
    if not isinstance(channels, list) or not all(_is_text(each) for each in channels):
        raise MalformedFrame("channels must be a list of names")
    size = None
    if "image_size_x" in fields:
        size = _size([fields.get("image_size_y"), fields["image_size_x"]])
    masks = (fields.get("pixel_mask") or {}) if fields.get("pixel_mask_enabled") is not False else {}
    if not isinstance(masks, dict) or len(masks) > _MOST_CHANNELS:
        raise MalformedFrame("pixel_mask must be a map from channel to array")
    names = [fields.get(key) for key in ("detector_description", "detector_serial_number")]
    about = {
        "frames": fields["number_of_images"] if _is_number(fields.get("number_of_images")) else None,
        "incident_energy_ev": _positive(fields.get("incident_energy")),
        "frame_time_s": _positive(fields.get("frame_time")),
        "saturation": fields["saturation_value"] if _is_number(fields.get("saturation_value")) else None,
        "detector_pixel_m": _positive(fields.get("pixel_size_x")),
        "threshold_energy_ev": portable(fields.get("threshold_energy")),
        "series_id": fields["series_id"] if _is_number(fields.get("series_id")) else None,
        "user_data": portable(fields.get("user_data")),
    }
    return Start(
        series=_series(fields),
        source=" ".join(name for name in names if _is_text(name) and name) or "DECTRIS",
        channels=channels[:_MOST_CHANNELS],
        masks={name: array(each, max_frame_bytes, size) for name, each in masks.items()},
        size=size,
        exposure_s=_positive(fields.get("count_time")),
        about=about,
    )


def _image(fields: dict[str, Any]) -> Image:
    number, channels = fields.get("image_id"), fields.get("data")
    if not _is_number(number):
        raise MalformedFrame("image_id must be a number from 0")
    if not isinstance(channels, dict) or not 0 < len(channels) <= _MOST_CHANNELS:
        raise MalformedFrame(f"data must be a map from 1 to {_MOST_CHANNELS} channels to arrays")
    start_s, stop_s = _seconds(fields.get("start_time")), _seconds(fields.get("stop_time"))
    about = {"user_data": portable(fields["user_data"])} if fields.get("user_data") is not None else {}
    return Image(
        series=_series(fields),
        number=number,
        channels=channels,
        timestamp_ns=_timestamp(fields.get("series_date"), start_s if stop_s is None else stop_s),
        exposure_s=_positive(_seconds(fields.get("real_time"))),
        about=about,
    )


def _series(fields: dict[str, Any]) -> int | str:
    """The series' unique name, or its number from cameras that give none."""
    unique, number = fields.get("series_unique_id"), fields.get("series_id")
    if _is_text(unique) and unique:
        return unique
    if _is_number(number):
        return number
    raise MalformedFrame("message names no series")


def _size(value: Any) -> _Size:
    """(H, W) of dimensions [..., rows, columns] whose outer ones are all 1."""
    if isinstance(value, list) and 2 <= len(value) <= 8 and all(_is_number(each) for each in value):
        *outer, height, width = value
        if height > 0 and width > 0 and all(each == 1 for each in outer):
            return height, width
    raise MalformedFrame("dimensions must be [rows, columns] of one frame")


def _is_number(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _LARGEST_NUMBER


def _is_text(value: Any) -> TypeGuard[str]:
    return isinstance(value, str) and len(value) <= 200


def _positive(value: Any) -> float | None:
    """A positive number, or None: what a camera leaves out or garbles there costs no frame."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < _LARGEST_NUMBER:
        return float(value)
    return None


def _seconds(value: Any) -> float | None:
    """A rational [numerator, denominator] in seconds."""
    if (
        isinstance(value, list)
        and len(value) == 2
        and _is_number(value[0])
        and _is_number(value[1])
        and value[1]
    ):
        return float(value[0] / value[1])
    return None


def _timestamp(date: Any, after_s: float | None) -> int | None:
    """When the exposure was over [ns since the Unix epoch], from the series' date and the time after it."""
    if isinstance(date, Tag) and date.number == 0:
        date = date.value
    if not isinstance(date, str) or after_s is None or len(date) > 40:
        return None
    began_ns, after_ns = _ns_of(date), after_s * 1e9
    if began_ns is None or not 0 <= began_ns + after_ns < 2**63:
        return None
    return began_ns + int(after_ns)


@functools.lru_cache(maxsize=8)
def _ns_of(date: str) -> int | None:
    """[ns since the Unix epoch]"""
    try:
        began = datetime.fromisoformat(date)
    except ValueError:
        return None
    if began.tzinfo is None:
        began = began.replace(tzinfo=UTC)
    return (began - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1) * 1000
