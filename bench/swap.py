"""What does it cost to exchange the engine of a running service, again and again, at its full rate?

    camera ──PUSH──▶ [emstream serve] ──XPUB──▶ subscriber
                            ▲
      swap NEW, 100 times ──┘ control

A lossless camera always has the next frame ready, with --window under way: when an engine leaves there are
always batches in it. --swaps times the next of --engines is swapped in, as ``emstream engine swap`` does it; the
next swap follows when the first frame of the new one has come. Every frame must come, in order, once, and say in
its header which engine made it.

Gap: from one frame's arrival at the subscriber to the next. Around a swap is from the order to the new engine's
first frame: loading, compiling and the self-test share the machine with the engine that is at work. Memory is
that of the service when a swap is done.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from bench import report, rig
from bench.program import MIB, Program, adds_up, stream, verdict
from emstream.control import ask, control_of

ENGINES = [str(report.ROOT / "engines" / name) for name in ("unet32.onnx", "wide64.onnx")]
GROWTH = 0.05  # of the memory, from the fifth swap to the last
_SETTLED = 5  # swaps after which memory counts
_WINDOW = 4
_SWAP_S = 300.0
_QUIET_S = 5.0  # before the first swap


def main(argv: list[str] | None = None) -> dict[str, Any]:
    argv = sys.argv[1:] if argv is None else argv
    parser = report.parser("swap", __doc__)
    parser.add_argument("--swaps", type=int, default=100, help="(default: %(default)s)")
    parser.add_argument(
        "--engines",
        nargs="+",
        default=ENGINES,
        help="in turns; model files or identity (default: those that ship)",
    )
    parser.add_argument("--size", type=int, default=512, help="frames of SIZE x SIZE (default: %(default)s)")
    parser.add_argument("--window", type=int, default=_WINDOW, help="frames under way (default: %(default)s)")
    arguments = parser.parse_args(argv)
    if arguments.swaps < 1 or arguments.window < 1 or len(arguments.engines) < 2:
        parser.error("--swaps and --window must be at least 1, and --engines at least two")
    if arguments.quick:
        arguments.swaps = min(arguments.swaps, 3)
    results: dict[str, Any] = {
        **report.stamp("swap", argv),
        "swaps": arguments.swaps,
        "engines": [Path(engine).name for engine in arguments.engines],
        "size": arguments.size,
        "window": arguments.window,
        **swap(arguments),
    }
    report.write("swap", "Hot swaps", results, _markdown(results), arguments)
    return results


def swap(arguments: argparse.Namespace) -> dict[str, Any]:
    with (
        tempfile.TemporaryDirectory() as name,
        rig.Children() as children,
        report.progress("swap", arguments.swaps) as show,
    ):
        camera = children.start(_camera, arguments.size, arguments.window)
        endpoint, receipts_endpoint = camera.answer()
        options = (
            "--engine", arguments.engines[-1], "--input", f"pull+{endpoint}", "--output", rig.ANYWHERE,
            "--expect", f"{arguments.size}x{arguments.size}:uint8",
        )  # fmt: skip
        with Program(Path(name), *options) as service:
            subscriber = children.start(_subscriber, service.output, receipts_endpoint)
            first = subscriber.answer()  # whose frames come
            time.sleep(0.5 if arguments.quick else _QUIET_S)
            rss_mib = [service.sample().rss_bytes / MIB]
            control = control_of(service.output)
            orders = []
            for n in range(arguments.swaps):
                show(n, "swaps")
                engine = arguments.engines[n % len(arguments.engines)]
                asked_ns = time.monotonic_ns()
                answer = ask(control, {"do": "swap", "engine": engine}, _SWAP_S)
                answered_ns = time.monotonic_ns()
                made_by, arrived_ns = subscriber.answer()
                orders.append((asked_ns, answered_ns, arrived_ns, answer["engine"]["name"], made_by))
                rss_mib.append(service.sample().rss_bytes / MIB)
            camera.tell("end")
            sent: int = camera.answer()
            came = subscriber.answer()
            said = service.end()
    ledger = said["ledger"]
    arrivals_ns, makers = came.pop("arrivals_ns"), came.pop("makers")
    settled = min(_SETTLED, arguments.swaps - 1)
    return {
        "sent": sent,
        **came,
        "lost": sent - came["arrived"],
        "ledger": ledger,
        "exact": adds_up(ledger)
        and sent == ledger["received"] == ledger["published"]
        and not ledger["missing"],
        "made_by": makers,
        "first_engine": first[0],
        "swaps_seen": sum(made_by == name for *_, name, made_by in orders),
        "swap_s": report.percentiles([(answered - asked) / 1e9 for asked, answered, *_ in orders]),
        **_gaps(arrivals_ns, [(asked, arrived) for asked, _, arrived, *_ in orders]),
        "frames_per_s": round((len(arrivals_ns) - 1) / (arrivals_ns[-1] - arrivals_ns[0]) * 1e9, 2),
        "rss_mib": {
            "before": round(rss_mib[0], 1),
            "settled_after": settled,
            "settled": round(rss_mib[settled], 1),
            "end": round(rss_mib[-1], 1),
            "max": round(max(rss_mib), 1),
            "growth": round(rss_mib[-1] / rss_mib[settled] - 1, 4),
            "after_each": [round(each, 1) for each in rss_mib],
        },
    }


def _gaps(arrivals_ns: np.ndarray, swaps: list[tuple[int, int]]) -> dict[str, Any]:
    """Times between frames [ms]: the longest around each swap, and all of those when nobody swaps."""
    begins_ns, ends_ns = arrivals_ns[:-1], arrivals_ns[1:]
    gaps_ms = (ends_ns - begins_ns) / 1e6
    quiet, longest = np.ones(len(gaps_ms), bool), []
    for asked_ns, arrived_ns in swaps:
        around = (ends_ns > asked_ns) & (begins_ns <= arrived_ns)
        quiet &= ~around
        longest.append(float(gaps_ms[around].max()))
    return {
        "gap_ms": report.percentiles(gaps_ms[quiet]),
        "longest_gap_of_each_swap_ms": report.percentiles(longest),
    }


# -- the processes -----------------------------------------------------------------------


def _camera(pipe: Connection, size: int, window: int) -> None:
    """Until it is told to end."""
    camera = rig.Camera(size, "uint8")
    pipe.send((camera.endpoint, camera.receipts_endpoint))
    camera.greet()
    pipe.send(stream(camera, window, lambda number: not pipe.poll(0)))
    camera.end()
    camera.close()


def _subscriber(pipe: Connection, endpoint: str, receipts_endpoint: str) -> None:
    """Says whenever another engine than before made a frame, and when it came."""
    subscriber = rig.Subscriber(endpoint, receipts_endpoint)
    arrivals_ns: list[int] = []
    makers: list[dict[str, Any]] = []
    expected = out_of_order = twice = 0
    for received_ns, header, _ in subscriber.frames():
        arrivals_ns.append(received_ns)
        number, name = header["frame"], header["engine"]["name"]
        out_of_order += number > expected
        twice += number < expected
        expected = number + 1
        if not makers or makers[-1]["engine"] != name:
            makers.append({"engine": name, "first": number, "frames": 0})
            pipe.send((name, received_ns))
        makers[-1]["frames"] += 1
    subscriber.close()
    pipe.send(
        {"arrived": subscriber.arrived, "skipped": out_of_order, "twice_or_late": twice, "makers": makers,
         "arrivals_ns": np.array(arrivals_ns)}
    )  # fmt: skip


# -- on paper ----------------------------------------------------------------------------


def _markdown(results: dict[str, Any]) -> str:
    rss, gap, longest = results["rss_mib"], results["gap_ms"], results["longest_gap_of_each_swap_ms"]
    right = [
        before["first"] + before["frames"] == after["first"] for before, after in pairwise(results["made_by"])
    ]
    rows = [
        ["frames/s, swaps and all", f"{results['frames_per_s']:.1f}"],
        ["a swap, from the order to its answer, median / longest [s]",
         f"{results['swap_s']['p50']:.2f} / {results['swap_s']['max']:.2f}"],
        ["between frames when nobody swaps, median / longest [ms]", _pair(gap)],
        ["longest between frames around a swap, median / longest of all swaps [ms]", _pair(longest)],
        [f"memory before / after {rss['settled_after']} / after {results['swaps']} swaps / at most [MiB]",
         f"{rss['before']:.0f} / {rss['settled']:.0f} / {rss['end']:.0f} / {rss['max']:.0f}"],
    ]  # fmt: skip
    wrong = results["lost"] + results["skipped"] + results["twice_or_late"]
    targets = [
        ["no frame lost, out of order or twice",
         f"{results['lost']} lost, {results['skipped']} gaps, {results['twice_or_late']} late or twice",
         verdict(results["exact"] and not wrong)],
        ["every swap seen in the headers, each frame by the engine in force",
         f"{results['swaps_seen']} of {results['swaps']}",
         verdict(results["swaps_seen"] == results["swaps"] == len(right) and all(right))],
        [f"memory within {GROWTH:.0%} of that after {rss['settled_after']} swaps", f"{rss['growth']:+.1%}",
         verdict(abs(rss["growth"]) <= GROWTH)],
    ]  # fmt: skip
    return "\n\n".join(
        [
            f"{results['swaps']} swaps between {' and '.join(results['engines'])}, {results['size']}x{results['size']} "
            f"uint8, {results['sent']:,} frames, {results['window']} under way.",
            report.table(["what", "measured"], rows),
            report.table(["target", "measured", ""], targets),
        ]
    )


def _pair(percentiles: dict[str, float | None]) -> str:
    middle, longest = percentiles["p50"], percentiles["max"]
    return "-" if middle is None or longest is None else f"{middle:.1f} / {longest:.0f}"


if __name__ == "__main__":
    main()
