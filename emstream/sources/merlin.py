"""Merlin (Medipix3, Quantum Detectors): ``merlin://HOST:6342``, MIB frames over TCP.

Frames of U08, U16 and U32 go from the socket straight into their row of the ring; raw ones (R64) are
unpacked into it: one chip of 1, 6, 12 or 24 bits, 2x2 chips of 1, 6 or 12. Each acquisition header
begins a series; without one, a series begins where the frames' numbers fall back. Bytes that are no
message are rejected, once for each stretch of them, and the stream goes on with the next message.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from queue import Empty, SimpleQueue

import numpy as np

from emstream.errors import MalformedFrame
from emstream.frame import FrameHeader
from emstream.intake import Intake
from emstream.sources import Url, mib
from emstream.sources.connection import address
from emstream.sources.series import NumberedSeries, portable

log = logging.getLogger(__name__)

PORT = 6342
_POLL_S = 0.1  # how soon a stop is noticed
_GRACE_S = 0.5  # for the message under way when it comes
_CONNECT_S = 0.5
_RETRY_S = 0.5
_SYSTEM_BUFFER = 8 * 1024**2
_AHEAD = 4096  # bytes read with a header: few calls, few pixels that are copied twice
_PIECE = 1024**2


def from_url(url: Url) -> MerlinSource:
    url.expect()
    address(url, "merlin", PORT)
    if url.parts.path.strip("/"):
        raise ValueError(f"--input {url.text!r}: expected merlin://HOST:PORT")
    return MerlinSource(url.parts.hostname or "", url.parts.port or PORT)


class MerlinSource:
    """Receives from one detector; one that goes away is waited for."""

    lossless = False

    def __init__(self, host: str, port: int = PORT) -> None:
        self._address = (host, port)
        self.endpoint = f"merlin://{f'[{host}]' if ':' in host else host}:{port}"
        self.decoder = Decoder()

    def run(self, intake: Intake, stop: threading.Event) -> None:
        log.info("waiting for frames from %s", self.endpoint)
        said = ""
        while not stop.is_set():
            connection = self._connect(stop)
            if connection is None:
                break
            if isinstance(connection, Exception):
                if str(connection) != said:
                    said = str(connection)
                    log.warning("cannot connect to %s (%s); waiting for it", self.endpoint, said)
                stop.wait(_RETRY_S)
                continue
            said = ""
            with connection:
                self._receive(connection, intake, stop)
            if not stop.is_set():
                log.warning("%s disconnected; waiting for it", self.endpoint)
                stop.wait(_POLL_S)

    def _connect(self, stop: threading.Event) -> socket.socket | Exception | None:
        """A connection, or why there is none; None when `stop` came first.

        In a thread of its own: a name server that does not answer takes many seconds.
        """
        found: SimpleQueue[socket.socket | Exception] = SimpleQueue()

        def connect() -> None:
            try:
                found.put(socket.create_connection(self._address, timeout=_CONNECT_S))
            except (OSError, UnicodeError) as error:  # the latter from a name that cannot be one
                found.put(error)

        threading.Thread(target=connect, name="connect", daemon=True).start()
        while not stop.is_set():
            with contextlib.suppress(Empty):
                return found.get(timeout=_POLL_S)
        return None

    def _receive(self, connection: socket.socket, intake: Intake, stop: threading.Event) -> None:
        """Until the connection or the service ends."""
        connection.settimeout(_POLL_S)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SYSTEM_BUFFER)
        # A detector that loses power says nothing; only TCP notices.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, seconds in {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}.items():
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), seconds)
        deadline_s = None

        def readinto(view: memoryview) -> int:
            nonlocal deadline_s
            while True:
                if stop.is_set():
                    deadline_s = deadline_s or time.monotonic() + _GRACE_S
                    if time.monotonic() > deadline_s:
                        return 0
                try:
                    return connection.recv_into(view)
                except TimeoutError:
                    if stop.is_set():
                        return 0
                except OSError as error:
                    log.debug("%s: %s", self.endpoint, error)
                    return 0

        stream = Stream(readinto)
        with contextlib.suppress(Ended):
            while not stop.is_set():
                self.decoder.decode(stream, intake)


class Ended(Exception):
    """No more bytes."""


class Stream:
    """Bytes that are looked at before they are taken."""

    def __init__(self, readinto: Callable[[memoryview], int]) -> None:
        """`readinto` fills some of what it is given and says how much; 0 at the end."""
        self._readinto = readinto
        self._ahead = bytearray()
        self._scratch = memoryview(bytearray(_AHEAD))

    def __len__(self) -> int:
        """Bytes that have come and are not taken."""
        return len(self._ahead)

    def peek(self, count: int) -> bytes:
        while len(self._ahead) < count:
            came = self._readinto(self._scratch)
            if not came:
                raise Ended
            self._ahead += self._scratch[:came]
        return bytes(self._ahead[:count])

    def skip(self, count: int) -> None:
        """Take bytes that were looked at."""
        del self._ahead[:count]

    def read_into(self, view: memoryview) -> None:
        ready = min(len(self._ahead), len(view))
        view[:ready] = self._ahead[:ready]
        self.skip(ready)
        while ready < len(view):
            came = self._readinto(view[ready:])
            if not came:
                raise Ended
            ready += came

    def read(self, count: int) -> bytearray:
        """`count` bytes; memory is taken as they come."""
        data = bytearray()
        while len(data) < count:
            piece = bytearray(min(_PIECE, count - len(data)))
            self.read_into(memoryview(piece))
            data += piece
        return data

    def find_message(self) -> None:
        """Forget what lies before the next message."""
        while True:
            self.skip(max(0, len(self._ahead) - 3) if (at := self._ahead.find(b"MPX,")) < 0 else at)
            if mib.FRAMING.fullmatch(self.peek(mib.FRAMING_BYTES)):
                return
            self.skip(1)


class Decoder:
    """From a stream of messages to rows and marks."""

    def __init__(self) -> None:
        self._series = NumberedSeries()
        self._source = "Merlin"
        self._proven: tuple[tuple[int, int], str] | None = None  # size and type of the last whole frame
        self._packed = np.empty(0, np.uint8)

    def decode(self, stream: Stream, intake: Intake) -> None:
        """Take one message off `stream`, whatever it holds. Raises Ended at its end."""
        with self._one(stream, intake):
            begin = stream.peek(mib.FRAMING_BYTES)
            match = mib.FRAMING.fullmatch(begin)
            if not match:
                raise MalformedFrame("bytes that are no message, or none that is known")
            length = int(match[1]) - 1
            stream.skip(mib.FRAMING_BYTES - 3)
            if match[2] == b"HDR":
                self._acquisition(length, stream, intake)
            else:
                self._image(length, stream, intake)

    @contextlib.contextmanager
    def _one(self, stream: Stream, intake: Intake) -> Iterator[None]:
        """What stops short or cannot be read is counted; then the next message is looked for."""
        try:
            yield
        except MalformedFrame as error:
            intake.malformed(str(error))
            stream.find_message()
        except Ended:
            if len(stream):
                intake.malformed("connection ended within a message")
            raise

    def _acquisition(self, length: int, stream: Stream, intake: Intake) -> None:
        if not 3 <= length <= intake.max_header_bytes:
            raise MalformedFrame(f"acquisition header must have at most {intake.max_header_bytes} bytes")
        about = mib.parse_acquisition(stream.peek(length))
        stream.skip(length)
        self._series.begin(intake, self._source, mib.frames_of(about), acquisition=portable(about))

    def _image(self, length: int, stream: Stream, intake: Intake) -> None:
        offset = mib.offset_of(stream.peek(mib.KNOWN_BYTES), intake.max_header_bytes)
        image = mib.parse_image(stream.peek(offset))
        if image.nbytes > intake.max_frame_bytes:
            raise MalformedFrame(f"frame is larger than the limit of {intake.max_frame_bytes} bytes")
        if length != offset + image.packed:
            raise MalformedFrame("length of the message and the frame's size disagree")
        header = FrameHeader(
            frame=image.number,
            shape=image.shape,
            type=image.type,
            source=self._source,
            series=self._series.of(intake, self._source, image.number),
            endianness="little" if image.raw else "big",
            timestamp_ns=image.timestamp_ns,
            exposure_s=image.exposure_s,
            extra=image.about,
        )
        stream.skip(offset)
        if (header.shape, header.type) == self._proven:
            self._into_row(image, header, stream, intake)
        else:
            self._first(image, header, stream, intake)

    def _into_row(self, image: mib.Image, header: FrameHeader, stream: Stream, intake: Intake) -> None:
        row = intake.offer(header)
        pixels = row
        if row is None or image.raw:
            if self._packed.nbytes != image.packed:
                self._packed = np.empty(image.packed, np.uint8)
            pixels = self._packed
        assert pixels is not None
        try:
            stream.read_into(pixels.reshape(-1).view(np.uint8).data)
        except Ended:
            if row is not None:
                intake.refuse(_CUT)
            raise
        if row is not None:
            if image.raw:
                mib.unpack(pixels, *image.raw, row)
            intake.accept()

    def _first(self, image: mib.Image, header: FrameHeader, stream: Stream, intake: Intake) -> None:
        """The first frame of a size or type: no memory is taken on its header's word alone."""
        try:
            packed = np.frombuffer(stream.read(image.packed), np.uint8)
        except Ended:
            intake.malformed(_CUT, header)
            raise
        row = intake.offer(header)
        if row is None:
            return
        if image.raw:
            mib.unpack(packed, *image.raw, row)
        else:
            row.reshape(-1).view(np.uint8)[:] = packed
        intake.accept()
        self._proven = (header.shape, header.type)


_CUT = "connection ended within a frame"
