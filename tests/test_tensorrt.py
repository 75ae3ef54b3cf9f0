"""Plans on GPUs, as far as order, memory and faults go: on `PretendGpu`s."""

from __future__ import annotations

import gc
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest

from emstream.cuda import is_pinned
from emstream.errors import CudaError, EngineError, EngineInvalid, ServerFailed
from emstream.frame import PIXEL_TYPES
from emstream.inference import Engine, IdentityEngine
from emstream.inference import flavour as flavours
from emstream.inference.cached import CachedPlansEngine
from emstream.inference.flavour import Flavour
from emstream.inference.plan import Profile, read_plan, write_plan
from emstream.inference.shared import SharedEngine
from emstream.inference.tensorrt import TensorRTEngine, TensorRTProgram, load_plan
from emstream.inference.tiling import TiledEngine
from emstream.intake import Overrun
from emstream.ring import Ring
from emstream.serve import Settings, build
from tests.conftest import exact, message
from tests.doubles import tensorrt as doubles
from tests.doubles.gpu import Network, PretendGpu, PretendProgram, Race
from tests.doubles.tensorrt import BAD, CARD, pretend_tensorrt, record_of

PROFILE = Profile(height=12, width=20, type="uint16", max_batch=4)
SHAPE = PROFILE.shape


def network(frames: np.ndarray) -> np.ndarray:
    """(B, H, W) float32 -> the same; each pixel depends on all that follow it in its row, and on where they are."""
    weighted = frames * (1 + np.arange(frames[0].size, dtype=np.float32).reshape(frames[0].shape) % 7)
    return frames + np.flip(np.cumsum(np.flip(weighted, 2), axis=2), 2) / np.float32(8)


def noise(number: int, shape: tuple[int, ...] = (1, *SHAPE), kind: str = "uint16") -> np.ndarray:
    return np.random.default_rng(number).poisson(3.0, shape).astype(kind)


class Bench:
    """An engine on a pretended GPU."""

    def __init__(self, gpu: PretendGpu, engine: TensorRTEngine, program: PretendProgram) -> None:
        self.gpu, self.engine, self.program = gpu, engine, program

    def pinned(self, values: np.ndarray) -> np.ndarray:
        """A copy in page-locked memory."""
        array = self.engine.allocate(values.nbytes).view(values.dtype).reshape(values.shape)
        array[:] = values
        return array

    def empty(self, shape: tuple[int, ...]) -> np.ndarray:
        return self.pinned(np.full(shape, np.nan, np.float32))

    def stays_right(self, batches: int = 12) -> None:
        """Put batches of all sizes through, as many in flight as the engine takes."""
        right(self.engine, [noise(n, (1 + n % PROFILE.max_batch, *SHAPE)) for n in range(batches)])


def right(engine: Engine, batches: list[np.ndarray], expect: Network = network) -> None:
    """All `batches` come out of the engine as they should, as many in flight as it takes."""
    tickets: deque[tuple[Any, np.ndarray]] = deque()

    def collect() -> None:
        ticket, counts = tickets.popleft()
        np.testing.assert_array_equal(engine.collect(ticket), expect(counts.astype(np.float32)))

    for counts in batches:
        if len(tickets) == engine.depth:
            collect()
        tickets.append((engine.submit(counts, np.full(counts.shape, np.nan, np.float32)), counts))
    while tickets:
        collect()


@pytest.fixture
def bench() -> Iterator[Callable[..., Bench]]:
    """Make a `Bench`: ``bench(profile, has_graphs=...)``. At the end it leaves no memory of its GPU in use."""
    made: list[Bench] = []

    def make(profile: Profile = PROFILE, network: Network = network, **options: Any) -> Bench:
        gpu = PretendGpu(**options)
        program = PretendProgram(gpu, profile, network)
        engine = TensorRTEngine(Path("u.plan"), record_of(profile), gpu, program)
        made.append(Bench(gpu, engine, program))
        return made[-1]

    yield make
    for each in made:
        each.gpu.heal()
        each.engine.close()
        assert each.gpu.live_bytes == 0
        assert each.program.closed


# -- order ------------------------------------------------------------------------


def test_nothing_runs_before_its_batch_is_collected(bench: Any) -> None:
    b = bench()
    batches = [b.pinned(noise(n)) for n in range(b.engine.depth)]
    results = [b.empty(each.shape) for each in batches]
    tickets = [b.engine.submit(*pair) for pair in zip(batches, results, strict=True)]
    assert not b.gpu.done
    assert all(np.isnan(result).all() for result in results)
    for done, (ticket, counts) in enumerate(zip(tickets, batches, strict=True), start=1):
        np.testing.assert_array_equal(b.engine.collect(ticket), network(counts.astype(np.float32)))
        assert (b.gpu.done["upload"], b.gpu.done["execute"], b.gpu.done["download"]) == (done, done, done)
    assert b.gpu.waiting == 0


def test_as_many_batches_as_it_says_are_in_flight_and_one_more_is_refused(bench: Any) -> None:
    b = bench()
    assert b.engine.depth >= 3  # one uploading, one computing, one downloading
    tickets = [b.engine.submit(noise(n), np.empty((1, *SHAPE), np.float32)) for n in range(b.engine.depth)]
    with pytest.raises(EngineError, match="3 batches are in flight already"):
        b.engine.submit(noise(9), np.empty((1, *SHAPE), np.float32))
    for ticket in tickets:
        b.engine.collect(ticket)
    b.stays_right()


def test_counts_that_change_before_their_batch_is_collected_would_show(bench: Any) -> None:
    b = bench()
    counts, expected = b.pinned(noise(0)), b.empty((1, *SHAPE))
    before = network(counts.astype(np.float32))
    ticket = b.engine.submit(counts, expected)
    counts += 1
    assert not np.array_equal(b.engine.collect(ticket), before)


def test_a_batch_that_its_owner_forgets_is_uploaded_all_the_same(bench: Any) -> None:
    b = bench()
    counts = noise(0)
    ticket = b.engine.submit(b.pinned(counts), np.empty(counts.shape, np.float32))
    gc.collect()
    np.testing.assert_array_equal(b.engine.collect(ticket), network(counts.astype(np.float32)))


