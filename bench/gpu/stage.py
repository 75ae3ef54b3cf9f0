"""A stage's own process: what its function may use, and how it hands over every row as soon as it has it.

`schedule` starts `main` with PART.json, which says what is to be done and what is known; rows,
notes and targets go back into it.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from bench import rig

NO_TIME = "no time left"
_PATIENCE = 3  # failures in a row after which the rest of a sweep is given up; a hang is as bad as all
_KEPT_TEXT = 400  # characters of a reason
Job = dict[str, Any]


class NotMeasured(Exception):
    """Why there is no number, where nothing is broken: a package is missing, a network has no file."""


@dataclass(frozen=True)
class Setting:
    """What every process of a stage is told."""

    out: Path
    dry: bool

    @property
    def models(self) -> Path:
        return self.out / "models"


class Context:
    """What a stage's function gets."""

    def __init__(self, part: Path) -> None:
        request = json.loads(part.read_text())
        self.setting = Setting(Path(request["out"]), request["dry"])
        self.known: dict[str, dict[str, Any]] = request["known"]
        """What the stages before found, by stage."""
        self.facts: dict[str, Any] = request["facts"]
        self.rows: list[dict[str, Any]] = request["rows"]
        self._keys: list[str] = request["keys"]
        self._part = part
        self._notes: list[str] = []
        self._targets: list[dict[str, Any]] = []
        self._reason: str | None = None
        self._deadline_s = time.monotonic() + request["limit_s"]

    @property
    def dry(self) -> bool:
        return self.setting.dry

    @property
    def left_s(self) -> float:
        """Seconds left to this stage, less what it takes to end in good order."""
        return self._deadline_s - time.monotonic() - (2 if self.dry else 6)

    # -- what is found -----------------------------------------------------------

    def row(self, **values: Any) -> None:
        """A row; it replaces the one of the same keys. `why` says why its numbers are missing."""
        self.rows = [row for row in self.rows if not self._same(row, values)] + [values]
        print(", ".join(f"{name} {value}" for name, value in values.items() if value is not None))
        self._save()

    def find(self, **keys: Any) -> dict[str, Any] | None:
        """The measured row with these values."""
        for row in self.rows:
            if "why" not in row and all(row.get(name) == value for name, value in keys.items()):
                return row
        return None

    def fact(self, name: str, value: Any) -> None:
        self.facts[name] = value
        self._save()

    def note(self, text: str) -> None:
        """A sentence below the table."""
        print(text)
        self._notes.append(text)
        self._save()

    def target(self, what: str, measured: str | None, target: str, met: bool | None) -> None:
        if not any(each["what"] == what for each in self._targets):
            self._targets.append({"what": what, "measured": measured, "target": target, "met": met})
        self._save()

    def nothing(self, reason: str) -> None:
        """This stage has nothing to measure here."""
        print(reason)
        self._reason = reason
        self._save()

    # -- measuring ---------------------------------------------------------------

    def isolated(self, work: Callable[..., Any], *arguments: Any, limit_s: float = 120) -> Any:
        """What `work(setting, *arguments)` returns in a process of its own."""
        with rig.Children() as children:
            child = children.start(_once, work, self.setting, *arguments)
            value, why = child.answer(max(0.1, min(limit_s, self.left_s)))
        if why is not None:
            raise NotMeasured(why)
        return value

    def sweep(self, work: Callable[..., Job], jobs: Sequence[Job], limit_s: float = 120) -> None:
        """A row for each job that has none yet: its keys and what `work(setting, **job)` returns.

        One process does them in turn; after a failure another goes on with the next, as CUDA errors stick.
        """
        waiting = [job for job in jobs if not self.find(**{k: job[k] for k in self._keys if k in job})]
        failures = 0
        while waiting:
            if self.left_s <= 0:
                return self.skip(waiting, NO_TIME)
            if failures >= _PATIENCE:
                return self.skip(waiting, "given up")
            with rig.Children() as children:
                child = children.start(_in_turn, work, self.setting, waiting)
                while waiting and self.left_s > 0:
                    try:
                        values, why, failed = child.answer(max(0.1, min(limit_s, self.left_s)))
                    except RuntimeError as error:
                        values, why, failed = {}, last_line(str(error)), True
                        if self.left_s <= 0:
                            break
                        if "said nothing" in why:  # what hangs once would hang again
                            failures = _PATIENCE
                    job = waiting.pop(0)
                    keys = {name: job[name] for name in self._keys if name in job}
                    self.row(**keys, **values, **({} if why is None else {"why": why}))
                    failures = failures + 1 if failed else 0
                    if failed:
                        break
        return None

    def skip(self, jobs: Sequence[Job], why: str) -> None:
        """Rows that are not measured."""
        for job in jobs:
            self.row(**{name: job[name] for name in self._keys if name in job}, why=why)

    def _same(self, one: dict[str, Any], other: dict[str, Any]) -> bool:
        return all(one.get(name) == other.get(name) for name in self._keys)

    def _save(self) -> None:
        found = {
            "rows": self.rows,
            "notes": self._notes,
            "facts": self.facts,
            "targets": self._targets,
            "reason": self._reason,
        }
        partial = self._part.with_suffix(".partial")
        partial.write_text(json.dumps(found, allow_nan=False))
        partial.replace(self._part)


def last_line(text: str) -> str:
    """The end of an error message or traceback."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:_KEPT_TEXT] if lines else "it gave no reason"


# -- processes within a stage ------------------------------------------------------


def _once(pipe: Connection, work: Callable[..., Any], setting: Setting, *arguments: Any) -> None:
    _log_to_stderr()
    answer = _attempt(work, setting, *arguments)
    _close_engine()
    pipe.send(answer[:2])


def _in_turn(pipe: Connection, work: Callable[..., Job], setting: Setting, jobs: Sequence[Job]) -> None:
    _log_to_stderr()
    for left, job in zip(reversed(range(len(jobs))), jobs, strict=True):
        answer = _attempt(work, setting, **job)
        failed = answer[2]
        if failed or not left:
            _close_engine()  # whoever reads the last answer ends this process
        pipe.send(answer)
        if failed:
            return


def _close_engine() -> None:
    """TensorRT keeps its kernels then, and is not torn down by the interpreter's end."""
    if (engines := sys.modules.get("bench.gpu.engines")) is not None:
        try:
            engines.close()
        except Exception:  # after a CUDA error nothing works any more
            traceback.print_exc()


def _attempt(work: Callable[..., Any], *arguments: Any, **job: Any) -> tuple[Any, str | None, bool]:
    """(what came of it, why nothing did, whether that was a failure)."""
    try:
        return work(*arguments, **job), None, False
    except NotMeasured as reason:
        return {}, last_line(str(reason)), False
    except Exception as error:
        traceback.print_exc()
        return {}, f"{type(error).__name__}: {last_line(str(error))}", True


def _log_to_stderr() -> None:
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")


def _die_with_parent() -> None:
    """The schedule holds the other end of stdin; whatever ends it ends this and all it started."""
    os.read(0, 1)
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    part = Path(sys.argv[1])
    if os.getpgid(0) == os.getpid():
        threading.Thread(target=_die_with_parent, daemon=True).start()
    _log_to_stderr()
    work, context = json.loads(part.read_text())["work"], Context(part)
    module, _, name = work.partition(":")
    try:
        getattr(importlib.import_module(module), name)(context)
    except NotMeasured as reason:
        context.nothing(str(reason))
