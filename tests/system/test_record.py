"""The recorder as a program of its own: beside a service, killed, on a full disk, and played back."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from websockets.sync.client import connect
from websockets.typing import Origin

from emstream.client import subscribe
from emstream.frame import now_ns
from emstream.recording import Recording, disk, is_recording
from emstream.sources.specimen import MovingSpecimen
from tests.conftest import exact
from tests.system.test_commands import ROOT, emstream, line_with, start
from tests.test_record import wait
from tests.test_view import Viewer

pytest.importorskip("hdf5plugin")

RATE = 50
SIZE = 64


@pytest.fixture
def service(tmp_path: Path) -> Iterator[str]:
    """A service that goes on for ever; its endpoint."""
    endpoint = f"ipc://{tmp_path}/out"
    camera = f"sim://?rate={RATE}&height={SIZE}&width={SIZE}"
    running = start("serve", "--input", camera, "--engine", "identity", "--output", endpoint)
    line_with(running, "engine identity on")
    yield endpoint
    running.send_signal(signal.SIGINT)
    running.communicate(timeout=30)


@pytest.fixture
def running() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start programs that end with the test."""
    programs: list[subprocess.Popen[str]] = []

    def begin(*arguments: str | Path) -> subprocess.Popen[str]:
        programs.append(start(*arguments))
        return programs[-1]

    yield begin
    for program in programs:
        if program.poll() is None:
            program.kill()
            program.communicate(timeout=20)


@pytest.fixture
def published(service: str) -> Iterator[dict[int, int]]:
    """When each frame was published [ns since the Unix epoch], by its number, as it happens."""
    times: dict[int, int] = {}
    stop = threading.Event()

    def listen() -> None:
        for frame in subscribe(service, timeout_s=60):
            times[frame.number] = frame.header.extra["stages_ns"]["published"]
            if stop.is_set():
                return

    thread = threading.Thread(target=listen)
    thread.start()
    yield times
    stop.set()
    thread.join(timeout=30)


def grows(path: Path, rows: int = 1) -> Callable[[], bool]:
    """Whether `path` is a recording with that many rows of either kind."""

    def check() -> bool:
        if not is_recording(path):
            return False
        with h5py.File(path, "r", swmr=True) as file:
            return bool(file["entry/denoised/complete"][()] >= rows)

    return check


def test_recorder_killed_at_random_moments_twenty_times_loses_at_most_a_second(
    service: str, tmp_path: Path, running: Callable[..., subprocess.Popen[str]], published: dict[int, int]
) -> None:
    chance = random.Random(0)
    for round in range(5):
        paths = [tmp_path / f"r{round}{n}.h5" for n in range(4)]
        recorders = [running("record", "--input", service, path) for path in paths]
        for path, recorder in zip(paths, recorders, strict=True):
            wait(grows(path), timeout_s=40)
            threading.Event().wait(chance.uniform(0.0, 0.6))  # a moment that nothing announces
            killed_ns = now_ns()
            recorder.kill()
            recorder.communicate(timeout=20)
            assert recorder.returncode == -signal.SIGKILL
            with Recording(path) as recording:
                check_whole(recording)
                due = [
                    number for number, at_ns in published.copy().items() if at_ns < killed_ns - 1_000_000_000
                ]
                for track in (recording.raw, recording.denoised):
                    assert track.numbers[-1] >= max(due)


