"""Do the frames of cameras that others wrote arrive whole, and does the service outlive them?

Three simulators, each a process of its own, in front of a service with the identity engine:

**pvapy-ad-sim-server** (pvaPy, EPICS PVAccess), **libertem-live-mib-sim** (LiberTEM-live, Merlin), and
**libertem_dectris.DectrisSim** (LiberTEM, DECTRIS Stream V1).

    python3 -m venv simulators && simulators/bin/pip install pvapy libertem-live libertem-dectris
    python -m bench.interop --simulators simulators/bin

(LiberTEM-live takes a minute and 1.3 GB. What is not installed is left out, and said.)

**whole**: the simulator plays through. Its own count, where it has one, and the ledger must agree.

**killed**: the simulator is killed in the middle of a series and started again, twice. A subscriber compares
every raw frame with what the simulator was given. Frames of each life are numbered without a gap.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zmq

from bench import messages, report, rig
from emstream import wire
from emstream.intake import Overrun
from emstream.serve import Settings

PATTERNS = 16
_PATIENCE_S = 60.0
_LIVES = 3
# On this machine only, whoever else is on the network.
_EPICS = {
    "EPICS_PVAS_INTF_ADDR_LIST": "127.0.0.1",
    "EPICS_PVA_ADDR_LIST": "127.0.0.1",
    "EPICS_PVA_AUTO_ADDR_LIST": "NO",
}
_PACKAGES = ("pvapy", "libertem-live", "libertem-dectris")
_V1 = """
import sys, libertem_dectris
simulator = libertem_dectris.DectrisSim.new_mocked(sys.argv[1], int(sys.argv[2]))
simulator.send_headers()
simulator.send_frames()
simulator.send_footer()
sys.stdin.read()
"""


@dataclass(frozen=True)
class Case:
    """One simulator and what it is to do."""

    name: str
    program: str
    command: list[str]
    input: str
    kind: str
    """``whole`` or ``killed``."""
    pictures: np.ndarray | None = None
    """(N, H, W), what it was given, to compare with."""
    frames: int | None = None
    """That it plays and that must arrive; None is what it says itself."""
    expect: str | None = None
    overrun: Overrun | None = None


def main(argv: list[str] | None = None) -> dict[str, Any]:
    argv = sys.argv[1:] if argv is None else argv
    parser = report.parser("interop", __doc__)
    parser.add_argument(
        "--simulators",
        type=Path,
        default=Path(sys.executable).parent,
        metavar="BIN",
        help="where their programs are (default: beside this Python)",
    )
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="of the whole series (default: %(default)s)"
    )
    parser.add_argument(
        "--rate", type=float, default=100.0, help="of PVAccess, frames/s (default: %(default)s)"
    )
    parser.add_argument("--size", type=int, default=1024, help="frames of SIZE x SIZE (default: %(default)s)")
    parser.add_argument(
        "--only", nargs="+", default=["pva", "merlin", "dectris1"], help="(default: %(default)s)"
    )
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.seconds, arguments.size = min(arguments.seconds, 2.0), min(arguments.size, 64)
    os.environ.update(_EPICS)
    bin = arguments.simulators.resolve()
    results: dict[str, Any] = {**report.stamp("interop", argv), "cases": [], "not_installed": []}
    results["simulators"] = _versions(bin)
    with tempfile.TemporaryDirectory() as folder:
        cases = [
            case
            for name, make in {"pva": _pva, "merlin": _merlin, "dectris1": _dectris1}.items()
            if name in arguments.only
            for case in make(bin, Path(folder), arguments)
        ]
        with report.progress("interop", len(cases)) as show:
            for n, case in enumerate(cases):
                show(n, f"{case.name}, {case.kind}")
                if not _installed(case):
                    if case.program not in results["not_installed"]:
                        results["not_installed"].append(case.program)
                    continue
                results["cases"].append(run(case))
    report.write("interop", "Cameras that others wrote", results, _markdown(results), arguments)
    return results


def run(case: Case) -> dict[str, Any]:
    """Play `case`; raises RuntimeError where frames are wrong or the ledger does not add up."""
    settings = Settings(
        input=case.input,
        output=rig.ANYWHERE,
        engine="identity",
        overrun=case.overrun,
        slots=16,
        max_batch=8,
        expect=case.expect,
        queue=4000,
        queue_bytes=2**40,
    )
    with rig.Children() as children:
        service = children.start(rig.service, settings)
        endpoint, _ = service.answer()
        ear = _Ear(endpoint, case.pictures if case.kind == "killed" else None)
        try:
            said = _play_whole(case, ear) if case.kind == "whole" else _play_and_kill(case, ear)
        finally:
            service.stop()
        final = service.answer()
        ear.close()
    ledger = final["ledger"]
    settled = sum(ledger[key] for key in ("published", "dropped", "rejected", "failed", "in_flight"))
    found = {
        "camera": case.name,
        "kind": case.kind,
        "simulator": case.program,
        "sent": said["sent"],
        "lives": said["lives"],
        "frames_per_s": said["frames_per_s"],
        "series": ear.series,
        "compared": ear.compared,
        "wrong": ear.wrong,
        "exact": ledger["received"] == settled and ledger["in_flight"] == 0,
        "ledger": ledger,
    }
    if ear.wrong or not found["exact"]:
        raise RuntimeError(f"{case.name}: {found}")
    return found


def _play_whole(case: Case, ear: _Ear) -> dict[str, Any]:
    with _Simulator(case) as simulator:
        first_s = ear.until(lambda: ear.received > 0, simulator)
        begun = ear.received
        if case.frames:
            last_s = ear.until(lambda: ear.received >= (case.frames or 0), simulator)
            sent, said = case.frames, None
        else:
            ear.until(lambda: simulator.ended, None, patience_s=600)
            last_s = ear.until(ear.quiet, None)
            sent, said = simulator.published()
        rate = said or (ear.received - begun) / max(last_s - first_s, 1e-9)
    return {"sent": sent, "lives": 1, "frames_per_s": round(rate, 1)}


def _play_and_kill(case: Case, ear: _Ear) -> dict[str, Any]:
    """Frames of each life are numbered on without a gap, from wherever the source came in."""
    rates = []
    for life in range(_LIVES):
        with _Simulator(case) as simulator:
            known = len(ear.series)
            first_s = ear.until(lambda known=known: len(ear.series) > known, simulator)  # type: ignore[misc]
            before = ear.frames
            last_s = ear.until(lambda before=before: ear.frames >= before + 150, simulator)  # type: ignore[misc]
            rates.append(150 / (last_s - first_s))
            if life < _LIVES - 1:
                simulator.kill()
    ear.until(ear.quiet, None)
    return {"sent": None, "lives": _LIVES, "frames_per_s": round(float(np.median(rates)), 1)}


class _Ear:
    """Hears what the service says, and sees its raw frames where there are pictures to compare with."""

    def __init__(self, endpoint: str, pictures: np.ndarray | None) -> None:
        self._pictures = pictures
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.SUB)
        self._socket.rcvhwm = 0
        self._socket.connect(endpoint)
        for topic in (b"stats", b"raw") if pictures is not None else (b"stats",):
            self._socket.subscribe(topic)
        self.received = self.frames = self.compared = self.wrong = 0
        self.series: list[int] = []
        """Frames of each."""
        self._last_s = time.monotonic()
        """When the count grew last."""

    def until(
        self, done: Callable[[], bool], simulator: _Simulator | None, patience_s: float = _PATIENCE_S
    ) -> float:
        """Listen until `done`; returns when the last frame came [s]. The simulator must live on meanwhile."""
        deadline_s = time.monotonic() + patience_s
        while not done():
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"nothing more came after {self.received} frames within {patience_s:g} s")
            if simulator and simulator.ended and not done():
                raise RuntimeError(f"the simulator ended:\n{simulator.log()}")
            if self._socket.poll(50):
                self._hear(self._socket.recv_multipart())
        return self._last_s

    def quiet(self) -> bool:
        return time.monotonic() - self._last_s > 2.5

    def _hear(self, parts: list[bytes]) -> None:
        message = wire.unpack(parts[1])
        if parts[0] == b"stats":
            received = message["ledger"]["received"]
            if received > self.received:
                self.received, self._last_s = received, time.monotonic()
        elif message["htype"] == wire.START:
            self.series.append(0)
            self._last_s = time.monotonic()
        elif message["htype"] == wire.FRAME:
            assert self._pictures is not None
            self.frames, self._last_s = self.frames + 1, time.monotonic()
            self.series[-1] += 1
            pixels = np.frombuffer(parts[2], message["type"]).reshape(message["shape"])
            if len(self._pictures):
                self.compared += 1
                self.wrong += not np.array_equal(pixels, self._pictures[(message["frame"] - 1) % PATTERNS])

    def close(self) -> None:
        self._socket.close(linger=0)


class _Simulator:
    """The process; what it says goes to a file."""

    def __init__(self, case: Case) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            case.command, stdin=subprocess.PIPE, stdout=self._file, stderr=subprocess.STDOUT
        )

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def log(self) -> str:
        self._file.seek(0)
        return self._file.read().decode(errors="replace")[-3000:]

    def published(self) -> tuple[int, float]:
        """Frames and frames/s, as it says itself."""
        match = re.search(r"Published frames:\s+(\d+) @ ([\d.]+) fps", self.log())
        if not match:
            raise RuntimeError(f"the simulator does not say what it sent:\n{self.log()}")
        return int(match[1]), float(match[2])

    def __enter__(self) -> _Simulator:
        return self

    def __exit__(self, *_: object) -> None:
        if not self.ended:
            self.kill()
        assert self._process.stdin
        self._process.stdin.close()
        self._file.close()


def _pva(bin: Path, folder: Path, arguments: Any) -> list[Case]:
    """A whole series at full size, and one of small frames that are known."""
    program = "pvapy-ad-sim-server"
    pictures = _pictures(128)
    np.save(folder / "pictures.npy", pictures)
    options = ["-dc", "-std", "2", "-shd", "1", "-rp", "0", "-cs", "50"]
    whole = [
        str(bin / program), "-cn", "bench:whole", "-nx", str(arguments.size), "-ny", str(arguments.size),
        "-dt", "uint16", "-mx", "20", "-nf", "50", "-fps", str(arguments.rate), "-rt", str(arguments.seconds), *options,
    ]  # fmt: skip
    small = [
        str(bin / program), "-cn", "bench:killed", "-if", str(folder / "pictures.npy"), "-fps", "100",
        "-rt", "600", *options,
    ]  # fmt: skip
    size = f"{arguments.size}x{arguments.size}:uint16"
    return [
        Case("PVAccess", program, whole, "pva://bench:whole", "whole", expect=size),
        Case("PVAccess", program, small, "pva://bench:killed", "killed", pictures, expect="128x128:uint16"),
    ]


def _merlin(bin: Path, folder: Path, arguments: Any) -> list[Case]:
    """A recording of MIB that LiberTEM reads and sends again and again."""
    program = "libertem-live-mib-sim"
    pictures = _pictures(256)
    (folder / "pictures.hdr").write_bytes(messages.mib_acquisition(PATTERNS))
    (folder / "pictures.mib").write_bytes(
        b"".join(messages.mib_frame(n + 1, each) for n, each in enumerate(pictures))
    )
    runs = max(1, round(arguments.seconds / 3 * 500 / PATTERNS))
    port, *others = _free_ports(3)
    common = [
        str(bin / program), str(folder / "pictures.hdr"), "--nav-shape", "4", "4", "--host", "127.0.0.1",
        "--data-port", str(port), "--control-port", str(others[0]), "--trigger-port", str(others[1]),
        "--continuous", "--dwelltime", "2000",
    ]  # fmt: skip
    about = {"input": f"merlin://127.0.0.1:{port}", "expect": "256x256:uint16", "overrun": Overrun.block}
    return [
        Case(
            "Merlin",
            program,
            [*common, "--max-runs", str(runs)],
            kind="whole",
            frames=runs * PATTERNS,
            **about,
        ),  # type: ignore[arg-type]
        Case("Merlin", program, common, kind="killed", pictures=pictures, **about),  # type: ignore[arg-type]
    ]


def _dectris1(bin: Path, folder: Path, arguments: Any) -> list[Case]:
    """Compressed frames of LiberTEM's own making."""
    frames = 1000 if arguments.quick else 10_000
    (port,) = _free_ports(1)
    address = f"tcp://127.0.0.1:{port}"
    command = [str(bin / "python"), "-c", _V1, address]
    about = {"input": f"dectris1://127.0.0.1:{port}", "overrun": Overrun.block}
    return [
        Case("DECTRIS V1", "libertem_dectris", [*command, str(frames)], kind="whole", frames=frames, **about),  # type: ignore[arg-type]
        Case(
            "DECTRIS V1",
            "libertem_dectris",
            [*command, str(frames)],
            kind="killed",
            pictures=np.empty(0),
            **about,
        ),  # type: ignore[arg-type]
    ]


