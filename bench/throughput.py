"""What does emstream's transport cost, next to a bare pyzmq relay of the same frames?

    camera ──PUSH──▶ PULL [relay | emstream serve --engine identity --overrun block] XPUB ──▶ SUB

Camera, middle and subscriber are three processes. Both middles get the same frames over
the same sockets with the same queues, in turns, and the same closed loop: the camera stays
at most --window frames ahead of what the subscriber has got, so that the output queue never
overflows and every frame must arrive. (ZeroMQ's sender hears only every half queue, and not
within a burst, how much has been read: the queue is four windows long.) The relay is
``output.send_multipart(input.recv_multipart(copy=False), copy=False)`` and nothing else.

Timed span: from the subscriber's receipt of the first frame after --warmup to its receipt
of the last, over the number of frames in between. The subscriber checks each frame's number,
size, and the pixel that tells which pattern it is.

emstream always publishes float32, so with a uint8 or uint16 camera it sends 4 or 2 times
the relay's bytes; only with float32 do both move the same.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

import numpy as np
import zmq

from bench import report, rig
from emstream.endpoint import last_endpoint
from emstream.intake import Overrun
from emstream.serve import Settings
from emstream.sources.zmq import QUEUE_FRAMES as INPUT_QUEUE_FRAMES

TARGET = 0.8  # emstream / relay, float32
_RECEIPT_EVERY = 4
_QUEUE_WINDOWS = 4


def main(argv: list[str] | None = None) -> dict[str, Any]:
    argv = sys.argv[1:] if argv is None else argv
    parser = report.parser("throughput", __doc__)
    parser.add_argument("--frames", type=int, default=4000, help="per round (default: %(default)s)")
    parser.add_argument(
        "--rounds", type=int, default=5, help="of relay, then emstream (default: %(default)s)"
    )
    parser.add_argument(
        "--types", nargs="+", default=["float32", "uint16", "uint8"], help="of the camera's pixels"
    )
    parser.add_argument("--size", type=int, default=512, help="frames of SIZE x SIZE (default: %(default)s)")
    parser.add_argument(
        "--window", type=int, default=48, help="frames under way at most (default: %(default)s)"
    )
    parser.add_argument("--warmup", type=int, default=500, help="frames not timed (default: %(default)s)")
    parser.add_argument(
        "--proof", type=int, default=0, metavar="FRAMES", help="at last, a long round of emstream alone"
    )
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.frames, arguments.rounds, arguments.warmup = min(arguments.frames, 300), 1, 50
    if not 0 <= arguments.warmup < arguments.frames - 1:
        parser.error("--frames must be at least 2 more than --warmup")
    if arguments.window < _RECEIPT_EVERY:
        parser.error(f"--window must be at least {_RECEIPT_EVERY} frames")

    results = {**report.stamp("throughput", argv), "size": arguments.size, "window": arguments.window}
    plan = [
        (kind, middle, arguments.frames)
        for kind in arguments.types
        for _ in range(arguments.rounds)
        for middle in ("relay", "emstream")
    ]
    if arguments.proof:
        plan.append((arguments.types[0], "emstream", arguments.proof))
    rounds: list[dict[str, Any]] = []
    with report.progress("throughput", sum(frames for _, _, frames in plan)) as show:
        done = 0
        for kind, middle, frames in plan:
            show(done, f"{middle}, {kind}")
            rounds.append(measure(kind, middle, frames, arguments.warmup, arguments.size, arguments.window))
            done += frames
    if arguments.proof:
        results["proof"] = rounds.pop()
    results["rounds"] = rounds
    results["types"] = {kind: _summary(kind, rounds, arguments.size) for kind in arguments.types}
    results["lost"] = sum(r["lost"] for r in [*rounds, results.get("proof", {"lost": 0})])
    report.write("throughput", "Transport", results, _markdown(results), arguments)
    return results


def measure(kind: str, middle: str, frames: int, warmup: int, size: int, window: int) -> dict[str, Any]:
    """One round in three fresh processes."""
    with rig.Children() as children:
        camera = children.start(_camera, frames, size, kind, window)
        endpoint, receipts_endpoint = camera.answer()
        if middle == "relay":
            between = children.start(_relay, endpoint, _QUEUE_WINDOWS * window)
            output = between.answer()
        else:
            settings = Settings(
                input=f"pull+{endpoint}",
                output=rig.ANYWHERE,
                engine="identity",
                overrun=Overrun.block,
                queue=_QUEUE_WINDOWS * window,
                queue_bytes=2**40,
            )
            between = children.start(rig.service, settings)
            output, _ = between.answer()
        idle_s = between.cpu_s
        subscriber = children.start(_subscriber, output, receipts_endpoint, warmup)
        found: dict[str, Any] = subscriber.answer(within_s=3600)
        cpu_s = between.cpu_s - idle_s
        ledger = None
        if middle == "emstream":
            between.stop()
            ledger = between.answer()["ledger"]
            settled = sum(
                ledger[name] for name in ("published", "dropped", "rejected", "failed", "in_flight")
            )
            if not (ledger["received"] == settled == frames):
                raise RuntimeError(f"the ledger does not add up to {frames} frames: {ledger}")
    nbytes = size * size * (4 if middle == "emstream" else np.dtype(kind).itemsize)
    return {
        "type": kind,
        "middle": middle,
        "frames": frames,
        "frames_per_s": round(found["frames_per_s"], 1),
        "mb_per_s": round(found["frames_per_s"] * nbytes / 1e6, 1),
        "cpu_ms_per_frame": round(1000 * cpu_s / frames, 4),
        "lost": frames - found["arrived"],
        "wrong": found["wrong"],
        "ledger": ledger,
    }


# -- the processes -----------------------------------------------------------------


def _camera(pipe: Connection, frames: int, size: int, kind: str, window: int) -> None:
    camera = rig.Camera(size, kind)
    pipe.send((camera.endpoint, camera.receipts_endpoint))
    camera.greet()
    for number in range(frames):
        if not camera.wait_arrived(number - window):
            raise RuntimeError(f"frame {number - window} never arrived")
        camera.send(number, receipt=number % _RECEIPT_EVERY == 0 or number == frames - 1)
    camera.wait_arrived(frames - 1, patience_s=3)
    camera.end()
    camera.close()


def _relay(pipe: Connection, endpoint: str, queue: int) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
    receiving = context.socket(zmq.PULL)
    receiving.rcvhwm = INPUT_QUEUE_FRAMES
    receiving.connect(endpoint)
    sending = context.socket(zmq.XPUB)
    sending.sndhwm = queue
    sending.bind(rig.ANYWHERE)
    pipe.send(last_endpoint(sending))
    receive, send = receiving.recv_multipart, sending.send_multipart
    while True:  # until it is terminated
        send(receive(copy=False), copy=False)


def _subscriber(pipe: Connection, endpoint: str, receipts_endpoint: str, warmup: int) -> None:
    subscriber = rig.Subscriber(endpoint, receipts_endpoint)
    first_ns = last_ns = wrong = 0
    for received_ns, header, pixels in subscriber.frames():
        number = header["frame"]
        if subscriber.arrived == warmup + 1:
            first_ns = received_ns
        last_ns = received_ns
        dtype = np.dtype(header["type"])
        height, width = header["shape"]
        whole = len(pixels) == height * width * dtype.itemsize
        if not (
            whole
            and number == subscriber.arrived - 1
            and np.frombuffer(pixels, dtype, 1)[0] == number % rig.PATTERNS
        ):
            wrong += 1
    subscriber.close()
    timed = subscriber.arrived - warmup - 1
    pipe.send(
        {
            "arrived": subscriber.arrived,
            "wrong": wrong,
            "frames_per_s": timed / (last_ns - first_ns) * 1e9 if timed > 0 else 0.0,
        }
    )


# -- on paper ------------------------------------------------------------------------


def _summary(kind: str, rounds: list[dict[str, Any]], size: int) -> dict[str, Any]:
    relay, ours = (
        [r for r in rounds if r["type"] == kind and r["middle"] == middle] for middle in ("relay", "emstream")
    )

    def ratio(of: Callable[[dict[str, Any]], float]) -> list[float]:
        return [of(b) / of(a) for a, b in zip(relay, ours, strict=True)]

    ratios = ratio(lambda r: r["frames_per_s"])
    return {
        "relay_frames_per_s": median(r["frames_per_s"] for r in relay),
        "emstream_frames_per_s": median(r["frames_per_s"] for r in ours),
        "relay_mb_per_s": median(r["mb_per_s"] for r in relay),
        "emstream_mb_per_s": median(r["mb_per_s"] for r in ours),
        "relay_cpu_ms_per_frame": median(r["cpu_ms_per_frame"] for r in relay),
        "emstream_cpu_ms_per_frame": median(r["cpu_ms_per_frame"] for r in ours),
        "bytes_ratio": 4 / np.dtype(kind).itemsize,
        "ratio": round(median(ratios), 4),
        "ratio_lowest": round(min(ratios), 4),
        "ratio_highest": round(max(ratios), 4),
    }


def _markdown(results: dict[str, Any]) -> str:
    columns = [
        "camera's type", "relay [frames/s]", "emstream [frames/s]", "emstream / relay", "lowest - highest",
        "relay out [MB/s]", "emstream out [MB/s]", "bytes out, emstream / relay", "CPU, relay [ms/frame]",
        "CPU, emstream [ms/frame]",
    ]  # fmt: skip
    rows = [
        [
            kind,
            round(s["relay_frames_per_s"]),
            round(s["emstream_frames_per_s"]),
            f"{s['ratio']:.2f}",
            f"{s['ratio_lowest']:.2f} - {s['ratio_highest']:.2f}",
            round(s["relay_mb_per_s"]),
            round(s["emstream_mb_per_s"]),
            s["bytes_ratio"],
            s["relay_cpu_ms_per_frame"],
            s["emstream_cpu_ms_per_frame"],
        ]
        for kind, s in results["types"].items()
    ]
    rounds = [*results["rounds"], *([results["proof"]] if "proof" in results else [])]
    ours = [r for r in rounds if r["middle"] == "emstream"]
    notes = [
        f"Frames of {results['size']}x{results['size']}, at most {results['window']} under way. The ratio is the "
        "median over rounds, each emstream's rate over that of the relay just before it. Target with float32: "
        f"at least {TARGET}.",
        f"Through emstream: {sum(r['frames'] for r in ours):,} frames, {sum(r['lost'] for r in ours)} lost, "
        f"{sum(r['wrong'] for r in ours)} out of order or damaged; each round's ledger adds up.",
    ]
    if proof := results.get("proof"):
        notes.append(
            f"The longest round: {proof['frames']:,} frames of {proof['type']} at {proof['frames_per_s']:.0f} "
            f"frames/s, {proof['lost']} lost; ledger {', '.join(f'{k} {v}' for k, v in proof['ledger'].items())}."
        )
    return report.table(columns, rows) + "\n\n" + "\n\n".join(notes)


if __name__ == "__main__":
    main()
