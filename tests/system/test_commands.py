"""Whole processes, run as a user runs them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import zmq

from emstream import wire
from emstream.recording import Recording
from tests.conftest import exact, message
from tests.digital_micrograph import write_dm

ROOT = Path(__file__).parents[2]


def emstream(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "emstream", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, **options)


def start(*arguments: str | Path | int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "emstream", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def line_with(process: subprocess.Popen[str], pattern: str) -> re.Match[str]:
    """The first line of the process's stderr that matches."""
    assert process.stderr is not None
    seen = []
    for line in process.stderr:
        seen.append(line)
        if match := re.search(pattern, line):
            return match
    pytest.fail(f"no {pattern!r} in:\n{''.join(seen)}")


def test_demo_ends_by_itself_and_prints_one_object() -> None:
    done = emstream("demo", "--frames", 20, "--rate", 5, "--headless", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert set(report) >= {"ledger", "latency_ms", "frames_per_s", "engine", "psnr_db"}
    assert report["ledger"]["published"] == 20
    assert report["ledger"]["in_flight"] == 0
    assert exact(report["ledger"])
    assert set(report["latency_ms"]) >= {
        "p50",
        "p99",
        "p99_9",
        "max",
        "received_to_batched",
        "batched_to_inferred",
    }
    assert report["psnr_db"]["denoised"] > report["psnr_db"]["noisy"] + 20


def test_sigterm_in_mid_batch_finishes_what_was_received(tmp_path: Path, context: zmq.Context[Any]) -> None:
    camera = context.socket(zmq.PUSH)
    camera.linger = 0
    camera.bind(f"ipc://{tmp_path}/camera")
    service = start("serve", "--input", f"pull+ipc://{tmp_path}/camera", "--output", f"ipc://{tmp_path}/out",
                    "--overrun", "block", "--json")  # fmt: skip
    line_with(service, "engine wide64 on")
    listener = context.socket(zmq.SUB)
    listener.linger = 0
    listener.connect(f"ipc://{tmp_path}/out")
    listener.subscribe(b"denoised")
    frame = np.random.default_rng(0).poisson(0.45, (512, 512)).astype(np.uint8)
    for n in range(6):
        camera.send_multipart(message(n, frame))
    assert listener.poll(60_000)
    service.send_signal(signal.SIGTERM)
    out, err = service.communicate(timeout=60)
    assert service.returncode == 0, err
    ledger = json.loads(out)["ledger"]
    assert ledger["in_flight"] == 0
    assert ledger["published"] == ledger["received"] == 6
    last = None
    while listener.poll(500):
        last = wire.unpack(listener.recv_multipart()[1])
    assert last is not None
    assert last["htype"] == wire.END
    camera.close()
    listener.close()


def test_page_and_status_of_a_running_service() -> None:
    service = start("serve", "--input", "sim://?rate=20&height=64&width=64", "--engine", "identity",
                    "--output", "tcp://127.0.0.1:*", "--view", "--view-port", 0, "--json")  # fmt: skip
    endpoint = line_with(service, r"-> (tcp://\S+)")[1]
    page = line_with(service, r"live page: (\S+)")[1]
    with urllib.request.urlopen(page, timeout=60) as answer:
        assert b"<canvas" in answer.read()
    done = emstream("status", "--input", endpoint, "--json")
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    status = json.loads(line)
    assert (status["state"], status["engine"]["name"]) == ("live", "identity")
    assert status["frames_per_s"] > 0
    assert exact(status["ledger"])
    service.send_signal(signal.SIGINT)
    out, err = service.communicate(timeout=60)
    assert service.returncode == 0, err
    assert exact(json.loads(out)["ledger"])
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(page, timeout=60)


def test_page_reports_at_its_end(tmp_path: Path) -> None:
    page = start(
        "view", "--input", f"ipc://{tmp_path}/nobody", "--port", 0, "--token", "long enough", "--json"
    )
    address = line_with(page, r"live page: (\S+)\?token=")[1]
    page.send_signal(signal.SIGINT)
    out, err = page.communicate(timeout=60)
    assert page.returncode == 0, err
    assert json.loads(out) == {
        "address": address,
        "input": f"ipc://{tmp_path}/nobody",
        "viewers": 0,
        "pictures": 0,
    }


def test_camera_and_service_as_two_programs_account_for_every_fault() -> None:
    camera = start("camera", "--output", "tcp://127.0.0.1:*", "--rate", 100, "--frames", 150, "--height", 64,
                   "--width", 64, "--push", "--gap", 0.1, "--corrupt", 0.1, "--reorder", 0.1, "--resize-every", 20,
                   "--json")  # fmt: skip
    endpoint = line_with(camera, r"camera on (\S+)")[1]
    service = start("serve", "--input", f"pull+{endpoint}", "--output", "tcp://127.0.0.1:*", "--overrun", "block",
                    "--engine", "identity", "--json")  # fmt: skip
    sent = json.loads(camera.communicate(timeout=60)[0])
    line_with(service, "engine identity on")
    service.send_signal(signal.SIGINT)
    out, err = service.communicate(timeout=60)
    assert service.returncode == 0, err
    ledger = json.loads(out)["ledger"]
    assert exact(ledger)
    assert ledger["received"] == sent["sent"] == 150 - sent["gaps"]
    assert ledger["rejected"] == sent["corrupted"] > 0
    assert ledger["published"] == sent["sent"] - sent["corrupted"]
    assert sent["reordered"] > 0


def test_camera_killed_and_restarted_is_received_again(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/camera"
    options = ("camera", "--output", endpoint, "--push", "--rate", 100, "--height", 32, "--width", 32)
    service = start("serve", "--input", f"pull+{endpoint}", "--output", f"ipc://{tmp_path}/out", "--engine", "identity",
                    "--frames", 60, "--json")  # fmt: skip
    first = start(*options)
    line_with(first, "camera on")
    listener_context = zmq.Context()
    listener = listener_context.socket(zmq.SUB)
    listener.linger = 0
    listener.connect(f"ipc://{tmp_path}/out")
    listener.subscribe(b"denoised")
    assert listener.poll(60_000)
    first.kill()
    first.communicate(timeout=20)
    second = start(*options, "--seed", 1)
    out, err = service.communicate(timeout=60)
    second.terminate()
    second.communicate(timeout=20)
    listener_context.destroy(linger=0)
    assert service.returncode == 0, err
    ledger = json.loads(out)["ledger"]
    assert ledger["published"] == 60
    assert exact(ledger)


@pytest.mark.parametrize("shape", [(37, 53), (3, 64, 41)])
@pytest.mark.parametrize("kind", ["uint8", "uint16", "float32", "float64"])
def test_denoise_takes_any_size_and_type(tmp_path: Path, shape: tuple[int, ...], kind: str) -> None:
    movie = np.random.default_rng(0).poisson(0.45, shape).astype(kind)
    tifffile.imwrite(tmp_path / "noisy.tif", movie, photometric="minisblack")
    done = emstream("denoise", tmp_path / "noisy.tif", tmp_path / "clean.tif", "--engine", ROOT / "engines/unet32.onnx",
                    "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    clean = tifffile.imread(tmp_path / "clean.tif")
    assert clean.shape == shape
    assert clean.dtype == np.float32
    assert 0.2 < clean.mean() < 0.8


@pytest.mark.parametrize(("suffix", "version"), [(".dm3", 3), (".dm4", 4)])
def test_movie_of_digital_micrograph_is_denoised_and_replayed(
    tmp_path: Path, suffix: str, version: int
) -> None:
    pytest.importorskip("rsciio", reason="needs rosettasciio: pip install 'emstream[files]'")
    movie = np.random.default_rng(0).poisson(2.0, (6, 32, 48)).astype(np.uint16)
    path = tmp_path / f"m{suffix}"
    write_dm(path, movie, version)
    done = emstream("denoise", path, tmp_path / "out.tif", "--engine", "identity", "--json")
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "out.tif"), movie)
    done = emstream("serve", "--input", f"file://{path}?rate=50", "--engine", "identity", "--output",
                    f"ipc://{tmp_path}/out", "--overrun", "block", "--record", tmp_path / "r.h5", "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ledger"]["published"] == 6
    with Recording(tmp_path / "r.h5") as recording:
        for n in range(6):
            np.testing.assert_array_equal(recording.raw[n], movie[n])
            assert recording.raw.header(n)["pixel_size_m"] == pytest.approx(5e-11)


def test_denoise_warns_about_adu(tmp_path: Path) -> None:
    np.save(tmp_path / "adu.npy", np.full((40, 40), 1000, np.uint16))
    done = emstream("denoise", tmp_path / "adu.npy", tmp_path / "out.npy")
    assert done.returncode == 0
    assert "give --gain and --offset" in done.stderr


def test_info_reads_the_card() -> None:
    done = emstream("info", ROOT / "engines/unet32.onnx", "--json")
    card = json.loads(done.stdout)
    assert (card["name"], card["parameters"], card["field_of_view_px"]) == ("unet32", 352000, 221)


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (("serve", "--input", "sim://", "--engine", "nowhere.onnx"), 1, "no engine at nowhere.onnx"),
        (("serve", "--input", "sim://", "--engine", "pyproject.toml"), 1, "is no engine"),
        (("serve", "--input", "ftp://x"), 2, "scheme must be one of"),
        (("serve",), 2, "Missing option '--input'"),
        (("serve", "--input", "sim://", "--overrun", "panic"), 2, "drop-oldest"),
        (("serve", "--input", "sim://", "--frames", "0"), 2, "frames must be at least 1, got 0"),
        (("serve", "--input", "sim://", "--expect", "big"), 2, "expect must look like 512x512:uint8"),
        (("serve", "--input", "sim://", "--output", "tcp://*:1?format=csv"), 2, "format must be emstream or"),
        (("serve", "--input", "sim://", "--output", "tcp://*:1", "--output", "tcp://*:2"), 2, "native once"),
        (("serve", "--input", "sim://", "--slots", "1"), 2, "slots must be at least 2 batches, got 1"),
        (("serve", "--input", "file:///nowhere/movie.npy"), 1, "/nowhere/movie.npy"),
        (("camera", "--rate", "0"), 2, "rate must be positive, got 0.0 frames/s"),
        (("camera", "--dose", "-1"), 2, "dose must be positive, got -1.0 electrons/pixel"),
        (("camera", "--gap", "2"), 2, "gap must be a probability"),
        (("denoise", "/nowhere.tif", "out.tif"), 1, "/nowhere.tif"),
        (("status", "--input", "ipc:///tmp/nobody", "--json"), 1, "nothing heard from ipc:///tmp/nobody"),
        (("view", "--input", "ipc:///tmp/nobody", "--token", "abc"), 2, "at least 8 characters, got 3"),
        (("build", "nowhere.onnx"), 1, "no engine at nowhere.onnx; shipped: "),
        (("frobnicate",), 2, "No such command"),
    ],
)
def test_wrong_use_is_explained_in_a_line(arguments: tuple[str, ...], code: int, text: str) -> None:
    done = emstream(*arguments, cwd=ROOT)
    assert done.returncode == code, done.stderr
    assert text in re.sub(r"\s*│?\n│?\s*", " ", done.stderr)
    assert "Traceback" not in done.stderr