def _versions(bin: Path) -> dict[str, str]:
    """Of what is installed in that environment."""
    ask = (
        "import json, sys; from importlib import metadata\n"
        "print(json.dumps({n: metadata.version(n) for n in sys.argv[1:]"
        " if any(d.name == n for d in metadata.distributions())}))"
    )
    done = subprocess.run([bin / "python", "-c", ask, *_PACKAGES], capture_output=True, text=True)
    versions: dict[str, str] = json.loads(done.stdout) if done.returncode == 0 else {}
    return versions


def _installed(case: Case) -> bool:
    if case.program == "libertem_dectris":
        tried = [case.command[0], "-c", "import libertem_dectris"]
        return Path(case.command[0]).exists() and subprocess.run(tried, capture_output=True).returncode == 0
    return Path(case.command[0]).exists()


def _pictures(size: int) -> np.ndarray:
    return np.random.default_rng(0).poisson(3.0, (PATTERNS, size, size)).astype(np.uint16)


def _free_ports(count: int) -> list[int]:
    taken = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in taken]
    for each in taken:
        each.close()
    return ports


def _markdown(results: dict[str, Any]) -> str:
    rows = [
        [
            each["camera"],
            each["simulator"],
            "whole series" if each["kind"] == "whole" else f"killed {each['lives'] - 1} times",
            each["sent"],
            *(each["ledger"][key] for key in ("received", "published", "missing", "dropped", "rejected")),
            each["frames_per_s"],
            " + ".join(f"{count:,}" for count in each["series"]) or "-",
            each["compared"],
            each["wrong"],
        ]
        for each in results["cases"]
    ]
    columns = ["camera", "simulator", "what", "sent, as it says", "received", "published", "missing", "dropped",
               "rejected", "frames/s", "series seen", "compared", "wrong"]  # fmt: skip
    left = ", ".join(results["not_installed"])
    versions = ", ".join(f"{name} {version}" for name, version in results["simulators"].items())
    return (
        f"{report.table(columns, rows)}\n\n{versions}. Every ledger adds up, with nothing in flight at the end."
        + (f" Not installed, so not run: {left}." if left else "")
    )


if __name__ == "__main__":
    main()
