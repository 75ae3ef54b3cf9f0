"""The recorder's process: told to begin and to end, it says how it fares, to the service and to whoever looks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import pytest

from emstream import record_process, restarts
from emstream.errors import OutputError
from emstream.intake import Overrun
from emstream.record import RecordSettings
from emstream.record_process import RecorderProcess
from emstream.recorded import duration, recording_of
from emstream.recording import Recording, disk, is_recording
from emstream.status import statuses
from tests.conftest import Rig, message
from tests.test_record import pixels, wait
from tests.test_status import printed

pytest.importorskip("hdf5plugin")


class Beside:
    """A service with a recorder beside it."""

    def __init__(self, rig: Rig, output: Path, **settings: Any) -> None:
        self.rig = rig
        self.publisher = rig.service.publisher
        self.recorder = RecorderProcess(
            RecordSettings(input=self.publisher.endpoint, output=output, **settings),
            on_status=rig.service.pipeline.note_recording,
        )
        self.recorder.wait_until_it_listens(self.publisher)
        rig.start()
        self.sent = 0

    def send(self, frames: int) -> None:
        for _ in range(frames):
            self.rig.camera.send_multipart(message(self.sent, pixels(self.sent)))
            self.sent += 1

    def hang(self) -> int:
        """Stop the recorder's process; returns its number."""
        pid = self.recorder._process.pid
        assert pid
        os.kill(pid, signal.SIGSTOP)
        return pid

    def kill(self, number: int = signal.SIGKILL) -> None:
        """End the recorder's process, and wait until another one has taken over."""
        died, pid = self.recorder.status().get("died", 0), self.recorder._process.pid
        assert pid
        os.kill(pid, number)
        wait(lambda: self.recorder.status().get("died") == died + 1 and not self.is_("restarting"))

    def is_(self, state: str) -> bool:
        return bool(self.recorder.status()["state"] == state)

    def records(self, frames: int) -> None:
        wait(lambda: self.is_("recording") and self.recorder.status()["frames"]["denoised"] == frames)

    def figures(self) -> Iterator[dict[str, Any]]:
        return statuses(self.publisher.endpoint, silent_s=20)


@pytest.fixture
def beside(rig: Any, tmp_path: Path) -> Iterator[Callable[..., Beside]]:
    started: list[Beside] = []

    def make(output: Path = tmp_path, queue: int = 10_000, **settings: Any) -> Beside:
        started.append(Beside(rig({"overrun": Overrun.block, "queue": queue}), output, **settings))
        return started[-1]

    yield make
    for each in started:
        each.recorder._asked.set()  # so that none takes over
        each.recorder._process.kill()
        each.recorder._end()


