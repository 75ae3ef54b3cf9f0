"""Compressed pixels, written straight into the frame's row.

LZ4 and bitshuffle-LZ4 are framed as in HDF5: ``[bytes of pixels, >u8][bytes of a block, >u4]``, then
each block behind its compressed size, >u4; `framed` puts that around bytes that come without. Blosc has
a frame of its own, and numcodecs undoes it. The library of DECTRIS does the rest. From Python it only makes
bytes of its own, a copy that costs as much as the rest at thousands of frames per second, so its
C function is called where it can be: `_into_place` checks once that it does what Python's does.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from emstream.errors import MalformedFrame, SourceError

HEADER = struct.Struct(">QI")
ALGORITHMS = {"bslz4": 0, "lz4": 1}  # as the C function numbers them
BLOSC = "blosc"
_BLOSC_HEADER = struct.Struct("<4B3I")  # versions, flags, bytes of a value; bytes of pixels, block, all of it
_SHUFFLED_BLOCK = 8192  # [bytes], bitshuffle's own choice
_LARGEST_BLOCK = 16 * 1024**2
_MOST_FROM_A_BYTE = 255  # what LZ4 can make of one
_Decompress = Callable[[str, np.ndarray, int, np.ndarray], int]


def framed(algorithm: str, data: bytes | memoryview, nbytes: int) -> bytes | memoryview:
    """`data`, of LZ4 or bitshuffle-LZ4, with the frame that `check` and `decompress` want.

    Without one, LZ4 is a single block, and bitshuffle's blocks have their usual size.
    """
    if len(data) >= HEADER.size and HEADER.unpack_from(data)[0] == nbytes:
        return data
    if nbytes >= 2**31:
        raise MalformedFrame("compressed pixels without a frame around them must be less than 2 GiB")
    if algorithm == "bslz4":
        return HEADER.pack(nbytes, _SHUFFLED_BLOCK) + bytes(data)
    return HEADER.pack(nbytes, nbytes) + struct.pack(">I", len(data)) + bytes(data)


def check(algorithm: str, data: bytes | memoryview, nbytes: int) -> None:
    """Refuse a payload whose own header does not promise `nbytes`, or that cannot hold them."""
    if algorithm == BLOSC:
        _check_blosc(data, nbytes)
        return
    if len(data) < HEADER.size:
        raise MalformedFrame("compressed pixels are shorter than their header")
    promised, block = HEADER.unpack_from(data)
    if promised != nbytes:
        raise MalformedFrame("compressed pixels and the frame's size disagree")
    if not 0 < block <= _LARGEST_BLOCK and not 0 < block <= nbytes:
        raise MalformedFrame("compressed pixels come in blocks of an impossible size")
    if nbytes > _MOST_FROM_A_BYTE * len(data):
        raise MalformedFrame("compressed pixels are too short for the frame's size")


def decompress(algorithm: str, data: bytes | memoryview, element: int, out: np.ndarray) -> None:
    """Write the pixels in `data` into `out`, C-contiguous, of any shape and type.

    `check` has let `data` pass; `element` [bytes] is what bitshuffle shuffled. Raises MalformedFrame
    when `data` is not whole.
    """
    if algorithm == BLOSC:
        _decompress_blosc(data, out)
        return
    if algorithm not in ALGORITHMS:
        raise MalformedFrame(f"compression must be one of {', '.join(ALGORITHMS)}, or none")
    if algorithm == "bslz4" and element not in (1, 2, 4, 8):
        raise MalformedFrame("bitshuffle's element must have 1, 2, 4 or 8 bytes")
    if _best()(algorithm, np.frombuffer(data, np.uint8), element, out) != out.nbytes:
        raise MalformedFrame("compressed pixels are damaged")


def _check_blosc(data: bytes | memoryview, nbytes: int) -> None:
    if len(data) < _BLOSC_HEADER.size:
        raise MalformedFrame("compressed pixels are shorter than their header")
    *_, promised, block, whole = _BLOSC_HEADER.unpack_from(data)
    if promised != nbytes:
        raise MalformedFrame("compressed pixels and the frame's size disagree")
    if whole != len(data):
        raise MalformedFrame("compressed pixels are not as long as they say")
    if not 0 < block <= max(nbytes, _LARGEST_BLOCK):
        raise MalformedFrame("compressed pixels come in blocks of an impossible size")


def _decompress_blosc(data: bytes | memoryview, out: np.ndarray) -> None:
    try:
        from numcodecs import blosc
    except ImportError:
        raise SourceError(
            "this camera compresses its frames with blosc, which needs: pip install 'emstream[cameras]'"
        ) from None
    try:
        blosc.decompress(data, out.reshape(-1).view(np.uint8))
    except (RuntimeError, ValueError):
        raise MalformedFrame("compressed pixels are damaged") from None


@functools.cache
def _best() -> _Decompress:
    """The way without a copy where it works, else the one with."""
    try:
        import dectris.compression as library
    except ImportError:
        raise SourceError(
            "this camera compresses its frames, which needs: pip install 'emstream[cameras]'"
        ) from None

    def by_copy(algorithm: str, data: np.ndarray, element: int, out: np.ndarray) -> int:
        try:
            pixels = library.decompress(data, algorithm, elem_size=element)
        except RuntimeError:
            return -1
        if len(pixels) == out.nbytes:
            out.reshape(-1).view(np.uint8)[:] = np.frombuffer(pixels, np.uint8)
        return len(pixels)

    return _into_place(library, by_copy) or by_copy


def _into_place(library: Any, by_copy: _Decompress) -> _Decompress | None:
    """The library's C function, if it is to be had and agrees with Python's on a sample."""
    try:
        function = ctypes.CDLL(library.__file__).compression_decompress_buffer
    except (OSError, AttributeError):  # Windows does not export it
        return None
    function.restype = ctypes.c_size_t
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    function.argtypes = [ctypes.c_int, pointer, size, pointer, size, size]

    def into(algorithm: str, data: np.ndarray, element: int, out: np.ndarray) -> int:
        to, packed = _address(out), _address(data)
        done: int = function(ALGORITHMS[algorithm], to, out.nbytes, packed, data.nbytes, element)
        return done

    for algorithm in ALGORITHMS:
        sample = np.frombuffer(_sample(), np.uint8)
        ours, theirs = np.zeros(64, np.uint8), np.zeros(64, np.uint8)
        if (
            into(algorithm, sample, 2, ours) != by_copy(algorithm, sample, 2, theirs)
            or (ours != theirs).any()
        ):
            return None
    return into


def _address(array: np.ndarray) -> int:
    """As `array.ctypes.data`, in two thirds of its time."""
    address: int = array.__array_interface__["data"][0]
    return address


def _sample() -> bytes:
    """64 bytes, 0-63, as one block of LZ4 that is all literals."""
    block = bytes([0xF0, 64 - 15, *range(64)])
    return HEADER.pack(64, 64) + struct.pack(">I", len(block)) + block
