"""Outputs in the formats of others, so that displays which exist already show our frames.

``emstream serve --output URL`` may be given several times::

    tcp://HOST:PORT                       native, every topic: emstream.publish
    tcp://HOST:PORT?format=array-1.0      array1.py: PSI, EPICS ADZMQ
    tcp://HOST:PORT?format=karabo-bridge  karabo.py: European XFEL

Options: ``stream`` is denoised (by default), raw, or for karabo-bridge both; ``socket`` is pub or
push, and for karabo-bridge rep (by default); ``queue`` is how many frames are kept for a client
that lags. None of them ever waits for a client: sockets.py. What one cannot send it counts, and goes on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
import zmq

from emstream.endpoint import Door
from emstream.errors import OutputError
from emstream.outputs import array1, karabo
from emstream.outputs.sockets import DEFAULT_QUEUE_BYTES, SOCKETS, Buffer, Queue, Replies, Sender, nbytes_of
from emstream.seldom import Seldom

log = logging.getLogger(__name__)
_OPEN_AGAIN_S = 0.1
NATIVE = "emstream"
DENOISED, RAW, BOTH = "denoised", "raw", "both"
Picture = tuple[Mapping[str, Any], np.ndarray]
"""A header as `emstream.wire` has it, and pixels (H, W)."""


@dataclass(frozen=True)
class _Format:
    parts: Callable[[Mapping[str, Picture]], list[Buffer]]
    streams: tuple[str, ...]
    sockets: tuple[str, ...]
    """The first is the default one."""


FORMATS = {
    "array-1.0": _Format(array1.parts, (DENOISED, RAW), ("pub", "push")),
    "karabo-bridge": _Format(karabo.parts, (DENOISED, RAW, BOTH), ("rep", "pub", "push")),
}


@dataclass(frozen=True)
class Order:
    """An ``--output`` URL in its parts."""

    text: str
    endpoint: str
    format: str = NATIVE
    stream: str = DENOISED
    socket: str = ""
    queue: int | None = None

    @classmethod
    def of(cls, text: str) -> Order:
        """Raises ValueError for options that make no sense; whether the endpoint does, binding it tells."""
        endpoint, _, query = text.partition("?")
        options = dict(parse_qsl(query, keep_blank_values=True))
        name = _choice(text, options, "format", (NATIVE, *FORMATS))
        if name == NATIVE:
            if options:
                raise ValueError(
                    f"--output {text!r}: the native format has every stream and takes no {', '.join(options)}; "
                    f"for another give format={' or '.join(FORMATS)}"
                )
            return cls(text, endpoint)
        streams, sockets = FORMATS[name].streams, FORMATS[name].sockets
        stream, socket = _choice(text, options, "stream", streams), _choice(text, options, "socket", sockets)
        queue = options.pop("queue", None)
        if queue is not None and (not queue.isdecimal() or not 0 < int(queue) <= 100_000):
            raise ValueError(f"--output {text!r}: queue must be 1-100000 frames, got {queue!r}")
        if options:
            raise ValueError(
                f"--output {text!r}: unknown option {', '.join(options)}; known: format, stream, socket, queue"
            )
        return cls(text, endpoint, name, stream, socket, None if queue is None else int(queue))


class Output:
    """One socket and what goes out on it; the publishing thread calls it."""

    def __init__(
        self,
        order: Order,
        queue: int,
        context: zmq.Context[zmq.Socket[bytes]] | None = None,
        door: Door | None = None,
        queue_bytes: int = DEFAULT_QUEUE_BYTES,
        largest: int = 0,
    ) -> None:
        """Bind it. Raises OutputError for an endpoint that cannot be bound.

        Where neither the URL nor the kind of socket says otherwise, `queue` frames are kept for a client, but no
        more than `queue_bytes` hold. When messages come that are larger than `largest` bytes, and than all before,
        its queue may have to be made shorter, for which it is opened again.
        """
        self._format = FORMATS[order.format]
        self._names = (RAW, DENOISED) if order.stream == BOTH else (order.stream,)
        self._about = {"format": order.format, "stream": order.stream, "socket": order.socket}
        self._order, self._context, self._door = order, context or zmq.Context.instance(), door
        self._queue = Queue(order.queue or SOCKETS[order.socket].default_queue or queue, queue_bytes)
        self._largest = largest
        self._sender = self._bind()
        self.endpoint = self._sender.endpoint
        self._before = (0, 0)  # sent and skipped by sockets that broke
        self._failed = 0
        self._problems = Seldom()
        self._open_again_s: float | None = None
        """When a socket that broke is opened again; None when there is one."""

    def _bind(self) -> Sender:
        kind = SOCKETS[self._order.socket]
        return kind(self._order.endpoint, self._queue, self._largest, self._context, self._door)

    def send(self, pictures: Mapping[str, Picture]) -> None:
        """One frame: what there is of it, ``raw`` and ``denoised``. Its memory may change afterwards.

        Never raises: a frame that cannot be sent is counted.
        """
        try:
            if self._open_again_s is not None:
                self._mend()
            if self._sender.wants():
                parts = self._format.parts({name: pictures[name] for name in self._names})
                self._sender.send(parts)
                self._make_room(nbytes_of(parts))
        except Exception as error:
            self._failed += 1
            if isinstance(error, zmq.ZMQError) and self._open_again_s is None:
                self._give_up()
            said = self._problems.note(f"{type(error).__name__}: {error}")
            if said is not None:
                log.error("%s failed on %d frames by now: %s", self.endpoint, self._failed, error)

    def _make_room(self, nbytes: int) -> None:
        """After a message larger than all before: the socket may have to be opened again, with a shorter queue."""
        if nbytes <= self._largest:
            return
        before, self._largest = self._queue.length(self._largest), nbytes
        if self._queue.length(nbytes) < before and not isinstance(self._sender, Replies):
            self._give_up(linger_s=2.0)

    def _give_up(self, linger_s: float = 0.0) -> None:
        """Another socket is opened soon: ZeroMQ lets go of the address in its own time."""
        self._sender.close(linger_s)
        self._order = replace(self._order, endpoint=self.endpoint)  # with the port that was free
        self._open_again_s = time.monotonic() + _OPEN_AGAIN_S

    def _mend(self) -> None:
        """Raises OutputError as long as there is no socket again."""
        assert self._open_again_s is not None
        if time.monotonic() < self._open_again_s:
            raise OutputError("its socket broke, and is opened again soon")
        self._open_again_s = time.monotonic() + _OPEN_AGAIN_S
        broken, self._sender = self._sender, self._bind()
        sent, skipped = self._before
        self._before = sent + broken.sent, skipped + (broken.skipped or 0)
        self._open_again_s = None
        log.warning("%s is open again; clients come back by themselves", self.endpoint)

    def report(self) -> dict[str, Any]:
        """Frames ``sent``, and ``skipped`` because a client was not ready for them, None where ZeroMQ does not say.

        ``failed`` are those that could not be sent at all.
        """
        sent, skipped = self._before
        return {
            "endpoint": self.endpoint,
            **self._about,
            "sent": sent + self._sender.sent,
            "skipped": None if self._sender.skipped is None else skipped + self._sender.skipped,
            "failed": self._failed,
        }

    def close(self, linger_s: float) -> None:
        """Give clients `linger_s` to take what is kept for them."""
        self._sender.close(linger_s)


def orders(texts: str | Iterable[str]) -> tuple[Order | None, Sequence[Order]]:
    """The native output among `texts`, if there is one, and the others."""
    every = [Order.of(text) for text in ([texts] if isinstance(texts, str) else texts)]
    native = [each for each in every if each.format == NATIVE]
    if len(native) > 1:
        raise ValueError(
            f"--output may be native once, got {' and '.join(each.text for each in native)}; "
            "any number of displays can subscribe to it"
        )
    return (native[0] if native else None), [each for each in every if each.format != NATIVE]


def _choice(text: str, options: dict[str, str], name: str, known: Sequence[str]) -> str:
    value = options.pop(name, known[0])
    if value not in known:
        raise ValueError(f"--output {text!r}: {name} must be {' or '.join(known)}, got {value!r}")
    return value
