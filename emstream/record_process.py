"""The recorder beside a service, in a process of its own: told what to do, it says how it fares.

::

    service ──begin, end, finish──▶ one Recorder after the other
            ◀──status, report─────

`RecorderProcess` is the service's end of the pipe, `_Sessions` the other one.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import secrets
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

from emstream.errors import EmstreamError, OutputError
from emstream.printable import log_to_stderr, logs_json
from emstream.publish import Publisher
from emstream.record import FAILURES, Recorder, RecordSettings
from emstream.recording import disk

log = logging.getLogger(__name__)

_START_S = 60.0
_SILENT_S = 15.0
_SOON_S = 3.0
_END_S = 600.0
_REPEAT_S = 10.0
_QUIET_MS = 500
_COUNTED = ("lost", "unheard")


class RecorderProcess:
    """A recorder for the service that starts it."""

    def __init__(
        self, settings: RecordSettings, on_status: Callable[[dict[str, Any]], None] = lambda status: None
    ) -> None:
        """`on_status` gets every `status`, in another thread.

        Raises OutputError where nothing can be written.
        """
        disk.check_room(settings.path().parent, 0.0)
        self._output = settings.output
        self._on_status = on_status
        self._status: dict[str, Any] = {"state": "waiting"}
        self._words: SimpleQueue[str | _Finish | None] = SimpleQueue()
        self._answered, self._asked = threading.Event(), threading.Event()
        self._report: dict[str, Any] | EmstreamError | None = None
        self._watcher = threading.Thread(target=self._watch, name="recorder watcher", daemon=True)
        self._hello = b"recorder-" + secrets.token_hex(8).encode()
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_recorder_main,
            args=(settings, self._hello, theirs, logs_json()),
            name="recorder",
            daemon=True,
        )
        self._process.start()
        theirs.close()
        # A thread of its own: a recorder that hangs reads nothing, and nobody else may wait for it.
        self._teller = threading.Thread(target=self._tell, name="recorder teller", daemon=True)
        self._teller.start()

    def wait_until_it_listens(self, publisher: Publisher) -> None:
        """Return when not even the first frame will be missed. Raises EmstreamError when it does not start."""
        try:
            self._hear(_START_S)
            if not publisher.wait_for(self._hello, _START_S):
                raise OutputError(f"the recorder did not subscribe within {_START_S:.0f} s")
        except EmstreamError:
            self._end()
            raise
        self._watcher.start()

    def status(self) -> dict[str, Any]:
        """What the recorder said last, see `Recorder.status`; lost and unheard are those of all its recordings.

        Its state may be ``silent``, ``ended`` (a recording failed, and it may be told to begin another one) or
        ``failed`` (there is no recorder any more), too, and ``why`` then says more.
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
        self._words.put(word)

    def finish(self, published: int | None = None) -> dict[str, Any]:
        """Let it write what was published until now; returns the report of all its recordings.

        `published` is how many frames that is, so that those it never got are counted.
        """
        self._asked.set()
        try:
            self._words.put(_Finish(published))
            if not self._answered.wait(_SOON_S):
                log.info("the recorder writes what is left; stop again to drop that")
            if not self._answered.wait(_END_S):
                raise OutputError(f"{self._output}: the recorder said nothing for {_END_S:.0f} s")
        except KeyboardInterrupt:
            raise OutputError(
                f"{self._output}: the recorder was told to end at once; what it had committed is readable"
            ) from None
        finally:
            self._end()
        if isinstance(self._report, EmstreamError):
            raise self._report
        assert self._report is not None
        return self._report

    def _tell(self) -> None:
        while (word := self._words.get()) is not None:
            with contextlib.suppress(OSError):
                self._pipe.send(word)

    def _watch(self) -> None:
        """Keep what the recorder says. That it has ended is said again and again, unless it was asked to."""
        try:
            while not isinstance(said := self._hear(None), _Report):
                self._note(**said)
            self._report = said.report
        except EmstreamError as error:
            self._report = error
            self._note(state="failed", why=str(error))
        self._answered.set()
        while not self._asked.is_set():
            log.error("nothing is recorded to %s any more: %s", self._output, self._status.get("why"))
            self._asked.wait(_REPEAT_S)

    def _note(self, **status: Any) -> None:
        self._status = {**self._status, **status}
        self._on_status(self._status)

    def _end(self) -> None:
        self._process.join(timeout=5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
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


class _Finish:
    """The last thing that the service says."""

    def __init__(self, published: int | None) -> None:
        self.published = published


class _Report:
    """The last thing that the recorder says."""

    def __init__(self, report: dict[str, Any]) -> None:
        self.report = report


class _Sessions:
    """One recording after the other, as the service tells."""

    def __init__(self, settings: RecordSettings, pipe: Connection) -> None:
        self._settings, self._pipe = settings, pipe
        self._recorder = Recorder(settings)
        self._changing = threading.Lock()
        self._ready = self._begins_next = self._finishing = False
        self._told = threading.Event()
        self._reports: list[dict[str, Any]] = []
        self._error: EmstreamError | None = None
        self._why = ""

    def run(self, hello: bytes) -> dict[str, Any]:
        """Record until told to finish; returns the report of all. Raises EmstreamError when there is nothing else."""
        threading.Thread(target=self._listen, daemon=True).start()
        self._record(hello=hello, on_ready=self._say_ready)
        while not self._finishing:
            if self._why:
                self._wait_to_be_told()
            elif self._prepare():
                self._record()
        if self._error and not self._reports:
            raise self._error
        return _together(self._reports, self._error)

    def _record(self, **options: Any) -> None:
        """Run the recorder that there is to its end, good or bad."""
        try:
            report = self._recorder.run(self._say, **options)
        except EmstreamError as error:
            if not self._ready:
                raise
            self._fail(error)
            if (report := self._recorder.report())["files"]:
                self._reports.append(report)
            return
        self._reports.append(report)
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
                self._recorder = Recorder(replace(self._settings, dated=True), waits=True)
            except EmstreamError as error:
                self._fail(error)
                return False
            if begins:
                self._recorder.begin()
            return True

    def _wait_to_be_told(self) -> None:
        """After a recording that failed: until there is room again, say, and somebody says begin."""
        self._told.clear()
        status = {"state": "ended", "why": self._why}
        while not (self._begins_next or self._finishing):
            log.error("nothing is recorded to %s any more: %s", self._settings.output, self._why)
            with contextlib.suppress(OSError):
                self._pipe.send(status)
            self._told.wait(_REPEAT_S)
        self._why = ""

    def _say_ready(self) -> None:
        self._ready = True
        self._pipe.send("listening")

    def _say(self, status: dict[str, Any]) -> None:
        before = self._reports
        for name in _COUNTED:
            status[name] = _sums([status, *before], name)
        if before and status["path"] is None:
            status["path"] = before[-1]["files"][-1] if before[-1]["files"] else None
        with contextlib.suppress(OSError):  # the service is gone, which `_listen` hears as well
            self._pipe.send({**status, "why": None})

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
            if not self._recorder.is_stopping:
                self._recorder.stop(_QUIET_MS, published)
        self._told.set()

    def _obey(self, word: str) -> None:
        if self._recorder.is_stopping:
            self._begins_next = word == "begin"
        elif word == "begin":
            self._recorder.begin()
        elif self._recorder.is_recording:
            self._recorder.stop()


def _together(reports: list[dict[str, Any]], error: EmstreamError | None) -> dict[str, Any]:
    """One report of several recordings: counts are sums, the rest is the last one's, or the first failure's."""
    failed = [report["ended"] for report in reports if report["ended"] in FAILURES]
    return {
        **reports[-1],
        "files": [path for report in reports for path in report["files"]],
        **{name: _sums(reports, name) for name in ("frames", *_COUNTED)},
        **{name: sum(report[name] for report in reports) for name in ("missing", "bytes", "seconds")},
        **({"ended": failed[0]} if failed else {}),
        **({"ended": "failed", "error": str(error)} if error else {}),
    }


def _sums(reports: list[dict[str, Any]], name: str) -> dict[str, int]:
    return {track: sum(report[name][track] for report in reports) for track in ("raw", "denoised")}


def _recorder_main(settings: RecordSettings, hello: bytes, pipe: Connection, as_json: bool) -> None:
    # A signal reaches the whole terminal or service unit; the service says itself when it has finished.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    log_to_stderr(as_json=as_json)
    try:
        said: Any = _Report(_Sessions(settings, pipe).run(hello))
    except EmstreamError as error:
        said = error
        log.error("%s", error)
    except Exception as error:
        log.exception("the recorder failed")
        said = OutputError(f"{settings.output}: the recorder failed: {type(error).__name__}: {error}")
    with contextlib.suppress(OSError):
        pipe.send(said)
