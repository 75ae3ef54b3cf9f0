"""A recording in place of the camera it recorded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emstream import wire
from emstream.errors import SourceError
from emstream.sources import files, open_source, replay
from emstream.sources.replay import ReplaySource
from tests import test_files_source
from tests.recordings import mark, pairs, picture, raw, record
from tests.test_files_source import Bench, Clock, schedule

pytest.importorskip("hdf5plugin")


@pytest.fixture
def bench() -> Bench:
    return Bench()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (replay, test_files_source.sources):
        monkeypatch.setattr(module, "time", clock)
    return clock


def recorded(folder: Path, numbers: Any = range(6), **options: Any) -> Path:
    entries = pairs(numbers, **options)
    record(folder / "r.h5", [mark(wire.START, operator="me"), *entries, mark(wire.END)])
    return folder / "r.h5"


def test_raw_frames_come_again_with_every_field_of_their_headers(tmp_path: Path, bench: Bench) -> None:
    path = recorded(tmp_path, [3, 4, 9], series="run A", pixel_size_m=6e-12, extra={"stage": {"tilt": 2.5}})
    bench.run(open_source(f"file://{path}"))
    assert bench.order == [wire.START, 3, 4, 9, wire.END]
    for n, head, pixels in zip([3, 4, 9], bench.headers, bench.frames, strict=True):
        np.testing.assert_array_equal(pixels, picture(n))
        assert pixels.dtype == np.uint16
        came = wire.unpack(raw(n, series="run A", pixel_size_m=6e-12, extra={"stage": {"tilt": 2.5}}).header)
        sent = wire.unpack(wire.pack(wire.map_of(head)))
        assert sent.pop("replayed_ns") > 0
        assert sent == came
    assert bench.ledger.snapshot()["missing"] == 4


def test_marks_of_the_recorded_series_come_again(tmp_path: Path, bench: Bench) -> None:
    bench.run(open_source(f"file://{recorded(tmp_path)}"))
    assert [(each["htype"], each.get("operator")) for each in bench.marks] == [
        (wire.START, "me"),
        (wire.END, None),
    ]


def test_first_and_last_choose_rows(tmp_path: Path, bench: Bench) -> None:
    path = recorded(tmp_path, [10, 11, 15, 16])
    bench.run(open_source(f"file://{path}?first=1&last=2"))
    assert bench.order == [11, 15]


def test_each_pass_of_a_loop_is_a_series_of_its_own(tmp_path: Path, bench: Bench) -> None:
    bench.on_frame = lambda: bench.stop.set() if len(bench.frames) == 14 else None
    bench.run(open_source(f"file://{recorded(tmp_path)}?loop=true"))
    assert [(head.series, head.frame) for head in bench.headers[5:13]] == [
        (1, 5), *(("1 (pass 2)", n) for n in range(6)), ("1 (pass 3)", 0),
    ]  # fmt: skip
    assert bench.ledger.snapshot()["missing"] == 0


def test_original_rate_is_that_of_the_timestamps(tmp_path: Path, clock: Clock) -> None:
    source = ReplaySource(recorded(tmp_path, [0, 1, 2, 8]), rate_hz="original")
    assert schedule(source, clock, [0.003] * 4) == pytest.approx([0, 0.025, 0.05, 0.2])  # type: ignore[arg-type]


def test_chosen_rate_replaces_the_original_one(tmp_path: Path, clock: Clock) -> None:
    source = ReplaySource(recorded(tmp_path, [0, 1, 2, 8]), rate_hz=10)
    assert schedule(source, clock, []) == pytest.approx([0, 0.1, 0.2, 0.3])  # type: ignore[arg-type]


def test_clock_that_was_set_back_does_not_stop_a_replay(tmp_path: Path, clock: Clock) -> None:
    entries = [raw(0), raw(1, timestamp_ns=1), raw(2, timestamp_ns=25_000_001)]
    record(tmp_path / "r.h5", entries)
    source = ReplaySource(tmp_path / "r.h5", rate_hz="original")
    assert schedule(source, clock, []) == pytest.approx([0, 0, 0.025])  # type: ignore[arg-type]


def test_timestamp_far_off_does_not_stall_a_replay(tmp_path: Path, clock: Clock) -> None:
    entries = [replace(raw(n), arrived_ns=10**18 + n * 30_000_000) for n in range(5)]
    entries[2] = replace(raw(2, timestamp_ns=2 * 10**18), arrived_ns=entries[2].arrived_ns)
    record(tmp_path / "r.h5", entries)
    source = ReplaySource(tmp_path / "r.h5", rate_hz="original")
    expected = [0, 0.025, 0.055, 0.055, 0.08]
    assert schedule(source, clock, []) == pytest.approx(expected)  # type: ignore[arg-type]


def test_pause_that_was_recorded_is_waited_for_and_announced(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "emstream.sources.replay")
    times_ns = [10**18, 10**18 + 60 * 10**9]
    entries = [replace(raw(n, timestamp_ns=at), arrived_ns=at) for n, at in enumerate(times_ns)]
    record(tmp_path / "r.h5", entries)
    source = ReplaySource(tmp_path / "r.h5", rate_hz="original")
    assert schedule(source, clock, []) == pytest.approx([0, 60])  # type: ignore[arg-type]
    assert "frame 1 is due in 60 s" in caplog.text


def test_without_timestamps_the_recorders_clock_counts(tmp_path: Path) -> None:
    entries = [raw(n, timestamp_ns=None) for n in range(3)]
    record(tmp_path / "r.h5", entries)
    with files.replay.Recording(tmp_path / "r.h5") as recording:
        due_s = replay.schedule(recording, range(3), "original")
    assert due_s[2] == pytest.approx((entries[2].arrived_ns - entries[0].arrived_ns) / 1e9)


def test_replay_waits_for_the_engine_unless_it_has_a_rate(tmp_path: Path) -> None:
    path = recorded(tmp_path)
    assert open_source(f"file://{path}").lossless
    assert not open_source(f"file://{path}?rate=original").lossless
    assert not open_source(f"file://{path}?rate=40").lossless


def test_recording_whose_recorder_was_killed_is_replayed_up_to_its_last_commit(
    tmp_path: Path, bench: Bench
) -> None:
    file = record(tmp_path / "r.h5", pairs(range(4)), close=False)
    file.add(raw(4))
    (tmp_path / "killed.h5").write_bytes((tmp_path / "r.h5").read_bytes())
    file.close("stopped", {})
    bench.run(open_source(f"file://{tmp_path}/killed.h5"))
    assert bench.order == [0, 1, 2, 3]


def test_single_track_can_be_played_as_a_movie(tmp_path: Path, bench: Bench) -> None:
    bench.run(open_source(f"file://{recorded(tmp_path)}?dataset=entry/denoised/frames"))
    assert {head.type for head in bench.headers} == {"float32"}


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ("speed=4", "unknown option speed; known: rate, loop, first, last"),
        ("rate=0", "rate must be a positive number"),
        ("rate=fast", "rate must be a number, got 'fast'"),
        ("last=6", "has frames 0-5; first and last must lie there in order, got 0 and 6"),
        ("first=3&last=2", "got 3 and 2"),
    ],
)
def test_options_that_make_no_sense_are_refused(tmp_path: Path, options: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        open_source(f"file://{recorded(tmp_path)}?{options}")


def test_recording_of_a_newer_version_is_a_source_error(tmp_path: Path) -> None:
    import h5py

    with h5py.File(recorded(tmp_path), "r+") as file:
        file.attrs.modify("emstream_recording", 7)
    with pytest.raises(SourceError, match="version 7, and this emstream reads up to 1; upgrade emstream"):
        open_source(f"file://{tmp_path}/r.h5")


def test_recording_without_frames_is_a_source_error(tmp_path: Path) -> None:
    import h5py

    with h5py.File(recorded(tmp_path), "r+") as file:
        file["entry/raw/complete"][()] = 0
    with pytest.raises(SourceError, match="recording without frames"):
        open_source(f"file://{tmp_path}/r.h5")


def test_recording_cut_short_is_a_source_error(tmp_path: Path) -> None:
    path = recorded(tmp_path, range(50))
    path.write_bytes(path.read_bytes()[:-20_000])
    with pytest.raises(SourceError, match=r"r\.h5 cannot be read.*is the file whole"):
        open_source(f"file://{path}")


def test_header_that_disagrees_with_its_pixels_is_a_source_error(tmp_path: Path, bench: Bench) -> None:
    import h5py

    path = recorded(tmp_path, range(2))
    header = wire.unpack(raw(0).header)
    other = wire.pack(header | {"shape": [header["shape"][1], header["shape"][0]]})
    with h5py.File(path, "r+") as file:
        file["entry/raw/header"][: len(other)] = np.frombuffer(other, np.uint8)
    with pytest.raises(SourceError, match="frame 0 and its header disagree"):
        bench.run(open_source(f"file://{path}"))


def test_frames_over_the_limit_are_a_source_error(tmp_path: Path) -> None:
    bench = Bench(max_frame_bytes=100)
    with pytest.raises(SourceError, match="more than the limit of 100"):
        bench.run(open_source(f"file://{recorded(tmp_path)}"))
