"""A movie in place of the camera: order, numbers, schedule, stopping."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from emstream import sources, wire
from emstream.corrections import Corrections
from emstream.errors import SourceError
from emstream.frame import FrameHeader, now_ns
from emstream.intake import Intake, Overrun
from emstream.ledger import Ledger
from emstream.movies import save_movie
from emstream.ring import Ring, SeriesMark
from emstream.sources import files, open_source
from emstream.sources.files import FileSource


def movie(frames: int = 6, shape: tuple[int, int] = (13, 17), dtype: Any = np.uint16) -> np.ndarray:
    return (np.arange(frames * shape[0] * shape[1]) % 251).reshape(frames, *shape).astype(dtype)


def saved(folder: Path, pixels: np.ndarray | None = None, name: str = "run 7.tif", **options: Any) -> Path:
    pixels = movie() if pixels is None else pixels
    save_movie(folder / name, pixels, shape=pixels.shape, dtype=pixels.dtype, **options)
    return folder / name


class Bench:
    """The real intake, ring and ledger behind a source, and all that comes through."""

    def __init__(self, slots: int = 4, **options: Any) -> None:
        self.ledger = Ledger()
        self.ring = Ring(slots, max_batch=2)
        self.intake = Intake(self.ring, self.ledger, **{"overrun": Overrun.block} | options)
        self.stop = threading.Event()
        self.marks: list[dict[str, Any]] = []
        self.headers: list[FrameHeader] = []
        self.frames: list[np.ndarray] = []
        self.order: list[str | int] = []
        self.fault: BaseException | None = None
        self.on_frame: Callable[[], object] = lambda: None

    def run(self, source: Any) -> Bench:
        """Run the source in a thread to its end, and take what it sends meanwhile."""
        thread = threading.Thread(target=self._run, args=(source,))
        thread.start()
        while (item := self.ring.claim()) is not None:
            if isinstance(item, SeriesMark):
                self.marks.append(item.message)
                self.order.append(item.message["htype"])
                continue
            for row, header in zip(item.counts, item.headers, strict=True):
                self.headers.append(header)
                self.frames.append(row.copy())
                self.order.append(header.frame)
                self.ledger.publish()
                self.on_frame()
            self.ring.release(item)
        thread.join(timeout=30)
        assert not thread.is_alive()
        if self.fault:
            raise self.fault
        return self

    def _run(self, source: Any) -> None:
        try:
            source.run(self.intake, self.stop)
        except BaseException as error:
            self.fault = error
        finally:
            self.ring.close()


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_frames_come_in_order_between_a_start_and_an_end(tmp_path: Path, bench: Bench) -> None:
    bench.run(FileSource(saved(tmp_path)))
    assert bench.order == [wire.START, 0, 1, 2, 3, 4, 5, wire.END]
    np.testing.assert_array_equal(bench.frames, movie())
    counted = bench.ledger.snapshot()
    assert counted["received"] == counted["published"] == 6
    assert counted["missing"] == counted["dropped"] == counted["rejected"] == 0


def test_marks_name_the_file_the_series_and_how_many_frames(tmp_path: Path, bench: Bench) -> None:
    bench.run(FileSource(saved(tmp_path)))
    fields = {"source": "run 7.tif", "series": 0, "frames": 6}
    assert bench.marks == [{"htype": wire.START, **fields}, {"htype": wire.END, **fields}]


def test_header_says_where_the_frame_comes_from(tmp_path: Path, bench: Bench) -> None:
    before_ns = now_ns()
    bench.run(FileSource(saved(tmp_path, name="run.h5", pixel_size_m=6.2e-12, units="ADU")))
    after_ns = now_ns()
    header = bench.headers[3]
    assert (header.frame, header.source, header.series) == (3, "run.h5", 0)
    assert (header.shape, header.type, header.units) == ((13, 17), "uint16", "ADU")
    assert header.pixel_size_m == 6.2e-12
    times = [header.timestamp_ns or 0 for header in bench.headers]
    assert times == sorted(times)
    assert before_ns <= times[0] <= times[-1] <= after_ns


def test_header_survives_the_wire(tmp_path: Path, bench: Bench) -> None:
    bench.run(FileSource(saved(tmp_path, pixel_size_m=6.2e-12)))
    for header in bench.headers:
        assert wire.header_of(wire.unpack(wire.pack(wire.map_of(header)))) == header
    for mark in bench.marks:
        assert wire.unpack(wire.pack(mark)) == mark


@pytest.mark.skipif(sys.platform != "linux", reason="file names are text on this system")
def test_name_that_is_not_text_still_goes_into_a_header(tmp_path: Path, bench: Bench) -> None:
    path = saved(tmp_path, name="run.npy").rename(tmp_path / "run\udcff.npy")
    bench.run(FileSource(path))
    assert wire.unpack(wire.pack(wire.map_of(bench.headers[0])))["source"] == "run\ufffd.npy"


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (7, 1), (33, 95), (245, 158)])
def test_odd_sizes_pass_unharmed(tmp_path: Path, bench: Bench, shape: tuple[int, int]) -> None:
    bench.run(FileSource(saved(tmp_path, movie(5, shape, np.float32))))
    np.testing.assert_array_equal(bench.frames, movie(5, shape))


@pytest.mark.parametrize(
    ("stored", "sent"),
    [
        ("uint8", "uint8"),
        ("float64", "float64"),
        (">i4", "int32"),
        ("int64", "float32"),
        ("uint64", "float32"),
        ("float16", "float32"),
        ("bool", "uint8"),
    ],
)
def test_every_stored_type_becomes_one_that_cameras_may_send(
    tmp_path: Path, bench: Bench, stored: str, sent: str
) -> None:
    pixels = movie(dtype=stored)
    np.save(tmp_path / "m.npy", pixels)
    bench.run(FileSource(tmp_path / "m.npy"))
    assert {header.type for header in bench.headers} == {sent}
    assert bench.frames[0].dtype == sent
    np.testing.assert_array_equal(bench.frames, pixels)


def test_image_is_a_series_of_one_frame(tmp_path: Path, bench: Bench) -> None:
    np.save(tmp_path / "m.npy", movie()[0])
    bench.run(FileSource(tmp_path / "m.npy"))
    assert bench.order == [wire.START, 0, wire.END]


def test_first_and_last_choose_frames_that_keep_their_numbers(tmp_path: Path, bench: Bench) -> None:
    bench.run(FileSource(saved(tmp_path), first=2, last=4))
    assert bench.order == [wire.START, 2, 3, 4, wire.END]
    np.testing.assert_array_equal(bench.frames, movie()[2:5])
    assert bench.marks[0]["frames"] == 3
    assert bench.ledger.snapshot()["missing"] == 0


def test_each_pass_of_a_loop_is_a_series_of_its_own(tmp_path: Path, bench: Bench) -> None:
    def stop_in_the_third_pass() -> None:
        if bench.headers[-1].series == 2:
            bench.stop.set()

    bench.on_frame = stop_in_the_third_pass
    bench.run(FileSource(saved(tmp_path), loop=True))
    numbers = [(header.series, header.frame) for header in bench.headers]
    assert numbers[:13] == [(s, n) for s in (0, 1, 2) for n in range(6)][:13]
    assert [(mark["htype"], mark["series"]) for mark in bench.marks[:4]] == [
        (wire.START, 0), (wire.END, 0), (wire.START, 1), (wire.END, 1),
    ]  # fmt: skip
    assert bench.ledger.snapshot()["missing"] == 0


def test_loop_begins_again_at_the_first_chosen_frame(tmp_path: Path, bench: Bench) -> None:
    bench.on_frame = lambda: bench.stop.set() if len(bench.frames) == 4 else None
    bench.run(FileSource(saved(tmp_path), loop=True, first=4))
    assert [header.frame for header in bench.headers[:4]] == [4, 5, 4, 5]


# -- schedule -------------------------------------------------------------------


class Clock:
    """Time that passes only while the source waits, or when a test spends it."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.waits_s: list[float] = []

    def monotonic(self) -> float:
        return self.now_s


