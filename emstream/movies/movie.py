"""An open movie, whatever its format."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from emstream.errors import FileFormatError
from emstream.frame import PIXEL_TYPES

log = logging.getLogger(__name__)

_MAX_UNITS = 64  # letters; the units go out in every header
_STRIP = 8  # times as high as wide no camera's frames are


@dataclass(frozen=True, kw_only=True)
class Stored:
    """What a format found in a file; `Movie` judges whether it is a movie."""

    shape: tuple[int, ...]
    """As stored, any number of axes."""
    dtype: np.dtype[Any]
    """As stored, of any kind and byte order."""
    frame: Callable[[int], np.ndarray]
    """Reads frame i, (H, W)."""
    close: Callable[[], None]
    pixel_size_m: float | None = None
    units: str = "electrons"


class Movie:
    """N frames (H, W) in a file, read one at a time: ``len(movie)``, ``movie[i]``, ``for frame in movie``.

    Frames come in this machine's byte order as one of PIXEL_TYPES: bool is read as uint8,
    float16 and integers of 64 bit as float32, the way engines take them.
    """

    path: Path
    shape: tuple[int, int, int]
    """(N, H, W)"""
    dtype: np.dtype[Any]
    """Of the frames as they are read, one of PIXEL_TYPES."""
    pixel_size_m: float | None
    """[m], where the file says so."""
    units: str
    """Of the pixels; electrons unless the file says otherwise."""
    is_image: bool
    """Whether the file holds one image (H, W), and no movie of one frame."""

    def __init__(self, path: Path, stored: Stored) -> None:
        """Take over what is `stored` in `path`, or close it and raise FileFormatError."""
        self.path = path
        self._stored = stored
        try:
            self.shape, self.dtype = check(path, stored.shape, stored.dtype)
            _check_order(path, self.shape)
        except FileFormatError:
            stored.close()
            raise
        self.is_image = len(stored.shape) == 2
        size_m = stored.pixel_size_m
        self.pixel_size_m = float(size_m) if size_m and math.isfinite(size_m) and size_m > 0 else None
        self.units = stored.units[:_MAX_UNITS] or "electrons"

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, i: int) -> np.ndarray:
        """Frame `i`, (H, W), in memory of its own. Raises FileFormatError when it cannot be read."""
        if not -len(self) <= i < len(self):
            raise IndexError(f"frame must lie in 0-{len(self) - 1}, got {i}")
        i %= len(self)
        try:
            frame = self._stored.frame(i)
        except Exception as error:  # each library raises its own dozen types on a corrupt file
            raise FileFormatError(f"{self.path}: frame {i} cannot be read: {_reason(error)}") from None
        if frame.shape != self.shape[1:]:
            raise FileFormatError(
                f"{self.path}: frame {i} is {frame.shape}, the others {self.shape[1:]}; is the file whole?"
            )
        return frame.astype(self.dtype, order="C", copy=False)

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[i] for i in range(len(self)))

    def close(self) -> None:
        self._stored.close()

    def __enter__(self) -> Movie:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class FlatFrames:
    """Frames that lie one behind the other in a file, as .npy, .mrc and uncompressed .tif have them.

    Read, not mapped: memory stays constant however long the movie, and a file that
    shrinks meanwhile is an error, not a crash.
    """

    def __init__(self, path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        """`shape` (N, H, W) or (H, W), from byte `offset` on. Raises ValueError for a file cut short."""
        self._offset = offset
        self._shape, self._dtype = shape[-2:], dtype
        self._nbytes = math.prod(self._shape) * dtype.itemsize
        needed, size = offset + math.prod(shape) * dtype.itemsize, path.stat().st_size
        if size < needed:
            raise ValueError(f"it is cut short: {size} bytes of {needed}")
        self._file = path.open("rb", buffering=0)

    def __call__(self, i: int) -> np.ndarray:
        frame = np.empty(self._shape, self._dtype)
        into = frame.reshape(-1).view(np.uint8).data
        self._file.seek(self._offset + i * self._nbytes)
        filled = 0
        while filled < self._nbytes:
            got = self._file.readinto(into[filled:])
            if not got:
                raise EOFError("the file was cut short while it was read")
            filled += got
        return frame

    def close(self) -> None:
        self._file.close()


def flat(
    path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any], pixel_size_m: float | None = None
) -> Stored:
    """Frames that `FlatFrames` can read. Raises FileFormatError when they are no movie."""
    check(path, shape, dtype)
    frames = FlatFrames(path, offset, shape, dtype)
    return Stored(shape=shape, dtype=dtype, frame=frames, close=frames.close, pixel_size_m=pixel_size_m)


def _check_order(path: Path, shape: tuple[int, int, int]) -> None:
    """Refuse a stack that surely has its frames last, and warn of one that may."""
    frames, height, width = shape
    is_strip = min(frames, height) >= _STRIP * width
    if width == 1 or not (is_strip or frames == height > width):
        return
    read = f"{frames} frames of {height}x{width} px"
    remedy = f"{width} frames of {frames}x{height}, put the frames first: numpy.moveaxis(movie, -1, 0)"
    if is_strip and frames == height:
        raise FileFormatError(f"{path} would be {read}; it seems to be {remedy}")
    log.warning("%s is read as %s; if it is %s", path, read, remedy)


def check(
    path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> tuple[tuple[int, int, int], np.dtype[Any]]:
    """The shape (N, H, W) and the type that a movie stored like this is read as, or FileFormatError."""
    return _movie_shape(path, shape), _pixel_type(path, dtype)


def _movie_shape(path: Path, shape: tuple[int, ...]) -> tuple[int, int, int]:
    if len(shape) > 2 and shape[-1] in (3, 4):
        raise FileFormatError(
            f"{path} holds colour images {shape}, or a stack with frames last; "
            "emstream takes single-channel electron counts, frames first (N, H, W)"
        )
    if len(shape) not in (2, 3):
        raise FileFormatError(
            f"{path} holds {len(shape)}-D data {shape}; expected images (H, W) or movies (N, H, W)"
        )
    frames, height, width = shape if len(shape) == 3 else (1, *shape)
    if min(frames, height, width) < 1:
        raise FileFormatError(f"{path} has no frames: its shape is {shape}")
    return int(frames), int(height), int(width)


def _pixel_type(path: Path, stored: np.dtype[Any]) -> np.dtype[Any]:
    if stored.kind not in "buif":
        kind = {"c": "complex numbers", "O": "Python objects"}.get(stored.kind, "no numbers")
        raise FileFormatError(f"{path} holds {kind} ({stored}); expected counts as integers or real numbers")
    if stored.kind == "b":
        return np.dtype(np.uint8)
    if stored.itemsize > 8:
        return np.dtype(np.float64)
    name = stored.newbyteorder("=").name
    return PIXEL_TYPES.get(name, np.dtype(np.float32))


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()[:200] or 'no reason given'}"