def check_whole(recording: Recording) -> None:
    """What was published since the first frame recorded is there, in order and right."""
    assert recording.ended == ""
    for track in (recording.raw, recording.denoised):
        for row in (0, len(track) // 2, len(track) - 1):
            header = track.header(row)
            assert header["frame"] == track.numbers[row]
            truth = MovingSpecimen(**header["simulated"], height=SIZE, width=SIZE)
            np.testing.assert_array_equal(track[row], truth.counts(int(track.numbers[row])))
    headers = [recording.denoised.header(row) for row in range(len(recording.denoised))]
    published = [header["ledger"]["published"] for header in headers]
    # Nothing between is lost but what never arrived: the publisher drops for a subscriber that a busy machine starves.
    steps = np.diff(published)
    assert (steps >= 1).all()
    assert (steps - 1).sum() <= 0.05 * len(published)
    assert recording.raw.numbers[recording.raw_rows].tolist() == recording.denoised.numbers.tolist()


def test_ctrl_c_ends_a_recording_with_its_ledger(service: str, tmp_path: Path, running: Any) -> None:
    recorder = running("record", "--input", service, tmp_path / "r.h5", "--json")
    wait(grows(tmp_path / "r.h5", rows=20), timeout_s=40)
    recorder.send_signal(signal.SIGINT)
    out, err = recorder.communicate(timeout=30)
    assert recorder.returncode == 0, err
    report = json.loads(out)
    assert report["ended"] == "stopped"
    assert report["frames"]["raw"] - report["frames"]["denoised"] in (0, 1)
    assert sum((*report["lost"].values(), *report["unheard"].values())) == 0
    with h5py.File(tmp_path / "r.h5") as file:  # whole again: no SWMR needed
        assert file["entry/recorder/ended"].asstr()[()] == "stopped"
        ledger = {name: int(file["entry/ledger"][name][()]) for name in report["ledger"]}
    assert ledger == report["ledger"]
    assert exact(ledger)
    assert ledger["published"] >= 20


def test_other_program_reads_along_while_the_recording_grows(
    service: str, tmp_path: Path, running: Any
) -> None:
    recorder = running("record", "--input", service, tmp_path / "r.h5")
    wait(grows(tmp_path / "r.h5"), timeout_s=40)
    with h5py.File(tmp_path / "r.h5", "r", swmr=True) as file:
        frames, complete = file["entry/raw/frames"], file["entry/raw/complete"]

        def refreshed() -> int:
            complete.refresh()
            return int(complete[()])

        first = refreshed()
        wait(lambda: refreshed() > first + 20)
        frames.refresh()
        assert frames[refreshed() - 1].any()
    recorder.send_signal(signal.SIGTERM)
    recorder.communicate(timeout=30)
    assert recorder.returncode == 0


def test_look_back_begins_at_a_signal_and_includes_the_past(
    service: str, tmp_path: Path, running: Any
) -> None:
    path = tmp_path / "r.h5"
    recorder = running("record", "--input", service, path, "--look-back", "30", "--json")
    line_with(recorder, "kill -USR1")
    threading.Event().wait(1.5)  # what is to be looked back at
    recorder.send_signal(signal.SIGUSR1)
    begun_ns = now_ns()
    wait(grows(path), timeout_s=40)
    recorder.send_signal(signal.SIGINT)
    out, err = recorder.communicate(timeout=30)
    assert recorder.returncode == 0, err
    assert json.loads(out)["files"] == [str(path)]
    with Recording(path) as recording:
        assert recording.raw.arrived_ns[0] < begun_ns - 500_000_000


def test_signal_to_a_service_without_a_recorder_is_answered_and_ends_nothing(
    tmp_path: Path, running: Any
) -> None:
    camera = f"sim://?rate={RATE}&height={SIZE}&width={SIZE}"
    service = running("serve", "--input", camera, "--engine", "identity", "--output", f"ipc://{tmp_path}/out")
    line_with(service, "engine identity")
    service.send_signal(signal.SIGUSR1)
    line_with(service, "no recorder to begin")
    service.send_signal(signal.SIGINT)
    _, err = service.communicate(timeout=30)
    assert service.returncode == 0, err


def test_service_records_what_it_publishes_from_the_first_frame_to_the_last(tmp_path: Path) -> None:
    camera = f"sim://?rate={RATE}&height={SIZE}&width={SIZE}&frames=40"
    done = emstream("serve", "--input", camera, "--engine", "identity", "--output", f"ipc://{tmp_path}/out",
                    "--overrun", "block", "--record", tmp_path, "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["ledger"]["published"] == 40
    assert report["recording"]["frames"] == {"raw": 40, "denoised": 40}
    (path,) = tmp_path.glob("emstream-*.h5")
    with Recording(path) as recording:
        assert recording.raw.numbers.tolist() == recording.denoised.numbers.tolist() == list(range(40))
        assert recording.report["ledger"] == report["ledger"]


def test_recordings_are_begun_and_ended_from_the_page_of_the_service(
    tmp_path: Path, running: Callable[..., subprocess.Popen[str]]
) -> None:
    pytest.importorskip("uvicorn")
    service = running("serve", "--input", f"sim://?rate={RATE}&height={SIZE}&width={SIZE}", "--engine", "identity",
                      "--output", f"ipc://{tmp_path}/out", "--record", tmp_path, "--look-back", "30",
                      "--view", "--view-port", "0", "--json")  # fmt: skip
    url = line_with(service, r"live page: http://(\S+)/")[1]
    with connect(f"ws://{url}/live", origin=Origin(f"http://{url}"), max_size=None) as connection:
        viewer = Viewer(connection)

        def until(state: str, frames: int = 0) -> dict[str, Any]:
            while True:
                recording: dict[str, Any] = viewer.take()[0]["recording"] or {}
                viewer.acknowledge()
                if recording.get("state") == state and recording["frames"]["denoised"] >= frames:
                    return recording

        until("looking back")
        connection.send("begin recording")
        path = Path(until("recording", frames=20)["path"])
        connection.send("end recording")
        until("looking back")
        with Recording(path) as recording:
            assert recording.ended == "stopped"
        connection.send("begin recording")
        until("recording", frames=20)
        connection.send("end recording")
    figures = emstream("status", "--input", f"ipc://{tmp_path}/out", "--json")
    assert json.loads(figures.stdout)["recording"]["faults"] == []
    service.send_signal(signal.SIGINT)
    out, err = service.communicate(timeout=60)
    assert service.returncode == 0, err
    report = json.loads(out)["recording"]
    assert [Path(each).suffix for each in report["files"]] == [".h5"] * 2
    assert report["files"][0] == str(path)
    assert report["frames"]["raw"] >= 40
    assert "a viewer tells the recorder: begin" in err


def test_replay_through_the_same_engine_gives_the_same_frames_bit_by_bit(tmp_path: Path) -> None:
    def play(camera: str, to: Path) -> None:
        done = emstream("serve", "--input", camera, "--engine", ROOT / "engines/unet32.onnx", "--overrun", "block",
                        "--output", f"ipc://{tmp_path}/out", "--record", to, "--json")  # fmt: skip
        assert done.returncode == 0, done.stderr

    play("sim://?rate=40&height=96&width=96&frames=30", tmp_path / "live.h5")
    play(f"file://{tmp_path}/live.h5", tmp_path / "again.h5")
    with Recording(tmp_path / "live.h5") as live, Recording(tmp_path / "again.h5") as again:
        assert len(live.denoised) == len(again.denoised) == 30
        assert live.engines == again.engines
        for n in range(30):
            assert live.denoised[n].tobytes() == again.denoised[n].tobytes()
            assert live.raw[n].tobytes() == again.raw[n].tobytes()
            before, after = live.raw.header(n), again.raw.header(n)
            assert after.pop("replayed_ns") > before["timestamp_ns"]
            assert after == before


def test_file_size_limit_ends_the_recording_and_not_the_service(service: str, tmp_path: Path) -> None:
    """A quota: writing fails, while the disk itself has room."""
    pytest.importorskip("resource")
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (4_000_000, 4_000_000)); "
        "from emstream.cli import main; sys.argv[0] = 'emstream'; main()"
    )
    command = [
        sys.executable,
        "-c",
        code,
        "record",
        "--input",
        service,
        str(tmp_path / "r.h5"),
        "--no-compress",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 1
    assert "error: the recording ended early: write error; what came before is whole" in done.stderr
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    with Recording(tmp_path / "r.h5") as recording:
        assert len(recording.raw) > 10
        assert np.all(np.diff(recording.raw.numbers) > 0)
        assert recording.raw[len(recording.raw) - 1].any()


@pytest.fixture
def small_disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A small file system; by default little more than the reserve and a minute of the service's frames."""
    size_mib = getattr(request, "param", 160)
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size_mib}m", "tmpfs", str(folder)]
    if sys.platform != "linux" or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small file system takes root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_disk_that_runs_low_ends_the_recording_cleanly_with_a_warning(
    service: str, small_disk: Path, running: Any
) -> None:
    recorder = running("record", "--input", service, small_disk / "r.h5", "--json")
    wait(grows(small_disk / "r.h5"), timeout_s=40)
    with (small_disk / "others").open("wb") as file:
        while disk.free_bytes(small_disk) > disk.RESERVE_BYTES:
            file.write(bytes(1 << 20))
            file.flush()
    out, err = recorder.communicate(timeout=30)
    assert recorder.returncode == 1
    assert json.loads(out)["ended"] == "disk low"
    assert "WARNING emstream.record: the recording ends" in err
    with h5py.File(small_disk / "r.h5") as file:
        assert file["entry/recorder/ended"].asstr()[()] == "disk low"
    again = emstream("record", "--input", service, small_disk / "s.h5")
    assert again.returncode == 1
    assert "make room or record elsewhere" in again.stderr
    assert not (small_disk / "s.h5").exists()


