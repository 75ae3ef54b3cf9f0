"""The recorder: what a running emstream publishes, raw and denoised, into HDF5 files.

::

    service ──XPUB──▶ SUB ──▶ backlog ──▶ file, next file, ...
                      (main thread)       (thread)

It hears what every other subscriber hears, in a process of its own, also with
``emstream serve --record``: the publisher never waits for a subscriber, and compressing
takes no interpreter lock from the pipeline. So nothing a recording or its disk does can
cost the pipeline a frame; the worst that happens is that the recording itself loses some,
which it counts: *lost* found no room in the backlog because the disk was too slow, *unheard*
never arrived here although the service published it. Raw wins over denoised in both.

`emstream.recording` is the layout of the files, `emstream.record_process` the recorder beside a service.
"""

from __future__ import annotations

import contextlib
import logging
import re
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import zmq

from emstream import client, wire
from emstream.endpoint import connect
from emstream.errors import MalformedFrame, OutputError
from emstream.frame import Frame, now_ns
from emstream.keys import Peer
from emstream.publish import DENOISED, RAW, STATS
from emstream.recording import disk
from emstream.recording.backlog import Backlog, Entry
from emstream.recording.gaps import GapMap
from emstream.recording.layout import COUNTERS, WRITE_ERROR
from emstream.recording.reader import part_of
from emstream.recording.salvage import Account
from emstream.recording.writer import RecordingFile, compression, reason

log = logging.getLogger(__name__)

COMMIT_S = 0.25
OBSERVE_S = 1.0
_POLL_MS = 100
_QUEUE_MESSAGES = 256
_STATUS_S = 1.0
_NEWS_S = 0.1
_LAST_DENOISED_S = 5.0
_MOST_UNHEARD = 10_000  # times that are remembered while it looks back
_RATE_FALLS = 0.8  # in a second at most

STOPPED, COUNTED, SERIES_ENDED, DISK_LOW = "stopped", "frames counted", "series ended", "disk low"
FAILURES = (DISK_LOW, WRITE_ERROR)


@dataclass(frozen=True, kw_only=True)
class RecordSettings:
    """One recording. Each field but `dated` is a flag of ``emstream record``."""

    input: str
    """What ``emstream serve`` publishes on."""
    output: Path
    """The file; or a folder, for a file named by date and time."""
    look_back_s: float = 0.0
    """Wait for `Recorder.begin`, and include this much of what came before. 0 begins at once."""
    split_bytes: int | None = None
    """Begin another file when one has grown to this size."""
    buffer_bytes: int = 1024**3
    """Memory between receiving and writing; half of it at most for looking back."""
    frames: int | None = None
    """Stop after this many raw frames."""
    until_end: bool = False
    """Stop at the end of a series."""
    compress: bool = True
    overwrite: bool = False
    dated: bool = False
    """Add date and time to the name of a file, too."""
    peer: Peer | None = None
    """For a service that takes keys."""

    def __post_init__(self) -> None:
        if not 0 <= self.look_back_s < 1e6:
            raise ValueError(f"look-back must lie in 0-1000000 s, got {self.look_back_s} s")
        for name in ("split_bytes", "buffer_bytes", "frames"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name.partition('_')[0]} must be positive, got {value}")
        if self.look_back_s and self.frames is not None:
            raise ValueError(
                "--frames and --look-back exclude each other: nobody knows how many the look-back holds"
            )

    def path(self) -> Path:
        """The first file. Raises OutputError where there can be none."""
        path, now = self.output.absolute(), f"{datetime.now():%Y%m%d-%H%M%S}"
        is_named_here = path.is_dir() or self.dated
        if path.is_dir():
            path = path / f"emstream-{now}.h5"
        elif path.suffix.lower() not in (".h5", ".hdf5", ".nxs"):
            raise OutputError(f"{path}: recordings are .h5 files, or go into a folder that exists")
        elif self.dated:
            path = path.with_stem(f"{path.stem}-{now}")
        if not path.parent.is_dir():
            raise OutputError(f"{path} cannot be written: there is no folder {path.parent}; make it first")
        disk.check_writable(path.parent)
        if is_named_here:  # and two of the same second are told apart
            stems = (path.stem, *(f"{path.stem}_{n}" for n in range(2, 100)))
            names = (path.with_stem(stem) for stem in stems)
            path = next((name for name in names if not any(map(Path.exists, _parts(name)))), path)
        for each in _parts(path):
            if each.exists() and not self.overwrite:
                raise OutputError(f"{each} exists already; choose another name or allow --overwrite")
        return path


