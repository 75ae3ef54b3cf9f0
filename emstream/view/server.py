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
import json
import socket
import threading
from collections.abc import AsyncIterator, Callable
from importlib.resources import files
from types import TracebackType
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from emstream.errors import OutputError, SourceError
from emstream.view.picture import Painter, Picture
from emstream.view.receiver import Receiver

_STATUS_EVERY_S = 0.5
_START_S = 10.0
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
