"""Messages of DECTRIS' streams, made with cbor2, bitshuffle and lz4 and nothing of ours."""

from __future__ import annotations

import json
import struct
from datetime import UTC, datetime
from typing import Any

import bitshuffle
import cbor2
import lz4.block
import numpy as np

TYPED = {"|u1": 64, "<u2": 69, "<u4": 70, "|i1": 72, "<i2": 77, "<i4": 78, "<f4": 85, "<f8": 86,
         ">u2": 65, ">u4": 66, ">i2": 73, ">i4": 74, ">f4": 81, ">f8": 82, "<u8": 71}  # fmt: skip
DATE = datetime(2026, 3, 1, 12, tzinfo=UTC)


def shuffled(pixels: np.ndarray, block: int = 8192) -> bytes:
    """Bitshuffle and LZ4, framed as in HDF5."""
    blocks = bitshuffle.compress_lz4(pixels, block // pixels.itemsize).tobytes()
    return struct.pack(">QI", pixels.nbytes, block) + blocks


def lz4_framed(pixels: np.ndarray, block: int = 1000) -> bytes:
    data = pixels.tobytes()
    pieces = [data[at : at + block] for at in range(0, len(data), block)]
    packed = [lz4.block.compress(piece, store_size=False) for piece in pieces]
    kept = [min(pair, key=len) for pair in zip(pieces, packed, strict=True)]
    return struct.pack(">QI", len(data), block) + b"".join(
        struct.pack(">I", len(each)) + each for each in kept
    )


def array(pixels: np.ndarray, compression: str | None = "bslz4", order: str = "C") -> Any:
    """A multi-dimensional array as CBOR has it."""
    values = np.ascontiguousarray(pixels if order == "C" else pixels.T)
    content: Any = values.tobytes()
    if compression == "bslz4":
        content = cbor2.CBORTag(56500, ["bslz4", values.itemsize, shuffled(values)])
    elif compression == "lz4":
        content = cbor2.CBORTag(56500, ["lz4", 0, lz4_framed(values)])
    typed = cbor2.CBORTag(TYPED[values.dtype.str], content)
    return cbor2.CBORTag(40 if order == "C" else 1040, [list(pixels.shape), typed])


def start(series: str = "one", channels: tuple[str, ...] = ("threshold_1",), **fields: Any) -> bytes:
    known = {
        "type": "start",
        "series_id": 7,
        "series_unique_id": series,
        "arm_date": DATE,
        "channels": list(channels),
        "count_time": 0.002,
        "number_of_images": 100,
        "detector_description": "ELA",
        "detector_serial_number": "E-01",
        "incident_energy": 300_000.0,
        "threshold_energy": dict.fromkeys(channels, 10000.0),
        "user_data": {"sample": "Pt"},
    }
    return cbor2.dumps(known | fields)


def image(number: int, data: np.ndarray | dict[str, Any], series: str = "one", **fields: Any) -> bytes:
    known = {
        "type": "image",
        "series_id": 7,
        "series_unique_id": series,
        "image_id": number,
        "data": data if isinstance(data, dict) else {"threshold_1": array(data)},
        "series_date": DATE,
        "start_time": [number * 1000, 1_000_000],
        "stop_time": [number * 1000 + 900, 1_000_000],
        "real_time": [900, 1_000_000],
        "user_data": None,
    }
    return cbor2.dumps(known | fields)


def end(series: str = "one") -> bytes:
    return cbor2.dumps({"type": "end", "series_id": 7, "series_unique_id": series})


# -- Stream V1 -----------------------------------------------------------------------


def header1(series: int = 1, *more: bytes, **config: Any) -> list[bytes]:
    head = {"htype": "dheader-1.0", "header_detail": "basic", "series": series}
    known = {
        "description": "QUADRO",
        "detector_number": "E-02",
        "nimages": 10,
        "ntrigger": 2,
        "count_time": 0.1,
    }
    return [json.dumps(head).encode(), json.dumps(known | config).encode(), *more]


def image1(number: int, pixels: np.ndarray, encoding: str = "bs16-lz4<", series: int = 1) -> list[bytes]:
    head = {"htype": "dimage-1.0", "series": series, "frame": number, "hash": ""}
    about = {
        "htype": "dimage_d-1.0",
        "shape": [pixels.shape[1], pixels.shape[0]],
        "type": pixels.dtype.name,
        "encoding": encoding,
    }
    times = {"htype": "dconfig-1.0", "start_time": 0, "stop_time": 1_000_000, "real_time": 1_000_000}
    if encoding.startswith("bs"):
        data = shuffled(pixels)
    else:
        data = (
            lz4.block.compress(pixels.tobytes(), store_size=False) if "lz4" in encoding else pixels.tobytes()
        )
    return [json.dumps(head).encode(), json.dumps(about).encode(), data, json.dumps(times).encode()]


def end1(series: int = 1) -> list[bytes]:
    return [json.dumps({"htype": "dseries_end-1.0", "series": series}).encode()]
