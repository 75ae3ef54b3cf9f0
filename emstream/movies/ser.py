""".ser: a series of images as FEI's TIA writes it.

Little endian. The header: byte order 0x4949, series 0x0197, version, kind of data (0x4122 for images), kind of
tags, elements in all, valid elements, where the offsets are (4 bytes up to version 0x0210, 8 after that),
number of dimensions. There lie the offsets of all elements; at each, two calibrations (offset, step [m],
element), the pixels' type, their numbers across and down, and the pixels, the lowest row first. (TIA's help;
C. Boothroyd, "TIA (Emispec) file format".)
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np

from emstream.errors import FileFormatError
from emstream.movies.movie import Stored

_START = struct.Struct("<HHHIIII")
_ELEMENT = struct.Struct("<ddIddIHII")
_MAGIC = (0x4949, 0x0197)
_IMAGES = 0x4122
_LAST_SHORT_VERSION = 0x0210
_TYPES = {1: "<u1", 2: "<u2", 3: "<u4", 4: "<i1", 5: "<i2", 6: "<i4", 7: "<f4", 8: "<f8"}


def read(path: Path, dataset: str | None) -> Stored:
    if dataset is not None:
        raise FileFormatError(f"{path} is one series: there is no dataset {dataset!r} to choose")
    file = path.open("rb", buffering=0)

    def take(offset: int, nbytes: int) -> bytes:
        size = os.fstat(file.fileno()).st_size
        if size < offset + nbytes:
            raise ValueError(f"it is cut short: {size} bytes of {offset + nbytes}")
        file.seek(offset)
        found = file.read(nbytes)
        if len(found) < nbytes:
            raise EOFError("the file was cut short while it was read")
        return found

    try:
        order, series, version, kind, _, total, valid = _START.unpack(take(0, _START.size))
        if (order, series) != _MAGIC:
            raise ValueError("it does not begin as a series of TIA does")
        if kind != _IMAGES:
            raise FileFormatError(f"{path} holds spectra; emstream takes images")
        word = "<u4" if version <= _LAST_SHORT_VERSION else "<u8"
        size = np.dtype(word).itemsize
        (offsets_at,) = np.frombuffer(take(_START.size, size), word).tolist()
        if not 0 < valid <= total:
            raise FileFormatError(f"{path} has no frames: {valid} valid of {total}")
        offsets = np.frombuffer(take(offsets_at, valid * size), word).tolist()
        _, step_m, _, _, _, _, code, across, down = _ELEMENT.unpack(take(offsets[0], _ELEMENT.size))
        if code not in _TYPES:
            raise FileFormatError(
                f"{path} holds pixels of TIA's type {code}; expected {min(_TYPES)}-{max(_TYPES)}"
            )
        dtype = np.dtype(_TYPES[code])

        def frame(i: int) -> np.ndarray:
            *_, own_code, width, height = _ELEMENT.unpack(take(offsets[i], _ELEMENT.size))
            if (own_code, width, height) != (code, across, down):
                raise ValueError(
                    f"it is {height}x{width} of type {own_code}, the first {down}x{across} of {code}"
                )
            pixels = take(offsets[i] + _ELEMENT.size, across * down * dtype.itemsize)
            return np.frombuffer(pixels, dtype).reshape(down, across)[::-1]

        shape = (down, across) if valid == 1 else (valid, down, across)
        return Stored(shape=shape, dtype=dtype, frame=frame, close=file.close, pixel_size_m=abs(step_m))
    except BaseException:
        file.close()
        raise