def test_one_thread_submits_while_another_collects(bench: Any) -> None:
    b = bench()
    batches = [b.pinned(noise(n, (1 + n % 4, *SHAPE))) for n in range(40)]
    out: SimpleQueue[Any] = SimpleQueue()
    room = threading.Semaphore(b.engine.depth)

    def submit() -> None:
        for n in range(300):
            assert room.acquire(timeout=30)
            counts = batches[n % len(batches)]
            out.put((counts, b.engine.submit(counts, np.empty(counts.shape, np.float32))))

    thread = threading.Thread(target=submit)
    thread.start()
    for _ in range(300):
        counts, ticket = out.get(timeout=30)
        np.testing.assert_array_equal(b.engine.collect(ticket), network(counts.astype(np.float32)))
        room.release()
    thread.join(timeout=30)
    assert not thread.is_alive()


def test_a_lane_whose_batch_failed_is_not_reused_while_the_network_still_runs(bench: Any) -> None:
    """The record after the network fails: what is on the lane's own stream says nothing about the network."""
    b = bench()
    b.stays_right()
    for _ in range(2 * b.engine.depth):
        b.gpu.fail("record", after=1, times=1)
        with pytest.raises(CudaError, match="record"):
            b.engine.submit(noise(1), np.empty((1, *SHAPE), np.float32))
        assert b.gpu.waiting == 0
        b.stays_right(3)


def test_lanes_whose_streams_do_not_wait_for_each_other_would_be_noticed(monkeypatch: Any) -> None:
    gpu = PretendGpu()
    engine = TensorRTEngine(Path("u.plan"), record_of(PROFILE), gpu, PretendProgram(gpu, PROFILE, network))
    monkeypatch.setattr(gpu, "wait", lambda stream, event: None)
    with pytest.raises(Race, match="execute could overlap"):
        engine.submit(noise(0), np.empty((1, *SHAPE), np.float32))


# -- memory -----------------------------------------------------------------------


def test_page_locked_batches_are_copied_as_they_are_and_others_are_staged(bench: Any) -> None:
    b = bench()
    counts, expected = b.pinned(noise(0)), b.empty((1, *SHAPE))
    assert is_pinned(counts)
    before = b.gpu.made["pinned"]
    result = b.engine.collect(b.engine.submit(counts, expected))
    assert result is expected
    assert b.gpu.made["pinned"] == before
    b.engine.collect(b.engine.submit(noise(0), expected))
    assert b.gpu.made["pinned"] == before + 1
    plain = b.engine.collect(b.engine.submit(noise(0), np.empty((1, *SHAPE), np.float32)))
    assert b.gpu.made["pinned"] == before + 2
    np.testing.assert_array_equal(plain, network(noise(0).astype(np.float32)))


def test_steady_state_allocates_nothing(bench: Any) -> None:
    b = bench()
    b.stays_right(60)
    made, contexts = b.gpu.made.copy(), len(b.program.contexts)
    alive, pinned = b.gpu.alive, b.gpu.pinned_bytes
    b.stays_right(200)
    assert (b.gpu.made, b.gpu.alive, b.gpu.pinned_bytes) == (made, alive, pinned)
    assert len(b.program.contexts) == contexts == b.engine.depth * PROFILE.max_batch


@pytest.mark.parametrize(("shape", "kind", "staged"), [(SHAPE, "uint16", 0), ((9, 20), "uint8", 3 * 2)])
def test_a_prepared_engine_allocates_nothing_whatever_the_batch(
    bench: Any, shape: tuple[int, int], kind: str, staged: int
) -> None:
    """As much page-locked memory as such frames need: none where the GPU can copy them itself."""
    b = bench()
    b.engine.prepare(shape, np.dtype(kind))
    assert b.gpu.made["pinned"] == 2 + staged
    batches = [b.pinned(noise(n, (n, *shape), kind)) for n in range(1, PROFILE.max_batch + 1)]
    results = [b.empty(each.shape) for each in batches]
    made, captures = b.gpu.made.copy(), b.gpu.calls["capture"]
    for _ in range(2 * b.engine.depth):
        for pair in zip(batches, results, strict=True):
            b.engine.collect(b.engine.submit(*pair))
    assert b.gpu.made == made
    assert b.gpu.calls["capture"] == captures == PROFILE.max_batch * b.engine.depth


def test_close_gives_everything_back_and_may_be_called_twice(bench: Any) -> None:
    b = bench()
    b.stays_right(20)
    assert all(b.gpu.alive.values())
    b.engine.close()
    assert not any(b.gpu.alive.values())
    b.engine.close()


def test_close_goes_on_when_the_gpu_is_broken(caplog: Any) -> None:
    gpu = PretendGpu()
    engine = TensorRTEngine(Path("u.plan"), record_of(PROFILE), gpu, PretendProgram(gpu, PROFILE, network))
    gpu.fail("close")
    gpu.fail("free", times=2)
    engine.close()
    assert caplog.text.count("closing u.plan: ") == 3
    assert gpu.calls["free"] == 7


@pytest.mark.parametrize(("name", "calls"), [("allocate", 7), ("stream", 4), ("event", 9)])
def test_an_engine_that_does_not_fit_leaves_nothing_behind(name: str, calls: int) -> None:
    for after in range(calls):
        gpu = PretendGpu()
        program = PretendProgram(gpu, PROFILE, network)
        gpu.fail(name, after=after, times=1)
        with pytest.raises(CudaError, match=f"{name}: told to fail"):
            TensorRTEngine(Path("u.plan"), record_of(PROFILE), gpu, program)
        assert not any(gpu.alive.values())
        assert program.closed


# -- graphs -----------------------------------------------------------------------


def test_a_batch_size_is_captured_on_its_second_run_and_launched_from_then_on(bench: Any) -> None:
    b = bench()
    counts, expected = b.pinned(noise(0)), b.empty((1, *SHAPE))
    seen = []
    for _ in range(4):
        before = b.gpu.calls.copy()
        b.engine.collect(b.engine.submit(counts, expected))
        np.testing.assert_array_equal(expected, network(counts.astype(np.float32)))
        new = b.gpu.calls - before
        seen.append((new["execute"], new["capture"], new["launch"]))
        counts += 1
    assert seen == [(1, 0, 0), (1, 1, 1), (0, 0, 1), (0, 0, 1)]


