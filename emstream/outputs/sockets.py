"""Sockets that never wait for a client.

======  ==========================================================================  ===================
pub     to all who subscribe; one that lags loses what its queue does not hold       ZeroMQ does not say
push    to one of those connected, in turn; when all their queues are full, to none  counted as skipped
rep     to each who asks, a frame for a request                                      counted as skipped
======  ==========================================================================  ===================
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import zmq

from emstream.endpoint import Door, bind

log = logging.getLogger(__name__)

Buffer = bytes | memoryview
DEFAULT_QUEUE_BYTES = 1024**3
_REQUEST = b"next"
_LARGEST_REQUEST = 1024  # [bytes]
_FORGET_S = 60.0  # a client that has not asked for so long
_MOST_CLIENTS = 1000


@dataclass(frozen=True)
class Queue:
    """What is kept for a client that lags: `most` messages, but no more than `most_bytes` hold.

    ZeroMQ counts messages, and how many is settled when a socket is bound: changing it for those who are
    connected crashes libzmq 4.3.5 when one of them is just leaving.
    """

    most: int
    most_bytes: int = DEFAULT_QUEUE_BYTES

    def __post_init__(self) -> None:
        if self.most < 1:
            raise ValueError(f"a subscriber's queue must hold at least 1 message, got {self.most}")
        if self.most_bytes < 1:
            raise ValueError(f"a subscriber's queue must hold at least 1 byte, got {self.most_bytes}")

    def length(self, nbytes: int) -> int:
        """For messages of so many bytes, at least 1."""
        return max(1, min(self.most, self.most_bytes // max(1, nbytes)))


def nbytes_of(parts: Sequence[Buffer]) -> int:
    """Of a message."""
    return sum(len(part) if isinstance(part, bytes) else part.nbytes for part in parts)


class Sender(Protocol):
    """What an output sends on."""

    endpoint: str
    sent: int
    skipped: int
    """Frames that a client was not ready for."""
    counts_skipped: bool
    """Whether ZeroMQ says so."""

    def wants(self) -> bool:
        """Whether anybody would get the next frame; one that nobody would is counted here."""

    def send(self, parts: Sequence[Buffer]) -> None:
        """Send a message, whose memory may change afterwards."""

    def close(self, linger_s: float) -> None: ...


class _Bound:
    """A socket whose queues ZeroMQ keeps."""

    kind: ClassVar[int]
    default_queue = None
    counts_skipped = True

    def __init__(
        self,
        endpoint: str,
        queue: Queue,
        nbytes: int,
        context: zmq.Context[zmq.Socket[bytes]],
        door: Door | None = None,
    ) -> None:
        self._socket = context.socket(self.kind)
        self._socket.sndhwm = queue.length(nbytes)
        self.endpoint = bind(self._socket, endpoint, door)
        self.sent = self.skipped = 0

    def close(self, linger_s: float) -> None:
        self._socket.close(linger=int(1000 * linger_s))


class Broadcast(_Bound):
    """PUB."""

    kind = zmq.XPUB
    counts_skipped = False

    def __init__(self, *where: Any) -> None:
        super().__init__(*where)
        self.subscribed: set[bytes] = set()
        """What somebody has subscribed to, as of `hear`."""

    def hear(self, wait_ms: int = 0) -> None:
        """Note who subscribes and who leaves."""
        while self._socket.poll(wait_ms):
            wait_ms = 0
            message = self._socket.recv()
            if message[:1] == b"\1":
                self.subscribed.add(message[1:])
            elif message[:1] == b"\0":
                self.subscribed.discard(message[1:])

    def wants(self) -> bool:
        self.hear()
        return bool(self.subscribed)

    def send(self, parts: Sequence[Buffer]) -> None:
        *before, last = parts
        for part in before:  # send_multipart takes longer
            self._socket.send(part, zmq.SNDMORE)
        self._socket.send(last)
        self.sent += 1


class Push(_Bound):
    """PUSH."""

    kind = zmq.PUSH

    def wants(self) -> bool:
        if self._socket.poll(0, zmq.POLLOUT):
            return True
        self.skipped += 1
        return False

    def send(self, parts: Sequence[Buffer]) -> None:
        try:
            self._socket.send_multipart(parts, zmq.DONTWAIT)
            self.sent += 1
        except zmq.Again:
            self.skipped += 1


@dataclass
class _Client:
    has: int
    """Number of the last frame it was sent, or that had gone by when it first asked."""
    asked_s: float = 0.0
    waits: bool = False


class Replies:
    """REP, but each client gets every frame: asking takes nothing away from the others.

    Of the last `queue` frames a client gets the oldest that it has not had, so with a queue of 1 the
    newest one; when it has had them all, the next to come. The thread that answers owns the
    socket; the one that publishes leaves frames in a deque and rings a bell.
    """

    default_queue = 1
    counts_skipped = True

    def __init__(
        self,
        endpoint: str,
        queue: Queue,
        nbytes: int,
        context: zmq.Context[zmq.Socket[bytes]],
        door: Door | None = None,
    ) -> None:
        self._socket = context.socket(zmq.ROUTER)
        self._socket.maxmsgsize = _LARGEST_REQUEST
        self._socket.router_mandatory = 1  # says when a client is gone
        self.endpoint = bind(self._socket, endpoint, door)
        self.sent = self.skipped = 0
        self._clients: dict[bytes, _Client] = {}
        self._frames: deque[tuple[int, list[bytes]]] = deque()
        self._nbytes = 0  # of all these
        self._queue = queue
        self._last = 0  # number of the newest frame, from 1
        self._lock = threading.Lock()  # of the frames
        self._until_s: float | None = None
        self._linger_ms = 0
        self._heard, self._bell = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
        for each in (self._heard, self._bell):
            each.linger = 0
        self._heard.bind(f"inproc://replies-{id(self)}")
        self._bell.connect(f"inproc://replies-{id(self)}")
        self._thread = threading.Thread(target=self._run, name="replies", daemon=True)
        self._thread.start()

    def wants(self) -> bool:
        if not self._thread.is_alive():
            raise zmq.ZMQError(zmq.ENOTSOCK, "the thread that answers its clients is gone")
        return bool(self._clients)

    def send(self, parts: Sequence[Buffer]) -> None:
        message = [bytes(part) for part in parts]
        with self._lock:
            self._last += 1
            self._frames.append((self._last, message))
            self._nbytes += nbytes_of(message)
            while len(self._frames) > self._queue.most or (
                self._nbytes > self._queue.most_bytes and len(self._frames) > 1
            ):
                self._nbytes -= nbytes_of(self._frames.popleft()[1])
        self._ring()

    def close(self, linger_s: float) -> None:
        if self._until_s is None:
            self._linger_ms = int(1000 * linger_s)
            self._until_s = time.monotonic() + linger_s
            self._ring()
            self._thread.join()
            self._bell.close()

    def _ring(self) -> None:
        with contextlib.suppress(zmq.Again):  # it rings already
            self._bell.send(b"", zmq.DONTWAIT)

    # -- the thread that answers -------------------------------------------------

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._heard, zmq.POLLIN)
        try:
            while not self._is_done():
                poller.poll(100 if self._until_s else 1000)
                with contextlib.suppress(zmq.Again):
                    while True:
                        self._heard.recv(zmq.DONTWAIT)
                with contextlib.suppress(zmq.Again):
                    for _ in range(_MOST_CLIENTS):  # one that never stops asking keeps nobody waiting
                        self._hear(self._socket.recv_multipart(zmq.DONTWAIT))
                for identity, client in list(self._clients.items()):
                    self._serve(identity, client)
        finally:
            self._clients.clear()
            self._heard.close()
            self._socket.close(linger=self._linger_ms)

    def _is_done(self) -> bool:
        """Closing ends when every client has had all that is kept, or the time is up."""
        if self._until_s is None:
            return False
        behind = self._frames and any(client.has < self._last for client in self._clients.values())
        return not behind or time.monotonic() > self._until_s

    def _hear(self, message: list[bytes]) -> None:
        identity, *rest = message
        if rest != [b"", _REQUEST]:
            log.debug("a client asked %r", rest)
            self._send(identity, [b"error: the request must be next"])
            return
        client = self._clients.pop(identity, None) or _Client(has=self._last)
        client.asked_s, client.waits = time.monotonic(), True
        self._clients[identity] = client  # those who asked last come last
        if len(self._clients) > _MOST_CLIENTS:
            del self._clients[next(iter(self._clients))]

    def _serve(self, identity: bytes, client: _Client) -> None:
        if not client.waits:
            if time.monotonic() > client.asked_s + _FORGET_S:
                del self._clients[identity]
            return
        with self._lock:
            number, message = next((each for each in self._frames if each[0] > client.has), (0, []))
        if not message:
            return
        if not self._send(identity, message):
            del self._clients[identity]
            return
        self.sent += 1
        self.skipped += number - client.has - 1
        client.has, client.waits = number, False

    def _send(self, identity: bytes, message: list[bytes]) -> bool:
        """Whether the client is there to get it."""
        try:
            self._socket.send_multipart([identity, b"", *message], zmq.DONTWAIT, copy=False)
        except zmq.ZMQError as error:
            log.debug("a client is gone: %s", error)
            return False
        return True


SOCKETS: dict[str, type[Broadcast | Push | Replies]] = {
    "pub": Broadcast,
    "push": Push,
    "rep": Replies,
}
