"""A sender that lasts: one whose socket breaks, or whose queue must be shorter, is opened again where it was."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Generic, TypeVar

import zmq

from emstream.endpoint import Door
from emstream.errors import OutputError
from emstream.outputs.sockets import Queue, Sender
from emstream.seldom import Seldom

log = logging.getLogger(__name__)
LINGER_S = 2.0
"""For what is queued when a socket is closed."""
_OPEN_AGAIN_S = 0.1  # ZeroMQ lets go of an address in its own time
_MOST_ATTEMPTS = 10

SenderT = TypeVar("SenderT", bound=Sender)


class Lasting(Generic[SenderT]):
    """One thread calls it."""

    def __init__(
        self,
        kind: Callable[[str, Queue, int, zmq.Context[zmq.Socket[bytes]], Door | None], SenderT],
        endpoint: str,
        queue: Queue,
        largest: int,
        context: zmq.Context[zmq.Socket[bytes]] | None = None,
        door: Door | None = None,
    ) -> None:
        """Bind `endpoint`, for messages of up to `largest` bytes. Raises OutputError."""
        self._kind, self._queue, self._largest = kind, queue, largest
        self._context, self._door = context or zmq.Context.instance(), door
        self.sender = self._bind(endpoint)
        self.endpoint = self.sender.endpoint
        """With its real port."""
        self.failed = 0
        """How often something could not be sent."""
        self._problems, self._what = Seldom(), ""
        self._open_again_s: float | None = None
        """When a socket that is given up is opened again; None when there is one."""

    def _bind(self, endpoint: str) -> SenderT:
        return self._kind(endpoint, self._queue, self._largest, self._context, self._door)

    def tried(self, what: str) -> Lasting[SenderT]:
        """For ``with``: what goes wrong there ends no service; it is said, and a socket that broke is given up."""
        self._what = what
        if self._open_again_s is not None and time.monotonic() >= self._open_again_s:
            self._open_again()
        return self

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, Exception):
            return False
        self.failed += 1
        broke = isinstance(error, zmq.ZMQError)
        if broke and self._open_again_s is None:
            self._give_up()
        name = type(error).__name__
        said = self._problems.note(f"{self._what}: {name}: {error}")
        if said is not None:
            times, first = said
            log.error(
                "%s: %s could not be sent, %d times by now: %s: %s", self.endpoint, self._what, times, name, error,
                exc_info=error if first and not broke else None,
            )  # fmt: skip
        return True

    def make_room(self, nbytes: int) -> None:
        """After a message larger than all before: the queue of a client may have to be shorter now.

        The caller waits for that, a tenth of a second as a rule, so that nothing is sent to nobody.
        """
        if nbytes <= self._largest:
            return
        before, self._largest = self._queue.length(self._largest), nbytes
        length = self._queue.length(nbytes)
        if length == before:
            return
        log.warning(
            "%s: messages of %d bytes are larger than expected (--expect): it is opened again, so that a "
            "client's queue holds %d, no more than --queue-mib",
            self.endpoint, nbytes, length,
        )  # fmt: skip
        self._give_up()
        for _ in range(_MOST_ATTEMPTS):
            time.sleep(_OPEN_AGAIN_S)
            self._open_again()
            if self._open_again_s is None:
                break

    def close(self, linger_s: float) -> None:
        """Give clients `linger_s` to take what is kept for them."""
        self.sender.close(linger_s)

    def _give_up(self) -> None:
        self.sender.close(LINGER_S)
        self._open_again_s = time.monotonic() + _OPEN_AGAIN_S

    def _open_again(self) -> None:
        broken = self.sender
        try:
            self.sender = self._bind(self.endpoint)
        except (OutputError, zmq.ZMQError) as error:
            self._open_again_s = time.monotonic() + _OPEN_AGAIN_S
            if self._problems.note(f"open again: {error}"):
                log.error("the output cannot be opened again: %s", error)
            return
        self.sender.sent, self.sender.skipped = broken.sent, broken.skipped
        self._open_again_s = None
        log.warning("%s is open again; clients come back by themselves", self.endpoint)
