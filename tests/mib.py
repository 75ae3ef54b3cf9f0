"""Messages of Merlin's stream, written out as its headers have them."""

from __future__ import annotations

from typing import Any

import numpy as np

_CHIP = "3RX,175,511,000,000,000,000,000,000,125,255,125,125,"
_CHIP += "100,100,082,100,087,030,128,004,255,129,128,176,168,511,511"
_THRESHOLDS = ",".join(["1.200000E+2"] * 8)
_TAKEN = "2026-03-01T12:00:00.000000005Z"


def message(payload: bytes) -> bytes:
    return b"MPX,%010d," % (len(payload) + 1) + payload


def acquisition(frames: int = 100, **fields: Any) -> bytes:
    lines = {
        "Time and Date Stamp (day, mnth, yr, hr, min, s)": "01/03/2026 12:00:00",
        "Chip ID": "W529_F5,-,-,-",
        "Counter Depth (number)": "12",
        "Frames in Acquisition (Number)": frames,
        "Readout System": "Merlin Quad",
    }
    text = (
        "HDR,\t\r\n" + "".join(f"{name}:\t{value}\r\n" for name, value in (lines | fields).items()) + "End\t"
    )
    return message(text.encode("latin1").ljust(2044))


def header(number: int, shape: tuple[int, int], kind: str, *, bits: int = 12, chips: int = 1, layout: str = "   1x1",
           size: int = 384, offset: int | None = None, extended: bool = True) -> bytes:  # fmt: skip
    begin = f"MQ1,{number:06d},{size if offset is None else offset:05d},{chips:02d},{shape[1]:04d},{shape[0]:04d},"
    taken = "01,2026-03-01 12:00:00.000000,0.001000,0,0,0"
    text = f"{begin}{kind},{layout},{taken},{_THRESHOLDS},{','.join([_CHIP] * chips)},"
    if kind == "R64":
        text = f"{begin}{kind},{layout},{taken},,"
    if extended:
        text += f"MQ1A,{_TAKEN},1000000ns,{bits},"
    return text.encode().ljust(size, b"\0")


def image(number: int, pixels: np.ndarray, **about: Any) -> bytes:
    """A frame of unsigned counts, numbered as the camera is told to."""
    kind = {1: "U08", 2: "U16", 4: "U32"}[pixels.dtype.itemsize]
    big = pixels.astype(pixels.dtype.newbyteorder(">"))
    return message(header(number, pixels.shape, kind, **about) + big.tobytes())


def raw(number: int, pixels: np.ndarray, bits: int, chips: int = 1) -> bytes:
    """A frame as the chips are read, packed word by word."""
    height, width = pixels.shape
    shape = (height, width)
    if chips == 4:
        half, side = height // 2, width // 2
        lower = pixels[:half:-1] if height % 2 else pixels[half:][::-1]
        rows = [
            np.concatenate([lower[y, side:][::-1], lower[y, :side][::-1], pixels[y, side:], pixels[y, :side]])
            for y in range(half)
        ]
        pixels, shape = np.array(rows), (half, 4 * side)
    if bits == 24:
        shape = (height, 2 * width)
        body = _words(pixels >> 12, 12) + _words(pixels & 0xFFF, 12)
    else:
        body = _words(pixels, bits)
    layout = "   2x2" if chips == 4 else "   1x1"
    return message(header(number, shape, "R64", bits=bits, chips=chips, layout=layout, size=768) + body)


def _words(pixels: np.ndarray, bits: int) -> bytes:
    """64 bits at a time, the first pixel lowest."""
    step = {1: 1, 6: 8, 12: 16}[bits]
    per_word, words = 64 // step, []
    flat = [int(value) for value in pixels.reshape(-1)]
    for at in range(0, len(flat), per_word):
        word = sum(value << (step * n) for n, value in enumerate(flat[at : at + per_word]))
        words.append(word.to_bytes(8, "big"))
    return b"".join(words)
