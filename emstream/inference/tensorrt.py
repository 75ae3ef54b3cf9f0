"""Runs a plan on one GPU: upload, compute and download of neighbouring batches overlap.

A batch takes a lane: device memory for its input and output, a stream for its copies,
and for each batch size an execution context and its CUDA graph. Computing happens on
one stream for all lanes, so that they can share TensorRT's working memory::

    lane 0   | upload |         | download |
    lane 1            | upload |           | download |
    compute           | 0      | 1         | 2 ...

Events tie the streams together; in the steady state nothing waits for the whole device. Batches in
page-locked memory (the ring's, from `allocate`) are copied by the GPU itself. Others,
and frames of another type or smaller than the plan's, go through the lane's own
page-locked memory.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from emstream.cuda import Gpu, is_pinned
from emstream.errors import CudaError, EngineError, EngineInvalid
from emstream.inference.build import INPUT, OUTPUT, input_shape
from emstream.inference.engine import Engine
from emstream.inference.flavour import Flavour
from emstream.inference.keep import keep, kept
from emstream.inference.plan import PLAN_TYPES, Profile, Record, read_plan

log = logging.getLogger(__name__)
_FLOAT32 = np.dtype(np.float32)
_LANES = 3  # one batch uploading, one computing, one downloading


class Context(Protocol):
    """The network set up for one batch size and one place in device memory."""

    def execute(self, stream: int) -> None:
        """Put the network on a stream (CUstream)."""


class Program(Protocol):
    """A plan made ready for one GPU."""

    working_bytes: int
    """Device memory that every context needs while it executes, and only then."""

    def context(self, batch: int, counts: int, expected: int, working: int) -> Context:
        """Set up for `batch` frames at the device addresses `counts`, `expected` and `working`."""

    def keep_kernels(self) -> None:
        """Keep the kernels compiled so far for the next start, where there are any."""

    def close(self) -> None:
        """Keep what is worth keeping for the next start, and free the rest; its contexts are gone."""


class TensorRTProgram:
    """A plan in TensorRT. Its calls need the GPU's context to be current."""

    def __init__(
        self,
        flavour: Flavour,
        profile: Profile,
        compiled: bytes,
        path: Path,
        kernel_cache: Path | None = None,
    ) -> None:
        """`kernel_cache` is where TensorRT for RTX keeps the kernels it compiles for this GPU."""
        trt = flavour.module
        self._profile, self._logger = profile, flavour.logger()
        self._runtime = trt.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine(compiled)
        if self._engine is None:
            raise EngineInvalid(
                f"{flavour.name} {flavour.version} refuses {path}: {self._logger.last_error()}"
            )
        self.working_bytes = int(self._engine.device_memory_size_v2)
        by_user = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        self._how: Any = by_user
        self._cache, self._cache_path = None, kernel_cache
        if flavour.portable:
            config = self._engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(by_user)
            # Kernels for a new batch size are compiled before it runs, not beside: a graph keeps them for good.
            config.dynamic_shapes_kernel_specialization_strategy = (
                trt.DynamicShapesKernelSpecializationStrategy.EAGER
            )
            if kernel_cache is not None:
                self._cache = config.create_runtime_cache()
                if known := kept(kernel_cache):
                    self._cache.deserialize(known)
                config.set_runtime_cache(self._cache)
            self._how = config

    def context(self, batch: int, counts: int, expected: int, working: int) -> Context:
        context = self._engine.create_execution_context(self._how)
        if context is None:
            raise EngineError(f"TensorRT made no execution context: {self._logger.last_error()}")
        context.set_device_memory(working, self.working_bytes)
        shape = input_shape(self._profile, batch)
        done = [
            context.set_input_shape(INPUT, shape),
            context.set_tensor_address(INPUT, counts),
            context.set_tensor_address(OUTPUT, expected),
        ]
        if not all(done):
            raise EngineError(f"TensorRT refuses a batch of {shape}: {self._logger.last_error()}")
        return _TensorRTContext(context, self._logger)

    def keep_kernels(self) -> None:
        if self._cache is not None and self._cache_path is not None:
            keep(self._cache_path, bytes(self._cache.serialize()))

    def close(self) -> None:
        self.keep_kernels()
        self._how = self._cache = self._engine = self._runtime = None


