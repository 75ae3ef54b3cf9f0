"""What do viewers of the live page cost the service?

    camera ──PUSH──▶ [emstream serve] ──XPUB──▶ [live page] ──▶ viewers
                          └──XPUB──▶ subscriber

One service, one camera that keeps to its schedule, one run. Its frames come in turns: a turn in
which nobody looks, a turn with everybody, and again, so that what the machine does meanwhile falls
on both. Everybody is --viewers browsers' worth of clients that show and acknowledge each picture, each
with a zoom of its own, one more that stops reading, and one behind a link throttled to --link-kb
kilobytes/s. The page runs in a process of its own, as `emstream serve --view` starts it.

Timed span: from the moment when a frame was *due* at the camera to its receipt by the subscriber;
beside it the pipeline's own part, from received to published. The ledger must not lose a frame in either.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect
from websockets.typing import Origin

from bench import report, rig
from emstream.intake import Overrun
from emstream.serve import Settings
from emstream.view import ViewProcess

_SETTLE_S = 1.0  # at the beginning of a turn, not counted: viewers come and go
_WARMUP = 10
_NICE = 10
_KINDS = ("alone", "watched")


def main(argv: list[str] | None = None) -> dict[str, Any]:
    argv = sys.argv[1:] if argv is None else argv
    parser = report.parser("viewers", __doc__)
    parser.add_argument("--engine", help="model file, or identity (default: the shipped engine)")
    parser.add_argument("--threads", type=int, help="of the engine (default: all cores)")
    parser.add_argument("--size", type=int, default=512, help="frames of SIZE x SIZE (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=4, help="frames/s (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=20, help="of each turn (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=6, help="half of them watched (default: %(default)s)")
    parser.add_argument("--viewers", type=int, default=10, help="that keep up (default: %(default)s)")
    parser.add_argument(
        "--link-kb", type=float, default=100, help="of the throttled one (default: %(default)s)"
    )
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.seconds, arguments.turns, arguments.viewers = 2 + _SETTLE_S, 2, 3

    turns = [_KINDS[turn % 2] for turn in range(max(2, arguments.turns))]
    found = _run(arguments, turns)
    results = {
        **report.stamp("viewers", argv),
        "size": arguments.size,
        "rate_per_s": arguments.rate,
        "viewers": arguments.viewers,
        "link_kb_per_s": arguments.link_kb,
        **found,
    }
    report.write("viewers", "Viewers", results, _markdown(results), arguments)
    return results


def _run(arguments: Any, turns: list[str]) -> dict[str, Any]:
    frames = round(arguments.rate * arguments.seconds * len(turns))
    with rig.Children() as children, report.progress("viewers", len(turns) * arguments.seconds) as show:
        camera = children.start(_camera, arguments.size, frames, arguments.rate)
        endpoint, receipts_endpoint = camera.answer()
        settings = Settings(
            input=f"pull+{endpoint}",
            output=rig.ANYWHERE,
            engine=arguments.engine,
            threads=arguments.threads,
            overrun=Overrun.drop_oldest,
        )
        service = children.start(rig.service, settings)
        output, _ = service.answer(within_s=120)
        with ViewProcess(output, port=0) as page:
            subscriber = children.start(_subscriber, output, receipts_endpoint)
            start_ns: int = camera.answer()
            # Viewers are other machines; here they share the cores, so they stand back.
            os.nice(_NICE)
            spans: list[tuple[str, int, int]] = []
            shown: list[dict[str, int]] = []
            for turn, kind in enumerate(turns):
                show(turn * arguments.seconds, kind)
                begin_ns = start_ns + round(turn * arguments.seconds * 1e9)
                _wait_until(begin_ns)
                with (
                    _everybody(page.url, arguments)
                    if kind == "watched"
                    else contextlib.nullcontext() as crowd
                ):
                    spans.append(
                        (kind, begin_ns + round(_SETTLE_S * 1e9), begin_ns + round(arguments.seconds * 1e9))
                    )
                    _wait_until(spans[-1][2])
                    if crowd:
                        shown.append(crowd.shown())
            receipts: list[tuple[int, int, int]] = subscriber.answer(within_s=60)
            late_ms = camera.answer()
        service.stop()
        ledger: dict[str, int] = service.answer()["ledger"]
    latency: dict[str, list[float]] = {kind: [] for kind in _KINDS}
    pipeline: dict[str, list[float]] = {kind: [] for kind in _KINDS}
    for due_ns, received_ns, pipeline_ns in receipts:
        for kind, begin_ns, end_ns in spans:
            if begin_ns <= due_ns < end_ns:
                latency[kind].append((received_ns - due_ns) / 1e6)
                pipeline[kind].append(pipeline_ns / 1e6)
    return {
        "frames": frames,
        "arrived": len(receipts) - _WARMUP,
        "ledger": ledger,
        "camera_late_ms": late_ms,
        "latency_ms": {
            kind: {"frames": len(each), **report.percentiles(each)} for kind, each in latency.items()
        },
        "pipeline_ms": {kind: report.percentiles(each) for kind, each in pipeline.items()},
        "pictures": shown,
    }


def _wait_until(at_ns: int) -> None:
    time.sleep(max(0.0, (at_ns - time.monotonic_ns()) / 1e9))


# -- viewers -----------------------------------------------------------------------------


class _Crowd:
    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    def shown(self) -> dict[str, int]:
        """Pictures that each viewer was sent so far."""
        return dict(self.counts)


@contextlib.contextmanager
def _everybody(url: str, arguments: Any) -> Iterator[_Crowd]:
    """All kinds of viewers for as long as the block lasts."""
    crowd, stop = _Crowd(), threading.Event()
    with contextlib.ExitStack() as stack:
        for number in range(arguments.viewers):
            zoomed = {"region": [8 * number, 0, arguments.size // 2, arguments.size // 2]} if number else {}
            viewer = stack.enter_context(_open(url))
            viewer.send(json.dumps({**zoomed, "average": 1 << number % 3}))
            _start(stack, _look, viewer, crowd.counts, f"viewer {number}", stop)
        stuck = stack.enter_context(_open(url))
        stuck.send("{}")  # and nothing is read from it any more
        throttled = stack.enter_context(_throttled(url))
        _start(stack, _trickle, throttled, crowd.counts, arguments.link_kb, stop)
        stack.callback(stop.set)
        yield crowd


def _start(stack: contextlib.ExitStack, target: Any, *arguments: Any) -> None:
    thread = threading.Thread(target=target, args=arguments, daemon=True)
    thread.start()
    stack.callback(thread.join)


def _open(url: str) -> ClientConnection:
    at = urlsplit(url).netloc
    # An empty queue: what is not read stays in the socket, and the server feels it.
    return connect(
        f"ws://{at}/live", origin=Origin(f"http://{at}"), max_size=None, max_queue=1, close_timeout=1
    )


def _look(viewer: ClientConnection, counts: dict[str, int], name: str, stop: threading.Event) -> None:
    """Show and acknowledge each picture."""
    counts[name] = 0
    with contextlib.suppress(ConnectionClosed, TimeoutError):
        while not stop.is_set():
            message = viewer.recv(timeout=1)
            assert isinstance(message, bytes)
            length = int.from_bytes(message[:4], "little")
            counts[name] += len(message) > 4 + length
            viewer.send("shown")


@contextlib.contextmanager
def _throttled(url: str) -> Iterator[socket.socket]:
    """A websocket opened by hand, on a socket whose buffer is small."""
    at = urlsplit(url)
    with socket.socket() as link:
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        link.connect((at.hostname, at.port))
        link.settimeout(1)
        link.sendall(
            f"GET /live HTTP/1.1\r\nHost: {at.netloc}\r\nOrigin: http://{at.netloc}\r\nUpgrade: websocket\r\n"
            "Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n".encode()
        )
        yield link


def _trickle(link: socket.socket, counts: dict[str, int], kb_per_s: float, stop: threading.Event) -> None:
    """Read `kb_per_s` and no more; acknowledge all the time, as if each picture had been shown."""
    shown = b"\x81\x85\0\0\0\0shown"  # a text message, its mask all zeros
    counts["throttled, kilobytes"] = 0
    taken = 0
    with contextlib.suppress(OSError):
        while not stop.wait(0.1):
            with contextlib.suppress(TimeoutError):
                taken += len(link.recv(int(100 * kb_per_s)))
            counts["throttled, kilobytes"] = taken // 1000
            link.sendall(shown)


# -- the processes -----------------------------------------------------------------------


def _camera(pipe: Connection, size: int, frames: int, rate: float) -> None:
    camera = rig.Camera(size, "uint8")
    pipe.send((camera.endpoint, camera.receipts_endpoint))
    camera.greet()
    camera.warm_up(_WARMUP)
    start_ns = time.monotonic_ns() + 500_000_000
    pipe.send(start_ns)
    late_ms = camera.play(_WARMUP, frames, rate, start_ns)
    camera.end()
    camera.close()
    pipe.send(report.percentiles(late_ms))


def _subscriber(pipe: Connection, endpoint: str, receipts_endpoint: str) -> None:
    subscriber = rig.Subscriber(endpoint, receipts_endpoint)
    receipts = [
        (
            header["scheduled_ns"],
            received_ns,
            header["stages_ns"]["published"] - header["stages_ns"]["received"],
        )
        for received_ns, header, _ in subscriber.frames()
    ]
    subscriber.close()
    pipe.send(receipts)


# -- on paper ----------------------------------------------------------------------------


def _markdown(results: dict[str, Any]) -> str:
    rows = []
    for kind in _KINDS:
        latency, pipeline = results["latency_ms"][kind], results["pipeline_ms"][kind]
        looking = {"alone": "nobody", "watched": "everybody"}[kind]
        rows.append([looking, *latency.values(), *(pipeline[name] for name in ("p50", "p99", "max"))])
    ledger = results["ledger"]
    pictures = [n for turn in results["pictures"] for name, n in turn.items() if name.startswith("viewer")]
    return "\n\n".join(
        [
            f"{results['size']}x{results['size']} uint8 at {results['rate_per_s']:g} frames/s, one service and one "
            f"run, in turns. Everybody: {results['viewers']} viewers, each with its own part of the picture, one that "
            f"stops reading, one on a link of {results['link_kb_per_s']:g} kB/s. "
            "From the camera's schedule to a subscriber, and of that from received to published [ms]:",
            report.table(
                [
                    "looking",
                    "frames",
                    *report.PERCENTILES,
                    *(f"pipeline, {name}" for name in ("p50", "p99", "max")),
                ],
                rows,
            ),
            f"Ledger: {ledger['received']} received, {ledger['published']} published, {ledger['dropped']} dropped, "
            f"{ledger['missing']} missing. A viewer was shown {np.mean(pictures):.0f} pictures in a turn on average.",
        ]
    )


if __name__ == "__main__":
    main()
