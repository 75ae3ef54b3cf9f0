"""A service as a program of its own, ``emstream serve --json``, and what it takes of the machine."""

from __future__ import annotations

import contextlib
import ctypes
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from bench import rig

PATIENCE_S = 60.0
COUNTERS = ("published", "dropped", "rejected", "failed", "in_flight")
MIB = 2**20
_READY_S = 300.0  # a network is compiled first
_PR_SET_PDEATHSIG = 1  # prctl.h of Linux


@dataclass(frozen=True)
class Sample:
    """What a program and its children take at a moment."""

    monotonic_s: float
    rss_bytes: int
    fds: int
    threads: int
    cpu_s: float
    """Processor time so far, of those that live."""


class Program:
    """``emstream serve --json`` with these options; `output` is where it publishes. Ends with the ``with`` block."""

    def __init__(self, folder: Path, *options: str) -> None:
        """Start it, its log in `folder`, and return when it is ready for the first frame."""
        self.log_path = folder / "service.log"
        command = [sys.executable, "-m", "emstream", "serve", "--json", *options]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=self.log_path.open("w"),
            text=True,
            preexec_fn=_with_parent,
        )
        self._seen = psutil.Process(self.process.pid)
        try:
            self._wait_for(r"engine \S+ on ")
            self.output = self._wait_for(r"-> \S+ -> (\S+)")[1]
        except BaseException:
            self.process.kill()
            raise

    def sample(self) -> Sample:
        rss = fds = threads = 0
        cpu_s = 0.0
        for process in (self._seen, *self._seen.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess), process.oneshot():  # a child may just have ended
                times = process.cpu_times()
                rss += process.memory_info().rss
                fds += process.num_fds()
                threads += process.num_threads()
                cpu_s += times.user + times.system
        return Sample(time.monotonic(), rss, fds, threads, cpu_s)

    @property
    def lives(self) -> bool:
        return self.process.poll() is None

    @property
    def log_bytes(self) -> int:
        return self.log_path.stat().st_size

    def end(self) -> dict[str, Any]:
        """Let it finish what it received; returns its report."""
        self.process.send_signal(signal.SIGINT)
        out = self.process.communicate(timeout=PATIENCE_S)[0]
        report: dict[str, Any] = json.loads(out)
        return report

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.communicate()

    def _wait_for(self, pattern: str) -> re.Match[str]:
        deadline_s = time.monotonic() + _READY_S
        while True:
            log = self.log_path.read_text()
            if found := re.search(pattern, log):
                return found
            if not self.lives or time.monotonic() > deadline_s:
                raise RuntimeError(f"the service did not come up:\n{log[-2000:]}")
            time.sleep(0.05)


class Watch:
    """Samples a program every `every_s` seconds in a thread of its own, for as long as the ``with`` block lasts."""

    def __init__(self, program: Program, every_s: float) -> None:
        self.samples: list[Sample] = []
        self._program = program
        self._every_s = every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended
            while True:
                self.samples.append(self._program.sample())
                if self._stop.wait(self._every_s):
                    return


def adds_up(ledger: dict[str, int]) -> bool:
    """Whether every frame is accounted for, and none under way."""
    return ledger["received"] == sum(ledger[name] for name in COUNTERS) and not ledger["in_flight"]


def verdict(hit: bool) -> str:
    return "hit" if hit else "miss"


def stream(camera: rig.Camera, window: int, goes_on: Callable[[int], bool]) -> int:
    """Send frames from number 0 on while `goes_on(number)`, at most `window` under way; returns how many.

    The next one is always ready, so the service works at its full rate, and yet little waits in its queues: what
    a frame takes is the service's time for it and not that of a queue which is ever full.
    """
    every = max(1, window // 4)
    number = 0
    while goes_on(number):
        if number >= window and not camera.wait_arrived(number - window):
            raise RuntimeError(f"frame {number - window} never arrived")
        camera.send(number, receipt=number % every == every - 1)
        number += 1
    return number


def _with_parent() -> None:
    """A bench that was killed leaves no service behind (on Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
