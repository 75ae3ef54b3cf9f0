"""The socket between a camera and its source: connect, wait, connect again, empty it at the end."""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable

import zmq
from zmq.utils.monitor import recv_monitor_message

from emstream.endpoint import Door, last_endpoint
from emstream.errors import SourceError
from emstream.intake import Intake
from emstream.keys import Peer
from emstream.sources import Url

log = logging.getLogger(__name__)

QUEUE_FRAMES = 64  # kept by ZeroMQ before the ring takes them
_POLL_MS = 100  # how soon a stop is noticed
_PATIENCE_S = 3.0  # before it is said that nobody answers


def address(url: Url, scheme: str, default_port: int | None = None) -> str:
    """The ``tcp://HOST:PORT`` or ``ipc://PATH`` in `url`; `scheme` is what an error proposes."""
    if url.parts.scheme.endswith("ipc"):
        if not url.path:
            raise ValueError(f"--input {url.text!r}: expected ipc://PATH")
        return f"ipc://{url.parts.netloc}{url.parts.path}"
    _, port = url.host_port(default_port, scheme)
    host = url.parts.netloc.rpartition(":")[0] if url.parts.port else url.parts.netloc.rstrip(":")
    return f"tcp://{host}:{port}{url.parts.path}"


class Connection:
    """A SUB or PULL socket to one camera; a camera that goes away is waited for."""

    def __init__(
        self,
        endpoint: str,
        *,
        kind: int,
        max_message_bytes: int,
        topic: str = "",
        bind: bool = False,
        context: zmq.Context[zmq.Socket[bytes]] | None = None,
        peer: Peer | None = None,
        door: Door | None = None,
    ) -> None:
        """Beyond `max_message_bytes` for a part of a message ZeroMQ drops the connection.

        `peer` is a camera that takes keys; with `bind`, `door` says which cameras may connect.
        """
        self.socket = (context or zmq.Context.instance()).socket(kind)
        self.socket.rcvhwm = QUEUE_FRAMES
        self.socket.linger = 0
        self.socket.ipv6 = "[" in endpoint  # not always: a name would then stand for its first address alone
        self.socket.maxmsgsize = max_message_bytes
        # A camera that loses power says nothing; only TCP notices.
        self.socket.tcp_keepalive = 1
        self.socket.tcp_keepalive_idle = 10
        self.socket.tcp_keepalive_intvl = 5
        self.socket.tcp_keepalive_cnt = 3
        if kind == zmq.SUB:
            self.socket.subscribe(topic)
        if bind and door and door.stands_open(endpoint):
            self.socket.close()
            raise SourceError(
                f"cannot open {endpoint} for input: other machines can reach it, and anybody there could send "
                "frames; give --key and --admit (emstream keygen makes keys), or --insecure"
            )
        try:
            if bind:
                if door and door.keeper:
                    door.keeper.guard(self.socket)
                self.socket.bind(endpoint)
            else:
                if peer:
                    peer.introduce(self.socket)
                self.socket.connect(endpoint)
        except zmq.ZMQError as error:
            self.socket.close()
            hint = "the address is in use" if error.errno == zmq.EADDRINUSE else error.strerror
            raise SourceError(f"cannot open {endpoint} for input: {hint}") from None
        self.endpoint = last_endpoint(self.socket)
        self._connects = not bind
        self._say_by_s = math.inf
        self._news = self.socket.get_monitor_socket(zmq.EVENT_CONNECTED | zmq.EVENT_DISCONNECTED)

    def run(self, receive: Callable[[Intake], None], intake: Intake, stop: threading.Event) -> None:
        """Call `receive`, which takes one message off the socket or raises zmq.Again, until `stop`."""
        try:
            self.socket.rcvtimeo = _POLL_MS
            log.info("waiting for frames from %s", self.endpoint)
            self._say_by_s = time.monotonic() + _PATIENCE_S if self._connects else math.inf
            while not stop.is_set():
                try:
                    receive(intake)
                except zmq.Again:
                    self._hear(intake)
            # What the queue holds by now has been received, too.
            for _ in range(QUEUE_FRAMES):
                if not self.socket.poll(0):
                    break
                receive(intake)
        finally:
            self.socket.disable_monitor()
            self._news.close(linger=0)
            self.socket.close()

    def more(self) -> bool:
        """Whether the message has parts that are not read."""
        return bool(self.socket.get(zmq.RCVMORE))

    def discard(self) -> int:
        """Forget what is left of the message; returns how many parts that were."""
        parts = 0
        while self.more():
            self.socket.recv_into(bytearray())
            parts += 1
        return parts

    def _hear(self, intake: Intake) -> None:
        """What became of the connection.

        Connect again: ZeroMQ does so by itself, but not after a message above its limit.
        """
        events = []
        while self._news.poll(0):
            events.append(recv_monitor_message(self._news)["event"])
        if events:
            self._say_by_s = math.inf
        elif time.monotonic() > self._say_by_s:
            self._say_by_s = math.inf
            log.warning("nobody answers at %s (is the address right?); waiting for it", self.endpoint)
        if zmq.EVENT_DISCONNECTED not in events:
            return
        log.warning(
            "%s disconnected: the camera went away, or sent a message far above the largest frame of %g MiB; "
            "waiting for it",
            self.endpoint,
            intake.max_frame_bytes / 1024**2,
        )
        # What came back while the queue was being emptied may be in the middle of a message.
        if self._connects and events[-1] == zmq.EVENT_DISCONNECTED:
            with contextlib.suppress(zmq.ZMQError):  # already forgotten by ZeroMQ
                self.socket.disconnect(self.endpoint)
            self.socket.connect(self.endpoint)
