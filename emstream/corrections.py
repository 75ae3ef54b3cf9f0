"""What is done to every frame before the engine sees it, whatever camera it came from.

In this order, each only when asked for::

    mask                 bad pixels take the value of a good neighbour
    region of interest   rows and columns that are kept
    offset, offset map   subtracted [ADU]
    gain                 divided by [ADU per electron]
    gain map, flat field divided by, pixel by pixel
    binning              squares of pixels added up

Without arithmetic (region and mask) a frame keeps its type; otherwise it becomes float32. The
result is written once, into the frame's row of the ring, and the header says what was done.
"""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from emstream.badpixels import BadPixels
from emstream.errors import MalformedFrame
from emstream.frame import FrameHeader

_Shape = tuple[int, int]
_KEY = "corrections"
_SMALLEST, _LARGEST = 1e-9, 1e12  # what is divided by and subtracted: integers stay finite in float32


def check_calibration(gain: float, offset: float) -> None:
    """Refuse a gain [ADU per electron] or an offset [ADU] that no camera has."""
    if not (math.isfinite(gain) and gain > 0):
        raise ValueError(f"gain must be positive, got {gain} ADU per electron")
    if not _SMALLEST <= gain <= _LARGEST:
        raise ValueError(f"gain must lie in {_SMALLEST:g}-{_LARGEST:g} ADU per electron, got {gain}")
    if not math.isfinite(offset):
        raise ValueError(f"offset must be a number, got {offset} ADU")
    if abs(offset) > _LARGEST:
        raise ValueError(f"offset must lie within {_LARGEST:g} ADU of 0, got {offset}")


@dataclass(frozen=True)
class Region:
    """A rectangle of the camera's frame [px]."""

    height: int
    width: int
    top: int = 0
    left: int = 0

    def __str__(self) -> str:
        return f"{self.height}x{self.width}+{self.top}+{self.left}"

    @classmethod
    def of(cls, text: str) -> Region:
        """From ``512x512+64+128``: rows x columns + top + left."""
        match = re.fullmatch(r"(\d+)x(\d+)\+(\d+)\+(\d+)", text)
        if not match or 0 in (int(match[1]), int(match[2])):
            raise ValueError(
                f"roi must look like 512x512+64+128 (rows x columns + top + left) [px], got {text!r}"
            )
        return cls(*(int(number) for number in match.groups()))


