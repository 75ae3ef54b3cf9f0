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

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
import zmq

from emstream.endpoint import Door
from emstream.outputs import array1, karabo
from emstream.outputs.lasting import Lasting
from emstream.outputs.sockets import (
    DEFAULT_QUEUE_BYTES,
    SOCKETS,
    Broadcast,
    Buffer,
    Push,
    Queue,
    Replies,
    nbytes_of,
)

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
        queue = order.queue or SOCKETS[order.socket].default_queue or queue
        self._socket: Lasting[Broadcast | Push | Replies] = Lasting(
            SOCKETS[order.socket], order.endpoint, Queue(queue, queue_bytes), largest, context, door
        )
        self.endpoint = self._socket.endpoint

    def send(self, pictures: Mapping[str, Picture]) -> None:
        """One frame: what there is of it, ``raw`` and ``denoised``. Its memory may change afterwards.

        Never raises: a frame that cannot be sent is counted.
        """
        with self._socket.tried("a frame"):
            sender = self._socket.sender
            if sender.wants():
                parts = self._format.parts({name: pictures[name] for name in self._names})
                sender.send(parts)
                if not isinstance(sender, Replies):  # which counts bytes
                    self._socket.make_room(nbytes_of(parts))

    def report(self) -> dict[str, Any]:
        """Frames ``sent``, and ``skipped`` because a client was not ready for them, None where ZeroMQ does not say.

        ``failed`` are those that could not be sent at all.
        """
        sender = self._socket.sender
        return {
            "endpoint": self.endpoint,
            **self._about,
            "sent": sender.sent,
            "skipped": sender.skipped if sender.counts_skipped else None,
            "failed": self._socket.failed,
        }

    def close(self, linger_s: float) -> None:
        """Give clients `linger_s` to take what is kept for them."""
        self._socket.close(linger_s)


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
