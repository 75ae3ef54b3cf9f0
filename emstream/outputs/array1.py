"""array-1.0: ``[header, JSON][pixels, C order]``, as PSI's programs and EPICS' ADZMQ read it.

The header has the keys of the convention, ADZMQ's ``timeStamp`` [s since 1990] and ``ndattr``, whose
numbers and texts become attributes of EPICS' NDArray, and our ``timestamp_ns``. There is no start
or end of a series: readers of array-1.0 know of none.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from emstream.outputs.sockets import Buffer
from emstream.wire import ARRAY, EPICS_EPOCH_S

_LARGEST_HEADER = 1000  # [bytes] ADZMQ's driver reads it into 1024
_LARGEST_NAME, _LARGEST_TEXT = 64, 128  # of the camera, and of one attribute
_ATTRIBUTES = ("series", "units", "exposure_s", "pixel_size_m", "dose", "in_domain")


def parts(pictures: Mapping[str, tuple[Mapping[str, Any], np.ndarray]]) -> list[Buffer]:
    """The message of one frame; `pictures` holds one."""
    ((message, pixels),) = pictures.values()
    return [header(message), pixels.data]


def header(message: Mapping[str, Any]) -> bytes:
    """A native header as array-1.0 has it, within 1000 bytes: attributes that do not fit are left out."""
    known: dict[str, Any] = {
        "htype": ARRAY,
        "shape": list(message["shape"]),
        "type": message["type"],
        "endianness": message["endianness"],
        "frame": message["frame"],
        "source": message["source"][:_LARGEST_NAME],
        "encoding": "",
    }
    if "timestamp_ns" in message:
        known["timestamp_ns"] = message["timestamp_ns"]
        known["timeStamp"] = message["timestamp_ns"] / 1e9 - EPICS_EPOCH_S
    text = _json(known)[:-1] + b', "ndattr": {'
    separator = b""
    for name, value in _attributes(message):
        item = separator + _json({name: value})[1:-1]
        if len(text) + len(item) + 2 <= _LARGEST_HEADER:
            text, separator = text + item, b", "
    return text + b"}}"


def _json(message: Mapping[str, Any]) -> bytes:
    return json.dumps(message, ensure_ascii=False).encode()


def _attributes(message: Mapping[str, Any]) -> list[tuple[str, float | str]]:
    """Numbers and texts that are worth an attribute, the most important first."""
    engine, ledger = message.get("engine", {}), message.get("ledger", {})
    named = [(f"engine_{name}", value) for name, value in engine.items()]
    named += [(name, message[name]) for name in _ATTRIBUTES if name in message]
    named += [(name, ledger[name]) for name in ("missing", "dropped") if name in ledger]
    found: list[tuple[str, float | str]] = []
    for name, value in named:
        if isinstance(value, str):
            found.append((name, value[:_LARGEST_TEXT]))
        elif isinstance(value, (int, float)) and math.isfinite(value):
            found.append((name, int(value) if isinstance(value, bool) else value))
    return found