def _parts(path: Path) -> list[Path]:
    """The files that a recording to `path` may consist of, and those that are there."""
    pattern = re.compile(re.escape(path.stem) + r"-\d{4,}" + re.escape(path.suffix))
    return [path, *sorted(each for each in path.parent.iterdir() if pattern.fullmatch(each.name))]


class Recorder:
    """Receives in the thread that calls `run`, writes in one of its own."""

    def __init__(self, settings: RecordSettings, *, waits: bool = False) -> None:
        """With `waits` or a look-back it waits for `begin`. Raises OutputError where nothing can be written."""
        self.settings = settings
        self.path = settings.path()
        self._folder = self.path.parent
        if settings.compress:
            compression()
        disk.check_room(self._folder, 0.0)
        # A recording that begins at once looks back as well, while it observes how much comes.
        self._backlog = Backlog(settings.buffer_bytes, settings.look_back_s or 2 * OBSERVE_S)
        self._waits = waits or settings.look_back_s > 0
        self._begun = threading.Event()
        if not self._waits:
            self._begun.set()
        self._writing = False
        self._stopping = threading.Event()
        self._dropping = False
        self._quiet_ms = 0
        self._published: int | None = None
        self._ended: str | None = None
        self._fault: BaseException | None = None
        self._heard = _Heard()
        self._first_ns: int | None = None
        self._arrived_bytes = 0
        self._bytes_per_s = 0.0
        self._gaps = GapMap()
        self._missing = self._missing_before = 0
        self._early_mark: Entry | None = None
        self._file: RecordingFile | None = None
        self._files: list[Path] = []
        self._on_file: Callable[[Path], None] = lambda path: None
        self._id = secrets.token_hex(8)
        self._recorded = {"raw": 0, "denoised": 0}
        self._unwritten = {"raw": 0, "denoised": 0}
        self._next_commit_s = 0.0
        self._warned_lost = 0
        self._had_room = self._warned_room = False
        self._started_s = time.monotonic()
        self._told: tuple[Any, ...] = ()
        self._told_s = self._rated_s = self._started_s
        self._rated_bytes = 0

    @property
    def is_recording(self) -> bool:
        """Whether it was told to begin, and not yet to stop."""
        return self._begun.is_set() and not self.is_stopping

    @property
    def is_stopping(self) -> bool:
        """Whether it takes nothing more."""
        return self._stopping.is_set() or self._ended is not None

    def begin(self) -> None:
        """Record, from `look_back_s` ago on. Any thread may call it."""
        self._begun.set()

    def stop(self, quiet_ms: int = 0, published: int | None = None) -> None:
        """Finish with what has arrived, or once nothing has come for `quiet_ms`. A second time: drop the backlog.

        `published` is how many frames the service has published in all, when it publishes no more: what
        of them never comes is *unheard*.
        """
        if self._stopping.is_set():
            self._dropping = True
        self._quiet_ms, self._published = quiet_ms, published
        self._stopping.set()

    def run(
        self,
        on_status: Callable[[dict[str, Any]], None] | None = None,
        hello: bytes | None = None,
        on_ready: Callable[[], None] | None = None,
        on_file: Callable[[Path], None] | None = None,
        account: Account | None = None,
    ) -> dict[str, Any]:
        """Record until `stop`, the frames are counted, the series ends or the disk fills; returns the report.

        `on_status` is called about once a second, and when something is lost or changes; `on_file` with each
        file, just before it is made, in another thread. `hello` is subscribed to, too, so that the publisher can
        tell that this recorder listens, before its first frame. What was published after `account` and does not
        come is *unheard*.
        """
        if hello is not None:
            account = Account(0, 0)
        if account is not None:
            self._heard.go_on_from(account)
        self._on_file = on_file or self._on_file
        socket = self._subscribe(hello)
        writer = threading.Thread(target=self._guard, args=(self._write,), name="recording")
        writer.start()
        try:
            if on_ready:
                on_ready()
            self._receive(socket, on_status)
        except BaseException as error:
            self._fault = self._fault or error
            self._backlog.give_up()
        finally:
            self._backlog.close()
            while writer.is_alive():
                writer.join(timeout=0.2)  # short, so that a second signal is heard
                if self._dropping:
                    self._backlog.give_up()
                self._tell(on_status)
            socket.close()
            self._warn()
        if self._fault:
            raise self._fault
        return self.report()

    def status(self) -> dict[str, Any]:
        """What there is to say while it runs. ``disk_s``: how long the disk lasts at the rate that comes now."""
        free = disk.free_bytes(self._folder)
        return {
            "state": self._state,
            "path": str(self._files[-1]) if self._files else None,
            "frames": dict(self._recorded),
            "lost": self._lost(),
            "unheard": dict(self._heard.unheard),
            "missing": self._missing,
            "buffer_bytes": self._backlog.nbytes,
            "look_back_s": round(self._backlog.span_s, 1),
            "free_bytes": free,
            "disk_s": disk.seconds_left(free, self._bytes_per_s),
        }

    @property
    def _state(self) -> str:
        if self.is_stopping:
            return "finishing"
        if self._begun.is_set():
            return "recording" if self._writing or self._waits else "waiting"
        return "looking back" if self._first_ns else "waiting"

    def report(self) -> dict[str, Any]:
        """What was recorded and lost, as ``--json`` prints it."""
        seconds = time.monotonic() - self._started_s
        nbytes = sum(path.stat().st_size for path in self._files if path.exists())
        return {
            "files": [str(path) for path in self._files],
            "frames": dict(self._recorded),
            "lost": self._lost(),
            "unheard": dict(self._heard.unheard),
            "missing": self._missing,
            "bytes": nbytes,
            "seconds": round(seconds, 3),
            "ended": self._ended,
            "ledger": self._heard.ledger,
            "engine": self._heard.engine,
        }

    # -- receiving ----------------------------------------------------------------

    def _subscribe(self, hello: bytes | None) -> zmq.Socket[bytes]:
        socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.SUB)
        socket.linger = 0
        socket.rcvhwm = _QUEUE_MESSAGES
        connect(socket, self.settings.input, self.settings.peer)
        for topic in (RAW, DENOISED, STATS, *([hello] if hello else [])):
            socket.subscribe(topic)
        return socket

    def _receive(self, socket: zmq.Socket[bytes], on_status: Callable[[dict[str, Any]], None] | None) -> None:
        next_status_s = time.monotonic() + _STATUS_S
        while not self._stopping.is_set() and self._ended is None:
            if socket.poll(_POLL_MS):
                self._take(socket.recv_multipart(copy=False))
            self._start_writing()
            self._count()
            if time.monotonic() >= next_status_s:
                next_status_s += _STATUS_S
                self._rate()
                if not self._begun.is_set():
                    self._heard.forget(self._backlog.since_ns)
                self._warn()
            self._tell(on_status)
        self._finish(socket)

    def _tell(self, on_status: Callable[[dict[str, Any]], None] | None) -> None:
        """Call `on_status` once a second, and sooner with news."""
        since_s = time.monotonic() - self._told_s
        if on_status is None or since_s < _NEWS_S:
            return
        news = self._state, len(self._files), self._lost(), dict(self._heard.unheard)
        if since_s >= _STATUS_S or news != self._told:
            self._told, self._told_s = news, time.monotonic()
            on_status(self.status())

    def _rate(self) -> None:
        """How much comes: at once when it grows, slowly when it falls."""
        seconds, came = time.monotonic() - self._rated_s, self._arrived_bytes - self._rated_bytes
        self._rated_s, self._rated_bytes = time.monotonic(), self._arrived_bytes
        self._bytes_per_s = max(came / seconds, _RATE_FALLS * self._bytes_per_s)

    def _finish(self, socket: zmq.Socket[bytes]) -> None:
        """Take what has arrived by now, and let it be written."""
        deadline_s = time.monotonic() + _LAST_DENOISED_S
        while self._ended is None and time.monotonic() < deadline_s and socket.poll(self._quiet_ms):
            self._take(socket.recv_multipart(copy=False))
            if not self._quiet_ms:  # a stream that goes on is not waited for
                deadline_s = min(deadline_s, time.monotonic() + 0.05)
        if self._ended is None and self._begun.is_set():
            self._heard.note_published(self._published)
        self._ended = self._ended or STOPPED
        if self._begun.is_set():
            self._writing = True
            self._backlog.begin()

    def _take(self, parts: list[zmq.Frame]) -> None:
        with contextlib.suppress(MalformedFrame):
            if len(parts) < 2:
                return
            topic, header = parts[0].bytes, parts[1].bytes
            if topic == STATS:
                self._heard.stats(wire.unpack(header))
                return
            frame, ended = client.read(parts)
            if frame is None and topic == RAW:
                self._backlog.put(Entry("raw", header, None, now_ns()))
                if ended and self.settings.until_end and self._heard.raw:
                    self._ended = self._ended or SERIES_ENDED
            if frame is None:
                return
            self._take_frame(Entry(frame.topic, header, frame, now_ns()))

    def _take_frame(self, entry: Entry) -> None:
        assert entry.frame is not None
        if entry.topic == "raw":
            if self.settings.frames is not None and self._heard.raw >= self.settings.frames:
                return
            self._heard.receive_raw(entry.frame)
        elif not self._heard.receive_denoised(entry.frame):
            return
        if self._first_ns is None:
            self._first_ns = entry.arrived_ns
        self._arrived_bytes += entry.nbytes
        self._backlog.put(entry)

    def _start_writing(self) -> None:
        """Once it is known how much comes, and that there is room for it."""
        if self._writing or self._first_ns is None:
            return
        seconds = (now_ns() - self._first_ns) / 1e9
        if seconds < OBSERVE_S and self._backlog.nbytes < self.settings.buffer_bytes // 4:
            return
        self._bytes_per_s = self._arrived_bytes / max(seconds, 1e-3)
        if not self._had_room:
            disk.check_room(self._folder, self._bytes_per_s)
            self._had_room = True
        if not self._begun.is_set():
            return
        if self._waits:
            self.path = self.settings.path()  # with the time at which it begins
            log.info("recording, from %.1f s ago on", self._backlog.span_s)
            if self._warn_of_room():
                self._ended = DISK_LOW  # and what is in memory is written as long as it fits
        self._writing = True
        self._backlog.begin()

    def _count(self) -> None:
        """Whether `frames` raw frames have come, and the last one's denoised."""
        heard, frames = self._heard, self.settings.frames
        if frames is None or heard.raw < frames or self._ended:
            return
        if heard.is_paired or now_ns() - heard.last_raw_ns > _LAST_DENOISED_S * 1e9:
            self._ended = COUNTED

    def _warn_of_room(self) -> bool:
        """Whether there is less room than for a minute; said when it becomes so."""
        try:
            disk.check_room(self._folder, self._bytes_per_s)
        except OutputError as error:
            if not self._warned_room:
                log.warning("%s", error)
            self._warned_room = True
        else:
            self._warned_room = False
        return self._warned_room

    def _warn(self) -> None:
        if self._had_room and not self._begun.is_set():
            self._warn_of_room()
        lost = sum(self._lost().values()) + sum(self._heard.unheard.values())
        if lost > self._warned_lost:
            log.warning(
                "the recording loses frames: lost to a slow disk %s, unheard %s",
                _both(self._lost()), _both(self._heard.unheard),
            )  # fmt: skip
        self._warned_lost = lost

    def _lost(self) -> dict[str, int]:
        return {topic: self._backlog.lost[topic] + self._unwritten[topic] for topic in self._recorded}

    # -- writing --------------------------------------------------------------------

    def _guard(self, work: Callable[[], None]) -> None:
        try:
            try:
                work()
            except (OSError, RuntimeError, ValueError) as error:  # h5py has all of them for a disk that fails
                if not self._files:
                    raise OutputError(f"{self.path} cannot be written: {reason(error)}") from error
                self._give_up(f"{self._files[-1]} cannot be written: {reason(error)}")
            except OutputError as error:
                if not self._files:
                    raise
                self._give_up(str(error))
        except BaseException as error:
            self._fault = self._fault or error
        finally:
            self._stopping.set()
            self._backlog.give_up()
            if self._file is not None:
                with contextlib.suppress(OSError, RuntimeError, ValueError):
                    self._file.abandon()

    def _give_up(self, why: str) -> None:
        """The disk would not take the rest: what cannot be committed now is lost."""
        log.error("%s", why)
        self._ended = WRITE_ERROR
        if (file := self._file) is None:  # it is the next one that cannot be begun
            return
        with contextlib.suppress(OSError, RuntimeError, ValueError):
            file.commit(self._counters())
        for topic, rows in file.uncommitted.items():
            self._recorded[topic] -= rows
            self._unwritten[topic] += rows

    def _write(self) -> None:
        self._next_commit_s = time.monotonic() + COMMIT_S
        while not self._backlog.is_done:
            entry = self._backlog.take(max(0.0, self._next_commit_s - time.monotonic()))
            if entry is not None:
                self._write_entry(entry)
            if time.monotonic() >= self._next_commit_s:
                if self._file is not None:
                    self._file.commit(self._counters())
                    if self._is_disk_low():
                        self._backlog.give_up()
                self._next_commit_s = time.monotonic() + COMMIT_S
        if self._file is not None:
            self._close(self._ended or STOPPED)

    def _write_entry(self, entry: Entry) -> None:
        if entry.frame is None and self._file is None:
            self._early_mark = entry
            return
        if entry.topic == "raw" and entry.frame is not None:
            try:
                self._open_for(entry)
            except BaseException:
                self._unwritten["raw"] += 1
                raise
        if self._file is None:
            return  # a denoised frame whose raw one came before the recorder did
        added = False
        try:
            added = self._file.add(entry)
        finally:
            if entry.frame is not None:
                (self._recorded if added else self._unwritten)[entry.topic] += 1
        self._missing = self._missing_before + self._file.gaps.missing

    def _open_for(self, entry: Entry) -> None:
        """Have a file open that takes this raw frame."""
        assert entry.frame is not None
        split = self.settings.split_bytes
        if self._file is not None:
            if self._file.takes(entry.frame.header) and (split is None or self._file.nbytes < split):
                return
            self._close("continued")
        part = len(self._files) + 1
        path = self.path if part == 1 else self.path.with_stem(f"{self.path.stem}-{part:04d}")
        if self.settings.overwrite:
            path.unlink(missing_ok=True)
            for older in _parts(path)[1:] if part == 1 else ():
                if (part_of(older) or 0) > 1:  # and no other file that has such a name
                    older.unlink(missing_ok=True)
        self._on_file(path)
        self._file = RecordingFile(
            path, entry, part=part, compress=self.settings.compress, gaps=self._gaps, recording_id=self._id
        )
        self._files.append(path)
        self._next_commit_s = (
            0.0  # at once: readable from the first frame on, room for a thousand headers taken
        )
        log.info("recording to %s", path)
        if self._early_mark:
            self._file.add(self._early_mark)
            self._early_mark = None

    def _close(self, ended: str) -> None:
        assert self._file is not None
        self._file.close(ended, self._counters())  # after an error it is still the file that is given up
        self._missing_before += self._file.gaps.missing
        self._gaps = self._file.gaps.continued()
        self._file = None

    def _is_disk_low(self) -> bool:
        """Whether nothing more may be written."""
        if self._ended not in (None, DISK_LOW):
            return False
        coming = 0.0 if self._ended else self._bytes_per_s
        if not disk.is_low(self._folder, coming):
            return False
        free = disk.text_of(disk.free_bytes(self._folder))
        log.warning("the recording ends: %s has only %s left", self._folder, free)
        self._ended = DISK_LOW
        return True

    def _counters(self) -> dict[str, Any]:
        lost, unheard = self._lost(), self._heard.unheard
        return {
            **{name: value for name, value in self._heard.ledger.items() if name in COUNTERS},
            "raw_recorded": self._recorded["raw"],
            "denoised_recorded": self._recorded["denoised"],
            "raw_lost": lost["raw"],
            "denoised_lost": lost["denoised"],
            "raw_unheard": unheard["raw"],
            "denoised_unheard": unheard["denoised"],
            "report": self._heard.report,
        }


