"""How fast does the recorder write, does it lose anything in an hour's worth of frames, and what does a kill cost?

    service ──XPUB──▶ recorder ──▶ disk

**An hour**: a stand-in for the service publishes raw uint8 and denoised float32 frames of a simulated
specimen, 144,000 pairs by default (40 frames/s for an hour), as fast as the recorder takes them: it
stays at most --window pairs ahead of what is written, so that the disk and the compression set the
rate. Files are split, checked row by row against the numbers sent, and deleted, so that the hour fits
on a small disk. Timed span: from the first pair written to the last.

**Kills**: ``emstream record`` as a program of its own, pairs at 40 frames/s, SIGKILL at a random moment
0.2-2.2 s after its first commit, --kills times. What is lost is the time from the last frame that
can be read to the kill.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import zmq

from bench import report, rig
from emstream import wire
from emstream.endpoint import last_endpoint
from emstream.errors import FileFormatError
from emstream.frame import FrameHeader, now_ns
from emstream.publish import DENOISED, RAW
from emstream.record import Recorder, RecordSettings
from emstream.recording import Recording
from emstream.recording.disk import bytes_of
from emstream.sources.specimen import MovingSpecimen

HOUR = 144_000  # frames
RATE = 40.0  # frames/s, of the kill trials
TARGET_MS = 1000
_ENGINE = {"name": "stand-in", "sha256": None, "device": "none"}
_TICK_S = 0.02


def main(argv: list[str] | None = None) -> dict[str, Any]:
    argv = sys.argv[1:] if argv is None else argv
    parser = report.parser("record", __doc__)
    parser.add_argument("--frames", type=int, default=HOUR, help="of the hour (default: %(default)s)")
    parser.add_argument("--kills", type=int, default=20, help="(default: %(default)s)")
    parser.add_argument("--size", type=int, default=512, help="frames of SIZE x SIZE (default: %(default)s)")
    parser.add_argument(
        "--window", type=int, default=64, help="pairs under way at most (default: %(default)s)"
    )
    parser.add_argument("--split", default="2GiB", help="size of a file (default: %(default)s)")
    parser.add_argument(
        "--folder", type=Path, help="on the disk to be measured (default: the system's temporary one)"
    )
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.frames, arguments.kills = min(arguments.frames, 200), min(arguments.kills, 1)
    results = {**report.stamp("record", argv), "size": arguments.size, "frames": arguments.frames}
    with (
        tempfile.TemporaryDirectory(dir=arguments.folder) as name,
        report.progress("record", arguments.frames + 100 * arguments.kills) as show,
    ):
        folder = Path(name)
        results["hour"] = hour(folder, arguments, lambda done: show(done, "an hour's frames"))
        results["kills"] = []
        for n in range(arguments.kills):
            show(arguments.frames + 100 * n, "kills")
            results["kills"].append(kill(folder / f"kill{n}.h5", arguments.size, random.Random(n)))
    report.write("record", "Recorder", results, _markdown(results), arguments)
    return results


def hour(folder: Path, arguments: argparse.Namespace, show: Any) -> dict[str, Any]:
    """All frames through one recorder, at the rate that it sets."""
    with rig.Children() as children:
        service = children.start(_service, arguments.size, None)
        recorder = Recorder(
            RecordSettings(
                input=service.answer(),
                output=folder / "hour.h5",
                frames=arguments.frames,
                split_bytes=bytes_of(arguments.split, "split"),
            )
        )
        found: list[dict[str, Any]] = []
        thread = threading.Thread(target=lambda: found.append(recorder.run()))
        thread.start()
        checked = _Checked()
        first_s, first, written = 0.0, 0, 0
        while thread.is_alive():
            # While it finds out how much comes, nothing is written: a second's worth has to be there.
            service.tell(written + arguments.window)
            thread.join(_TICK_S)
            status = recorder.status()
            written = status["frames"]["denoised"]
            if written and not first_s:
                first_s, first = time.monotonic(), written
            if written < arguments.frames:
                last_s = time.monotonic()
            if status["path"]:
                checked.all_but(status["path"], folder)
            show(written)
        service.tell(None)
    (recorded,) = found
    checked.all_but(None, folder)
    seconds = last_s - first_s if written > first else float("nan")
    nbytes = arguments.size**2 * (1 + 4)
    per_s = (written - first) / seconds
    return {
        "frames_per_s": round(per_s, 1),
        "of_camera": round(per_s / RATE, 2),
        "mb_per_s": round(per_s * nbytes / 1e6, 1),
        "bytes_per_pair": round(checked.nbytes / max(1, len(checked.numbers))),
        "compression": round(nbytes * len(checked.numbers) / max(1, checked.nbytes), 2),
        "files": len(recorded["files"]),
        "recorded": recorded["frames"],
        "lost": recorded["lost"],
        "unheard": recorded["unheard"],
        "missing": recorded["missing"],
        "wrong": checked.wrong + (checked.numbers != list(range(arguments.frames))),
        "ended": recorded["ended"],
    }


class _Checked:
    """Finished files: looked through, counted, deleted."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self.nbytes = self.wrong = 0

    def all_but(self, open_now: str | None, folder: Path) -> None:
        for path in sorted(folder.glob("hour*.h5"), key=lambda path: (len(path.name), path.name)):
            if (
                open_now is not None
                and path.name >= Path(open_now).name
                and len(path.name) >= len(Path(open_now).name)
            ):
                return
            with Recording(path) as recording:
                self.numbers += recording.raw.numbers.tolist()
                self.wrong += recording.denoised.numbers.tolist() != recording.raw.numbers.tolist()
                for row in (0, len(recording.raw) - 1):
                    self.wrong += (
                        int(recording.raw[row][0, 0]) != int(recording.raw.numbers[row]) % rig.PATTERNS
                    )
            self.nbytes += path.stat().st_size
            path.unlink()


