"""Simulated camera, service and live page in one go: ``emstream demo``.

The camera is a process of its own and the frames cross a real socket. Since the
specimen is simulated, the truth is known, and the demo scores what it publishes.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from emstream.camera import CameraSettings, run_camera
from emstream.client import subscribe
from emstream.errors import SourceError
from emstream.quality import psnr_db
from emstream.serve import Service, Settings, serve
from emstream.sources.specimen import MovingSpecimen

CAMERA_START_S = 60.0


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """One demonstration."""

    rate: float = 10.0
    dose: float = 0.45
    height: int = 512
    width: int = 512
    seed: int = 0
    frames: int | None = None
    engine: str | Path | None = None
    device: str = "auto"
    output: str = "tcp://127.0.0.1:*"
    view: tuple[str, int] | None = ("127.0.0.1", 8080)
    """Where the live page listens; None shows no page."""


class Score:
    """Compares published frames with the simulated truth, in a thread of its own."""

    def __init__(self, endpoint: str, specimen: MovingSpecimen) -> None:
        self._endpoint = endpoint
        self._specimen = specimen
        self._db: dict[str, list[float]] = {"raw": [], "denoised": []}
        self._thread = threading.Thread(target=self._run, name="score", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        number, truth = -1, np.empty(0)
        for frame in subscribe(self._endpoint, topic="", until_end=True):
            if frame.number != number:
                number, truth = frame.number, self._specimen.intensity(frame.number)
            self._db[frame.topic].append(psnr_db(frame.data, truth))

    def result(self) -> dict[str, float | None]:
        """Mean PSNR [dB] over the frames seen; call it when the series has ended."""
        self._thread.join(timeout=10)
        means = {topic: round(float(np.mean(db)), 2) if db else None for topic, db in self._db.items()}
        return {"noisy": means["raw"], "denoised": means["denoised"]}


def run_demo(settings: DemoSettings, on_ready: Callable[[str | None], None] | None = None) -> dict[str, Any]:
    """Run the demonstration to its end; returns the service's report with ``psnr_db``.

    `on_ready` gets the address of the live page, or None.
    """
    camera = CameraSettings(
        output="tcp://127.0.0.1:*", rate=settings.rate, dose=settings.dose, seed=settings.seed,
        height=settings.height, width=settings.width, wait=True,
    )  # fmt: skip
    specimen = MovingSpecimen(
        seed=settings.seed, dose=settings.dose, height=settings.height, width=settings.width
    )
    with ExitStack() as stack:
        endpoint = stack.enter_context(_CameraProcess(camera)).endpoint
        scores: list[Score] = []

        def ready(service: Service) -> None:
            scores.append(Score(service.publisher.endpoint, specimen))
            url = None
            if settings.view:
                from emstream.view import ViewProcess

                page = ViewProcess(service.publisher.endpoint, *settings.view)
                page.start()
                stack.callback(page.stop)
                url = page.url
            if on_ready:
                on_ready(url)

        service = Settings(
            input=endpoint,
            output=settings.output,
            engine=settings.engine,
            device=settings.device,
            expect=f"{settings.height}x{settings.width}:{specimen.dtype.name}",
            frames=settings.frames,
        )
        report = serve(service, on_ready=ready)
        return report | {"psnr_db": scores[0].result()}


class _CameraProcess:
    """The simulated camera in a process of its own, for as long as the `with` block lasts."""

    def __init__(self, settings: CameraSettings) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_camera_main, args=(settings, theirs), daemon=True)

    def __enter__(self) -> _CameraProcess:
        self._process.start()
        if not self._pipe.poll(CAMERA_START_S):
            self.__exit__()
            raise SourceError(f"the simulated camera did not start within {CAMERA_START_S:.0f} s")
        try:
            self.endpoint: str = self._pipe.recv()
        except EOFError:
            self.__exit__()
            raise SourceError("the simulated camera ended before it was ready") from None
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.terminate()
        self._process.join(timeout=5)
        self._pipe.close()


def _camera_main(settings: CameraSettings, pipe: Connection) -> None:
    # Ctrl-C reaches the whole terminal; the demo stops its camera itself, after the drain.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    stop = threading.Event()

    def watch() -> None:
        with contextlib.suppress(EOFError, OSError):
            pipe.recv()  # nothing ever comes: it returns when the demo is gone
        stop.set()

    threading.Thread(target=watch, daemon=True).start()
    run_camera(settings, stop, on_ready=pipe.send)
