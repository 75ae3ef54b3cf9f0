"""What a running emstream says of itself, in a terminal and without a pixel: ``emstream status``.

It listens to the ``stats`` topic, which costs the service one small message a second, so it may
stay open for days, over ssh, next to any number of others.
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator
from typing import Any

import zmq
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from emstream import figures, recorded, trusted, wire
from emstream.endpoint import connect
from emstream.errors import MalformedFrame, SourceError
from emstream.figures import FAULTS, SETTLED, STAGES, digits, grouped
from emstream.keys import Peer
from emstream.printable import printable
from emstream.publish import STATS

SILENT_S = 3.0  # the service says something every second
_QUIET_NS = 2_000_000_000
_RATE_SPAN_NS = 900_000_000  # at least: news of a recorder come in between
_STYLES = {"live": "green", "quiet": "yellow", "waiting": "yellow", "silent": "bold red"}
_SAID = {
    "live": "live",
    "quiet": "no frames: the camera is silent",
    "waiting": "waiting for the first frame",
    "silent": "nothing heard: has emstream serve stopped?",
}


def statuses(
    endpoint: str, *, silent_s: float = SILENT_S, peer: Peer | None = None
) -> Generator[dict[str, Any], None, None]:
    """Yield the service's figures as they come, at least once a second, and with state ``silent`` when none do.

    ``frames_per_s`` is that of the last second or two, and None before there is one. Keys: ``state`` (live, quiet,
    waiting, silent), ``input``, ``alarms``, ``newest``, ``frames_per_s``, ``ledger``, ``latency_ms``, ``engine``,
    and ``recording`` (`recorded.recording_of`), None without a recorder beside the service.
    """
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.SUB)
    socket.linger = 0
    try:
        connect(socket, endpoint, peer)
        socket.subscribe(STATS)
        status: dict[str, Any] = {"input": endpoint, "alarms": []}
        before: dict[str, Any] | None = None
        while True:
            message = _receive(socket, silent_s)
            if message is None:
                status = {**status, "state": "silent", "frames_per_s": 0.0}
            elif before is None:
                before, status = message, _figures(endpoint, message) | {"frames_per_s": None}
            else:
                rate = status["frames_per_s"]
                if _span_ns(before, message) >= _RATE_SPAN_NS:
                    rate, before = _rate(before, message), message
                status = _figures(endpoint, message) | {"frames_per_s": rate}
            yield status
    finally:
        socket.close()


def status_once(endpoint: str, *, silent_s: float = SILENT_S, peer: Peer | None = None) -> dict[str, Any]:
    """The figures of the last second; raises SourceError when nothing is heard, or nothing more."""
    heard, deadline_s = statuses(endpoint, silent_s=silent_s, peer=peer), time.monotonic() + silent_s
    status = next(heard)
    if status["state"] == "silent":
        raise SourceError(
            f"nothing heard from {endpoint} within {silent_s:g} s; is emstream serve running, and are --key and "
            "--service-key given if it takes keys?"
        )
    while True:
        status = next(heard)
        if status["state"] == "silent":
            raise SourceError(f"{endpoint} fell silent {silent_s:g} s ago; has emstream serve stopped?")
        if status["frames_per_s"] is not None or time.monotonic() > deadline_s:
            heard.close()
            return status


def panel(status: dict[str, Any]) -> RenderableType:
    """The figures as a terminal shows them; what is wrong is red."""
    newest, latency = status.get("newest", {}), status.get("latency_ms", {})
    engine, state = status.get("engine", {}), status["state"]
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    said = _SAID[state]
    if state in ("quiet", "waiting") and status["ledger"].get("in_flight"):
        said = "no frames come out: the engine has them"
    table.add_row("emstream", Text.assemble((f"● {said}", _STYLES[state]), f"   {status['input']}"))
    if status["alarms"]:
        table.add_row("", Text("  ".join(status["alarms"]), style="bold white on red"))
    if "ledger" not in status:
        return table
    table.add_row(
        "frame",
        Text(
            f"{grouped(newest.get('frame'))}   series {newest.get('series', '-')}  {newest.get('source', '')}"
        ),
    )
    inside = {True: "in the engine's range", False: "outside the engine's range"}.get(newest.get("in_domain"))
    table.add_row(
        "dose",
        Text(
            f"{digits(newest.get('dose'))} electrons/px   {inside or ''}",
            style="bold red" if newest.get("in_domain") is False else "",
        ),
    )
    shape = " x ".join(str(length) for length in newest.get("shape", ()))
    table.add_row("rate", f"{digits(status['frames_per_s'])} frames/s   {shape} px")
    table.add_row("latency", figures.latency(latency))
    table.add_row("stages", figures.stages(latency))
    if trust := status.get("trust"):
        for name, text in figures.trust(trust):
            table.add_row(name, text)
    table.add_row("ledger", figures.ledger(status["ledger"]))
    if recording := status.get("recording"):
        table.add_row("recording", _recording(recording))
    table.add_row("engine", Text(figures.engine(engine)))
    return table


def _receive(socket: zmq.Socket[bytes], silent_s: float) -> dict[str, Any] | None:
    """The next statistics, or None after `silent_s` without any."""
    deadline = time.monotonic() + silent_s
    while socket.poll(max(0, round(1000 * (deadline - time.monotonic())))):
        parts = socket.recv_multipart()
        try:
            message = wire.unpack(parts[1]) if len(parts) > 1 else {}
        except MalformedFrame:
            continue
        if message.get("htype") == wire.STATS:
            return message
    return None


def _figures(endpoint: str, message: dict[str, Any]) -> dict[str, Any]:
    """What a message from the wire, which may be anything, says in numbers and short texts."""
    ledger = {
        name: int(n)
        for name, n in wire.numbers(message.get("ledger"), ("received", *SETTLED, "missing")).items()
    }
    latency = wire.numbers(message.get("latency_ms"), ("p50", "p99", "p99_9", "max"))
    stages = message["latency_ms"] if latency else {}
    for stage in STAGES.values():
        if (p50 := wire.numbers(stages.get(stage), ["p50"])) is not None and p50:
            latency[stage] = p50["p50"]
    newest = _newest(message.get("newest"))
    sent_ns = wire.numbers(message, ["sent_ns"]).get("sent_ns", 0)
    is_quiet = sent_ns - newest.get("published_ns", 0) > _QUIET_NS
    alarms = [f"{ledger[name]} {name}" for name in FAULTS if ledger.get(name)]
    if newest.get("in_domain") is False:
        alarms.append("dose outside the engine's range")
    recording = recorded.recording_of(message)
    alarms += recording["faults"] if recording else []
    trust = trusted.trust_of(message)
    alarms += trust["faults"]
    engine = message.get("engine")
    return {
        "state": "waiting" if "frame" not in newest else "quiet" if is_quiet else "live",
        "input": endpoint,
        "alarms": alarms,
        "newest": newest,
        "ledger": ledger,
        "latency_ms": latency,
        "engine": {
            key: printable(engine[key][:200])
            for key in ("name", "sha256", "device")
            if isinstance(engine, dict) and isinstance(engine.get(key), str)
        },
        "recording": recording,
        "trust": trust,
    }


def _newest(message: Any) -> dict[str, Any]:
    found: dict[str, Any] = dict(
        wire.numbers(message, ("frame", "dose", "pixel_size_m", "exposure_s", "published_ns"))
    )
    if isinstance(message, dict):
        for key in ("source", "series", "units"):
            if isinstance(message.get(key), (str, int)):
                found[key] = printable(str(message[key])[:200])
        if isinstance(message.get("in_domain"), bool):
            found["in_domain"] = message["in_domain"]
        shape = message.get("shape")
        if isinstance(shape, list) and all(isinstance(length, int) for length in shape):
            found["shape"] = shape[:2]
    return found


def _span_ns(before: dict[str, Any], message: dict[str, Any]) -> float:
    """From one message to the next; endless where they do not say."""
    start_ns, end_ns = (wire.numbers(each, ["sent_ns"]).get("sent_ns") for each in (before, message))
    return math.inf if start_ns is None or end_ns is None or end_ns < start_ns else end_ns - start_ns


def _rate(before: dict[str, Any], message: dict[str, Any]) -> float | None:
    """Frames published per second between two messages; None unless they are of one run."""
    span_ns = _span_ns(before, message)
    first, last = (
        wire.numbers(each.get("ledger"), ["published"]).get("published") for each in (before, message)
    )
    if first is None or last is None or last < first or math.isinf(span_ns):
        return None
    return round((last - first) / span_ns * 1e9, 3)


def _recording(recording: dict[str, Any]) -> Text:
    state, frames = recording["state"], recording["frames"]
    text = Text(state, style="bold red" if recording["faults"] else "")
    if state == "looking back":
        text.append(f"   the last {recording.get('look_back_s', 0):.0f} s")
    if frames.get("raw"):
        text.append(f"   {grouped(frames['raw'])} raw  {grouped(frames.get('denoised'))} denoised")
    if (seconds := recording.get("disk_s")) is not None:
        text.append(f"   disk for {recorded.duration(seconds)}")
    if "path" in recording:
        text.append(f"   {recording['path']}")
    return text