def test_output_port_in_use_is_explained(context: zmq.Context[Any]) -> None:
    taken = context.socket(zmq.PUB)
    port = taken.bind_to_random_port("tcp://127.0.0.1")
    done = emstream(
        "serve", "--input", "sim://", "--engine", "identity", "--output", f"tcp://127.0.0.1:{port}"
    )
    assert done.returncode == 1
    assert "the address is in use" in done.stderr
    taken.close()


def test_service_publishes_in_three_formats_at_once(tmp_path: Path, context: zmq.Context[Any]) -> None:
    other = f"ipc://{tmp_path}/other"
    service = start("serve", "--input", "sim://?rate=200&height=32&width=48", "--engine", "identity",
                    "--frames", 400, "--json", "--output", f"ipc://{tmp_path}/native",
                    "--output", f"{other}1?format=array-1.0&stream=raw",
                    "--output", f"{other}2?format=karabo-bridge")  # fmt: skip
    line_with(service, f"karabo-bridge, denoised, rep: {other}2")
    sockets = [context.socket(kind) for kind in (zmq.SUB, zmq.SUB, zmq.REQ)]
    for socket, name in zip(sockets, ("native", "other1", "other2"), strict=True):
        socket.rcvtimeo = 20_000
        socket.connect(f"ipc://{tmp_path}/{name}")
    sockets[0].subscribe(b"denoised")
    sockets[1].subscribe(b"")
    sockets[2].send(b"next")
    native, array, karabo = (socket.recv_multipart() for socket in sockets)
    assert native[0] == b"denoised"
    assert json.loads(array[0])["htype"] == "array-1.0"
    assert len(array[1]) == 32 * 48
    assert wire.unpack(karabo[2])["path"] == "image.data"
    assert len(karabo[3]) == 32 * 48 * 4
    for socket in sockets:
        socket.close(linger=0)
    out, err = service.communicate(timeout=60)
    assert service.returncode == 0, err
    report = json.loads(out)
    assert report["ledger"]["published"] == 400
    assert [each["format"] for each in report["outputs"]] == ["array-1.0", "karabo-bridge"]
    assert all(each["sent"] >= 1 for each in report["outputs"])


