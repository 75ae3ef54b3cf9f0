"""DECTRIS Stream V1, of older EIGER and QUADRO: ``dectris1://HOST:9999``.

Messages of several parts: JSON that says what it is in ``htype``, JSON that says more, bytes::

    dheader-1.0       [detector's configuration][dflatfield, dpixelmask ... each with its bytes][appendix]
    dimage-1.0        [dimage_d-1.0: shape [x, y], type, encoding][bytes][dconfig-1.0: times][appendix]
    dseries_end-1.0

Otherwise as `emstream.sources.dectris`. The configuration may come in a message of its own.
"""

from __future__ import annotations

import itertools
import re
import threading
from typing import Any

import zmq

from emstream import wire
from emstream.errors import MalformedFrame
from emstream.frame import PIXEL_TYPES, FrameHeader
from emstream.intake import Intake
from emstream.sources import Url
from emstream.sources.compressed import HEADER, framed
from emstream.sources.connection import Connection, address
from emstream.sources.delivery import Array, Delivery
from emstream.sources.series import SeriesTracker

PORT = 9999
_CHANNEL = "image"
_MOST_PARTS = 16
_ENCODING = re.compile(r"(?:bs(?P<bits>8|16|32)-)?(?P<lz4>lz4)?(?P<order>[<>])")
_LARGEST_NUMBER = 2**53


def from_url(url: Url) -> Dectris1Source:
    url.expect()
    return Dectris1Source(
        address(url, "dectris1", PORT),
        max_frame_bytes=url.max_frame_bytes,
        max_header_bytes=url.max_header_bytes,
    )


class Dectris1Source:
    """Receives from one detector; one that goes away is waited for."""

    lossless = False

    def __init__(
        self,
        endpoint: str,
        *,
        max_frame_bytes: int = wire.DEFAULT_MAX_FRAME_BYTES,
        max_header_bytes: int = wire.DEFAULT_MAX_HEADER_BYTES,
        context: zmq.Context[zmq.Socket[bytes]] | None = None,
    ) -> None:
        self._connection = Connection(
            endpoint,
            kind=zmq.PULL,
            max_message_bytes=2 * max_frame_bytes + max_header_bytes,
            context=context,
        )
        self.decoder = Decoder()

    def run(self, intake: Intake, stop: threading.Event) -> None:
        self._connection.run(self._receive, intake, stop)

    def _receive(self, intake: Intake) -> None:
        socket = self._connection.socket
        parts = [socket.recv(copy=False).buffer]
        while self._connection.more() and len(parts) < _MOST_PARTS:
            parts.append(socket.recv(copy=False).buffer)
        if self._connection.discard():
            intake.malformed("message has too many parts")
        else:
            self.decoder.decode(parts, intake)


