"""How much of the decompressing library's speed is left when a detector's frames go into their slots?

Messages of DECTRIS' Stream V2 as the simulated detector makes them, one channel, decoded again and
again in one process, turn and turn about:

**alone**: `dectris.compression.decompress` of the pixels in the message; for uncompressed pixels
a copy of them. Timed span: the call.

**into the slot**: what `emstream serve` does with a message that has come: read its CBOR, check it,
reserve a row of the ring, write the pixels there, commit. Timed span: from the message to the
frame's being ready. The slot is freed outside of it.

**sustained**: a process sends the same messages on tcp as fast as they are taken; the source puts
them into a ring whose slots are freed at once. Timed span: first frame to last. Nothing may be lost.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import zmq

from bench import report, rig
from bench.program import verdict
from emstream.camera.dectris import COMPRESSIONS, DectrisSettings, Detector, Series
from emstream.endpoint import last_endpoint
from emstream.intake import Intake, Overrun
from emstream.ledger import Ledger
from emstream.memory import keep_freed_blocks
from emstream.ring import Ring, Slot
from emstream.sources import cbor
from emstream.sources.dectris import Decoder, DectrisSource
from emstream.sources.stream2 import Image, array, parse
from emstream.wire import DEFAULT_MAX_HEADER_BYTES

TARGET = 0.8
TARGETED = "bslz4"  # what detectors send
PATTERNS = 8
_LIMIT = 256 * 1024**2


def main(argv: list[str] | None = None) -> dict[str, Any]:
    argv = sys.argv[1:] if argv is None else argv
    parser = report.parser("cameras", __doc__)
    parser.add_argument("--size", type=int, default=1024, help="frames of SIZE x SIZE (default: %(default)s)")
    parser.add_argument("--doses", type=float, nargs="+", default=[0.45, 5.0], help="electrons/pixel")
    parser.add_argument("--rounds", type=int, default=400, help="(default: %(default)s)")
    parser.add_argument(
        "--frames", type=int, default=3000, help="of the sustained stream (default: %(default)s)"
    )
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.rounds, arguments.frames = min(arguments.rounds, 10), min(arguments.frames, 50)
    keep_freed_blocks()
    cases = [(compression, dose) for compression in COMPRESSIONS for dose in arguments.doses]
    results: dict[str, Any] = {**report.stamp("cameras", argv), "size": arguments.size, "target": TARGET}
    results["decode"] = []
    with report.progress("cameras", len(cases)) as show:
        for n, (compression, dose) in enumerate(cases):
            show(n, f"{compression}, {dose} electrons/pixel")
            messages = _messages(arguments.size, compression, dose)
            case = {"compression": compression, "dose": dose, "message_bytes": len(messages[0])}
            rates = decode(messages, compression, arguments.rounds)
            kept = sustained(arguments.size, compression, dose, arguments.frames)
            results["decode"].append({**case, **rates, "sustained": kept})
    report.write("cameras", "Cameras", results, _markdown(results), arguments)
    return results


def decode(messages: list[bytes], compression: str, rounds: int) -> dict[str, Any]:
    """Frames/s of both ways, medians over `rounds`, and their ratio."""
    from dectris.compression import decompress

    ring, ledger = Ring(2, 1), Ledger()
    intake, decoder = Intake(ring, ledger, Overrun.block), Decoder()
    views = [memoryview(message) for message in messages]
    packed = [_pixels(message) for message in messages]
    alone_s, slot_s = [], []

    def alone(n: int) -> None:
        if compression == "none":
            bytearray(packed[n])
        else:
            decompress(packed[n], compression, elem_size=2)

    def free() -> None:
        while (item := ring.claim(block=False)) is not None:
            if isinstance(item, Slot):
                ring.release(item)

    for n in range(PATTERNS):
        decoder.decode(views[n], intake)
        free()
    for turn in range(rounds):
        n = turn % PATTERNS
        pair: tuple[tuple[list[float], Callable[[], None]], ...] = (
            (alone_s, lambda n=n: alone(n)),  # type: ignore[misc]
            (slot_s, lambda n=n: decoder.decode(views[n], intake)),  # type: ignore[misc]
        )
        for seconds, work in pair if turn % 2 else pair[::-1]:
            start_s = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - start_s)
        free()
    assert ledger.snapshot()["rejected"] == 0
    alone_per_s, slot_per_s = (1 / float(np.median(each)) for each in (alone_s, slot_s))
    ratios = np.array(alone_s) / np.array(slot_s)
    return {
        "alone_per_s": round(alone_per_s, 1),
        "slot_per_s": round(slot_per_s, 1),
        "ratio": round(slot_per_s / alone_per_s, 3),
        "quartiles": [round(float(each), 3) for each in np.percentile(ratios, [25, 75])],
    }


def sustained(size: int, compression: str, dose: float, frames: int) -> dict[str, Any]:
    """A whole stream over tcp: frames/s, and what the ledger says."""
    with rig.Children() as children:
        camera = children.start(_camera, size, compression, dose, frames)
        ring, ledger = Ring(8, 4), Ledger()
        intake, stop = Intake(ring, ledger, Overrun.block), threading.Event()
        thread = threading.Thread(target=DectrisSource(camera.answer()).run, args=(intake, stop))
        thread.start()
        times: list[int] = []
        while len(times) < frames:
            item = ring.claim()
            if isinstance(item, Slot):
                times += item.received_ns
                ring.release(item)
        stop.set()
        thread.join()
    seconds = (times[-1] - times[0]) / 1e9
    counted = ledger.snapshot()
    lost = frames - counted["received"] + counted["dropped"] + counted["rejected"] + counted["missing"]
    return {
        "frames": frames,
        "frames_per_s": round((frames - 1) / seconds, 1),
        "mb_per_s": round((frames - 1) / seconds * size**2 * 2 / 1e6, 1),
        "lost": lost,
    }


def _camera(pipe: Connection, size: int, compression: str, dose: float, frames: int) -> None:
    """Sends a series of `frames` images as fast as they are taken."""
    series = _series(size, compression, dose)
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PUSH)
    socket.sndhwm = 64
    socket.bind(rig.ANYWHERE)
    pipe.send(last_endpoint(socket))
    socket.send(series.start())
    for n in range(frames):
        socket.send(series.image(n, n), copy=False)
    socket.send(series.end())
    threading.Event().wait(60)  # until it is stopped: what is queued has to go out


def _series(size: int, compression: str, dose: float) -> Series:
    detector = Detector(
        DectrisSettings(height=size, width=size, compression=compression, dose=dose, patterns=PATTERNS)
    )
    return detector.arm(1, 0)


def _messages(size: int, compression: str, dose: float) -> list[bytes]:
    series = _series(size, compression, dose)
    return [series.image(n, n) for n in range(PATTERNS)]


def _pixels(message: bytes) -> bytes:
    """The pixels in a message, as they came."""
    image = parse(message, _LIMIT, DEFAULT_MAX_HEADER_BYTES)
    assert isinstance(image, Image)
    (channel,) = image.channels.values()
    assert isinstance(channel, cbor.Tag)
    return bytes(array(channel, _LIMIT).data)


def _markdown(results: dict[str, Any]) -> str:
    rows = [
        [
            each["compression"],
            each["dose"],
            each["message_bytes"] // 1000,
            each["alone_per_s"],
            each["slot_per_s"],
            each["ratio"],
            f"{each['quartiles'][0]:.2f} - {each['quartiles'][1]:.2f}",
            each["sustained"]["frames_per_s"],
            each["sustained"]["lost"],
            verdict(each["ratio"] >= results["target"]) if each["compression"] == TARGETED else None,
        ]
        for each in results["decode"]
    ]
    columns = [
        "compression", "dose [e/px]", "message [kB]", "library alone [frames/s]", "into the slot [frames/s]",
        "ratio", "quartiles", "sustained over tcp [frames/s]", "lost", f"at least {results['target']}",
    ]  # fmt: skip
    counted = results["decode"][0]["sustained"]["frames"]
    return (
        f"{report.table(columns, rows)}\n\n"
        f"Frames of {results['size']}x{results['size']} uint16, {counted:,} of each stream. Target with {TARGETED}: "
        f"at least {results['target']} of the library alone. Without compression the library's part is a copy."
    )


if __name__ == "__main__":
    main()
