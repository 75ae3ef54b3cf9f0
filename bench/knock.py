"""What do clients without the right keys get from a service that takes keys, and what do they cost it?

    camera ──PUSH──▶ [emstream serve --key --admit] ──XPUB──▶ subscriber that is admitted
                                    ▲
      10,000 that are not ──────────┘ nobody's key, a key that is not admitted, another service's key

One service, one camera that keeps to its schedule, one run, in turns: nobody knocks, clients of one kind
knock, and again, so that what the machine does meanwhile falls on all alike. Each client connects once, subscribes to
everything, and waits until ZeroMQ tells how the handshake ended; --at-once at a time, --per-s of them. They share
the machine's cores here, so they stand back (nice). Last in each round --at-once connect and say nothing at all,
until the service sends them away.

Latency: from the moment when a frame was *due* at the camera to its receipt by the subscriber. Processor time
of a client: what the service used in the turns of its kind, less what it uses when nobody knocks. Memory and open
files are sampled ten times a second, from when --at-once of each kind have been there.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import socket
import sys
import tempfile
import time
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import zmq
from zmq.utils.monitor import recv_monitor_message

from bench import report, rig
from bench.program import MIB, Program, Sample, Watch, adds_up, verdict
from emstream import keys
from emstream.keys import Peer

QUIET = "nobody knocks"
KINDS = ("no key", "unknown key", "wrong server key")
SILENT = "says nothing"
TAIL = 0.2  # of the p99 when nobody knocks
GROWTH = 0.05  # of the memory
_PATIENCE_S = 5.0  # of a client
_SETTLE_S = 10.0
_REST_S = 0.5
_WARM_UP = 20  # frames
_NICE = 10
_FAILED = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)
_OVER = _FAILED | zmq.EVENT_DISCONNECTED
_EVENTS = _OVER | zmq.EVENT_CONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED


def main(argv: list[str] | None = None) -> dict[str, Any]:
    argv = sys.argv[1:] if argv is None else argv
    parser = report.parser("knock", __doc__)
    parser.add_argument("--connections", type=int, default=10_000, help="in all (default: %(default)s)")
    parser.add_argument("--at-once", type=int, default=50, help="clients at a time (default: %(default)s)")
    parser.add_argument("--per-s", type=float, default=200, help="clients per second (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each kind (default: %(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=5, help="of a turn without them (default: %(default)s)"
    )
    parser.add_argument("--size", type=int, default=512, help="frames of SIZE x SIZE (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=40, help="frames/s (default: %(default)s)")
    arguments = parser.parse_args(argv)
    positive = ("connections", "at_once", "per_s", "rounds", "seconds", "rate")
    if min(getattr(arguments, name) for name in positive) <= 0:
        parser.error(", ".join(f"--{name.replace('_', '-')}" for name in positive) + " must be positive")
    if not zmq.has("curve"):
        raise SystemExit("this libzmq has no CURVE")
    if arguments.quick:
        arguments.connections, arguments.rounds, arguments.seconds = min(arguments.connections, 150), 1, 0.5
    results: dict[str, Any] = {
        **report.stamp("knock", argv),
        "size": arguments.size,
        "rate_per_s": arguments.rate,
        "at_once": arguments.at_once,
        **knock(arguments),
    }
    report.write("knock", "Strangers", results, _markdown(results), arguments)
    return results


def knock(arguments: argparse.Namespace) -> dict[str, Any]:
    each_turn = math.ceil(arguments.connections / (len(KINDS) * arguments.rounds))
    counts = {**dict.fromkeys(KINDS, each_turn), SILENT: min(arguments.at_once, each_turn)}
    turns = [turn for _ in range(arguments.rounds) for kind in counts for turn in (QUIET, kind)]
    spans: list[tuple[str, int, int, float]] = []
    outcomes: dict[str, Counter[str]] = {kind: Counter() for kind in counts}
    with (
        tempfile.TemporaryDirectory() as name,
        rig.Children() as children,
        report.progress("knock", len(turns)) as show,
    ):
        folder = _with_keys(Path(name))
        camera = children.start(_camera, arguments.size, arguments.rate)
        endpoint, receipts_endpoint = camera.answer()
        options = (
            "--engine", "identity", "--input", f"pull+{endpoint}", "--output", rig.ANYWHERE,
            "--expect", f"{arguments.size}x{arguments.size}:uint8",
            "--key", str(folder / "service.key_secret"), "--admit", str(folder / "admitted"),
        )  # fmt: skip
        with Program(folder, *options) as service:
            subscriber = children.start(_subscriber, service.output, receipts_endpoint, folder)
            stranger = children.start(_stranger, service.output, folder, arguments.at_once, arguments.per_s)
            camera.answer()  # warm
            for kind in KINDS:
                stranger.tell((kind, arguments.at_once))
                stranger.answer()
            time.sleep(_REST_S)
            before, log_bytes = service.sample(), service.log_bytes
            with Watch(service, 0.1) as watch:
                for turn, kind in enumerate(turns):
                    show(turn, kind)
                    begin_ns, begin = time.monotonic_ns(), service.sample()
                    if kind == QUIET:
                        time.sleep(arguments.seconds)
                    else:
                        stranger.tell((kind, counts[kind]))
                        outcomes[kind] += stranger.answer(within_s=600)
                    spans.append((kind, begin_ns, time.monotonic_ns(), service.sample().cpu_s - begin.cpu_s))
            after = _settled(service, before)
            log_kb = round((service.log_bytes - log_bytes) / 1e3, 1)
            camera.tell("end")
            sent, late_ms = camera.answer()
            receipts, wrong = subscriber.answer()
            stranger.tell(None)
            ledger = service.end()["ledger"]
    return {
        "sent": sent,
        "arrived": len(receipts),
        "wrong": wrong,
        "lost": sent - len(receipts),
        "ledger": ledger,
        "exact": adds_up(ledger)
        and sent == ledger["received"] == ledger["published"]
        and not ledger["missing"],
        "camera_late_ms": late_ms,
        "kinds": _kinds(spans, receipts, outcomes),
        "rss_mib": {
            name: round(value / MIB, 1) for name, value in _course(before, watch, after, "rss_bytes").items()
        },
        "fds": _course(before, watch, after, "fds"),
        "log_kb": log_kb,
    }


def _with_keys(folder: Path) -> Path:
    """The service's keys, those of a display that is admitted, of a stranger, and of another service."""
    for name in ("service", "display", "stranger", "other"):
        keys.make(name, folder)
    (folder / "admitted").mkdir()
    shutil.copy(folder / "display.key", folder / "admitted")
    return folder


