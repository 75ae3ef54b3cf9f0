"""From pixels as a camera packs them to a row of the ring."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np

from emstream.badpixels import BadPixels
from emstream.errors import MalformedFrame
from emstream.frame import PIXEL_TYPES, FrameHeader
from emstream.intake import Intake
from emstream.sources.compressed import check, decompress

log = logging.getLogger(__name__)

SUM = "sum"
_SUM_TYPES = {"uint8": "uint16", "int8": "int16", "uint16": "uint32", "int16": "int32", "float32": "float32"}


@dataclass(slots=True)
class Array:
    """The pixels of one channel, still as they came."""

    shape: tuple[int, int]
    """(H, W)"""
    type: str
    endianness: str
    algorithm: str | None
    element: int
    """What bitshuffle shuffled [bytes]."""
    data: bytes | memoryview
    column_major: bool = False

    @property
    def nbytes(self) -> int:
        return self.shape[0] * self.shape[1] * PIXEL_TYPES[self.type].itemsize

    def check(self, max_frame_bytes: int) -> None:
        """Refuse what is too large, or cannot be all there."""
        if self.nbytes > max_frame_bytes:
            raise MalformedFrame(f"array is larger than the limit of {max_frame_bytes} bytes")
        if self.algorithm is not None:
            check(self.algorithm, self.data, self.nbytes)
        elif len(self.data) != self.nbytes:
            raise MalformedFrame("pixels and the frame's size disagree")

    def write(self, out: np.ndarray) -> None:
        """Write the pixels into `out` (H, W) of this type, in the byte order they came in."""
        if self.column_major:
            turned = np.empty(self.shape[::-1], out.dtype)
            self._write_rows(turned)
            out[...] = turned.T
        else:
            self._write_rows(out)

    def read(self) -> np.ndarray:
        """The pixels (H, W), in memory of their own and this machine's byte order."""
        pixels = np.empty(self.shape, PIXEL_TYPES[self.type])
        self.write(pixels)
        return pixels.byteswap(inplace=True) if self.endianness == "big" else pixels

    def _write_rows(self, out: np.ndarray) -> None:
        if self.algorithm is None:
            out.reshape(-1).view(np.uint8)[:] = np.frombuffer(self.data, np.uint8)
        else:
            decompress(self.algorithm, self.data, self.element, out)


class Delivery:
    """Hands frames to the intake, without their bad pixels.

    Those are what the mask of the series says, or, where it says nothing, the pixels without data
    in the first frame of the series.
    """

    def __init__(self, largest_is_no_data: bool = True) -> None:
        """`largest_is_no_data`: what the largest value of an unsigned type stands for."""
        self._largest_is_no_data = largest_is_no_data
        self._masks: dict[str, Array] = {}
        self._bad: BadPixels | None = None
        self._bad_of: tuple[str, tuple[int, int]] | None = None  # channel and size that these are of
        self._proven: tuple[tuple[int, int], str] | None = None  # size and type of the last whole frame

    def begin(self, masks: dict[str, Array] | None = None) -> None:
        """Another series, with a mask (H, W) for each channel, bad where it is not 0.

        Raises MalformedFrame for one that is not whole. They are kept as they came: one that is unpacked may
        be 255 times as large.
        """
        self._masks, self._bad_of = {}, None
        for mask in (masks or {}).values():
            mask.read()
        self._masks = masks or {}

    def deliver(self, channel: str, arrays: list[Array], header: FrameHeader, intake: Intake) -> None:
        """One frame: one array, or several of a size and type to be added up.

        Size, type and byte order of `header` are set here. Raises MalformedFrame before the frame is
        offered; afterwards it is refused.
        """
        header.shape = arrays[0].shape
        header.type, header.endianness = arrays[0].type, arrays[0].endianness
        if len(arrays) > 1:
            header.type, header.endianness = _SUM_TYPES.get(arrays[0].type, "float64"), "little"
            if any((each.shape, each.type) != (arrays[0].shape, arrays[0].type) for each in arrays):
                raise MalformedFrame("channels to be added up differ in size or type")
        if (header.shape, header.type) == self._proven:
            row = intake.offer(header)
            if row is None:
                return
            try:
                self._write(channel, arrays, header, row)
            except MalformedFrame as error:
                intake.refuse(str(error))
            else:
                intake.accept()
            return
        # The first frame of a size or type: no place in the ring is made on its header's word alone.
        pixels = np.empty(header.shape, header.dtype)
        self._write(channel, arrays, header, pixels)
        row = intake.offer(header)
        if row is not None:
            np.copyto(row, pixels)
            intake.accept()
            self._proven = (header.shape, header.type)

    def _write(self, channel: str, arrays: list[Array], header: FrameHeader, row: np.ndarray) -> None:
        if len(arrays) == 1:
            arrays[0].write(row)
            images = [row]
        else:
            images = [each.read() for each in arrays]
            np.add.reduce(images, axis=0, dtype=row.dtype, out=row)
        if self._bad_of != (channel, row.shape):
            self._bad, self._bad_of = self._find_bad(channel, images), (channel, row.shape)
        if self._bad is not None:
            self._bad.fill(row)
            header.extra["bad_pixels"] = len(self._bad)

    def _find_bad(self, channel: str, images: list[np.ndarray]) -> BadPixels | None:
        shape = images[0].shape
        masks = list(self._masks.values()) if channel == SUM else [self._masks.get(channel)]
        known = [mask for mask in masks if mask is not None and mask.shape == shape]
        if len(known) < len(self._masks if channel == SUM else self._masks.keys() & {channel}):
            log.warning(
                "the detector's pixel mask does not fit its frames of %dx%d and is left aside; pixels at the largest "
                "value of the first frame count as bad instead", *shape
            )  # fmt: skip
            known = []
        bad = np.zeros(shape, bool)
        for mask in known:
            bad |= mask.read() != 0
        if not known and self._largest_is_no_data:
            for image in images:
                bad |= _without_data(image)
        return _bad_pixels(bad)


def _bad_pixels(mask: np.ndarray) -> BadPixels | None:
    bad = int(np.count_nonzero(mask))
    if 2 * bad > mask.size:
        log.warning("the detector's pixel mask is left aside: %d of its %d pixels are bad", bad, mask.size)
        return None
    return BadPixels(mask) if bad else None


def _without_data(pixels: np.ndarray) -> np.ndarray:
    """(H, W) bool: the pixels that DECTRIS marks by the largest value of their type."""
    if pixels.dtype.kind != "u":
        return np.zeros(pixels.shape, bool)
    marked: np.ndarray = pixels == np.iinfo(pixels.dtype).max
    return marked
