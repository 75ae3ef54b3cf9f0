"""Recordings as they are read: for a replay, or in a notebook."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import re
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from emstream import wire
from emstream.errors import FileFormatError, MalformedFrame
from emstream.recording.layout import COUNTERS, MARK, SUFFIXES, UNKNOWN, VERSION


def is_recording(path: Path) -> bool:
    """Whether `path` is an HDF5 file that a recorder began; False also for what cannot be opened."""
    return part_of(path) is not None


def part_of(path: Path) -> int | None:
    """Which part of a recording `path` is, the first being 1; None for what is none or cannot be opened."""
    if path.suffix.lower() not in SUFFIXES or not path.is_file():
        return None
    with contextlib.suppress(OSError, RuntimeError, KeyError, TypeError, ValueError):
        file, padded = _open(path)
        try:
            return int(file.attrs.get("part", 1)) if MARK in file.attrs else None
        finally:
            file.close()
            if padded:
                padded.close()
    return None


class Recording:
    """A recording, finished or not: its frames as of now."""

    def __init__(self, path: Path) -> None:
        """Raises FileFormatError for what is no recording, of a newer version, damaged, or without frames."""
        self.path = path
        with contextlib.suppress(ImportError):
            importlib.import_module("hdf5plugin")
        try:
            self._file, self._padded = _open(path)
        except OSError as error:
            reason = str(error).splitlines()[0][:200]
            raise FileFormatError(
                f"{path} cannot be read: {reason}; is the file whole? Copy it again"
            ) from None
        try:
            self._read()
        except FileFormatError:
            self.close()
            raise
        except (KeyError, MalformedFrame, OSError, RuntimeError, TypeError, ValueError) as error:
            self.close()
            raise FileFormatError(
                f"{path} is a damaged recording ({type(error).__name__}); is the file whole? Copy it again"
            ) from None

    def _read(self) -> None:
        version = self._file.attrs.get(MARK)
        if version is None:
            raise FileFormatError(f"{self.path} is no recording of emstream")
        if int(version) > VERSION:
            raise FileFormatError(
                f"{self.path} is a recording of version {int(version)}, and this emstream reads up to {VERSION}; "
                "upgrade emstream"
            )
        self.id = str(self._file.attrs.get("recording_id", ""))
        """The same in all parts of a recording; empty in those that know none."""
        entry = self._file["entry"]
        self.raw = Track(self.path, entry["raw"])
        self.denoised = Track(self.path, entry["denoised"])
        if self._padded:
            self.raw.check_whole()
            self.denoised.check_whole()
            _check_whole(self.path, entry["denoised/raw_row"], len(self.denoised))
            for column in (*entry["engine"].values(), *entry["gaps"].values()):
                _check_whole(self.path, column, len(column))
            marks = entry["marks"]
            for name in ("before_row", "message_end"):
                _check_whole(self.path, marks[name], len(marks[name]))
            _check_whole(self.path, marks["message"], len(marks["message"]))
        if not len(self.raw):
            raise FileFormatError(f"{self.path} is a recording without frames")
        rows = entry["denoised/raw_row"][: len(self.denoised)]
        self.raw_rows: np.ndarray = rows
        """(denoised frames): the row in `raw` of the very frame, -1 where that was lost."""
        ranges = entry["gaps/ranges"][()]
        self.gaps: np.ndarray = ranges[ranges[:, 0] != UNKNOWN]
        """(G, 3): first and last frame number missing, and the row before which."""
        self.ledger = {name: int(entry["ledger"][name][()]) for name in COUNTERS}
        """Of the service, as of the last commit."""
        self.report: dict[str, Any] = _json(entry["ledger/report"][()])
        """The service's last statistics."""
        recorder = entry["recorder"]
        self.ended: str = recorder["ended"].asstr()[()]
        """Why it ended; empty while it is written, and when the recorder was killed."""
        self.recorder = {name: int(recorder[name][()]) for name in recorder if name != "ended"}
        # A commit that was cut off may have lengthened one column and not the next.
        engine = {name: entry["engine"][name].asstr()[()] for name in ("name", "sha256", "device")}
        self.engines = [
            dict(zip(engine, values, strict=True)) for values in zip(*engine.values(), strict=False)
        ]
        """{name, sha256, device} of each engine that made the denoised frames."""
        messages, before = entry["marks/message"][()].tobytes(), entry["marks/before_row"][()]
        ends = [0, *entry["marks/message_end"][: len(before)]]
        self.marks = [
            (int(row), wire.unpack(messages[start:end]))
            for row, start, end in zip(before, ends[:-1], ends[1:], strict=False)
            if start < end <= len(messages)
        ]
        """(row of `raw` before which, message) of each start and end of a series."""

    def close(self) -> None:
        self._file.close()
        if self._padded:
            self._padded.close()

    def __enter__(self) -> Recording:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class Track:
    """The raw or the denoised frames of a recording, those that are whole."""

    def __init__(self, path: Path, group: h5py.Group) -> None:
        self._path = path
        self._frames = group["frames"]
        _check_filters(path, self._frames)
        self._header, count = group["header"], int(group["complete"][()])
        self._ends = group["header_end"][:count]
        self.shape: tuple[int, int, int] = (count, *self._frames.shape[1:])
        """(N, H, W)"""
        self.dtype: np.dtype[Any] = self._frames.dtype
        self.units = str(self._frames.attrs.get("units", "electrons"))
        """Of the pixels."""
        size_m = self._frames.attrs.get("pixel_size_m")
        self.pixel_size_m: float | None = None if size_m is None else float(size_m)
        """[m], where the camera said so."""
        self.numbers: np.ndarray = group["number"][:count]
        """(N) frame number within its series"""
        self.timestamps_ns: np.ndarray = group["timestamp_ns"][:count]
        """(N) [ns since the Unix epoch] by the camera, -1 where it did not say"""
        self.arrived_ns: np.ndarray = group["arrived_ns"][:count]
        """(N) [ns since the Unix epoch] by the recorder"""
        if not len(self._ends) == len(self.numbers) == len(self.arrived_ns) == count:
            raise FileFormatError(f"{path} is a damaged recording: {group.name} is not whole; copy it again")

    def __len__(self) -> int:
        return self.shape[0]

    def check_whole(self) -> None:
        """Raise FileFormatError unless all rows are in the file: HDF5 reads zeros behind its end."""
        group = self._frames.parent
        for name in ("header_end", "number", "timestamp_ns", "arrived_ns", "frames"):
            _check_whole(self._path, group[name], len(self))
        _check_whole(self._path, self._header, int(self._ends[-1]) if len(self) else 0)

    def __getitem__(self, i: int) -> np.ndarray:
        """The pixels (H, W) of row `i`. Raises FileFormatError when they cannot be read."""
        if not 0 <= i < len(self):
            raise IndexError(f"row must lie in 0-{len(self) - 1}, got {i}")
        try:
            pixels: np.ndarray = self._frames[i]
        except (OSError, RuntimeError) as error:
            reason = str(error).splitlines()[0][:200]
            raise FileFormatError(
                f"{self._path}: row {i} cannot be read: {reason}; is the file whole?"
            ) from None
        return pixels

    def header(self, i: int) -> dict[str, Any]:
        """Everything that came with row `i`, as it came."""
        start, end = int(self._ends[i - 1]) if i else 0, int(self._ends[i])
        try:
            return wire.unpack(self._header[start:end].tobytes())
        except (MalformedFrame, OSError) as error:
            raise FileFormatError(f"{self._path}: the header of row {i} is damaged: {error}") from None