def kill(path: Path, size: int, chance: random.Random) -> dict[str, Any]:
    """One recorder, killed."""
    with rig.Children() as children:
        endpoint = children.start(_service, size, RATE).answer()
        command = [sys.executable, "-m", "emstream", "record", "--input", endpoint, str(path)]
        recorder = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        try:
            while recorder.poll() is None and not _rows(path):
                time.sleep(_TICK_S)
            time.sleep(chance.uniform(0.2, 2.2))
            killed_ns = now_ns()
        finally:
            recorder.kill()
            recorder.wait()
    with Recording(path) as recording:
        tracks = (recording.raw, recording.denoised)
        whole = all(np.all(np.diff(track.numbers) == 1) and track[len(track) - 1].any() for track in tracks)
        lost_ms = [(killed_ns - int(track.arrived_ns[-1])) / 1e6 for track in tracks]
        frames = len(recording.raw)
    path.unlink()
    return {"frames": frames, "lost_ms": round(max(lost_ms), 1), "whole": bool(whole)}


def _rows(path: Path) -> int:
    if path.exists():
        try:
            with Recording(path) as recording:
                return len(recording.raw)
        except FileFormatError:
            pass
    return 0


def _service(pipe: Connection, size: int, rate: float | None) -> None:
    """Publishes pairs: at `rate`, or as far as it is told."""
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.XPUB)
    socket.sndhwm = 4096
    socket.linger = 0
    socket.bind(rig.ANYWHERE)
    pipe.send(last_endpoint(socket))
    specimen = MovingSpecimen(seed=0, dose=rig.DOSE, height=size, width=size)
    counts = rig.patterns(size, "uint8")
    expected = [np.ascontiguousarray(specimen.intensity(n), np.float32) for n in range(rig.PATTERNS)]
    for _ in range(3):  # raw, denoised and stats are subscribed to
        socket.recv()
    number, until, start_s = 0, 0, time.monotonic()
    while True:
        if rate is None:
            if pipe.poll(0 if number < until else 60):
                told = pipe.recv()
                if told is None:
                    return
                until = told
        else:
            time.sleep(max(0.0, start_s + number / rate - time.monotonic()))
        if rate is None and number >= until:
            continue
        pair = ((RAW, counts[number % rig.PATTERNS]), (DENOISED, expected[number % rig.PATTERNS]))
        for topic, pixels in pair:
            header = FrameHeader(
                number, (size, size), pixels.dtype.name, rig.SOURCE, rig.SERIES, timestamp_ns=now_ns()
            )
            message = wire.map_of(header)
            if topic == DENOISED:
                message |= {"engine": _ENGINE, "ledger": {"received": number + 1, "published": number + 1}}
            socket.send_multipart([topic, wire.pack(message), pixels])
        number += 1


def _markdown(results: dict[str, Any]) -> str:
    hour, kills = results["hour"], results["kills"]
    rows = [
        ["frames/s, raw and denoised", hour["frames_per_s"]],
        ["times a camera of 40 frames/s", hour["of_camera"]],
        ["MB/s before compression", hour["mb_per_s"]],
        ["compression", hour["compression"]],
        ["lost raw / denoised", f"{hour['lost']['raw']} / {hour['lost']['denoised']}"],
        ["unheard raw / denoised", f"{hour['unheard']['raw']} / {hour['unheard']['denoised']}"],
        ["missing", hour["missing"]],
        ["files wrong", hour["wrong"]],
    ]
    text = (
        f"{results['frames']:,} frames of {results['size']}x{results['size']}, raw uint8 and denoised float32, "
        f"in {hour['files']} files.\n\n" + report.table(["what", "measured"], rows)
    )
    if kills:
        worst = max(each["lost_ms"] for each in kills)
        text += (
            f"\n\n{len(kills)} kills: all but the last {worst:.0f} ms readable at worst "
            f"(target: {TARGET_MS} ms), {sum(not each['whole'] for each in kills)} recordings not whole."
        )
    return text


if __name__ == "__main__":
    main()
