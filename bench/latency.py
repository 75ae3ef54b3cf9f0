"""How long does a frame take from the camera to a subscriber, and what does the service add to its engine?

    camera ──PUSH──▶ PULL [emstream serve] XPUB ──▶ SUB

Camera, service and subscriber are three processes on one machine and share its cores. The loop
is open: the camera keeps to a schedule, whatever the service does, at several loads. A load of 1
is the engine's own rate, which is measured first, in a process of its own: frames/s of submit and
collect alone, with as many frames in flight as the engine takes.

Timed span: from the moment when a frame was *due* at the camera to its receipt by the subscriber,
so a camera that was held up does not hide it. Stages come from the header's own times; clocks of
the processes are reduced to the monotonic one that they share. Each service starts with
--warmup frames, one at a time and not counted, which compile the network.

Dropped frames have no latency; they are counted. At the end of every run the ledger must add up,
and have received every frame that the camera sent. Above a load of 1 there is one run for each
overrun policy, each just after another measurement of the engine alone.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from bench import report, rig
from emstream.inference import load_engine
from emstream.intake import Overrun
from emstream.serve import Settings

STAGES = {
    "camera_to_received": "camera to received",
    "received_to_batched": "received to batched",
    "batched_to_inferred": "batched to inferred",
    "inferred_to_published": "inferred to published",
    "published_to_subscriber": "published to subscriber",
}
SATURATION = 0.95  # of the engine's own rate, at least
TAIL = 2.0  # engine times that p99 at half load may last
ADDED_MS = 2.0  # beside the engine
GROWTH = 0.05  # of the memory after the first second
_HALF, _SOAK = 0.5, 0.75  # loads
_POLICIES = (Overrun.drop_oldest, Overrun.drop_newest, Overrun.block)
_SATURATED = 0.99  # of the offered rate; a service that gives less gives all it can
_SAMPLE_S = 0.5


def main(argv: list[str] | None = None) -> dict[str, Any]:
    argv = sys.argv[1:] if argv is None else argv
    parser = report.parser("latency", __doc__)
    parser.add_argument("--engine", help="model file, or identity (default: the shipped engine)")
    parser.add_argument("--threads", type=int, help="of the engine (default: all cores)")
    parser.add_argument("--size", type=int, default=512, help="frames of SIZE x SIZE (default: %(default)s)")
    parser.add_argument("--type", default="uint8", help="of the camera's pixels (default: %(default)s)")
    parser.add_argument("--loads", type=float, nargs="+", default=[0.25, 0.5, 0.75, 0.9, 1.0, 1.2])
    parser.add_argument("--seconds", type=float, default=30, help="of each load (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=10, help="frames not counted (default: %(default)s)")
    parser.add_argument(
        "--full-load", type=float, metavar="FPS", help="load 1, instead of the engine's own rate"
    )
    parser.add_argument(
        "--soak", type=float, default=0, metavar="SECONDS", help=f"at last, a long run at load {_SOAK}"
    )
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.loads, arguments.seconds, arguments.warmup = [_HALF, 1.2], min(arguments.seconds, 1.0), 2
    if arguments.warmup < 1 or min(arguments.loads) <= 0:
        parser.error("--warmup and --loads must be positive")

    bench = _Bench(arguments.engine, arguments.threads, arguments.size, arguments.type, arguments.warmup)
    plan = [(load, Overrun.drop_oldest) for load in arguments.loads if load <= 1]
    plan += [(load, policy) for load in arguments.loads if load > 1 for policy in _POLICIES]
    seconds = arguments.seconds
    engines: list[dict[str, Any]] = []
    runs: list[dict[str, Any]] = []
    soak = None
    with report.progress("latency", seconds * (len(plan) + 2) + arguments.soak) as show:
        show(0, "the engine alone")
        engines.append(bench.engine_alone(seconds / 2))
        full_fps = arguments.full_load or engines[0]["frames_per_s"]
        for done, (load, policy) in enumerate(plan):
            show(seconds * (done + 0.5), f"load {load:g}, {policy}")
            if load > 1:
                engines.append(bench.engine_alone(seconds / 6))
            run = bench.serve(load, full_fps, seconds, policy)
            if run["frames_per_s"] < _SATURATED * run["offered_per_s"]:
                run["of_engine"] = round(run["frames_per_s"] / engines[-1]["frames_per_s"], 4)
            runs.append(run)
        if arguments.soak:
            show(seconds * (len(plan) + 1), f"load {_SOAK} for {arguments.soak:.0f} s")
            soak = bench.serve(_SOAK, full_fps, arguments.soak, Overrun.drop_oldest)

    results = {
        **report.stamp("latency", argv),
        "size": arguments.size,
        "type": arguments.type,
        "engine": engines[0],
        "engine_again": engines[1:],
        "full_load_frames_per_s": round(full_fps, 3),
        "runs": runs,
        "soak": soak,
    }
    results["summary"] = _summary(results)
    folder = report.write("latency", "Latency", results, _markdown(results), arguments)
    if folder:
        _plot(results, folder / "latency.png")
    return results


class _Bench:
    """One engine, one kind of frame."""

    def __init__(self, engine: str | None, threads: int | None, size: int, kind: str, warmup: int) -> None:
        self._engine, self._threads = engine, threads
        self._size, self._kind, self._warmup = size, kind, warmup

    def engine_alone(self, seconds: float) -> dict[str, Any]:
        with rig.Children() as children:
            child = children.start(
                _engine_alone, self._engine, self._threads, self._size, self._kind, seconds
            )
            found: dict[str, Any] = child.answer(within_s=seconds + 120)
            return found

    def serve(self, load: float, full_fps: float, seconds: float, policy: Overrun) -> dict[str, Any]:
        """One service, from its start to its end."""
        rate = load * full_fps
        frames = max(2, round(rate * seconds))
        with rig.Children() as children:
            camera = children.start(_camera, self._size, self._kind, self._warmup, frames, rate)
            endpoint, receipts_endpoint = camera.answer()
            settings = Settings(
                input=f"pull+{endpoint}",
                output=rig.ANYWHERE,
                engine=self._engine,
                threads=self._threads,
                overrun=policy,
            )
            service = children.start(rig.service, settings)
            output, epoch_ns = service.answer()
            subscriber = children.start(_subscriber, output, receipts_endpoint, epoch_ns, self._warmup)
            camera.answer()  # the service is warm
            rss = [service.rss_bytes]
            while not subscriber.says(_SAMPLE_S):
                rss.append(service.rss_bytes)
            found: dict[str, Any] = subscriber.answer()
            late_ms = camera.answer()
            service.stop()
            ledger: dict[str, int] = service.answer()["ledger"]
        _check(ledger, self._warmup + frames)
        after_first_second = rss[min(len(rss) - 1, math.ceil(1 / _SAMPLE_S))]
        return {
            "load": load,
            "overrun": policy.value,
            "of_engine": None,
            "frames": frames,
            "offered_per_s": round(rate, 3),
            **found,
            "camera_late_ms": late_ms,
            "ledger": ledger,
            "lost": ledger["dropped"],
            "lost_by_subscriber": ledger["published"] - self._warmup - found["arrived"],
            "rss_mib": {
                "first_second": round(after_first_second / 2**20, 1),
                "end": round(rss[-1] / 2**20, 1),
                "max": round(max(rss) / 2**20, 1),
                "growth": round(rss[-1] / after_first_second - 1, 4),
            },
        }


def _check(ledger: dict[str, int], sent: int) -> None:
    settled = sum(ledger[name] for name in ("published", "dropped", "rejected", "failed", "in_flight"))
    if not ledger["received"] == settled == sent or ledger["in_flight"]:
        raise RuntimeError(f"the ledger does not add up to {sent} frames: {ledger}")


# -- the processes ---------------------------------------------------------------------


def _engine_alone(
    pipe: Connection, path: str | None, threads: int | None, size: int, kind: str, seconds: float
) -> None:
    """Frames one by one, then with as many in flight as the engine takes; nothing else in the process."""
    engine = load_engine(path, threads=threads)
    counts = rig.patterns(size, kind)[:, None]
    expected = np.empty((engine.depth, 1, size, size), np.float32)
    for row in range(3):
        engine.collect(engine.submit(counts[row], expected[0]))

    times_ms: list[float] = []
    end_ns = time.monotonic_ns() + int(seconds / 2 * 1e9)
    while (start_ns := time.monotonic_ns()) < end_ns or len(times_ms) < 3:
        engine.collect(engine.submit(counts[len(times_ms) % len(counts)], expected[0]))
        times_ms.append((time.monotonic_ns() - start_ns) / 1e6)

    tickets = [engine.submit(counts[row], expected[row]) for row in range(engine.depth)]
    frames, start_ns = 0, time.monotonic_ns()
    while time.monotonic_ns() < start_ns + int(seconds / 2 * 1e9) or frames < 3:
        row = frames % engine.depth
        engine.collect(tickets[row])
        tickets[row] = engine.submit(counts[frames % len(counts)], expected[row])
        frames += 1
    span_ns = time.monotonic_ns() - start_ns
    for row in range(engine.depth):
        engine.collect(tickets[(frames + row) % engine.depth])
    pipe.send(
        {
            **engine.identity,
            "ms": round(median(times_ms), 3),
            "latency_ms": report.percentiles(times_ms),
            "frames_per_s": round(frames / span_ns * 1e9, 3),
        }
    )
    engine.close()


def _camera(pipe: Connection, size: int, kind: str, warmup: int, frames: int, rate: float) -> None:
    camera = rig.Camera(size, kind)
    pipe.send((camera.endpoint, camera.receipts_endpoint))
    camera.greet()
    camera.warm_up(warmup)
    pipe.send("warm")
    start_ns = time.monotonic_ns() + 100_000_000
    late_ms = camera.play(warmup, frames, rate, start_ns)
    camera.end()
    camera.close()
    pipe.send(report.percentiles(late_ms))


def _subscriber(pipe: Connection, endpoint: str, receipts_endpoint: str, epoch_ns: int, warmup: int) -> None:
    subscriber = rig.Subscriber(endpoint, receipts_endpoint)
    rows: list[tuple[int, ...]] = []
    first_ms = 0.0
    for received_ns, header, _ in subscriber.frames():
        if header["frame"] == 0:
            first_ms = (received_ns - header["scheduled_ns"]) / 1e6
        if header["frame"] >= warmup:
            stages = header["stages_ns"]
            on_the_way = (
                stages[name] - epoch_ns for name in ("received", "batched", "inferred", "published")
            )
            rows.append((header["scheduled_ns"], *on_the_way, received_ns))
    subscriber.close()
    times_ns = np.array(rows, np.int64).reshape(-1, 2 + len(STAGES) - 1)
    stages_ms = np.diff(times_ns, axis=1) / 1e6
    total_ms = stages_ms.sum(axis=1)
    span_ns = times_ns[-1, -1] - times_ns[0, -1] if len(rows) > 1 else 0
    pipe.send(
        {
            "first_frame_ms": round(first_ms, 1),
            "arrived": len(rows),
            "frames_per_s": round(float((len(rows) - 1) / span_ns * 1e9), 3) if span_ns else 0.0,
            "latency_ms": report.percentiles(total_ms),
            "added_ms": report.percentiles(
                total_ms - stages_ms[:, list(STAGES).index("batched_to_inferred")]
            ),
            "stages_ms": {
                name: report.percentiles(column) for name, column in zip(STAGES, stages_ms.T, strict=True)
            },
        }
    )


# -- on paper ----------------------------------------------------------------------------


def _summary(results: dict[str, Any]) -> dict[str, Any]:
    saturated = [run["of_engine"] for run in results["runs"] if run["load"] > 1 and run["of_engine"]]
    half = next((run for run in results["runs"] if run["load"] == _HALF), None)
    engine_ms = results["engine"]["ms"]
    longest = results["soak"] or max(results["runs"], key=lambda run: run["frames"])
    return {
        "saturation_of_engine": round(median(saturated), 4) if saturated else None,
        "p99_at_half_load_of_engine_ms": round(half["latency_ms"]["p99"] / engine_ms, 4) if half else None,
        "added_at_half_load_ms": half["added_ms"]["p50"] if half else None,
        "rss_growth": longest["rss_mib"]["growth"],
        "ledgers_add_up": True,
    }


def _markdown(results: dict[str, Any]) -> str:
    engine, runs = results["engine"], results["runs"]
    sweep = [run for run in runs if run["overrun"] == Overrun.drop_oldest]
    over = [run for run in runs if run["load"] > 1]
    parts = [
        f"Engine alone: {engine['name']} on {engine['device']}, {results['size']}x{results['size']} "
        f"{results['type']}: median {engine['ms']:.4g} ms/frame, {engine['frames_per_s']:.4g} frames/s with "
        f"frames in flight. Load 1 is {results['full_load_frames_per_s']:.2f} frames/s.",
        "## From the camera's schedule to the subscriber [ms], dropping the oldest on overrun",
        _latencies(sweep),
        "## Where it goes [ms], p50 / p99",
        report.table(
            ["load", *STAGES.values(), "all but the engine"],
            [
                [
                    f"{run['load']:g}",
                    *(_pair(run["stages_ms"][stage]) for stage in STAGES),
                    _pair(run["added_ms"]),
                ]
                for run in sweep
            ],
        ),
    ]
    if over:
        parts += ["## More than the engine can take", _saturation(over)]
    if results["soak"]:
        parts += ["## A long run", _latencies([results["soak"]])]
    parts += ["## Memory of the service [MiB]", _memory([*runs, *filter(None, [results["soak"]])])]
    parts += ["## Targets", _targets(results["summary"])]
    first_ms = median(run["first_frame_ms"] for run in runs)
    parts += [
        "Every ledger adds up: received = sent = published + dropped, nothing in flight at the end. "
        f"A service's very first frame, for which the network is compiled, took {first_ms:.0f} ms (median over "
        "services); it is not counted above."
    ]
    return "\n\n".join(parts)


def _latencies(runs: Sequence[dict[str, Any]]) -> str:
    return report.table(
        ["load", "offered [frames/s]", "got [frames/s]", "frames", "p50", "p99", "p99.9", "max", "dropped",
         "camera late, p99 [ms]"],
        [
            [
                f"{run['load']:g}",
                f"{run['offered_per_s']:.2f}",
                f"{run['frames_per_s']:.2f}",
                run["frames"],
                *run["latency_ms"].values(),
                run["lost"],
                run["camera_late_ms"]["p99"],
            ]
            for run in runs
        ],
    )  # fmt: skip


def _saturation(runs: Sequence[dict[str, Any]]) -> str:
    return report.table(
        ["load", "overrun", "got [frames/s]", "of the engine's own rate", "dropped", "share dropped", "p50 [ms]",
         "max [ms]"],
        [
            [
                f"{run['load']:g}",
                run["overrun"],
                f"{run['frames_per_s']:.2f}",
                f"{run['of_engine']:.3f}" if run["of_engine"] else "not saturated",
                run["lost"],
                f"{run['lost'] / run['frames']:.1%}",
                run["latency_ms"]["p50"],
                run["latency_ms"]["max"],
            ]
            for run in runs
        ],
    )  # fmt: skip


def _memory(runs: Sequence[dict[str, Any]]) -> str:
    return report.table(
        ["load", "overrun", "after 1 s", "at the end", "highest", "growth"],
        [
            [
                f"{run['load']:g}",
                run["overrun"],
                run["rss_mib"]["first_second"],
                run["rss_mib"]["end"],
                run["rss_mib"]["max"],
                f"{run['rss_mib']['growth']:+.1%}",
            ]
            for run in runs
        ],
    )


def _targets(summary: dict[str, Any]) -> str:
    def shown(value: float | None, text: str) -> str | None:
        return None if value is None else text.format(value)

    return report.table(
        ["what", "measured", "target"],
        [
            ["saturated, of the engine's own rate (median)", shown(summary["saturation_of_engine"], "{:.3f}"),
             f"at least {SATURATION}"],
            ["p99 at half load / engine's median", shown(summary["p99_at_half_load_of_engine_ms"], "{:.2f}"),
             f"below {TAIL:g}"],
            ["added to the engine at half load, p50", shown(summary["added_at_half_load_ms"], "{:.2f} ms"),
             f"below {ADDED_MS:g} ms"],
            ["memory at the end of the longest run, against its first second", shown(summary["rss_growth"], "{:+.1%}"),
             f"within {GROWTH:.0%}"],
        ],
    )  # fmt: skip


def _pair(percentiles: dict[str, float | None]) -> str:
    low, high = percentiles["p50"], percentiles["p99"]
    return "-" if low is None or high is None else f"{low:.2f} / {high:.2f}"


def _plot(results: dict[str, Any], path: Path) -> None:
    """Percentiles over load, and the stages of the median frame."""
    try:
        import matplotlib.pyplot as plt
        from matplotlib.ticker import LogLocator, NullLocator
    except ImportError:
        print(f"no {path.name}: matplotlib is not installed", file=sys.stderr)
        return
    runs = [run for run in results["runs"] if run["overrun"] == Overrun.drop_oldest and run["arrived"]]
    loads = [run["load"] for run in runs]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    looks: dict[str, dict[str, Any]] = {
        "p50": {"marker": "o"},
        "p99": {"marker": "s"},
        "p99_9": {"marker": "D", "ms": 4},
        "max": {"marker": "o", "ms": 11, "mfc": "none", "ls": ":"},  # around p99.9, which is often the same
    }
    for name in report.PERCENTILES:
        values = [run["latency_ms"][name] for run in runs]
        left.plot(loads, values, label=name.replace("_", "."), **looks[name])
    left.axhline(results["engine"]["ms"], color="0.5", ls="--", lw=1, label="engine alone, median")
    left.set(
        yscale="log", xlabel="offered load / engine's own rate", ylabel="due at the camera to subscriber [ms]"
    )
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    left.yaxis.set_minor_locator(NullLocator())
    left.legend(frameon=False)
    bottom = np.zeros(len(runs))
    for stage, label in STAGES.items():
        height = np.array([run["stages_ms"][stage]["p50"] for run in runs])
        right.bar([f"{load:g}" for load in loads], height, bottom=bottom, label=label)
        bottom += height
    right.set(xlabel="offered load / engine's own rate", ylabel="median of each stage [ms]")
    right.legend(frameon=False, fontsize="small")
    figure.suptitle(
        f"{results['engine']['name']}, {results['size']}x{results['size']}: "
        f"engine alone {results['engine']['frames_per_s']:.1f} frames/s"
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()
