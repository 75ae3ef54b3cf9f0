"""Movies on disk, read and written frame by frame: .npy, .tif, .h5 and .mrc.

Others are read only: .ser, .emd, and .dm3, .dm4 and more with the optional package of `rosetta`.

::

    with open_movie("run7.mrc") as movie:
        for counts in movie:
            ...

Shapes: N frames of H rows and W columns; an image (H, W) is a movie of one frame.
Each format is a module here with `read` and `write`; whatever goes wrong in them
comes out as a FileFormatError with the path and what to do about it.
"""

from __future__ import annotations

import importlib
import operator
import secrets
from collections.abc import Generator, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from emstream.errors import FileFormatError
from emstream.frame import PIXEL_TYPES
from emstream.movies.movie import Movie
from emstream.movies.rosetta import READERS

__all__ = ["READABLE", "Movie", "check_output", "open_movie", "save_movie"]

SUFFIXES = {
    ".npy": "npy",
    ".tif": "tiff",
    ".tiff": "tiff",
    ".h5": "hdf5",
    ".hdf5": "hdf5",
    ".mrc": "mrc",
}
READ_ONLY = {".ser": "ser", ".emd": "emd", **dict.fromkeys(READERS, "rosetta")}
READABLE = tuple(SUFFIXES | READ_ONLY)
"""Suffixes of what `open_movie` takes."""


def open_movie(path: str | Path, dataset: str | None = None) -> Movie:
    """Open a movie (N, H, W) or an image (H, W); the frames are read when asked for.

    `dataset` chooses among several in one file: an HDF5 dataset's name, a TIFF series' number.
    Without it, an HDF5 file must hold one numeric 2-D or 3-D dataset, or one of the name movie,
    frames, data or images, or name a NeXus default, as recordings do: their raw frames.

    Raises FileFormatError for a file that is missing, corrupt, cut short, empty, of an unknown
    suffix, or not of single-channel real numbers.
    """
    path = Path(path)
    form = _format(path, SUFFIXES | READ_ONLY)
    if not path.exists():
        raise FileFormatError(f"{path} does not exist; is the path right?")
    if not path.is_file():
        raise FileFormatError(f"{path} is not a file; name the movie itself")
    try:
        stored = form.read(path, dataset)
    except FileFormatError:
        raise
    except PermissionError:
        raise FileFormatError(f"{path} cannot be read: permission denied; ask its owner") from None
    except Exception as error:  # each library raises its own dozen types on a corrupt file
        raise FileFormatError(
            f"{path} cannot be read as {path.suffix}: {_first_line(error)}; is the file whole? Copy it again"
        ) from None
    movie = Movie(path, stored)
    try:
        movie[0]  # a missing codec, or a file that only looks like a movie, shows here and not minutes later
    except BaseException:
        movie.close()
        raise
    return movie


def save_movie(
    path: str | Path,
    frames: Iterable[np.ndarray],
    *,
    shape: tuple[int, int, int],
    dtype: DTypeLike = np.float32,
    pixel_size_m: float | None = None,
    units: str = "electrons",
    provenance: Mapping[str, Any] | None = None,
    as_image: bool = False,
    overwrite: bool = False,
) -> None:
    """Write `frames`, each (H, W), one by one to a file of `shape` (N, H, W) whose suffix names the format.

    The file appears under its name when it is whole, never before: should anything raise,
    `frames` included, nothing is left behind. `provenance` (numbers, texts and maps of them)
    goes into the JSON description of a .tif, the attributes of a .h5 and the labels of a
    .mrc, which hold its engine only; .npy has no place for it, nor for `pixel_size_m` [m].

    `as_image` writes the only frame as an image (H, W).

    Raises FileFormatError when the file cannot be written, or exists and `overwrite` is not
    set; ValueError when `frames` are not what `shape` and `dtype` announce.
    """
    path, dtype = Path(path), np.dtype(dtype).newbyteorder("=")
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"shape must be (frames, rows, columns), got {shape}")
    if dtype.name not in PIXEL_TYPES:
        raise ValueError(f"dtype must be one of {', '.join(PIXEL_TYPES)}, got {dtype}")
    shape = operator.index(shape[0]), operator.index(shape[1]), operator.index(shape[2])
    if as_image and shape[0] != 1:
        raise ValueError(f"an image has one frame, got {shape[0]}")
    check_output(path, overwrite)
    about = {"units": units, **({"pixel_size_m": pixel_size_m} if pixel_size_m else {}), **(provenance or {})}
    part = path.with_name(f".emstream-{secrets.token_hex(8)}.part")
    pending = _checked(frames, shape, dtype)
    try:
        _format(path, SUFFIXES).write(part, path, pending, shape[1:] if as_image else shape, dtype, about)
        for _ in pending:  # a format may stop at the last frame; one too many raises here
            pass
        part.replace(path)
    except OSError as error:
        raise FileFormatError(f"{path} cannot be written: {error.strerror or _first_line(error)}") from None
    finally:
        pending.close()
        part.unlink(missing_ok=True)


def check_output(path: Path, overwrite: bool = False) -> None:
    """Raise FileFormatError for a path that `save_movie` would refuse."""
    _format(path, SUFFIXES)
    check_place(path, overwrite)


def check_place(path: Path, overwrite: bool = False) -> None:
    """Raise FileFormatError where no file can be written, or one is there already."""
    if not path.parent.is_dir():
        raise FileFormatError(f"{path} cannot be written: there is no folder {path.parent}; make it first")
    if path.is_dir():
        raise FileFormatError(f"{path} cannot be written: it is a folder; name a file")
    if path.exists() and not overwrite:
        raise FileFormatError(f"{path} exists already; choose another name or allow it to be overwritten")


def _format(path: Path, known: Mapping[str, str]) -> ModuleType:
    """The module for a path's suffix; only the library of that one format is imported."""
    name = known.get(path.suffix.lower())
    if name is None:
        raise FileFormatError(f"{path}: the suffix must be one of {', '.join(known)}, got {path.suffix!r}")
    return importlib.import_module(f"emstream.movies.{name}")


def _checked(
    frames: Iterable[np.ndarray], shape: tuple[int, int, int], dtype: np.dtype[Any]
) -> Generator[np.ndarray]:
    """Pass on exactly N frames (H, W), contiguous and of `dtype`."""
    count = 0
    for frame in frames:
        if count == shape[0]:
            raise ValueError(f"more than the {shape[0]} frames that were announced")
        if frame.shape != shape[1:]:
            raise ValueError(f"frame {count} must be {shape[1]}x{shape[2]}, got shape {frame.shape}")
        if not np.can_cast(frame.dtype, dtype, "same_kind"):
            raise ValueError(f"frame {count} must be {dtype}, got {frame.dtype}")
        yield np.ascontiguousarray(frame, dtype)
        count += 1
    if count < shape[0]:
        raise ValueError(f"{count} frames of the {shape[0]} that were announced")


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200].rstrip(".") if lines else type(error).__name__
