"""The live page in a process of its own, and behind the service: what viewers ask for costs no frame.

A page that dies is started again, where it was and with the same token; browsers find it by themselves.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection

from emstream.errors import EmstreamError, OutputError
from emstream.keys import Peer
from emstream.printable import log_to_stderr, logs_json
from emstream.restarts import Restarts
from emstream.signals import deaf_processes
from emstream.view.door import token_for

log = logging.getLogger(__name__)

START_S = 60.0
_NICE = 10  # the engine's threads go first


@dataclass(frozen=True)
class _Page:
    """What a `ViewServer` is made of."""

    input_endpoint: str
    host: str
    port: int
    token: str | None
    records: bool
    peer: Peer | None


class ViewProcess:
    """A `ViewServer` for as long as the ``with`` block lasts; arguments are those of `ViewServer`.

    `on_record` is called in a thread of this process.
    """

    def __init__(
        self,
        input_endpoint: str,
        host: str = "127.0.0.1",
        port: int = 8080,
        token: str | None = None,
        on_record: Callable[[str], None] | None = None,
        peer: Peer | None = None,
    ) -> None:
        self._page = _Page(input_endpoint, host, port, token_for(host, token), on_record is not None, peer)
        self._on_record = on_record
        self._stopping = threading.Event()
        self._changing = threading.Lock()  # the process and its pipe
        self._begin()
        self._listening: threading.Thread | None = None
        self.url = ""

    def start(self) -> None:
        """Returns when the page is served; raises what `ViewServer.start` raises."""
        self._launch()
        try:
            self._wait_until_served()
        except BaseException:
            self.stop()
            raise
        self._listening = threading.Thread(target=self._listen, name="view listener", daemon=True)
        self._listening.start()

    def stop(self) -> None:
        self._stopping.set()
        with self._changing, contextlib.suppress(OSError):
            self._pipe.send("stop")
        self._end()
        if self._listening:
            self._listening.join()
        self._pipe.close()

    def _begin(self) -> None:
        """Make a process, which is not started yet."""
        context = multiprocessing.get_context("spawn")
        self._pipe, self._theirs = context.Pipe()
        self._process = context.Process(
            target=_main, args=(self._theirs, self._page, logs_json()), name="view", daemon=True
        )

    def _launch(self) -> None:
        try:
            with deaf_processes():
                self._process.start()
        finally:
            self._theirs.close()

    def _end(self) -> None:
        if self._process.pid is None:
            return
        self._process.join(timeout=5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _wait_until_served(self) -> None:
        """Raises what `ViewServer.start` raises."""
        try:
            said = (
                self._pipe.recv() if self._pipe.poll(START_S) else OutputError("the live page did not start")
            )
        except (EOFError, OSError):
            said = OutputError("the live page's process ended before it was ready")
        if isinstance(said, Exception):
            raise said
        self.url, port = said
        self._page = replace(self._page, port=port)

    def _listen(self) -> None:
        """What the viewers want of the recorder; and another page when this one dies."""
        restarts = Restarts()
        why = self._follow()
        while not self._stopping.is_set():
            pause_s = restarts.note_death()
            if pause_s is None:
                log.error(
                    "the live page has ended (%s), the service goes on; another one: emstream view --input %s",
                    why,
                    self._page.input_endpoint,
                )
                return
            log.error("the live page died (%s); another one is started", why)
            if self._stopping.wait(pause_s):
                return
            try:
                if not self._start_another():
                    return
                self._wait_until_served()
            except (EmstreamError, OSError, ValueError) as error:
                why = str(error)
            else:
                log.info("the live page is back: %s", self.url)
                why = self._follow()

    def _start_another(self) -> bool:
        """False when none is wanted any more."""
        self._end()
        with self._changing:
            if self._stopping.is_set():
                return False
            self._pipe.close()
            self._begin()
            self._launch()
        return True

    def _follow(self) -> str:
        """Hear the viewers until the page has ended; returns how it did."""
        with contextlib.suppress(EOFError, OSError):
            while word := self._pipe.recv():
                log.info("a viewer tells the recorder: %s", word)
                if self._on_record:
                    self._on_record(word)
        if self._stopping.is_set():
            return ""
        self._process.join(timeout=5)
        return f"exit code {self._process.exitcode}"

    def __enter__(self) -> ViewProcess:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()


def _main(pipe: Connection, page: _Page, as_json: bool) -> None:
    # The page stays until the service has drained.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    log_to_stderr(logging.WARNING, as_json=as_json)
    with contextlib.suppress(AttributeError, OSError):
        os.nice(_NICE)
    try:
        from emstream.view import ViewServer

        server = ViewServer(
            page.input_endpoint,
            page.host,
            page.port,
            page.token,
            pipe.send if page.records else None,
            page.peer,
            options="--view-",
        )
        server.start()
    except (EmstreamError, ValueError) as error:
        pipe.send(error)
        return
    with contextlib.suppress(EOFError, OSError):
        pipe.send((server.url, server.port))
        pipe.recv()  # it returns when the service says so, or is gone
    server.stop()