def _settled(service: Program, before: Sample) -> Sample:
    """Once it has closed what it has to close, or some time later."""
    deadline_s = time.monotonic() + _SETTLE_S
    while (sample := service.sample()).fds > before.fds and time.monotonic() < deadline_s:
        time.sleep(0.1)
    return sample


def _course(before: Sample, watch: Watch, after: Sample, what: str) -> dict[str, int]:
    seen = [getattr(sample, what) for sample in (before, *watch.samples, after)]
    return {"before": seen[0], "max": max(seen), "after": seen[-1]}


def _kinds(
    spans: list[tuple[str, int, int, float]],
    receipts: list[tuple[int, int]],
    outcomes: dict[str, Counter[str]],
) -> dict[str, Any]:
    """Of each kind of turn what the clients saw, what they cost, and the latency meanwhile."""
    quiet = [(end_ns - begin_ns, cpu_s) for kind, begin_ns, end_ns, cpu_s in spans if kind == QUIET]
    idle = sum(cpu_s for _, cpu_s in quiet) / sum(span_ns / 1e9 for span_ns, _ in quiet)
    found = {}
    for kind in (QUIET, *KINDS, SILENT):
        mine = [span for span in spans if span[0] == kind]
        seconds = sum(end_ns - begin_ns for _, begin_ns, end_ns, _ in mine) / 1e9
        cpu_s = sum(span[3] for span in mine)
        latency_ms = [
            (received_ns - due_ns) / 1e6
            for due_ns, received_ns in receipts
            if any(begin_ns <= due_ns < end_ns for _, begin_ns, end_ns, _ in mine)
        ]
        found[kind] = {
            "seconds": round(seconds, 2),
            "cpu_per_s": round(cpu_s / seconds, 4),
            "frames": len(latency_ms),
            "latency_ms": report.percentiles(latency_ms),
        }
        if kind != QUIET:
            seen = outcomes[kind]
            found[kind] |= {
                "tried": seen["tried"],
                "connected": seen["connected"],
                "let_in": seen["let in"],
                "messages": seen["messages"],
                "in_the_dark": seen["in the dark"],
                "per_s": round(seen["tried"] / seconds),
                "cpu_ms_each": round((cpu_s - idle * seconds) / seen["tried"] * 1e3, 3),
            }
    return found


