"""Who may look: the machine's own browsers by default, elsewhere whoever knows the token."""

from __future__ import annotations

import ipaddress
import secrets
import socket
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs

from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

ANY_ADDRESS = ("", "0.0.0.0", "::")
_LOOPBACK_NAMES = ["localhost", "127.0.0.1", "[::1]"]
_SHORTEST_TOKEN = 8
_REFUSAL = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="dark">
<title>emstream live: a token is needed</title>
<body style="max-width: 36em; margin: 12vh auto; padding: 0 24px; font: 18px/1.5 system-ui, sans-serif">
<h1>This page asks for a token</h1>
<p>Open the whole address, with its <code>?token=...</code>, that emstream printed where it was started.</p>
"""


def is_loopback(host: str) -> bool:
    """Whether only programs on this machine can reach `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def token_for(host: str, token: str | None) -> str | None:
    """The token to ask for: the one given, or a new one where other machines can come in."""
    if token is not None and len(token) < _SHORTEST_TOKEN:
        raise ValueError(
            f"a token must have at least {_SHORTEST_TOKEN} characters, got {len(token)}; "
            "give a longer --token or --view-token"
        )
    return token or (None if is_loopback(host) else secrets.token_urlsafe(16))


def in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def public_name(host: str) -> str:
    """What to type in a browser for `host`; for any address, this machine's on its network."""
    if host not in ANY_ADDRESS:
        return in_url(host)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing: it only asks for a route
            return str(probe.getsockname()[0])
        except OSError:
            return socket.gethostname()


class Door:
    """Lets in who asks by a loopback name or, with a token, who knows it.

    The token comes once in the address, ``/?token=...``, and then as a cookie. It keeps out other
    sites' pages, too; without one, the names do.
    """

    def __init__(self, app: ASGIApp, host: str, token: str | None) -> None:
        self._app, self._token = app, token
        if token is None:
            names = sorted({*_LOOPBACK_NAMES, in_url(host)})
            self._app = TrustedHostMiddleware(app, allowed_hosts=names, www_redirect=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._token is None or scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        cookie = f"emstream-{scope['server'][1]}"
        asked = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
        if self._is_right(asked) and scope["type"] == "http" and scope["path"] == "/":
            answer: Response = RedirectResponse("/", 303)
            answer.set_cookie(cookie, self._token, httponly=True, samesite="lax")
            await answer(scope, receive, send)
        elif self._is_right(asked) or self._is_right(_cookie(scope, cookie)):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await HTMLResponse(_REFUSAL, 401)(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _is_right(self, token: str) -> bool:
        assert self._token is not None
        return secrets.compare_digest(token.encode(), self._token.encode())


def _cookie(scope: Scope, name: str) -> str:
    for key, value in scope["headers"]:
        if key == b"cookie":
            try:
                cookies = SimpleCookie(value.decode("latin-1"))
            except CookieError:
                return ""
            return cookies[name].value if name in cookies else ""
    return ""
