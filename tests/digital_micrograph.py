"""Gatan's DM3 and DM4 files, written tag by tag.

The tree of tags and what each of them holds are big endian; the values themselves are little endian::

    [version][length of what follows][1: little endian values][group of the root]
    group  [sorted][open][number of tags], then its tags
    tag    [20: group, 21: value][length of its name][name]([length of what follows], DM4)[group or value]
    value  ["%%%%"][length of the description][description][value]

Lengths, numbers and descriptions have 4 bytes in DM3 and 8 in DM4.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np

_UINT16, _INT32, _UINT32, _FLOAT32, _ARRAY = 4, 3, 5, 6, 20
# The tag DataType of an image, and its bytes per pixel; int32 is colours: blue, green, red, alpha.
_PIXELS = {"uint16": (10, 2), "float32": (2, 4), "int32": (23, 4)}


def write_dm(path: Path, movie: np.ndarray, version: int = 4, pixel_size_nm: float = 0.05) -> None:
    """A movie (N, H, W) or an image (H, W) behind its thumbnail, as the microscope saves it."""
    lengths = movie.shape[::-1]
    axes: list[dict[str, Any]] = [{"Origin": 0.0, "Scale": pixel_size_nm, "Units": "nm"} for _ in range(2)]
    axes += [{"Origin": 0.0, "Scale": 0.025, "Units": "s"} for _ in lengths[2:]]
    thumbnail = np.zeros((4, 6), np.int32)
    tags = {
        "DocumentTags": {},
        "ImageList": [
            {"ImageData": _image(thumbnail, []), "Name": "thumbnail"},
            {"ImageData": _image(movie, axes), "ImageTags": {}, "Name": "movie"},
        ],
        "Thumbnails": [{"ImageIndex": np.uint32(0)}],
    }
    body = _group(tags, version)
    path.write_bytes(struct.pack(f">i{_word(version)}i", version, len(body), 1) + body + bytes(8))


def _image(pixels: np.ndarray, axes: list[dict[str, Any]]) -> dict[str, Any]:
    code, nbytes = _PIXELS[pixels.dtype.name]
    return {
        "Calibrations": {"Brightness": {"Origin": 0.0, "Scale": 1.0, "Units": ""}, "Dimension": axes},
        "Data": pixels.ravel(),
        "DataType": np.uint32(code),
        "Dimensions": [np.uint32(length) for length in pixels.shape[::-1]],
        "PixelDepth": np.uint32(nbytes),
    }


def _word(version: int) -> str:
    return "q" if version == 4 else "i"


def _group(tags: Any, version: int) -> bytes:
    named = list(tags.items()) if isinstance(tags, dict) else [("", tag) for tag in tags]
    return struct.pack(f">bb{_word(version)}", 1, 0, len(named)) + b"".join(
        _tag(name, value, version) for name, value in named
    )


def _tag(name: str, value: Any, version: int) -> bytes:
    is_group = isinstance(value, (dict, list))
    content = _group(value, version) if is_group else _value(value, version)
    length = struct.pack(">q", len(content)) if version == 4 else b""
    return struct.pack(">bh", 20 if is_group else 21, len(name)) + name.encode() + length + content


def _value(value: Any, version: int) -> bytes:
    if isinstance(value, str):
        value = np.frombuffer(value.encode("utf-16-le"), np.uint16)
    if isinstance(value, np.ndarray):
        kinds = {"uint16": _UINT16, "int32": _INT32, "float32": _FLOAT32}
        description = (_ARRAY, kinds[value.dtype.name], value.size)
        content = value.astype(value.dtype.newbyteorder("<")).tobytes()
    elif isinstance(value, float):
        description, content = (_FLOAT32,), struct.pack("<f", value)
    else:
        description, content = (_UINT32,), struct.pack("<I", value)
    words = (len(description), *description)
    return b"%%%%" + struct.pack(f">{len(words)}{_word(version)}", *words) + content
