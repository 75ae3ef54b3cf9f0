"""Does anything that may come from a camera crash, hang or bloat its decoder?

Good messages of each stream are damaged at random, seeded: bytes changed, cut out, put in or doubled, mostly
near the front, where the meaning is. PVAccess' messages are taken apart by its own library; of its structures
fields lie, and compressed pixels are damaged. Of Merlin it is whole connections, of one message or three.
Every one is decoded as `emstream serve` would. Whatever happens must be a frame, a mark or a rejection with a
reason, and nothing but these; the ledger must add up each time.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import psutil
import zmq

from bench import messages, report
from emstream import wire
from emstream.camera.dectris import COMPRESSIONS, DectrisSettings, Detector
from emstream.frame import FrameHeader
from emstream.intake import Intake
from emstream.ledger import Ledger
from emstream.outputs import array1
from emstream.ring import Ring, Slot
from emstream.sources import dectris, dectris1, epics, merlin
from emstream.sources.zmq import ZmqSource

SIZE = 48  # px
LIMIT = 1_000_000  # bytes of a frame


class OverSocket:
    """The ZeroMQ source, which decodes as it receives, and a camera that sends to it."""

    def __init__(self) -> None:
        self._context: zmq.Context[Any] = zmq.Context()
        self._source = ZmqSource("inproc://fuzz", lossless=True, bind=True, context=self._context)
        self._camera = self._context.socket(zmq.PUSH)
        self._camera.connect("inproc://fuzz")

    def decode(self, parts: list[memoryview], intake: Intake) -> None:
        self._camera.send_multipart(parts)
        self._source._receive(intake)

    def close(self) -> None:
        self._context.destroy(linger=0)


DECODERS: dict[str, Callable[[], Any]] = {
    "native": OverSocket,
    "array-1.0": OverSocket,
    "dectris": dectris.Decoder,
    "dectris1": dectris1.Decoder,
    "pva": epics.Decoder,
    "merlin": merlin.Decoder,
}
_EVERY = 2000  # messages for which a decoder lives
_WARM_UP = 200  # messages before memory counts: libraries are loaded


def main(argv: list[str] | None = None) -> dict[str, Any]:
    argv = sys.argv[1:] if argv is None else argv
    parser = report.parser("fuzz", __doc__)
    parser.add_argument("--inputs", type=int, default=100_000, help="of each decoder (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument(
        "--decoders", nargs="+", choices=DECODERS, default=list(DECODERS), help="(default: all of them)"
    )
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.inputs = min(arguments.inputs, 500)
    logging.disable(logging.WARNING)  # every rejection would be said
    results: dict[str, Any] = {**report.stamp("fuzz", argv), "inputs": arguments.inputs, "decoders": {}}
    with report.progress("fuzz", arguments.inputs * len(arguments.decoders)) as show:
        for n, name in enumerate(arguments.decoders):
            done = n * arguments.inputs
            results["decoders"][name] = fuzz(name, arguments, partial(_later, show, done, name))
    report.write("fuzz", "Damaged messages", results, _markdown(results), arguments)
    return results


def fuzz(name: str, arguments: argparse.Namespace, show: Callable[[int], None]) -> dict[str, Any]:
    """What came of `arguments.inputs` damaged messages; raises when a decoder did."""
    rng = np.random.default_rng((arguments.seed, len(name)))
    good = _good(name)
    whole, rejected, slowest_s, reasons, before = 0, 0, 0.0, set(), 0
    for first in range(0, arguments.inputs, _EVERY):
        ring, ledger, decoder = Ring(4, 1), Ledger(), DECODERS[name]()
        intake = Intake(ring, ledger, max_frame_bytes=LIMIT)
        for n in range(first, min(first + _EVERY, arguments.inputs)):
            if n == _WARM_UP:
                before = psutil.Process().memory_info().rss
            decode = _bad(name, good[int(rng.integers(len(good)))], rng)
            start_s = time.perf_counter()
            decode(decoder, intake)
            slowest_s = max(slowest_s, time.perf_counter() - start_s)
            whole += sum(_taken(ring))
            counted = ledger.snapshot()
            assert counted["received"] == counted["rejected"] + counted["dropped"] + counted["in_flight"], n
        if isinstance(decoder, OverSocket):
            decoder.close()
        rejected += counted["rejected"]
        reasons |= set(ledger.reasons())
        show(first)
    grown = psutil.Process().memory_info().rss - before
    return {
        "frames": whole,
        "rejected": rejected,
        "reasons": len(reasons),
        "slowest_ms": round(slowest_s * 1e3, 2),
        "grown_mib": round(grown / 2**20, 1),
    }


def _bad(name: str, parts: list[Any], rng: np.random.Generator) -> Callable[[Any, Intake], None]:
    """Damages a good message, and says how to decode it."""
    if name == "pva":
        update = _lying(parts, rng)
        return lambda decoder, intake: decoder.decode(update, intake)
    at = int(rng.integers(len(parts)))
    parts = [_damaged(part, rng) if n == at else part for n, part in enumerate(parts)]
    if name == "merlin":
        stream = merlin.Stream(io.BytesIO(b"".join(parts)).readinto)
        return lambda decoder, intake: _play(decoder, stream, intake)
    views = [memoryview(part) for part in parts]
    return lambda decoder, intake: decoder.decode(views[0] if name == "dectris" else views, intake)


def _play(decoder: merlin.Decoder, stream: merlin.Stream, intake: Intake) -> None:
    with contextlib.suppress(merlin.Ended):
        while True:
            decoder.decode(stream, intake)


def _lying(parts: list[Any], rng: np.random.Generator) -> Any:
    pixels, codec, data = parts
    wrong = _damaged(data, rng) if codec and rng.random() < 0.7 else data
    update = messages.ndarray(int(rng.integers(-(2**31), 2**31)), pixels, codec, wrong)
    for _ in range(int(rng.integers(1, 3))):
        kind, number = int(rng.integers(8)), int(rng.integers(-(2**31), 2**31)) >> int(rng.integers(32))
        if kind == 0:
            sizes = rng.choice([SIZE, 1, 0, 3, -1, number], int(rng.integers(12)))
            update.dimension = [{"size": int(size)} for size in sizes]
        elif kind == 1:
            update["codec.name"] = str(
                rng.choice(["", "lz4", "bslz4", "blosc", "lz4hdf5", "jpeg", "\u2603" * 50])
            )
        elif kind == 2:
            update["codec.parameters"] = number if rng.random() < 0.5 else int(rng.integers(12))
        elif kind == 3:
            update.compressedSize = number
        elif kind == 4:
            update.dataTimeStamp = {"secondsPastEpoch": number << 31, "nanoseconds": number}
        elif kind == 5:
            update.attribute = [{"name": "ColorMode" if rng.random() < 0.5 else "x" * 9999, "value": number}]
        elif kind == 6:
            update.attribute = [{"name": "ColorMode", "value": [None, "Mono", float("nan")][number % 3]}]
        elif kind == 7 and not codec:
            update.value = (
                ["longValue", "doubleValue", "booleanValue"][number % 3],
                np.zeros(abs(number) % 5000),
            )
    return update


def _later(show: Callable[[float, str], None], done: int, name: str, more: int) -> None:
    show(done + more, name)


def _taken(ring: Ring) -> Iterator[int]:
    """Sizes of the batches that have come out; what is said of frames and series must fit a message, too."""
    while (item := ring.claim(block=False)) is not None:
        if isinstance(item, Slot):
            for header in item.headers:
                wire.pack(wire.map_of(header))
            yield len(item)
            ring.release(item)
        else:
            wire.pack(item.message)


def _damaged(message: bytes, rng: np.random.Generator) -> bytes:
    made = bytearray(message)
    for _ in range(int(rng.integers(1, 3))):
        reach = min(len(made), 150) if rng.random() < 0.7 else len(made)
        at, length = int(rng.integers(reach + 1)), int(rng.integers(1, 9))
        kind = int(rng.integers(5))
        if kind == 0 and at < len(made):
            made[at] = int(rng.integers(256))
        elif kind == 1 and at < len(made):
            made[at] ^= 1 << int(rng.integers(8))
        elif kind == 2:
            del made[at : at + length]
        elif kind == 3:
            made[at:at] = rng.bytes(length)
        elif rng.random() < 0.3:
            del made[at:]
        else:
            made[at:at] = made[at : at + 4 * length]
    return bytes(made)


def _good(name: str) -> list[list[Any]]:
    """Messages of all kinds, as lists of parts."""
    if name in ("native", "array-1.0"):
        return _good_over_socket(name)
    if name == "pva":
        return _good_updates()
    if name == "merlin":
        return _good_acquisitions()
    series = [
        Detector(
            DectrisSettings(height=SIZE, width=SIZE, compression=each, thresholds=2, dead=4, patterns=1)
        ).arm(n, 0)
        for n, each in enumerate(COMPRESSIONS)
    ]
    if name == "dectris":
        return [[message] for each in series for message in (each.start(), each.image(0, 0), each.end())]
    pixels = np.zeros((SIZE, SIZE), np.uint16).tobytes()
    shape = f'"shape": [{SIZE}, {SIZE}], "type": "uint16"'.encode()
    head = [b'{"htype": "dimage-1.0", "series": 1, "frame": 3}']
    times = [b'{"htype": "dconfig-1.0", "real_time": 1000}']
    packed = series[0].image(0, 0)[300:]
    images = [
        [*head, b'{"htype": "dimage_d-1.0", ' + shape + b', "encoding": "' + encoding + b'"}', data, *times]
        for encoding, data in ((b"<", pixels), (b"lz4<", packed), (b"bs16-lz4<", bytes(12) + packed))
    ]
    config = b'{"description": "QUADRO", "nimages": 5, "ntrigger": 1, "count_time": 0.1}'
    mask = [b'{"htype": "dpixelmask-1.0", "shape": [8, 8], "type": "uint32"}', bytes(256)]
    start = [b'{"htype": "dheader-1.0", "series": 1, "header_detail": "all"}', config, *mask]
    return [*images, start, start[:1], [config], [b'{"htype": "dseries_end-1.0", "series": 1}']]


def _good_over_socket(name: str) -> list[list[bytes]]:
    frames = [
        FrameHeader(
            frame=n, shape=(SIZE, SIZE), type=kind, source="camera", series=1, exposure_s=0.1,
            timestamp_ns=1_795_452_000_000_000_000 + n, extra={"stage": {"tilt_deg": 1.5}},
        )
        for n, kind in enumerate(("uint8", "uint16", "float32"))
    ]  # fmt: skip
    pixels = [np.ones(frame.shape, frame.dtype).tobytes() for frame in frames]
    if name == "native":
        marks = [
            [b"raw", wire.pack({"htype": htype, "source": "camera", "series": 1})]
            for htype in (wire.START, wire.END)
        ]
        return [
            *(
                [b"raw", wire.pack(wire.map_of(frame)), data]
                for frame, data in zip(frames, pixels, strict=True)
            ),
            *marks,
        ]
    plain = b'{"htype": "array-1.0", "shape": [%d, %d], "type": "uint8", "frame": 4, ' % (SIZE, SIZE)
    return [
        *([array1.header(wire.map_of(frame)), data] for frame, data in zip(frames, pixels, strict=True)),
        [plain + b'"endianess": "little"}', pixels[0]],
        [plain + b'"timeStamp": 1164300000.25, "encoding": "", "ndattr": {"Gain": "high"}}', pixels[0]],
        [plain.replace(b'"array-1.0"', b'["array-1.0"]') + b'"ndattr": {}}', pixels[0]],
        [plain + b'"source": "camera"}', b""],
    ]


def _good_updates() -> list[list[Any]]:
    """Pixels, codec, and what it made of them."""
    import bitshuffle
    import lz4.block
    from numcodecs import blosc

    counts = np.random.default_rng(0).poisson(3.0, (SIZE, SIZE))
    made: list[list[Any]] = []
    for kind in ("uint8", "uint16", "uint32", "float32"):
        pixels = counts.astype(kind)
        data = pixels.tobytes()
        made += [
            [pixels, "", data],
            [pixels, "lz4", lz4.block.compress(data, store_size=False)],
            [pixels, "bslz4", bitshuffle.compress_lz4(pixels).tobytes()],
            *(
                [pixels, "blosc", blosc.compress(data, inner, 5, shuffle, typesize=pixels.itemsize)]
                for inner in (b"blosclz", b"lz4", b"zlib", b"zstd")
                for shuffle in (0, 1, 2)
            ),
        ]
    return made


def _good_acquisitions() -> list[list[Any]]:
    """What one connection may bring, message by message."""
    counts = np.random.default_rng(0).poisson(3.0, (SIZE, SIZE))
    frames = [messages.mib_frame(n + 1, counts.astype(kind)) for n, kind in enumerate(("u1", "u2", "u4"))]
    packed = counts.astype(np.uint8).tobytes()
    frames += [
        messages.mib_raw(4, (SIZE, SIZE), 6, packed),
        messages.mib_raw(5, (SIZE, SIZE), 1, packed[: SIZE * SIZE // 8]),
        messages.mib_raw(6, (SIZE, SIZE), 12, packed * 2),
        messages.mib_raw(7, (SIZE, 2 * SIZE), 24, packed * 4),
        messages.mib_raw(8, (SIZE // 2, 2 * SIZE), 6, packed, chips=4),
    ]
    start = messages.mpx(messages.mib_acquisition(8))
    return [[start], *([start, messages.mpx(frame), messages.mpx(frames[0])] for frame in frames)]


def _markdown(results: dict[str, Any]) -> str:
    rows = [[name, *each.values()] for name, each in results["decoders"].items()]
    columns = ["decoder", "frames", "rejected", "different reasons", "slowest [ms]", "memory grown [MiB]"]
    said = f"{results['inputs']:,} damaged messages each, none of which raised anything."
    return f"{report.table(columns, rows)}\n\n{said}"


if __name__ == "__main__":
    main()
