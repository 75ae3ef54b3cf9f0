"""Putting a service together, and its signals."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emstream import serve
from emstream.errors import EngineError, EngineNotFound, EngineUnavailable
from emstream.inference import IdentityEngine
from emstream.serve import Settings, build


class Unfit(IdentityEngine):
    """What a GPU makes of a network it cannot run."""

    closed = False

    def prepare(self, shape: tuple[int, int], dtype: np.dtype[Any]) -> None:
        raise EngineError("no kernel for compute capability 6.1")

    def close(self) -> None:
        self.closed = True


def settings(folder: Path, **change: Any) -> Settings:
    return Settings(**{"input": "sim://", "output": f"ipc://{folder}/out", **change})


def test_gpu_that_cannot_prepare_gives_way_to_the_cpu_unless_it_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    unfit, devices = Unfit(), []

    def load_engine(path: Any, *, device: str, **options: Any) -> IdentityEngine:
        devices.append(device)
        return IdentityEngine() if device == "cpu" else unfit

    monkeypatch.setattr(serve, "load_engine", load_engine)
    service = build(settings(tmp_path))
    service.close()
    assert devices == ["auto", "cpu"]
    assert unfit.closed
    assert "the CPU is used: no kernel for compute capability 6.1" in caplog.text
    for change in ({"device": "0"}, {"engine": "u.plan"}):
        with pytest.raises(EngineError, match="no kernel"):
            build(settings(tmp_path, **change))


@pytest.mark.parametrize("error", [EngineUnavailable("it needs PyTorch"), EngineNotFound("no engine there")])
def test_engine_that_is_not_to_be_had_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any, error: EngineError
) -> None:
    def load_engine(path: Any, *, device: str, **options: Any) -> IdentityEngine:
        assert device == "auto"
        raise error

    monkeypatch.setattr(serve, "load_engine", load_engine)
    with pytest.raises(type(error), match=str(error)):
        build(settings(tmp_path))
    assert not caplog.text


def run(program: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, which a signal may end."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_signals_stop_and_are_given_back() -> None:
    done = run(
        """
        import signal
        from emstream.signals import stop_on_signals
        before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
        with stop_on_signals(lambda: print("stop")):
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)
        print((signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before)
        """
    )
    assert done.stdout == "stop\nstop\nTrue\n", done.stderr


@pytest.mark.parametrize("last", [signal.SIGINT, signal.SIGTERM])
def test_third_signal_ends_a_process_that_hangs(last: signal.Signals) -> None:
    program = f"""
        import signal
        from emstream.signals import stop_on_signals
        with stop_on_signals(lambda: print("stop", flush=True)):
            for number in (signal.SIGINT, signal.SIGTERM, {int(last)}):
                signal.raise_signal(number)
            print("still here")
    """
    done = run(program)
    assert done.returncode == -last, done.stderr
    assert done.stdout == "stop\nstop\n"


def test_ring_that_no_memory_holds_is_refused_before_it_is_made(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"100,000,000 slots of \d+ frames of 512x512 uint8 take .* GiB of memory"
    ):
        build(settings(tmp_path, engine="identity", slots=100_000_000))
