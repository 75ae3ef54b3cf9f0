"""The PyTorch engine: what it does on a GPU, done on the CPU as far as a CPU can; the rest where there is a GPU."""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Queue
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the torch engine needs PyTorch: pip install 'emstream[train]'")

import torch.nn.functional as F
from torch import Tensor, nn

from emstream.errors import EngineError, EngineInvalid, EngineUnavailable
from emstream.inference import EngineCard
from emstream.inference import torch as module
from emstream.inference.torch import MODES, TorchEngine

MULTIPLE_PX = 8
CARD = EngineCard(
    name="small", architecture="UNet", parameters=1, field_of_view_px=50, multiple_px=MULTIPLE_PX, bias_free=True,
    dose_range=(0.1, 10.0), sampling_pm=6.2, psnr_db=0.0, ssim=0.0, trained="not", commit="none",
)  # fmt: skip
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class SmallUNet(nn.Module):
    """Every operation of the real networks once, bias-free, on multiples of 8 px."""

    def __init__(self) -> None:
        super().__init__()
        widths = ((4, 8), (8, 8), (8, 16), (24, 8))
        self.convolutions = nn.ModuleList(nn.Conv2d(a, b, 3, bias=False) for a, b in widths)
        self.head = nn.Conv2d(8, 4, 1, bias=False)

    def forward(self, counts: Tensor) -> Tensor:
        stem, fine, coarse, join = (
            lambda x, c=c: F.relu(c(F.pad(x, (1, 1, 1, 1), mode="replicate"))) for c in self.convolutions
        )
        skip = fine(F.max_pool2d(stem(F.pixel_unshuffle(counts, 2)), 2))
        x = coarse(F.max_pool2d(skip, 2))
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
        x = F.interpolate(join(torch.cat([skip, x], dim=1)), scale_factor=2, mode="nearest")
        return F.pixel_shuffle(self.head(x), 2)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path: Path = tmp_path_factory.mktemp("torch") / "small.pt2"
    rows, columns = (MULTIPLE_PX * torch.export.Dim(axis, min=2, max=64) for axis in ("rows", "columns"))
    free = {0: torch.export.Dim("batch", min=1, max=64), 2: rows, 3: columns}
    program = torch.export.export(SmallUNet().eval(), (torch.zeros(2, 1, 32, 48),), dynamic_shapes=(free,))
    torch.export.save(program, path, extra_files={"card.json": json.dumps(CARD.to_metadata())})
    return path


@pytest.fixture(scope="module")
def reference(path: Path) -> TorchEngine:
    return TorchEngine(path)


@pytest.fixture
def half(path: Path) -> TorchEngine:
    return TorchEngine(path, _as_on_gpu=True)


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """torch.compile leaves functions as they are; the shapes of the counts they are called with."""
    shapes: list[tuple[int, ...]] = []

    def compile(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        assert options == {"mode": "max-autotune-no-cudagraphs", "dynamic": False, "fullgraph": True}
        sizes: set[tuple[int, ...]] = set()

        def run(network: Any, counts: Any, *arguments: Any) -> Any:
            shapes.append(tuple(counts.shape))
            sizes.add(shapes[-1])
            assert len(sizes) == 1, "compiled for one size"
            return function(network, counts, *arguments)

        return run

    monkeypatch.setattr(torch, "compile", compile)
    return shapes


def counts(shape: tuple[int, ...], kind: str = "uint8", dose: float = 0.45, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).poisson(dose, shape).astype(kind)


def run(engine: TorchEngine, y: np.ndarray) -> np.ndarray:
    return engine.collect(engine.submit(y, np.full(y.shape, np.nan, np.float32)))


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """Largest relative difference."""
    return float(np.abs(a - b).max() / np.abs(b).max())


# -- numbers ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "padded"),
    [((1, 1), (16, 16)), ((16, 24), (16, 24)), ((17, 9), (24, 16)), ((64, 65), (64, 72))],
)
@pytest.mark.parametrize("as_on_gpu", [False, True])
def test_frames_are_padded_to_the_multiple_on_the_card(
    path: Path, shape: tuple[int, int], padded: tuple[int, int], as_on_gpu: bool
) -> None:
    engine = TorchEngine(path, _as_on_gpu=as_on_gpu)
    seen = []

    def network(x: Any) -> Any:
        seen.append(tuple(x.shape))
        return x

    engine._network = network
    y = counts((2, *shape))
    np.testing.assert_array_equal(run(engine, y), y)
    assert seen == [(2, 1, *padded)]


