"""Recordings on disk: what is written comes back whole, and what is no recording says why."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emstream import wire
from emstream.errors import FileFormatError, OutputError
from emstream.movies import open_movie
from emstream.recording import Recording, is_recording
from emstream.recording.backlog import Backlog
from emstream.recording.disk import bytes_of
from emstream.recording.gaps import GapMap
from emstream.recording.writer import RecordingFile
from tests.recordings import ENGINE, SHAPE, denoised, mark, pairs, picture, raw, record

pytest.importorskip("hdf5plugin")


# -- the file -------------------------------------------------------------------


def test_pixels_and_headers_come_back_as_they_came(tmp_path: Path) -> None:
    entries = pairs(range(7), extra={"stage": {"tilt": [1.5, None]}, "note": "x\u00e9"}, pixel_size_m=6e-12)
    record(tmp_path / "r.h5", entries)
    with Recording(tmp_path / "r.h5") as recording:
        assert recording.raw.shape == recording.denoised.shape == (7, *SHAPE)
        for n in range(7):
            np.testing.assert_array_equal(recording.raw[n], picture(n))
            np.testing.assert_array_equal(recording.denoised[n], picture(n).astype(np.float32) / 2)
            assert recording.raw.header(n) == wire.unpack(entries[2 * n].header)
            assert recording.denoised.header(n) == wire.unpack(entries[2 * n + 1].header)
        assert recording.raw.header(3)["stage"] == {"tilt": [1.5, None]}
        assert recording.raw_rows.tolist() == list(range(7))


@pytest.mark.parametrize("kind", ["uint8", "int16", "uint32", "float32", "float64"])
@pytest.mark.parametrize("compress", [True, False])
def test_every_type_of_pixel_is_recorded_exactly(tmp_path: Path, kind: str, compress: bool) -> None:
    record(tmp_path / "r.h5", [raw(0, kind=kind), raw(1, kind=kind)], compress=compress)
    with Recording(tmp_path / "r.h5") as recording:
        assert recording.raw.dtype == kind
        np.testing.assert_array_equal(recording.raw[1], picture(1, kind=kind))


def test_plain_h5py_reads_a_recording_by_the_layout_of_the_docstring(tmp_path: Path) -> None:
    record(tmp_path / "r.h5", [mark(wire.START), *pairs([0, 1, 4])])
    with h5py.File(tmp_path / "r.h5") as file:
        data = file["entry/raw"]
        np.testing.assert_array_equal(data["frames"][2], picture(4))
        assert data["number"][:].tolist() == [0, 1, 4]
        assert data["timestamp_ns"][1] == 10**18 + 25_000_000
        assert data["complete"][()] == 3
        assert file["entry/gaps/ranges"][:].tolist() == [[2, 3, 2]]
        assert file["entry/engine/sha256"].asstr()[0] == ENGINE["sha256"]
        assert file["entry/recorder/missing"][()] == 2
        assert data["frames"].id.get_create_plist().get_filter(0)[0] == 32008  # bitshuffle


def test_nexus_reader_finds_the_frames_by_their_default(tmp_path: Path) -> None:
    nexus = pytest.importorskip("nexusformat.nexus", reason="pip install nexusformat")
    record(tmp_path / "r.h5", pairs(range(4), pixel_size_m=6e-12))
    root = nexus.nxload(str(tmp_path / "r.h5"))
    assert root.entry.nxclass == "NXentry"
    shown = root.get_default()
    assert (shown.nxclass, shown.nxpath) == ("NXdata", "/entry/raw")
    np.testing.assert_array_equal(shown.nxsignal[3].nxvalue, picture(3))
    assert root.entry.denoised.nxsignal.shape == (4, *SHAPE)
    assert root.entry.denoised.nxaxes[0].nxvalue.tolist() == [0, 1, 2, 3]


def test_every_group_says_what_it_is_in_nexus(tmp_path: Path) -> None:
    record(tmp_path / "r.h5", pairs(range(2)))
    with h5py.File(tmp_path / "r.h5") as file:
        kinds = {
            "entry": "NXentry",
            "entry/raw": "NXdata",
            "entry/denoised": "NXdata",
            "entry/engine": "NXprocess",
        }
        assert {name: file[name].attrs["NX_class"] for name in kinds} == kinds
        entry = file[file.attrs["default"]]
        data = entry[entry.attrs["default"]]
        assert data[data.attrs["signal"]].shape == (2, *SHAPE)
        assert len(data[data.attrs["axes"][0]]) == 2


def test_lost_raw_frame_leaves_its_denoised_one_without_a_row(tmp_path: Path) -> None:
    record(tmp_path / "r.h5", [raw(0), denoised(0), denoised(1), raw(2), denoised(2)])
    with Recording(tmp_path / "r.h5") as recording:
        assert recording.raw_rows.tolist() == [0, -1, 1]


def test_another_engine_is_noted_from_its_first_frame_on(tmp_path: Path) -> None:
    other = ENGINE | {"name": "wide64"}
    record(tmp_path / "r.h5", [raw(0), denoised(0), denoised(1, engine=other), denoised(2, engine=other)])
    with Recording(tmp_path / "r.h5") as recording:
        assert recording.engines == [ENGINE, other]
    with h5py.File(tmp_path / "r.h5") as file:
        assert file["entry/engine/first_row"][:].tolist() == [0, 1]


def test_denoised_frame_of_another_size_is_refused(tmp_path: Path) -> None:
    file = record(tmp_path / "r.h5", [raw(0)], close=False)
    assert not file.add(denoised(1, shape=(5, 6)))
    file.close("stopped", {})


def test_marks_of_series_keep_their_place(tmp_path: Path) -> None:
    start, end = mark(wire.START, operator="me"), mark(wire.END)
    record(tmp_path / "r.h5", [start, raw(0), raw(1), end])
    with Recording(tmp_path / "r.h5") as recording:
        assert recording.marks == [(0, wire.unpack(start.header)), (2, wire.unpack(end.header))]


def test_ledger_and_account_are_those_of_the_last_commit(tmp_path: Path) -> None:
    file = record(tmp_path / "r.h5", pairs(range(3)), close=False)
    ledger = dict.fromkeys(
        ("received", "published", "dropped", "rejected", "failed", "in_flight", "missing"), 0
    )
    file.close("series ended", {**ledger, "received": 5, "raw_lost": 2, "report": {"frames_per_s": 40.0}})
    with Recording(tmp_path / "r.h5") as recording:
        assert recording.ledger == ledger | {"received": 5}
        assert recording.recorder["raw_lost"] == 2
        assert recording.report == {"frames_per_s": 40.0}
        assert recording.ended == "series ended"


def test_letters_that_hdf5_refuses_are_left_out_of_its_texts(tmp_path: Path) -> None:
    odd = {"source": "cam\0era\n", "series": "a\0b", "units": "\x07electrons\0"}
    engine = ENGINE | {"name": "unet\x0032"}
    record(tmp_path / "r.h5", [raw(0, **odd), denoised(0, engine=engine, **odd)])
    with h5py.File(tmp_path / "r.h5") as file:
        assert file["entry/title"].asstr()[()] == "camera, series ab"
        assert file["entry/raw/frames"].attrs["units"] == "electrons"
        assert file["entry/engine/name"].asstr()[0] == "unet32"
    with Recording(tmp_path / "r.h5") as recording:
        assert recording.raw.header(0)["source"] == "cam\0era\n"


def test_file_that_cannot_be_begun_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(RecordingFile, "_set_up", failing)
    with pytest.raises(OutputError, match=r"r\.h5 cannot be written: No space left on device"):
        record(tmp_path / "r.h5", [raw(0)])
    assert list(tmp_path.iterdir()) == []


def test_closed_file_takes_nothing_more_and_is_left_as_it_is(tmp_path: Path) -> None:
    file = record(tmp_path / "r.h5", pairs(range(2)))
    file.abandon()
    file.commit({"raw_lost": 7})
    assert file.nbytes == (tmp_path / "r.h5").stat().st_size
    with Recording(tmp_path / "r.h5") as recording:
        assert (recording.ended, recording.recorder["raw_lost"]) == ("stopped", 0)


def test_existing_file_is_never_replaced_by_the_writer(tmp_path: Path) -> None:
    (tmp_path / "r.h5").write_bytes(b"dear")
    with pytest.raises(OutputError, match="exists already"):
        record(tmp_path / "r.h5", [raw(0)])
    assert (tmp_path / "r.h5").read_bytes() == b"dear"


def test_movie_reader_opens_the_raw_frames(tmp_path: Path) -> None:
    record(tmp_path / "r.h5", pairs(range(4), pixel_size_m=6e-12))
    with open_movie(tmp_path / "r.h5") as movie:
        np.testing.assert_array_equal(movie[2], picture(2))
        assert (len(movie), movie.pixel_size_m, movie.units) == (4, 6e-12, "electrons")


def test_movie_reader_opens_what_is_whole_of_a_recording_that_grows_or_was_killed(tmp_path: Path) -> None:
    file = record(tmp_path / "r.h5", pairs(range(4), pixel_size_m=6e-12), close=False)
    file.add(raw(4))
    (tmp_path / "killed.h5").write_bytes((tmp_path / "r.h5").read_bytes())
    file.close("stopped", {})
    with open_movie(tmp_path / "killed.h5") as movie:
        assert (len(movie), movie.pixel_size_m, movie.units) == (4, 6e-12, "electrons")
        np.testing.assert_array_equal(movie[3], picture(3))
    with open_movie(tmp_path / "killed.h5", dataset="/entry/denoised/frames") as movie:
        assert (len(movie), movie.dtype) == (4, np.float32)
        np.testing.assert_array_equal(movie[3], picture(3).astype(np.float32) / 2)


def test_growing_file_is_read_by_another_process_commit_by_commit(tmp_path: Path) -> None:
    file = record(tmp_path / "r.h5", pairs(range(3)), close=False)
    code = "import sys, pathlib; from emstream.recording import Recording; r = Recording(pathlib.Path(sys.argv[1])); "
    code += "print(len(r.raw), len(r.denoised), int(r.raw[len(r.raw) - 1].sum()), r.ended)"

    def read() -> list[str]:
        command = [sys.executable, "-c", code, str(tmp_path / "r.h5")]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.split()

    assert read() == ["3", "3", str(picture(2).sum())]
    file.add(raw(3))
    assert read()[0] == "3"
    file.commit({})
    assert read() == ["4", "3", str(picture(3).sum())]
    file.close("stopped", {})
    assert read() == ["4", "3", str(picture(3).sum()), "stopped"]


def test_recordings_need_hdf5plugin_and_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hdf5plugin", None)
    with pytest.raises(OutputError, match=r"pip install 'emstream\[files\]', or record uncompressed"):
        record(tmp_path / "r.h5", [raw(0)])
    assert not (tmp_path / "r.h5").exists()
    record(tmp_path / "r.h5", [raw(0)], compress=False)


# -- what is no recording ---------------------------------------------------------


def damaged(path: Path, change: Any) -> Path:
    record(path, pairs(range(3)))
    with h5py.File(path, "r+") as file:
        change(file)
    return path


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            lambda f: f.attrs.modify("emstream_recording", 2),
            "version 2, and this emstream reads up to 1; upgrade",
        ),
        (lambda f: f.attrs.__delitem__("emstream_recording"), "no recording of emstream"),
        (lambda f: f["entry/raw/complete"].write_direct(np.array(0)), "recording without frames"),
        (lambda f: f["entry/raw/complete"].write_direct(np.array(9)), "damaged recording"),
        (lambda f: f["entry"].__delitem__("gaps"), "damaged recording"),
    ],
)
def test_recording_that_cannot_be_read_says_why(tmp_path: Path, change: Any, complaint: str) -> None:
    with pytest.raises(FileFormatError, match=complaint):
        Recording(damaged(tmp_path / "r.h5", change))


def test_recording_cut_short_is_refused_or_fails_at_the_frame_that_is_gone(tmp_path: Path) -> None:
    record(tmp_path / "r.h5", pairs(range(50)))
    whole = (tmp_path / "r.h5").read_bytes()
    for share in (0.01, 0.2, 0.5, 0.9):
        (tmp_path / "r.h5").write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(FileFormatError, match=r"r\.h5.*is the file whole"):
            Recording(tmp_path / "r.h5")
    (tmp_path / "r.h5").write_bytes(whole[:-100])  # nothing is in those
    with Recording(tmp_path / "r.h5") as recording:
        for n in range(50):
            np.testing.assert_array_equal(recording.raw[n], picture(n))


def test_recording_whose_last_frame_found_no_room_is_read_up_to_it(tmp_path: Path) -> None:
    file = record(tmp_path / "r.h5", pairs(range(4)), close=False, compress=False)
    with h5py.File(tmp_path / "r.h5", "r", swmr=True) as read:
        reckoned = read.id.get_filesize()
    file.add(raw(4))
    file.abandon()
    os.truncate(tmp_path / "r.h5", reckoned)
    with pytest.raises(OSError, match="truncated file"):
        h5py.File(tmp_path / "r.h5")
    assert is_recording(tmp_path / "r.h5")
    with Recording(tmp_path / "r.h5") as recording:
        assert (len(recording.raw), len(recording.denoised), recording.ended) == (4, 4, "write error")
        for n in range(4):
            np.testing.assert_array_equal(recording.raw[n], picture(n))


@pytest.mark.parametrize("content", [b"", b"no HDF5", b"\x89HDF\r\n\x1a\n" + bytes(40)])
def test_file_that_is_no_hdf5_is_no_recording(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "r.h5").write_bytes(content)
    assert not is_recording(tmp_path / "r.h5")
    with pytest.raises(FileFormatError, match="cannot be read"):
        Recording(tmp_path / "r.h5")


def test_damaged_header_is_named_by_its_row(tmp_path: Path) -> None:
    path = damaged(tmp_path / "r.h5", lambda f: f["entry/raw/header"].__setitem__(slice(None), 0xC1))
    with Recording(path) as recording, pytest.raises(FileFormatError, match="header of row 1 is damaged"):
        recording.raw.header(1)


# -- gaps ---------------------------------------------------------------------------


def ranges(gaps: GapMap) -> list[list[int]]:
    return [row for row in gaps.changes()[1].tolist() if row[0] >= 0]


def test_gap_is_noted_with_the_row_after_it() -> None:
    gaps = GapMap()
    for row, number in enumerate([3, 4, 7, 8, 10]):
        gaps.note("a", number, row)
    assert ranges(gaps) == [[5, 6, 2], [9, 9, 4]]
    assert gaps.missing == 3


def test_late_frame_splits_its_gap() -> None:
    gaps = GapMap()
    for row, number in enumerate([0, 5, 3]):
        gaps.note("a", number, row)
    assert sorted(ranges(gaps)) == [[1, 2, 1], [4, 4, 1]]


def test_camera_that_begins_again_opens_no_gap() -> None:
    gaps = GapMap()
    for row, number in enumerate([998, 999, 0, 1, 3]):
        gaps.note("a", number, row)
    assert ranges(gaps) == [[2, 2, 4]]


def test_next_file_goes_on_where_the_last_one_ended() -> None:
    gaps = GapMap()
    gaps.note("a", 5, 0)
    gaps.note("a", 7, 1)
    gaps = gaps.continued()
    gaps.note("a", 9, 0)
    assert ranges(gaps) == [[8, 8, 0]]


@given(st.lists(st.integers(0, 40), max_size=60), st.lists(st.integers(0, 59)))
def test_gap_map_is_what_lies_between_first_and_last_without_those_seen(
    numbers: list[int], reads: list[int]
) -> None:
    numbers = [n + 1 for n in numbers]  # 0 begins again
    gaps, kept = GapMap(), {}
    for row, number in enumerate(numbers):
        gaps.note("a", number, row)
        if row in reads:
            start, changed = gaps.changes()
            kept |= dict(enumerate(changed.tolist(), start))
    start, changed = gaps.changes()
    kept |= dict(enumerate(changed.tolist(), start))
    found = {n for first, last, _ in kept.values() if first > 0 for n in range(first, last + 1)}
    expected = set(range(numbers[0], max(numbers) + 1)) - set(numbers) if numbers else set()
    assert found == expected
    assert gaps.missing == len(expected)


# -- backlog --------------------------------------------------------------------------


def taken(backlog: Backlog) -> list[tuple[str, int]]:
    found = []
    while entry := backlog.take(0):
        assert entry.frame is not None
        found.append((entry.topic, entry.frame.number))
    return found


def begun(limit_bytes: int) -> Backlog:
    backlog = Backlog(limit_bytes)
    backlog.begin()
    return backlog


def test_entries_leave_in_the_order_they_came() -> None:
    backlog = begun(10**9)
    for entry in pairs(range(3)):
        backlog.put(entry)
    assert taken(backlog) == [(topic, n) for n in range(3) for topic in ("raw", "denoised")]
    assert backlog.nbytes == 0


def test_raw_wins_over_denoised_when_room_runs_out() -> None:
    entries = pairs(range(20))
    backlog = begun(sum(entry.nbytes for entry in entries if entry.topic == "raw"))
    for entry in entries:
        backlog.put(entry)
    assert backlog.lost["raw"] == 0
    assert backlog.lost["denoised"] == 20
    assert taken(backlog) == [("raw", n) for n in range(20)]


@given(st.integers(1, 200_000), st.lists(st.booleans(), max_size=60))
def test_every_entry_is_taken_or_counted_as_lost_in_bounded_memory(limit: int, puts: list[bool]) -> None:
    backlog, entries, out = begun(limit), iter(pairs(range(len(puts)))), {"raw": 0, "denoised": 0}
    put = {"raw": 0, "denoised": 0}
    for is_put in puts:
        if is_put:
            backlog.put(entry := next(entries))
            put[entry.topic] += 1
        elif entry := backlog.take(0):
            out[entry.topic] += 1
        assert backlog.nbytes <= limit
    for topic, _ in taken(backlog):
        out[topic] += 1
    assert {topic: out[topic] + backlog.lost[topic] for topic in out} == put


def test_look_back_forgets_what_is_older_and_what_finds_no_room() -> None:
    backlog = Backlog(10**9, look_back_s=3600)
    for entry in pairs(range(5)):
        backlog.put(entry)
    assert backlog.take(0) is None
    backlog.begin()
    assert len(taken(backlog)) == 10
    small = Backlog(4 * raw(0).nbytes, look_back_s=3600)
    for n in range(9):
        small.put(raw(n))
    small.begin()
    assert taken(small) == [("raw", 7), ("raw", 8)]
    assert small.lost == {"raw": 0, "denoised": 0}


def test_what_waits_when_the_disk_fails_is_counted_as_lost() -> None:
    backlog = begun(10**9)
    for entry in pairs(range(3)):
        backlog.put(entry)
    backlog.give_up()
    backlog.put(raw(3))
    assert backlog.lost == {"raw": 4, "denoised": 3}
    assert backlog.is_done


def test_closing_wakes_a_writer_that_waits() -> None:
    backlog, ended = begun(10**6), threading.Event()
    thread = threading.Thread(target=lambda: (backlog.take(60), ended.set()))
    thread.start()
    backlog.close()
    assert ended.wait(10)
    thread.join()


@pytest.mark.parametrize(
    ("text", "expected"), [("10GiB", 10 * 2**30), ("500MB", 5 * 10**8), ("4096", 4096), ("1.5k", 1500)]
)
def test_sizes_are_read_as_people_write_them(text: str, expected: int) -> None:
    assert bytes_of(text, "split") == expected


@pytest.mark.parametrize("text", ["", "ten", "-1GiB", "0", "5 parsecs", "1iB"])
def test_size_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="split must be a size such as 10GiB, got"):
        bytes_of(text, "split")


def test_report_that_does_not_fit_is_left_out(tmp_path: Path) -> None:
    file: RecordingFile = record(tmp_path / "r.h5", [raw(0)], close=False)
    file.close("stopped", {"report": {"text": "x" * 20_000}})
    with Recording(tmp_path / "r.h5") as recording:
        assert json.dumps(recording.report) == "{}"
