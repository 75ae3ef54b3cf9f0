"""What cameras send, for benches that have to make it themselves."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

_SCALAR_TYPES = {"uint8": 5, "uint16": 6, "uint32": 7, "float32": 9}  # as pvData numbers them
_FIELDS = {"uint8": "ubyteValue", "uint16": "ushortValue", "uint32": "uintValue", "float32": "floatValue"}
_MIB_HEADER = 384  # bytes


def mib_frame(number: int, pixels: np.ndarray) -> bytes:
    """A frame of MIB as files have it: header and unsigned counts (H, W), without a message around it."""
    bits = 8 * pixels.itemsize
    rows, columns = pixels.shape
    thresholds, chip = ",".join(["0.000000E+0"] * 8), ",".join(["3RX", *["000"] * 27])
    header = (
        f"MQ1,{number:06d},{_MIB_HEADER:05d},01,{columns:04d},{rows:04d},U{bits:02d},   1x1,01,"
        f"2026-03-01 12:00:00.000000,0.001000,0,0,0,{thresholds},{chip},"
        f"MQ1A,2026-03-01T12:00:00.000000000Z,1000000ns,{ {8: 6, 16: 12, 32: 24}[bits] },"
    )
    return header.encode().ljust(_MIB_HEADER, b"\0") + pixels.astype(pixels.dtype.newbyteorder(">")).tobytes()


def mib_raw(number: int, shape: tuple[int, int], bits: int, body: bytes, chips: int = 1) -> bytes:
    """A frame whose pixels are as the chips were read; `shape` (H, W) as its header has it."""
    header = (
        f"MQ1,{number:06d},{_MIB_HEADER:05d},{chips:02d},{shape[1]:04d},{shape[0]:04d},R64,"
        f"{'   2x2' if chips == 4 else '   1x1'},01,2026-03-01 12:00:00.000000,0.001000,0,0,0,,"
        f"MQ1A,2026-03-01T12:00:00.000000000Z,1000000ns,{bits},"
    )
    return header.encode().ljust(_MIB_HEADER, b"\0") + body


def mib_acquisition(frames: int) -> bytes:
    """The text that begins an acquisition, as .hdr files have it."""
    lines = {
        "Time and Date Stamp (day, mnth, yr, hr, min, s)": "01/03/2026 12:00:00",
        "Chip ID": "W000_A1,-,-,-",
        "Counter Depth (number)": 12,
        "Frames in Acquisition (Number)": frames,
        "Frames per Trigger (Number)": frames,
        "Readout System": "Merlin Quad",
    }
    return ("HDR,\t\n" + "".join(f"{name}:\t{value}\n" for name, value in lines.items()) + "End\t").encode()


def mpx(payload: bytes) -> bytes:
    """A message of Merlin's stream."""
    return b"MPX,%010d," % (len(payload) + 1) + payload


def ndarray(number: int, pixels: np.ndarray, codec: str = "", data: bytes = b"") -> Any:
    """An NTNDArray of `pixels` (H, W), or of what `codec` made of them: `data`."""
    from p4p import Value

    kind = pixels.dtype.name
    packed = np.frombuffer(data, np.uint8)
    return Value(
        _ndarray_type(),
        {
            "value": ("ubyteValue", packed) if codec else (_FIELDS[kind], pixels.reshape(-1)),
            "codec": {"name": codec, "parameters": _SCALAR_TYPES[kind]},
            "compressedSize": len(data) if codec else pixels.nbytes,
            "uncompressedSize": pixels.nbytes,
            "uniqueId": number,
            "dataTimeStamp": {"secondsPastEpoch": 1_772_366_400, "nanoseconds": number},
            "dimension": [{"size": size, "fullSize": size, "binning": 1} for size in reversed(pixels.shape)],
            "attribute": [{"name": "ColorMode", "value": 0}],
        },
    )


@functools.cache
def _ndarray_type() -> Any:
    from p4p.nt import NTNDArray

    return NTNDArray().type
