""".h5: a dataset (N, H, W) or (H, W); what is known about it as attributes."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from emstream.errors import FileFormatError
from emstream.movies.movie import Stored
from emstream.recording import Recording, is_recording

NAMES = ("movie", "frames", "data", "images")
_CACHE_NBYTES = 1024**2, 256 * 1024**2  # least and most
_MAX_LISTED = 12
_RECORDED = "entry/raw/frames", "entry/denoised/frames"


def read(path: Path, dataset: str | None) -> Stored:
    if (dataset or _RECORDED[0]).strip("/") in _RECORDED and is_recording(path):
        return _recorded(path, dataset)
    with contextlib.suppress(ImportError):
        importlib.import_module("hdf5plugin")  # with it, h5py reads bitshuffle, LZ4, Zstandard, ...
    with h5py.File(path, "r") as file:
        array = _named(path, file, dataset) if dataset else _only(path, file)
        if array.shape is None:
            raise FileFormatError(f"{path} has no frames: dataset {array.name} is empty")
        _check_filters(path, array)
        name, cache_nbytes = dataset or array.name, _cache_nbytes(array)
        size_m, units = _attribute(array, file, "pixel_size_m"), _attribute(array, file, "units")
    file = h5py.File(path, "r", rdcc_nbytes=cache_nbytes)
    array = file[name]
    single = array.ndim == 2
    return Stored(
        shape=array.shape,
        dtype=array.dtype,
        frame=lambda i: np.asarray(array[()] if single else array[i]),
        close=file.close,
        pixel_size_m=float(size_m) if isinstance(size_m, (int, float, np.number)) else None,
        units=_text(units),
    )


def write(
    part: Path,
    path: Path,
    frames: Iterator[np.ndarray],
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    about: Mapping[str, Any],
) -> None:
    """Write to `part`, which will be `path`; `about` becomes the dataset's attributes, maps as JSON."""
    with h5py.File(part, "x") as file:
        is_image = len(shape) == 2
        array = file.create_dataset(NAMES[0], shape, dtype, chunks=None if is_image else (1, *shape[1:]))
        for name, value in about.items():
            array.attrs[name] = value if isinstance(value, (str, int, float)) else json.dumps(value)
        for i, frame in enumerate(frames):
            array[() if is_image else i] = frame


def _recorded(path: Path, dataset: str | None) -> Stored:
    """A recording in whatever state it is: the rows that are whole."""
    recording = Recording(path)
    track = recording.raw if (dataset or _RECORDED[0]).strip("/") == _RECORDED[0] else recording.denoised
    return Stored(
        shape=track.shape,
        dtype=track.dtype,
        frame=track.__getitem__,
        close=recording.close,
        pixel_size_m=track.pixel_size_m,
        units=track.units,
    )


def _named(path: Path, file: h5py.File, name: str) -> h5py.Dataset:
    found = file.get(name)
    if not isinstance(found, h5py.Dataset):
        raise FileFormatError(f"{path} has no dataset {name!r}; it holds {_listing(_datasets(file))}")
    return found


def _only(path: Path, file: h5py.File) -> h5py.Dataset:
    if (default := _default(file)) is not None:
        return default
    datasets = _datasets(file)
    candidates = [one for one in datasets if one.dtype.kind in "buif" and one.shape and one.ndim in (2, 3)]
    if len(candidates) > 1:
        named = [one for one in candidates if one.name.rpartition("/")[2].lower() in NAMES]
        if len(named) != 1:
            raise FileFormatError(
                f"{path} holds several movies; choose one as dataset: {_listing(candidates)}"
            )
        candidates = named
    if not candidates:
        raise FileFormatError(f"{path} holds no numeric 2-D or 3-D dataset, only {_listing(datasets)}")
    return candidates[0]


def _default(file: h5py.File) -> h5py.Dataset | None:
    """What a NeXus file says should be shown first."""
    item = file
    for name in ("default", "default", "signal"):
        item = item.get(str(item.attrs.get(name))) if isinstance(item, h5py.Group) else None
    return item if isinstance(item, h5py.Dataset) else None


def _check_filters(path: Path, array: h5py.Dataset) -> None:
    """Refuse a compression that this installation of HDF5 does not have."""
    plan = array.id.get_create_plist()
    for number, _, _, name in (plan.get_filter(i) for i in range(plan.get_nfilters())):
        if not h5py.h5z.filter_avail(number):
            name = name.decode("ascii", "replace") or f"filter {number}"
            raise FileFormatError(f"{path} is compressed with {name}; pip install hdf5plugin")


def _cache_nbytes(array: h5py.Dataset) -> int:
    """Room for the chunks of a frame when they hold others, too, which would each unpack them again."""
    least, most = _CACHE_NBYTES
    if array.ndim != 3 or not array.chunks or array.chunks[0] == 1:
        return least
    chunks = [-(-length // chunk) for length, chunk in zip(array.shape[1:], array.chunks[1:], strict=True)]
    nbytes: int = math.prod((*chunks, *array.chunks)) * array.dtype.itemsize
    return min(max(least, nbytes), most)


def _datasets(file: h5py.File) -> list[h5py.Dataset]:
    found: list[h5py.Dataset] = []
    file.visititems(lambda name, item: found.append(item) if isinstance(item, h5py.Dataset) else None)
    return found


def _listing(datasets: list[h5py.Dataset]) -> str:
    lines = [f"{one.name} {one.shape} {one.dtype}" for one in datasets[:_MAX_LISTED]]
    if len(datasets) > _MAX_LISTED:
        lines.append(f"{len(datasets) - _MAX_LISTED} more")
    return ", ".join(lines) or "nothing"


def _attribute(array: h5py.Dataset, file: h5py.File, name: str) -> Any:
    """Of the dataset, or else of the whole file."""
    return array.attrs.get(name, file.attrs.get(name))


def _text(value: Any) -> str:
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    return text if isinstance(text, str) else "electrons"