class Stop(threading.Event):
    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        assert timeout > 0
        self._clock.now_s += timeout
        self._clock.waits_s.append(timeout)
        return self.is_set()


class SlowIntake:
    """Takes every frame and notes when; each costs time."""

    max_frame_bytes = 1 << 30

    def __init__(self, clock: Clock, costs_s: list[float]) -> None:
        self._clock, self._costs_s = clock, costs_s
        self.offered_s: list[float] = []

    def mark(self, message: dict[str, Any]) -> None: ...

    def accept(self) -> None: ...

    def offer(self, header: FrameHeader) -> np.ndarray | None:
        self.offered_s.append(self._clock.now_s - 1000)
        if self._costs_s:
            self._clock.now_s += self._costs_s.pop(0)
        return None


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(files, "time", clock)
    monkeypatch.setattr(sources, "time", clock)
    return clock


def schedule(source: FileSource, clock: Clock, costs_s: list[float]) -> list[float]:
    intake = SlowIntake(clock, costs_s)
    source.run(intake, Stop(clock))  # type: ignore[arg-type]
    return intake.offered_s


def test_frames_are_sent_on_an_absolute_schedule(tmp_path: Path, clock: Clock) -> None:
    source = FileSource(saved(tmp_path), rate_hz=40)
    assert schedule(source, clock, [0.003] * 6) == pytest.approx([0, 0.025, 0.05, 0.075, 0.1, 0.125])


