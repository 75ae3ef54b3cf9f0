"""What SIGINT (Ctrl-C), SIGTERM and SIGUSR1 do, in the main thread of a program. Imports next to nothing."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType


@contextlib.contextmanager
def end_on_signals() -> Iterator[None]:
    """SIGINT ends the process at once, as SIGTERM does anyway: for what has nothing yet that could be spoilt.

    Python's own way waits for the end of what is being loaded or compiled, which may take minutes.
    """
    if not _is_main_thread() or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def stop_on_signals(stop: Callable[[], None]) -> Iterator[None]:
    """Call `stop` at SIGINT and SIGTERM, in the main thread; elsewhere signals are left alone.

    After two of them the process has not ended because something hangs: a third kills it.
    """
    if not _is_main_thread():
        yield
        return

    times = 0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal times
        times += 1
        if times > 2:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        stop()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def begin_on_signal(begin: Callable[[], None]) -> Iterator[None]:
    """SIGUSR1 calls `begin`, where there is such a signal and in the main thread."""
    if not hasattr(signal, "SIGUSR1") or not _is_main_thread():
        yield
        return
    before = signal.signal(signal.SIGUSR1, lambda number, frame: begin())
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)


@contextlib.contextmanager
def deaf_processes() -> Iterator[None]:
    """Processes started in the block never hear SIGINT or SIGTERM, which reach a whole terminal or service unit.

    From their first moment on: what they ignore later may come before.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()  # by itself it would be started in the block, and unblock both at its end
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
