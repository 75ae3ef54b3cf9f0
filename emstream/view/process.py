"""The live page in a process of its own, and behind the service: what viewers ask for costs no frame."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection

from emstream.errors import EmstreamError, OutputError
from emstream.keys import Peer

log = logging.getLogger(__name__)

START_S = 60.0
_NICE = 10  # the engine's threads go first


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
        self._input_endpoint, self._on_record = input_endpoint, on_record
        self._stopping = False
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_main,
            args=(theirs, input_endpoint, host, port, token, on_record is not None, peer),
            name="view",
            daemon=True,
        )
        self._theirs = theirs
        self._listening: threading.Thread | None = None
        self.url = ""

    def start(self) -> None:
        """Returns when the page is served; raises what `ViewServer.start` raises."""
        self._process.start()
        self._theirs.close()
        try:
            said = (
                self._pipe.recv() if self._pipe.poll(START_S) else OutputError("the live page did not start")
            )
        except EOFError:
            said = OutputError("the live page's process ended before it was ready")
        if isinstance(said, Exception):
            self.stop()
            raise said
        self.url = said
        self._listening = threading.Thread(target=self._listen, name="view listener", daemon=True)
        self._listening.start()

    def stop(self) -> None:
        self._stopping = True
        with contextlib.suppress(OSError):
            self._pipe.send("stop")
        self._process.join(timeout=5)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join(timeout=5)
        if self._listening:
            self._listening.join()
        self._pipe.close()

    def _listen(self) -> None:
        """What the viewers want of the recorder, until the page has ended."""
        with contextlib.suppress(EOFError, OSError):
            while word := self._pipe.recv():
                log.info("a viewer tells the recorder: %s", word)
                if self._on_record:
                    self._on_record(word)
        if not self._stopping:
            log.error(
                "the live page has ended, the service goes on; another one: emstream view --input %s",
                self._input_endpoint,
            )

    def __enter__(self) -> ViewProcess:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()


def _main(
    pipe: Connection,
    input_endpoint: str,
    host: str,
    port: int,
    token: str | None,
    records: bool,
    peer: Peer | None,
) -> None:
    # Ctrl-C reaches the whole terminal; the page stays until the service has drained.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(AttributeError, OSError):
        os.nice(_NICE)
    try:
        from emstream.view import ViewServer

        server = ViewServer(input_endpoint, host, port, token, pipe.send if records else None, peer)
        server.start()
    except (EmstreamError, ValueError) as error:
        pipe.send(error)
        return
    with contextlib.suppress(EOFError, OSError):
        pipe.send(server.url)
        pipe.recv()  # it returns when the service says so, or is gone
    server.stop()
