"""What is left of the ledger, the frames and the recording when everything around a service misbehaves?

Each schedule, seeded, is a service of its own (identity engine, recorder beside it, overrun block) and a
random sequence of: the camera dies in mid-message and comes back with a new series; a viewer is killed; one
stops reading; the recorder is killed, or meets a full disk; the whole service stands still (SIGSTOP); a flood
of garbage; frames of other sizes; time stamps that jump. In every other schedule the engine is elsewhere, on two
inference servers (`bench.kserve`), of which one is killed, both are, or one stands still. Every frame carries a
checksum of its pixels.

Exact: the ledger adds up; every frame published was sent, in order, once, with its own pixels; all
that was received came out, but for what failed because both inference servers were killed; what the recordings
hold together are frames that were published, in order, once, unaltered, and all of them but those that the
recorder's report says were lost or never heard, which there are only if it was killed or its disk was full. Back:
from the end of an event to the next published frame; after the recorder was killed, from then to the next
recorded one; after an inference server was killed, from then, and after both were, from when they are there again.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import re
import resource
import signal
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import zmq

from bench import kserve, malformed, report
from bench.kserve import Server
from bench.program import Program
from emstream import wire
from emstream.errors import FileFormatError
from emstream.frame import FrameHeader, now_ns
from emstream.publish import DENOISED, RAW
from emstream.recording import Recording

TARGET_S = 2.0
_SIZES = ((64, 64), (64, 64), (128, 96), (33, 47))
_PATIENCE_S = 30.0
_RECONNECTED_S = 1.2  # a service finds out within a second that a server is back


def main(argv: list[str] | None = None) -> dict[str, Any]:
    argv = sys.argv[1:] if argv is None else argv
    parser = report.parser("chaos", __doc__)
    parser.add_argument("--schedules", type=int, default=200, help="(default: %(default)s)")
    parser.add_argument("--events", type=int, default=6, help="in each schedule (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the first schedule (default: %(default)s)")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.schedules = min(arguments.schedules, 2)
    results: dict[str, Any] = {**report.stamp("chaos", argv), "events": arguments.events, "schedules": []}
    with report.progress("chaos", arguments.schedules) as show:
        for n in range(arguments.schedules):
            show(n, f"schedule {arguments.seed + n}")
            results["schedules"].append(schedule(arguments.seed + n, arguments))
    results["back_s"] = report.percentiles(
        [event["back_s"] for each in results["schedules"] for event in each["events"]]
    )
    results["exact"] = sum(not each["wrong"] for each in results["schedules"])
    report.write("chaos", "Chaos", results, _markdown(results), arguments)
    return results


@dataclass
class Stage:
    """A service, its camera and a subscriber that checks everything."""

    folder: Path
    rng: random.Random
    engines: Sequence[Server] = ()
    """Inference servers; without any, the service has an engine of its own."""
    context: zmq.Context[zmq.Socket[bytes]] = field(default_factory=zmq.Context)
    sent: set[tuple[int, int]] = field(default_factory=set)
    seen: list[tuple[int, int]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    garbage: int = 0
    series: int = 0
    frame: int = 0
    disk_was_full: bool = False
    engines_were_gone: bool = False
    killed_ns: list[int] = field(default_factory=list)
    """When the recorder was killed [ns since the Unix epoch]."""
    recording: dict[str, Any] = field(default_factory=dict)
    """What the service says of its recorder."""
    last_s: float = 0.0
    """When a frame was published last [monotonic]."""

    def __post_init__(self) -> None:
        self.camera: zmq.Socket[bytes] | None = None
        self.appear()
        hosts = ",".join(server.host for server in self.engines)
        engine = f"grpc://{hosts}/{kserve.MODEL}" if hosts else "identity"
        self.program = Program(
            self.folder, "--engine", engine, "--overrun", "block", "--slots", "64", "--queue", "1000000",
            "--queue-mib", "100000",
            "--input", f"pull+ipc://{self.folder}/camera", "--output", f"ipc://{self.folder}/out",
            "--expect", "64x64:uint8", "--record", str(self.folder / "run.h5"), "--control", f"ipc://{self.folder}/control",
        )  # fmt: skip
        self.service = self.program.process
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._subscribe)
        self._ready = threading.Event()
        self._thread.start()
        self._ready.wait(_PATIENCE_S)

    # -- the camera -----------------------------------------------------------------

    def appear(self) -> None:
        self.camera = self.context.socket(zmq.PUSH)
        self.camera.linger = 0
        self.camera.sndhwm = 1000
        self.camera.sndtimeo = int(1000 * _PATIENCE_S)
        self.camera.bind(f"ipc://{self.folder}/camera")
        self.series, self.frame = self.series + 1, 0

    def vanish(self) -> None:
        assert self.camera
        self.camera.close(linger=0)
        with contextlib.suppress(FileNotFoundError):
            (self.folder / "camera").unlink()

    def send(
        self, count: int = 1, shape: tuple[int, int] = (64, 64), timestamp_ns: int | None = None
    ) -> None:
        assert self.camera
        for _ in range(count):
            number, self.frame = self.frame, self.frame + 1
            pixels = np.random.default_rng((self.series, number)).integers(0, 255, shape, np.uint8)
            header = FrameHeader(
                frame=number, shape=shape, type="uint8", source="chaos", series=self.series,
                timestamp_ns=timestamp_ns, extra={"crc": zlib.crc32(pixels.tobytes())},
            )  # fmt: skip
            self.sent.add((self.series, number))
            self.camera.send_multipart([b"raw", wire.pack(wire.map_of(header)), pixels.tobytes()])

    def rubbish(self, parts: list[bytes]) -> None:
        assert self.camera
        self.garbage += 1
        self.camera.send_multipart(parts)

    # -- what is published -------------------------------------------------------------

    def _subscribe(self) -> None:
        socket = self.context.socket(zmq.SUB)
        socket.rcvhwm = 0
        socket.linger = 0
        socket.connect(f"ipc://{self.folder}/out")
        for topic in (DENOISED, b"stats"):
            socket.subscribe(topic)
        while not (self._stop.is_set() and not socket.poll(200)):
            if not socket.poll(100):
                continue
            parts = socket.recv_multipart()
            self._ready.set()  # statistics come before the first frame
            head = wire.unpack(parts[1])
            self.recording = head.get("recording") or self.recording
            if head["htype"] == wire.FRAME:
                self._check(head, np.frombuffer(parts[2], np.float32))
                self.last_s = time.monotonic()
        socket.close()

    def _check(self, head: dict[str, Any], pixels: np.ndarray) -> None:
        key = (head["series"], head["frame"])
        if key not in self.sent:
            self.wrong.append(f"{key} was published and never sent")
        if self.seen and key <= self.seen[-1]:
            self.wrong.append(f"{key} was published after {self.seen[-1]}")
        if zlib.crc32(pixels.astype(np.uint8).tobytes()) != head["crc"]:
            self.wrong.append(f"{key} was published with other pixels")
        counted = head["ledger"]
        if counted["received"] != sum(
            counted[name] for name in ("published", "dropped", "rejected", "failed", "in_flight")
        ):
            self.wrong.append(f"the ledger of {key} does not add up: {counted}")
        self.seen.append(key)

    # -- events --------------------------------------------------------------------------

    def camera_dies(self) -> None:
        self.send(self.rng.randrange(1, 200))
        self.vanish()
        time.sleep(self.rng.uniform(0, 0.5))
        self.appear()

    def viewer_is_killed(self) -> None:
        viewer = self.context.socket(zmq.SUB)
        viewer.connect(f"ipc://{self.folder}/out")
        viewer.subscribe(b"")
        self.send(self.rng.randrange(1, 100))
        viewer.close(linger=0)

    def viewer_stops_reading(self) -> None:
        viewer = self.context.socket(zmq.SUB)
        viewer.rcvhwm = 1
        viewer.connect(f"ipc://{self.folder}/out")
        viewer.subscribe(RAW)
        self.send(300)
        viewer.close(linger=0)

    def recorder_is_killed(self) -> float | None:
        """Returns how soon another one recorded, if it should [s]."""
        recorder = self._recorder()
        self.killed_ns.append(now_ns())
        recorder.kill()
        if self.disk_was_full:  # nobody tells it to record again
            self.send(50)
            return None
        died = len(self.killed_ns)

        def goes_on() -> bool:
            self.send()
            time.sleep(0.01)
            return self.recording.get("died") == died and self.recording["state"] == "recording"

        self._wait(goes_on, "another recorder")
        return (now_ns() - self.killed_ns[-1]) / 1e9

    def disk_is_full(self) -> None:
        recorder = self._recorder()
        sizes = [
            Path(file.path).stat().st_size for file in recorder.open_files() if file.path.endswith(".h5")
        ]
        if sizes:
            self.disk_was_full = True
            recorder.rlimit(resource.RLIMIT_FSIZE, (max(sizes) + 1000, resource.RLIM_INFINITY))
        self.send(200)

    def service_stands_still(self) -> None:
        self.service.send_signal(signal.SIGSTOP)
        with contextlib.suppress(zmq.Again):
            self.send(self.rng.randrange(1, 200))
        time.sleep(self.rng.uniform(0.2, 3.0))
        self.service.send_signal(signal.SIGCONT)

    def garbage_floods_in(self) -> None:
        for _ in range(self.rng.randrange(1, 500)):
            self.rubbish(malformed.message(self.rng)[1])

    def frames_change_their_size(self) -> None:
        for _ in range(self.rng.randrange(1, 8)):
            self.send(self.rng.randrange(1, 30), self.rng.choice(_SIZES))

    def clock_jumps(self) -> None:
        for jump_s in (-3600, 3600, -(10**9), 10**9):
            self.send(5, timestamp_ns=max(0, now_ns() + jump_s * 10**9))

    def engine_is_killed(self) -> float:
        """The other one does its work; returns how soon a frame came out [s]."""
        server = self.rng.choice(self.engines)
        self.send(self.rng.randrange(1, 100))
        server.kill()
        back_s = self.back_s()
        server.start()
        time.sleep(_RECONNECTED_S)
        return back_s

    def engines_are_killed(self) -> float:
        """Returns how soon after they are there again a frame came out [s]."""
        self.engines_were_gone = True
        for server in self.engines:
            server.kill()
        self.send(self.rng.randrange(1, 100))
        for server in self.engines:
            server.start()
        begin, before = time.monotonic(), len(self.seen)

        def goes_on() -> bool:
            self.send()
            time.sleep(0.01)
            return len(self.seen) > before

        self._wait(goes_on, "a frame from an engine that is back")
        back_s = self.last_s - begin
        time.sleep(_RECONNECTED_S)
        return back_s

    def engine_stands_still(self) -> None:
        server = self.rng.choice(self.engines)
        server.process.send_signal(signal.SIGSTOP)
        self.send(self.rng.randrange(1, 100))
        time.sleep(self.rng.uniform(0.2, 3.0))
        server.process.send_signal(signal.SIGCONT)

    def _recorder(self) -> psutil.Process:
        """The one process of the service's own that is none of Python's."""
        found: list[psutil.Process] = []

        def is_there() -> bool:
            with contextlib.suppress(psutil.Error):
                children = psutil.Process(self.service.pid).children()
                found.extend(child for child in children if "spawn_main" in " ".join(child.cmdline()))
            return bool(found)

        self._wait(is_there, "a recorder")
        return found[-1]

    # -- in the end -------------------------------------------------------------------------

    def back_s(self) -> float:
        """From now to the next published frame."""
        begin, before = time.monotonic(), len(self.seen)
        self.send(20)
        self._wait(lambda: len(self.seen) > before, "a frame to come out again")
        return self.last_s - begin if self.last_s > begin else 0.0

    def finish(self) -> dict[str, Any]:
        """Let everything come out, end the service, and check what it says and what it recorded."""
        last = (self.series, self.frame - 1)
        self._wait(lambda: bool(self.seen) and self.seen[-1] == last, "the last frame")
        said = self.program.end()
        self._stop.set()
        self._thread.join()
        self.vanish()
        self.context.destroy(linger=0)
        counted = said["ledger"]
        if counted["in_flight"] or counted["dropped"] or (counted["failed"] and not self.engines_were_gone):
            self.wrong.append(f"frames did not come out: {counted}")
        if counted["received"] != counted["published"] + counted["rejected"] + counted["failed"]:
            self.wrong.append(f"the ledger does not add up: {counted}")
        if counted["published"] != len(self.seen):
            self.wrong.append(f"{counted['published']} frames published and {len(self.seen)} seen")
        if counted["rejected"] > self.garbage:
            self.wrong.append(f"{counted['rejected']} messages rejected, {self.garbage} were garbage")
        self._check_recording(said["recording"], counted["published"])
        return dict(counted)

    def _check_recording(self, said: dict[str, Any], published: int) -> None:
        recordings = []
        for path in self.folder.glob("run*.h5"):
            with contextlib.suppress(
                FileFormatError
            ):  # killed before it held a frame: its report knows of none
                recordings.append(Recording(path))
        recorded = []
        for recording in sorted(recordings, key=lambda each: int(each.raw.arrived_ns[0])):
            with recording:
                for row in range(len(recording.raw)):
                    header, pixels = recording.raw.header(row), recording.raw[row]
                    if zlib.crc32(pixels.tobytes()) != header["crc"]:
                        self.wrong.append(f"row {row} of {recording.path.name} was altered")
                    recorded.append((header["series"], header["frame"]))
        if recorded != sorted(set(recorded)) or not set(recorded) <= set(self.seen):
            self.wrong.append("frames were recorded that were not published, or twice, or out of order")
        if said["frames"]["raw"] != len(recorded):
            self.wrong.append(f"{len(recorded)} frames recorded, {said['frames']['raw']} reported")
        if self.disk_was_full:
            return
        for track in ("raw", "denoised"):
            counts = {name: said[name][track] for name in ("frames", "lost", "unheard")}
            if sum(counts.values()) != published:
                self.wrong.append(f"{published} frames published, and of {track} ones {counts}")
        if not self.killed_ns and recorded != self.seen:
            self.wrong.append(f"{len(self.seen)} frames published and {len(recorded)} recorded")

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        deadline_s = time.monotonic() + _PATIENCE_S
        while not condition():
            if time.monotonic() > deadline_s or not self.program.lives:
                log = self.program.log_path.read_text()[-2000:]
                raise RuntimeError(f"waiting for {what} in vain; {len(self.seen)} frames seen\n{log}")
            time.sleep(0.002)


EVENTS: tuple[Callable[[Stage], float | None], ...] = (
    Stage.camera_dies, Stage.viewer_is_killed, Stage.viewer_stops_reading, Stage.recorder_is_killed,
    Stage.disk_is_full, Stage.service_stands_still, Stage.garbage_floods_in, Stage.frames_change_their_size,
    Stage.clock_jumps,
)  # fmt: skip
EVENTS_OF_SERVERS = (Stage.engine_is_killed, Stage.engines_are_killed, Stage.engine_stands_still)


def schedule(seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """One schedule: which events, how soon the service was back after each, and what was wrong."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        servers = [Server() for _ in range(2 * (seed % 2))]
        for server in servers:
            stack.callback(server.kill)
        stage = Stage(Path(name), rng, servers)
        kinds = EVENTS + (EVENTS_OF_SERVERS if servers else ())
        events = []
        try:
            stage.send(20)
            for _ in range(arguments.events):
                event = rng.choice(kinds)
                recording_s = event(stage)
                back_s = stage.back_s() if recording_s is None else recording_s
                events.append({"event": event.__name__, "back_s": round(back_s, 3)})
            counted = stage.finish()
        finally:
            stage.service.kill()
            stage._stop.set()
        return {"seed": seed, "events": events, "ledger": counted, "wrong": stage.wrong[:5]}


def _markdown(results: dict[str, Any]) -> str:
    schedules = results["schedules"]
    kinds: dict[str, list[float]] = {}
    for each in schedules:
        for event in each["events"]:
            kinds.setdefault(event["event"], []).append(event["back_s"])
    rows = [
        (re.sub("_", " ", kind), len(times), float(np.median(times)), max(times))
        for kind, times in sorted(kinds.items())
    ]
    frames = sum(each["ledger"]["received"] for each in schedules)
    wrong = [f"\n- schedule {each['seed']}: {each['wrong']}" for each in schedules if each["wrong"]]
    return (
        f"{results['exact']} of {len(schedules)} schedules of {results['events']} events exact, {frames:,} "
        "messages.\n\n"
        + report.table(("event", "times", "back after [s], median", "longest"), rows)
        + f"\n\nTarget: back within {TARGET_S:g} s."
        + "".join(wrong)
    )


if __name__ == "__main__":
    main()
