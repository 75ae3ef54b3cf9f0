"""Does a service left running at its full rate stay as it is: memory, open files, latency, and not a frame lost?

    camera ──PUSH──▶ [emstream serve] ──XPUB──▶ subscriber
       ▲                                            │
       └──────────── receipts, --window ◀───────────┘

**Engine**: the default engine for --minutes. **Identity**: --frames frames through the identity engine, of
64x64 and of 512x512.

A lossless camera always has the next frame ready, and at most a few are under way: as many as the engine holds,
one that waits and one on the way (--window 4), 48 with the identity engine. So the engine never idles, and yet
nothing piles up: with a queue that is ever full (drop-oldest, or a camera that pushes until it must wait) the
latency would be that queue's length and say nothing of the service.

Every second: memory, open files and threads of the service and its children, and the time of each frame from
received to published. The first ten seconds are warm-up; the first minute after it is held against the last one.
What others compute on the machine meanwhile is measured, too: it is in every latency.
Each second is written to soak.PART.csv at once, and each part that is done to the results: what was measured is
kept when this is killed, and --parts runs the rest.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from bench import report, rig
from bench.program import MIB, Program, Sample, adds_up, stream, verdict

TAIL = 0.2  # p99 of the last minute, off that of the first
GROWTH = 0.05  # of the memory, from the first minute to the last
PARTS = {"engine": "the default engine", "identity64": "identity, 64x64", "identity512": "identity, 512x512"}
_SIZES = {"engine": 512, "identity64": 64, "identity512": 512}
_WINDOW, _WINDOW_OF_IDENTITY = 4, 48
_QUEUE_WINDOWS = 4  # ZeroMQ's sender hears only every half queue how much has been read
_WARM_UP_S, _MINUTE_S = 10.0, 60.0
_POINTS = 200  # of a plot
_COLUMNS = ("seconds", "rss_mib", "fds", "threads", "cpu_s", "others_cores", "frames", "p50_ms", "p99_ms")


def main(argv: list[str] | None = None) -> dict[str, Any]:
    argv = sys.argv[1:] if argv is None else argv
    parser = report.parser("soak", __doc__)
    parser.add_argument("--minutes", type=float, default=30, help="of the engine (default: %(default)s)")
    parser.add_argument(
        "--frames", type=int, default=1_000_000, help="of each identity (default: %(default)s)"
    )
    parser.add_argument("--engine", help="model file of the first part (default: the shipped engine)")
    parser.add_argument("--window", type=int, default=_WINDOW, help="frames under way (default: %(default)s)")
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=list(PARTS),
        help="only these; others stay as the results have them (default: all)",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    if arguments.minutes <= 0 or arguments.frames < 1 or arguments.window < 1:
        parser.error("--minutes, --frames and --window must be positive")
    if arguments.quick:
        arguments.minutes, arguments.frames = min(arguments.minutes, 0.1), min(arguments.frames, 5000)

    folder: Path | None = arguments.results or (None if arguments.quick else report.RESULTS)
    stamp = report.stamp("soak", argv)
    results: dict[str, Any] = {**stamp, "parts": {}}
    if folder and len(arguments.parts) < len(PARTS) and (folder / "soak.json").exists():
        results["parts"] = json.loads((folder / "soak.json").read_text())["parts"]
    with ExitStack() as stack:
        kept = folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        kept.mkdir(parents=True, exist_ok=True)
        show = stack.enter_context(report.progress("soak", len(arguments.parts)))
        for n, name in enumerate(arguments.parts):
            found = part(name, arguments, kept, lambda share, n=n, name=name: show(n + share, PARTS[name]))
            results["parts"][name] = {"command": stamp["command"], "commit": stamp["commit"], **found}
            results["parts"] = {name: results["parts"][name] for name in PARTS if name in results["parts"]}
            if folder:
                report.save("soak", "Soak", results, _markdown(results), folder)
    report.write("soak", "Soak", results, _markdown(results), arguments)
    if folder:
        _plot(results, folder / "soak.png")
    return results


def part(
    name: str, arguments: argparse.Namespace, folder: Path, show: Callable[[float], None]
) -> dict[str, Any]:
    """One service, from its start to its end."""
    size, identity = _SIZES[name], name != "engine"
    window = _WINDOW_OF_IDENTITY if identity else arguments.window
    frames, seconds = (arguments.frames, None) if identity else (None, 60 * arguments.minutes)
    engine = "identity" if identity else arguments.engine
    every_s = 0.1 if arguments.quick else 1.0
    with tempfile.TemporaryDirectory() as temporary, rig.Children() as children:
        camera = children.start(_camera, size, window, frames, seconds)
        endpoint, receipts_endpoint = camera.answer()
        options = [
            "--input", f"pull+{endpoint}", "--output", rig.ANYWHERE, "--expect", f"{size}x{size}:uint8",
            "--queue", str(_QUEUE_WINDOWS * window),
        ]  # fmt: skip
        with Program(Path(temporary), *options, *(["--engine", engine] if engine else [])) as service:
            subscriber = children.start(_subscriber, service.output, receipts_endpoint, every_s)
            camera.answer()  # the whole line is connected
            rows = _Rows(folder / f"soak.{name}.csv")
            while (latencies_ms := subscriber.answer()) is not None:
                done = rows.frames / frames if frames else rows.seconds / seconds if seconds else 0
                show(min(1.0, done))
                rows.add(service.sample(), latencies_ms)
            came = subscriber.answer()
            sent: int = camera.answer()
            said = service.end()
    ledger = said["ledger"]
    return {
        "size": size,
        "window": window,
        "engine": said["engine"],
        "sent": sent,
        **came,
        "ledger": ledger,
        "exact": adds_up(ledger)
        and sent == ledger["received"] == ledger["published"] == came["arrived"]
        and not ledger["missing"],
        "lost": sent - came["arrived"],
        **rows.summary(),
    }


class _Rows:
    """One for each second or so: what the service took, and the latencies of the frames that came meanwhile."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._begin_s = time.monotonic()
        self._samples: list[Sample] = []
        self._others_s = [_others_s()]
        self._latencies_ms: list[np.ndarray] = []
        self.frames = 0
        with path.open("w", newline="") as file:
            csv.writer(file).writerow(_COLUMNS)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._begin_s

    def add(self, sample: Sample, latencies_ms: np.ndarray) -> None:
        self._samples.append(sample)
        self._latencies_ms.append(latencies_ms)
        self._others_s.append(_others_s())
        self.frames += len(latencies_ms)
        before_s = self._samples[-2].monotonic_s if len(self._samples) > 1 else self._begin_s
        others = (self._others_s[-1] - self._others_s[-2]) / (sample.monotonic_s - before_s)
        tail = report.percentiles(latencies_ms)
        row = (round(sample.monotonic_s - self._begin_s, 3), round(sample.rss_bytes / MIB, 2), sample.fds,
               sample.threads, round(sample.cpu_s, 2), round(others, 2), len(latencies_ms),
               tail["p50"], tail["p99"])  # fmt: skip
        with self._path.open("a", newline="") as file:
            csv.writer(file).writerow(row)

    def summary(self) -> dict[str, Any]:
        times_s = np.array([sample.monotonic_s for sample in self._samples]) - self._begin_s
        total_s = float(times_s[-1])
        warm_s = min(_WARM_UP_S, total_s / 5)
        minute_s = min(_MINUTE_S, (total_s - warm_s) / 2)
        rss_mib = np.array([sample.rss_bytes for sample in self._samples]) / MIB
        warm = times_s > warm_s
        first, last = warm & (times_s <= warm_s + minute_s), times_s > total_s - minute_s
        if not first.any():  # of a run of a second or two
            first[np.argmax(warm)] = True
        slope = np.polyfit(times_s[warm] / 3600, rss_mib[warm], 1)[0] if warm.sum() > 1 else None
        p99_ms = [report.percentiles(self._of(span)) for span in (first, last)]
        rss = [float(np.median(rss_mib[span])) for span in (first, last)]
        return {
            "seconds": round(total_s, 1),
            "frames_per_s": round(self.frames / total_s, 2),
            "minute_s": round(minute_s, 1),
            "latency_ms": {"first": p99_ms[0], "last": p99_ms[1]},
            "p99_ratio": round(p99_ms[1]["p99"] / p99_ms[0]["p99"], 4),
            "rss_mib": {
                "first": round(rss[0], 1),
                "last": round(rss[1], 1),
                "growth": round(rss[1] / rss[0] - 1, 4),
                "slope_per_hour": None if slope is None else round(float(slope), 2),
            },
            "fds": self._medians("fds", first, last),
            "threads": self._medians("threads", first, last),
            "others_cores": {"first": self._others(times_s, first), "last": self._others(times_s, last)},
            "cpu_per_s": round((self._samples[-1].cpu_s - self._samples[0].cpu_s) / max(total_s, 1e-9), 3),
            "series": self._series(times_s, rss_mib),
        }

    def _medians(self, what: str, first: np.ndarray, last: np.ndarray) -> dict[str, int]:
        values = np.array([getattr(sample, what) for sample in self._samples])
        return {"first": int(np.median(values[first])), "last": int(np.median(values[last]))}

    def _others(self, times_s: np.ndarray, span: np.ndarray) -> float:
        """Cores that others kept busy."""
        rows = np.flatnonzero(span)
        begin_s = times_s[rows[0] - 1] if rows[0] else 0.0
        spent_s = self._others_s[rows[-1] + 1] - self._others_s[rows[0]]
        return round(spent_s / float(times_s[rows[-1]] - begin_s), 2)

    def _of(self, span: np.ndarray) -> np.ndarray:
        return np.concatenate([self._latencies_ms[row] for row in np.flatnonzero(span)])

    def _series(self, times_s: np.ndarray, rss_mib: np.ndarray) -> list[list[float | None]]:
        """[seconds, memory MiB, p99 ms] of up to `_POINTS` stretches."""
        made = []
        for rows in np.array_split(np.arange(len(times_s)), min(_POINTS, len(times_s))):
            span = np.isin(np.arange(len(times_s)), rows)
            p99 = report.percentiles(self._of(span))["p99"]
            made.append([round(float(times_s[rows[-1]]), 1), round(float(rss_mib[rows].max()), 2), p99])
        return made


