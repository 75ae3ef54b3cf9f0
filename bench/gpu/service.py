"""The whole service: camera, service and subscriber in three processes, as in `bench.latency`.

Open loop: the camera keeps to a schedule, whatever the service does; the oldest frames give way.
Closed loop: the camera stays so many frames ahead of the subscriber, and nothing may be lost.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from bench import latency, report, rig, throughput
from bench.gpu import engines, networks
from bench.gpu.engines import TORCH, Frames
from bench.gpu.stage import Context, Job, NotMeasured, Setting
from emstream.inference.flavour import FLAVOURS
from emstream.intake import Overrun
from emstream.serve import Settings

RATE_FPS, P99_MS, PROOF_FRAMES, GROWTH = 2250.0, 5.0, 100_000, 0.05
_SIDE, _DRY_SIDE, _BATCH = 512, 64, 8
_WARMUP = 20
_WINDOW = 160  # frames under way at most: more than the ring and the engine hold
_QUEUE_WINDOWS = 4  # ZeroMQ's sender hears only now and then how much was read
_ALIKE = 0.02  # of the largest value: results of one pattern in batches of other sizes
_START_S = 400.0  # for a service to be ready: it may have to compile
_SAMPLE_S = 0.5


@dataclass(frozen=True)
class Line:
    """What runs in the middle."""

    engine: str
    device: str
    side: int

    def settings(self, endpoint: str, overrun: Overrun, queue: int) -> Settings:
        return Settings(
            input=f"pull+{endpoint}",
            output=rig.ANYWHERE,
            engine=self.engine,
            device=self.device,
            overrun=overrun,
            queue=queue,
            queue_bytes=2**40,
            expect=f"{self.side}x{self.side}:uint8",
        )


def line(setting: Setting, kind: str, name: str, side: int, *, as_onnx: bool = False) -> Line:
    """A network as one would serve it with this kind of engine: from its plan, .pt2 or .onnx."""
    from emstream.ring import rows_for

    found = networks.files(setting, name)
    path = found.pt2 if kind == TORCH else found.onnx
    if kind in FLAVOURS and not as_onnx:
        batch = rows_for((side, side), np.dtype(np.uint8), _BATCH)
        path = engines.plan(setting, kind, name, Frames(side, side, "uint8", batch)).path
    return Line(str(path), engines.device(setting), side)


# -- stages --------------------------------------------------------------------------------


def service(context: Context) -> None:
    kind = _kind(context)
    names = networks.ensure(context, ["unet32"] if context.dry else ["unet32", "unet128", "wide64"])
    file = {TORCH: ".pt2"}.get(kind, ".plan" if kind in FLAVOURS else ".onnx")
    for name in names:
        _serve(context, kind, name, file, "closed loop")
        if name == "unet32":
            _serve(context, kind, name, file, _label(context), 20.0 if context.dry else RATE_FPS)
        most = context.find(network=name, file=file, load="closed loop")
        if most:
            _serve(context, kind, name, file, "half of the closed loop", most["frames_per_s"] / 2)
        if name == "unet32" and kind in FLAVOURS:
            _serve(context, kind, name, ".onnx, --device 0", "closed loop")
    most = context.find(network="unet32", file=file, load="closed loop")
    fixed = context.find(network="unet32", file=file, load=_label(context))
    context.target(
        "UNet-32, frames/s end to end",
        f"{most['frames_per_s']:,.0f} in a closed loop" if most else None,
        f"at least {RATE_FPS:,.0f}",
        most["frames_per_s"] >= RATE_FPS if most else None,
    )
    context.target(
        f"UNet-32, p99 at {_label(context)}, schedule to subscriber",
        f"{fixed['p99']:.2f} ms, {fixed['dropped'] + fixed['lost_by_subscriber']} of {fixed['frames']} lost"
        if fixed
        else None,
        f"below {P99_MS:g} ms, none lost",
        fixed["p99"] < P99_MS and not fixed["dropped"] + fixed["lost_by_subscriber"] if fixed else None,
    )
    rows = [row for row in context.rows if "why" not in row]
    unaccounted = sum(row["unaccounted"] for row in rows)
    context.target(
        "frames unaccounted for", f"{unaccounted}" if rows else None, "0", unaccounted == 0 if rows else None
    )


def lossless(context: Context) -> None:
    kind = _kind(context)
    for name in networks.ensure(context, ["unet32"]):
        frames = 200 if context.dry else PROOF_FRAMES
        context.sweep(_prove, [{"network": name, "frames": frames, "kind": kind}], limit_s=230)
    row = next((row for row in context.rows if "why" not in row), None)
    context.target(
        f"lost or unaccounted for of {PROOF_FRAMES:,}",
        f"{row['lost'] + row['unaccounted']} of {row['frames']:,}" if row else None,
        "0",
        not row["lost"] + row["unaccounted"] + row["wrong"] if row else None,
    )


def soak(context: Context) -> None:
    """For as long as there is time, at three quarters of what the service took in a closed loop."""
    kind = _kind(context)
    names = networks.ensure(context, ["unet32"])
    known = context.known.get("service", {}).get("rows", [])
    rates = [
        row["frames_per_s"]
        for row in known
        if row["network"] == "unet32" and row["load"] == "closed loop" and "why" not in row
    ]
    rate = 0.75 * rates[0] if rates else (20.0 if context.dry else RATE_FPS / 2)
    seconds = 3.0 if context.dry else min(600.0, context.left_s - 25)
    context.sweep(
        _soak,
        [{"network": name, "kind": kind, "rate": rate, "length_s": seconds} for name in names],
        limit_s=seconds + 60,
    )
    row = next((row for row in context.rows if "why" not in row), None)
    context.target(
        "memory of the service, after 2 s to the end",
        f"{row['growth']:+.1%} in {row['seconds']:.0f} s" if row else None,
        f"within {GROWTH:.0%}",
        abs(row["growth"]) <= GROWTH if row else None,
    )


def _kind(context: Context) -> str:
    kind = next(iter(engines.working(context)), None)
    if kind is None:
        raise NotMeasured("no engine works here")
    return kind


def _label(context: Context) -> str:
    return "20 frames/s" if context.dry else f"{RATE_FPS:,.0f} frames/s"


def _serve(context: Context, kind: str, name: str, file: str, load: str, rate: float | None = None) -> None:
    job = {"network": name, "file": file, "load": load, "kind": kind, "rate": rate}
    context.sweep(_measure, [job], limit_s=300 if kind == TORCH else 120)


def _measure(setting: Setting, network: str, file: str, load: str, kind: str, rate: float | None) -> Job:
    middle = line(setting, kind, network, _side(setting), as_onnx=file.startswith(".onnx"))
    if rate is None:
        frames = 60 if setting.dry else 6000
        return closed_loop(middle, frames, _WINDOW, seconds=10)
    return open_loop(middle, rate, seconds=1.0 if setting.dry else 8.0)


def _prove(setting: Setting, network: str, frames: int, kind: str) -> Job:
    found = closed_loop(line(setting, kind, network, _side(setting)), frames, _WINDOW)
    ledger = ", ".join(f"{name} {count}" for name, count in found["ledger"].items())
    keys = ("wrong", "unaccounted", "frames_per_s", "cpu_ms")
    return {
        "arrived": found["arrived"],
        "lost": frames - found["arrived"],
        **{key: found[key] for key in keys},
        "ledger": ledger,
    }


def _soak(setting: Setting, network: str, kind: str, rate: float, length_s: float) -> Job:
    found = open_loop(line(setting, kind, network, _side(setting)), rate, length_s)
    rss = found["rss_mib"]
    start = rss[min(len(rss) - 1, round(2 / _SAMPLE_S))]
    keys = ("frames", "frames_per_s", "unaccounted", "p50", "p99", "max")
    return {
        "seconds": round(length_s, 1),
        **{key: found[key] for key in keys},
        "rss_start_mib": start,
        "rss_end_mib": rss[-1],
        "growth": round(rss[-1] / start - 1, 4),
    }


def _side(setting: Setting) -> int:
    return _DRY_SIDE if setting.dry else _SIDE


# -- loops -----------------------------------------------------------------------------------


def closed_loop(middle: Line, frames: int, window: int, seconds: float | None = None) -> Job:
    """As fast as it goes: `frames` frames, or fewer if a first few hundred say that they would take too long."""
    if seconds is not None and frames > 600:
        rate = closed_loop(middle, 400, window)["frames_per_s"]
        frames = max(400, min(frames, round(rate * seconds)))
    with rig.Children() as children:
        camera = children.start(throughput._camera, frames, middle.side, "uint8", window)
        endpoint, receipts_endpoint = camera.answer()
        settings = middle.settings(endpoint, Overrun.block, _QUEUE_WINDOWS * window)
        with _service(children, settings) as (running, output, epoch_ns):
            subscriber = children.start(_subscriber, output, receipts_endpoint, epoch_ns, 0)
            idle_s = running.cpu_s
            found: Job = subscriber.answer(within_s=3600)
            found["cpu_ms"] = round(1000 * (running.cpu_s - idle_s) / frames, 4)
            ledger = _end(running)
    return {**found, **_accounts(ledger, frames, found), "frames": frames}


def open_loop(middle: Line, rate: float, seconds: float) -> Job:
    """At `rate` frames/s, the oldest dropped when it is too much."""
    frames = max(2, round(rate * seconds))
    with rig.Children() as children:
        camera = children.start(latency._camera, middle.side, "uint8", _WARMUP, frames, rate)
        endpoint, receipts_endpoint = camera.answer()
        settings = middle.settings(endpoint, Overrun.drop_oldest, _QUEUE_WINDOWS * _WINDOW)
        with _service(children, settings) as (running, output, epoch_ns):
            subscriber = children.start(_subscriber, output, receipts_endpoint, epoch_ns, _WARMUP)
            camera.answer()  # the service is warm
            idle_s, rss = running.cpu_s, [running.rss_bytes]
            while not subscriber.says(_SAMPLE_S):
                rss.append(running.rss_bytes)
            found: Job = subscriber.answer()
            found["cpu_ms"] = round(1000 * (running.cpu_s - idle_s) / frames, 4)
            late = camera.answer()
            ledger = _end(running)
    return {
        **found,
        **_accounts(ledger, _WARMUP + frames, found),
        "frames": frames,
        "offered_per_s": round(rate, 2),
        "late_p99": late["p99"],
        "rss_mib": [round(n / 2**20, 1) for n in rss],
    }


@contextmanager
def _service(children: rig.Children, settings: Settings) -> Iterator[tuple[rig.Child, str, int]]:
    """A service that is ready, its output and its clock."""
    start_s = time.monotonic()
    running = children.start(rig.service, settings)
    output, epoch_ns = running.answer(within_s=_START_S)
    print(f"{settings.engine} is ready after {time.monotonic() - start_s:.1f} s")
    yield running, output, epoch_ns


def _end(running: rig.Child) -> dict[str, int]:
    """Its ledger, once it has finished."""
    running.stop()
    report_: dict[str, Any] = running.answer()
    print(f"{report_['engine']['name']} on {report_['engine']['device']}: {report_['ledger']}")
    ledger: dict[str, int] = report_["ledger"]
    return ledger


def _accounts(ledger: dict[str, int], sent: int, found: Job) -> Job:
    settled = sum(ledger[name] for name in ("published", "dropped", "rejected", "failed"))
    return {
        "dropped": ledger["dropped"] + ledger["rejected"] + ledger["failed"],
        "unaccounted": abs(sent - ledger["received"])
        + abs(ledger["received"] - settled)
        + ledger["in_flight"],
        "lost_by_subscriber": ledger["published"] - found["arrived"] - found["warm"],
        "ledger": ledger,
    }


def _subscriber(pipe: Connection, endpoint: str, receipts_endpoint: str, epoch_ns: int, warmup: int) -> None:
    """Looks at every frame: its number, its size, a row of its pixels, and when it was where."""
    subscriber = rig.Subscriber(endpoint, receipts_endpoint)
    times: list[tuple[int, int, int, int]] = []
    rows: dict[int, np.ndarray] = {}
    wrong, before = 0, -1
    for received_ns, header, pixels in subscriber.frames():
        number, (height, width) = header["frame"], header["shape"]
        whole = len(pixels) == 4 * height * width and number > before
        before = number
        if whole:
            row = np.frombuffer(pixels, np.float32, width, 4 * width * (height // 2))
            first = rows.setdefault(number % rig.PATTERNS, row.copy())
            whole = bool(np.abs(row - first).max() <= _ALIKE * np.abs(first).max())
        wrong += not whole
        if number >= warmup:
            inside = (header["stages_ns"][name] - epoch_ns for name in ("received", "published"))
            times.append((header["scheduled_ns"], *inside, received_ns))
    subscriber.close()
    table = np.array(times, np.int64).reshape(-1, 4)
    span_ns = table[-1, 3] - table[0, 3] if len(table) > 1 else 0
    total, inside_ms = ((table[:, b] - table[:, a]) / 1e6 for a, b in ((0, 3), (1, 2)))
    inner = report.percentiles(inside_ms)
    pipe.send(
        {
            "arrived": len(table),
            "warm": subscriber.arrived - len(table),
            "wrong": wrong,
            "frames_per_s": round(float((len(table) - 1) / span_ns * 1e9), 2) if span_ns else 0.0,
            **report.percentiles(total),
            "inside_p50": inner["p50"],
            "inside_p99": inner["p99"],
        }
    )