class _TensorRTContext:
    def __init__(self, context: Any, logger: Any) -> None:
        self._context, self._logger = context, logger

    def execute(self, stream: int) -> None:
        if not self._context.execute_async_v3(stream):
            raise EngineError(f"TensorRT could not run a batch: {self._logger.last_error()}")


@dataclass
class _Run:
    """How one lane runs one batch size: plainly at first, from a graph once that is captured."""

    context: Context
    settled: bool = False
    """Whether it ran once, which is when TensorRT allocates what a graph cannot."""
    graph: Any = None


@dataclass
class _Lane:
    stream: Any
    uploaded: Any
    computed: Any
    downloaded: Any
    counts: Any
    expected: Any
    runs: dict[int, _Run] = field(default_factory=dict)
    staged_counts: np.ndarray | None = None
    """(max_batch, H, W) page-locked, of the plan's type; made when first needed."""
    staged_expected: np.ndarray | None = None


@dataclass
class _Ticket:
    lane: _Lane
    source: np.ndarray
    """Kept, for the GPU may yet have to read it."""
    expected: np.ndarray
    staged: np.ndarray | None
    """Where the result comes in when it cannot come into `expected` itself, (B, H, W) of the plan."""


class TensorRTEngine(Engine):
    """One plan on one GPU; one thread may submit while another collects."""

    depth = _LANES

    def __init__(
        self, path: Path, record: Record, gpu: Gpu, program: Program, *, graphs: bool = True
    ) -> None:
        """`graphs` off launches kernel by kernel; the benches compare."""
        self._gpu, self._program, self._profile, self._path = gpu, program, record.profile, path
        self.record = record
        self.card, self.name, self.sha256 = record.card, record.card.name, record.onnx_sha256
        self.best_batch = self.max_batch = record.profile.max_batch
        self.largest_px = record.profile.shape
        self.made_for = record.profile.shape, record.profile.dtype
        self.device = f"{gpu.info.name}, {record.precision}, {record.flavour} {record.version}, {gpu.api}"
        self._graphs = graphs and gpu.has_graphs
        self._lock = threading.Lock()
        self._buffers: list[Any] = []  # all device memory
        self._lanes: list[_Lane] = []
        self._closed = False
        try:
            with gpu.current():
                self._working = self._allocate(max(1, program.working_bytes))
                self._compute: Any = gpu.stream()
                self._lanes.extend(self._new_lane() for _ in range(_LANES))
        except BaseException:
            self.close()
            raise
        self._idle = list(self._lanes)

    def allocate(self, nbytes: int) -> np.ndarray:
        return self._gpu.pin(nbytes)

    def memory_free(self) -> int:
        with self._gpu.current():
            return self._gpu.memory_free()

    def submit(self, counts: np.ndarray, expected: np.ndarray) -> _Ticket:
        self._check(counts)
        with self._lock:
            if not self._idle:
                raise EngineError(f"{self.depth} batches are in flight already: collect one first")
            lane = self._idle.pop()
        try:
            source = counts if self._direct(counts, self._profile.dtype) else self._stage(lane, counts)
            target = (
                expected if self._direct(expected, _FLOAT32) else self._staged_expected(lane, len(counts))
            )
            with self._gpu.current():
                self._enqueue(lane, source, target)
        except BaseException:
            self._retire(lane)
            raise
        return _Ticket(lane, source, expected, None if target is expected else target)

    def collect(self, ticket: _Ticket) -> np.ndarray:
        lane, expected = ticket.lane, ticket.expected
        try:
            with self._gpu.current():
                self._gpu.synchronize(lane.downloaded)
            if ticket.staged is not None:
                height, width = expected.shape[1:]
                np.copyto(expected, ticket.staged[:, :height, :width])
        finally:
            with self._lock:
                self._idle.append(lane)
        return expected

    def prepare(self, shape: tuple[int, int], dtype: np.dtype[Any]) -> None:
        """Run every lane at every batch size until each comes from a graph.

        What a batch size costs at first (its context, for TensorRT for RTX its kernels too) would
        otherwise hold up the stream when that size first occurs.
        """
        self._check_type(dtype)
        rows = (self._profile.max_batch, *shape)
        counts, expected = self._pin(rows, dtype), self._pin(rows, _FLOAT32)  # as the ring's are
        for batch in range(1, self._profile.max_batch + 1):
            for _ in range(2 if self._graphs else 1):
                tickets = [self.submit(counts[:batch], expected[:batch]) for _ in self._lanes]
                for ticket in tickets:
                    self.collect(ticket)
        with self._gpu.current():
            self._program.keep_kernels()

    def close(self) -> None:
        """Free what it holds on the device, once nothing is under way. A broken GPU is only logged."""
        if self._closed:
            return
        self._closed = True
        for lane in self._lanes:
            self._wait_for(lane)
        with self._gpu.current():
            for lane in self._lanes:
                lane.runs.clear()
            steps: list[Callable[[], None]] = [self._program.close]
            for close in steps + [partial(self._gpu.free, buffer) for buffer in self._buffers]:
                try:
                    close()
                except EngineError as error:
                    log.warning("closing %s: %s", self._path, error)
            self._buffers, self._lanes, self._idle, self._compute = [], [], [], None

    # -- one batch ----------------------------------------------------------------

    def _enqueue(self, lane: _Lane, source: np.ndarray, target: np.ndarray) -> None:
        gpu = self._gpu
        gpu.upload(lane.counts, source, lane.stream)
        gpu.record(lane.uploaded, lane.stream)
        gpu.wait(self._compute, lane.uploaded)
        self._run(lane, len(source))
        gpu.record(lane.computed, self._compute)
        gpu.wait(lane.stream, lane.computed)
        gpu.download(target, lane.expected, lane.stream)
        gpu.record(lane.downloaded, lane.stream)

    def _run(self, lane: _Lane, batch: int) -> None:
        gpu = self._gpu
        run = lane.runs.get(batch)
        if run is None:
            addresses = (gpu.address(buffer) for buffer in (lane.counts, lane.expected, self._working))
            run = lane.runs[batch] = _Run(self._program.context(batch, *addresses))
        if run.graph is None and self._graphs and run.settled:
            try:
                with gpu.capture(self._compute) as kept:
                    run.context.execute(gpu.handle(self._compute))
                run.graph = kept[0]
            except (CudaError, EngineError) as error:
                log.warning("no CUDA graphs, kernels are launched one by one: %s", error)
                self._graphs = False
        if run.graph is not None:
            gpu.launch(run.graph, self._compute)
        else:
            run.context.execute(gpu.handle(self._compute))
            run.settled = True

    # -- memory -------------------------------------------------------------------

    def _check_type(self, dtype: np.dtype[Any]) -> None:
        p = self._profile
        if p.type != "float32" and not np.can_cast(dtype, p.dtype, "safe"):
            wanted = dtype.name if dtype.name in PLAN_TYPES else "float32"
            raise EngineError(
                f"{self._path} is for {p.type} pixels, and the frames are {dtype}; "
                f"build one for them: {self.record.rebuild(self._path, type=wanted)}"
            )

    def _check(self, counts: np.ndarray) -> None:
        p = self._profile
        self._check_type(counts.dtype)
        batch, height, width = counts.shape
        larger: dict[str, Any] = {}
        if batch > p.max_batch:
            larger["max_batch"] = batch
        if height > p.height or width > p.width:
            larger |= {"height": height, "width": width}
        if larger:
            raise ValueError(
                f"{self._path} is for {p}, got {batch} of {height}x{width}; "
                f"build one for them: {self.record.rebuild(self._path, **larger)}"
            )

    def _direct(self, array: np.ndarray, dtype: np.dtype[Any]) -> bool:
        """Whether the GPU can copy `array` (B, H, W) as it is."""
        return array.shape[1:] == self._profile.shape and array.dtype == dtype and is_pinned(array)

    def _stage(self, lane: _Lane, counts: np.ndarray) -> np.ndarray:
        """Copy `counts` to page-locked memory of the plan's type and size, mirrored beyond their own."""
        p = self._profile
        if lane.staged_counts is None:
            lane.staged_counts = self._pin((p.max_batch, *p.shape), p.dtype)
        staged = lane.staged_counts[: len(counts)]
        height, width = counts.shape[1:]
        np.copyto(staged[:, :height, :width], counts, casting="unsafe")
        _mirror(staged[:, :height], width)
        _mirror(staged.transpose(0, 2, 1), height)
        return staged

    def _staged_expected(self, lane: _Lane, batch: int) -> np.ndarray:
        if lane.staged_expected is None:
            p = self._profile
            lane.staged_expected = self._pin((p.max_batch, *p.shape), _FLOAT32)
        return lane.staged_expected[:batch]

    def _pin(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        return self._gpu.pin(math.prod(shape) * dtype.itemsize).view(dtype).reshape(shape)

    def _allocate(self, nbytes: int) -> Any:
        self._buffers.append(self._gpu.allocate(nbytes))
        return self._buffers[-1]

    def _new_lane(self) -> _Lane:
        p, gpu = self._profile, self._gpu
        pixels = p.max_batch * p.height * p.width
        return _Lane(
            stream=gpu.stream(),
            uploaded=gpu.event(),
            computed=gpu.event(),
            downloaded=gpu.event(),
            counts=self._allocate(pixels * p.dtype.itemsize),
            expected=self._allocate(pixels * 4),
        )

    def _retire(self, lane: _Lane) -> None:
        """After a failed submit: the lane is idle again."""
        self._wait_for(lane)
        with self._lock:
            self._idle.append(lane)

    def _wait_for(self, lane: _Lane) -> None:
        """Wait for what uses the lane, on either stream."""
        try:
            with self._gpu.current():
                self._gpu.record(lane.computed, self._compute)
                self._gpu.wait(lane.stream, lane.computed)
                self._gpu.record(lane.downloaded, lane.stream)
                self._gpu.synchronize(lane.downloaded)
        except CudaError as error:
            log.warning("waiting for a batch: %s", error)


def _mirror(frames: np.ndarray, known: int) -> None:
    """Fill `frames` (B, ., n) from `known` on along the last axis. Repeated pixels would be streaks, not noise."""
    while known < frames.shape[2]:
        more = min(known, frames.shape[2] - known)
        frames[:, :, known : known + more] = frames[:, :, known - more : known][:, :, ::-1]
        known += more


def load_plan(path: Path, gpu: Gpu, flavour: Flavour, kernel_cache: Path | None = None) -> TensorRTEngine:
    """Check what the plan was built for, then load it."""
    return load_compiled(path, *read_plan(path), gpu, flavour, kernel_cache)


def load_compiled(
    path: Path, record: Record, compiled: bytes, gpu: Gpu, flavour: Flavour, kernel_cache: Path | None = None
) -> TensorRTEngine:
    """`load_plan`, of what was read from `path` before."""
    record.check(path, flavour=flavour.name, version=flavour.version, gpu=gpu.info)
    try:
        with gpu.current():
            program = TensorRTProgram(flavour, record.profile, compiled, path, kernel_cache)
    except EngineInvalid as error:
        raise EngineInvalid(f"{error}; build it again: {record.rebuild(path)}") from None
    return TensorRTEngine(path, record, gpu, program)
