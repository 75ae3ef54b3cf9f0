""".mrc: an image stack; needs the optional package mrcfile."""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from emstream.errors import FileFormatError
from emstream.movies.movie import Stored, flat

_LABEL_LETTERS = 80


def read(path: Path, dataset: str | None) -> Stored:
    mrcfile = _mrcfile(path)
    if dataset is not None:
        raise FileFormatError(f"{path} is one stack: there is no dataset {dataset!r} to choose")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # Many instruments write headers that are not to the letter; those come as warnings.
        with mrcfile.mmap(path, mode="r", permissive=True) as file:
            if file.data is None:
                reasons = [str(warning.message) for warning in caught]
                raise ValueError(" and ".join(reasons).lower() or "it has no data")
            shape, dtype, offset = file.data.shape, file.data.dtype, file.data.offset
            size_m = float(file.voxel_size.x) * 1e-10
    return flat(path, offset, shape, dtype, size_m)


def write(
    part: Path,
    path: Path,
    frames: Iterator[np.ndarray],
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    about: Mapping[str, Any],
) -> None:
    """Write to `part`, which will be `path`; the engine's identity goes into the labels.

    The format has no uint8, which is widened to uint16, and no integers of 32 bit.
    """
    mrcfile = _mrcfile(path)
    try:
        mode = mrcfile.utils.mode_from_dtype(dtype)
    except ValueError:
        raise FileFormatError(f"{path}: .mrc cannot hold {dtype}; save it as .tif or .h5") from None
    with mrcfile.new_mmap(part, shape, mrc_mode=mode) as file:
        if len(shape) == 3:
            file.set_image_stack()
        file.voxel_size = about.get("pixel_size_m", 0.0) * 1e10
        for label in _labels(about):
            file.add_label(label)
        lowest, highest, mean, square = math.inf, -math.inf, 0.0, 0.0
        # Written beside the map, not through it: mapped pages would pile up in memory.
        with part.open("r+b") as pixels:
            pixels.seek(file.data.offset)
            for frame in frames:
                pixels.write(frame.astype(file.data.dtype, copy=False).data)
                lowest, highest = min(lowest, float(frame.min())), max(highest, float(frame.max()))
                mean += float(frame.mean(dtype=np.float64)) / shape[0]
                square += float(np.square(frame, dtype=np.float64).mean()) / shape[0]
        file.header.dmin, file.header.dmax = lowest, highest
        file.header.dmean, file.header.rms = mean, math.sqrt(max(0.0, square - mean**2))


def _labels(about: Mapping[str, Any]) -> list[str]:
    engine = about.get("engine", {})
    lines = [f"emstream {key} {value}" for key, value in engine.items() if value is not None]
    return [line.encode("ascii", "replace").decode()[:_LABEL_LETTERS] for line in lines]


def _mrcfile(path: Path) -> ModuleType:
    if importlib.util.find_spec("mrcfile") is None:
        raise FileFormatError(f"{path} needs the package mrcfile: pip install 'emstream[files]'")
    return importlib.import_module("mrcfile")
