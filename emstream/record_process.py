"""The recorder beside a service, in a process of its own: told what to do, it says how it fares.

::

    service ──begin, end, finish──▶ one Recorder after the other
            ◀──status, reports────

`RecorderProcess` is the service's end of the pipe, `_Sessions` the other one. The books are kept at
the service's end: a recorder that dies takes nothing with it but what it had not written, and the one that
takes over begins by counting that.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import secrets
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from emstream.errors import EmstreamError, OutputError
from emstream.printable import log_to_stderr, logs_json
from emstream.publish import Publisher
from emstream.record import FAILURES, Recorder, RecordSettings
from emstream.recording import disk
from emstream.recording.salvage import Account, salvage
from emstream.restarts import Restarts
from emstream.signals import deaf_processes, stop_on_signals

log = logging.getLogger(__name__)

_START_S = 60.0
_SILENT_S = 15.0
_SOON_S = 3.0
_END_S = 600.0
_LOOK_S = 0.1
_REPEAT_S = 10.0
_QUIET_MS = 500
_COUNTED = ("lost", "unheard")


@dataclass(frozen=True)
class _Unfinished:
    """What a recorder that died leaves to the next one."""

    records: bool
    """Whether frames are to be recorded."""
    files: tuple[Path, ...]
    """Of the recording that it was at."""
    since: Account | None
    """What was accounted for when that began."""
    why: str
    """Why it waited to be told to record, after a recording that failed."""


@dataclass(frozen=True)
class _Begun:
    """A file is going to be written."""

    path: Path


@dataclass(frozen=True)
class _Over:
    """A recording is over."""

    report: dict[str, Any]
    account: Account | None = None
    """Of one that a recorder left behind that died."""


@dataclass(frozen=True)
class _Done:
    """The last thing that the recorder says."""

    error: str | None


@dataclass(frozen=True)
class _Finish:
    """The last thing that the service says."""

    published: int | None


class RecorderProcess:
    """A recorder for the service that starts it. One that dies is replaced."""

    def __init__(
        self, settings: RecordSettings, on_status: Callable[[dict[str, Any]], None] = lambda status: None
    ) -> None:
        """`on_status` gets every `status`, in another thread.

        Raises OutputError where nothing can be written.
        """
        disk.check_room(settings.path().parent, 0.0)
        self._settings, self._output = settings, settings.output
        self._on_status = on_status
        self._status: dict[str, Any] = {"state": "waiting"}
        self._words: SimpleQueue[str | _Finish | None] = SimpleQueue()
        self._answered, self._asked = threading.Event(), threading.Event()
        self._finish = _Finish(None)
        self._changing = threading.Lock()  # the process and its pipe
        # The books: recordings that are over, and the one that is not.
        self._reports: list[dict[str, Any]] = []
        self._files: list[Path] = []
        self._records = settings.look_back_s == 0
        self._since = Account(0, 0) if self._records else None
        self._waits_because = ""
        self._error: str | None = None
        self._died = 0
        self._dead: str | None = None
        """Why there is no recorder any more."""
        self._watcher = threading.Thread(target=self._watch, name="recorder watcher", daemon=True)
        self._hello = b"recorder-" + secrets.token_hex(8).encode()
        self._start(None)
        # A thread of its own: a recorder that hangs reads nothing, and nobody else may wait for it.
        self._teller = threading.Thread(target=self._tell, name="recorder teller", daemon=True)
        self._teller.start()

    def wait_until_it_listens(self, publisher: Publisher) -> None:
        """Return when not even the first frame will be missed. Raises EmstreamError when it does not start."""
        try:
            self._hear(_START_S)
            if not publisher.wait_for(self._hello, _START_S):
                raise OutputError(f"the recorder did not subscribe within {_START_S:.0f} s")
        except BaseException:
            self._end()
            raise
        self._watcher.start()

    def status(self) -> dict[str, Any]:
        """What the recorder said last, see `Recorder.status`; lost and unheard are those of all its recordings.

        Its state may be ``silent``, ``ended`` (a recording failed, and it may be told to begin another one),
        ``restarting`` (it died, and another one takes over) or ``failed`` (there is no recorder any more), too, and
        ``why`` then says more. ``died`` is how often it did.
        """
        return self._status

    def begin(self) -> None:
        """Record, from the look-back on; after an end another file."""
        self.tell("begin")

    def end(self) -> None:
        """End the recording, if there is one, and look back again."""
        self.tell("end")

    def tell(self, word: str) -> None:
        """``begin`` or ``end``. Any thread and any signal handler may call it, and none waits."""
        self._records = word == "begin"
        if not (self._records or self._files):
            self._since = None
        self._words.put(word)

    def finish(self, published: int | None = None) -> dict[str, Any]:
        """Let it write what was published until now; returns the report of all its recordings.

        `published` is how many frames that is, so that those it never got are counted. A recorder that says
        nothing for ten minutes, or is given up by SIGINT or SIGTERM meanwhile, is killed, and what is on
        the disk is counted.
        """
        self._finish = _Finish(published)
        self._asked.set()
        given_up = threading.Event()
        with stop_on_signals(given_up.set):
            self._words.put(self._finish)
            if not self._answered.wait(_SOON_S):
                log.info("the recorder writes what is left; stop again to drop that")
            until_s = time.monotonic() + _END_S
            while not self._answered.wait(_LOOK_S) and not given_up.is_set() and time.monotonic() < until_s:
                pass
            answered = self._answered.is_set()
            if not answered:
                with self._changing:  # it may be another one by now
                    if self._process.pid is not None:
                        self._process.kill()
            self._end()
        if given_up.is_set() and not answered:
            self._dead = (
                f"{self._output}: the recorder was told to end at once; what it had committed is readable"
            )
        return self._report()

    def _report(self) -> dict[str, Any]:
        reports, error = self._reports, self._error or self._dead
        if self._dead is not None or self._since is not None or not reports:
            report, account = salvage(self._files, self._since)
            if self._records and account and self._finish.published is not None:
                left = max(0, self._finish.published - account.published)
                report["unheard"]["raw"] += max(0, left - account.raw_since)
                report["unheard"]["denoised"] += left
            reports = [*reports, report]
        if error and not any(report["files"] for report in reports):
            raise OutputError(error)
        return {**_together(reports, error), **({"died": self._died} if self._died else {})}

    def _start(self, left: _Unfinished | None) -> None:
        """Start a process; `left` is what the one before it left."""
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_recorder_main,
            args=(self._settings, self._hello, left, theirs, logs_json()),
            name="recorder",
            daemon=True,
        )
        try:
            with deaf_processes():
                self._process.start()
        finally:
            theirs.close()
        if self._asked.is_set():
            self._words.put(self._finish)  # what was said before may have gone to the one that died

    def _tell(self) -> None:
        while (word := self._words.get()) is not None:
            with contextlib.suppress(OSError, TypeError):  # TypeError: it is being closed, after a death
                self._pipe.send(word)

    def _watch(self) -> None:
        """Keep what the recorder says, and replace one that dies. That there is none is said again and again."""
        restarts = Restarts()
        while (why := self._follow()) is not None:
            self._died += 1
            pause_s = restarts.note_death()
            if pause_s is None or self._asked.is_set():
                self._give_up(why)
                break
            log.error("%s; another one takes over", why)
            self._note(state="restarting", why=why, died=self._died)
            if self._asked.wait(pause_s) or not self._start_another():
                self._give_up(why)
                break
        self._answered.set()
        while not self._asked.is_set():
            log.error("nothing is recorded to %s any more: %s", self._output, self._status.get("why"))
            self._asked.wait(_REPEAT_S)

    def _give_up(self, why: str) -> None:
        self._dead = why
        self._note(state="failed", why=why, died=self._died)

    def _start_another(self) -> bool:
        """False when none is wanted any more."""
        with self._changing:
            if self._asked.is_set():
                return False
            self._bury()
            self._pipe.close()
            try:
                self._start(_Unfinished(self._records, tuple(self._files), self._since, self._waits_because))
            except OSError as error:  # no memory, no more processes: as if it had died at once
                log.error("no recorder can be started: %s", error)
            return True

    def _follow(self) -> str | None:
        """Hear the recorder until it has finished; returns why it ended without that."""
        try:
            while not isinstance(said := self._hear(None), _Done):
                self._take(said)
        except EmstreamError as error:
            return str(error)
        self._error = said.error
        return None

    def _take(self, said: Any) -> None:
        if isinstance(said, _Begun):
            self._files.append(said.path)
        elif isinstance(said, _Over):
            self._reports.append(said.report)
            self._files, self._since = [], said.account if self._records else None
            self._status = {**self._status, **{name: _sums(self._reports, name) for name in _COUNTED}}
        else:
            if said["state"] == "ended":
                self._records = False
            elif said["state"] == "recording" and self._waits_because:
                self._records = True
            self._waits_because = said["why"] if said["state"] == "ended" else ""
            if "lost" in said:
                said = said | {name: _sums([said, *self._reports], name) for name in _COUNTED}
                files = [path for report in self._reports for path in report["files"]]
                if said["path"] is None and files:
                    said["path"] = files[-1]
            self._note(**said)

    def _note(self, **status: Any) -> None:
        self._status = {**self._status, **status}
        self._on_status(self._status)

    def _bury(self) -> None:
        if self._process.pid is None:  # it could not be started
            return
        self._process.join(timeout=5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _end(self) -> None:
        self._asked.set()
        with self._changing:
            self._bury()
        if self._watcher.is_alive():
            self._watcher.join()
        self._words.put(None)
        self._teller.join()
        self._pipe.close()

    def _hear(self, within_s: float | None) -> Any:
        """What it says next. Raises EmstreamError when that is one, and when it is dead or, within a time, silent."""
        try:
            while not self._pipe.poll(within_s or _SILENT_S):
                if within_s:
                    raise OutputError(f"the recorder said nothing for {within_s:.0f} s")
                self._note(state="silent", why=f"nothing heard from it for {_SILENT_S:.0f} s")
            said = self._pipe.recv()
        except (EOFError, OSError):
            raise OutputError(
                f"{self._output}: the recorder ended without a report; what it had committed is readable"
            ) from None
        if isinstance(said, EmstreamError):
            raise said
        return said


class _Sessions:
    """One recording after the other, as the service tells."""

    def __init__(self, settings: RecordSettings, left: _Unfinished | None, pipe: Connection) -> None:
        """`left` is what a recorder left that died; without, this is the first one."""
        self._settings, self._left, self._pipe = settings, left, pipe
        self._recorder = None if left else Recorder(settings)
        self._again = replace(settings, dated=True, overwrite=False)
        self._changing, self._sending = threading.Lock(), threading.Lock()
        self._ready, self._finishing = left is not None, False
        self._begins_next = left is not None and left.records
        self._told = threading.Event()
        self._error: EmstreamError | None = None
        self._why = ""
        self._account: Account | None = None

    def run(self, hello: bytes) -> str | None:
        """Record until told to finish; returns what went wrong first. Raises EmstreamError when it cannot start."""
        threading.Thread(target=self._listen, daemon=True).start()
        if self._left:
            self._take_over(self._left)
        else:
            self._record(hello=hello, on_ready=self._say_ready)
        while not self._finishing:
            if self._why:
                self._wait_to_be_told()
            elif self._prepare():
                self._record(account=self._account)
                self._account = None
        return None if self._error is None else str(self._error)

    def _take_over(self, left: _Unfinished) -> None:
        """Account for what the recorder left that died, and go on as it would have."""
        account = left.since
        if left.files:
            report, account = salvage(left.files, left.since)
            self._send(_Over(report, account))
        self._why = left.why
        self._account = account if left.records else None

    def _record(self, **options: Any) -> None:
        """Run the recorder that there is to its end, good or bad."""
        assert self._recorder is not None
        try:
            report = self._recorder.run(self._say, on_file=lambda path: self._send(_Begun(path)), **options)
        except EmstreamError as error:
            if not self._ready:
                raise
            self._fail(error)
            if (report := self._recorder.report())["files"]:
                self._send(_Over(report))
            return
        self._send(_Over(report))
        if report["ended"] in FAILURES:
            self._why = report["ended"]

    def _fail(self, error: EmstreamError) -> None:
        self._error = self._error or error
        self._why = str(error)

    def _prepare(self) -> bool:
        """Have another recorder, one that waits until it is told to begin. False when that cannot be, or need not."""
        with self._changing:
            if self._finishing:
                return False
            begins, self._begins_next = self._begins_next, False
            try:
                self._recorder = Recorder(self._again, waits=True)
            except EmstreamError as error:
                self._fail(error)
                return False
            if begins:
                self._recorder.begin()
            return True

    def _wait_to_be_told(self) -> None:
        """After a recording that failed: until there is room again, say, and somebody says begin."""
        self._told.clear()
        while not (self._begins_next or self._finishing):
            log.error("nothing is recorded to %s any more: %s", self._settings.output, self._why)
            self._send({"state": "ended", "why": self._why})
            self._told.wait(_REPEAT_S)
        self._why = ""

    def _say_ready(self) -> None:
        self._ready = True
        self._send("listening")

    def _say(self, status: dict[str, Any]) -> None:
        self._send({**status, "why": None})

    def _send(self, said: Any) -> None:
        """From any thread."""
        with (
            self._sending,
            contextlib.suppress(OSError),
        ):  # the service is gone, which `_listen` hears as well
            self._pipe.send(said)

    def _listen(self) -> None:
        published: int | None = None
        with contextlib.suppress(EOFError, OSError):
            while not isinstance(said := self._pipe.recv(), _Finish):
                with self._changing:
                    self._obey(said)
                self._told.set()
            published = said.published
        with self._changing:
            self._finishing = True
            if self._recorder and not self._recorder.is_stopping:
                self._recorder.stop(_QUIET_MS, published)
        self._told.set()

    def _obey(self, word: str) -> None:
        if self._recorder is None or self._recorder.is_stopping:
            self._begins_next = word == "begin"
        elif word == "begin":
            self._recorder.begin()
        elif self._recorder.is_recording:
            self._recorder.stop()


def _together(reports: list[dict[str, Any]], error: str | None) -> dict[str, Any]:
    """One report of several recordings: counts are sums, the rest is the last one's, or the first failure's."""
    failed = [report["ended"] for report in reports if report["ended"] in FAILURES]
    return {
        **reports[-1],
        "files": [path for report in reports for path in report["files"]],
        **{name: _sums(reports, name) for name in ("frames", *_COUNTED)},
        **{name: sum(report[name] for report in reports) for name in ("missing", "bytes", "seconds")},
        **({"ended": failed[0]} if failed else {}),
        **({"ended": "failed", "error": error} if error else {}),
    }


def _sums(reports: list[dict[str, Any]], name: str) -> dict[str, int]:
    return {track: sum(report[name][track] for report in reports) for track in ("raw", "denoised")}


def _recorder_main(
    settings: RecordSettings, hello: bytes, left: _Unfinished | None, pipe: Connection, as_json: bool
) -> None:
    # The service says itself when it has finished.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    log_to_stderr(as_json=as_json)
    try:
        said: Any = _Done(_Sessions(settings, left, pipe).run(hello))
    except EmstreamError as error:
        said = error
        log.error("%s", error)
    except Exception as error:
        log.exception("the recorder failed")
        said = OutputError(f"{settings.output}: the recorder failed: {type(error).__name__}: {error}")
    with contextlib.suppress(OSError):
        pipe.send(said)
