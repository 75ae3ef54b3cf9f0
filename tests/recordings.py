"""Recordings for tests, written without a service."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from emstream import wire
from emstream.frame import Frame, FrameHeader
from emstream.recording.backlog import Entry
from emstream.recording.gaps import GapMap
from emstream.recording.writer import RecordingFile

ENGINE = {"name": "unet32", "sha256": "ab" * 32, "device": "CPU"}
SHAPE = (33, 47)
STEP_NS = 25_000_000


def picture(number: int, shape: tuple[int, int] = SHAPE, kind: str = "uint16") -> np.ndarray:
    return np.random.default_rng(number).poisson(3.0, shape).astype(kind)


def raw(number: int, *, kind: str = "uint16", shape: tuple[int, int] = SHAPE, **fields: Any) -> Entry:
    """The raw frame `number` as it would come from the service."""
    fields = {"source": "test", "series": 1, "timestamp_ns": 10**18 + STEP_NS * number} | fields
    header = FrameHeader(frame=number, shape=shape, type=kind, **fields)
    frame = Frame(header, picture(number, shape, kind), "raw")
    return Entry("raw", wire.pack(wire.map_of(header)), frame, time.time_ns())


def denoised(
    number: int, *, engine: dict[str, Any] = ENGINE, published: int | None = None, **fields: Any
) -> Entry:
    """What an engine that halves everything makes of `raw`."""
    extra = {"engine": engine, "ledger": {"published": number + 1 if published is None else published}}
    entry = raw(number, **fields)
    assert entry.frame is not None
    header = entry.frame.header
    header.extra, header.type = extra, "float32"
    frame = Frame(header, entry.frame.data.astype(np.float32) / 2, "denoised")
    return Entry("denoised", wire.pack(wire.map_of(header)), frame, entry.arrived_ns)


def mark(htype: str, **fields: Any) -> Entry:
    message = {"htype": htype, "source": "test", "series": 1} | fields
    return Entry("raw", wire.pack(message), None, time.time_ns())


def record(path: Path, entries: list[Entry], *, close: bool = True, **options: Any) -> RecordingFile:
    """Write `entries` to a recording; left open, but committed, without `close`."""
    first = next(entry for entry in entries if entry.topic == "raw" and entry.frame)
    file = RecordingFile(path, first, **{"part": 1, "compress": True, "gaps": GapMap()} | options)
    for entry in entries:
        assert file.add(entry)
    if close:
        file.close("stopped", {})
    else:
        file.commit({})
    return file


def pairs(numbers: Any, **options: Any) -> list[Entry]:
    return [entry for n in numbers for entry in (raw(n, **options), denoised(n, **options))]
