""".tif: one image or many; what is known about them as JSON in the ImageDescription."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from emstream.errors import FileFormatError
from emstream.movies.movie import Stored, flat

_BIG = 2**32 - 2**25  # bytes; a classic TIFF addresses 4 GiB, some of which the headers need
_MAX_PIXEL_M = 1e-6  # a resolution coarser than this is for printers
_RATIONAL_MAX = 2**32 - 1
_UNITS_M = {
    "pm": 1e-12, "A": 1e-10, "Å": 1e-10, "angstrom": 1e-10, "nm": 1e-9, "um": 1e-6, "µm": 1e-6, "μm": 1e-6,
    "micron": 1e-6, "microns": 1e-6, "mm": 1e-3, "cm": 1e-2, "inch": 2.54e-2, "m": 1.0,
}  # fmt: skip
_RESOLUTION_UNITS_M: dict[int, float] = {tifffile.RESUNIT.INCH: 2.54e-2, tifffile.RESUNIT.CENTIMETER: 1e-2}
# What tifffile only logs when the chain of pages ends before the file should.
_CUT_SHORT = ("page offset", "offset to page", "corrupt", "failed to reshape", "missing")


def read(path: Path, dataset: str | None) -> Stored:
    with _log_of_tifffile() as log, contextlib.ExitStack() as stack:
        file = stack.enter_context(tifffile.TiffFile(path))
        series = _choose(path, file.series, dataset)
        if complaints := [line for line in log if any(words in line for words in _CUT_SHORT)]:
            raise ValueError(f"it is cut short or corrupt ({complaints[0][:160]})")
        stored = _stored(path, file, series)
        if stored.close == file.close:
            stack.pop_all()  # the pages are read from it later
    return stored


def write(
    part: Path,
    path: Path,
    frames: Iterator[np.ndarray],
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    about: Mapping[str, Any],
) -> None:
    """Write to `part`, which will be `path`; `about` goes into the ImageDescription as JSON."""
    size_m = about.get("pixel_size_m")
    per_cm = 1e-2 / size_m if size_m else 0.0
    scaled = 0 < per_cm < _RATIONAL_MAX
    with tifffile.TiffWriter(part, bigtiff=int(np.prod(shape)) * dtype.itemsize > _BIG) as file:
        file.write(
            frames,
            shape=shape,
            dtype=dtype,
            photometric="minisblack",
            metadata=dict(about),
            software="emstream",
            resolution=(per_cm, per_cm) if scaled else None,
            resolutionunit="CENTIMETER" if scaled else None,
        )


def _choose(
    path: Path, series: list[tifffile.TiffPageSeries], dataset: str | None
) -> tifffile.TiffPageSeries:
    """The series of the number `dataset`, or the only one."""
    found = ", ".join(f"{i}: {one.shape} {one.dtype}" for i, one in enumerate(series))
    if dataset is None:
        if len(series) != 1:
            raise FileFormatError(
                f"{path} holds {len(series)} series of images; choose one as dataset: {found}"
            )
        return series[0]
    if not dataset.isdecimal() or int(dataset) >= len(series):
        raise FileFormatError(
            f"{path} has no series {dataset!r}; choose one as dataset by its number: {found}"
        )
    return series[int(dataset)]


def _stored(path: Path, file: tifffile.TiffFile, series: tifffile.TiffPageSeries) -> Stored:
    page = series.keyframe
    if "S" in series.axes or page.photometric == tifffile.PHOTOMETRIC.PALETTE:
        raise FileFormatError(
            f"{path} holds colour images {series.shape}; emstream takes single-channel electron counts"
        )
    shape, dtype = series.shape, np.dtype(series.dtype)
    units, pixel_size_m = _about(file, page)
    if series.dataoffset is not None:
        dtype = dtype.newbyteorder(file.byteorder)
        return replace(flat(path, series.dataoffset, shape, dtype, pixel_size_m), units=units)
    pages = series.pages
    if len(shape) == 3 and len(pages) != shape[0]:
        raise ValueError(f"{len(pages)} pages do not make {shape[0]} frames")

    def frame(i: int) -> np.ndarray:
        if (page := pages[i]) is None:
            raise ValueError("the file leaves it out")
        return page.asarray()

    return Stored(
        shape=shape, dtype=dtype, frame=frame, close=file.close, pixel_size_m=pixel_size_m, units=units
    )


def _about(file: tifffile.TiffFile, page: tifffile.TiffPage) -> tuple[str, float | None]:
    """Units and pixel size [m]: from our own description, ImageJ's, or the resolution tags."""
    shaped = file.shaped_metadata
    about = shaped[0] if shaped else {}
    units, size_m = about.get("units"), about.get("pixel_size_m")
    units = units if isinstance(units, str) else "electrons"
    if isinstance(size_m, (int, float)):
        return units, float(size_m)
    if file.is_imagej and (name := (file.imagej_metadata or {}).get("unit")):
        unit_m = _UNITS_M.get(str(name).replace("\\u00B5", "µ"), 0.0)
    else:
        unit_m = _RESOLUTION_UNITS_M.get(page.resolutionunit, 0.0)
    per_unit = page.resolution[0]
    size_m = unit_m / per_unit if per_unit else 0.0
    return units, size_m if 0 < size_m <= _MAX_PIXEL_M else None


@contextlib.contextmanager
def _log_of_tifffile() -> Iterator[list[str]]:
    """What tifffile logs within this block, kept from the program's own log."""
    lines: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        lines.append(record.getMessage())
        return False

    logger = logging.getLogger("tifffile")
    logger.addFilter(keep)
    try:
        yield lines
    finally:
        logger.removeFilter(keep)
