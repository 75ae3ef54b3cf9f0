"""One file of a recording while it is written. `emstream.recording` draws the layout."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
from collections.abc import Hashable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from emstream.errors import OutputError
from emstream.frame import FrameHeader
from emstream.recording.backlog import Entry
from emstream.recording.gaps import GapMap
from emstream.recording.layout import COUNTERS, MARK, TRACKS, UNKNOWN, VERSION, WRITE_ERROR
from emstream.version import VERSION as EMSTREAM_VERSION

_ROWS = 1024  # of a column's chunk
_HEADER_BYTES = 64 * 1024  # of the chunks that headers share
_TEXT_BYTES = 256
_REPORT_BYTES = 16 * 1024
RECORDER = (
    "raw_recorded", "denoised_recorded", "raw_lost", "denoised_lost", "raw_unheard", "denoised_unheard", "missing",
)  # fmt: skip


def compression() -> Mapping[str, Any]:
    """Bitshuffle and LZ4, as arguments of `create_dataset`. Raises OutputError where they are not installed."""
    try:
        plugin = importlib.import_module("hdf5plugin")
    except ModuleNotFoundError:
        raise OutputError(
            "recordings are compressed with hdf5plugin: pip install 'emstream[files]', "
            "or record uncompressed with --no-compress"
        ) from None
    made: Mapping[str, Any] = plugin.Bitshuffle(cname="lz4")
    return made


def reason(error: Exception) -> str:
    """Why a file cannot be written, in a line."""
    errno = getattr(error, "errno", None)
    return os.strerror(errno) if errno else (str(error).splitlines() or [type(error).__name__])[0][:200]


class RecordingFile:
    """Frames of one size and type, raw and denoised. One thread writes; anyone may read with SWMR.

    What was added is on disk, whole and readable, after the next `commit`.
    """

    def __init__(
        self, path: Path, first: Entry, *, part: int, compress: bool, gaps: GapMap, recording_id: str = ""
    ) -> None:
        """Create `path` for frames like `first`. Raises OutputError when that is impossible.

        `recording_id` is that of all parts of a recording.
        """
        assert first.frame is not None
        self.path = path
        self.gaps = gaps
        self._header = first.frame.header
        filters = compression() if compress else {}
        if path.exists():
            raise OutputError(f"{path} exists already; choose another name or allow --overwrite")
        self._closed = False
        self._recording_id = recording_id
        try:
            self._file = h5py.File(path, "x", libver=("v110", "v110"), rdcc_nbytes=0)
            self._set_up(first, part, filters)
            self._file.swmr_mode = True
        except FileExistsError:
            raise OutputError(f"{path} exists already; choose another name or allow --overwrite") from None
        except (OSError, RuntimeError, ValueError) as error:
            self._discard()
            raise OutputError(f"{path} cannot be written: {reason(error)}; record elsewhere") from None
        self._last_raw: tuple[Hashable, int] | None = None
        self._noted: dict[str, Any] = {}
        self._engines: list[dict[str, Any]] = []
        self._marks: list[tuple[bytes, int]] = []

    def _discard(self) -> None:
        """Leave nothing of a file that could not be begun."""
        self._closed = True
        with contextlib.suppress(AttributeError, OSError, RuntimeError, ValueError):
            self._file.close()
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)

    def _set_up(self, first: Entry, part: int, filters: Mapping[str, Any]) -> None:
        """Everything there will ever be, in its place: SWMR allows nothing new later."""
        header, file = self._header, self._file
        begun = datetime.fromtimestamp(first.arrived_ns / 1e9, UTC).isoformat()
        file.attrs.update(
            {"NX_class": "NXroot", "default": "entry", MARK: VERSION, "part": part,
             "recording_id": self._recording_id, "file_time": begun,
             "creator": "emstream", "creator_version": EMSTREAM_VERSION}
        )  # fmt: skip
        entry = _group(file, "entry", "NXentry", default="raw")
        entry["title"] = _plain(f"{header.source}, series {header.series}")
        entry["start_time"] = begun
        about = {"pixel_size_m": header.pixel_size_m} if header.pixel_size_m else {}
        self._tracks = {
            "raw": _Track(
                entry, "raw", header, header.type, filters, {"units": _plain(header.units), **about}
            ),
            "denoised": _Track(
                entry, "denoised", header, "float32", filters, {"units": "electrons", **about}
            ),
        }
        self._raw_row = _column(self._tracks["denoised"].group, "raw_row")
        engine = _group(entry, "engine", "NXprocess", program="emstream")
        self._engine = {
            name: engine.create_dataset(name, (0,), _text(), maxshape=(None,), chunks=(16,))
            for name in ("name", "sha256", "device")
        }
        self._engine["first_row"] = _column(engine, "first_row")
        gaps = _group(entry, "gaps", "NXcollection")
        self._ranges = gaps.create_dataset(
            "ranges", (0, 3), np.int64, maxshape=(None, 3), chunks=(_ROWS, 3), fillvalue=UNKNOWN
        )
        self._ranges.attrs["columns"] = "first missing, last missing, before row of raw"
        marks = _group(entry, "marks", "NXcollection")
        self._messages = _Texts(marks, "message")
        self._before_row = _column(marks, "before_row")
        ledger = _group(entry, "ledger", "NXcollection")
        recorder = _group(entry, "recorder", "NXcollection")
        self._scalars = {
            **{name: ledger.create_dataset(name, data=np.int64(0)) for name in COUNTERS},
            **{
                name: recorder.create_dataset(name, data=np.int64(0))
                for name in RECORDER
                if name != "missing"
            },
            "recorder.missing": recorder.create_dataset("missing", data=np.int64(0)),
            "report": ledger.create_dataset("report", data="", dtype=_text(_REPORT_BYTES)),
            "ended": recorder.create_dataset("ended", data="", dtype=_text()),
            "end_time": entry.create_dataset("end_time", data="", dtype=_text()),
        }

    @property
    def frames(self) -> dict[str, int]:
        """Rows of each track."""
        return {name: track.rows for name, track in self._tracks.items()}

    @property
    def uncommitted(self) -> dict[str, int]:
        """Rows of each track that a kill would cost."""
        return {name: track.rows - track.vouched for name, track in self._tracks.items()}

    @property
    def nbytes(self) -> int:
        """Size of the file so far."""
        return self.path.stat().st_size

    def takes(self, header: FrameHeader) -> bool:
        """Whether raw frames like this one go into this file."""
        return header.shape == self._header.shape and header.type == self._header.type

    def add(self, entry: Entry) -> bool:
        """Write a frame, or note a mark; False for a denoised frame of another size than the raw ones."""
        if entry.frame is None:
            self._marks.append((entry.header, self._tracks["raw"].rows))
            return True
        header = entry.frame.header
        if header.shape != self._header.shape or (entry.topic == "denoised" and header.type != "float32"):
            return False
        track, series = self._tracks[entry.topic], (header.source, header.series)
        row = track.add(entry)
        if entry.topic == "raw":
            self._last_raw = (*series, header.frame), row
            self.gaps.note(series, header.frame, row)
            return True
        pair = self._last_raw
        track.raw_rows.append(pair[1] if pair and pair[0] == (*series, header.frame) else UNKNOWN)
        self._note_engine(header.extra.get("engine"), row)
        return True

    def commit(self, counters: Mapping[str, Any]) -> None:
        """Make everything added readable, and stay so should the process be killed.

        `counters` go into the ledger and the recorder's account, by the names of COUNTERS and RECORDER,
        `report` as JSON. Does nothing once the file is closed.
        """
        if self._closed:
            return
        for track in self._tracks.values():
            track.append_columns()
        _append(self._raw_row, self._tracks["denoised"].raw_rows)
        self._write_gaps()
        for message, row in self._marks:
            self._messages.add(message)
            _append(self._before_row, [row])
        self._messages.flush()
        self._marks.clear()
        self._file.flush()
        for track in self._tracks.values():
            track.vouch()
        self._note({**counters, "recorder.missing": self.gaps.missing})
        self._file.flush()

    def close(self, ended: str, counters: Mapping[str, Any]) -> None:
        """Commit, say why it `ended`, and close. After an error, there is still `abandon`."""
        self.commit({**counters, "ended": ended, "end_time": datetime.now(UTC).isoformat()})
        self._closed = True
        self._file.close()

    def abandon(self) -> None:
        """Close a file that can no longer be written, if it is open; what was committed stays."""
        if self._closed:
            return
        self._closed = True  # whatever comes: HDF5 crashes when a file that it closed is touched
        nbytes = int(self._file.id.get_filesize())
        try:
            self._note({"ended": WRITE_ERROR})
        finally:
            try:
                self._file.close()
            finally:
                # HDF5 reckons with the frame that failed; a hole in its place keeps the file from looking cut short.
                if self.nbytes < nbytes:
                    os.truncate(self.path, nbytes)

    def _note(self, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if name in self._scalars and self._noted.get(name) != value:
                self._scalars[name][()] = _cut(json.dumps(value)) if isinstance(value, dict) else value
                self._noted[name] = value

    def _note_engine(self, engine: Any, row: int) -> None:
        if not isinstance(engine, dict) or (self._engines and self._engines[-1] == engine):
            return
        self._engines.append(engine)
        for name in ("name", "sha256", "device"):
            _append(self._engine[name], [_plain(str(engine.get(name) or ""))[: _TEXT_BYTES // 4]])
        _append(self._engine["first_row"], [row])

    def _write_gaps(self) -> None:
        start, ranges = self.gaps.changes()
        if len(ranges):
            self._ranges.resize(start + len(ranges), 0)
            self._ranges[start:] = ranges


class _Track:
    """The raw or the denoised frames."""

    def __init__(
        self,
        entry: h5py.Group,
        name: str,
        header: FrameHeader,
        kind: str,
        filters: Mapping[str, Any],
        about: Mapping[str, Any],
    ) -> None:
        assert name in TRACKS
        self.group = _group(entry, name, "NXdata", signal="frames", axes=["number", ".", "."])
        self._frames = self.group.create_dataset(
            "frames", (0, *header.shape), kind, maxshape=(None, *header.shape), chunks=(1, *header.shape), **filters
        )  # fmt: skip
        self._frames.attrs.update(about)
        self._columns = {
            column: _column(self.group, column) for column in ("number", "timestamp_ns", "arrived_ns")
        }
        self._headers = _Texts(self.group, "header")
        self._complete = self.group.create_dataset("complete", data=np.int64(0))
        self._pending: list[tuple[int, int, int]] = []
        self.raw_rows: list[int] = []
        self.rows = self.vouched = 0

    def add(self, entry: Entry) -> int:
        """Write the pixels, keep the rest for the next commit; returns the row."""
        assert entry.frame is not None
        header, row = entry.frame.header, self.rows
        self._frames.resize(row + 1, 0)
        self._frames[row] = entry.frame.data
        self._headers.add(entry.header)
        taken_ns = UNKNOWN if header.timestamp_ns is None else header.timestamp_ns
        self._pending.append((header.frame, taken_ns, entry.arrived_ns))
        self.rows += 1
        return row

    def append_columns(self) -> None:
        if self._pending:
            for column, values in zip(self._columns.values(), zip(*self._pending, strict=True), strict=True):
                _append(column, list(values))
        self._pending.clear()
        self._headers.flush()

    def vouch(self) -> None:
        """Say that all rows are whole."""
        if self.vouched != self.rows:
            self._complete[()] = self.rows
            self.vouched = self.rows


class _Texts:
    """Bytes of any length, one behind the other: ``NAME``, and ``NAME_end`` says where each ends."""

    def __init__(self, group: h5py.Group, name: str) -> None:
        self._bytes = group.create_dataset(
            name, (0,), np.uint8, maxshape=(None,), chunks=(_HEADER_BYTES,), track_times=False
        )
        self._ends = _column(group, f"{name}_end")
        self._pending: list[bytes] = []

    def add(self, text: bytes) -> None:
        self._pending.append(text)

    def flush(self) -> None:
        if self._pending:
            start = self._bytes.shape[0]
            _append(self._bytes, np.frombuffer(b"".join(self._pending), np.uint8))
            _append(self._ends, list(start + np.cumsum([len(text) for text in self._pending])))
            self._pending.clear()


def _group(parent: h5py.Group, name: str, kind: str, **attributes: Any) -> h5py.Group:
    group = parent.create_group(name)
    group.attrs["NX_class"] = kind
    group.attrs.update(attributes)
    return group


def _column(group: h5py.Group, name: str) -> h5py.Dataset:
    return group.create_dataset(
        name, (0,), np.int64, maxshape=(None,), chunks=(_ROWS,), fillvalue=UNKNOWN, track_times=False
    )


def _append(dataset: h5py.Dataset, values: Any) -> None:
    """Append, and empty `values` if it is a list."""
    if len(values):
        start = dataset.shape[0]
        dataset.resize(start + len(values), 0)
        dataset[start:] = values
        if isinstance(values, list):
            values.clear()


def _text(length: int = _TEXT_BYTES) -> Any:
    return h5py.string_dtype("utf-8", length)


def _plain(text: str) -> str:
    """Without what HDF5 refuses in a text, and without anything else that nobody sees."""
    return "".join(letter for letter in text if letter.isprintable())[:_TEXT_BYTES]


def _cut(text: str) -> str:
    """JSON that does not fit is left out rather than cut in two."""
    return text if len(text) < _REPORT_BYTES else "{}"
