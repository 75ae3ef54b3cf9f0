"""ZeroMQ: ``tcp://host:port`` (SUB, live) and ``pull+tcp://host:port`` (PULL, lossless).

Speaks the native format and array-1.0. Options: ``topic`` to subscribe to one topic
only (``topic=raw`` of another emstream), ``bind=true`` for cameras that connect.

A message's pixels go from ZeroMQ straight into their row of the ring: one copy.
"""

from __future__ import annotations

import threading

import numpy as np
import zmq

from emstream import wire
from emstream.endpoint import Door
from emstream.errors import MalformedFrame
from emstream.frame import FrameHeader
from emstream.intake import Intake
from emstream.keys import Peer
from emstream.sources import Url
from emstream.sources.connection import QUEUE_FRAMES as QUEUE_FRAMES
from emstream.sources.connection import Connection, address

_WRONG_SIZE = "payload and header disagree about the frame's size"
_SURPLUS = "message has parts after the pixels"


def from_url(url: Url) -> ZmqSource:
    url.expect("topic", "bind")
    return ZmqSource(
        address(url, "tcp"),
        lossless=url.parts.scheme.startswith("pull+"),
        topic=url.options.get("topic", ""),
        bind=url.flag("bind"),
        max_frame_bytes=url.max_frame_bytes,
        max_header_bytes=url.max_header_bytes,
        peer=url.peer,
        door=url.door,
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
        max_header_bytes: int = wire.DEFAULT_MAX_HEADER_BYTES,
        context: zmq.Context[zmq.Socket[bytes]] | None = None,
        peer: Peer | None = None,
        door: Door | None = None,
    ) -> None:
        self.lossless = lossless
        self._proven: tuple[tuple[int, int], str] | None = None  # size and type of the last whole frame
        self._connection = Connection(
            endpoint,
            kind=zmq.PULL if lossless else zmq.SUB,
            # Up to twice the limit a message is read and rejected.
            max_message_bytes=2 * max_frame_bytes + max_header_bytes,
            topic=topic,
            bind=bind,
            context=context,
            peer=peer,
            door=door,
        )
        self._socket = self._connection.socket
        self._is_array = False  # the message being read
        self._more, self._discard = self._connection.more, self._connection.discard
        self.endpoint = self._connection.endpoint

    def run(self, intake: Intake, stop: threading.Event) -> None:
        self._connection.run(self._receive, intake, stop)

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
        if (header.shape, header.type) == self._proven and not self._is_array:
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
        """The first frame of a size or type: no memory is taken on its header's word alone.

        And array-1.0, of which empty pixels say that the camera skipped the frame.
        """
        pixels = self._socket.recv(copy=False).buffer
        surplus = self._discard()
        if self._is_array and not len(pixels) and not surplus:
            intake.skip(header)
            return
        if len(pixels) != header.nbytes or surplus:
            intake.malformed(_SURPLUS if surplus else _WRONG_SIZE, header)
            return
        row = intake.offer(header)
        if row is not None:
            np.copyto(row.reshape(-1).view(np.uint8), np.frombuffer(pixels, np.uint8))
            intake.accept()
            self._proven = (header.shape, header.type)

    def _read_header(self, intake: Intake) -> FrameHeader | None:
        """Read up to the pixels; None for a message that is whole without any."""
        part = self._socket.recv()
        self._is_array = part[:1] == b"{"
        if not self._is_array:  # what came is the topic
            if not self._more():
                raise MalformedFrame("message of one part is neither native nor array-1.0")
            part = self._socket.recv()
        message = wire.unpack(part, intake.max_header_bytes)
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


def _bytes_of(row: np.ndarray) -> memoryview:
    return row.reshape(-1).view(np.uint8).data
