"""The live page in a process of its own, and behind the service: what viewers ask for costs no frame."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from multiprocessing.connection import Connection

from emstream.errors import EmstreamError, OutputError

START_S = 60.0
_NICE = 10  # the engine's threads go first


class ViewProcess:
    """A `ViewServer` for as long as the ``with`` block lasts; arguments are those of `ViewServer`."""

    def __init__(
        self, input_endpoint: str, host: str = "127.0.0.1", port: int = 8080, token: str | None = None
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_main, args=(theirs, input_endpoint, host, port, token), name="view", daemon=True
        )
        self._theirs = theirs
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

    def stop(self) -> None:
        self._pipe.close()  # it ends when nobody is there to listen
        self._process.join(timeout=5)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join(timeout=5)

    def __enter__(self) -> ViewProcess:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()


def _main(pipe: Connection, input_endpoint: str, host: str, port: int, token: str | None) -> None:
    # Ctrl-C reaches the whole terminal; the page stays until the service has drained.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(AttributeError, OSError):
        os.nice(_NICE)
    try:
        from emstream.view import ViewServer

        server = ViewServer(input_endpoint, host, port, token)
        server.start()
    except (EmstreamError, ValueError) as error:
        pipe.send(error)
        return
    with contextlib.suppress(EOFError, OSError):
        pipe.send(server.url)
        pipe.recv()  # nothing ever comes: it returns when the service is gone
    server.stop()
