"""A service that takes keys, from the camera to the display, in whole processes."""

from __future__ import annotations

import itertools
import json
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq

import emstream as package
from emstream.errors import SourceError
from emstream.keys import Doorkeeper, make, read_pair
from tests.conftest import message
from tests.system.test_commands import emstream, line_with, start


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    for name in ("service", "camera", "display", "stranger"):
        make(name, tmp_path)
    for folder, name in (("displays", "display"), ("services", "service")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{name}.key").write_bytes((tmp_path / f"{name}.key").read_bytes())
    return tmp_path


def test_frames_pass_encrypted_from_camera_to_display_and_to_nobody_else(
    keys: Path, context: zmq.Context[Any]
) -> None:
    camera = context.socket(zmq.PUSH)
    camera.linger = 0
    door = Doorkeeper(read_pair(keys / "camera.key_secret"), keys / "services", context)
    door.guard(camera)
    port = camera.bind_to_random_port("tcp://127.0.0.1")
    service = start(
        "serve", "--engine", "identity", "--input", f"pull+tcp://127.0.0.1:{port}", "--output", "tcp://0.0.0.0:*",
        "--key", keys / "service.key_secret", "--admit", keys / "displays", "--camera-key", keys / "camera.key",
        "--record", keys / "run.h5", "--json",
    )  # fmt: skip
    output = line_with(service, r"identity -> tcp://0.0.0.0:(\d+)")[1]
    line_with(service, "engine identity on")
    endpoint = f"tcp://127.0.0.1:{output}"
    own = {"key": keys / "display.key_secret", "service_key": keys / "service.key"}
    frames = package.subscribe(endpoint, timeout_s=30, **{name: str(path) for name, path in own.items()})
    received: list[Any] = []
    display = threading.Thread(target=lambda: received.extend(itertools.islice(frames, 20)))
    display.start()
    sent = 0
    try:
        while display.is_alive():
            camera.send_multipart(message(sent, np.full((16, 16), sent % 256, np.uint8)))
            sent += 1
            time.sleep(0.02)
        numbers = [frame.number for frame in received]
        assert numbers == list(range(numbers[0], numbers[0] + 20))
        assert all((frame.data == frame.number % 256).all() for frame in received)

        keys_given = ("--key", own["key"], "--service-key", own["service_key"])
        status = emstream("status", "--input", endpoint, *keys_given, "--json")
        assert status.returncode == 0, status.stderr
        back = emstream("engine", "back", "--service", endpoint, *keys_given)
        assert "no engine to go back to" in back.stderr

        camera_goes_on = threading.Event()

        def go_on() -> None:
            nonlocal sent
            while not camera_goes_on.wait(0.05):
                camera.send_multipart(message(sent, np.full((16, 16), sent % 256, np.uint8)))
                sent += 1

        thread = threading.Thread(target=go_on)
        thread.start()
        try:
            for stranger in ({}, {"key": keys / "stranger.key_secret", "service_key": keys / "service.key"}):
                with pytest.raises(SourceError, match="no frame from"):
                    next(package.subscribe(endpoint, timeout_s=2, **stranger))
            plain = emstream("engine", "back", "--service", endpoint)
            assert plain.returncode == 1
            assert "no service at" in plain.stderr
        finally:
            camera_goes_on.set()
            thread.join()
    finally:
        service.send_signal(signal.SIGINT)
        out, err = service.communicate(timeout=60)
        display.join(30)
        frames.close()
        camera.close()
        door.close()
    report = json.loads(out)
    assert report["ledger"]["published"] == report["recording"]["frames"]["raw"] == sent, err


def test_public_address_takes_keys_or_says_insecure(tmp_path: Path) -> None:
    arguments = (
        "serve",
        "--engine",
        "identity",
        "--input",
        "sim://?frames=3&rate=100&height=16&width=16",
        "--json",
    )
    refused = emstream(*arguments, "--output", "tcp://*:0")
    assert refused.returncode == 1
    assert "tcp://*:0: other machines can reach it" in refused.stderr
    assert "--insecure" in refused.stderr
    for output in ("tcp://0.0.0.0:0?format=array-1.0", "tcp://[::]:0", "tcp://eth0:0"):
        refused = emstream(*arguments, "--output", output)
        assert "other machines can reach it" in refused.stderr
    refused = emstream(*arguments, "--metrics", "0.0.0.0:0")
    assert "cannot serve metrics on 0.0.0.0:0: other machines can reach it" in refused.stderr
    refused = emstream("serve", "--engine", "identity", "--input", "tcp://0.0.0.0:45671?bind=true")
    assert "anybody there could send frames" in refused.stderr
    done = emstream(*arguments, "--output", "tcp://*:*", "--insecure")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ledger"]["published"] == 3


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--admit", "x"], "--admit takes --key"),
        (["--key", "x"], "--key takes --admit"),
        (["--camera-key", "x"], "--camera-key takes --key"),
        (["--key", "x", "--camera-key", "y"], "cannot read x"),
    ],
)
def test_half_of_the_keys_is_explained(options: list[str], error: str) -> None:
    done = emstream(
        "serve",
        "--engine",
        "identity",
        "--input",
        "tcp://127.0.0.1:1",
        "--output",
        "tcp://127.0.0.1:*",
        *options,
    )
    assert done.returncode in (1, 2)
    assert error in done.stderr
    done = emstream("status", "--json", "--key", "x")
    assert done.returncode == 2
    assert "takes two keys" in done.stderr
