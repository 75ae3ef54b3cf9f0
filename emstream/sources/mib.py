"""MIB, Merlin's messages: bytes -> headers, packed pixels -> pixels. The only module that knows their layout.

    MPX,0000065921,MQ1,000001,00384,01,0256,0256,U08,   1x1,01,2026-03-01 12:00:00.000000,0.001,0,0,0,...
    |   |          |   |      |     |  |    |    |      |    |  |                          |     counter, colour, gain
    |   |          |   |      |     |  |    |    |      |    |  taken                      exposed [s]
    |   |          |   |      |     |  |    |    |      |    chips that are on
    |   |          |   |      |     |  |    |    |      how they lie
    |   |          |   |      |     |  |    |    U08, U16, U32: big-endian; R64: as the chips were read
    |   |          |   |      |     |  columns, rows
    |   |          |   |      |     chips
    |   |          |   |      bytes before the pixels, from MQ1 on
    |   |          |   number of the frame, from 1
    |   |          kind of message; HDR begins an acquisition and is text
    |   bytes that follow, the comma included
    every message begins like this

and further on, optional, ``MQ1A,2026-03-01T12:00:00.000000000Z,1000000ns,12``: time, exposure, bits.

Nothing here trusts its input: every reader raises MalformedFrame and nothing else.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np

from emstream.errors import MalformedFrame
from emstream.frame import PIXEL_TYPES

FRAMING = re.compile(rb"MPX,(\d{10}),(HDR|MQ1)")
FRAMING_BYTES = 18
KNOWN_BYTES = 32
"""Of a frame's header, enough to say how long it is."""
_TYPES = {"U08": "uint8", "U8": "uint8", "U16": "uint16", "U32": "uint32"}
_RAW = {1: ("uint8", 1 / 8), 6: ("uint8", 1), 12: ("uint16", 2), 24: ("uint32", 4)}  # bytes of a pixel
_LARGEST_SIDE = 2**20


@dataclass(frozen=True)
class Image:
    """What the header of a frame says."""

    number: int
    offset: int
    """Bytes before the pixels."""
    shape: tuple[int, int]
    """(H, W), as it will be seen."""
    type: str
    packed: int
    """Bytes of its pixels, as they come."""
    raw: tuple[int, int] | None
    """Bits and chips of pixels as the chips were read."""
    timestamp_ns: int | None
    exposure_s: float | None
    about: dict[str, Any]

    @property
    def nbytes(self) -> int:
        """Of its pixels, as they come or as they will be, whichever is more."""
        return max(self.packed, self.shape[0] * self.shape[1] * PIXEL_TYPES[self.type].itemsize)


def offset_of(begin: bytes, max_header_bytes: int) -> int:
    """Bytes of a frame's header, from its first `KNOWN_BYTES`."""
    fields = begin.split(b",")
    offset = _integer(fields[2]) if len(fields) > 3 else None
    if offset is None or offset < KNOWN_BYTES:
        raise MalformedFrame("frame's header does not say how long it is")
    if offset > max_header_bytes:
        raise MalformedFrame(f"header of {offset} bytes exceeds the limit of {max_header_bytes}")
    return offset


def parse_image(header: bytes) -> Image:
    """The header of a frame, all of it, from ``MQ1`` on."""
    fields = [field.strip() for field in header.rstrip(b"\0 ").decode("latin1").split(",")]
    if len(fields) < 8 or fields[0] != "MQ1":
        raise MalformedFrame("frame's header must begin with MQ1 and seven fields more")
    number, offset, chips, width, height = (_integer(field) for field in fields[1:6])
    if number is None or offset is None:
        raise MalformedFrame("frame's header has no number")
    if not width or not height or not chips or max(width, height) > _LARGEST_SIDE:
        raise MalformedFrame("frame's header must have chips, columns and rows, all positive")
    extended = fields[fields.index("MQ1A") + 1 :] if "MQ1A" in fields else []
    shape, raw = (height, width), None
    if fields[6] in _TYPES:
        kind = _TYPES[fields[6]]
        packed = height * width * PIXEL_TYPES[kind].itemsize
    elif fields[6] == "R64":
        bits = _integer(extended[2]) if len(extended) > 2 else None
        if bits not in _RAW:
            raise MalformedFrame("raw frame's header must say 1, 6, 12 or 24 bits")
        raw = (bits, chips)
        shape, kind, packed = _raw(bits, chips, fields[7], height, width)
    else:
        raise MalformedFrame(f"pixels must be U08, U16, U32 or R64, got {fields[6][:10]!r}")
    counter = _integer(fields[11]) if len(fields) > 11 else None
    return Image(
        number=number,
        offset=offset,
        shape=shape,
        type=kind,
        packed=packed,
        raw=raw,
        timestamp_ns=_timestamp(extended[0]) if extended else None,
        exposure_s=_exposure(extended[1] if len(extended) > 1 else "", fields[10:11]),
        about={} if counter is None else {"counter": counter},
    )


