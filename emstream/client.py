"""What display programs use: `subscribe` to a running emstream."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import zmq

from emstream import wire
from emstream.endpoint import connect
from emstream.errors import MalformedFrame, SourceError
from emstream.frame import Frame
from emstream.keys import Peer

QUEUE_FRAMES = 64


def subscribe(
    endpoint: str,
    topic: str = "denoised",
    *,
    timeout_s: float | None = None,
    until_end: bool = False,
    key: str | Path | None = None,
    service_key: str | Path | None = None,
) -> Iterator[Frame]:
    """Yield frames as they are published, for ever.

    Parameters
    ----------
    endpoint
        What ``emstream serve --output`` names, e.g. ``tcp://127.0.0.1:5556``.
    topic
        ``denoised``, ``raw``, or empty for both in turn (see `Frame.topic`).
    timeout_s
        Raise `SourceError` after this long without a frame; by default wait for ever.
    until_end
        Return when the series ends.
    key, service_key
        For a service that takes keys: your own ``.key_secret`` file, and its ``.key`` file.

    A frame's own memory: keep it or change it as you like. `Frame.header.extra` holds the
    engine's identity, the stages' times, the ledger, and the dose with its verdict.
    Messages that make no sense are skipped.
    """
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.SUB)
    socket.linger = 0
    socket.rcvhwm = QUEUE_FRAMES
    try:
        connect(socket, endpoint, Peer.of(key, service_key))
        socket.subscribe(topic)
        yield from _frames(socket, endpoint, timeout_s, until_end)
    finally:
        socket.close()


def _frames(
    socket: zmq.Socket[bytes], endpoint: str, timeout_s: float | None, until_end: bool
) -> Iterator[Frame]:
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    while True:
        wait_ms = None if deadline is None else max(0, round(1000 * (deadline - time.monotonic())))
        if not socket.poll(wait_ms):
            raise SourceError(f"no frame from {endpoint} within {timeout_s} s; is emstream serve running?")
        parts = socket.recv_multipart(copy=False)
        try:
            frame, ended = read(parts)
        except MalformedFrame:
            continue
        if frame is not None:
            yield frame
            deadline = None if timeout_s is None else time.monotonic() + timeout_s
        elif ended and until_end:
            return


def read(parts: list[zmq.Frame]) -> tuple[Frame | None, bool]:
    """Turn a published message into its frame; without pixels: None, and whether the series ended."""
    if len(parts) < 2:
        raise MalformedFrame(f"message has {len(parts)} part, expected at least 2")
    message = wire.unpack(parts[1].bytes)
    if message.get("htype") != wire.FRAME or len(parts) != 3:
        return None, message.get("htype") == wire.END
    header = wire.header_of({key: value for key, value in message.items() if key != "engine"})
    if len(parts[2].buffer) != header.nbytes:
        raise MalformedFrame("payload and header disagree about the frame's size")
    if "engine" in message:
        header.extra["engine"] = message["engine"]
    # A view of ZeroMQ's own memory, which lives as long as the array.
    data = np.frombuffer(parts[2].buffer, header.dtype).reshape(header.shape)
    return Frame(header, data, parts[0].bytes.decode("ascii", "replace")), False
