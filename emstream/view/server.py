"""The live page's server: the newest pair of a running emstream, for any number of browsers.

::

    emstream serve ──▶ Receiver ──▶ newest pair ──▶ Painter ──▶ picture ──▶ /live, one per viewer
      (ZeroMQ)         (thread)                     (once per frame)       (asyncio thread)

A viewer is sent the newest pair, and the next one only after it has acknowledged the
last: a slow viewer skips frames, never lags behind, and holds nobody up.

A message on /live is binary::

    [length of header, 4 bytes, little endian][header, JSON][raw, uint8 (h, w)][denoised, uint8 (h, w)]

The header always has the keys of `Receiver.status`. Those of `Picture.header` and the
pixels come only with a pair that this viewer has not been shown; ``shape`` is their (h, w).
Any message from the viewer is the acknowledgement.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import json
import math
import socket
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from importlib.resources import files
from types import TracebackType
from typing import Any

import numpy as np
import uvicorn
import zmq
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from emstream import client, wire
from emstream.errors import MalformedFrame, OutputError, SourceError
from emstream.frame import Frame, now_ns
from emstream.publish import DENOISED, RAW, STATS

SHOWN_PX = 1024  # frames much larger than this are averaged down to about this side
PERCENTILES = (0.5, 99.5)  # what is shown black and white
QUIET_NS = 2_000_000_000  # without a frame for this long, the page says so
_SILENT_NS = 3_000_000_000  # `emstream serve` says something every second
_RATE_SPAN_NS = 2_000_000_000
_SCALE_FOLLOWS_NS = 300_000_000
_SAMPLE_PX = 50_000  # enough for a percentile that the eye cannot tell from the exact one
_STATUS_EVERY_S = 0.5
_POLL_MS = 100  # how soon a stop is noticed
_START_S = 10.0

_COUNTERS = ("received", "published", "dropped", "rejected", "failed", "in_flight", "missing")
_STAGES = ("received", "batched", "inferred", "published")
_PAGE = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
_PAGE_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'self'; img-src data:; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
}
_ANY_ADDRESS = ("", "0.0.0.0", "::")


# -- receiving ------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """What the camera sent and what the engine made of it."""

    raw: Frame
    denoised: Frame
    arrived_ns: int


class Receiver:
    """Keeps the newest pair of a running emstream. One thread writes, any thread reads."""

    def __init__(self, endpoint: str, on_pair: Callable[[], None] = lambda: None) -> None:
        self.endpoint = endpoint
        self.newest: Pair | None = None
        self._on_pair = on_pair
        self._raw: Frame | None = None
        self._heard_ns: int | None = None
        self._ledger: dict[str, float] = {}
        self._engine: dict[str, str] = {}
        self._published: deque[tuple[int, int]] = deque()
        self._frames_per_s: float | None = None
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Subscribe, and receive in a thread. An emstream that is not there yet is waited for."""
        subscriber: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.SUB)
        subscriber.linger = 0
        subscriber.rcvhwm = client.QUEUE_FRAMES
        try:
            subscriber.connect(self.endpoint)
        except zmq.ZMQError as error:
            subscriber.close()
            raise SourceError(f"cannot subscribe to {self.endpoint}: {error.strerror}") from None
        for topic in (RAW, DENOISED, STATS):
            subscriber.subscribe(topic)
        self._thread = threading.Thread(
            target=self._run, args=(subscriber,), name="view-receiver", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        if self._thread:
            self._thread.join()

    def status(self) -> dict[str, Any]:
        """What there is to say without a picture."""
        now, pair = now_ns(), self.newest
        quiet_ns = now - pair.arrived_ns if pair else None
        quiet = quiet_ns is not None and quiet_ns > QUIET_NS
        return {
            "state": "waiting" if pair is None else "quiet" if quiet else "live",
            "input": self.endpoint,
            "serving": self._heard_ns is not None and now - self._heard_ns < _SILENT_NS,
            "quiet_s": None if quiet_ns is None else round(quiet_ns / 1e9, 1),
            "frames_per_s": 0.0 if quiet else self._frames_per_s,
            "ledger": self._ledger,
            "engine": self._engine,
        }

    def _run(self, subscriber: zmq.Socket[bytes]) -> None:
        try:
            while not self._stopping.is_set():
                if subscriber.poll(_POLL_MS):
                    with contextlib.suppress(MalformedFrame):
                        self._receive(subscriber.recv_multipart(copy=False))
        finally:
            subscriber.close()

    def _receive(self, parts: list[zmq.Frame]) -> None:
        self._heard_ns = now_ns()
        if parts[0].bytes == STATS and len(parts) > 1:
            self._note(wire.unpack(parts[1].bytes))
            return
        frame, _ = client.read(parts)
        if frame is None:
            return
        if frame.topic == RAW.decode():
            self._raw = frame
            return
        self._note(frame.header.extra)
        self._note_rate(frame)
        # The raw frame is published just before its denoised one.
        if self._raw is not None and _identity(self._raw) == _identity(frame):
            self.newest = Pair(self._raw, frame, self._heard_ns)
            self._on_pair()

    def _note(self, message: dict[str, Any]) -> None:
        self._ledger = _numbers(message.get("ledger"), _COUNTERS) or self._ledger
        engine = message.get("engine")
        if isinstance(engine, dict):
            self._engine = {
                key: engine[key][:200]
                for key in ("name", "sha256", "device")
                if isinstance(engine.get(key), str)
            }

    def _note_rate(self, frame: Frame) -> None:
        """Frames per second that were published, whether or not they came here."""
        published_ns = _numbers(frame.header.extra.get("stages_ns"), _STAGES).get("published")
        published = self._ledger.get("published")
        if published_ns is None or published is None:
            return
        samples = self._published
        if samples and published <= samples[-1][1]:  # another run of the service
            samples.clear()
        samples.append((int(published_ns), int(published)))
        while published_ns - samples[0][0] > _RATE_SPAN_NS:
            samples.popleft()
        span_ns = samples[-1][0] - samples[0][0]
        self._frames_per_s = (samples[-1][1] - samples[0][1]) / span_ns * 1e9 if span_ns > 0 else None


def _identity(frame: Frame) -> tuple[Any, ...]:
    header = frame.header
    return header.source, header.series, header.frame, header.shape


def _numbers(message: Any, names: Iterable[str]) -> dict[str, float]:
    """The finite numbers among `names` in a map from the wire, which may be anything."""
    if not isinstance(message, dict):
        return {}
    values = {name: message.get(name) for name in names}
    return {
        name: value
        for name, value in values.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    }


# -- painting -------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """A pair ready to be sent."""

    pair: Pair
    header: dict[str, Any]
    pixels: bytes
    """raw, then denoised: uint8 (h, w) each"""


class Painter:
    """Turns pairs into pictures, in order; the grey scales follow the frames smoothly."""

    def __init__(self) -> None:
        self._series: tuple[Any, ...] | None = None
        self._raw, self._denoised = Scale(), Scale()

    def paint(self, pair: Pair) -> Picture:
        header = pair.raw.header
        series = (header.source, header.series, header.shape)
        if series != self._series:
            self._series, self._raw, self._denoised = series, Scale(), Scale()
        raw, denoised = shrink(pair.raw.data), shrink(pair.denoised.data)
        self._raw.follow(raw, pair.arrived_ns)
        self._denoised.follow(denoised, pair.arrived_ns)
        extra = pair.denoised.header.extra
        in_domain = extra.get("in_domain")
        facts = {
            "source": header.source,
            "series": header.series,
            "frame": header.frame,
            "frame_shape": header.shape,
            "shape": raw.shape,
            "units": header.units,
            "dose": _numbers(extra, ["dose"]).get("dose"),
            "in_domain": in_domain if isinstance(in_domain, bool) else None,
            "latency_ms": _latency_ms(pair.denoised),
            "raw": {"low": self._raw.low, "high": self._raw.high},
            "denoised": {"low": self._denoised.low, "high": self._denoised.high},
        }
        return Picture(pair, facts, self._raw.grey(raw).tobytes() + self._denoised.grey(denoised).tobytes())


class Scale:
    """Which value is shown black and which white."""

    def __init__(self) -> None:
        self.low = self.high = math.nan
        self._followed_ns: int | None = None

    def follow(self, image: np.ndarray, at_ns: int) -> None:
        """Move towards the image's percentiles, so slowly that one frame's noise makes no flicker."""
        low, high = _percentiles(image)
        if self._followed_ns is None:
            self.low, self.high = low, high
        else:
            weight = -math.expm1((self._followed_ns - at_ns) / _SCALE_FOLLOWS_NS)
            self.low += weight * (low - self.low)
            self.high += weight * (high - self.high)
        self._followed_ns = at_ns

    @np.errstate(over="ignore", invalid="ignore")  # an engine may put out anything
    def grey(self, image: np.ndarray) -> np.ndarray:
        """`image` as uint8: `low` and what lies below is 0, `high` and what lies above 255."""
        grey = image.astype(np.float32)
        grey -= self.low
        grey *= 255 / (self.high - self.low)
        np.rint(grey, out=grey)
        np.clip(grey, 0, 255, out=grey)
        return grey.astype(np.uint8)


@np.errstate(over="ignore", invalid="ignore")
def shrink(image: np.ndarray) -> np.ndarray:
    """Average squares of pixels into one, so that the sides come out at about SHOWN_PX or less.

    Rows and columns at the end that fill no square are left out.
    """
    factor = min(max(1, round(max(image.shape) / SHOWN_PX)), *image.shape)
    if factor == 1:
        return image
    rows, columns = (length // factor * factor for length in image.shape)
    total = np.zeros((rows // factor, columns // factor), np.float32)
    for row in range(factor):  # strided sums: four times faster than mean() over a reshaped view
        for column in range(factor):
            total += image[row:rows:factor, column:columns:factor]
    total /= factor**2
    return total


@np.errstate(over="ignore", invalid="ignore")
def _percentiles(image: np.ndarray) -> tuple[float, float]:
    step = (image.size // _SAMPLE_PX) | 1  # odd, so as not to fall in step with the rows
    sample = image.reshape(-1)[::step].astype(np.float32)
    sample = sample[np.isfinite(sample)]
    if not sample.size:
        return 0.0, 1.0
    low, high = (float(value) for value in np.percentile(sample.astype(np.float64), PERCENTILES))
    magnitude = max(1.0, abs(low))
    return low, high if high - low > 1e-6 * magnitude else low + magnitude


def _latency_ms(frame: Frame) -> dict[str, float]:
    """The frame's own latencies [ms], named as the ledger names them."""
    at_ns = _numbers(frame.header.extra.get("stages_ns"), _STAGES)
    if len(at_ns) < len(_STAGES):
        return {}
    spans = [*itertools.pairwise(_STAGES), (_STAGES[0], _STAGES[-1])]
    latency = {f"{start}_to_{end}": round((at_ns[end] - at_ns[start]) / 1e6, 3) for start, end in spans}
    latency["total"] = latency.pop("received_to_published")
    return latency


# -- serving --------------------------------------------------------------------


class ViewServer:
    """The live page for one running emstream, served from a background thread.

    ::

        with ViewServer("tcp://127.0.0.1:5556", port=0) as view:
            print(view.url)

    Only browsers that ask for the page by a loopback name or by `host` are answered, and
    only the page itself may open /live: other sites' pages stay out. Port 0 picks a free one.
    """

    def __init__(self, input_endpoint: str, host: str = "127.0.0.1", port: int = 8080) -> None:
        if not 0 <= port <= 65535:
            raise ValueError(f"port must lie in 0-65535, got {port}")
        self.host, self.port = host, port
        self._receiver = Receiver(input_endpoint, self._on_pair)
        self._painter = Painter()
        self._picture: Picture | None = None
        self._viewers = 0
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None
        self._ready = threading.Event()
        # Set when the event loop runs, and of use in its thread only.
        self._loop: asyncio.AbstractEventLoop | None = None
        self._news: asyncio.Event
        self._painting: asyncio.Lock

    @property
    def url(self) -> str:
        """What to open in a browser; with port 0 it is known once the server has started."""
        return f"http://{'localhost' if self.host in _ANY_ADDRESS else _in_url(self.host)}:{self.port}/"

    def start(self) -> None:
        """Serve until `stop`. Raises OutputError, with nothing started, when the address cannot be had."""
        app = self._app()
        listener = _listen(self.host, self.port)
        try:
            self._receiver.start()
        except SourceError:
            listener.close()
            raise
        self.port = listener.getsockname()[1]
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                loop="asyncio",
                http="h11",
                ws="websockets-sansio",
                ws_max_size=64 * 1024,
                ws_per_message_deflate=False,  # noise does not compress
                lifespan="on",
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=2,
            )
        )
        self._thread = threading.Thread(
            target=self._run, args=(self._server, listener), name="view-server", daemon=True
        )
        self._thread.start()
        if not self._ready.wait(_START_S) or self._loop is None:
            self.stop()
            raise OutputError(f"the live page on {self.url} did not start")

    def stop(self) -> None:
        """Say goodbye to the viewers and free the port."""
        self._receiver.stop()
        if self._server and self._thread:
            self._server.should_exit = True
            self._thread.join()

    def __enter__(self) -> ViewServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _run(self, server: uvicorn.Server, listener: socket.socket) -> None:
        try:
            server.run(sockets=[listener])
        finally:
            listener.close()
            self._ready.set()

    def _app(self) -> Starlette:
        hosts = {"localhost", "127.0.0.1", "[::1]", _in_url(self.host)}
        if self.host in _ANY_ADDRESS:
            hosts.add(socket.gethostname())
        page = [Route(path, _static(name, kind)) for path, (name, kind) in _PAGE.items()]
        return Starlette(
            routes=[*page, WebSocketRoute("/live", self._live)],
            middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=sorted(hosts), www_redirect=False)],
            lifespan=self._lifespan,
        )

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self._news, self._painting = asyncio.Event(), asyncio.Lock()
        self._loop = asyncio.get_running_loop()
        self._ready.set()
        yield

    # -- one viewer ---------------------------------------------------------

    async def _live(self, viewer: WebSocket) -> None:
        if not _is_same_origin(viewer):
            await viewer.close()
            return
        await viewer.accept()
        self._viewers += 1
        try:
            await self._show(viewer)
        except WebSocketDisconnect:
            pass
        finally:
            self._viewers -= 1

    async def _show(self, viewer: WebSocket) -> None:
        shown: Picture | None = None
        while True:
            picture = await self._newest_picture()
            if picture is None or picture is shown:
                await viewer.send_bytes(_message(self._receiver.status()))
            else:
                await viewer.send_bytes(_message(self._receiver.status() | picture.header, picture.pixels))
                shown = picture
            if (await viewer.receive())["type"] == "websocket.disconnect":
                return
            await self._wait_for_news(shown)

    async def _newest_picture(self) -> Picture | None:
        """The newest pair's picture, painted by the first viewer who asks for it."""
        async with self._painting:
            pair = self._receiver.newest
            if pair is not None and (self._picture is None or self._picture.pair is not pair):
                self._picture = await asyncio.to_thread(self._painter.paint, pair)
            return self._picture

    async def _wait_for_news(self, shown: Picture | None) -> None:
        """Until there is a newer pair, or it is time for a status."""
        news = self._news
        if self._receiver.newest is (shown.pair if shown else None):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(news.wait(), _STATUS_EVERY_S)

    def _on_pair(self) -> None:
        """In the receiver's thread."""
        if self._loop is not None and self._viewers:
            self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        self._news.set()
        self._news = asyncio.Event()


def _message(header: dict[str, Any], pixels: bytes = b"") -> bytes:
    packed = json.dumps(header, allow_nan=False).encode()
    return b"".join((len(packed).to_bytes(4, "little"), packed, pixels))


def _is_same_origin(viewer: WebSocket) -> bool:
    """Whether it is our page that opens the connection. The host was checked before."""
    host = viewer.headers.get("host", "").lower()
    return viewer.headers.get("origin", "").lower() in (f"http://{host}", f"https://{host}")


def _static(name: str, kind: str) -> Callable[[Request], Response]:
    content = (files("emstream.view") / name).read_bytes()
    return lambda request: Response(content, media_type=kind, headers=_PAGE_HEADERS)


def _listen(host: str, port: int) -> socket.socket:
    where = f"{_in_url(host)}:{port}"
    try:
        addresses = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        # A name with both kinds of address, such as localhost, is served on the IPv4 one.
        return socket.create_server((host, port), family=min(family for family, *_ in addresses))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise OutputError(
                f"cannot serve the live page on {where}: the port is in use; "
                "stop the other program or choose another one with --port (0 picks a free one)"
            ) from None
        raise OutputError(
            f"cannot serve the live page on {where}: {error.strerror}; "
            "--host takes a name or an address of this machine"
        ) from None


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host
