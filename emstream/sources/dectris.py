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

import logging
import threading

import numpy as np
import zmq

from emstream.badpixels import BadPixels
from emstream.errors import MalformedFrame
from emstream.frame import FrameHeader
from emstream.intake import Intake
from emstream.sources import Url, stream2
from emstream.sources.connection import Connection, address
from emstream.sources.series import SeriesTracker
from emstream.wire import DEFAULT_MAX_FRAME_BYTES, MAX_HEADER_BYTES

log = logging.getLogger(__name__)

PORT = 31001
SUM = "sum"
_SUM_TYPES = {"uint8": "uint16", "int8": "int16", "uint16": "uint32", "int16": "int32", "float32": "float32"}
_MOST_FRAMES_IN_A_MESSAGE = 4  # a message above this many times the largest frame is not read
_SURPLUS = "message has more than one part"


def from_url(url: Url) -> DectrisSource:
    url.expect("channel")
    return DectrisSource(
        address(url, "dectris", PORT),
        channel=url.options.get("channel"),
        max_frame_bytes=url.max_frame_bytes,
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
        context: zmq.Context[zmq.Socket[bytes]] | None = None,
    ) -> None:
        self._connection = Connection(
            endpoint,
            kind=zmq.PULL,
            max_message_bytes=_MOST_FRAMES_IN_A_MESSAGE * max_frame_bytes + MAX_HEADER_BYTES,
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
        self._proven: tuple[tuple[int, int], str] | None = None  # size and type of the last whole frame
        self._begin()

    def decode(self, message: bytes | memoryview, intake: Intake) -> None:
        """Take one message, whatever it holds."""
        try:
            parsed = stream2.parse(message, intake.max_frame_bytes)
            if isinstance(parsed, stream2.Image):
                self._image(parsed, intake)
            elif isinstance(parsed, stream2.Start):
                self._start(parsed, intake)
            else:
                self._tracker.end(intake, parsed.series)
        except MalformedFrame as error:
            intake.malformed(str(error))

    def _begin(self, start: stream2.Start | None = None) -> None:
        self._started = start
        self._bad: dict[str, BadPixels | None] = {}

    def _start(self, start: stream2.Start, intake: Intake) -> None:
        masks = {name: mask.read() for name, mask in start.masks.items()} if start.mask_enabled else {}
        self._begin(start)
        if masks:
            self._bad = {name: _bad_pixels(mask) for name, mask in masks.items()}
            self._bad[SUM] = _bad_pixels(_union(list(masks.values())))
        self._source = start.source
        self._tracker.start(intake, self._source, start.series, **start.about)

    def _image(self, image: stream2.Image, intake: Intake) -> None:
        name, arrays = self._choose(image, intake.max_frame_bytes)
        first = arrays[0]
        kind = first.type
        if len(arrays) > 1:
            kind = _SUM_TYPES.get(kind, "float64")
            if any((each.shape, each.type) != (first.shape, first.type) for each in arrays):
                raise MalformedFrame("channels to be added up differ in size or type")
        if self._tracker.open != (self._source, image.series):
            # Its start was lost, or sent before we were there.
            self._begin()
            self._tracker.start(intake, self._source, image.series)
        header = FrameHeader(
            frame=image.number,
            shape=first.shape,
            type=kind,
            source=self._source,
            series=image.series,
            endianness="little" if len(arrays) > 1 else first.endianness,
            timestamp_ns=image.timestamp_ns,
            exposure_s=image.exposure_s or (self._started.exposure_s if self._started else None),
            extra={**image.about, "channel": name},
        )
        if (header.shape, header.type) == self._proven:
            self._into_row(name, arrays, header, intake)
        else:
            self._and_copy(name, arrays, header, intake)

    def _into_row(self, name: str, arrays: list[stream2.Array], header: FrameHeader, intake: Intake) -> None:
        row = intake.offer(header)
        if row is None:
            return
        try:
            self._write(name, arrays, header, row)
        except MalformedFrame as error:
            intake.refuse(str(error))
        else:
            intake.accept()

    def _and_copy(self, name: str, arrays: list[stream2.Array], header: FrameHeader, intake: Intake) -> None:
        """The first frame of a size or type: no place in the ring is made on its header's word alone."""
        pixels = np.empty(header.shape, header.dtype)
        self._write(name, arrays, header, pixels)
        row = intake.offer(header)
        if row is not None:
            np.copyto(row, pixels)
            intake.accept()
            self._proven = (header.shape, header.type)

    def _write(self, name: str, arrays: list[stream2.Array], header: FrameHeader, row: np.ndarray) -> None:
        """Write the pixels of one channel, or of all added up, without the bad ones."""
        if len(arrays) == 1:
            arrays[0].write(row)
        else:
            np.copyto(row, arrays[0].read(), casting="unsafe")
            for each in arrays[1:]:
                np.add(row, each.read(), out=row, casting="unsafe")
        bad = self._bad_pixels_of(name, arrays, row)
        if bad is not None and bad.shape == row.shape:
            bad.fill(row)
            header.extra["bad_pixels"] = len(bad)

    def _bad_pixels_of(self, name: str, arrays: list[stream2.Array], row: np.ndarray) -> BadPixels | None:
        if name not in self._bad:
            without_data = (
                _union([_without_data(each.read()) for each in arrays]) if len(arrays) > 1 else None
            )
            self._bad[name] = _bad_pixels(_without_data(row) if without_data is None else without_data)
        return self._bad[name]

    def _choose(self, image: stream2.Image, max_frame_bytes: int) -> tuple[str, list[stream2.Array]]:
        """The channel that is wanted, or all of them."""
        size = self._started.size if self._started else None
        if self._channel == SUM:
            names = list(image.channels)
        else:
            known = self._started.channels if self._started else []
            name = self._channel or next((each for each in known if each in image.channels), None)
            names = [name or next(iter(image.channels))]
        if names[0] not in image.channels:
            raise MalformedFrame(
                f"image has no channel {names[0]!r}; it has {', '.join(image.channels)[:200]}"
            )
        arrays = [stream2.array(image.channels[name], max_frame_bytes, size) for name in names]
        return (SUM if self._channel == SUM else names[0]), arrays


def _bad_pixels(mask: np.ndarray) -> BadPixels | None:
    if not mask.any():
        return None
    if mask.all():
        log.warning("the detector's pixel mask is left aside: all %d pixels are bad in it", mask.size)
        return None
    return BadPixels(mask)


def _union(masks: list[np.ndarray]) -> np.ndarray:
    if any(mask.shape != masks[0].shape for mask in masks):
        raise MalformedFrame("pixel masks of the channels differ in size")
    union: np.ndarray = np.any([mask != 0 for mask in masks], axis=0)
    return union


def _without_data(pixels: np.ndarray) -> np.ndarray:
    """(H, W) bool: the pixels that DECTRIS marks by the largest value of their type."""
    if pixels.dtype.kind != "u":
        return np.zeros(pixels.shape, bool)
    marked: np.ndarray = pixels == np.iinfo(pixels.dtype).max
    return marked