@pytest.mark.parametrize("command", ["demo", "serve", "camera", "view", "status", "denoise", "info"])
def test_help_has_an_example(command: str) -> None:
    done = emstream(command, "--help")
    assert done.returncode == 0
    assert "Example" in done.stdout


def test_service_imports_neither_torch_nor_the_laboratory() -> None:
    code = "import sys, emstream.serve, emstream.cli; print(*sys.modules)"
    modules = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    tops = {name.split(".")[0] for name in modules}
    assert not tops & {"torch", "abtem", "ase", "matplotlib", "scipy", "onnx", "train", "bench", "starlette"}


def test_fifteen_lines_of_plain_pyzmq_read_the_output(rig: Any) -> None:
    """The client in the README uses nothing of ours."""
    readme = (ROOT / "README.md").read_text()
    client = re.search(r"```python\n(# plain client.*?)```", readme, re.S)
    assert client, "the README has lost its plain client"
    run = rig({"input": "sim://?rate=50&height=64&width=64", "output": "tcp://127.0.0.1:*"})
    code = (
        client[1]
        .replace("tcp://127.0.0.1:5556", run.service.publisher.endpoint)
        .replace("while True", "for _ in range(3)")
    )
    assert "emstream" not in "".join(line for line in code.splitlines(True) if "import" in line)
    run.start()
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 3
    assert "(64, 64)" in done.stdout