# -- the processes -----------------------------------------------------------------------


def _camera(pipe: Connection, size: int, rate: float) -> None:
    """On schedule until it is told to end."""
    camera = rig.Camera(size, "uint8")
    pipe.send((camera.endpoint, camera.receipts_endpoint))
    camera.greet()
    camera.warm_up(_WARM_UP)
    pipe.send("warm")
    start_ns, sent, stretch = time.monotonic_ns(), _WARM_UP, max(1, round(rate / 4))
    late_ms: list[float] = []
    while not pipe.poll(0):
        late_ms += camera.play(sent, stretch, rate, start_ns)
        sent += stretch
        start_ns += round(stretch / rate * 1e9)
    camera.end()
    camera.close()
    pipe.send((sent, report.percentiles(late_ms)))


def _subscriber(pipe: Connection, endpoint: str, receipts_endpoint: str, folder: Path) -> None:
    peer = Peer.of(folder / "display.key_secret", folder / "service.key")
    subscriber = rig.Subscriber(endpoint, receipts_endpoint, peer)
    receipts, wrong = [], 0
    for received_ns, header, pixels in subscriber.frames():
        number = subscriber.arrived - 1
        pattern = int(np.frombuffer(pixels, np.float32, 1)[0])
        wrong += header["frame"] != number or pattern != number % rig.PATTERNS
        receipts.append((header["scheduled_ns"], received_ns))
    subscriber.close()
    pipe.send((receipts, wrong))


def _stranger(pipe: Connection, endpoint: str, folder: Path, at_once: int, per_s: float) -> None:
    """Knocks as often as it is told, until it is told None; says what came of it."""
    os.nice(_NICE)
    of_key = {name: folder / f"{name}.key_secret" for name in ("display", "stranger")}
    peers = {
        "no key": None,
        "unknown key": Peer.of(of_key["stranger"], folder / "service.key"),
        "wrong server key": Peer.of(of_key["display"], folder / "other.key"),
    }
    while (told := pipe.recv()) is not None:
        kind, count = told
        seen: Counter[str] = Counter()
        begin_s = time.monotonic()
        while count > seen["tried"]:
            time.sleep(max(0.0, begin_s + seen["tried"] / per_s - time.monotonic()))
            some = min(at_once, count - seen["tried"])
            seen += _say_nothing(endpoint, some) if kind == SILENT else _knock(endpoint, peers[kind], some)
        pipe.send(seen)