def test_on_the_cpu_the_result_is_the_networks_own(path: Path, reference: TorchEngine) -> None:
    y = counts((3, 32, 40))
    with torch.inference_mode():
        expected = torch.export.load(path).module()(torch.from_numpy(y).float()[:, None])[:, 0].numpy()
    assert difference(run(reference, y), expected) < 1e-6


@pytest.mark.parametrize(
    "kind", ["uint8", "uint16", "uint32", "int8", "int16", "int32", "float32", "float64"]
)
def test_half_precision_gives_every_pixel_types_picture(
    half: TorchEngine, reference: TorchEngine, kind: str
) -> None:
    y = counts((2, 50, 70), kind)
    assert difference(run(half, y), run(reference, y.astype(np.float32))) < 1e-2


@pytest.mark.parametrize(("kind", "dose"), [("uint16", 4e4), ("uint32", 3e9), ("float32", 1e-6)])
def test_half_precision_covers_counts_of_any_size(
    half: TorchEngine, reference: TorchEngine, kind: str, dose: float
) -> None:
    """Beyond 2**15 and 2**31, whose top bit is no sign, and far beyond what half precision can hold."""
    y = (dose * (1 + 0.3 * np.random.default_rng(0).standard_normal((1, 40, 40)).clip(-1, 1))).astype(kind)
    for engine in (half, reference):
        assert difference(run(engine, y), run(reference, y.astype(np.float64))) < 1e-2


def test_frames_of_one_batch_keep_their_own_scale(half: TorchEngine, reference: TorchEngine) -> None:
    y = counts((3, 48, 48), "float32") * np.array([1e-4, 1, 1e6], np.float32)[:, None, None]
    for result, truth in zip(run(half, y), run(reference, y), strict=True):
        assert difference(result, truth) < 1e-2


def test_hot_pixel_does_not_overflow(half: TorchEngine) -> None:
    y = counts((1, 320, 320), "uint32")
    y[0, 30, 30] = 2**32 - 1  # 100,000 times the mean
    assert np.isfinite(run(half, y)).all()


def test_empty_frame_stays_empty(half: TorchEngine) -> None:
    assert not run(half, np.zeros((1, 32, 32), np.uint16)).any()


# -- batches and sizes -----------------------------------------------------------


def test_batches_are_compiled_for_powers_of_two(
    path: Path, reference: TorchEngine, uncompiled: list[tuple[int, ...]]
) -> None:
    engine = TorchEngine(path, mode="max-autotune", _as_on_gpu=True)
    frames = counts((5, 32, 32))
    alone = np.stack([run(reference, frame[None])[0] for frame in frames])
    for batch in (5, 4, 3, 2, 1):
        assert difference(run(engine, frames[:batch]), alone[:batch]) < 1e-2
    assert [shape[0] for shape in uncompiled] == [8, 4, 4, 2, 1]


def test_size_that_comes_back_is_not_compiled_again(path: Path, uncompiled: list[tuple[int, ...]]) -> None:
    engine = TorchEngine(path, mode="max-autotune", _as_on_gpu=True)
    sizes = [(1, 16 + n, 16) for n in range(module._KEPT_PLANS + 2)]
    first = [run(engine, counts(size)) for size in sizes]
    assert len(engine._plans) == module._KEPT_PLANS
    compiled = dict(engine._compiled)
    assert len(compiled) == len(sizes)
    again = [run(engine, counts(size)) for size in sizes]
    assert engine._compiled == compiled
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, other)