def test_engine_of_a_running_service_is_exchanged_and_back_again(tmp_path: Path) -> None:
    output = f"ipc://{tmp_path}/out"
    service = start("serve", "--input", "sim://?rate=50&height=64&width=64", "--output", output,
                    "--expect", "64x64:uint8", "--slots", 500, "--json")  # fmt: skip
    line_with(service, "engine wide64 on")
    try:
        other = ROOT / "engines/unet32.onnx"
        done = emstream("engine", "swap", other, "--service", output, "--json")
        assert done.returncode == 0, done.stderr
        answer = json.loads(done.stdout)
        assert (answer["before"]["name"], answer["engine"]["name"]) == ("wide64", "unet32")
        assert answer["self_test"]["psnr_db"] > answer["self_test"]["blurred_psnr_db"] + 5

        refused = emstream("engine", "swap", tmp_path / "none.onnx", "--service", output)
        assert refused.returncode == 1
        assert f"refuses: no engine at {tmp_path}/none.onnx; shipped:" in refused.stderr

        done = emstream("engine", "back", "--service", output, "--json")
        assert json.loads(done.stdout)["engine"]["name"] == "wide64"
    finally:
        service.send_signal(signal.SIGINT)
        out, err = service.communicate(timeout=30)
    report = json.loads(out)
    assert report["ledger"]["dropped"] == report["ledger"]["failed"] == report["ledger"]["missing"] == 0
    assert report["engine"]["name"] == "wide64"
    assert "unet32 takes over from wide64" in err