class Decoder:
    """From messages to rows and marks, with what a series' header said about its images."""

    def __init__(self) -> None:
        self._delivery = Delivery()
        self._tracker = SeriesTracker()
        self._source = "DECTRIS"
        self._exposure_s: float | None = None
        self._announced: int | None = None
        """A series whose header has come, and whose configuration has not."""

    def decode(self, parts: list[Any], intake: Intake) -> None:
        """Take one message, whatever it holds."""
        try:
            head = _map(parts[0], intake)
            kind = head.get("htype")
            if kind == "dimage-1.0":
                self._image(head, parts, intake)
            elif kind == "dheader-1.0":
                self._header(_number(head, "series"), parts, intake)
            elif kind == "dseries_end-1.0":
                self._tracker.end(intake, _number(head, "series"))
            elif kind is None and self._announced is not None:
                self._start(self._announced, head, parts[1:], intake)
            else:
                raise MalformedFrame("htype must be dheader-1.0, dimage-1.0 or dseries_end-1.0")
        except MalformedFrame as error:
            intake.malformed(str(error))

    def _header(self, series: int, parts: list[Any], intake: Intake) -> None:
        if len(parts) > 1:
            self._start(series, _map(parts[1], intake), parts[2:], intake)
        else:
            self._announced = series

    def _start(self, series: int, config: dict[str, Any], more: list[Any], intake: Intake) -> None:
        self._announced = None
        mask = _pixel_mask(more, intake) if config.get("pixel_mask_applied") is not False else None
        self._delivery.begin({_CHANNEL: mask} if mask else None)
        names = [config.get(key) for key in ("description", "detector_number")]
        self._source = (
            " ".join(name for name in names if isinstance(name, str) and 0 < len(name) <= 200) or "DECTRIS"
        )
        count_s = wire.numbers(config, ["count_time"]).get("count_time", 0)
        self._exposure_s = count_s if count_s > 0 else None
        counts = wire.numbers(config, ["nimages", "ntrigger"])
        frames = counts.get("nimages", 0) * counts.get("ntrigger", 1)
        self._tracker.start(
            intake,
            self._source,
            series,
            first=0,
            frames=int(frames) if 1 <= frames < _LARGEST_NUMBER else None,
        )

    def _image(self, head: dict[str, Any], parts: list[Any], intake: Intake) -> None:
        series, number = _number(head, "series"), _number(head, "frame")
        if self._announced is not None:
            self._start(self._announced, {}, [], intake)
        is_open = self._tracker.open == (self._source, series)
        header = FrameHeader(
            frame=number, shape=(0, 0), type="", source=self._source, series=series,
            exposure_s=self._exposure_s if is_open else None,
        )  # fmt: skip
        try:
            if len(parts) < 3:
                raise MalformedFrame("image must have a header, a description and its pixels")
            array = _array(_map(parts[1], intake), parts[2], intake.max_frame_bytes)
            times = _map(parts[3], intake) if len(parts) > 3 and bytes(parts[3][:1]) == b"{" else {}
            if not is_open:
                # Its start was lost, or sent before we were there.
                self._delivery.begin()
                self._exposure_s = None
                self._tracker.start(intake, self._source, series)
            real_ns = wire.numbers(times, ["real_time"]).get("real_time", 0)
            if real_ns > 0:
                header.exposure_s = real_ns / 1e9
            self._delivery.deliver(_CHANNEL, [array], header, intake)
        except MalformedFrame as error:
            intake.malformed(str(error), header)


def _map(part: Any, intake: Intake) -> dict[str, Any]:
    data = bytes(part)
    if data[:1] != b"{":
        raise MalformedFrame("message has a part that should be JSON and is not")
    return wire.unpack(data, intake.max_header_bytes)


def _number(message: dict[str, Any], key: str) -> int:
    value = message.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < _LARGEST_NUMBER:
        raise MalformedFrame(f"{key} must be a number from 0")
    return value


def _array(about: dict[str, Any], data: Any, max_frame_bytes: int) -> Array:
    """The pixels that `about` describes."""
    shape, kind, encoding = about.get("shape"), about.get("type"), about.get("encoding")
    if not isinstance(shape, list) or len(shape) != 2:
        raise MalformedFrame("shape must be [columns, rows]")
    width, height = (_number({"shape": each}, "shape") for each in shape)
    if not (width and height):
        raise MalformedFrame("shape must be [columns, rows], both positive")
    if not isinstance(kind, str) or kind not in PIXEL_TYPES:
        raise MalformedFrame(f"type must be one of {', '.join(PIXEL_TYPES)}")
    match = _ENCODING.fullmatch(encoding) if isinstance(encoding, str) else None
    if not match or (match["bits"] and not match["lz4"]):
        raise MalformedFrame("encoding must be <, lz4< or bs8-, bs16- or bs32-lz4<")
    nbytes = width * height * PIXEL_TYPES[kind].itemsize
    algorithm, element = None, PIXEL_TYPES[kind].itemsize
    if match["bits"]:
        algorithm, element = "bslz4", int(match["bits"]) // 8
        if not any(data[: HEADER.size]):
            # Some senders leave the header empty.
            data = framed(algorithm, data[HEADER.size :], nbytes)
    elif match["lz4"]:
        algorithm = "lz4"
        data = framed(algorithm, data, nbytes)
    endianness = "little" if match["order"] == "<" else "big"
    array = Array((height, width), kind, endianness, algorithm, element, data)
    array.check(max_frame_bytes)
    return array


def _pixel_mask(parts: list[Any], intake: Intake) -> Array | None:
    for about, data in itertools.pairwise(parts):
        if bytes(about[:1]) == b"{" and len(about) <= intake.max_header_bytes:
            fields = _map(about, intake)
            if fields.get("htype") == "dpixelmask-1.0":
                return _array({"encoding": "<", **fields}, data, intake.max_frame_bytes)
    return None
