"""The recorder beside a running service: nothing it does can cost a frame, and what it loses it counts."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import threading
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq

from emstream import record as module
from emstream import wire
from emstream.errors import OutputError, SourceError
from emstream.frame import Frame
from emstream.intake import Overrun
from emstream.record import Recorder, RecordSettings
from emstream.record_process import RecorderProcess
from emstream.recording import Recording, disk
from emstream.recording.writer import RecordingFile
from tests.conftest import Rig, exact, message
from tests.recordings import denoised, raw, record

pytest.importorskip("hdf5plugin")

HELLO = b"recorder-test"


def wait(condition: Callable[[], Any], timeout_s: float = 20) -> None:
    """Wait until `condition` holds."""
    deadline = threading.Event()
    timer = threading.Timer(timeout_s, deadline.set)
    timer.start()
    try:
        while not condition():
            assert not deadline.is_set(), "still waiting"
            deadline.wait(0.005)
    finally:
        timer.cancel()
        timer.join()


class Recorded:
    """A service with a recorder that hears it from the first frame on."""

    def __init__(self, rig: Rig, **settings: Any) -> None:
        self.rig = rig
        self.recorder = Recorder(RecordSettings(input=rig.service.publisher.endpoint, **settings))
        self.report: dict[str, Any] = {}
        self.statuses: list[dict[str, Any]] = []
        self.fault: Exception | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        assert rig.service.publisher.wait_for(HELLO, 20)
        rig.start()

    def _run(self) -> None:
        try:
            self.report = self.recorder.run(on_status=self.statuses.append, hello=HELLO)
        except Exception as error:
            self.fault = error

    def send(self, numbers: Any, shape: tuple[int, int] = (32, 48), **fields: Any) -> None:
        for n in numbers:
            self.rig.camera.send_multipart(message(n, pixels(n, shape), **fields))

    @property
    def frames(self) -> dict[str, int]:
        return self.recorder.status()["frames"]

    def heard(self, raw_frames: int) -> None:
        wait(lambda: self.recorder._heard.raw >= raw_frames and self.recorder._heard.is_paired)

    def end(self) -> dict[str, Any]:
        self.recorder.stop()
        return self.join()

    def join(self) -> dict[str, Any]:
        self._thread.join(timeout=20)
        assert not self._thread.is_alive(), f"the recorder did not end: {self.recorder.status()}"
        if self.fault:
            raise self.fault
        return self.report


def pixels(n: int, shape: tuple[int, int] = (32, 48)) -> np.ndarray:
    return np.random.default_rng(n).poisson(0.5, shape).astype(np.uint8)


@pytest.fixture
def start(rig: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Recorded]]:
    monkeypatch.setattr(module, "OBSERVE_S", 0.05)
    started: list[Recorded] = []

    def make(settings: dict[str, Any] | None = None, **options: Any) -> Recorded:
        started.append(Recorded(rig({"overrun": Overrun.block} | (settings or {})), **options))
        return started[-1]

    yield make
    for each in started:
        each.recorder.stop()
        each.recorder.stop()
        each._thread.join(timeout=30)
        assert not each._thread.is_alive()


def test_everything_published_is_recorded_as_it_was_published(start: Any, tmp_path: Path) -> None:
    run = start(output=tmp_path / "r.h5", frames=20)
    run.send(range(20), pixel_size_m=6e-12, extra={"stage": {"x_um": 1.5}, "exotic": [1, "two", None]})
    report = run.join()
    assert report["frames"] == {"raw": 20, "denoised": 20}
    assert report["ended"] == "frames counted"
    assert sum((*report["lost"].values(), *report["unheard"].values(), report["missing"])) == 0
    published = run.rig.published(b"denoised")
    with Recording(tmp_path / "r.h5") as recording:
        for n in range(20):
            np.testing.assert_array_equal(recording.raw[n], pixels(n))
            assert recording.raw.header(n)["exotic"] == [1, "two", None]
            assert recording.denoised.header(n) == published[n][0]
            np.testing.assert_array_equal(recording.denoised[n], published[n][1])
        assert recording.engines[0]["name"] == "identity"
        assert recording.ledger["published"] == 20
        assert exact(recording.ledger)
        assert [mark["htype"] for _, mark in recording.marks] == [wire.START]


def test_frame_that_is_being_written_is_not_taken_for_lost(
    start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, add = [], RecordingFile.add

    def watched(self: RecordingFile, entry: Any) -> bool:
        seen.append(run.recorder.status()["lost"])
        return add(self, entry)

    monkeypatch.setattr(RecordingFile, "add", watched)
    run = start(output=tmp_path / "r.h5", frames=5)
    run.send(range(5))
    run.join()
    assert len(seen) > 9
    assert all(lost == {"raw": 0, "denoised": 0} for lost in seen)


def test_gap_map_holds_what_the_camera_left_out(start: Any, tmp_path: Path) -> None:
    run = start(output=tmp_path / "r.h5", frames=6)
    run.send([0, 1, 5, 6, 8, 9])
    assert run.join()["missing"] == 4
    with Recording(tmp_path / "r.h5") as recording:
        assert recording.gaps.tolist() == [[2, 4, 2], [7, 7, 4]]
        assert recording.recorder["missing"] == 4


def test_recording_ends_with_the_series_if_asked_to(start: Any, tmp_path: Path) -> None:
    run = start(output=tmp_path / "r.h5", until_end=True)
    run.send(range(5))
    run.rig.camera.send_multipart(
        [b"raw", wire.pack({"htype": wire.END, "source": "test", "series": 1, "dose": 3})]
    )
    assert run.join()["ended"] == "series ended"
    with Recording(tmp_path / "r.h5") as recording:
        assert len(recording.denoised) == 5
        assert recording.marks[-1][1]["dose"] == 3


def test_files_are_split_by_size_and_hold_every_frame_once(start: Any, tmp_path: Path) -> None:
    run = start(output=tmp_path / "r.h5", frames=60, split_bytes=1_000_000, compress=False)
    run.send(range(60), shape=(128, 128))
    files = [Path(name) for name in run.join()["files"]]
    assert [path.name for path in files[:3]] == ["r.h5", "r-0002.h5", "r-0003.h5"]
    numbers = []
    for part, path in enumerate(files, 1):
        with Recording(path) as recording:
            numbers += recording.raw.numbers.tolist()
            assert recording.denoised.numbers.tolist() == recording.raw.numbers.tolist()
            assert recording.ended == ("continued" if part < len(files) else "frames counted")
            assert not len(recording.gaps)
        assert path.stat().st_size < 1_500_000  # the columns are written last
    assert numbers == list(range(60))


def test_gap_at_the_seam_of_two_files_is_in_the_second(start: Any, tmp_path: Path) -> None:
    run = start(output=tmp_path / "r.h5", frames=2, split_bytes=1)
    run.send([3, 7])
    assert run.join()["missing"] == 3
    with Recording(tmp_path / "r-0002.h5") as recording:
        assert recording.gaps.tolist() == [[4, 6, 0]]


def test_change_of_frame_size_begins_another_file(start: Any, tmp_path: Path) -> None:
    run = start(output=tmp_path / "r.h5", frames=6)
    run.send(range(3))
    run.send(range(3, 6), shape=(16, 16))
    files = run.join()["files"]
    with Recording(Path(files[0])) as first, Recording(Path(files[1])) as second:
        assert (first.raw.shape, second.raw.shape) == ((3, 32, 48), (3, 16, 16))
        assert (len(first.denoised), len(second.denoised)) == (3, 3)


def test_folder_gets_a_file_named_by_date_and_time(start: Any, tmp_path: Path) -> None:
    run = start(output=tmp_path, frames=1)
    run.send(range(1))
    (name,) = run.join()["files"]
    assert Path(name).match("emstream-*.h5")
    assert Path(name).parent == tmp_path


def test_overwriting_removes_every_part_of_the_older_recording(start: Any, tmp_path: Path) -> None:
    others = [tmp_path / "r-2.h5", tmp_path / "rr-0002.h5", tmp_path / "r-2026.h5"]
    for path in (tmp_path / "r.h5", *others):
        path.touch()
    for part in (7, 10001):
        record(tmp_path / f"r-{part:04d}.h5", [raw(0)], part=part)
    run = start(output=tmp_path / "r.h5", overwrite=True, frames=2, split_bytes=1)
    run.send(range(2))
    files = [Path(name) for name in run.join()["files"]]
    assert sorted(tmp_path.glob("*.h5")) == sorted([*files, *others])
    with Recording(files[0]) as first, Recording(files[1]) as second:
        assert first.id == second.id != ""


# -- looking back -------------------------------------------------------------------


def test_look_back_records_what_came_before_it_was_asked_to(start: Any, tmp_path: Path) -> None:
    run = start(output=tmp_path / "r.h5", look_back_s=3600)
    run.send(range(10))
    run.heard(10)
    assert not (tmp_path / "r.h5").exists()
    run.recorder.begin()
    run.send(range(10, 15))
    wait(lambda: run.frames == {"raw": 15, "denoised": 15})
    run.end()
    with Recording(tmp_path / "r.h5") as recording:
        assert recording.raw.numbers.tolist() == recording.denoised.numbers.tolist() == list(range(15))


def test_look_back_that_is_never_asked_for_leaves_nothing(start: Any, tmp_path: Path) -> None:
    run = start(output=tmp_path / "r.h5", look_back_s=10)
    run.send(range(10))
    run.heard(10)
    report = run.end()
    assert (report["files"], report["frames"]) == ([], {"raw": 0, "denoised": 0})
    assert list(tmp_path.glob("*.h5")) == []


def test_look_back_holds_no_more_than_half_its_memory(start: Any, tmp_path: Path) -> None:
    run = start(output=tmp_path / "r.h5", look_back_s=3600, buffer_bytes=200_000)
    run.send(range(100))
    run.heard(100)
    assert 50_000 < run.recorder.status()["buffer_bytes"] <= 100_000
    run.recorder.begin()
    run.end()
    with Recording(tmp_path / "r.h5") as recording:
        assert recording.raw.numbers[-1] == 99
        assert np.all(np.diff(recording.raw.numbers) == 1)


def test_look_back_is_refused_at_its_start_without_disk_for_a_minute(
    start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "free_bytes", lambda folder: disk.RESERVE_BYTES + 100_000)
    run = start(output=tmp_path / "r.h5", look_back_s=3600)
    run.send(range(50))
    with pytest.raises(OutputError, match="make room or record elsewhere"):
        run.join()


def test_look_back_is_written_as_long_as_it_fits_when_the_disk_has_filled_meanwhile(
    start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    free = [10**12]
    monkeypatch.setattr(disk, "free_bytes", lambda folder: free[0])
    run = start(output=tmp_path / "r.h5", look_back_s=3600)
    run.send(range(20))
    run.heard(20)
    wait(lambda: run.recorder._had_room)
    free[0] = disk.RESERVE_BYTES + 1000
    wait(lambda: "make room or record elsewhere" in caplog.text)
    run.recorder.begin()
    report = run.join()
    assert report["ended"] == "disk low"
    with Recording(tmp_path / "r.h5") as recording:
        assert recording.raw.numbers.tolist() == recording.denoised.numbers.tolist() == list(range(20))
        assert recording.ended == "disk low"


# -- the disk -----------------------------------------------------------------------


def test_recorder_refuses_to_start_without_disk_for_a_minute(
    start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = disk.RESERVE_BYTES + 100_000
    monkeypatch.setattr(disk, "free_bytes", lambda folder: free)
    run = start(output=tmp_path / "r.h5")
    run.send(range(200))
    with pytest.raises(OutputError, match=r"64\.1 MiB free, and a minute at .* MB/s takes .*make room"):
        run.join()
    assert list(tmp_path.glob("*.h5")) == []
    run.rig.wait(lambda ledger: ledger["published"] == 200)


def test_recorder_does_not_even_wait_for_frames_on_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "free_bytes", lambda folder: disk.RESERVE_BYTES - 1)
    with pytest.raises(OutputError, match="has 64 MiB free"):
        Recorder(RecordSettings(input="ipc:///nowhere", output=tmp_path / "r.h5"))


def test_recording_ends_cleanly_and_says_so_when_the_disk_runs_low(
    start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    free = [10**12]
    monkeypatch.setattr(disk, "free_bytes", lambda folder: free[0])
    run = start(output=tmp_path / "r.h5")
    run.send(range(20))
    wait(lambda: run.frames["denoised"] == 20)
    free[0] = disk.RESERVE_BYTES
    report = run.join()
    assert report["ended"] == "disk low"
    assert "has only 64 MiB left" in caplog.text
    with Recording(tmp_path / "r.h5") as recording:
        assert (len(recording.raw), len(recording.denoised), recording.ended) == (20, 20, "disk low")


def test_slow_disk_loses_denoised_frames_before_raw_ones_and_counts_them(
    start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    disk_works, add = threading.Event(), RecordingFile.add

    def slow(self: RecordingFile, entry: Any) -> bool:
        assert disk_works.wait(30)
        return add(self, entry)

    monkeypatch.setattr(RecordingFile, "add", slow)
    run = start(output=tmp_path / "r.h5", buffer_bytes=200 * 2000)
    run.send(range(150))
    run.heard(150)
    wait(lambda: "the recording loses frames" in caplog.text)
    disk_works.set()
    report = run.end()
    assert report["frames"]["raw"] == 150
    assert report["lost"]["raw"] == 0
    assert report["lost"]["denoised"] > 50
    assert report["frames"]["denoised"] + report["lost"]["denoised"] == 150
    assert any(status["lost"]["denoised"] for status in run.statuses)
    with Recording(tmp_path / "r.h5") as recording:
        assert recording.raw.numbers.tolist() == list(range(150))
        assert recording.recorder["denoised_lost"] == report["lost"]["denoised"]
        pairs = [(recording.raw.numbers[row], n) for row, n in
                 zip(recording.raw_rows, recording.denoised.numbers, strict=True)]  # fmt: skip
        assert all(a == b for a, b in pairs)
    assert run.rig.ledger["published"] == 150


def test_frames_beyond_all_memory_are_lost_and_counted_raw_ones_too(
    start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk_works, add = threading.Event(), RecordingFile.add

    def slow(self: RecordingFile, entry: Any) -> bool:
        assert disk_works.wait(30)
        return add(self, entry)

    monkeypatch.setattr(RecordingFile, "add", slow)
    run = start(output=tmp_path / "r.h5", buffer_bytes=50_000)
    run.send(range(150))
    run.heard(150)
    disk_works.set()
    report = run.end()
    assert report["lost"]["raw"] > 50
    for topic in ("raw", "denoised"):
        assert report["frames"][topic] + report["lost"][topic] == 150
    assert report["missing"] == pytest.approx(report["lost"]["raw"], abs=150)


def committed(recorder: Recorder) -> bool:
    """Whether all that was recorded is readable."""
    return recorder._file is not None and not any(recorder._file.uncommitted.values())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if os.name != "posix" or os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small file system takes root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_disk_that_is_full_ends_the_recording_with_what_was_committed(
    start: Any, small_disk: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(disk, "free_bytes", lambda folder: 10**12)
    run = start(output=small_disk / "r.h5", compress=False)
    for first in range(0, 400, 20):  # little by little, so that there are commits
        run.send(range(first, first + 20), shape=(64, 64))
        run.rig.wait(lambda ledger, done=first + 20: ledger["published"] == done)
        wait(
            lambda done=first + 20: (
                run.recorder._ended or (run.frames["raw"] == done and committed(run.recorder))
            )
        )
    report = run.join()
    assert report["ended"] == "write error"
    assert "No space left on device" in caplog.text
    assert report["frames"]["raw"] + report["lost"]["raw"] == run.recorder._heard.raw
    with Recording(small_disk / "r.h5") as recording:
        assert len(recording.raw) == report["frames"]["raw"] > 50
        assert len(recording.denoised) == report["frames"]["denoised"]
        for row in (0, len(recording.raw) - 1):
            np.testing.assert_array_equal(recording.raw[row], pixels(recording.raw.numbers[row], (64, 64)))
    run.rig.wait(lambda ledger: ledger["published"] == 400)


def test_write_error_while_closing_ends_the_recording_with_a_report(
    start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    commit = RecordingFile.commit

    def failing(self: RecordingFile, counters: Any) -> None:
        if "ended" in counters:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        commit(self, counters)

    monkeypatch.setattr(RecordingFile, "commit", failing)
    run = start(output=tmp_path / "r.h5", frames=5)
    run.send(range(5))
    report = run.join()
    assert (report["ended"], report["frames"]) == ("write error", {"raw": 5, "denoised": 5})
    assert "No space left on device" in caplog.text
    with Recording(tmp_path / "r.h5") as recording:
        assert (len(recording.raw), recording.ended) == (5, "write error")


def test_value_that_a_file_refuses_is_a_write_error_and_no_wrong_use(
    start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = RecordingFile.add

    def refusing(self: RecordingFile, entry: Any) -> bool:
        if entry.frame is not None and entry.frame.number == 3:
            raise ValueError("cannot be stored")
        return add(self, entry)

    monkeypatch.setattr(RecordingFile, "add", refusing)
    run = start(output=tmp_path / "r.h5")
    run.send(range(5))
    report = run.join()
    assert (report["ended"], report["frames"]["raw"]) == ("write error", 3)


def test_next_file_that_cannot_be_begun_ends_the_recording_with_a_report(
    start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    set_up = RecordingFile._set_up

    def failing(self: RecordingFile, first: Any, part: int, filters: Any) -> None:
        if part == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        set_up(self, first, part, filters)

    monkeypatch.setattr(RecordingFile, "_set_up", failing)
    run = start(output=tmp_path / "r.h5", split_bytes=1)
    run.send(range(6))
    report = run.join()
    assert report["ended"] == "write error"
    assert report["frames"]["raw"] == 2
    assert report["frames"]["raw"] + report["lost"]["raw"] == run.recorder._heard.raw
    assert "r-0003.h5 cannot be written: No space left on device" in caplog.text
    assert sorted(path.name for path in tmp_path.glob("*.h5")) == ["r-0002.h5", "r.h5"]
    with Recording(tmp_path / "r-0002.h5") as recording:
        assert (recording.raw.numbers.tolist(), recording.ended) == ([1], "continued")


# -- what it never heard --------------------------------------------------------------


def frame(entry: Any) -> Frame:
    assert entry.frame is not None
    return entry.frame


def heard(order: list[tuple[str, int]]) -> dict[str, int]:
    ears = module._Heard()
    for topic, n in order:
        if topic == "raw":
            ears.receive_raw(frame(raw(n)))
        else:
            ears.receive_denoised(frame(denoised(n)))
    return ears.unheard


def test_frames_published_but_never_heard_are_counted() -> None:
    both = [(topic, n) for n in range(10) for topic in ("raw", "denoised")]
    assert heard(both) == {"raw": 0, "denoised": 0}
    assert heard([each for each in both if each[1] not in (4, 5)]) == {"raw": 2, "denoised": 2}
    assert heard([each for each in both if each != ("raw", 4)]) == {"raw": 1, "denoised": 0}
    assert heard([each for each in both if each != ("denoised", 4)]) == {"raw": 0, "denoised": 1}


def test_statistics_and_the_end_tell_of_frames_that_none_came_after() -> None:
    ears = module._Heard()
    for n in (0, 1):
        ears.receive_raw(frame(raw(n)))
        ears.receive_denoised(frame(denoised(n)))
    assert ears.published
    ears.receive_raw(frame(raw(2)))  # and its denoised one is lost
    ears.stats({"ledger": {"published": ears.published + 3}})
    ears.stats({"ledger": {"published": ears.published}})
    assert ears.unheard == {"raw": 2, "denoised": 3}
    ears.note_published(ears.published + 4)
    assert ears.unheard == {"raw": 6, "denoised": 7}


def test_frames_never_heard_before_the_look_back_begins_are_no_loss() -> None:
    ears = module._Heard()
    for n in (0, 4, 9):
        ears.receive_raw(frame(raw(n)))
        ears.receive_denoised(frame(denoised(n)))
    assert ears.unheard == {"raw": 7, "denoised": 7}
    (first_ns, *_), (second_ns, *_) = ears._unheard
    ears.forget(first_ns)
    assert ears.unheard == {"raw": 7, "denoised": 7}
    ears.forget(second_ns)
    assert ears.unheard == {"raw": 4, "denoised": 4}
    ears.forget(None)
    assert ears.unheard == {"raw": 0, "denoised": 0}


def test_look_back_forgets_what_was_not_heard_before_it(
    start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_STATUS_S", 0.05)
    run = start(output=tmp_path / "r.h5", look_back_s=0.2)
    run.send(range(3))
    run.heard(3)
    run.recorder._heard.published -= 5  # as if five pairs had never come
    run.send([3])
    run.heard(4)
    wait(lambda: sum(run.recorder.status()["unheard"].values()) > 0)
    number = 4

    def forgotten() -> bool:
        nonlocal number
        run.send([number])
        number += 1
        return not any(run.recorder.status()["unheard"].values())

    wait(forgotten)
    run.recorder.begin()
    run.heard(number)
    report = run.end()
    assert report["unheard"] == {"raw": 0, "denoised": 0}
    assert report["frames"]["raw"] > 0


def test_look_back_that_nobody_asked_for_is_not_lost(
    start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start(output=tmp_path / "r.h5", look_back_s=1000.0)
    monkeypatch.setattr(disk, "free_bytes", lambda folder: 1000)
    run.send(range(5))
    with pytest.raises(OutputError, match="make room"):
        run.join()
    assert run.recorder._lost() == {"raw": 0, "denoised": 0}


def test_folder_that_vanishes_ends_the_recording_with_a_word(
    start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(folder: Path) -> None:
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))

    run = start(output=tmp_path / "r.h5")
    run.send(range(3))
    wait(lambda: run.frames["denoised"] == 3)
    monkeypatch.setattr(disk.shutil, "disk_usage", gone)
    with pytest.raises(OutputError, match="cannot be written any more: No such file"):
        run.join()
    with Recording(tmp_path / "r.h5") as recording:
        assert len(recording.raw) == 3


def test_recorder_that_comes_in_between_a_pair_misses_nothing() -> None:
    assert heard([("denoised", 3), ("raw", 4), ("denoised", 4)]) == {"raw": 0, "denoised": 0}


def test_service_that_begins_again_is_no_loss() -> None:
    again = [(topic, n) for n in (7, 8, 0, 1) for topic in ("raw", "denoised")]
    assert heard(again) == {"raw": 0, "denoised": 0}


# -- wrong use --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "complaint"),
    [
        ("r.tif", "recordings are .h5 files"),
        ("nowhere/r.h5", "there is no folder"),
        ("there.h5", "exists already"),
    ],
)
def test_output_that_cannot_be_is_refused_at_once(tmp_path: Path, output: str, complaint: str) -> None:
    (tmp_path / "there.h5").touch()
    with pytest.raises(OutputError, match=complaint):
        Recorder(RecordSettings(input="ipc:///x", output=tmp_path / output))


@pytest.mark.parametrize("recorder", [Recorder, RecorderProcess])
def test_folder_that_takes_no_files_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorder: Any
) -> None:
    def refuse(**options: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(disk.tempfile, "NamedTemporaryFile", refuse)
    with pytest.raises(OutputError, match=r"nothing can be written in .*: Read-only file system; let this"):
        recorder(RecordSettings(input="ipc:///x", output=tmp_path / "r.h5"))


def test_path_is_whole_wherever_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert RecordSettings(input="ipc:///x", output=Path("r.h5")).path() == tmp_path / "r.h5"
    with pytest.raises(OutputError, match=re.escape(f"there is no folder {tmp_path}/nowhere")):
        RecordSettings(input="ipc:///x", output=Path("nowhere/r.h5")).path()


def test_recordings_of_the_same_second_get_names_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Clock:
            return cls(2026, 1, 2, 3, 4, 5)

    monkeypatch.setattr(module, "datetime", Clock)
    settings = RecordSettings(input="ipc:///x", output=tmp_path)
    for name in ("", "_2", "_3"):
        assert settings.path() == tmp_path / f"emstream-20260102-030405{name}.h5"
        settings.path().touch()
    dated = RecordSettings(input="ipc:///x", output=tmp_path / "run.h5", dated=True)
    assert dated.path().name == "run-20260102-030405.h5"


def test_part_of_an_older_recording_is_in_the_way_as_well(tmp_path: Path) -> None:
    (tmp_path / "r-0002.h5").touch()
    with pytest.raises(OutputError, match=r"r-0002\.h5 exists already"):
        Recorder(RecordSettings(input="ipc:///x", output=tmp_path / "r.h5"))
    (tmp_path / "r-0002.h5").rename(tmp_path / "r-10002.h5")
    with pytest.raises(OutputError, match=r"r-10002\.h5 exists already"):
        Recorder(RecordSettings(input="ipc:///x", output=tmp_path / "r.h5"))
    Recorder(RecordSettings(input="ipc:///x", output=tmp_path / "r.h5", overwrite=True))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"look_back_s": -1.0}, "look-back must lie in"),
        ({"split_bytes": 0}, "split must be positive, got 0"),
        ({"buffer_bytes": 0}, "buffer must be positive, got 0"),
        ({"frames": 0}, "frames must be positive, got 0"),
        ({"frames": 5, "look_back_s": 3.0}, "exclude each other"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path: Path, options: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        RecordSettings(input="ipc:///x", output=tmp_path / "r.h5", **options)


def test_endpoint_that_cannot_be_is_a_source_error(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="cannot subscribe to nonsense"):
        Recorder(RecordSettings(input="nonsense", output=tmp_path / "r.h5")).run()


def test_messages_that_make_no_sense_are_skipped(tmp_path: Path, context: zmq.Context[Any]) -> None:
    recorder = Recorder(RecordSettings(input="ipc:///x", output=tmp_path / "r.h5"))
    for parts in (
        [b"raw"],
        [b"raw", b"\xc1"],
        [b"stats", b"no map"],
        [b"raw", wire.pack({"htype": "x"}), b""],
    ):
        recorder._take([zmq.Frame(part) for part in parts])
    assert recorder.status()["frames"] == {"raw": 0, "denoised": 0}