def test_late_frame_does_not_delay_those_after_it(tmp_path: Path, clock: Clock) -> None:
    source = FileSource(saved(tmp_path), rate_hz=40)
    assert schedule(source, clock, [0, 0.06]) == pytest.approx([0, 0.025, 0.085, 0.085, 0.1, 0.125])


def test_without_a_rate_nothing_waits(tmp_path: Path, clock: Clock) -> None:
    assert schedule(FileSource(saved(tmp_path)), clock, [0.5]) == pytest.approx([0, 0.5, 0.5, 0.5, 0.5, 0.5])
    assert clock.waits_s == []


def test_schedule_goes_on_through_the_passes_of_a_loop(tmp_path: Path, clock: Clock) -> None:
    stop = Stop(clock)
    intake = SlowIntake(clock, [])
    intake.mark = lambda message: stop.set() if message["series"] == 2 else None  # type: ignore[method-assign]
    FileSource(saved(tmp_path), rate_hz=10, loop=True).run(intake, stop)  # type: ignore[arg-type]
    assert intake.offered_s == pytest.approx([0.1 * n for n in range(12)])


def test_paced_frames_arrive_complete_and_in_order(tmp_path: Path, bench: Bench) -> None:
    bench.run(FileSource(saved(tmp_path), rate_hz=200))
    assert bench.order == [wire.START, 0, 1, 2, 3, 4, 5, wire.END]
    times = [header.timestamp_ns or 0 for header in bench.headers]
    assert times[-1] - times[0] >= 5 / 200 * 1e9 * 0.99  # never early, however busy the machine


# -- stopping and overrun -------------------------------------------------------


def test_stop_ends_the_longest_wait_at_once_and_ends_the_series(tmp_path: Path, bench: Bench) -> None:
    bench.on_frame = bench.stop.set
    bench.run(FileSource(saved(tmp_path), rate_hz=1e-9))  # the second frame is due in 30 years
    assert bench.order == [wire.START, 0, wire.END]
    assert bench.marks[1]["frames"] == 1


def test_stop_before_the_start_sends_nothing(tmp_path: Path, bench: Bench) -> None:
    bench.stop.set()
    assert bench.run(FileSource(saved(tmp_path))).order == []


def test_stop_ends_a_loop_without_a_rate(tmp_path: Path, bench: Bench) -> None:
    bench.on_frame = lambda: bench.stop.set() if len(bench.frames) == 50 else None
    bench.run(FileSource(saved(tmp_path), loop=True))
    assert len(bench.frames) < 70
    assert bench.order[-1] == wire.END


def test_frames_that_find_no_slot_are_counted_as_dropped(tmp_path: Path) -> None:
    bench = Bench(slots=2, overrun=Overrun.drop_newest)
    FileSource(saved(tmp_path)).run(bench.intake, bench.stop)
    counted = bench.ledger.snapshot()
    assert (counted["received"], counted["dropped"], counted["in_flight"]) == (6, 2, 4)


def test_gain_and_offset_apply_as_to_any_camera(tmp_path: Path) -> None:
    bench = Bench(corrections=Corrections(gain=32.0, offset=10.0))
    bench.run(FileSource(saved(tmp_path, units="ADU")))
    np.testing.assert_array_equal(bench.frames, (movie().astype(np.float32) - 10) / 32)
    assert {header.units for header in bench.headers} == {"electrons"}


def test_frames_that_are_not_numbers_are_rejected_and_the_others_pass(tmp_path: Path, bench: Bench) -> None:
    pixels = movie(dtype=np.float32)
    pixels[2, 3, 4] = np.nan
    bench.run(FileSource(saved(tmp_path, pixels)))
    assert bench.order == [wire.START, 0, 1, 3, 4, 5, wire.END]
    assert bench.ledger.snapshot()["rejected"] == 1


