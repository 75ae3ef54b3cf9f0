""".emd: HDF5 as Velox (Thermo Fisher) and as Berkeley's EMD 0.2 lay it out.

Velox: /Data/Image/ID/Data is (H, W, N), /Data/Image/ID/Metadata a JSON text per frame. Berkeley: a group with
the attribute emd_group_type 1 holds `data` and its axes dim1, dim2 ... with `units`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from emstream.errors import FileFormatError
from emstream.movies.movie import Stored

_METRES = {"m": 1.0, "um": 1e-6, "n_m": 1e-9, "nm": 1e-9, "a": 1e-10, "pm": 1e-12}


def read(path: Path, dataset: str | None) -> Stored:
    file = h5py.File(path, "r")
    try:
        found = _velox(file) or _berkeley(file)
        if not found:
            raise FileFormatError(f"{path} holds no images as Velox or EMD 0.2 store them")
        if dataset is None and len(found) > 1:
            raise FileFormatError(f"{path} holds several: {', '.join(found)}; choose one with dataset")
        name = dataset if dataset is not None else next(iter(found))
        if name not in found:
            raise FileFormatError(f"{path} holds no {name!r}; it holds {', '.join(found)}")
        data, pixel_size_m, frames_last = found[name]
    except BaseException:
        file.close()
        raise

    def frame(i: int) -> np.ndarray:
        one: np.ndarray = data[:, :, i] if frames_last else data[i] if data.ndim == 3 else data[()]
        return one

    shape = data.shape
    if frames_last:
        shape = shape[:2] if shape[2] == 1 else (shape[2], *shape[:2])
    return Stored(shape=shape, dtype=data.dtype, frame=frame, close=file.close, pixel_size_m=pixel_size_m)


Found = dict[str, tuple[Any, float | None, bool]]
"""Name -> dataset, pixel size [m], whether its last axis counts the frames."""


def _velox(file: Any) -> Found:
    images = file.get("Data/Image")
    if not isinstance(images, h5py.Group):
        return {}
    return {
        name: (group["Data"], _velox_pixel_size_m(group), True)
        for name, group in images.items()
        if isinstance(group, h5py.Group) and "Data" in group and group["Data"].ndim == 3
    }


def _velox_pixel_size_m(group: Any) -> float | None:
    try:
        text = bytes(np.asarray(group["Metadata"][:, 0], np.uint8)).split(b"\0")[0]
        return float(json.loads(text)["BinaryResult"]["PixelSize"]["width"])
    except (KeyError, ValueError, TypeError, IndexError):
        return None  # images are images without it


def _berkeley(file: Any) -> Found:
    found: Found = {}

    def look(name: str, group: Any) -> None:
        if isinstance(group, h5py.Group) and _holds_images(group) and "data" in group:
            found[name] = group["data"], _berkeley_pixel_size_m(group), False

    file.visititems(look)
    return found


def _holds_images(group: Any) -> bool:
    """Whether its type is 1, as a number or as an array of it."""
    types = np.ravel(group.attrs.get("emd_group_type", 0)).tolist()
    return bool(types) and all(each == 1 for each in types)


def _berkeley_pixel_size_m(group: Any) -> float | None:
    try:
        axis = group[f"dim{group['data'].ndim}"]
        units = axis.attrs["units"]
        units = (units.decode() if isinstance(units, bytes) else str(units)).strip("[]").lower()
        return float(axis[1] - axis[0]) * _METRES[units]
    except (KeyError, ValueError, TypeError, IndexError):
        return None