@pytest.mark.parametrize("has_graphs", [True, False])
def test_without_graphs_kernels_are_launched_one_by_one(has_graphs: bool) -> None:
    """Where the GPU has none, and where they are not wanted."""
    gpu = PretendGpu(has_graphs=has_graphs)
    program = PretendProgram(gpu, PROFILE, network)
    engine = TensorRTEngine(Path("u.plan"), record_of(PROFILE), gpu, program, graphs=not has_graphs)
    right(engine, [noise(n) for n in range(12)])
    assert (gpu.calls["capture"], gpu.calls["launch"], gpu.calls["execute"]) == (0, 0, 12)
    engine.close()


@pytest.mark.parametrize(("name", "after"), [("capture", 0), ("instantiate", 0), ("execute", 1)])
def test_a_capture_that_fails_is_logged_once_and_costs_no_batch(
    bench: Any, caplog: Any, name: str, after: int
) -> None:
    b = bench()
    b.gpu.fail(name, after=after, times=1)
    for n in range(10):
        right(b.engine, [noise(n)])
    assert caplog.text.count("no CUDA graphs, kernels are launched one by one") == 1
    assert f"{name}: told to fail" in caplog.text
    assert b.gpu.calls["capture"] == 1
    assert b.gpu.calls["launch"] == 0


# -- faults -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "calls", "has_graphs"),
    [
        ("upload", 1, True),
        ("record", 3, True),
        ("wait", 2, True),
        ("launch", 1, True),
        ("download", 1, True),
        ("record", 3, False),
        ("execute", 1, False),
    ],
)
def test_a_call_that_fails_costs_its_batch_and_no_lane(
    bench: Any, name: str, calls: int, has_graphs: bool
) -> None:
    b = bench(has_graphs=has_graphs)
    b.stays_right(60)
    for failure in range(2 * b.engine.depth):
        b.gpu.fail(name, after=failure % calls, times=1)
        with pytest.raises(EngineError, match=f"{name}: told to fail"):
            b.engine.submit(b.pinned(noise(1)), b.empty((1, *SHAPE)))
        b.stays_right(4)


@pytest.mark.parametrize("name", ["context", "execute", "pin"])
def test_a_first_run_that_fails_costs_its_batch_and_no_lane(bench: Any, name: str) -> None:
    b = bench()
    for _ in range(2 * b.engine.depth):
        b.gpu.fail(name, times=1)
        with pytest.raises(EngineError, match=f"{name}: told to fail"):
            b.engine.submit(noise(1), np.empty((1, *SHAPE), np.float32))
    b.stays_right(60)
    assert b.gpu.calls["launch"] > 0


def test_a_batch_in_flight_survives_the_next_ones_failure(bench: Any) -> None:
    b = bench()
    b.stays_right()
    counts = b.pinned(noise(5))
    ticket = b.engine.submit(counts, b.empty(counts.shape))
    b.gpu.fail("upload", times=1)
    with pytest.raises(CudaError):
        b.engine.submit(noise(6), np.empty((1, *SHAPE), np.float32))
    np.testing.assert_array_equal(b.engine.collect(ticket), network(counts.astype(np.float32)))


def test_a_wait_that_fails_costs_its_batch_and_no_lane(bench: Any) -> None:
    b = bench()
    for n in range(2 * b.engine.depth):
        ticket = b.engine.submit(noise(n), np.empty((1, *SHAPE), np.float32))
        b.gpu.fail("synchronize", times=1)
        with pytest.raises(CudaError, match="synchronize"):
            b.engine.collect(ticket)
    b.stays_right()


def test_a_gpu_that_stays_broken_fails_every_batch_and_nothing_hangs(bench: Any, caplog: Any) -> None:
    b = bench()
    for name in ("upload", "record", "synchronize"):
        b.gpu.fail(name)
    for n in range(3 * b.engine.depth):
        with pytest.raises(CudaError, match="upload: told to fail"):
            b.engine.submit(noise(n), np.empty((1, *SHAPE), np.float32))
    assert "waiting for a batch: record: told to fail" in caplog.text


# -- sizes and types --------------------------------------------------------------


@pytest.mark.parametrize("shape", [(12, 20), (12, 19), (5, 20), (3, 4), (1, 1)])
@pytest.mark.parametrize("kind", ["uint8", "uint16"])
def test_smaller_frames_are_padded_with_their_mirror_image_and_cropped(
    bench: Any, shape: tuple[int, int], kind: str
) -> None:
    b = bench()

    def padded(frames: np.ndarray) -> np.ndarray:
        more = [(0, want - have) for want, have in zip(SHAPE, frames.shape[1:], strict=True)]
        frames = np.pad(frames, ((0, 0), *more), mode="symmetric")
        return network(frames)[:, : shape[0], : shape[1]]

    right(b.engine, [noise(n, (n % 4 + 1, *shape), kind) for n in range(8)], padded)


def test_larger_frames_are_tiled(bench: Any) -> None:
    profile = Profile(height=32, width=48, type="uint16", max_batch=2)
    b = bench(profile, network=lambda frames: 2 * frames)
    engine = TiledEngine(b.engine)
    for shape in [(100, 130), (32, 49), (33, 20), (31, 200)]:
        counts = noise(1, (2, *shape))
        assert engine.depth_for(shape) == 1
        expected = engine.collect(engine.submit(counts, np.empty(counts.shape, np.float32)))
        np.testing.assert_allclose(expected, 2.0 * counts, rtol=1e-5)


def test_a_plan_is_too_small_for_tiles_only_where_it_would_be_cut(bench: Any) -> None:
    narrow = Profile(height=64, width=10, type="uint16", max_batch=1)
    engine = TiledEngine(bench(narrow, network=lambda frames: 2 * frames).engine)
    counts = noise(1, (1, 90, 10))
    np.testing.assert_allclose(engine.denoise(counts), 2.0 * counts, rtol=1e-5)
    with pytest.raises(EngineError, match="90x11 are larger than the engine's 64x10, which is too small"):
        engine.denoise(noise(1, (90, 11)))


