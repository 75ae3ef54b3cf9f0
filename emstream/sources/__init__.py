"""Where frames come from: `open_source` turns an ``--input`` URL into a source.

A new kind of camera is a module with ``from_url(url)``, which returns an object that has
``run(intake, stop)``. Here it takes a line in SCHEMES; a package of its own, anywhere, names it in its
entry points of the group ``emstream.sources``: see "Add your camera" in the README.
"""

from __future__ import annotations

import importlib
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from emstream.endpoint import Door
from emstream.errors import SourceError
from emstream.intake import Source
from emstream.keys import Peer
from emstream.wire import DEFAULT_MAX_FRAME_BYTES, DEFAULT_MAX_HEADER_BYTES

SCHEMES = {
    "tcp": "zmq",
    "ipc": "zmq",
    "pull+tcp": "zmq",
    "pull+ipc": "zmq",
    "file": "files",
    "sim": "simulated",
    "dectris": "dectris",
    "dectris+ipc": "dectris",
    "dectris1": "dectris1",
    "dectris1+ipc": "dectris1",
    "pva": "epics",
    "merlin": "merlin",
}
GROUP = "emstream.sources"


def open_source(
    url: str,
    max_frame_bytes: int = DEFAULT_MAX_FRAME_BYTES,
    peer: Peer | None = None,
    door: Door | None = None,
    max_header_bytes: int = DEFAULT_MAX_HEADER_BYTES,
) -> Source:
    """Make the source that `url` names, e.g. ``tcp://127.0.0.1:5555`` or ``file:///movie.h5?rate=40``.

    Raises ValueError for a URL that makes no sense, SourceError for one that cannot be opened.
    """
    parts, make = _scheme_of(url)
    if peer and SCHEMES.get(parts.scheme) != "zmq":
        raise ValueError(f"--camera-key is for tcp:// and pull+tcp:// inputs, got --input {url!r}")
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    source: Source = make(Url(url, parts, options, max_frame_bytes, peer, door, max_header_bytes))
    return source


def check_scheme(url: str) -> None:
    """Raise ValueError when there is no source for `url`; what follows its ``//`` is not looked at."""
    _scheme_of(url)


def _scheme_of(url: str) -> tuple[SplitResult, Callable[[Url], Source]]:
    try:
        parts = urlsplit(url)
    except ValueError as error:  # brackets that hold no address of IPv6
        raise ValueError(f"--input {url!r}: {error}") from None
    if parts.scheme in SCHEMES:
        return parts, importlib.import_module(f"emstream.sources.{SCHEMES[parts.scheme]}").from_url
    return parts, _installed(url, parts.scheme)


def _installed(url: str, scheme: str) -> Callable[[Url], Source]:
    """The ``from_url`` of a package of somebody else's."""
    others = {each.name: each for each in entry_points(group=GROUP)}
    if scheme not in others:
        raise ValueError(f"--input {url!r}: scheme must be one of {', '.join([*SCHEMES, *others])}")
    entry = others[scheme]
    try:
        make: Callable[[Url], Source] = entry.load()
    except Exception as error:  # whatever the import of a stranger's module may raise
        package = entry.dist.name if entry.dist else "a package"
        raise SourceError(
            f"{scheme}:// is {entry.value!r} of {package}, which does not load: {type(error).__name__}: {error}"
        ) from error
    return make


def wait_until(due_s: float, stop: threading.Event) -> bool:
    """Wait for the moment `due_s` of the monotonic clock; returns whether `stop` came first."""
    while not stop.is_set():
        wait_s = due_s - time.monotonic()
        if wait_s <= 0:
            return False
        stop.wait(min(wait_s, threading.TIMEOUT_MAX))
    return True


@dataclass(frozen=True)
class Url:
    """An ``--input`` URL in its parts, with options that are checked as they are read."""

    text: str
    parts: SplitResult
    options: dict[str, str]
    max_frame_bytes: int = DEFAULT_MAX_FRAME_BYTES
    peer: Peer | None = None
    """The camera's keys and one's own, for one that takes keys."""
    door: Door | None = None
    """Which cameras may connect, where they do."""
    max_header_bytes: int = DEFAULT_MAX_HEADER_BYTES

    @property
    def path(self) -> str:
        return unquote(self.parts.netloc + self.parts.path)

    def host_port(self, default_port: int | None = None, scheme: str | None = None) -> tuple[str, int]:
        """What stands behind the ``//``; an address of IPv6 without its brackets.

        `scheme` is what an error proposes, by default the URL's own.
        """
        try:
            port = self.parts.port or default_port
        except ValueError:
            port = None
        if not self.parts.hostname or not port:
            raise ValueError(f"--input {self.text!r}: expected {scheme or self.parts.scheme}://HOST:PORT")
        return self.parts.hostname, port

    def expect(self, *known: str) -> None:
        """Refuse options that the source does not have."""
        if unknown := sorted(set(self.options) - set(known)):
            raise ValueError(
                f"--input {self.text!r}: unknown option {', '.join(unknown)}; "
                f"known: {', '.join(known) or 'none'}"
            )

    def number(self, name: str, default: float, unit: str, positive: bool = True) -> float:
        """A number option, positive unless said otherwise."""
        value: float = self._parse(name, default, float)
        if not math.isfinite(value) or (positive and value <= 0):
            raise ValueError(f"--input {self.text!r}: {name} must be a positive number [{unit}], got {value}")
        return value

    def integer(self, name: str, default: int) -> int:
        value: int = self._parse(name, default, int)
        if value < 0:
            raise ValueError(f"--input {self.text!r}: {name} must not be negative, got {value}")
        return value

    def flag(self, name: str) -> bool:
        value = self.options.get(name, "false").lower()
        if value not in ("true", "1", "yes", "", "false", "0", "no"):
            raise ValueError(f"--input {self.text!r}: {name} must be true or false, got {value!r}")
        return value in ("true", "1", "yes", "")

    def _parse(self, name: str, default: Any, kind: Callable[[str], Any]) -> Any:
        if name not in self.options:
            return default
        try:
            return kind(self.options[name])
        except ValueError:
            raise ValueError(
                f"--input {self.text!r}: {name} must be a number, got {self.options[name]!r}"
            ) from None