def _json(text: bytes | str) -> dict[str, Any]:
    """Nothing of what was cut off in the middle."""
    with contextlib.suppress(ValueError):
        found: dict[str, Any] = json.loads(text)
        return found
    return {}


def _open(path: Path) -> tuple[h5py.File, _Padded | None]:
    """Open a recording in whatever state it is; where bytes are missing at its end, what stands in for it.

    They may be those of a frame that a full disk, a quota or a file system's largest file cut off.
    """
    try:
        return h5py.File(path, "r"), None
    except OSError as error:
        cut = re.search(r"truncated file.*stored_eof = (\d+)", str(error))
        if not cut and "already open for write" not in str(error):
            raise
    if not cut:
        return h5py.File(path, "r", swmr=True), None
    padded = _Padded(path, int(cut[1]))
    try:
        return h5py.File(padded, "r"), padded
    except Exception as error:
        padded.close()
        raise OSError(str(error)) from None


class _Padded(io.RawIOBase):
    """A file with zeros behind its end."""

    def __init__(self, path: Path, nbytes: int) -> None:
        self._file = path.open("rb", buffering=0)
        self._nbytes = nbytes

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(self._nbytes + offset if whence == os.SEEK_END else offset, whence % 2)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: Any) -> int:
        into, filled = memoryview(buffer).cast("B"), 0
        while filled < len(into) and (got := self._file.readinto(into[filled:])):
            filled += got
        into[filled:] = bytes(len(into) - filled)
        return len(into)

    def close(self) -> None:
        self._file.close()
        super().close()


def _check_whole(path: Path, dataset: h5py.Dataset, rows: int) -> None:
    """Raise FileFormatError unless the first `rows` of a dataset lie before the file's end."""
    size = path.stat().st_size

    def check(chunk: Any) -> None:
        share = min(rows - chunk.chunk_offset[0], dataset.chunks[0]) / dataset.chunks[0]
        if share > 0 and chunk.byte_offset + share * chunk.size > size:
            raise FileFormatError(f"{path} cannot be read: it is cut short; is the file whole? Copy it again")

    dataset.id.chunk_iter(check)


def _check_filters(path: Path, frames: h5py.Dataset) -> None:
    plan = frames.id.get_create_plist()
    for number, *_ in (plan.get_filter(i) for i in range(plan.get_nfilters())):
        if not h5py.h5z.filter_avail(number):
            raise FileFormatError(f"{path} is compressed with bitshuffle; pip install 'emstream[files]'")
