"""What a frame is, here and on the wire.

Shapes: B frames of a batch, H rows, W columns, C order.
Units:  pixels [electrons] unless the header says otherwise; times *_ns are
        integers [ns since the Unix epoch].
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

# Types that a camera may send, by the name that numpy and array-1.0 share.
PIXEL_TYPES = {
    name: np.dtype(name)
    for name in ("uint8", "uint16", "uint32", "int8", "int16", "int32", "float32", "float64")
}


def _epoch_ns() -> int:
    """What the wall clock is ahead of the monotonic one, from the tightest of a few readings."""
    readings = []
    for _ in range(50):
        before, wall, after = time.monotonic_ns(), time.time_ns(), time.monotonic_ns()
        readings.append((after - before, wall - (before + after) // 2))
    return min(readings)[1]


# The wall clock may be stepped while the service runs; a latency must not notice.
_EPOCH_NS = _epoch_ns()


def now_ns() -> int:
    """Nanoseconds since the Unix epoch, on a clock that never steps backwards."""
    return time.monotonic_ns() + _EPOCH_NS


@dataclass(slots=True)
class FrameHeader:
    """Everything about a frame but its pixels."""

    frame: int
    """The camera's own number of the frame within its series, from 0."""
    shape: tuple[int, int]
    """(H, W)"""
    type: str
    """A key of PIXEL_TYPES."""
    source: str = ""
    """Name of the camera."""
    series: int | str = 0
    """One acquisition; frame numbers start again with each."""
    endianness: str = "little"
    timestamp_ns: int | None = None
    """When the camera took the frame."""
    pixel_size_m: float | None = None
    exposure_s: float | None = None
    units: str = "electrons"
    extra: dict[str, Any] = field(default_factory=dict)
    """Whatever else the camera says; passed on untouched."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """The pixels' type in memory, always of this machine's byte order."""
        return PIXEL_TYPES[self.type]

    @property
    def nbytes(self) -> int:
        return self.shape[0] * self.shape[1] * self.dtype.itemsize


@dataclass(slots=True)
class Frame:
    """A frame as `emstream.subscribe` hands it out."""

    header: FrameHeader
    data: np.ndarray
    """(H, W): expected electrons as float32 when denoised, counts when raw."""
    topic: str = "denoised"

    @property
    def number(self) -> int:
        return self.header.frame