class _Heard:
    """What came from the service, and what it published without being heard.

    Every denoised header counts, in ``ledger.published``, how many frames were published up to
    it, and each one's raw frame was published just before: a jump tells what is missing here. So
    do the statistics, which come in order with the frames, and the service itself at its end.
    """

    def __init__(self) -> None:
        self.raw = 0
        self.last_raw_ns = 0
        self.unheard = {"raw": 0, "denoised": 0}
        self._unheard: deque[tuple[int, int, int]] = deque(maxlen=_MOST_UNHEARD)
        self.ledger: dict[str, int] = {}
        self.engine: dict[str, Any] = {}
        self.report: dict[str, Any] = {}
        self.is_paired = False
        """Whether the newest raw frame's denoised one has come."""
        self._newest: tuple[Any, ...] | None = None
        self.published: int | None = None
        """Frames published up to the last message; None until one says so."""
        self._raw_since = 0

    def go_on_from(self, account: Account) -> None:
        """Another recorder accounts for what was published up to there."""
        self.published, self._raw_since = account.published, account.raw_since

    def receive_raw(self, frame: Frame) -> None:
        self.raw += 1
        self.last_raw_ns = now_ns()
        self._newest = _identity(frame)
        self.is_paired = False
        self._raw_since += 1

    def receive_denoised(self, frame: Frame) -> bool:
        """False for frames from before the first raw one: the recorder came in between."""
        if self._newest is None:
            return False
        extra = frame.header.extra
        if isinstance(engine := extra.get("engine"), dict):
            self.engine = engine
        self._note_ledger(extra.get("ledger"))
        self.is_paired = self.is_paired or _identity(frame) == self._newest
        self.note_published(self.ledger.get("published"), denoised=1)
        self._raw_since = 0
        return True

    def note_published(self, published: int | None, denoised: int = 0) -> None:
        """So many frames were published in all, and since the last time `denoised` of them came."""
        if published is None:
            return
        if self.published is not None and published > self.published:
            due = published - self.published
            self._note_unheard(max(0, due - self._raw_since), due - denoised)
            self._raw_since = 0
        self.published = published

    def _note_unheard(self, raw: int, denoised: int) -> None:
        if raw or denoised:
            self.unheard["raw"] += raw
            self.unheard["denoised"] += denoised
            self._unheard.append((now_ns(), raw, denoised))

    def forget(self, before_ns: int | None) -> None:
        """What was not heard before the look-back begins is no loss. None: nothing is kept."""
        while self._unheard and (before_ns is None or self._unheard[0][0] < before_ns):
            _, raw, denoised = self._unheard.popleft()
            self.unheard["raw"] -= raw
            self.unheard["denoised"] -= denoised

    def stats(self, message: dict[str, Any]) -> None:
        self._note_ledger(message.get("ledger"))
        self.note_published(self.ledger.get("published"))
        self.report = {key: value for key, value in message.items() if key != "htype"}

    def _note_ledger(self, ledger: Any) -> None:
        if isinstance(ledger, dict):
            self.ledger = {
                name: ledger[name]
                for name in COUNTERS
                if isinstance(ledger.get(name), int) and 0 <= ledger[name] < 2**63
            }


def _identity(frame: Frame) -> tuple[Any, ...]:
    return frame.header.source, frame.header.series, frame.header.frame


def _both(counts: Mapping[str, int]) -> str:
    return f"{counts['raw']} raw and {counts['denoised']} denoised"
