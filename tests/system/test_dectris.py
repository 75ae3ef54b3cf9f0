"""DECTRIS detectors as processes of their own: ours, which is killed, and one that is not ours."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

pytest.importorskip(
    "dectris.compression", reason="dectris.compression is missing: pip install 'emstream[cameras]'"
)
pytest.importorskip("cbor2", reason="cbor2 is missing: pip install 'emstream[cameras]'")

from emstream import wire
from tests.conftest import exact
from tests.system.test_commands import emstream, line_with, start


@pytest.fixture
def listener(context: zmq.Context[Any], tmp_path: Path) -> Iterator[zmq.Socket[bytes]]:
    socket = context.socket(zmq.SUB)
    socket.linger = 0
    socket.rcvhwm = 0
    socket.connect(f"ipc://{tmp_path}/out")
    socket.subscribe(b"denoised")
    yield socket
    socket.close()


def service(tmp_path: Path, url: str, *options: Any) -> subprocess.Popen[str]:
    process = start("serve", "--engine", "identity", "--input", url, "--output", f"ipc://{tmp_path}/out",
                    "--queue", 10_000, "--queue-mib", 100_000, "--overrun", "block", "--json", *options)  # fmt: skip
    line_with(process, "waiting for frames")
    return process


def detector(tmp_path: Path, *options: Any) -> subprocess.Popen[str]:
    return start("camera", "--protocol", "dectris", "--output", f"ipc://{tmp_path}/camera", "--rate", 100,
                 "--height", 64, "--width", 64, "--json", *options)  # fmt: skip


def hear(listener: zmq.Socket[bytes], frames: int) -> list[dict[str, Any]]:
    """The headers of the next `frames` frames."""
    found: list[dict[str, Any]] = []
    while len(found) < frames:
        assert listener.poll(30_000), f"only {len(found)} frames came"
        head = wire.unpack(listener.recv_multipart()[1])
        if head["htype"] == wire.FRAME:
            found.append(head)
    return found


def test_service_goes_on_when_the_detector_is_killed_in_mid_series(
    tmp_path: Path, listener: zmq.Socket[bytes]
) -> None:
    serving = service(tmp_path, f"dectris+ipc://{tmp_path}/camera")
    first = detector(tmp_path)
    before = hear(listener, 30)
    first.kill()
    first.communicate()
    second = detector(tmp_path, "--frames", 40, "--dead", 5, "--thresholds", 2)
    out, err = second.communicate(timeout=60)
    assert json.loads(out)["sent"] == 40, err
    after = [head for head in before if head["series"] != before[0]["series"]]
    while len(after) < 40:
        after += [head for head in hear(listener, 1) if head["series"] != before[0]["series"]]
    assert [head["frame"] for head in after] == list(range(40))
    assert {head["series"] for head in after} == {after[0]["series"]}
    assert all(head["bad_pixels"] == 5 for head in after)
    serving.send_signal(signal.SIGTERM)
    out, err = serving.communicate(timeout=60)
    ledger = json.loads(out)["ledger"]
    assert ledger["published"] == ledger["received"] >= 70, err
    assert ledger["missing"] == ledger["rejected"] == 0
    assert exact(ledger)


def test_gaps_and_damage_of_the_simulated_detector_are_counted(tmp_path: Path) -> None:
    serving = service(tmp_path, f"dectris+ipc://{tmp_path}/camera?channel=sum", "--frames", 60)
    camera = detector(tmp_path, "--gap", 0.1, "--corrupt", 0.1, "--series-frames", 50, "--thresholds", 2,
                      "--compression", "lz4", "--type", "uint32", "--patterns", 4, "--no-end")  # fmt: skip
    out, err = serving.communicate(timeout=90)
    camera.send_signal(signal.SIGINT)
    sent = json.loads(camera.communicate(timeout=60)[0])
    ledger = json.loads(out)["ledger"]
    assert ledger["published"] == 60, err
    assert 0 < ledger["rejected"] <= sent["corrupted"]
    assert 0 < ledger["missing"] <= sent["gaps"] + sent["corrupted"]
    assert exact(ledger)


@pytest.mark.parametrize("option", [("--compression", "zip"), ("--reorder", 0.5), ("--type", "int7")])
def test_detector_that_does_not_exist_is_wrong_use(option: tuple[Any, Any]) -> None:
    done = emstream("camera", "--protocol", "dectris", *option)
    assert done.returncode == 2
    assert str(option[0]).removeprefix("--") in done.stderr
    assert emstream("camera", "--compression", "lz4").returncode == 2


_NOT_OURS = """
import sys, libertem_dectris
simulator = libertem_dectris.DectrisSim.new_mocked(sys.argv[1], 200)
simulator.send_headers()
simulator.send_frames()
simulator.send_footer()
sys.stdin.read()
"""


def test_first_stream_of_libertems_simulator_arrives_whole(tmp_path: Path) -> None:
    pytest.importorskip("libertem_dectris")
    address = f"ipc://{tmp_path}/camera"
    serving = service(tmp_path, f"dectris1+{address}", "--frames", 200)
    command = [sys.executable, "-c", _NOT_OURS, address]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as camera:
        out, err = serving.communicate(timeout=60)
        camera.communicate(timeout=30)
    ledger = json.loads(out)["ledger"]
    assert ledger["published"] == ledger["received"] == 200, err
    assert ledger["missing"] == ledger["rejected"] == 0
