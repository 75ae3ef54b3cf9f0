""".npy: the pixels and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

from emstream.errors import FileFormatError
from emstream.movies.movie import Stored, check, flat

_READ_HEADER = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


def read(path: Path, dataset: str | None) -> Stored:
    if dataset is not None:
        raise FileFormatError(f"{path} is one array: there is no dataset {dataset!r} to choose")
    with path.open("rb") as file:
        version = npy.read_magic(file)
        if version not in _READ_HEADER:
            raise ValueError(f"version {version[0]}.{version[1]} of the format is for records, not images")
        shape, by_columns, dtype = _READ_HEADER[version](file)
        offset = file.tell()
    if not by_columns:
        return flat(path, offset, shape, dtype)
    # The frames are interleaved, so they can only be picked out of a mapped file.
    check(path, shape, dtype)
    array = np.memmap(path, dtype, "r", offset, shape, "F")
    movie = array if array.ndim == 3 else array[None]
    return Stored(shape=shape, dtype=dtype, frame=lambda i: np.array(movie[i], order="C"), close=lambda: None)


def write(
    part: Path,
    path: Path,
    frames: Iterator[np.ndarray],
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    about: Mapping[str, Any],
) -> None:
    """Write to `part`, which will be `path`; there is no place for `about`."""
    with part.open("xb") as file:
        header = {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        npy.write_array_header_1_0(file, header)
        for frame in frames:
            file.write(frame.data)
