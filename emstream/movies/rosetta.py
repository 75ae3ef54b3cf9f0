"""The microscope makers' formats, read through RosettaSciIO (optional, GPL 3): .dm3 .dm4 and more."""

from __future__ import annotations

import importlib
import logging
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from emstream.errors import FileFormatError
from emstream.movies.movie import Stored

READERS = {
    ".dm3": "digitalmicrograph",
    ".dm4": "digitalmicrograph",
    ".tvips": "tvips",
    ".hspy": "hspy",
}
_METRES = {"m": 1.0, "mm": 1e-3, "µm": 1e-6, "μm": 1e-6, "um": 1e-6, "nm": 1e-9, "å": 1e-10, "pm": 1e-12}


def read(path: Path, dataset: str | None) -> Stored:
    """Open lazily: frames are read one at a time."""
    logging.getLogger("rsciio").setLevel(logging.ERROR)
    try:
        found = _reader(path).file_reader(str(path), lazy=True)
    except ValueError as error:
        if "RGBA" not in str(error):  # which it does not read lazily
            raise
        raise FileFormatError(
            f"{path} holds colour images; emstream takes single-channel electron counts"
        ) from None
    chosen = _choose(path, found, dataset)
    data, axes = chosen["data"], chosen["axes"]
    kept = tuple(axis for axis, length in enumerate(data.shape) if length > 1 or axis >= data.ndim - 2)
    shape = tuple(data.shape[axis] for axis in kept)

    def frame(i: int) -> np.ndarray:
        one = data.reshape(shape)
        return np.asarray(one[i] if len(shape) == 3 else one)

    return Stored(
        shape=shape, dtype=data.dtype, frame=frame, close=lambda: None, pixel_size_m=_pixel_size_m(axes)
    )


def _choose(path: Path, found: list[dict[str, Any]], dataset: str | None) -> dict[str, Any]:
    """The image or movie in the file: by number, by title, or the only one."""
    images = [one for one in found if one["data"].ndim >= 2]
    titles = [str(one["metadata"].get("General", {}).get("title", "")) for one in images]
    listed = ", ".join(
        f"{number} ({title or 'no title'}, {'x'.join(map(str, one['data'].shape))})"
        for number, (one, title) in enumerate(zip(images, titles, strict=True))
    )
    if not images:
        raise FileFormatError(f"{path} holds no images")
    if dataset is None:
        if len(images) > 1:
            raise FileFormatError(f"{path} holds several: {listed}; choose one with dataset")
        return images[0]
    if dataset.isdecimal() and int(dataset) < len(images):
        return images[int(dataset)]
    if titles.count(dataset) == 1:
        return images[titles.index(dataset)]
    raise FileFormatError(f"{path} holds no {dataset!r}; it holds {listed}")


def _pixel_size_m(axes: list[dict[str, Any]]) -> float | None:
    """Of the columns [m]; None where the file says nothing, or is a diffraction pattern."""
    last = axes[-1]
    metres = _METRES.get(str(last.get("units", "")).lower())
    return None if metres is None else float(last.get("scale", 0.0)) * metres


def _reader(path: Path) -> ModuleType:
    if find_spec("rsciio") is None:
        raise FileFormatError(f"{path} needs the package rosettasciio: pip install 'emstream[files]'")
    return importlib.import_module(f"rsciio.{READERS[path.suffix.lower()]}")
