"""EPICS PVAccess: ``pva://CHANNEL``, an NTNDArray as areaDetector's NDPluginPva serves it.

Options: ``server``, HOST or HOST:PORT of the server, for networks that searches by UDP do not cross;
``queue``, frames that are kept on the way. Otherwise EPICS_PVA_ADDR_LIST and the like say where to search.

PVAccess keeps the newest: when ``queue`` frames wait, the next one takes the place of the last, and the
gaps in ``uniqueId`` are counted as missing. Pixels are written once, from where they were received into their
row of the ring. ``uniqueId`` is the frame's number; a series begins where it falls back.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from typing import Any

from emstream.errors import MalformedFrame, SourceError
from emstream.frame import FrameHeader
from emstream.intake import Intake
from emstream.sources import Url
from emstream.sources.connection import QUEUE_FRAMES
from emstream.sources.delivery import Delivery
from emstream.sources.ndarray import Structure, parse
from emstream.sources.series import NumberedSeries

log = logging.getLogger(__name__)

PORT = 5075
_POLL_S = 0.1  # how soon a stop is noticed
# A client that was refused asks again only after ten seconds; a fresh one asks at once. Yet a large first frame
# over a slow line needs time, too.
_FIRST_PATIENCE_S, _LAST_PATIENCE_S = 1.0, 15.0
_CHANNEL = "image"
_LATEST = 64  # plugins of areaDetector with several threads may overtake themselves


def from_url(url: Url) -> EpicsSource:
    url.expect("server", "queue")
    if not url.path.strip("/"):
        raise ValueError(f"--input {url.text!r}: expected pva://CHANNEL, such as pva://13SIM1:Pva1:Image")
    queue = url.integer("queue", QUEUE_FRAMES)
    if queue < 2:
        raise ValueError(f"--input {url.text!r}: queue must be at least 2 frames, got {queue}")
    server = url.options.get("server")
    if server is not None and not re.fullmatch(r"[^\s:/]+(:\d{1,5})?", server):
        raise ValueError(f"--input {url.text!r}: server must be HOST or HOST:PORT, got {server!r}")
    return EpicsSource(url.path, server=server, queue=queue)


class EpicsSource:
    """Receives from one channel; one that goes away is waited for."""

    lossless = False

    def __init__(self, channel: str, *, server: str | None = None, queue: int = QUEUE_FRAMES) -> None:
        try:
            from p4p.client.raw import Context
        except ImportError:
            raise SourceError("pva:// needs: pip install 'emstream[cameras]'") from None
        self._context = Context
        self.channel = channel
        self._queue = queue
        self._where: dict[str, str] = {}
        if server is not None:
            host, _, port = server.partition(":")
            self._where = {
                # Servers of pvAccessCPP answer a search by UDP only, and one by TCP crosses networks.
                "EPICS_PVA_ADDR_LIST": host,
                "EPICS_PVA_NAME_SERVERS": f"{host}:{port or PORT}",
                "EPICS_PVA_AUTO_ADDR_LIST": "NO",
            }
        self.decoder = Decoder(channel)

    def run(self, intake: Intake, stop: threading.Event) -> None:
        log.info("waiting for frames from pva://%s", self.channel)
        patience_s, said = _FIRST_PATIENCE_S, False
        while not stop.is_set():
            if self._subscribe(intake, stop, patience_s):
                patience_s, said = _FIRST_PATIENCE_S, True
                continue
            if not said and not stop.is_set():
                said = True
                log.warning(
                    "nobody serves the channel %s (%s); waiting for it",
                    self.channel,
                    "is server= right?"
                    if self._where
                    else "is EPICS_PVA_ADDR_LIST right? or give server=HOST",
                )
            patience_s = min(2 * patience_s, _LAST_PATIENCE_S)

    def _subscribe(self, intake: Intake, stop: threading.Event, patience_s: float) -> bool:
        """Take what comes until the channel is gone; returns whether it was there."""
        news = threading.Event()
        # Not pipeline=true: servers of pvAccessCPP then send frames twice, those of PVXS drop the newest.
        request = f"record[queueSize={self._queue}]"
        with (
            self._context("pva", conf=self._where, useenv=True, nt=False) as context,
            context.monitor(self.channel, news.set, request) as updates,
        ):
            give_up_s, there = time.monotonic() + patience_s, False
            while not stop.is_set():
                update = updates.pop()
                if update is None:
                    if not there and time.monotonic() > give_up_s:
                        return False
                    news.wait(_POLL_S)
                    news.clear()
                elif isinstance(update, Exception):
                    log.warning("pva://%s: %s; waiting for it", self.channel, update)
                    stop.wait(_POLL_S if there else patience_s)
                    return there
                else:
                    self.decoder.decode(update, intake, again=not there)
                    there = True
            # What the queue holds by now has been received, too.
            for _ in range(self._queue):
                update = updates.pop()
                if update is None or isinstance(update, Exception):
                    break
                self.decoder.decode(update, intake)
        return there


class Decoder:
    """From updates of a channel to rows and marks."""

    def __init__(self, channel: str = "EPICS") -> None:
        self._source = channel[:200]
        self._series = NumberedSeries(_LATEST)
        self._delivery = Delivery(largest_is_no_data=False)
        self._last: Any = None

    def decode(self, update: Structure, intake: Intake, again: bool = False) -> None:
        """Take one update, whatever it holds; `again`: the first since connecting may be the last before."""
        try:
            picture = parse(update, intake.max_frame_bytes)
            if picture is None or (again and picture.identity == self._last):
                return
            self._last = picture.identity
            if again:
                self._series.reconnect()
        except MalformedFrame as error:
            intake.malformed(str(error))
            return
        header = FrameHeader(
            frame=picture.number,
            shape=picture.array.shape,
            type=picture.array.type,
            source=self._source,
            series=self._series.of(intake, self._source, picture.number),
            timestamp_ns=picture.timestamp_ns,
            extra={"ndattr": picture.attributes} if picture.attributes else {},
        )
        try:
            self._delivery.deliver(_CHANNEL, [picture.array], header, intake)
        except MalformedFrame as error:
            intake.malformed(str(error), header)