def test_orders_to_no_service_are_explained(tmp_path: Path) -> None:
    done = emstream("engine", "swap", "x.onnx", "--service", f"ipc://{tmp_path}/nobody")
    assert done.returncode == 1
    assert "no service at ipc://" in done.stderr
    done = emstream("engine", "swap", "x.onnx", "--service", "nonsense")
    assert done.returncode == 1
    assert "cannot subscribe to nonsense" in done.stderr


LOADING = [  # what is in the memory of a service that starts, one after the other
    "multiarray",
    "libopenvino\\.so",
    "openvino_intel_cpu_plugin",
]


@pytest.mark.usefixtures("heeds_ctrl_c")
@pytest.mark.skipif(sys.platform != "linux", reason="what is loaded is read from /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("loaded", LOADING)
def test_signal_ends_a_service_that_still_starts_at_once_and_without_a_word_too_many(
    tmp_path: Path, number: int, loaded: str
) -> None:
    service = start(
        "serve", "--input", "sim://", "--output", f"ipc://{tmp_path}/out", "--record", tmp_path, "--view",
        "--view-port", 0, "--expect", "4096x4096:uint16",
    )  # fmt: skip
    maps = Path(f"/proc/{service.pid}/maps")
    while not re.search(loaded, maps.read_text()):
        assert service.poll() is None
    service.send_signal(number)
    begin_s = time.monotonic()
    try:
        _, err = service.communicate(timeout=30)
    finally:
        service.kill()
    assert time.monotonic() - begin_s < 5
    # 0: it had just started and ended as usual. Between its libraries and its engine, Python says that it is aborted.
    assert service.returncode in (-number, 128 + number, 0) or "Aborted" in err
    assert "Traceback" not in err


@pytest.mark.usefixtures("heeds_ctrl_c")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_while_recorder_and_page_start_ends_them_too(tmp_path: Path, number: int) -> None:
    psutil = pytest.importorskip("psutil")
    command = [
        sys.executable, "-m", "emstream", "serve", "--input", "sim://", "--engine", "identity", "--output",
        f"ipc://{tmp_path}/out", "--record", str(tmp_path), "--view", "--view-port", "0", "--json",
    ]  # fmt: skip
    service = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    line_with(service, "engine identity on")
    while not (children := psutil.Process(service.pid).children()):
        assert service.poll() is None
    os.killpg(service.pid, number)  # as a terminal does, and systemd
    out, err = service.communicate(timeout=30)
    assert service.returncode == 0, err
    assert "Traceback" not in err
    assert exact(json.loads(out)["ledger"])
    assert "live page:" not in err
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive


def test_every_line_is_json_where_that_was_asked_for(tmp_path: Path) -> None:
    done = emstream("--log-json", "serve", "--input", "sim://?rate=50&height=64&width=64&frames=20",
                    "--engine", "identity", "--output", f"ipc://{tmp_path}/out", "--record", tmp_path)  # fmt: skip
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert {"emstream.serve", "emstream.record"} <= {line["logger"] for line in lines}


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--input", "foo://x"], "scheme must be one of"),
        (["--input", "sim://", "--slots", "few"], "Invalid value for '--slots'"),
        ([], "Missing option '--input'"),
    ],
)
def test_refusal_is_one_line_of_json_where_that_was_asked_for(options: list[str], error: str) -> None:
    refused = emstream("--log-json", "serve", *options)
    assert refused.returncode == 2
    (line,) = map(json.loads, refused.stderr.splitlines())
    assert line["level"] == "ERROR"
    assert error in line["message"]