@pytest.mark.parametrize("small_disk", [70], indirect=True)
def test_service_goes_on_when_its_recorder_refuses_to_start(small_disk: Path, tmp_path: Path) -> None:
    camera = f"sim://?rate={RATE}&height={SIZE}&width={SIZE}&frames=150"
    done = emstream("serve", "--input", camera, "--engine", "identity", "--output", f"ipc://{tmp_path}/out",
                    "--overrun", "block", "--record", small_disk, "--json")  # fmt: skip
    assert done.returncode == 1
    report = json.loads(done.stdout)
    assert report["ledger"]["published"] == 150
    assert "make room or record elsewhere" in report["recording"]["error"]
    assert "error: no recording" in done.stderr
    assert list(small_disk.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (("record",), 2, "Missing argument 'OUT.h5'"),
        (("record", "r.h5", "--split", "huge"), 2, "split must be a size such as 10GiB, got 'huge'"),
        (("record", "r.h5", "--look-back", "-1"), 2, "look-back must lie in"),
        (("record", "r.tif"), 1, "recordings are .h5 files"),
        (("record", "/nowhere/r.h5"), 1, "there is no folder /nowhere"),
        (("serve", "--input", "sim://", "--look-back", "5"), 2, "give --record, too"),
        (("serve", "--input", "sim://", "--engine", "identity", "--output", "tcp://127.0.0.1:*", "--record", "x.tif"),
         1, "recordings are .h5 files"),
    ],
)  # fmt: skip
def test_wrong_use_is_explained_in_a_line(arguments: Any, code: int, text: str, tmp_path: Path) -> None:
    done = emstream(*arguments, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert text in done.stderr
    assert "Traceback" not in done.stderr


def test_recorder_without_a_service_says_so_when_it_is_stopped(tmp_path: Path, running: Any) -> None:
    recorder = running("record", "--input", f"ipc://{tmp_path}/nobody", tmp_path / "r.h5")
    line_with(recorder, "listening to")
    recorder.send_signal(signal.SIGINT)
    _, err = recorder.communicate(timeout=30)
    assert recorder.returncode == 1
    assert "no frame came from ipc://" in err


def test_help_has_an_example() -> None:
    assert "Example" in emstream("record", "--help").stdout


def test_recorder_imports_neither_an_engine_nor_the_laboratory() -> None:
    code = "import sys, emstream.record; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {name.split(".")[0] for name in modules.split()} & {
        "openvino",
        "torch",
        "tensorrt",
        "starlette",
    }
