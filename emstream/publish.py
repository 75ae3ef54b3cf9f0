"""The output socket: denoised frames, the raw ones beside them, and statistics.

Three topics on one ZeroMQ XPUB socket: ``denoised``, ``raw`` (the very frame, paired by
series and frame number) and ``stats`` (once a second). Sending never waits: a subscriber
that lags loses frames at its own queue, and nobody else notices. Outputs in other formats
(`emstream.outputs`) get the same frames.

A frame that cannot be sent is *failed*, and the next one is tried; a socket that broke is opened again where it was.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import zmq

from emstream import wire
from emstream.endpoint import Door
from emstream.errors import EngineError
from emstream.frame import FrameHeader, now_ns
from emstream.ledger import Ledger
from emstream.outputs import Output
from emstream.outputs.lasting import LINGER_S, Lasting
from emstream.outputs.sockets import DEFAULT_QUEUE_BYTES, Broadcast, Queue
from emstream.ring import SeriesMark, Slot

DENOISED, RAW, STATS = b"denoised", b"raw", b"stats"
DEFAULT_QUEUE = 64
_NEWEST = ("source", "series", "frame", "shape", "units", "pixel_size_m", "exposure_s", "dose", "in_domain")
_ROW_STEP = 8
"""The dose is the mean over every eighth row, 0.004 electrons off at 512x512; and what is no number spreads over a
field of view, so that it is found there, too."""


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
        self._newest: dict[str, Any] = {}
        self.trust: dict[str, Any] | None = None
        """How far the picture can be trusted, for every denoised header."""
        self.about: dict[str, Any] = {}
        """What every message on the stats topic says, too."""
        self._outputs: list[Output] = []
        self._socket = Lasting(Broadcast, endpoint, Queue(queue, queue_bytes), largest, context, door)
        self.endpoint = self._socket.endpoint

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
        with self._socket.tried("a frame"):
            self._socket.sender.hear()
        for row in rows:
            published = self._ledger.published
            with self._socket.tried("a frame"):
                self._publish(slot, row)
            if self._ledger.published == published:
                self._ledger.fail(1)
        return len(rows)

    def _publish(self, slot: Slot, row: int) -> None:
        """Send one frame, and count it once it is sent; other outputs get it all the same."""
        assert slot.maker is not None
        header, counts, result = slot.headers[row], slot.counts[row], slot.result[row]
        if not np.isfinite(result[::_ROW_STEP]).all():
            raise EngineError("the engine made values of it that are no numbers (NaN or infinite)")
        raw = wire.map_of(header)
        message = {**raw, "type": "float32"}
        # A camera has no say in these.
        message.pop("dose", None)
        message.pop("in_domain", None)
        if slot.maker.dose_range:
            message["dose"], message["in_domain"] = _domain(counts, slot.maker.dose_range)
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
            if any(RAW.startswith(prefix) for prefix in self._socket.sender.subscribed):
                self._send(RAW, raw, counts)
            self._send(DENOISED, message, result)
            self._ledger.publish()
            self._note_latency(slot, row, header, published_ns)
        finally:
            for output in self._outputs:
                output.send({"raw": (raw, counts), "denoised": (message, result)})
        self._newest = {key: message[key] for key in _NEWEST if key in message}
        self._newest["published_ns"] = published_ns
        self._socket.make_room(max(counts.nbytes, result.nbytes))

    def mark(self, mark: SeriesMark) -> None:
        """Pass on the start or end of a series."""
        message = mark.message
        with self._socket.tried("a series' start or end"):
            if message["htype"] == wire.END:
                self._close(message)
                return
            self._close()
            self._open_series = (message.get("source", ""), message.get("series", 0))
            self._announce(message)

    def stats(self, message: Mapping[str, Any]) -> None:
        """Send one message on the stats topic, with what there is to say about the newest frame."""
        about = {"htype": wire.STATS, "sent_ns": now_ns(), "newest": self._newest, **self.about}
        with self._socket.tried("statistics"):
            self._socket.sender.send([STATS, wire.pack({**about, **message})])

    def wait_for(self, topic: bytes, timeout_s: float) -> bool:
        """Wait until somebody has subscribed to `topic` itself; False when nobody does. Before the first frame only."""
        sender, deadline_s = self._socket.sender, time.monotonic() + timeout_s
        sender.hear()
        while topic not in sender.subscribed and (left_s := deadline_s - time.monotonic()) > 0:
            sender.hear(round(1000 * left_s))
        return topic in sender.subscribed

    def close(self, linger_s: float = LINGER_S) -> None:
        """End the open series and give subscribers `linger_s` to take what is queued."""
        with self._socket.tried("a series' end"):
            self._close()
        self._socket.close(linger_s)
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
            self._socket.sender.send([topic, packed])

    def _send(self, topic: bytes, message: Mapping[str, Any], pixels: np.ndarray) -> None:
        # Copied by ZeroMQ: the slot may be filled again before a slow subscriber has read it.
        self._socket.sender.send([topic, wire.pack(message), pixels.data])


def _domain(counts: np.ndarray, dose_range: tuple[float, float]) -> tuple[float, bool]:
    """The frame's dose [electrons/pixel] and whether it lies in the range that an engine was trained for."""
    dose = float(np.mean(counts[::_ROW_STEP]))
    low, high = dose_range
    return round(dose, 4), low <= dose <= high
