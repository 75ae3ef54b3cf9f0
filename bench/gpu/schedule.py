"""Run the stages in turn, each in a process of its own, within the time there is; write what they find."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from bench import gpu, report
from bench.gpu import smi
from bench.gpu.stage import NO_TIME
from bench.gpu.stages import STAGES, Stage

_RESERVE_S = 6.0  # for writing and for processes to end
_POLL_S = 0.5
_DRY = "**Dry run: these figures say nothing about a GPU.**"
DONE, PARTIAL, FAILED, NOT_MEASURED = "done", "partial", "failed", "not measured"


def main(argv: list[str] | None = None, stages: Sequence[Stage] = STAGES) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu",
        description=gpu.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [stage.name for stage in stages]
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the results go")
    parser.add_argument("--stages", help=f"some of {','.join(names)} (default: all)")
    parser.add_argument("--minutes", type=float, default=9, help="in all (default: %(default)s)")
    parser.add_argument("--again", action="store_true", help="measure again what is there already")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="rehearse on the CPU: small, quick, and no number means a thing",
    )
    parser.add_argument("--commit", help="of this tree, where git cannot say")
    arguments = parser.parse_args(argv)
    chosen = arguments.stages.split(",") if arguments.stages else names
    if unknown := sorted(set(chosen) - set(names)):
        parser.error(f"no stage {', '.join(unknown)}; there are {', '.join(names)}")
    if arguments.minutes <= 0:
        parser.error(f"--minutes must be positive, got {arguments.minutes:g}")
    card = "none (dry run)" if arguments.dry_run else smi.card()
    if card is None:
        parser.error("nvidia-smi finds no GPU here; --dry-run rehearses without one")
    stamp = report.stamp("gpu", argv)
    stamp["commit"] = arguments.commit or stamp["commit"]
    try:
        schedule = Schedule(arguments.out.resolve(), stamp, card, arguments.dry_run, stages)
    except ValueError as error:
        parser.error(str(error))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    schedule.run([s for s in stages if s.name in chosen], 60 * arguments.minutes, arguments.again)
    print(schedule.markdown())
    return 0 if schedule.measured else 1


class Schedule:
    """The results in one folder, and what it takes to add to them."""

    def __init__(
        self, out: Path, stamp: Mapping[str, Any], card: str, dry: bool, stages: Sequence[Stage] = STAGES
    ) -> None:
        """Raises ValueError when the folder holds results of something else."""
        self._out, self._dry, self._all = out, dry, stages
        (out / "parts").mkdir(parents=True, exist_ok=True)
        self.results: dict[str, Any] = {**stamp, "gpu": card, "dry_run": dry, "earlier": [], "stages": {}}
        path = out / "gpu.json"
        if path.exists():
            before = json.loads(path.read_text())
            for key in ("gpu", "dry_run"):
                if before[key] != self.results[key]:
                    raise ValueError(
                        f"{out} holds results of {key} {before[key]}, and here it is {self.results[key]}; "
                        "give another folder"
                    )
            self.results["stages"] = before["stages"]
            keys = ("command", "commit", "date")
            self.results["earlier"] = [*before["earlier"], {key: before[key] for key in keys}]

    @property
    def measured(self) -> bool:
        """Whether anything was."""
        return any("why" not in row for found in self.results["stages"].values() for row in found["rows"])

    def run(self, stages: Sequence[Stage], budget_s: float, again: bool = False) -> None:
        deadline_s = time.monotonic() + budget_s - (1 if self._dry else _RESERVE_S)
        with _Log(self._out / "gpu.log") as log:
            log.line("schedule", f"{self.results['command']}; {self.results['gpu']}")
            for stage in stages:
                before = self.results["stages"].get(stage.name)
                if before and before["status"] == DONE and not again:
                    log.line(stage.name, "is done already")
                    continue
                left_s = deadline_s - time.monotonic()
                needs_s = min(1.0, stage.needs_s) if self._dry else stage.needs_s
                if left_s < needs_s:
                    if not before or again:
                        why = f"{max(0, left_s):.0f} s were left and it takes {stage.needs_s:.0f}"
                        self._keep(stage, _nothing(NOT_MEASURED, why))
                    log.line(stage.name, "not measured, no time left")
                    continue
                limit_s = min(left_s, stage.dry_s if self._dry else stage.limit_s)
                self._run(stage, limit_s, None if again else before, log)
            self._save()
            log.line("schedule", "ends")

    def _run(self, stage: Stage, limit_s: float, before: dict[str, Any] | None, log: _Log) -> None:
        log.line(stage.name, f"starts, with {limit_s:.0f} s")
        start_s = time.monotonic()
        part = self._out / "parts" / f"{stage.name}.json"
        found = {**(before or _nothing(PARTIAL)), "status": PARTIAL, "why": None, "reason": None}
        request = {
            "out": str(self._out),
            "dry": self._dry,
            "work": stage.work,
            "keys": list(stage.columns)[: stage.keys],
            "limit_s": limit_s,
            "rows": found["rows"],
            "facts": found["facts"],
            "known": self.results["stages"],
        }
        part.write_text(json.dumps(request))
        changed = part.stat().st_mtime_ns

        def gather() -> None:
            nonlocal changed
            if (now := part.stat().st_mtime_ns) != changed:
                changed = now
                found.update(json.loads(part.read_text()))
                found["seconds"] = round(time.monotonic() - start_s, 1)
                self._keep(stage, found)

        command = [sys.executable, "-c", "from bench.gpu.stage import main; main()", str(part)]
        process = subprocess.Popen(
            command,
            cwd=report.ROOT,
            env=self._environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        listening = threading.Thread(target=log.follow, args=(stage.name, process.stdout), daemon=True)
        listening.start()
        try:
            while process.poll() is None and time.monotonic() - start_s < limit_s:
                try:
                    process.wait(_POLL_S)
                except subprocess.TimeoutExpired:
                    gather()
            in_time = process.poll() is not None
        finally:
            _kill(process)
        listening.join(timeout=5)
        if process.stdout and not listening.is_alive():
            process.stdout.close()
        gather()
        found["seconds"] = round(time.monotonic() - start_s, 1)
        found["status"], found["why"] = _outcome(process.returncode, in_time, limit_s, found, log)
        del found["reason"]
        part.unlink()
        self._keep(stage, found)
        log.line(stage.name, f"{found['status']} after {found['seconds']} s; {found['why'] or 'no error'}")

    def _environment(self) -> dict[str, str]:
        """Plans, kernels and compiled code are kept with the results, so that they are made just once."""
        cache = self._out / "cache"
        return {
            **os.environ,
            "XDG_CACHE_HOME": str(cache),
            "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
            "TRITON_CACHE_DIR": str(cache / "triton"),
            "PYTHONUNBUFFERED": "1",
            "PYTHONFAULTHANDLER": "1",
        }

    def _keep(self, stage: Stage, found: dict[str, Any]) -> None:
        self.results["stages"][stage.name] = found
        self._save()

    def _save(self) -> None:
        report.save("gpu", "GPU", self.results, self.markdown(), self._out)

    # -- on paper ----------------------------------------------------------------

    def markdown(self) -> str:
        parts = [_DRY] if self._dry else []
        parts.append(f"GPU: {self.results['gpu']}.")
        if earlier := self.results["earlier"]:
            parts.append("Some rows are of earlier calls: " + "; ".join(each["command"] for each in earlier))
        found = self.results["stages"]
        targets = [
            [stage.name, each["what"], each["measured"] or "not measured", each["target"], each["met"]]
            for stage in self._all
            for each in found.get(stage.name, {}).get("targets", [])
        ]
        if targets:
            parts += ["## Targets", report.table(["stage", "what", "measured", "target", "met"], targets)]
        for stage in self._all:
            if stage.name in found:
                title = "CUDA" if stage.name == "cuda" else stage.name.capitalize()
                parts += [f"## {title}", *self._section(stage, found[stage.name])]
        return "\n\n".join(parts)

    def _section(self, stage: Stage, found: Mapping[str, Any]) -> Iterator[str]:
        yield stage.question
        if found["status"] != DONE:
            yield f"**{found['status'].capitalize()}**" + (f": {found['why']}" if found["why"] else "")
        if rows := found["rows"]:
            reasons = any("why" in row for row in rows)
            titles = [*stage.columns.values(), *(["not measured because"] if reasons else [])]
            keys = [*stage.columns, *(["why"] if reasons else [])]
            yield report.table(titles, [[row.get(key) for key in keys] for row in rows])
        yield from found["notes"]


def _nothing(status: str, why: str | None = None) -> dict[str, Any]:
    return {"status": status, "why": why, "seconds": 0.0, "rows": [], "notes": [], "facts": {}, "targets": []}


def _outcome(
    code: int, in_time: bool, limit_s: float, found: Mapping[str, Any], log: _Log
) -> tuple[str, str | None]:
    """Status, and why it is not done."""
    if not in_time:
        return PARTIAL, f"stopped after {limit_s:.0f} s"
    if code < 0:
        return FAILED, f"ended by {signal.Signals(-code).name}; {' / '.join(log.last)}"
    if code:
        return FAILED, " / ".join(log.last) or f"exit code {code}"
    if found["reason"]:
        return NOT_MEASURED, found["reason"]
    if any(row.get("why") == NO_TIME for row in found["rows"]):
        return PARTIAL, NO_TIME
    return DONE, None


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a stage and everything it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdin:
        process.stdin.close()


class _Log:
    """Lines with the time of day, how long it has been, and which stage; kept and printed."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a")
        self._start_s = time.monotonic()
        self._lock = threading.Lock()
        self.last: deque[str] = deque(maxlen=3)
        """The last lines of the stage that runs or ran last."""

    def line(self, stage: str, text: str) -> None:
        now = datetime.now(UTC).strftime("%H:%M:%S")
        line = f"{now} {time.monotonic() - self._start_s:7.1f} s  {stage:11s}  {text}"
        with self._lock:
            self._file.write(line + "\n")
            self._file.flush()
            print(line, file=sys.stderr, flush=True)

    def follow(self, stage: str, stream: IO[bytes]) -> None:
        self.last.clear()
        for raw in stream:
            text = raw.decode(errors="replace").rstrip()
            if text.strip() and not text.startswith("Extension modules:"):  # the end of a crash report
                self.last.append(text.strip()[:400])
                self.line(stage, text)

    def __enter__(self) -> _Log:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