def parse_acquisition(text: bytes) -> dict[str, str]:
    """The lines ``name: <tab> value`` between ``HDR`` and ``End``."""
    found = {}
    for line in text.decode("latin1").splitlines():
        name, tab, value = line.partition("\t")
        if tab and name != "End":
            found[name.rstrip(": ")[:100]] = value.strip()[:200]
    return found


def frames_of(acquisition: dict[str, str]) -> int:
    """Frames that an acquisition announces; 0 where it does not say."""
    text = acquisition.get("Frames in Acquisition (Number)", "")
    return int(text) if re.fullmatch(r"\d{1,15}", text) else 0


def unpack(data: np.ndarray, bits: int, chips: int, out: np.ndarray) -> None:
    """Pixels as the chips were read, bytes in `data`, into `out` (H, W).

    Words of 64 bits, big-endian, the first pixel in the lowest bits; of 24 bits the upper half comes first,
    as a frame of its own. Four chips come side by side, from the last to the first, row by row; the
    lower two are upside down.
    """
    words = data.view(">u8").astype("<u8")
    if bits == 1:
        pixels = np.unpackbits(words.view(np.uint8), bitorder="little")
    elif bits == 24:
        upper, lower = words.view("<u2").reshape(2, -1)
        pixels = (upper.astype(np.uint32) << 12) + lower
    else:
        pixels = words.view(np.uint8 if bits == 6 else "<u2")
    if chips == 1:
        out[...] = pixels.reshape(out.shape)
        return
    height, width = out.shape[0] // 2, out.shape[1] // 2
    fourth, third, second, first = pixels.reshape(height, 4, width).swapaxes(0, 1)
    out[:height, :width], out[:height, width:] = first, second
    out[height:, :width], out[height:, width:] = third[::-1, ::-1], fourth[::-1, ::-1]


def _raw(bits: int, chips: int, layout: str, height: int, width: int) -> tuple[tuple[int, int], str, int]:
    """Size, type and packed bytes of raw pixels, whose header has the chips side by side."""
    kind, size = _RAW[bits]
    if bits == 24:
        width //= 2  # two frames of 12 bits
    if chips == 4 and layout.rstrip("G") == "2x2" and width % 4 == 0 and bits != 24:
        shape = (2 * height, width // 2)
    elif chips == 1:
        shape = (height, width)
    else:
        raise MalformedFrame(
            f"raw pixels (R64) of {chips} chips, {layout[:10]!r}, {bits} bits, are not supported: one chip, or 2x2 "
            "of 1, 6 or 12 bits; let the detector send U08, U16 or U32 (FILEFORMAT 0)"
        )
    packed = height * width * size
    if not width or packed % 8:
        raise MalformedFrame("raw pixels must fill words of 64 bits")
    return shape, kind, int(packed)


def _integer(text: str | bytes) -> int | None:
    text = text.strip()
    return int(text) if len(text) <= 12 and text.isdigit() and text.isascii() else None


def _exposure(ns: str, seconds: list[str]) -> float | None:
    match = re.fullmatch(r"(\d{1,18})ns", ns)
    if match:
        return int(match[1]) / 1e9 or None
    match = re.fullmatch(r"\d{1,9}(\.\d{1,12})?", seconds[0] if seconds else "")
    return float(match[0]) or None if match else None


def _timestamp(text: str) -> int | None:
    """[ns since the Unix epoch], of a time that says that it is UTC."""
    match = re.fullmatch(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?Z", text)
    if not match:
        return None
    try:
        taken = datetime.fromisoformat(match[1]).replace(tzinfo=UTC)
    except ValueError:
        return None
    seconds = (taken - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(seconds=1)
    taken_ns = seconds * 1_000_000_000 + int((match[2] or "0").ljust(9, "0"))
    return taken_ns if 0 <= taken_ns < 2**63 else None
