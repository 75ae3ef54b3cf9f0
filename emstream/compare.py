"""What goes into a talk: raw beside denoised, as a film (.mp4, .gif) or as a sheet of frames (.png).

Grey levels are the same all along: for each side those between the 0.5th and the 99.5th percentile of its
first frames, and for the raw side of its frames blurred to what an eye sees at a distance. A strip above the
two names them and the frame, which counts from 0; a scale bar is drawn where the pixel size is known.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import struct
from collections.abc import Generator
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from emstream.errors import FileFormatError
from emstream.movies import check_place

SUFFIXES = (".mp4", ".gif", ".png")
SHEET_FRAMES = 4
_LOOK_AT = 8  # frames, for the grey levels
_PERCENTILES = (0.5, 99.5)
_GAP_PX = 8
_WHITE, _PAPER = 255, 24
_LARGEST_SIDE_PX = 1024
_RATES = {".mp4": (0.01, 240.0), ".gif": (0.01, 50.0), ".png": (0.01, 240.0)}
"""[frames/s]; what shows a .gif takes at least 20 ms for each frame."""


def check_comparison(path: Path, overwrite: bool = False, rate: float = 10.0) -> None:
    """Raise FileFormatError for a path and ValueError for a `rate` [frames/s] that `Comparison` would refuse."""
    if path.suffix.lower() not in SUFFIXES:
        raise FileFormatError(f"{path}: a comparison is one of {', '.join(SUFFIXES)}, got {path.suffix!r}")
    check_place(path, overwrite)
    if importlib.util.find_spec("PIL") is None:
        raise FileFormatError(f"{path} needs the package pillow: pip install 'emstream[files]'")
    if path.suffix.lower() == ".mp4" and importlib.util.find_spec("av") is None:
        raise FileFormatError(f"{path} needs the package av: pip install 'emstream[files]'; .gif does not")
    low, high = _RATES[path.suffix.lower()]
    if not low <= rate <= high:
        raise ValueError(
            f"the rate of a {path.suffix} must be from {low:g} to {high:g} frames/s, got {rate:g} frames/s"
        )


class Comparison:
    """Takes pairs of frames in order; `path` appears when the ``with`` block ends without an error."""

    def __init__(
        self,
        path: Path,
        frames: int,
        *,
        rate: float = 10.0,
        pixel_size_m: float | None = None,
        overwrite: bool = False,
    ) -> None:
        """`frames` how many there will be; `rate` [frames/s] of the film."""
        check_comparison(path, overwrite, rate)
        self._path, self._rate, self._pixel_size_m = path, rate, pixel_size_m
        self._part = path.with_name(f".{path.stem}.part{path.suffix}")
        sheet = path.suffix.lower() == ".png"
        count = min(frames, SHEET_FRAMES)
        self._wanted = {round(n * (frames - 1) / max(count - 1, 1)) for n in range(count)} if sheet else None
        self._number, self._last = 0, frames - 1
        self._early: list[tuple[int, np.ndarray, np.ndarray]] = []
        self._levels: tuple[tuple[float, float], tuple[float, float]] | None = None
        self._tiles: list[np.ndarray] = []
        self._film: _Film | _Animation | None = None
        self._is_whole = False

    def add(self, raw: np.ndarray, denoised: np.ndarray) -> None:
        """The next frame, (H, W) each [electrons]."""
        number, self._number = self._number, self._number + 1
        if self._wanted is not None and number not in self._wanted:
            return
        if self._levels is None:
            self._early.append((number, raw.copy(), denoised.copy()))
            if len(self._early) < _LOOK_AT:
                return
        with _told(self._path):
            if self._early:
                self._begin()
            else:
                self._draw(number, raw, denoised)

    def finish(self) -> None:
        """After the last frame: write what is left. The file has another name until the ``with`` block ends.

        Raises FileFormatError when it cannot be written.
        """
        if not self._is_whole:
            with _told(self._path):
                self._begin()
                self._finish()
            self._is_whole = True

    def __enter__(self) -> Comparison:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.finish()
                with _told(self._path):
                    self._part.replace(self._path)
        finally:
            if self._film is not None:
                self._film.abandon()
            self._part.unlink(missing_ok=True)

    # -- drawing --------------------------------------------------------------------

    def _begin(self) -> None:
        """Fix the grey levels and draw what waited for them."""
        if self._levels is None and self._early:
            raw, denoised = (np.stack([pair[side] for pair in self._early]) for side in (1, 2))
            self._levels = _range(binned(raw, 4)), _range(denoised)
        early, self._early = self._early, []
        for pair in early:
            self._draw(*pair)

    def _draw(self, number: int, raw: np.ndarray, denoised: np.ndarray) -> None:
        assert self._levels is not None
        shrink = math.ceil(max(raw.shape) / _LARGEST_SIDE_PX)
        sides = [
            grey(binned(side, shrink), low, high)
            for side, (low, high) in zip((raw, denoised), self._levels, strict=True)
        ]
        if self._pixel_size_m:
            draw_scale_bar(sides[1], self._pixel_size_m * shrink)
        gap = np.full((sides[0].shape[0], _GAP_PX), _PAPER, np.uint8)
        picture = np.hstack([sides[0], gap, sides[1]])
        if (strip := titles(sides[0].shape, number, self._last)) is not None:
            picture = np.vstack([strip, picture])
        if self._path.suffix.lower() == ".png":
            self._tiles.append(picture)
            return
        if self._film is None:
            if min(sides[0].shape) < 2:
                raise FileFormatError(
                    f"{self._path}: a film takes frames of at least 2x2 px, got {raw.shape[0]}x{raw.shape[1]}; "
                    "a .png takes any"
                )
            kind = _Film if self._path.suffix.lower() == ".mp4" else _Animation
            self._film = kind(self._part, picture.shape, self._rate)
        self._film.add(picture)

    def _finish(self) -> None:
        from PIL import Image

        if self._film is not None:
            self._film.close()
            self._film = None
        else:
            gap = np.full((_GAP_PX, self._tiles[0].shape[1]), _PAPER, np.uint8)
            rows = [part for tile in self._tiles for part in (tile, gap)]
            Image.fromarray(np.vstack(rows[:-1])).save(self._part)


class _Film:
    """H.264, which every talk's software plays."""

    def __init__(self, path: Path, shape: tuple[int, ...], rate: float) -> None:
        import av

        self._av = av
        self._container: Any = av.open(str(path), "w")
        self._stream: Any = self._container.add_stream("h264", rate=Fraction(rate).limit_denominator(1000))
        self._stream.height, self._stream.width = (
            length - length % 2 for length in shape
        )  # it takes even ones
        self._stream.pix_fmt = "yuv420p"
        self._stream.options = {"crf": "18"}

    def add(self, picture: np.ndarray) -> None:
        even = np.ascontiguousarray(picture[: self._stream.height, : self._stream.width])
        frame = self._av.VideoFrame.from_ndarray(even, format="gray")
        self._container.mux(self._stream.encode(frame))

    def close(self) -> None:
        self._container.mux(self._stream.encode())
        self._container.close()

    def abandon(self) -> None:
        with contextlib.suppress(Exception):
            self._container.close()


