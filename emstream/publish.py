"""The output socket: denoised frames, the raw ones beside them, and statistics.

Three topics on one ZeroMQ XPUB socket: ``denoised``, ``raw`` (the very frame, paired by
series and frame number) and ``stats`` (once a second). Sending never waits: a subscriber
that lags loses frames at its own queue, and nobody else notices. Outputs in other formats
(`emstream.outputs`) get the same frames.

A frame that cannot be sent is *failed*, and the next one is tried; a socket that broke is opened again where it was.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import zmq

from emstream import wire
from emstream.endpoint import Door, bind
from emstream.errors import OutputError
from emstream.frame import FrameHeader, now_ns
from emstream.ledger import Ledger
from emstream.outputs import Output
from emstream.outputs.sockets import DEFAULT_QUEUE_BYTES, Queue
from emstream.ring import SeriesMark, Slot
from emstream.seldom import Seldom

log = logging.getLogger(__name__)

DENOISED, RAW, STATS = b"denoised", b"raw", b"stats"
DEFAULT_QUEUE = 64
_NEWEST = ("source", "series", "frame", "shape", "units", "pixel_size_m", "exposure_s", "dose", "in_domain")
_OPEN_AGAIN_S = 0.1
_DOSE_ROW_STEP = 8  # the dose is the mean over every eighth row: 0.004 electrons off at 512x512


class Publisher:
    """Sends batches; one thread calls it."""

    def __init__(
        self,
        endpoint: str,
        ledger: Ledger,
        queue: int = DEFAULT_QUEUE,
        context: zmq.Context[zmq.Socket[bytes]] | None = None,
        door: Door | None = None,
        queue_bytes: int = DEFAULT_QUEUE_BYTES,
        largest: int = 0,
    ) -> None:
        """Bind `endpoint` for those whom `door` lets in.

        One that lags by `queue` messages, or as many as `queue_bytes` hold, loses some. When frames come that are
        larger than `largest` bytes, and than all before, that may have to be made less, for which the socket is opened
        again.
        """
        self._ledger = ledger
        self._open_series: tuple[str, int | str] | None = None
        self._subscribed: set[bytes] = set()
        self._newest: dict[str, Any] = {}
        self.trust: dict[str, Any] | None = None
        """How far the picture can be trusted, for every denoised header."""
        self.about: dict[str, Any] = {}
        """What every message on the stats topic says, too."""
        self._outputs: list[Output] = []
        self._queue, self._largest, self._door = Queue(queue, queue_bytes), largest, door
        self._context = context or zmq.Context.instance()
        self._problems = Seldom()
        self._open_again_s = 0.0
        self._is_broken = False
        self._bind(endpoint)

    def _bind(self, endpoint: str) -> None:
        self._socket = self._context.socket(zmq.XPUB)
        self._socket.sndhwm = self._queue.length(self._largest)
        self._socket.linger = 2000
        self.endpoint = bind(self._socket, endpoint, self._door)

    def add(self, output: Output) -> None:
        """Send every frame there, too. Closed together with this."""
        self._outputs.append(output)

    @property
    def outputs(self) -> list[dict[str, Any]]:
        """What became of the frames on the outputs in other formats."""
        return [output.report() for output in self._outputs]

    def publish(self, slot: Slot, limit: int | None = None) -> int:
        """Send the first `limit` frames of a finished batch; returns how many are published now, or failed."""
        rows = range(len(slot) if limit is None else min(limit, len(slot)))
        assert slot.maker is not None, "the batch was not denoised"
        self._mend()
        with self._tried("a frame"):
            self._hear()
        for row in rows:
            published = self._ledger.published
            with self._tried("a frame"):
                self._publish(slot, row)
            if self._ledger.published == published:
                self._ledger.fail(1)
            if slot.result[row].nbytes > self._largest:
                self._make_room(slot.result[row].nbytes)
        return len(rows)

    def _publish(self, slot: Slot, row: int) -> None:
        """Send one frame, and count it once it is sent; other outputs get it all the same."""
        assert slot.maker is not None
        header = slot.headers[row]
        raw = wire.map_of(header)
        message = {**raw, "type": "float32"}
        # A camera has no say in these.
        message.pop("dose", None)
        message.pop("in_domain", None)
        if slot.maker.dose_range:
            message["dose"], message["in_domain"] = _domain(slot.counts[row], slot.maker.dose_range)
        message["engine"] = slot.maker.identity
        if self.trust is not None:
            message["trust"] = self.trust
        published_ns = now_ns()
        message["stages_ns"] = {
            "received": slot.received_ns[row],
            "batched": slot.batched_ns,
            "inferred": slot.inferred_ns,
            "published": published_ns,
        }
        message["ledger"] = self._ledger.snapshot(publishing=1)
        try:
            self._open(header)
            if self._wanted(RAW):
                self._send(RAW, raw, slot.counts[row])
            self._send(DENOISED, message, slot.result[row])
            self._ledger.publish()
            self._note_latency(slot, row, header, published_ns)
        finally:
            for output in self._outputs:
                output.send({"raw": (raw, slot.counts[row]), "denoised": (message, slot.result[row])})
        self._newest = {key: message[key] for key in _NEWEST if key in message}
        self._newest["published_ns"] = published_ns

    def mark(self, mark: SeriesMark) -> None:
        """Pass on the start or end of a series."""
        message = mark.message
        self._mend()
        with self._tried("a series' start or end"):
            if message["htype"] == wire.END:
                self._close(message)
                return
            self._close()
            self._open_series = (message.get("source", ""), message.get("series", 0))
            self._announce(message)

    def stats(self, message: Mapping[str, Any]) -> None:
        """Send one message on the stats topic, with what there is to say about the newest frame."""
        about = {"htype": wire.STATS, "sent_ns": now_ns(), "newest": self._newest, **self.about}
        self._mend()
        with self._tried("statistics"):
            self._socket.send_multipart([STATS, wire.pack({**about, **message})])

    def wait_for(self, topic: bytes, timeout_s: float) -> bool:
        """Wait until somebody has subscribed to `topic` itself; False when nobody does. Before the first frame only."""
        deadline_s = time.monotonic() + timeout_s
        self._hear()
        while topic not in self._subscribed and time.monotonic() < deadline_s:
            self._socket.poll(max(0, round(1000 * (deadline_s - time.monotonic()))))
            self._hear()
        return topic in self._subscribed

    def close(self, linger_s: float = 2.0) -> None:
        """End the open series and give subscribers `linger_s` to take what is queued."""
        with self._tried("a series' end"):
            self._close()
        self._socket.close(linger=int(1000 * linger_s))
        for output in self._outputs:
            output.close(linger_s)

    def _note_latency(self, slot: Slot, row: int, header: FrameHeader, published_ns: int) -> None:
        latency = self._ledger.latency
        received_ns = slot.received_ns[row]
        if header.timestamp_ns is not None and "replayed_ns" not in header.extra:
            latency["camera_to_received"].add(received_ns - header.timestamp_ns)
        latency["received_to_batched"].add(slot.batched_ns - received_ns)
        latency["batched_to_inferred"].add(slot.inferred_ns - slot.batched_ns)
        latency["inferred_to_published"].add(published_ns - slot.inferred_ns)
        latency["total"].add(published_ns - received_ns)

    def _open(self, header: FrameHeader) -> None:
        """Announce a series whose camera did not."""
        series = (header.source, header.series)
        if series != self._open_series:
            self._close()
            self._open_series = series
            self._announce({"htype": wire.START, "source": header.source, "series": header.series})

    def _close(self, message: Mapping[str, Any] | None = None) -> None:
        if self._open_series:
            (source, series), self._open_series = self._open_series, None
            self._announce(message or {"htype": wire.END, "source": source, "series": series})

    def _announce(self, message: Mapping[str, Any]) -> None:
        packed = wire.pack(message)
        for topic in (DENOISED, RAW):
            self._socket.send_multipart([topic, packed])

    def _send(self, topic: bytes, message: Mapping[str, Any], pixels: np.ndarray) -> None:
        header = wire.pack(message)  # first: what cannot be packed must not leave half a message behind
        # Copied by ZeroMQ: the slot may be filled again before a slow subscriber has read it.
        self._socket.send(topic, zmq.SNDMORE)
        self._socket.send(header, zmq.SNDMORE)
        self._socket.send(pixels.data, copy=True)

    def _wants(self, topic: bytes) -> bool:
        """Whether anybody has subscribed to `topic` by now."""
        self._hear()
        return self._wanted(topic)

    def _wanted(self, topic: bytes) -> bool:
        return any(topic.startswith(prefix) for prefix in self._subscribed)

    def _hear(self) -> None:
        """Note who subscribes and who leaves."""
        while self._socket.poll(0):
            message = self._socket.recv()
            if message[:1] == b"\1":
                self._subscribed.add(message[1:])
            elif message[:1] == b"\0":
                self._subscribed.discard(message[1:])

    # -- faults -----------------------------------------------------------------

    @contextlib.contextmanager
    def _tried(self, what: str) -> Iterator[None]:
        """Nothing that goes wrong in the block ends the service; it is said, and a socket that broke given up."""
        try:
            yield
        except Exception as error:
            if isinstance(error, zmq.ZMQError) and not self._is_broken:
                self._give_up()
            said = self._problems.note(f"{what}: {type(error).__name__}: {error}")
            if said is not None:
                times, first = said
                log.error(
                    "%s could not be sent, %d times by now: %s: %s",
                    what, times, type(error).__name__, error,
                    exc_info=error if first and not isinstance(error, zmq.ZMQError) else None,
                )  # fmt: skip

    def _give_up(self) -> None:
        """Another socket is opened soon: ZeroMQ lets go of the address in its own time."""
        with contextlib.suppress(zmq.ZMQError):
            self._socket.unbind(self.endpoint)
        self._socket.close()
        self._subscribed.clear()
        self._is_broken, self._open_again_s = True, time.monotonic() + _OPEN_AGAIN_S

    def _make_room(self, nbytes: int) -> None:
        """After a frame larger than all before: the queue of a subscriber may have to be shorter now."""
        before, self._largest = self._queue.length(self._largest), nbytes
        length = self._queue.length(nbytes)
        if length == before:
            return
        log.warning(
            "frames of %d bytes are larger than expected (--expect): the output is opened again, so that a "
            "subscriber's queue holds %d messages, no more than --queue-mib",
            nbytes,
            length,
        )
        self._give_up()
        time.sleep(_OPEN_AGAIN_S)
        self._mend()

    def _mend(self) -> None:
        """Open a socket that broke again, at the same endpoint."""
        if not self._is_broken or time.monotonic() < self._open_again_s:
            return
        try:
            self._bind(self.endpoint)
        except (OutputError, zmq.ZMQError) as error:
            self._open_again_s = time.monotonic() + _OPEN_AGAIN_S
            if self._problems.note(f"open again: {error}"):
                log.error("the output cannot be opened again: %s", error)
        else:
            self._is_broken = False
            log.warning("%s is open again; subscribers come back by themselves", self.endpoint)


def _domain(counts: np.ndarray, dose_range: tuple[float, float]) -> tuple[float, bool]:
    """The frame's dose [electrons/pixel] and whether it lies in the range that an engine was trained for."""
    dose = float(np.mean(counts[::_DOSE_ROW_STEP]))
    low, high = dose_range
    return round(dose, 4), low <= dose <= high
