"""The simulated camera as a program of its own: ``emstream camera``.

A moving specimen, fresh Poisson noise per frame, exact pacing, seeded; and the ways in
which real cameras misbehave, on request. Native format here, other protocols beside.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import zmq

from emstream import wire
from emstream.endpoint import bind
from emstream.frame import now_ns
from emstream.sources.simulated import end_message, header_for, paced, start_message
from emstream.sources.specimen import MovingSpecimen

DEFAULT_OUTPUT = "tcp://127.0.0.1:5555"
TOPIC = b"raw"
QUEUE_FRAMES = 64
Message = list[Any]


@dataclass(frozen=True, kw_only=True)
class Faults:
    """What goes wrong, and how often. Probabilities are per frame."""

    gap: float = 0.0
    """The frame is never sent."""
    reorder: float = 0.0
    """The frame is sent after its successor."""
    corrupt: float = 0.0
    """The payload is cut short, or the header is garbage."""
    resize_every: int = 0
    """Frames after which the frame size changes, to half and back; 0 never."""
    stall_every: int = 0
    """Frames after which the camera pauses; 0 never."""
    stall_s: float = 2.0

    def __post_init__(self) -> None:
        for name in ("gap", "reorder", "corrupt"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be a probability from 0 to 1, got {getattr(self, name)}")
        for name in ("resize_every", "stall_every"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"{name.replace('_', '-')} must not be negative, got {getattr(self, name)} frames"
                )
        if not self.stall_s >= 0:
            raise ValueError(f"stall-s must not be negative, got {self.stall_s} s")


@dataclass(frozen=True, kw_only=True)
class CameraSettings:
    """One run of the simulated camera."""

    output: str = DEFAULT_OUTPUT
    rate: float = 40.0
    dose: float = 0.45
    height: int = 512
    width: int = 512
    seed: int = 0
    frames: int | None = None
    push: bool = False
    """PUSH instead of PUB: waits for the receiver and loses nothing."""
    wait: bool = False
    """Start with the first subscriber."""
    faults: Faults = field(default_factory=Faults)

    def __post_init__(self) -> None:
        if not (np.isfinite(self.rate) and self.rate > 0):
            raise ValueError(f"rate must be positive, got {self.rate} frames/s")
        if self.frames is not None and self.frames < 1:
            raise ValueError(f"frames must be at least 1, got {self.frames}")


def run_camera(
    settings: CameraSettings,
    stop: threading.Event,
    on_ready: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Send frames until `settings.frames` are sent or `stop` is set; returns what was sent.

    `on_ready` gets the endpoint, with the real port when the settings leave it open.
    """
    specimens = [
        MovingSpecimen(seed=settings.seed, dose=settings.dose, height=height, width=width)
        for height, width in (
            (settings.height, settings.width),
            (max(16, settings.height // 2), max(16, settings.width // 2)),
        )[: 2 if settings.faults.resize_every else 1]
    ]
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PUSH if settings.push else zmq.XPUB)
    socket.sndhwm = QUEUE_FRAMES
    try:
        endpoint = bind(socket, settings.output)
        if on_ready:
            on_ready(endpoint)
        if settings.wait and not settings.push:
            while not stop.is_set() and not socket.poll(100):
                pass
        return _stream(settings, specimens, socket, stop)
    finally:
        socket.close(linger=2000)


def _stream(
    settings: CameraSettings,
    specimens: list[MovingSpecimen],
    socket: zmq.Socket[bytes],
    stop: threading.Event,
) -> dict[str, Any]:
    faults, series = settings.faults, now_ns() // 1_000_000
    rng = np.random.default_rng((settings.seed, 3))
    report = {"sent": 0, "gaps": 0, "reordered": 0, "corrupted": 0}
    held: Message | None = None
    begin_ns = now_ns()
    send(socket, [TOPIC, wire.pack(start_message(series))], stop)
    for number in paced(settings.rate, stop, settings.frames):
        if faults.stall_every and number and number % faults.stall_every == 0:
            stop.wait(faults.stall_s)
        flips = number // faults.resize_every if faults.resize_every else 0
        specimen = specimens[flips % len(specimens)]
        header = header_for(specimen, number, series, settings.rate)
        message: Message = [TOPIC, wire.pack(wire.map_of(header)), specimen.counts(number)]
        is_gap, is_late, is_corrupt = rng.random(3) < (faults.gap, faults.reorder, faults.corrupt)
        if is_gap:
            report["gaps"] += 1
            continue
        if is_corrupt:
            report["corrupted"] += 1
            message[1 + number % 2] = message[1 + number % 2][: -1 - number % 7]
        if is_late and held is None and number:
            report["reordered"] += 1
            held = message
            continue
        for each in (message, held) if held else (message,):
            report["sent"] += send(socket, each, stop)
        held = None
    if held:
        report["sent"] += send(socket, held, stop)
    send(socket, [TOPIC, wire.pack(end_message(series))], stop)
    seconds = (now_ns() - begin_ns) / 1e9
    return report | {"frames_per_s": round(report["sent"] / seconds, 3), "series": series}


def send(socket: zmq.Socket[bytes], message: Message, stop: threading.Event) -> bool:
    """Send, waiting for a PUSH peer but not beyond `stop`."""
    while not socket.poll(100, zmq.POLLOUT):
        if stop.is_set():
            return False
    socket.send_multipart(message)
    return True
