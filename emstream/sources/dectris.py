"""DECTRIS Stream V2: ``dectris://HOST:31001`` (ELA, QUADRO, ARINA, SINGLA, EIGER2, PILATUS4).

Options: ``channel``, a threshold by its name, or ``sum`` of all; by default the first.

The detector shares its messages out among all who are connected, so be the only one: what goes
elsewhere is missing here. It does not wait for long, it fills its buffer and then drops; so by
default the picture stays live and the oldest frames give way.

Pixels are decompressed straight into their row of the ring. Bad pixels, by the mask that the
series begins with, or else those at the type's largest value in its first image, which stands
for "no data", are filled from their neighbours: `emstream.badpixels`.
"""

from __future__ import annotations

import threading

import zmq

from emstream.errors import MalformedFrame
from emstream.frame import FrameHeader
from emstream.intake import Intake
from emstream.sources import Url, stream2
from emstream.sources.connection import Connection, address
from emstream.sources.delivery import SUM, Array, Delivery
from emstream.sources.series import SeriesTracker
from emstream.wire import DEFAULT_MAX_FRAME_BYTES, DEFAULT_MAX_HEADER_BYTES

PORT = 31001
_MOST_FRAMES_IN_A_MESSAGE = 4  # a message above this many times the largest frame is not read
_SURPLUS = "message has more than one part"


def from_url(url: Url) -> DectrisSource:
    url.expect("channel")
    return DectrisSource(
        address(url, "dectris", PORT),
        channel=url.options.get("channel"),
        max_frame_bytes=url.max_frame_bytes,
        max_header_bytes=url.max_header_bytes,
    )


class DectrisSource:
    """Receives from one detector; one that goes away is waited for."""

    lossless = False

    def __init__(
        self,
        endpoint: str,
        *,
        channel: str | None = None,
        max_frame_bytes: int = DEFAULT_MAX_FRAME_BYTES,
        max_header_bytes: int = DEFAULT_MAX_HEADER_BYTES,
        context: zmq.Context[zmq.Socket[bytes]] | None = None,
    ) -> None:
        self._connection = Connection(
            endpoint,
            kind=zmq.PULL,
            max_message_bytes=_MOST_FRAMES_IN_A_MESSAGE * max_frame_bytes + max_header_bytes,
            context=context,
        )
        self.decoder = Decoder(channel)

    def run(self, intake: Intake, stop: threading.Event) -> None:
        self._connection.run(self._receive, intake, stop)

    def _receive(self, intake: Intake) -> None:
        message = self._connection.socket.recv(copy=False)
        if self._connection.discard():
            intake.malformed(_SURPLUS)
        else:
            self.decoder.decode(message.buffer, intake)


class Decoder:
    """From messages to rows and marks, with what a series' start said about its images."""

    def __init__(self, channel: str | None = None) -> None:
        self._channel = channel
        self._tracker = SeriesTracker()
        self._source = "DECTRIS"
        self._delivery = Delivery()
        self._started: stream2.Start | None = None

    def decode(self, message: bytes | memoryview, intake: Intake) -> None:
        """Take one message, whatever it holds."""
        try:
            parsed = stream2.parse(message, intake.max_frame_bytes, intake.max_header_bytes)
            if isinstance(parsed, stream2.Image):
                self._image(parsed, intake)
            elif isinstance(parsed, stream2.Start):
                self._start(parsed, intake)
            else:
                self._tracker.end(intake, parsed.series)
        except MalformedFrame as error:
            intake.malformed(str(error))

    def _start(self, start: stream2.Start, intake: Intake) -> None:
        self._delivery.begin(start.masks)
        self._started, self._source = start, start.source
        self._tracker.start(intake, start.source, start.series, first=0, **start.about)

    def _image(self, image: stream2.Image, intake: Intake) -> None:
        is_open = self._tracker.open == (self._source, image.series)
        started = self._started if is_open else None
        header = FrameHeader(
            frame=image.number,
            shape=(0, 0),
            type="",
            source=self._source,
            series=image.series,
            timestamp_ns=image.timestamp_ns,
            exposure_s=image.exposure_s or (started.exposure_s if started else None),
            extra=image.about,
        )
        try:
            name, arrays = self._choose(image, started, intake.max_frame_bytes)
            if not is_open:
                # Its start was lost, or sent before we were there.
                self._delivery.begin()
                self._started = None
                self._tracker.start(intake, self._source, image.series)
            header.extra["channel"] = name
            self._delivery.deliver(name, arrays, header, intake)
        except MalformedFrame as error:
            intake.malformed(str(error), header)

    def _choose(
        self, image: stream2.Image, started: stream2.Start | None, max_frame_bytes: int
    ) -> tuple[str, list[Array]]:
        """The channel that is wanted, or all of them."""
        if self._channel == SUM:
            names = list(image.channels)
        else:
            known = started.channels if started else []
            name = self._channel or next((each for each in known if each in image.channels), None)
            names = [name or next(iter(image.channels))]
        if names[0] not in image.channels:
            raise MalformedFrame(
                f"image has no channel {names[0]!r}; it has {', '.join(image.channels)[:200]}"
            )
        size = started.size if started else None
        arrays = [stream2.array(image.channels[name], max_frame_bytes, size) for name in names]
        return (SUM if self._channel == SUM else names[0]), arrays