def test_batch_in_flight_survives_the_sizes_after_it(
    half: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_KEPT_PLANS", 1)
    y = counts((1, 40, 40))
    truth = run(half, y)
    ticket = half.submit(y, np.empty(y.shape, np.float32))
    run(half, counts((1, 24, 24)))
    np.testing.assert_array_equal(half.collect(ticket), truth)
    np.testing.assert_array_equal(run(half, y), truth)


def test_memory_is_allocated_with_the_first_batch_only(
    half: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    y = counts((3, 32, 32), "uint16")
    truth = run(half, y)

    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("allocates")

    monkeypatch.setattr(torch, "zeros", refuse)
    run(half, counts((4, 32, 32), "uint16"))
    np.testing.assert_array_equal(run(half, y), truth)


@pytest.mark.parametrize("lay_out", [lambda y: y[:, ::2, ::2], lambda y: y.transpose(0, 2, 1)])
def test_frames_that_are_strided_or_read_only_are_taken(
    half: TorchEngine, lay_out: Callable[[np.ndarray], np.ndarray]
) -> None:
    view = lay_out(counts((2, 64, 64), "uint16"))
    view.setflags(write=False)
    np.testing.assert_array_equal(run(half, view), run(half, view.copy()))


# -- in flight -------------------------------------------------------------------


def test_one_thread_submits_while_another_collects(half: TorchEngine) -> None:
    frames = [counts((1 + n % 3, 24, 24), seed=n) for n in range(60)]
    truth = [run(half, frame) for frame in frames]
    room = threading.Semaphore(half.depth)
    tickets: Queue[Any] = Queue()
    results: list[np.ndarray] = []

    def collect() -> None:
        for _ in frames:
            results.append(half.collect(tickets.get(timeout=60)))
            room.release()

    collector = threading.Thread(target=collect)
    collector.start()
    for frame in frames:
        assert room.acquire(timeout=60)
        tickets.put(half.submit(frame, np.full(frame.shape, np.nan, np.float32)))
    collector.join(timeout=60)
    for result, expected in zip(results, truth, strict=True):
        np.testing.assert_array_equal(result, expected)


def test_one_batch_too_many_is_refused(half: TorchEngine) -> None:
    y = counts((1, 16, 16))
    tickets = [half.submit(y, np.empty(y.shape, np.float32)) for _ in range(half.depth)]
    with pytest.raises(EngineError, match="2 batches are in flight already"):
        half.submit(y, np.empty(y.shape, np.float32))
    for ticket in tickets:
        half.collect(ticket)
    run(half, y)


def test_lack_of_memory_names_the_batch_and_costs_only_that(half: TorchEngine) -> None:
    y, network = counts((3, 16, 24)), half._network
    truth = run(half, y)

    def full(x: Any) -> Any:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    half._network = full
    for _ in range(2 * half.depth):
        with pytest.raises(EngineError, match="no memory left for 3 frames of 16x24"):
            run(half, y)
    half._network = network
    np.testing.assert_array_equal(run(half, y), truth)


@contextlib.contextmanager
def recorded(graph: Any, *, stream: Any, capture_error_mode: str) -> Iterator[None]:
    """Stands in for torch.cuda.graph."""
    assert capture_error_mode == "thread_local"
    graph.captured = True
    yield


class RecordedGraph:
    captured = False
    replays = 0

    def replay(self) -> None:
        assert self.captured
        RecordedGraph.replays += 1


def test_network_is_captured_once_for_each_lane_and_replayed(
    path: Path, uncompiled: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
    monkeypatch.setattr(torch.cuda, "graph", recorded)
    engine = TorchEngine(path, mode="max-autotune", _as_on_gpu=True)
    engine._graphs = True
    for _ in range(5):
        run(engine, counts((3, 16, 16)))
    assert uncompiled == [(4, 16, 16)] * 2 * engine.depth  # once to compile and once to capture
    assert RecordedGraph.replays == 5


# -- what cannot be --------------------------------------------------------------


def test_unknown_mode_names_the_known_ones(path: Path) -> None:
    with pytest.raises(ValueError, match="one of eager, default, reduce-overhead, max-autotune, got 'fast'"):
        TorchEngine(path, mode="fast")


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:-1", "cuda:x", "0", ""])
def test_device_of_another_kind_is_refused(path: Path, device: str) -> None:
    with pytest.raises(ValueError, match="device must be cpu or cuda:N, got"):
        TorchEngine(path, device=device)


def test_gpu_where_there_is_none_says_what_runs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EngineUnavailable, match=r"cuda:0: this PyTorch, .*; what runs here is cpu"):
        TorchEngine(path, device="cuda:0")


def test_gpu_beyond_the_last_names_those_there_are(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H100")
    with pytest.raises(EngineUnavailable, match=r"no cuda:1; what runs here is cpu, cuda:0 \(NVIDIA H100\)"):
        TorchEngine(path, device="cuda:1")


def test_program_without_a_card_is_refused(path: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare.pt2"
    torch.export.save(torch.export.load(path), bare)
    with pytest.raises(EngineInvalid, match="it has no card"):
        TorchEngine(bare)


def test_device_says_processor_precision_mode_and_library(reference: TorchEngine, half: TorchEngine) -> None:
    version = torch.__version__.split("+")[0]
    assert reference.device == f"CPU, f32 eager, PyTorch {version}"
    assert half.device == f"CPU, f16 eager, PyTorch {version}"


# -- compiled, and on a GPU ------------------------------------------------------


@pytest.mark.timeout(60)
@pytest.mark.filterwarnings("ignore:`torch.jit")  # torch.compile's own imports
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler")
def test_exported_program_compiles_whole(path: Path, reference: TorchEngine) -> None:
    engine = TorchEngine(path, mode="default", _as_on_gpu=True)
    y = counts((3, 30, 20), "uint16")
    assert difference(run(engine, y), run(reference, y)) < 1e-2


@needs_gpu
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch.compile's own
@pytest.mark.parametrize("mode", MODES)
def test_gpu_gives_the_cpus_picture_in_every_mode(path: Path, reference: TorchEngine, mode: str) -> None:
    engine = TorchEngine(path, device="cuda:0", mode=mode)
    for kind in ("uint8", "uint16", "uint32", "float64"):
        frames = [counts((3, 60, 80), kind, seed=n) for n in range(6)]
        results = [np.full(frame.shape, np.nan, np.float32) for frame in frames]
        waiting = [engine.submit(frames[0], results[0])]
        for frame, result in zip(frames[1:], results[1:], strict=True):
            waiting.append(engine.submit(frame, result))
            engine.collect(waiting.pop(0))
        engine.collect(waiting.pop())
        for frame, result in zip(frames, results, strict=True):
            assert difference(result, run(reference, frame)) < 1e-2


@needs_gpu
def test_gpu_takes_page_locked_batches_as_they_are(path: Path, reference: TorchEngine) -> None:
    engine = TorchEngine(path, device="cuda:0", mode="eager")
    y = counts((2, 60, 80), "uint16")
    locked = engine.allocate(y.nbytes).view(y.dtype).reshape(y.shape)
    expected = engine.allocate(4 * y.size).view(np.float32).reshape(y.shape)
    locked[:] = y
    ticket = engine.submit(locked, expected)
    assert ticket.staged is None
    assert difference(engine.collect(ticket), run(reference, y)) < 1e-2


@needs_gpu
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch.compile's own
def test_gpu_prepared_in_one_thread_serves_another(path: Path, reference: TorchEngine) -> None:
    engine = TorchEngine(path, device="cuda:0", mode="reduce-overhead")
    engine.prepare((60, 80), np.dtype(np.uint8))
    y, results = counts((1, 60, 80)), []
    thread = threading.Thread(target=lambda: results.append(run(engine, y)))
    thread.start()
    thread.join(timeout=500)
    assert difference(results[0], run(reference, y)) < 1e-2