class Corrections:
    """One camera's corrections, ready for frame after frame."""

    def __init__(
        self,
        *,
        gain: float = 1.0,
        offset: float = 0.0,
        offset_map: np.ndarray | None = None,
        gain_map: np.ndarray | None = None,
        flat_field: np.ndarray | None = None,
        mask: np.ndarray | None = None,
        binning: int = 1,
        roi: Region | None = None,
    ) -> None:
        """`gain` [ADU per electron], `offset` [ADU].

        The maps are (H, W) of the camera's whole frame: `offset_map` [ADU] on top of `offset`,
        `gain_map` [ADU per electron] on top of `gain`, `flat_field` in any unit, since its mean over
        good pixels is made 1, `mask` bad where it is not 0. Pixels where the offset map is no number,
        or one of the others is not positive, are bad, too.
        """
        check_calibration(gain, offset)
        if binning < 1:
            raise ValueError(f"binning must be at least 1 pixel, got {binning}")
        self._roi, self._binning = roi, binning
        maps = {"offset_map": offset_map, "gain_map": gain_map, "flat_field": flat_field, "mask": mask}
        self._maps_shape = _common_shape({name: each for name, each in maps.items() if each is not None})
        bad = np.zeros(self._maps_shape or (1, 1), bool) if mask is None else mask != 0
        for name in ("offset_map", "gain_map", "flat_field"):
            if maps[name] is not None:
                bad = bad | _unusable(name, maps[name])
        self._bad = BadPixels(bad) if bad.any() else None
        self._offset: np.ndarray | np.float32 = np.float32(offset)
        if offset_map is not None:
            self._offset = self._offset + np.where(bad, 0, offset_map).astype(np.float32)
        self._divisor: np.ndarray | np.float32 = np.float32(gain)
        if gain_map is not None:
            self._divisor = self._divisor * np.where(bad, 1, gain_map).astype(np.float32)
        if flat_field is not None:
            level = float(np.mean(flat_field[~bad], dtype=np.float64))
            self._divisor = self._divisor * np.where(bad, 1, flat_field / level).astype(np.float32)
        # A neighbour's count goes with the neighbour's offset and gain.
        if self._bad and isinstance(self._offset, np.ndarray):
            self._bad.fill(self._offset)
        if self._bad and isinstance(self._divisor, np.ndarray):
            self._bad.fill(self._divisor)
            self._divisor[self._divisor == 0] = 1
        self._divides = gain != 1.0 or isinstance(self._divisor, np.ndarray)
        self._calibrates = self._divides or offset != 0.0 or offset_map is not None
        self._to_electrons = gain != 1.0 or offset != 0.0 or gain_map is not None or offset_map is not None
        self.computes = self._calibrates or binning > 1
        """Whether frames become float32."""
        self.moves = self.computes or roi is not None
        """Whether the result is written elsewhere than the camera's pixels."""
        self._record = {
            **({"gain": gain} if gain != 1.0 else {}),
            **({"offset": offset} if offset != 0.0 else {}),
            **({"binning": binning} if binning > 1 else {}),
            **({"roi": str(roi)} if roi else {}),
            **({"bad_pixels": len(self._bad)} if self._bad else {}),
            **{name: _fingerprint(each) for name, each in maps.items() if each is not None},
        }

    def shape_of(self, shape: _Shape) -> _Shape:
        """(H, W) of what comes of a camera's frame of `shape`. Raises MalformedFrame where nothing can."""
        if self._maps_shape not in (None, shape):
            assert self._maps_shape
            raise MalformedFrame(
                f"frame of {shape[0]}x{shape[1]} pixels does not fit the mask or the maps, "
                f"which are {self._maps_shape[0]}x{self._maps_shape[1]}"
            )
        height, width = shape
        if self._roi:
            if self._roi.top + self._roi.height > height or self._roi.left + self._roi.width > width:
                raise MalformedFrame(f"region {self._roi} reaches beyond a frame of {height}x{width} pixels")
            height, width = self._roi.height, self._roi.width
        if height < self._binning or width < self._binning:
            raise MalformedFrame(f"frame of {height}x{width} pixels is too small for bins of {self._binning}")
        return height // self._binning, width // self._binning

    def type_of(self, dtype: np.dtype[Any]) -> np.dtype[Any]:
        return np.dtype(np.float32) if self.computes else dtype

    def apply(self, pixels: np.ndarray, row: np.ndarray) -> None:
        """Write what comes of `pixels` (H, W), which are spoilt, into `row`, (H, W) as `shape_of` says.

        Both are the same array unless `moves`.
        """
        if self._bad or self.moves:
            with np.errstate(over="ignore", invalid="ignore"):
                self._apply(pixels, row)

    def _apply(self, pixels: np.ndarray, row: np.ndarray) -> None:
        if self._bad:
            self._bad.fill(pixels)
        if not self.moves:
            return
        offset, divisor = self._offset, self._divisor
        if self._roi:
            window = np.s_[
                self._roi.top : self._roi.top + self._roi.height,
                self._roi.left : self._roi.left + self._roi.width,
            ]
            pixels = pixels[window]
            offset = offset[window] if isinstance(offset, np.ndarray) else offset
            divisor = divisor[window] if isinstance(divisor, np.ndarray) else divisor
        if self._binning > 1:
            if self._calibrates:
                electrons = np.empty(pixels.shape, np.float32)
                self._calibrate(pixels, offset, divisor, electrons)
                pixels = electrons
            _bin(pixels, self._binning, row)
        elif self.computes:
            self._calibrate(pixels, offset, divisor, row)
        else:
            np.copyto(row, pixels)

    def header(self, header: FrameHeader) -> FrameHeader:
        """The header of what `apply` made of that frame."""
        if not self._record:
            return header
        before = header.extra.get(_KEY)
        done = [*(before if isinstance(before, list) else []), self._record]
        size = header.pixel_size_m
        return replace(
            header,
            shape=self.shape_of(header.shape),
            type=self.type_of(header.dtype).name,
            units="electrons" if self._to_electrons else header.units,
            pixel_size_m=None if size is None else size * self._binning,
            extra={**header.extra, _KEY: done},
        )

    def _calibrate(
        self,
        pixels: np.ndarray,
        offset: np.ndarray | np.float32,
        divisor: np.ndarray | np.float32,
        out: np.ndarray,
    ) -> None:
        np.subtract(pixels, offset, out=out, casting="unsafe")
        if self._divides:
            np.divide(out, divisor, out=out)


def _bin(pixels: np.ndarray, size: int, out: np.ndarray) -> None:
    """Add up squares of `size` x `size` pixels into `out`; what does not fill a square is left out."""
    height, width = out.shape
    pixels = pixels[: height * size, : width * size]
    # Whole rows first: they lie side by side in memory.
    rows = np.add(pixels[0::size], pixels[1::size], dtype=np.float32)
    for n in range(2, size):
        np.add(rows, pixels[n::size], out=rows, casting="unsafe")
    np.add(rows[:, 0::size], rows[:, 1::size], out=out)
    for n in range(2, size):
        np.add(out, rows[:, n::size], out=out)


def _common_shape(maps: dict[str, np.ndarray]) -> _Shape | None:
    shapes = {name: each.shape for name, each in maps.items()}
    if any(len(shape) != 2 for shape in shapes.values()) or len(set(shapes.values())) > 1:
        sizes = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in shapes.items())
        raise ValueError(f"mask and maps must have the rows and columns of the camera's frame, got {sizes}")
    return next(iter(shapes.values()), None)


def _unusable(name: str, values: np.ndarray | None) -> np.ndarray:
    assert values is not None
    usable: np.ndarray = np.isfinite(values) & (np.abs(values) <= _LARGEST)
    wanted = "a number"
    if name != "offset_map":
        usable, wanted = usable & (values >= _SMALLEST), "positive"
    if not usable.any():
        raise ValueError(f"{name.replace('_', ' ')} must be {wanted} somewhere, got no such pixel")
    return ~usable


def _fingerprint(values: np.ndarray) -> str:
    """The first half of the SHA-256 of the values, by which to find the file again."""
    return hashlib.sha256(values.tobytes()).hexdigest()[:32]