class _Animation:
    """GIF89a without end, written frame by frame: Pillow's own way of writing one keeps them all."""

    def __init__(self, path: Path, shape: tuple[int, ...], rate: float) -> None:
        height, width = shape
        self._rate, self._number = rate, 0
        greys = bytes(level for level in range(256) for _ in "rgb")
        head = struct.pack("<6sHHBBB", b"GIF89a", width, height, 0xF7, 0, 0)
        for_ever = b"!\xff\x0bNETSCAPE2.0\x03\x01\0\0\0"
        self._file = path.open("wb")
        self._file.write(head + greys + for_ever)

    def add(self, picture: np.ndarray) -> None:
        from PIL import GifImagePlugin, Image

        start, end = (round(100 * n / self._rate) for n in (self._number, self._number + 1))  # [10 ms]
        self._number += 1
        parts = GifImagePlugin.getdata(Image.fromarray(picture), duration=10 * (end - start))
        self._file.writelines(parts)
        parts.clear()  # Pillow's cycle of references would keep it

    def close(self) -> None:
        self._file.write(b";")
        self._file.close()

    def abandon(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()


@contextlib.contextmanager
def _told(path: Path) -> Generator[None]:
    """What a library says when it cannot write, as a FileFormatError."""
    try:
        yield
    except FileFormatError:
        raise
    except Exception as error:  # av raises dozens of types
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise FileFormatError(f"{path} cannot be written: {reason}") from error


def binned(frames: np.ndarray, by: int) -> np.ndarray:
    """Means of `by` x `by` pixels of (..., H, W), float32; what is left at the end is cut off."""
    height, width = (length // by for length in frames.shape[-2:])
    if by == 1 or not height or not width:
        return frames.astype(np.float32)
    cut = frames[..., : height * by, : width * by].astype(np.float32)
    means: np.ndarray = cut.reshape(*frames.shape[:-2], height, by, width, by).mean(axis=(-3, -1))
    return means


def grey(frame: np.ndarray, low: float, high: float) -> np.ndarray:
    """(H, W) uint8, `low` black and `high` white."""
    scaled = (frame - low) * (255 / max(high - low, 1e-9))
    return np.clip(scaled, 0, 255).astype(np.uint8)


def titles(shape: tuple[int, ...], number: int, last: int) -> np.ndarray | None:
    """A strip (h, 2 W + gap) that names both sides, (H, W) each, and the frame.

    None where they are too small for the title of the `last` frame.
    """
    from PIL import Image, ImageDraw

    height, width = shape
    size = max(12, height // 32)
    strip = Image.new("L", (2 * width + _GAP_PX, 2 * (3 * size // 4)), _PAPER)  # even, as films like it
    pen = ImageDraw.Draw(strip)
    if height < 40 or pen.textlength(f"denoised   frame {last}", font_size=size) > width:
        return None
    for left, name in ((0, "raw"), (width + _GAP_PX, "denoised")):
        pen.text((left, size // 8), f"{name}   frame {number}", fill=_WHITE, font_size=size)
    return np.asarray(strip)


def draw_scale_bar(picture: np.ndarray, pixel_size_m: float) -> None:
    """A white bar of 1, 2 or 5 times a power of ten, about a fifth of the width, with its length [nm]."""
    from PIL import Image, ImageDraw

    height, width = picture.shape
    length_m = _round_length(0.2 * width * pixel_size_m)
    long = round(length_m / pixel_size_m)
    if long < 2 or height < 40:
        return
    image = Image.fromarray(picture)
    pen = ImageDraw.Draw(image)
    thick = max(2, height // 120)
    pen.rectangle((12, height - 12 - thick, 12 + long, height - 12), fill=_WHITE)
    size = max(12, height // 28)
    pen.text((12, height - 18 - thick - size), f"{length_m * 1e9:g} nm", fill=_WHITE, font_size=size)
    picture[:] = np.asarray(image)


def _round_length(length_m: float) -> float:
    power = 10.0 ** math.floor(math.log10(length_m))
    return next(step * power for step in (5, 2, 1) if step * power <= length_m * (1 + 1e-9))


def _range(frames: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(frames, _PERCENTILES)
    return float(low), float(high)
