"""The live page's server: the newest pair of a running emstream, for any number of browsers.

::

    emstream serve ──▶ Receiver ──▶ History ──▶ Painter ──▶ picture ──▶ /live, one per viewer
      (ZeroMQ)         (thread)    (10 s)      (thread, once          (asyncio thread)
                                                per request)

A viewer is sent the newest pair, and the next one only after it has acknowledged the
last: a slow viewer skips frames, never lags behind, and holds nobody up.

A message on /live is binary::

    [length of header, 4 bytes, little endian][header, JSON][pixels, uint8 (h, w) of each picture]

The header always has the keys of `Receiver.status`, ``can_record``, ``history``, what the viewer may step back
through, and ``asked``, the requests heard from it so far. Those of `Picture.header` and the pixels
come only with a pair that this viewer has not been shown as it wants it; ``pictures`` says in which
order, with shape, region, contrast and histogram of each. A viewer sends the word ``shown``, the
acknowledgement, a `Request` as JSON, or, where ``can_record`` is true, ``begin recording`` or ``end recording``.

``/header.json?key=`` and ``/snapshot.tif?key=`` are a pair with all it came with.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import socket
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from types import TracebackType
from typing import Any
from urllib.parse import quote

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from emstream.errors import OutputError, SourceError
from emstream.keys import Peer
from emstream.view import snapshot
from emstream.view.door import Door, in_url, public_name, token_for
from emstream.view.history import extent
from emstream.view.pair import Pair
from emstream.view.picture import Painter, Picture
from emstream.view.receiver import Receiver
from emstream.view.request import Request
from emstream.view.viewer import Viewer

_STATUS_EVERY_S = 0.5
_PICTURES_PER_S = 30.0  # to each viewer; more an eye cannot tell
_TELL_EVERY_S = 0.2  # each viewer may tell the recorder
_START_S = 10.0
_SCRIPTS = (
    "page",
    "live",
    "stage",
    "side",
    "colours",
    "readout",
    "timeline",
    "snapshot",
    "keys",
    "record",
    "text",
)
_PAGE = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    **{f"/{name}.js": (f"{name}.js", "text/javascript") for name in _SCRIPTS},
}
_PAGE_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": ("default-src 'self'; img-src data:; frame-ancestors 'none'; base-uri 'none'"),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_FILE_HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
_RECORD = {"begin recording": "begin", "end recording": "end"}
_LONGEST_KEY = 16  # digits
_NOT_KEPT = "this frame is no longer kept; pause first, then save"


class ViewServer:
    """The live page for one running emstream, served from a background thread.

    ::

        with ViewServer("tcp://127.0.0.1:5556", port=0) as view:
            print(view.url)

    Only browsers that ask for the page by a loopback name or by `host` are answered, and
    only the page itself may open /live: other sites' pages stay out. A `host` that other machines
    can reach asks for a token, which is part of `url`. Port 0 picks a free one. `on_record` gets ``begin``
    and ``end`` from the viewers; without it there is no recorder that they could tell. `peer` is for an
    emstream that takes keys. `options` is how the command's options for host and port begin.
    """

    def __init__(
        self,
        input_endpoint: str,
        host: str = "127.0.0.1",
        port: int = 8080,
        token: str | None = None,
        on_record: Callable[[str], None] | None = None,
        peer: Peer | None = None,
        options: str = "--",
    ) -> None:
        if not 0 <= port <= 65535:
            raise ValueError(f"port must lie in 0-65535, got {port}")
        self.host, self.port, self.token = host, port, token_for(host, token)
        self._options = options
        self._receiver = Receiver(input_endpoint, self._on_pair, peer)
        self._painter = Painter()
        self._on_record = on_record
        self._viewers: set[Viewer] = set()
        self._viewers_so_far = self._pictures_so_far = 0
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None
        self._ready = threading.Event()
        # Set when the event loop runs, and of use in its thread only.
        self._loop: asyncio.AbstractEventLoop | None = None
        self._painting: ThreadPoolExecutor

    @property
    def url(self) -> str:
        """What to open in a browser; with port 0 it is known once the server has started."""
        return self._address + (f"?token={quote(self.token, safe='')}" if self.token else "")

    @property
    def _address(self) -> str:
        return f"http://{public_name(self.host)}:{self.port}/"

    def report(self) -> dict[str, Any]:
        """Where it is served, without the token, what it shows, how many viewers came and what they were sent."""
        return {
            "address": self._address,
            "input": self._receiver.endpoint,
            "viewers": self._viewers_so_far,
            "pictures": self._pictures_so_far,
        }

    def start(self) -> None:
        """Serve until `stop`. Raises OutputError, with nothing started, when the address cannot be had."""
        app = self._app()
        listener = _listen(self.host, self.port, self._options)
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
        page = [Route(path, _static(name, kind)) for path, (name, kind) in _PAGE.items()]
        return Starlette(
            routes=[
                *page,
                Route("/header.json", self._header),
                Route("/snapshot.tif", self._tiff),
                WebSocketRoute("/live", self._live),
            ],
            middleware=[Middleware(Door, host=self.host, token=self.token)],
            lifespan=self._lifespan,
        )

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self._painting = ThreadPoolExecutor(1, "view-painter")
        self._loop = asyncio.get_running_loop()
        self._ready.set()
        try:
            yield
        finally:
            self._painting.shutdown(cancel_futures=True)

    # -- one viewer ---------------------------------------------------------

    async def _live(self, browser: WebSocket) -> None:
        if not _is_same_origin(browser):
            await browser.close()
            return
        await browser.accept()
        viewer = Viewer()
        self._viewers.add(viewer)
        self._viewers_so_far += 1
        both = [
            asyncio.create_task(each) for each in (self._hear(viewer, browser), self._show(viewer, browser))
        ]
        try:
            done, _ = await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        except WebSocketDisconnect:
            pass
        except ValueError as error:
            await browser.close(1008, str(error)[:120])
        finally:
            self._viewers.discard(viewer)
            self._receiver.history.release(viewer)
            for task in both:
                task.cancel()
            await asyncio.gather(*both, return_exceptions=True)
            self._keep_averages()

    async def _hear(self, viewer: Viewer, browser: WebSocket) -> None:
        while True:
            was_live, average = viewer.is_live, viewer.request.average
            message = await browser.receive()
            if message["type"] == "websocket.disconnect":
                return
            text = message.get("text") or ""
            if text in _RECORD:
                self._record(_RECORD[text])
                await asyncio.sleep(_TELL_EVERY_S)
            else:
                viewer.hear(text)
            if was_live and not viewer.is_live:
                self._receiver.history.hold(viewer)
            elif viewer.is_live:
                self._receiver.history.release(viewer)
            if viewer.request.average != average:
                self._keep_averages()

    def _record(self, word: str) -> None:
        if self._on_record is None:
            raise ValueError("this page has no recorder to tell")
        with contextlib.suppress(OSError):  # the service is ending
            self._on_record(word)

    async def _show(self, viewer: Viewer, browser: WebSocket) -> None:
        while True:
            request, past = viewer.request, self._past(viewer)
            message = self._receiver.status() | {
                "can_record": self._on_record is not None,
                "history": extent(self._receiver.history.of(viewer)),
                "asked": viewer.asked,
            }
            if past and viewer.wants(past[-1]):
                picture = await self._painted(past, request)
                await browser.send_bytes(_message(message | picture.header, picture.pixels))
                viewer.note_shown(picture.pair, request)
                self._pictures_so_far += 1
            else:
                await browser.send_bytes(_message(message))
            earliest = asyncio.sleep(1 / _PICTURES_PER_S)
            await asyncio.gather(viewer.acknowledged(), earliest)
            past = self._past(viewer)
            if not past or not viewer.wants(past[-1]):
                await viewer.news(_STATUS_EVERY_S)

    def _past(self, viewer: Viewer) -> Sequence[Pair]:
        """The pair that `viewer` is to be shown, last, and those before it, as far as they are kept."""
        history, key = self._receiver.history, viewer.request.at
        pairs = history.of(viewer)
        if key is None or not pairs:
            return pairs
        return history.find(key) or ((viewer.shown,) if viewer.shown else pairs[:1])

    async def _painted(self, past: Sequence[Pair], request: Request) -> Picture:
        """One picture at a time is painted, and none in the event loop's thread."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._painting, self._painter.paint, past, request)

    def _keep_averages(self) -> None:
        """Averages that no viewer looks at any more go, after what is being painted."""
        wanted = {viewer.request.average for viewer in self._viewers}
        with contextlib.suppress(RuntimeError):  # the page is being closed
            self._painting.submit(self._painter.keep_averages, wanted)

    def _on_pair(self) -> None:
        """In the receiver's thread."""
        if self._loop is not None and self._viewers:
            self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        for viewer in self._viewers:
            if viewer.is_live:
                viewer.wake()

    # -- files ----------------------------------------------------------------

    async def _header(self, request: HttpRequest) -> Response:
        pair = self._asked_for(request)
        if pair is None:
            return PlainTextResponse(_NOT_KEPT, 404)
        return JSONResponse(
            snapshot.header_of(pair) | {"name": snapshot.name_of(pair)}, headers=_FILE_HEADERS
        )

    async def _tiff(self, request: HttpRequest) -> Response:
        pair = self._asked_for(request)
        if pair is None:
            return PlainTextResponse(_NOT_KEPT, 404)
        name = f'attachment; filename="{snapshot.name_of(pair)}.tif"'
        content = await asyncio.get_running_loop().run_in_executor(self._painting, snapshot.tiff, pair)
        return Response(
            content, media_type="image/tiff", headers={**_FILE_HEADERS, "Content-Disposition": name}
        )

    def _asked_for(self, request: HttpRequest) -> Pair | None:
        """The pair of a request's ``key``, as long as it is kept or on somebody's screen."""
        asked = request.query_params.get("key", "")
        if len(asked) > _LONGEST_KEY or not asked.isascii() or not asked.isdecimal():
            return None
        if found := self._receiver.history.find(int(asked)):
            return found[-1]
        shown = (viewer.shown for viewer in self._viewers if viewer.shown)
        return next((pair for pair in shown if pair.key == int(asked)), None)