def test_file_waits_for_the_engine_unless_it_has_a_rate(tmp_path: Path) -> None:
    assert FileSource(saved(tmp_path)).lossless
    assert not FileSource(saved(tmp_path, name="m.npy"), rate_hz=40).lossless


# -- the URL, and what is refused -----------------------------------------------


def test_url_names_file_rate_frames_and_dataset(tmp_path: Path, bench: Bench) -> None:
    with h5py.File(tmp_path / "run 7.h5", "w") as file:
        file["a/raw"], file["a/dark"] = movie(), movie(1)
    folder = str(tmp_path).replace(" ", "%20")
    source = open_source(f"file://{folder}/run%207.h5?rate=1000&first=1&last=3&dataset=/a/raw")
    assert bench.run(source).order == [wire.START, 1, 2, 3, wire.END]
    np.testing.assert_array_equal(bench.frames, movie()[1:4])


def test_relative_url_starts_at_the_working_folder(
    tmp_path: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "Runs").mkdir()
    saved(tmp_path / "Runs", name="Movie.npy")
    monkeypatch.chdir(tmp_path)
    assert len(bench.run(open_source("file://Runs/Movie.npy")).frames) == 6


def test_url_may_ask_for_a_loop(tmp_path: Path, bench: Bench) -> None:
    path = saved(tmp_path, name="m.npy")
    bench.on_frame = lambda: bench.stop.set() if len(bench.frames) == 10 else None
    assert len(bench.run(open_source(f"file://{path}?loop=true")).frames) >= 10


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ("speed=4", "unknown option speed; known: rate, loop, first, last, dataset"),
        ("rate=0", "rate must be a positive number"),
        ("rate=-40", "rate must be a positive number"),
        ("rate=nan", "rate must be a positive number"),
        ("rate=inf", "rate must be a positive number"),
        ("rate=fast", "rate must be a number, got 'fast'"),
        ("loop=maybe", "loop must be true or false"),
        ("first=-1", "first must not be negative"),
        ("first=1.5", "first must be a number"),
        ("first=6", "has frames 0-5"),
        ("last=6", "has frames 0-5; first and last must lie there in order, got 0 and 6"),
        ("first=3&last=2", "got 3 and 2"),
    ],
)
def test_options_that_make_no_sense_are_refused(tmp_path: Path, options: str, complaint: str) -> None:
    path = saved(tmp_path, name="m.npy")
    with pytest.raises(ValueError, match=complaint):
        open_source(f"file://{path}?{options}")


def test_url_without_a_path_is_refused() -> None:
    with pytest.raises(ValueError, match="expected file:///PATH"):
        open_source("file://?rate=40")


@pytest.mark.parametrize("rate_hz", [0.0, -1.0, float("nan"), float("inf")])
def test_rate_that_is_not_positive_is_refused(tmp_path: Path, rate_hz: float) -> None:
    with pytest.raises(ValueError, match="rate must be positive"):
        FileSource(saved(tmp_path), rate_hz=rate_hz)


def test_files_that_are_no_movies_are_source_errors(tmp_path: Path) -> None:
    (tmp_path / "m.tif").write_bytes(b"no movie")
    np.save(tmp_path / "c.npy", np.zeros((5, 8, 9), complex))
    for name, complaint in {
        "m.tif": "cannot be read", "missing.npy": "does not exist", "m.xyz": "suffix", "c.npy": "complex",
    }.items():  # fmt: skip
        with pytest.raises(SourceError, match=f"{name}.*{complaint}"):
            open_source(f"file://{tmp_path / name}")


def test_file_that_vanished_since_it_was_checked_is_a_source_error(tmp_path: Path, bench: Bench) -> None:
    source = FileSource(saved(tmp_path))
    (tmp_path / "run 7.tif").unlink()
    with pytest.raises(SourceError, match="does not exist"):
        bench.run(source)


def test_file_that_turns_bad_on_the_way_is_a_source_error(tmp_path: Path, bench: Bench) -> None:
    path = saved(tmp_path, name="m.npy")
    source = FileSource(path, loop=True)
    bench.on_frame = lambda: path.write_bytes(path.read_bytes()[:500]) if len(bench.frames) == 3 else None
    with pytest.raises(SourceError, match="cut short while it was read"):
        bench.run(source)
    assert bench.ledger.snapshot()["in_flight"] == 0


def test_frames_over_the_limit_are_a_source_error(tmp_path: Path) -> None:
    bench = Bench(max_frame_bytes=441)
    with pytest.raises(SourceError, match="442 bytes, more than the limit of 441"):
        bench.run(FileSource(saved(tmp_path)))