@pytest.mark.parametrize(
    ("plan", "frames", "wanted"),
    [
        ("uint8", "uint16", "uint16"),
        ("uint16", "uint32", "uint32"),
        ("uint16", "int8", "float32"),
        ("uint32", "float32", "float32"),
        ("uint8", "float64", "float32"),
    ],
)
def test_pixels_that_the_plan_cannot_hold_are_refused_with_the_command_that_builds_one(
    bench: Any, plan: str, frames: str, wanted: str
) -> None:
    b = bench(Profile(height=8, width=9, type=plan, max_batch=2))
    command = (
        f"u.plan is for {plan} pixels, and the frames are {frames}; build one for them: emstream build "
        f"engines/pretend.onnx -o u.plan --size 8x9 --type {wanted} --max-batch 2 --flavour tensorrt-rtx"
    )
    for attempt in (
        lambda: b.engine.denoise(np.zeros((8, 9), frames)),
        lambda: b.engine.prepare((8, 9), np.dtype(frames)),
    ):
        with pytest.raises(EngineError) as raised:
            attempt()
        assert str(raised.value) == command


def test_a_float_plan_takes_every_type(bench: Any) -> None:
    b = bench(Profile(height=8, width=9, type="float32", max_batch=2))
    for kind in PIXEL_TYPES:
        right(b.engine, [noise(1, (2, 8, 9), kind)])


@pytest.mark.parametrize(
    ("shape", "command"),
    [
        ((5, 12, 20), "--size 12x20 --type uint16 --max-batch 5"),
        ((1, 13, 20), "--size 13x20 --type uint16 --max-batch 4"),
        ((6, 5, 21), "--size 5x21 --type uint16 --max-batch 6"),
    ],
)
def test_batches_and_frames_beyond_the_profile_are_refused_with_the_command(
    bench: Any, shape: tuple[int, ...], command: str
) -> None:
    b = bench()
    for _ in range(2 * b.engine.depth):
        with pytest.raises(ValueError, match=r"is for 12x20:uint16, batches of 1-4, got ") as raised:
            b.engine.submit(noise(1, shape), np.empty(shape, np.float32))
        assert command in str(raised.value)
    b.stays_right()


# -- the service ------------------------------------------------------------------


def pixels(number: int, shape: tuple[int, int], kind: str) -> np.ndarray:
    """Different in every frame and pixel."""
    return ((np.arange(shape[0] * shape[1]).reshape(shape) + 7 * number) % 251).astype(kind)


def cached(gpu: PretendGpu, network: Network = network) -> CachedPlansEngine:
    from emstream.inference import default_engine

    pytest.importorskip("onnx", reason="building plans needs onnx: pip install 'emstream[rtx]'")

    def load(profile: Profile) -> Engine:
        program = PretendProgram(gpu, profile, network)
        return TensorRTEngine(Path("u.plan"), record_of(profile), gpu, program)

    return CachedPlansEngine(default_engine(), gpu, "pretend", load)