def _message(header: dict[str, Any], pixels: bytes = b"") -> bytes:
    packed = json.dumps(header, allow_nan=False).encode()
    return b"".join((len(packed).to_bytes(4, "little"), packed, pixels))


def _is_same_origin(viewer: WebSocket) -> bool:
    """Whether it is our page that opens the connection. The host was checked before."""
    host = viewer.headers.get("host", "").lower()
    return viewer.headers.get("origin", "").lower() in (f"http://{host}", f"https://{host}")


def _static(name: str, kind: str) -> Callable[[HttpRequest], Response]:
    content = (files("emstream.view") / name).read_bytes()
    return lambda http_request: Response(content, media_type=kind, headers=_PAGE_HEADERS)


def _listen(host: str, port: int, options: str) -> socket.socket:
    where = f"{in_url(host)}:{port}"
    try:
        addresses = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        # A name with both kinds of address, such as localhost, is served on the IPv4 one.
        return socket.create_server((host, port), family=min(family for family, *_ in addresses))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise OutputError(
                f"cannot serve the live page on {where}: the port is in use; "
                f"stop the other program or choose another one with {options}port (0 picks a free one)"
            ) from None
        raise OutputError(
            f"cannot serve the live page on {where}: {error.strerror}; "
            f"{options}host takes a name or an address of this machine"
        ) from None