def _knock(endpoint: str, peer: Peer | None, count: int) -> Counter[str]:
    """So many clients at once, each of which connects one time."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    poller, waiting, clients = zmq.Poller(), {}, []
    for _ in range(count):
        client = context.socket(zmq.SUB)
        client.linger = 0
        client.reconnect_ivl = -1
        client.subscribe(b"")
        if peer:
            peer.introduce(client)
        monitor = client.get_monitor_socket(_EVENTS)
        poller.register(monitor, zmq.POLLIN)
        waiting[monitor] = client
        client.connect(endpoint)
        clients.append((client, monitor))
    seen = Counter({"tried": count})
    deadline_s = time.monotonic() + _PATIENCE_S
    while waiting and time.monotonic() < deadline_s:
        for monitor, _ in poller.poll(100):
            event = recv_monitor_message(monitor)["event"]
            seen["connected"] += event == zmq.EVENT_CONNECTED
            seen["let in"] += event == zmq.EVENT_HANDSHAKE_SUCCEEDED
            if event & _OVER and waiting.pop(monitor, None):
                poller.unregister(monitor)
    seen["in the dark"] += len(waiting)
    for client, monitor in clients:
        while client.poll(0):
            client.recv_multipart()
            seen["messages"] += 1
        client.disable_monitor()
        monitor.close(linger=0)
        client.close()
    context.term()
    return seen


def _say_nothing(endpoint: str, count: int) -> Counter[str]:
    """So many connections at once, each held until the other side closes it."""
    host, port = endpoint.removeprefix("tcp://").rsplit(":", 1)
    seen = Counter({"tried": count})
    links = [socket.create_connection((host, int(port)), timeout=_SETTLE_S) for _ in range(count)]
    seen["connected"] = len(links)
    for link in links:
        with link:
            try:
                while link.recv(1000):  # the greeting
                    pass
            except TimeoutError:
                seen["in the dark"] += 1
    return seen


# -- on paper ----------------------------------------------------------------------------


def _markdown(results: dict[str, Any]) -> str:
    kinds = results["kinds"]
    knocking = [kinds[kind] for kind in (*KINDS, SILENT)]
    columns = ["turn", "connections tried", "handshakes done", "messages got", "tried per s",
               "processor time each [ms]", "frames", *report.PERCENTILES, "processor of the service"]  # fmt: skip
    rows = [
        [kind, each.get("tried"), each.get("let_in"), each.get("messages"), each.get("per_s"), each.get("cpu_ms_each"),
         each["frames"], *each["latency_ms"].values(), f"{each['cpu_per_s']:.1%}"]
        for kind, each in kinds.items()
    ]  # fmt: skip
    rss, fds = results["rss_mib"], results["fds"]
    quiet = kinds[QUIET]["latency_ms"]["p99"]
    ratios = [each["latency_ms"]["p99"] / quiet for each in knocking if quiet and each["latency_ms"]["p99"]]
    got = sum(each["messages"] + each["let_in"] for each in knocking)
    targets = [
        ["nobody without the key gets a message", f"{got} of {sum(each['tried'] for each in knocking):,}",
         verdict(not got)],
        ["the subscriber that is admitted loses no frame", f"{results['lost']} lost, {results['wrong']} wrong",
         verdict(results["exact"] and not results["lost"] and not results["wrong"])],
        ["as many open files afterwards", f"{fds['before']}, {fds['max']} at most, {fds['after']}",
         verdict(fds["after"] <= fds["before"])],
        [f"memory within {GROWTH:.0%} afterwards [MiB]", f"{rss['before']}, {rss['max']} at most, {rss['after']}",
         verdict(rss["after"] <= (1 + GROWTH) * rss["before"])],
        [f"p99 while they knock within {TAIL:.0%} of that without, at worst", f"{max(ratios):.2f}" if ratios else None,
         verdict(bool(ratios) and max(ratios) <= 1 + TAIL)],
    ]  # fmt: skip
    dark = sum(each["in_the_dark"] for each in knocking)
    return "\n\n".join(
        [
            f"{results['size']}x{results['size']} uint8 at {results['rate_per_s']:g} frames/s, identity engine, "
            "encrypted. Latency from the camera's schedule to the subscriber [ms].",
            report.table(columns, rows),
            report.table(["target", "measured", ""], targets),
            f"The log grew by {results['log_kb']:g} kB. {dark:,} clients were never told how their handshake ended, "
            f"or never sent away.",
        ]
    )


if __name__ == "__main__":
    main()