def check_published(run: Any, shapes: list[tuple[tuple[int, int], str]], every: int) -> list[int]:
    """The numbers of the frames published, whose pixels are right."""
    numbers = []
    for head, data in run.published():
        shape, kind = shapes[head["frame"] // every % len(shapes)]
        counts = pixels(head["frame"], shape, kind).astype(np.float32)
        np.testing.assert_array_equal(data, network(counts[None])[0])
        numbers.append(head["frame"])
    return numbers


SHAPES = [((12, 20), "uint16"), ((12, 20), "uint8"), ((30, 7), "uint32"), ((12, 20), "float32"),
          ((5, 5), "int16"), ((64, 64), "uint8")]  # fmt: skip


@pytest.mark.parametrize("slots", [2, 8])
def test_hundreds_of_frames_of_changing_sizes_come_out_in_order_with_their_pixels(
    rig: Any, slots: int
) -> None:
    gpu = PretendGpu()
    options = {"overrun": Overrun.block, "slots": slots, "frames": 400, "expect": "12x20:uint16"}
    run = rig(options, engine=TiledEngine(cached(gpu)))
    run.start()
    for n in range(400):
        run.camera.send_multipart(message(n, pixels(n, *SHAPES[n // 13 % len(SHAPES)])))
    run.join()
    assert run.ledger["failed"] == 0
    assert check_published(run, SHAPES, 13) == list(range(400))
    run.service.close()
    assert not any(gpu.alive.values())


def test_frames_of_one_plan_of_whatever_size_come_out_in_order(rig: Any, bench: Any) -> None:
    profile = Profile(height=32, width=48, type="uint16", max_batch=4)
    b = bench(profile, network=lambda frames: 2 * frames)
    shapes = [(32, 48), (20, 48), (70, 80)]
    run = rig({"overrun": Overrun.block, "slots": 3, "frames": 200}, engine=TiledEngine(b.engine))
    run.start()
    for n in range(200):
        run.camera.send_multipart(message(n, pixels(n, shapes[n // 9 % 3], "uint8")))
    run.join()
    published = run.published()
    assert [head["frame"] for head, _ in published] == list(range(200))
    for head, data in published:
        counts = pixels(head["frame"], shapes[head["frame"] // 9 % 3], "uint8")
        np.testing.assert_allclose(data, 2.0 * counts, rtol=1e-5)


@pytest.mark.parametrize("slots", [2, 4, 5])
def test_overload_drops_frames_and_mixes_none(rig: Any, bench: Any, slots: int) -> None:
    gate = threading.Event()

    def gated(frames: np.ndarray) -> np.ndarray:
        assert gate.wait(timeout=30)
        return network(frames)

    gate.set()
    b = bench(network=gated)
    run = rig({"overrun": Overrun.drop_oldest, "slots": slots}, engine=TiledEngine(b.engine))
    gate.clear()
    run.start()
    for n in range(300):
        run.camera.send_multipart(message(n, pixels(n, SHAPE, "uint16")))
    run.wait(lambda ledger: ledger["received"] == 300)
    gate.set()
    ledger = run.wait(lambda ledger: ledger["in_flight"] == 0)
    run.stop()
    assert exact(ledger)
    assert ledger["failed"] == 0
    assert ledger["dropped"] >= 300 - slots * PROFILE.max_batch
    numbers = check_published(run, [(SHAPE, "uint16")], 1)
    assert numbers == sorted(set(numbers))
    assert len(numbers) == ledger["published"] > 0
    if slots > b.engine.depth:  # otherwise all are in the engine, and none is left that could be dropped
        assert numbers[-1] == 299


@pytest.mark.parametrize("name", ["upload", "record", "launch", "synchronize"])
def test_a_gpu_that_fails_now_and_then_costs_those_batches_at_most(rig: Any, bench: Any, name: str) -> None:
    b = bench()
    run = rig({"overrun": Overrun.block, "slots": 4, "max_batch": 1}, engine=b.engine)
    b.gpu.fail(name, after=7, times=2)
    run.start()
    for n in range(60):
        run.camera.send_multipart(message(n, pixels(n, SHAPE, "uint16")))
    ledger = run.wait(lambda ledger: ledger["received"] == 60 and ledger["in_flight"] == 0)
    numbers = check_published(run, [(SHAPE, "uint16")], 1)
    assert ledger["failed"] <= 1  # a batch is tried twice
    assert b.gpu.calls[name] >= 60
    assert len(numbers) == 60 - ledger["failed"]
    assert numbers == sorted(numbers)


def test_the_rings_memory_is_the_engines_own(rig: Any, bench: Any) -> None:
    """Frames go from the camera to the GPU and back without another copy: nothing is ever staged."""
    b = bench()
    run = rig({"overrun": Overrun.block, "slots": 4, "frames": 100}, engine=TiledEngine(b.engine))
    before = b.gpu.made["pinned"]
    run.start()
    for n in range(100):
        run.camera.send_multipart(message(n, pixels(n, SHAPE, "uint16")))
    run.join()
    assert run.ledger["published"] == 100
    assert b.gpu.made["pinned"] == before


def test_larger_batches_than_a_plan_takes_are_refused_before_the_first_frame() -> None:
    engine = cached(PretendGpu())
    with pytest.raises(ValueError, match="takes batches of up to 8 frames, max_batch is 9"):
        build(Settings(input="sim://", output="tcp://127.0.0.1:*", max_batch=9), engine=engine)


# -- a plan for every kind of frame -----------------------------------------------


@pytest.mark.parametrize("kind", list(PIXEL_TYPES))
@pytest.mark.parametrize("shape", [(512, 512), (2048, 2048), (3000, 4000)])
def test_plans_take_the_batches_that_the_ring_makes(kind: str, shape: tuple[int, int]) -> None:
    profiles: list[Profile] = []

    class Loaded(IdentityEngine):
        def prepare(self, shape: Any, dtype: Any) -> None:
            """Nothing: the frames would be large."""

    def load(profile: Profile) -> Engine:
        profiles.append(profile)
        return Loaded()

    pytest.importorskip("onnx", reason="building plans needs onnx: pip install 'emstream[rtx]'")
    from emstream.inference import default_engine

    engine = CachedPlansEngine(default_engine(), PretendGpu(), "pretend", load)
    engine.prepare(shape, np.dtype(kind))
    ring = Ring(slots=2, max_batch=engine.best_batch, allocate=lambda nbytes: np.empty(nbytes, np.uint8))
    ring.prepare(shape, np.dtype(kind))
    assert profiles[0].max_batch >= ring._free[0].capacity
    assert profiles[0].shape == shape


def test_plans_used_longest_ago_are_closed_and_loaded_again_when_needed() -> None:
    gpu = PretendGpu()
    engine = cached(gpu)
    sizes = [(4 + n, 6) for n in range(6)]
    for _ in range(3):
        for shape in sizes:
            right(engine, [noise(1, (1, *shape))])
    assert gpu.alive["streams"] == 4 * 4  # four engines, of three lanes and one stream to compute on
    engine.close()
    assert not any(gpu.alive.values())


def test_a_plan_with_batches_in_flight_is_not_closed() -> None:
    gpu = PretendGpu()
    engine = cached(gpu)
    early = noise(0, (1, 3, 3))
    ticket = engine.submit(early, np.empty(early.shape, np.float32))
    for n in range(10):
        right(engine, [noise(n, (1, 4 + n, 6))])
    np.testing.assert_array_equal(engine.collect(ticket), network(early.astype(np.float32)))
    engine.close()
    assert gpu.live_bytes == 0


def test_batches_in_flight_are_collected_while_a_plan_is_built() -> None:
    building, go_on = threading.Event(), threading.Event()
    gpu = PretendGpu()
    engine = cached(gpu)
    load = engine._load

    def slow(profile: Profile) -> Engine:
        if profile.height == 99:
            building.set()
            assert go_on.wait(timeout=30)
        return load(profile)

    engine._load = slow
    counts = noise(0)
    ticket = engine.submit(counts, np.empty(counts.shape, np.float32))
    thread = threading.Thread(target=lambda: right(engine, [noise(1, (1, 99, 9))]))
    thread.start()
    assert building.wait(timeout=20)
    collected: list[np.ndarray] = []
    other = threading.Thread(target=lambda: collected.append(engine.collect(ticket)))
    other.start()
    other.join(timeout=20)
    assert collected, "collecting waits for the plan"
    go_on.set()
    thread.join(timeout=20)
    assert not thread.is_alive()
    engine.close()


def test_a_plan_that_cannot_be_loaded_costs_its_frames_only() -> None:
    gpu = PretendGpu()
    engine = cached(gpu)
    right(engine, [noise(0)])
    before = gpu.live_bytes
    for after in range(9):
        gpu.fail("allocate", after=after % 7, times=1)
        with pytest.raises(CudaError):
            engine.submit(noise(1, (1, 50, 50)), np.empty((1, 50, 50), np.float32))
        assert gpu.live_bytes == before
        right(engine, [noise(0)])
    right(engine, [noise(1, (1, 50, 50))])
    engine.close()


def test_a_plan_that_cannot_be_built_is_tried_once(caplog: Any) -> None:
    gpu = PretendGpu()
    engine = cached(gpu)
    load, tries = engine._load, list[Profile]()

    def fail(profile: Profile) -> Engine:
        tries.append(profile)
        if profile.height == 9:
            raise EngineInvalid("TensorRT built no plan")
        return load(profile)

    engine._load = fail
    for n in range(5):
        with pytest.raises(EngineInvalid, match="TensorRT built no plan") as raised:
            engine.submit(noise(n, (1, 9, 9)), np.empty((1, 9, 9), np.float32))
        assert len(raised.traceback) < 6, "each time it is raised anew"
        right(engine, [noise(n)])
    assert [profile.height for profile in tries] == [9, SHAPE[0]]
    engine.close()


def test_frames_that_nobody_announced_are_prepared_for_with_the_first_of_them() -> None:
    gpu = PretendGpu()
    engine = cached(gpu)
    assert gpu.calls["capture"] == 0
    right(engine, [noise(0)])
    captures = gpu.calls["capture"]
    assert captures == engine.depth * engine.best_batch
    right(engine, [noise(n, (1 + n % engine.best_batch, *SHAPE)) for n in range(40)])
    assert gpu.calls["capture"] == captures
    engine.close()


def test_an_engine_that_cannot_be_prepared_whole_runs_what_it_can(caplog: Any) -> None:
    gpu = PretendGpu()
    engine = cached(gpu)
    gpu.fail("context", after=3, times=1)
    right(engine, [noise(0)])
    assert "the first batches of 12x20:uint16, batches of 1-8 may be late: " in caplog.text
    right(engine, [noise(n, (1 + n % 8, *SHAPE)) for n in range(30)])
    gpu.fail("context")
    with pytest.raises(EngineError, match="context: told to fail"):
        engine.prepare((5, 5), np.dtype(np.uint8))
    gpu.heal()
    engine.prepare((5, 5), np.dtype(np.uint8))
    engine.close()
    assert gpu.live_bytes == 0


# -- TensorRT's own calls ---------------------------------------------------------


def plan_file(path: Path, compiled: bytes = b"compiled", **changes: Any) -> Path:
    write_plan(path, record_of(PROFILE, **changes), compiled)
    return path


def pretended(gpu: PretendGpu, name: str = "tensorrt-rtx") -> Flavour:
    return Flavour(name, "1.7", pretend_tensorrt([gpu], network))


@pytest.mark.parametrize("name", ["tensorrt-rtx", "tensorrt"])
def test_a_plan_is_loaded_run_and_given_back(tmp_path: Path, name: str) -> None:
    gpu = PretendGpu()
    path = plan_file(tmp_path / "u.plan", flavour=name)
    engine = load_plan(path, gpu, pretended(gpu, name))
    assert engine.made_for == (SHAPE, np.dtype(np.uint16))
    assert engine.device == f"Pretend GPU, fp16, {name} 1.7, pretend 1.0"
    assert gpu.live_bytes > doubles.WEIGHTS_BYTES + doubles.WORKING_BYTES
    right(engine, [noise(n, (1 + n % 4, *SHAPE)) for n in range(30)])
    assert gpu.calls["launch"] > 0
    engine.close()
    assert not any(gpu.alive.values())


@pytest.mark.parametrize("kind", ["uint8", "uint16", "uint32", "float32"])
def test_pixels_of_every_type_reach_the_network_as_they_are(tmp_path: Path, kind: str) -> None:
    gpu = PretendGpu()
    profile = Profile(height=5, width=7, type=kind, max_batch=2)
    write_plan(tmp_path / "u.plan", record_of(profile), b"compiled")
    engine = load_plan(tmp_path / "u.plan", gpu, pretended(gpu))
    largest = 1e6 if kind == "float32" else np.iinfo(kind).max
    right(engine, [np.random.default_rng(n).uniform(0, largest, (2, 5, 7)).astype(kind) for n in range(3)])
    engine.close()


def test_a_plan_that_tensorrt_refuses_is_named_with_the_reason_and_the_command(tmp_path: Path) -> None:
    gpu = PretendGpu()
    path = plan_file(tmp_path / "u.plan", BAD)
    text = (
        rf"tensorrt-rtx 1\.7 refuses {path}: Serialization assertion failed; build it again: emstream build "
        rf"engines/pretend\.onnx -o {path} --size 12x20 --type uint16 --max-batch 4 --flavour tensorrt-rtx$"
    )
    with pytest.raises(EngineInvalid, match=text):
        load_plan(path, gpu, pretended(gpu))
    gc.collect()
    assert not any(gpu.alive.values())


def test_a_plan_for_which_there_is_no_memory_leaves_nothing_behind(tmp_path: Path) -> None:
    path = plan_file(tmp_path / "u.plan")
    for after in range(8):
        gpu = PretendGpu()
        gpu.fail("allocate", after=after, times=1)
        with pytest.raises(CudaError):
            load_plan(path, gpu, pretended(gpu))
        gc.collect()
        assert not any(gpu.alive.values())


def test_a_context_that_cannot_be_made_costs_its_batch(tmp_path: Path) -> None:
    gpu = PretendGpu(memory_bytes=30_000)
    engine = load_plan(plan_file(tmp_path / "u.plan"), gpu, pretended(gpu))
    right(engine, [noise(0)])
    with gpu.current():
        taken = gpu.allocate(gpu.memory_free())
        with pytest.raises(EngineError, match="TensorRT made no execution context: out of memory"):
            engine.submit(noise(0, (2, *SHAPE)), np.empty((2, *SHAPE), np.float32))
        gpu.free(taken)
    right(engine, [noise(n, (2, *SHAPE)) for n in range(6)])
    engine.close()


def test_kernels_compiled_for_this_gpu_are_there_at_the_next_start(tmp_path: Path) -> None:
    path, kept = plan_file(tmp_path / "u.plan"), tmp_path / "kernels" / "gpu-13.0"
    for start in range(1, 4):
        gpu = PretendGpu()
        engine = load_plan(path, gpu, pretended(gpu), kept)
        assert gpu.calls["deserialize"] == (start > 1)
        right(engine, [noise(0)])
        engine.close()
        assert kept.read_bytes() == f"kernels {start}".encode()
    assert [each.name for each in kept.parent.iterdir()] == [kept.name]


def test_kernels_are_kept_once_an_engine_is_prepared(tmp_path: Path) -> None:
    """A service may be killed."""
    gpu, kept = PretendGpu(), tmp_path / "kernels" / "gpu-13.0"
    engine = load_plan(plan_file(tmp_path / "u.plan"), gpu, pretended(gpu), kept)
    engine.prepare(SHAPE, np.dtype(np.uint16))
    assert kept.read_bytes() == f"kernels {engine.depth * PROFILE.max_batch}".encode()
    engine.close()


def test_kernels_that_cannot_be_read_or_kept_cost_nothing_but_time(tmp_path: Path, caplog: Any) -> None:
    path, kept = plan_file(tmp_path / "u.plan"), tmp_path / "kernels"
    kept.write_bytes(b"rubbish")
    gpu = PretendGpu()
    engine = load_plan(path, gpu, pretended(gpu), kept)
    right(engine, [noise(0)])
    engine.close()
    assert kept.read_bytes() == b"kernels 1"
    kept.unlink()
    kept.mkdir()
    engine = load_plan(path, gpu, pretended(gpu), kept)
    right(engine, [noise(0)])
    engine.close()
    assert "this start is as slow as the first one" in caplog.text
    assert f"the next start is as slow as this one: cannot write {kept}" in caplog.text
    assert gpu.live_bytes == 0


def test_a_context_refuses_to_run_before_all_is_set() -> None:
    """The double, that is: what the engine does in order must matter."""
    gpu = PretendGpu()
    with gpu.current():
        logger = pretended(gpu).logger()
        trt = pretend_tensorrt([gpu], network)
        context = (
            trt.Runtime(logger)
            .deserialize_cuda_engine(b"compiled")
            .create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        )
        stream = gpu.handle(gpu.stream())
        assert not context.execute_async_v3(stream)
        assert "not set" in logger.last_error()
        assert not context.set_tensor_address("counts", 1)
        with pytest.raises(AssertionError, match="too little"):
            context.set_device_memory(256, doubles.WORKING_BYTES - 1)
        del context


def test_every_call_of_the_double_is_one_of_tensorrts_own() -> None:
    real = pytest.importorskip("tensorrt_rtx", reason="pip install 'emstream[rtx]'")
    for name in ("Runtime", "ICudaEngine", "IRuntimeConfig", "IRuntimeCache", "IExecutionContext", "ILogger",
                 "ExecutionContextAllocationStrategy", "DynamicShapesKernelSpecializationStrategy"):  # fmt: skip
        for member in vars(getattr(doubles, name)):
            if not member.startswith("_"):
                assert hasattr(getattr(real, name), member), f"{name}.{member}"


def test_tensorrts_errors_are_logged_and_the_last_one_is_kept(caplog: Any) -> None:
    flavour = pretended(PretendGpu())
    logger, levels = flavour.logger(), flavour.module.ILogger
    assert logger.last_error() == "it gave no reason"
    with caplog.at_level(logging.DEBUG, flavours.log.name):
        for level in (levels.ERROR, levels.INTERNAL_ERROR, levels.WARNING, levels.INFO, levels.VERBOSE):
            logger.log(level, f"severity {level}")
    assert logger.last_error() == f"severity {levels.INTERNAL_ERROR}"
    assert [record.levelno for record in caplog.records] == [
        logging.ERROR,
        logging.ERROR,
        logging.INFO,
        logging.DEBUG,
    ], "and nothing of each step it takes"


def test_tensorrts_errors_may_be_left_to_whoever_raises_them(caplog: Any) -> None:
    flavour = pretended(PretendGpu())
    logger = flavour.logger(errors=logging.DEBUG)
    logger.log(flavour.module.ILogger.ERROR, "no memory")
    assert logger.last_error() == "no memory"
    assert not caplog.records


# -- several GPUs -----------------------------------------------------------------


class Part(IdentityEngine):
    """One of several engines; notes which batches it got, and fails or waits when told."""

    def __init__(self, depth: int = 2) -> None:
        self.depth = depth
        self.got: list[int] = []
        self.in_flight = 0
        self.fails: str | None = None
        self.error: EngineError = CudaError("told to fail")
        self.collecting: Callable[[], None] = lambda: None

    def submit(self, counts: np.ndarray, expected: np.ndarray) -> Any:
        self.got.append(int(counts[0, 0, 0]))
        assert self.in_flight < self.depth, "more batches than it takes"
        if self.fails == "submit":
            raise self.error
        self.in_flight += 1
        return super().submit(counts, expected)

    def collect(self, ticket: np.ndarray) -> np.ndarray:
        self.in_flight -= 1
        self.collecting()
        if self.fails == "collect":
            raise self.error
        return super().collect(ticket)


def through(engine: Engine, numbers: range) -> tuple[list[int], list[int]]:
    """Put numbered batches through, as many in flight as gain: those that came out, those that failed."""
    done, failed, tickets = [], [], deque[tuple[int, Any]]()

    def collect() -> None:
        number, ticket = tickets.popleft()
        try:
            done.append(int(engine.collect(ticket)[0, 0, 0]))
            assert done[-1] == number
        except CudaError:
            failed.append(number)

    for number in numbers:
        while len(tickets) >= engine.depth_for((2, 2)):
            collect()
        counts = np.full((1, 2, 2), number, np.uint16)
        try:
            tickets.append((number, engine.submit(counts, np.empty(counts.shape, np.float32))))
        except CudaError:
            failed.append(number)
    while tickets:
        collect()
    return done, failed


def test_a_batch_goes_to_the_engine_with_the_least_to_do() -> None:
    small, large = Part(depth=1), Part(depth=3)
    engine = SharedEngine([small, large])
    assert engine.depth == engine.depth_for((2, 2)) == 4
    tickets = [
        engine.submit(np.full((1, 2, 2), n, np.uint16), np.empty((1, 2, 2), np.float32)) for n in range(4)
    ]
    assert (small.got, large.got) == ([0], [1, 2, 3])
    engine.collect(tickets[0])
    engine.submit(np.full((1, 2, 2), 4, np.uint16), np.empty((1, 2, 2), np.float32))
    assert small.got == [0, 4]


def test_engines_of_very_different_speed_keep_the_order(rig: Any) -> None:
    """The slow one finishes a batch only once all that may be in flight behind it is."""
    changed = threading.Condition()

    class Fast(Part):
        def submit(self, counts: np.ndarray, expected: np.ndarray) -> Any:
            with changed:
                changed.notify()
                return super().submit(counts, expected)

    class Slow(Part):
        def collect(self, ticket: np.ndarray) -> np.ndarray:
            with changed:
                full = changed.wait_for(lambda: fast.in_flight == 2 or max(fast.got) >= 58, timeout=20)
            assert full
            return super().collect(ticket)

        def prepare(self, shape: Any, dtype: Any) -> None:
            """Nothing is in flight yet."""

    slow, fast = Slow(), Fast()
    engine = SharedEngine([slow, fast])
    run = rig({"overrun": Overrun.block, "frames": 60, "max_batch": 1, "expect": "2x2:uint16"}, engine=engine)
    run.start()
    for n in range(60):
        run.camera.send_multipart(message(n, np.full((2, 2), n, np.uint16)))
    run.join()
    published = run.published()
    assert [head["frame"] for head, _ in published] == list(range(60))
    assert all((data == head["frame"]).all() for head, data in published)
    assert min(len(slow.got), len(fast.got)) > 10


@pytest.mark.parametrize("fails", ["submit", "collect"])
@pytest.mark.parametrize("broken", [0, 1])
def test_a_broken_engine_costs_its_own_batches_and_few_of_them(fails: str, broken: int) -> None:
    """It is always idle, so that it would get nearly all of them."""
    parts = [Part(depth=3), Part(depth=3)]
    engine = SharedEngine(parts)
    assert through(engine, range(20)) == (list(range(20)), [])
    parts[broken].fails = fails
    done, failed = through(engine, range(20, 520))
    assert sorted(done + failed) == list(range(20, 520))
    assert done == sorted(done)
    assert set(failed) <= set(parts[broken].got)
    assert 1 <= len(failed) <= 20
    parts[broken].fails = None
    parts[broken].got.clear()
    assert through(engine, range(600, 900))[1] == []
    assert len(parts[broken].got) > 50


def test_a_server_that_goes_on_failing_is_tried_ever_more_seldom() -> None:
    """If it hangs, each trial takes seconds."""
    parts = [Part(depth=2), Part(depth=2)]
    engine, said = SharedEngine(parts), []
    counts = np.zeros((1, 2, 2), np.uint16)

    def send(many: int) -> int:
        before = len(parts[0].got)
        for _ in range(many):
            with suppress(ServerFailed):
                engine.collect(engine.submit(counts, np.zeros((1, 2, 2), np.float32)))
        return len(parts[0].got) - before

    parts[0].fails, parts[0].error = "submit", ServerFailed("it hangs")
    said = [send(1000), send(1600), send(1600)]
    assert said[0] <= 5
    assert said[1:] == [1, 1]
    parts[0].fails = None
    send(1600)
    assert 90 <= send(200) <= 110


def test_a_batch_that_is_refused_says_nothing_about_the_engine() -> None:
    gpus = [PretendGpu(0), PretendGpu(1)]
    engine = SharedEngine(
        [
            TensorRTEngine(Path("u.plan"), record_of(PROFILE), gpu, PretendProgram(gpu, PROFILE, network))
            for gpu in gpus
        ]
    )
    for bad in (noise(0, (1, *SHAPE), "float32"), noise(0, (9, *SHAPE))):
        with pytest.raises((EngineError, ValueError)):
            engine.submit(bad, np.empty(bad.shape, np.float32))
        assert engine.depth_for(SHAPE) == engine.depth
    right(engine, [noise(n) for n in range(12)])
    engine.close()


def test_no_engine_gets_more_batches_than_it_takes_while_another_rests() -> None:
    parts = [Part(depth=2), Part(depth=2)]
    engine = SharedEngine(parts)
    counts, expected = np.zeros((1, 2, 2), np.uint16), np.zeros((1, 2, 2), np.float32)
    tickets = deque(engine.submit(counts, expected) for _ in range(4))
    parts[0].fails = "collect"
    for _ in range(6):
        assert len(tickets) == engine.depth
        with pytest.raises(CudaError) if tickets[0].place == 0 else nullcontext():
            engine.collect(tickets.popleft())
        tickets.append(engine.submit(counts, expected))


def test_engines_that_all_fail_are_all_tried() -> None:
    parts = [Part(), Part()]
    engine = SharedEngine(parts)
    for part in parts:
        part.fails = "submit"
    assert through(engine, range(20))[1] == list(range(20))
    assert engine.depth_for((2, 2)) == engine.depth
    for part in parts:
        part.fails = None
    assert through(engine, range(20)) == (list(range(20)), [])


def test_two_gpus_share_a_service_and_one_of_them_fails(rig: Any) -> None:
    gpus = [PretendGpu(0), PretendGpu(1)]
    engines = [
        TensorRTEngine(Path("u.plan"), record_of(PROFILE), gpu, PretendProgram(gpu, PROFILE, network))
        for gpu in gpus
    ]
    run = rig({"overrun": Overrun.block, "max_batch": 1}, engine=TiledEngine(SharedEngine(engines)))
    for gpu in gpus:
        gpu.calls.clear()
    gpus[1].fail("upload", after=10)
    run.start()
    for n in range(200):
        run.camera.send_multipart(message(n, pixels(n, SHAPE, "uint16")))
    ledger = run.wait(lambda ledger: ledger["received"] == 200 and ledger["in_flight"] == 0)
    numbers = check_published(run, [(SHAPE, "uint16")], 1)
    assert ledger["failed"] <= 1
    assert len(numbers) == 200 - ledger["failed"]
    assert numbers == sorted(numbers)
    assert gpus[1].calls["upload"] >= 11
    run.stop()
    run.service.close()
    assert [gpu.live_bytes for gpu in gpus] == [0, 0]


def test_engines_of_different_networks_do_not_share() -> None:
    one, other = Part(), Part()
    other.sha256 = "1" * 64
    with pytest.raises(ValueError, match="the same network"):
        SharedEngine([one, other])
    with pytest.raises(ValueError, match="at least 1, got none"):
        SharedEngine([])


def test_the_program_refuses_what_tensorrt_refuses(tmp_path: Path) -> None:
    gpu = PretendGpu()
    record, compiled = read_plan(plan_file(tmp_path / "u.plan"))
    with gpu.current():
        program = TensorRTProgram(pretended(gpu), record.profile, compiled, tmp_path / "u.plan")
        memory = [gpu.allocate(4000) for _ in range(3)]
        addresses = [gpu.address(buffer) for buffer in memory]
        with pytest.raises(EngineError, match=r"TensorRT refuses a batch of \(0, 12, 20, 2\)"):
            program.context(0, *addresses)
        program.close()
    assert record.card == CARD