@pytest.fixture
def own_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 120 MiB."""
    folder = tmp_path / "own"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=120m", "tmpfs", str(folder)]
    if sys.platform != "linux" or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small file system takes root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def numbers(path: str) -> list[int]:
    with Recording(path) as recording:
        assert recording.ended == "stopped"
        assert recording.raw.numbers.tolist() == recording.denoised.numbers.tolist()
        found: list[int] = recording.raw.numbers.tolist()
    return found


@pytest.mark.parametrize("name", [".", "run.h5"])
def test_recordings_begin_and_end_as_told_each_with_what_came_before(
    beside: Callable[..., Beside], tmp_path: Path, name: str
) -> None:
    run = beside(tmp_path / name, look_back_s=1000.0)
    run.send(5)
    wait(lambda: run.is_("looking back") and run.rig.ledger["published"] == 5)
    run.recorder.end()  # of nothing
    run.recorder.begin()
    run.records(5)
    run.send(3)
    run.records(8)
    run.recorder.begin()  # it does already
    run.recorder.end()
    wait(lambda: run.is_("waiting"))
    first = run.recorder.status()["path"]
    assert numbers(first) == list(range(8))
    run.send(2)
    wait(lambda: run.is_("looking back"))
    run.recorder.begin()
    run.send(1)
    run.records(3)
    run.rig.stop()
    report = run.recorder.finish()
    assert report["files"][0] == first
    assert numbers(report["files"][1]) == [8, 9, 10]
    assert report["frames"] == {"raw": 11, "denoised": 11}
    assert sum((*report["lost"].values(), *report["unheard"].values(), report["missing"])) == 0
    assert {Path(path).parent for path in report["files"]} == {tmp_path}
    if name != ".":
        assert first == str(tmp_path / name)
        assert Path(report["files"][1]).match("run-*.h5")


def test_recording_without_a_look_back_begins_at_once_and_again_when_told(
    beside: Callable[..., Beside],
) -> None:
    run = beside()
    run.send(4)
    run.records(4)
    run.recorder.end()
    wait(lambda: run.is_("waiting"))
    run.send(3)
    run.recorder.begin()
    run.send(1)
    wait(lambda: run.is_("recording") and run.recorder.status()["frames"]["denoised"] > 0)
    run.rig.stop()
    assert len(run.recorder.finish()["files"]) == 2


def test_statistics_of_the_service_say_how_the_recorder_fares(beside: Callable[..., Beside]) -> None:
    run = beside(look_back_s=1000.0)
    heard = run.figures()
    figures = next(heard)
    assert figures["recording"]["state"] == "waiting"
    run.send(4)
    wait(lambda: run.is_("looking back"))
    run.recorder.begin()
    run.records(4)
    for figures in heard:
        recording = figures["recording"]
        if recording["frames"] == {"raw": 4, "denoised": 4}:
            break
    assert recording["faults"] == figures["alarms"] == []
    assert Path(recording["path"]).exists()
    assert recording["free_bytes"] > disk.RESERVE_BYTES
    assert "recording   4 raw  4 denoised" in printed(figures)
    json.dumps(figures, allow_nan=False)


def accounted_for(report: dict[str, Any]) -> list[int]:
    """Frames of each kind that were recorded, or are known not to be."""
    return [
        sum(report[name][track] for name in ("frames", "lost", "unheard")) for track in ("raw", "denoised")
    ]


def written(run: Beside) -> int:
    """Denoised frames of the newest file that a kill does not cost."""
    path = run.recorder.status().get("path")
    if not path or not is_recording(Path(path)):
        return 0
    with h5py.File(path, "r", swmr=True) as file:
        return int(file["entry/denoised/complete"][()])


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
@pytest.mark.parametrize("name", [".", "run.h5"])
def test_recorder_that_dies_is_replaced_and_what_it_missed_is_counted(
    beside: Callable[..., Beside],
    tmp_path: Path,
    name: str,
    number: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = beside(tmp_path / name)
    run.send(5)
    run.records(5)
    first = run.recorder.status()["path"]
    wait(lambda: written(run) == 5)
    heard = run.figures()
    next(heard)
    pid = run.recorder._process.pid
    assert pid
    os.kill(pid, number)
    run.send(40)  # nobody hears them, unless the next one is very quick
    for figures in heard:
        if figures["alarms"]:
            break
    assert figures["alarms"][0].startswith(("the recorder died, another one starts: ", "40 raw not recorded"))
    wait(lambda: run.is_("recording"))
    run.rig.wait(lambda ledger: ledger["published"] == 45)
    run.send(10)
    wait(lambda: run.recorder.status()["frames"]["denoised"] >= 10)
    status = run.recorder.status()
    assert status["died"] == 1
    assert status["unheard"]["raw"] > 0
    run.kill()
    run.send(7)
    wait(lambda: run.recorder.status()["path"] not in (first, status["path"]))
    run.rig.stop()
    report = run.recorder.finish(run.rig.ledger["published"])
    assert accounted_for(report) == [run.sent, run.sent]
    assert (report["died"], report["ended"]) == (2, "stopped")
    assert "error" not in report
    assert len(set(report["files"])) == 3
    with Recording(Path(first)) as recording:  # as it was left
        assert (recording.ended, recording.raw.numbers.tolist()) == ("", list(range(5)))
    recorded = [n for path in report["files"] for n in Recording(Path(path)).raw.numbers.tolist()]
    assert recorded == sorted(set(recorded))
    assert caplog.text.count("another one takes over") == 2


def test_recorder_that_dies_while_it_looks_back_looks_back_again(beside: Callable[..., Beside]) -> None:
    run = beside(look_back_s=1000.0)
    run.send(3)
    wait(lambda: run.is_("looking back"))
    run.kill()
    run.send(4)
    wait(lambda: run.is_("looking back"))
    assert run.recorder.status()["path"] is None
    run.recorder.begin()
    wait(lambda: written(run) > 0)
    run.kill()
    run.send(6)
    wait(lambda: run.is_("recording") and run.recorder.status()["frames"]["denoised"] > 0)
    run.recorder.end()
    wait(lambda: not run.is_("recording") and not run.is_("finishing"))
    run.kill()  # and the next one does not record
    run.send(2)
    wait(lambda: run.is_("looking back"))
    run.rig.stop()
    report = run.recorder.finish(run.sent)
    begin = Recording(Path(report["files"][0])).raw.numbers[0]
    assert accounted_for(report) == [13 - begin, 13 - begin]  # the last two were not to be recorded
    assert len(report["files"]) == 2
    assert report["died"] == 3


def test_word_that_is_told_while_there_is_no_recorder_counts(
    beside: Callable[..., Beside], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restarts.Restarts, "note_death", lambda self: 0.5)
    run = beside()
    run.send(3)
    wait(lambda: written(run) == 3)
    run.recorder._process.kill()
    wait(lambda: run.is_("restarting"))
    run.recorder.end()
    wait(lambda: run.is_("waiting"))
    run.send(5)
    run.rig.wait(lambda ledger: ledger["published"] == 8)
    run.recorder._process.kill()
    wait(lambda: run.is_("restarting"))
    run.recorder.begin()
    wait(lambda: run.is_("recording"))
    run.send(2)
    run.records(2)
    run.rig.stop()
    report = run.recorder.finish(run.sent)
    assert report["frames"] == {"raw": 5, "denoised": 5}
    assert accounted_for(report) == [5, 5]
    assert [len(Recording(Path(path)).raw) for path in report["files"]] == [3, 2]


def test_service_may_end_while_another_recorder_starts(beside: Callable[..., Beside]) -> None:
    run = beside()
    run.send(4)
    run.records(4)
    path = run.recorder.status()["path"]
    wait(lambda: written(run) == 4)
    run.recorder._process.kill()
    wait(lambda: run.is_("restarting"))
    run.send(3)
    run.rig.wait(lambda ledger: ledger["published"] == 7)
    run.rig.stop()
    report = run.recorder.finish(7)
    assert accounted_for(report) == [7, 7]
    assert report["frames"]["raw"] == 4
    assert report["files"] == [path]


def test_recorder_that_keeps_dying_is_given_up_and_is_an_alarm_for_whoever_looks(
    beside: Callable[..., Beside], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(record_process, "_REPEAT_S", 0.01)
    monkeypatch.setattr(restarts, "MOST_DEATHS", 1)
    run = beside()
    run.send(2)
    run.records(2)
    wait(lambda: written(run) == 2)
    heard = run.figures()
    next(heard)
    run.kill()
    run.recorder._process.kill()
    for figures in heard:
        if figures["recording"]["state"] == "failed":
            break
    assert figures["alarms"][-1].startswith("the recorder failed: ")
    assert "the recorder ended without a report; what it had committed is readable" in figures["alarms"][-1]
    assert "the recorder failed" in printed(figures)
    wait(lambda: caplog.text.count("any more") > 1)
    run.send(3)
    run.rig.wait(lambda ledger: ledger["published"] == 5)
    report = run.recorder.finish(5)
    assert accounted_for(report) == [5, 5]
    assert (report["ended"], report["died"], report["frames"]["raw"]) == ("failed", 2, 2)
    assert "the recorder ended without a report" in report["error"]


def test_pause_grows_with_every_death_until_it_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 1000.0
    monkeypatch.setattr(restarts.time, "monotonic", lambda: now_s)
    deaths = restarts.Restarts()
    assert [deaths.note_death() for _ in range(restarts.MOST_DEATHS)] == [0.0, 0.1, 0.2, 0.4, 0.8, 1.6]
    assert deaths.note_death() is None
    now_s += 61.0  # it was well for a minute
    assert [deaths.note_death() for _ in range(2)] == [0.0, 0.1]


def test_recording_that_a_full_disk_ended_begins_again_when_told_once_there_is_room(
    beside: Callable[..., Beside], own_disk: Path
) -> None:
    run = beside(own_disk)
    run.send(3)
    run.records(3)
    heard = run.figures()
    next(heard)
    filling = own_disk / "others"
    filling.write_bytes(bytes(disk.free_bytes(own_disk) - disk.RESERVE_BYTES + 1_000_000))
    wait(lambda: run.is_("ended"))
    for figures in heard:
        if figures["alarms"]:
            break
    assert figures["alarms"] == ["recording ended: disk low"]
    run.recorder.begin()  # there is no room yet
    wait(lambda: "make room" in (run.recorder.status().get("why") or ""))
    assert run.is_("ended")
    filling.unlink()
    run.recorder.begin()
    wait(lambda: run.is_("recording"))
    run.send(4)
    run.records(4)
    run.rig.stop()
    report = run.recorder.finish()
    assert report["ended"] == "failed"
    assert "make room" in report["error"]
    first, second = report["files"]
    with Recording(first) as recording:
        assert (recording.ended, len(recording.raw)) == ("disk low", 3)
    assert numbers(second) == [3, 4, 5, 6]


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="no signal stops a process here")
def test_recorder_that_hangs_is_said_to_be_silent_until_it_goes_on(
    beside: Callable[..., Beside], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record_process, "_SILENT_S", 2.0)
    run = beside(look_back_s=1000.0)
    run.send(2)
    wait(lambda: run.is_("looking back"))
    pid = run.hang()
    wait(lambda: run.is_("silent"))
    said = recording_of({"recording": run.recorder.status()})
    assert said
    assert said["faults"] == ["the recorder is silent: nothing heard from it for 2 s"]
    os.kill(pid, signal.SIGCONT)
    wait(lambda: run.is_("looking back"))
    run.recorder.begin()
    run.records(2)


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="no signal stops a process here")
def test_frames_that_a_hanging_recorder_never_got_before_the_end_are_counted(
    beside: Callable[..., Beside],
) -> None:
    run = beside(queue=64)
    run.send(2)
    run.records(2)
    pid = run.hang()
    run.send(1000)  # more than all queues hold
    run.rig.wait(lambda ledger: ledger["published"] == run.sent)
    run.rig.stop()
    os.kill(pid, signal.SIGCONT)
    report = run.recorder.finish(run.sent)
    assert report["unheard"]["raw"] > 0
    for track in ("raw", "denoised"):
        assert report["frames"][track] + report["lost"][track] + report["unheard"][track] == run.sent
    with Recording(report["files"][0]) as recording:
        assert recording.recorder["raw_unheard"] == report["unheard"]["raw"]


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="no signal stops a process here")
def test_nobody_waits_to_tell_a_recorder_that_hangs(beside: Callable[..., Beside]) -> None:
    run = beside(look_back_s=1000.0)
    run.send(2)
    wait(lambda: run.is_("looking back"))
    pid = run.hang()

    def tell() -> None:
        for _ in range(5000):  # more than a pipe holds
            run.recorder.begin()

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    teller.join(timeout=20)
    assert not teller.is_alive()
    os.kill(pid, signal.SIGCONT)
    run.records(2)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="no signal stops a process here")
def test_signal_gives_up_a_recorder_that_hangs_and_what_is_on_the_disk_is_counted(
    beside: Callable[..., Beside], monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    monkeypatch.setattr(record_process, "_SOON_S", 0.0)
    run = beside()
    run.send(2)
    run.records(2)
    run.hang()
    run.send(1)
    # It is said that it is waited for; then somebody loses patience.
    monkeypatch.setattr(record_process.log, "info", lambda *words: signal.raise_signal(number))
    report = run.recorder.finish(3)
    assert "told to end at once" in report["error"]
    assert report["frames"]["denoised"] + report["unheard"]["denoised"] == 3


def test_signal_gives_up_a_recorder_that_is_just_taking_over(
    beside: Callable[..., Beside], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record_process, "_SOON_S", 0.0)
    run = beside()
    run.send(2)
    run.records(2)
    bury, buried, first = run.recorder._bury, threading.Event(), run.recorder._process

    def bury_slowly() -> None:
        buried.set()
        time.sleep(0.5)
        bury()

    monkeypatch.setattr(run.recorder, "_bury", bury_slowly)
    first.kill()
    assert buried.wait(20)
    monkeypatch.setattr(record_process.log, "info", lambda *words: signal.raise_signal(signal.SIGINT))
    report = run.recorder.finish(2)
    assert run.recorder._process is not first
    assert run.recorder._process.exitcode == -signal.SIGKILL
    assert "told to end at once" in report["error"]
    assert report["frames"]["denoised"] + report["unheard"]["denoised"] == 2


def test_signal_that_comes_while_a_recorder_ends_as_it_should_spoils_no_report(
    beside: Callable[..., Beside], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = beside()
    run.send(2)
    run.records(2)
    wait_for_the_answer = run.recorder._answered.wait

    def interrupted(seconds: float) -> bool:
        signal.raise_signal(signal.SIGINT)
        return wait_for_the_answer(20)

    monkeypatch.setattr(run.recorder._answered, "wait", interrupted)
    report = run.recorder.finish(2)
    assert "error" not in report
    assert report["ended"] == "stopped"
    assert report["frames"] == {"raw": 2, "denoised": 2}
    assert report["unheard"] == {"raw": 0, "denoised": 0}


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="no signal stops a process here")
def test_recorder_that_hangs_for_ever_is_killed_and_what_is_on_the_disk_is_counted(
    beside: Callable[..., Beside], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record_process, "_SOON_S", 0.0)
    monkeypatch.setattr(record_process, "_END_S", 0.2)
    run = beside()
    run.send(2)
    run.records(2)
    run.hang()
    run.send(1)
    report = run.recorder.finish(3)
    assert "what it had committed is readable" in report["error"]
    assert report["frames"]["denoised"] + report["unheard"]["denoised"] == 3


def test_recording_whose_folder_vanished_is_in_the_report_and_another_one_begins_when_it_is_back(
    beside: Callable[..., Beside], tmp_path: Path
) -> None:
    folder, away = tmp_path / "r", tmp_path / "away"
    folder.mkdir()
    run = beside(folder)
    run.send(5)
    run.records(5)
    folder.rename(away)  # as a network's drive does
    wait(lambda: run.is_("ended"))
    assert sum(run.recorder.status()["lost"].values()) == 0
    run.recorder.begin()
    wait(lambda: str(run.recorder.status()["why"]).startswith(f"{folder}: "))
    away.rename(folder)
    run.recorder.begin()
    wait(lambda: run.is_("waiting") or run.is_("recording"))
    run.send(3)
    run.records(3)
    report = run.recorder.finish(run.sent)
    assert (report["ended"], report["frames"]) == ("failed", {"raw": 8, "denoised": 8})
    assert [len(Recording(Path(path)).raw) for path in report["files"]] == [5, 3]


def test_word_to_a_dead_recorder_is_no_error(
    beside: Callable[..., Beside], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restarts, "MOST_DEATHS", 0)
    run = beside(look_back_s=1000.0)
    run.recorder._process.kill()
    wait(lambda: run.is_("failed"))
    run.recorder.tell("begin")  # to nobody
    assert run.is_("failed")


def test_service_refuses_a_recording_that_has_no_room_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "free_bytes", lambda folder: disk.RESERVE_BYTES - 1)
    with pytest.raises(OutputError, match="has 64 MiB free"):
        RecorderProcess(RecordSettings(input="ipc:///nowhere", output=tmp_path / "r.h5"))


# -- what comes over the wire ---------------------------------------------------------


def test_losses_are_faults_in_words() -> None:
    said = {"state": "recording", "lost": {"raw": 0, "denoised": 1200}, "unheard": {"raw": 2, "denoised": 0}}
    found = recording_of({"recording": said})
    assert found is not None
    assert found["faults"] == [
        "1,200 denoised not recorded: no room or slow disk",
        "2 raw not recorded: never heard",
    ]


@pytest.mark.parametrize(
    "said", [None, 3, [], {}, {"state": "sleeping"}, {"state": ["recording"]}, {"lost": {"raw": 1}}]
)
def test_what_makes_no_sense_is_no_recorder(said: Any) -> None:
    assert recording_of({"recording": said}) is None


def test_what_is_no_number_and_no_text_is_left_out() -> None:
    said = {"state": "failed", "why": "\x1b[2J", "path": 4, "lost": {"raw": "9", "denoised": float("nan")},
            "frames": [1], "disk_s": None, "free_bytes": float("inf")}  # fmt: skip
    assert recording_of({"recording": said}) == {
        "state": "failed", "why": "\ufffd[2J", "lost": {}, "frames": {}, "unheard": {},
        "faults": ["the recorder failed: \ufffd[2J"],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (119, "119 s"), (720, "12 min"), (7200, "2 h"), (1e6, "12 d")]
)
def test_durations_are_told_in_one_unit(seconds: float, text: str) -> None:
    assert duration(seconds) == text
