"""NTNDArray, EPICS' picture in a structure: -> what it holds. The only module that knows its fields.

    value            the pixels, one of eleven types of array
    codec            ``name`` of a compression, then ``value`` are bytes; ``parameters``, the pixels' type
    dimension        sizes, the fastest first: [columns, rows]
    uniqueId         number of the frame, 32 bits
    dataTimeStamp    when it was taken; timeStamp, when it was sent
    attribute        names and values, ``ColorMode`` among them

Nothing here trusts its input: `parse` raises MalformedFrame and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from emstream.errors import MalformedFrame
from emstream.frame import PIXEL_TYPES
from emstream.sources.compressed import BLOSC, framed
from emstream.sources.delivery import Array
from emstream.sources.series import portable

CODECS = {"lz4": "lz4", "lz4hdf5": "lz4", "bslz4": "bslz4", "blosc": BLOSC}
# As pvData numbers them.
SCALAR_TYPES = {
    1: "int8", 2: "int16", 3: "int32", 4: "int64",
    5: "uint8", 6: "uint16", 7: "uint32", 8: "uint64", 9: "float32", 10: "float64",
}  # fmt: skip
_COLOURS = {1: "Bayer", 2: "RGB1", 3: "RGB2", 4: "RGB3", 5: "YUV444", 6: "YUV422", 7: "YUV421"}
_MOST_DIMENSIONS = 10
_MOST_ATTRIBUTES = 200
_LARGEST_SIZE = 2**31


class Structure(Protocol):
    """What p4p makes of a structure: its fields by name, the inner ones as ``outer.inner``."""

    def get(self, name: str, default: Any = None) -> Any: ...


@dataclass(slots=True)
class Picture:
    """One frame, its pixels still as they came."""

    number: int
    array: Array
    timestamp_ns: int | None
    attributes: dict[str, Any]

    @property
    def identity(self) -> tuple[int, int | None]:
        """By which to know it when it comes again."""
        return self.number, self.timestamp_ns


def parse(value: Structure, max_frame_bytes: int) -> Picture | None:
    """One update of the channel, checked; None for a channel that has no picture yet."""
    pixels, dimensions = value.get("value"), value.get("dimension")
    number, codec = value.get("uniqueId"), value.get("codec.name", "")
    if not isinstance(dimensions, list) or not isinstance(number, int):
        raise MalformedFrame("the channel holds no NTNDArray")
    if not dimensions and (pixels is None or np.size(pixels) == 0):
        return None
    if not isinstance(pixels, np.ndarray) or pixels.ndim != 1:
        raise MalformedFrame("NTNDArray has no array of pixels in value")
    attributes = _attributes(value.get("attribute"))
    _refuse_colour(attributes)
    shape = _shape(dimensions)
    data: bytes | memoryview = pixels.view(np.uint8).data
    if codec is None or (isinstance(codec, str) and not codec):
        kind, algorithm = pixels.dtype.name, None
    elif isinstance(codec, str) and codec in CODECS:
        kind, algorithm = SCALAR_TYPES.get(_number(value.get("codec.parameters")), "unknown"), CODECS[codec]
        size = value.get("compressedSize")
        if isinstance(size, int) and 0 < size < len(data):
            data = data[:size]
    else:
        raise MalformedFrame(f"codec must be one of {', '.join(CODECS)}, or none, got {str(codec)[:20]!r}")
    if kind not in PIXEL_TYPES:
        raise MalformedFrame(f"pixels must be one of {', '.join(PIXEL_TYPES)}, got {kind}")
    element = PIXEL_TYPES[kind].itemsize
    if shape[0] * shape[1] * element > max_frame_bytes:
        raise MalformedFrame(f"frame is larger than the limit of {max_frame_bytes} bytes")
    if algorithm in ("lz4", "bslz4"):
        data = framed(algorithm, data, shape[0] * shape[1] * element)
    array = Array(shape, kind, "little", algorithm, element, data)
    array.check(max_frame_bytes)
    return Picture(number % 2**32, array, _timestamp(value), portable(attributes) or {})


def _shape(dimensions: list[Any]) -> tuple[int, int]:
    """(H, W), from sizes that begin with the fastest."""
    if len(dimensions) > _MOST_DIMENSIONS:
        raise MalformedFrame(f"NTNDArray must have at most {_MOST_DIMENSIONS} dimensions")
    sizes = [_number(each.get("size")) if hasattr(each, "get") else 0 for each in dimensions]
    if not all(0 < size < _LARGEST_SIZE for size in sizes):
        raise MalformedFrame("each dimension must have a positive size")
    if len(sizes) < 2 or any(size != 1 for size in sizes[2:]):
        said = " x ".join(map(str, sizes))
        raise MalformedFrame(f"frame must be monochrome, [columns, rows], got dimensions {said}")
    return sizes[1], sizes[0]


def _attributes(value: Any) -> dict[str, Any]:
    """Numbers and texts by name; the others are left out."""
    found = {}
    for each in value[:_MOST_ATTRIBUTES] if isinstance(value, list) else ():
        if hasattr(each, "get"):
            name, content = each.get("name"), each.get("value")
            if isinstance(name, str) and name and isinstance(content, (int, float, str)):
                found[name[:100]] = content
    return found


def _refuse_colour(attributes: dict[str, Any]) -> None:
    mode = attributes.get("ColorMode", 0)
    if mode in (0, "Mono"):
        return
    name = _COLOURS.get(mode) if isinstance(mode, int) else None
    raise MalformedFrame(
        f"frame is in colour ({name or repr(mode)[:20]}): set the camera's ColorMode to Mono"
    )


def _timestamp(value: Structure) -> int | None:
    """[ns since the Unix epoch]"""
    for name in ("dataTimeStamp", "timeStamp"):
        seconds, more_ns = value.get(f"{name}.secondsPastEpoch"), value.get(f"{name}.nanoseconds")
        if isinstance(seconds, int) and isinstance(more_ns, int) and 0 < seconds < 2**33:
            return seconds * 1_000_000_000 + more_ns % 1_000_000_000
    return None


def _number(value: Any) -> int:
    return value if isinstance(value, int) else 0