def _others_s() -> float:
    """Processor time so far of all that is none of this bench's; the kernel's clock ticks 100 times a second."""
    machine, ours_s = psutil.cpu_times(), 0.0
    me = psutil.Process()
    for process in (me, *me.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            ours_s += times.user + times.system
    return machine.user + machine.nice + machine.system - ours_s


# -- the processes -----------------------------------------------------------------------


def _camera(pipe: Connection, size: int, window: int, frames: int | None, seconds: float | None) -> None:
    camera = rig.Camera(size, "uint8")
    pipe.send((camera.endpoint, camera.receipts_endpoint))
    camera.greet()
    pipe.send("begins")
    end_s = None if seconds is None else time.monotonic() + seconds
    sent = stream(
        camera,
        window,
        lambda number: number < frames if frames else end_s is not None and time.monotonic() < end_s,
    )
    camera.end()
    camera.close()
    pipe.send(sent)


def _subscriber(pipe: Connection, endpoint: str, receipts_endpoint: str, every_s: float) -> None:
    """Every so often the times from received to published [ms], at last None and what came."""
    subscriber = rig.Subscriber(endpoint, receipts_endpoint)
    wrong, expected, due_s = 0, 0, time.monotonic() + every_s
    latencies_ms: list[float] = []
    for _, header, pixels in subscriber.frames():
        stages = header["stages_ns"]
        latencies_ms.append((stages["published"] - stages["received"]) / 1e6)
        wrong += header["frame"] != expected
        if header["engine"]["name"] == "identity":
            wrong += int(np.frombuffer(pixels, np.float32, 1)[0]) != expected % rig.PATTERNS
        expected = header["frame"] + 1
        if time.monotonic() >= due_s:
            pipe.send(np.array(latencies_ms, np.float32))
            latencies_ms.clear()
            due_s += every_s
    if latencies_ms:
        pipe.send(np.array(latencies_ms, np.float32))
    subscriber.close()
    pipe.send(None)
    pipe.send({"arrived": subscriber.arrived, "wrong": wrong})


# -- on paper ----------------------------------------------------------------------------


def _markdown(results: dict[str, Any]) -> str:
    columns = ["service", "frames", "minutes", "frames/s", "lost", "wrong", "ledger exact", "p99, first minute [ms]",
               "last", "memory, first minute [MiB]", "last", "slope [MiB/hour]", "files open, first", "last",
               "threads, first", "last", "cores busy with others, first", "last"]  # fmt: skip
    rows, targets = [], []
    for name, each in results["parts"].items():
        latency, rss = each["latency_ms"], each["rss_mib"]
        rows.append(
            [PARTS[name], each["arrived"], f"{each['seconds'] / 60:.1f}", each["frames_per_s"], each["lost"],
             each["wrong"], each["exact"], latency["first"]["p99"], latency["last"]["p99"], rss["first"], rss["last"],
             rss["slope_per_hour"], *each["fds"].values(), *each["threads"].values(), *each["others_cores"].values()]
        )  # fmt: skip
        targets += [
            [f"{PARTS[name]}: p99 of the last minute within {TAIL:.0%} of the first", f"{each['p99_ratio']:.3f}",
             verdict(abs(each["p99_ratio"] - 1) <= TAIL)],
            [f"{PARTS[name]}: memory within {GROWTH:.0%}", f"{rss['growth']:+.1%}",
             verdict(abs(rss["growth"]) <= GROWTH)],
            [f"{PARTS[name]}: as many open files", f"{each['fds']['last'] - each['fds']['first']:+d}",
             verdict(each["fds"]["first"] == each["fds"]["last"])],
            [f"{PARTS[name]}: no frame lost or wrong", f"{each['lost']} lost, {each['wrong']} wrong",
             verdict(each["exact"] and not each["wrong"])],
        ]  # fmt: skip
    engine = results["parts"].get("engine")
    return "\n\n".join(
        [
            report.table(columns, rows),
            report.table(["target", "measured", ""], targets),
            "Latency from received to published; memory is the median of a minute's samples, its slope that of a line "
            "through all after the first ten seconds."
            + (f" The engine: {engine['engine']['name']} on {engine['engine']['device']}." if engine else ""),
        ]
    )


def _plot(results: dict[str, Any], path: Path) -> None:
    """Memory and p99 over time, a column for each part."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print(f"no {path.name}: matplotlib is not installed", file=sys.stderr)
        return
    parts = results["parts"]
    figure, axes = plt.subplots(
        2, len(parts), figsize=(1 + 3.5 * len(parts), 5), sharex="col", squeeze=False, layout="constrained"
    )
    for (name, each), (above, below) in zip(parts.items(), axes.T, strict=True):
        seconds, rss_mib, p99_ms = (np.array(column, float) for column in zip(*each["series"], strict=True))
        above.plot(seconds / 60, rss_mib)
        above.set(title=PARTS[name], ylim=(0, 1.15 * rss_mib.max()))
        below.plot(seconds / 60, p99_ms)
        below.set(xlabel="time [min]", ylim=(0, 1.15 * np.nanmax(p99_ms)))
    axes[0, 0].set_ylabel("memory [MiB]")
    axes[1, 0].set_ylabel("p99, received to published [ms]")
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()
