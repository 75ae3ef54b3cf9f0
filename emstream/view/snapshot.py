"""A pair as a file: every pixel and every header field, nothing scaled or cut."""

from __future__ import annotations

import math
import re
from io import BytesIO
from typing import Any

import tifffile

from emstream import wire
from emstream.frame import Frame
from emstream.version import VERSION
from emstream.view.pair import Pair

_RATIONAL_MAX = 2**32 - 1


def header_of(pair: Pair) -> dict[str, Any]:
    """Both headers as they came, in what strict JSON has."""
    sides = {"raw": pair.raw, "denoised": pair.denoised}
    return {
        "emstream": VERSION,
        **{side: portable(wire.map_of(frame.header)) for side, frame in sides.items()},
    }


def portable(value: Any) -> Any:
    """`value` in JSON types: keys are texts, bytes hexadecimal, numbers that are not finite their names."""
    if isinstance(value, dict):
        return {_text(key): portable(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [portable(each) for each in value]
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return _text(value)


def tiff(pair: Pair) -> bytes:
    """A TIFF of two series, raw as the camera sent it and denoised as float32.

    Each has its header as JSON in the ImageDescription and its pixel size in the resolution.
    """
    headers, file = header_of(pair), BytesIO()
    with tifffile.TiffWriter(file) as writer:
        for side, frame in (("raw", pair.raw), ("denoised", pair.denoised)):
            per_cm = _per_cm(frame)
            writer.write(
                frame.data,
                photometric="minisblack",
                metadata={"emstream": VERSION, "side": side, **headers[side]},
                software=f"emstream {VERSION}",
                resolution=(per_cm, per_cm) if per_cm else None,
                resolutionunit="CENTIMETER" if per_cm else None,
            )
    return file.getvalue()


def name_of(pair: Pair) -> str:
    """A file name without its suffix: camera, series and frame."""
    header = pair.raw.header
    words = re.findall(r"[A-Za-z0-9]+", f"{header.source} {header.series}"[:80])
    return "-".join(["emstream", *words, f"{header.frame:06d}"])


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        return value.hex()
    # A lone surrogate is no character, and no encoding takes it.
    return str(value).encode(errors="replace").decode()


def _per_cm(frame: Frame) -> float | None:
    size_m = frame.header.pixel_size_m
    per_cm = 1e-2 / size_m if size_m else 0.0
    return per_cm if 0 < per_cm < _RATIONAL_MAX else None
