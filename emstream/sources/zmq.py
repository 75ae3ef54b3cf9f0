"""ZeroMQ: ``tcp://host:port`` (SUB, live) and ``pull+tcp://host:port`` (PULL, lossless).

Speaks the native format and array-1.0. Options: ``topic`` to subscribe to one topic
only (``topic=raw`` of another emstream), ``bind=true`` for cameras that connect.

A message's pixels go from ZeroMQ straight into their row of the ring: one copy.
"""

from __future__ import annotations

import contextlib
import logging
import threading

import numpy as np
import zmq

from emstream import wire
from emstream.endpoint import last_endpoint
from emstream.errors import MalformedFrame, SourceError
from emstream.frame import FrameHeader
from emstream.intake import Intake
from emstream.sources import Url

log = logging.getLogger(__name__)

QUEUE_FRAMES = 64  # kept by ZeroMQ before the ring takes them
_POLL_MS = 100  # how soon a stop is noticed
_WRONG_SIZE = "payload and header disagree about the frame's size"
_SURPLUS = "message has parts after the pixels"


def from_url(url: Url) -> ZmqSource:
    url.expect("topic", "bind")
    kind, _, transport = url.parts.scheme.rpartition("+")
    if transport == "tcp":
        try:
            port = url.parts.port
        except ValueError:
            port = None
        if not url.parts.hostname or not port:
            raise ValueError(f"--input {url.text!r}: expected tcp://HOST:PORT")
    elif not url.path:
        raise ValueError(f"--input {url.text!r}: expected ipc://PATH")
    return ZmqSource(
        f"{transport}://{url.parts.netloc}{url.parts.path}",
        lossless=kind == "pull",
        topic=url.options.get("topic", ""),
        bind=url.flag("bind"),
        max_frame_bytes=url.max_frame_bytes,
    )


class ZmqSource:
    """Receives from one camera; a camera that goes away is waited for."""

    def __init__(
        self,
        endpoint: str,
        *,
        lossless: bool = False,
        topic: str = "",
        bind: bool = False,
        max_frame_bytes: int = wire.DEFAULT_MAX_FRAME_BYTES,
        context: zmq.Context[zmq.Socket[bytes]] | None = None,
    ) -> None:
        self.lossless = lossless
        self._proven: tuple[tuple[int, int], str] | None = None  # size and type of the last whole frame
        self._socket = (context or zmq.Context.instance()).socket(zmq.PULL if lossless else zmq.SUB)
        self._socket.rcvhwm = QUEUE_FRAMES
        self._socket.linger = 0
        # Up to twice the limit a message is read and rejected; beyond, ZeroMQ drops the connection.
        self._socket.maxmsgsize = 2 * max_frame_bytes + wire.MAX_HEADER_BYTES
        if not lossless:
            self._socket.subscribe(topic)
        try:
            if bind:
                self._socket.bind(endpoint)
            else:
                self._socket.connect(endpoint)
        except zmq.ZMQError as error:
            self._socket.close()
            hint = "the address is in use" if error.errno == zmq.EADDRINUSE else error.strerror
            raise SourceError(f"cannot open {endpoint} for input: {hint}") from None
        self.endpoint = last_endpoint(self._socket)
        self._connects = not bind
        self._disconnections = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)

    def run(self, intake: Intake, stop: threading.Event) -> None:
        try:
            self._socket.rcvtimeo = _POLL_MS
            log.info("waiting for frames from %s", self.endpoint)
            while not stop.is_set():
                try:
                    self._receive(intake)
                except zmq.Again:
                    self._notice_disconnection(intake)
            # What the queue holds by now has been received, too.
            for _ in range(QUEUE_FRAMES):
                if not self._socket.poll(0):
                    break
                self._receive(intake)
        finally:
            self._socket.disable_monitor()
            self._disconnections.close(linger=0)
            self._socket.close()

    def _notice_disconnection(self, intake: Intake) -> None:
        """Connect again: ZeroMQ does so by itself, but not after a message above its limit."""
        if not self._disconnections.poll(0):
            return
        while self._disconnections.poll(0):
            self._disconnections.recv_multipart()
        log.warning(
            "%s disconnected: the camera went away, or sent a message far above the largest frame of %g MiB; "
            "waiting for it",
            self.endpoint,
            intake.max_frame_bytes / 1024**2,
        )
        if self._connects:
            with contextlib.suppress(zmq.ZMQError):  # already forgotten by ZeroMQ
                self._socket.disconnect(self.endpoint)
            self._socket.connect(self.endpoint)

    def _receive(self, intake: Intake) -> None:
        """Take one message off the socket, whatever it holds."""
        try:
            header = self._read_header(intake)
        except MalformedFrame as error:
            self._discard()
            intake.malformed(str(error))
            return
        if header is None:
            self._discard()
            return
        if (header.shape, header.type) == self._proven:
            self._receive_into_row(header, intake)
        else:
            self._receive_and_copy(header, intake)

    def _receive_into_row(self, header: FrameHeader, intake: Intake) -> None:
        row = intake.offer(header)
        if row is None:
            self._discard()
            return
        nbytes = self._socket.recv_into(_bytes_of(row))
        surplus = self._discard()
        if nbytes != header.nbytes:
            intake.refuse(_WRONG_SIZE)
        elif surplus:
            intake.refuse(_SURPLUS)
        else:
            intake.accept()

    def _receive_and_copy(self, header: FrameHeader, intake: Intake) -> None:
        """The first frame of a size or type: no memory is taken on its header's word alone."""
        pixels = self._socket.recv(copy=False).buffer
        surplus = self._discard()
        if len(pixels) != header.nbytes or surplus:
            intake.malformed(_SURPLUS if surplus else _WRONG_SIZE)
            return
        row = intake.offer(header)
        if row is not None:
            _bytes_of(row)[:] = pixels
            intake.accept()
            self._proven = (header.shape, header.type)

    def _read_header(self, intake: Intake) -> FrameHeader | None:
        """Read up to the pixels; None for a message that is whole without any."""
        part = self._socket.recv()
        if part[:1] != b"{":  # not array-1.0: what came is the topic
            if not self._more():
                raise MalformedFrame("message of one part is neither native nor array-1.0")
            part = self._socket.recv()
        message = wire.unpack(part)
        htype = message.get("htype")
        if htype in (wire.START, wire.END):
            intake.mark(message)
            return None
        if htype == wire.STATS:
            return None
        header = wire.header_of(message, intake.max_frame_bytes)
        if not self._more():
            raise MalformedFrame("message has a header but no pixels")
        return header

    def _more(self) -> bool:
        return bool(self._socket.get(zmq.RCVMORE))

    def _discard(self) -> int:
        """Forget what is left of the message; returns how many parts that were."""
        parts = 0
        while self._more():
            self._socket.recv_into(bytearray())
            parts += 1
        return parts


def _bytes_of(row: np.ndarray) -> memoryview:
    return row.reshape(-1).view(np.uint8).data
