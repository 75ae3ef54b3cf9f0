"""The reference engine: the exported network in PyTorch, on the CPU in float32 or on a GPU in half precision.

The only module of emstream that imports torch.

On a GPU a batch takes a lane: its buffers, a stream for its copies and the network's CUDA
graph between its buffers. Computing happens on one stream for all lanes, copies beside it::

    lane 0   | upload |         | download |
    lane 1            | upload |           | download |
    compute           | 0      | 1         | 2 ...

On the CPU torch's streams and events do nothing, and the same lines run one after another.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from emstream.errors import EngineError, EngineInvalid, EngineUnavailable
from emstream.inference.card import EngineCard
from emstream.inference.engine import Engine, sha256_of
from emstream.ring import allocate_pageable

# torch.compile's modes, by torch.compile's names -> what it is asked for, whether a CUDA graph is captured.
# Captured here and not by torch.compile: its own graphs belong to the thread that first ran them, so the one
# that prepares and the one that submits would each record theirs, and they copy inputs and overwrite outputs.
MODES: dict[str, tuple[str | None, bool]] = {
    "eager": (None, False),
    "default": ("default", False),
    "reduce-overhead": ("default", True),
    "max-autotune": ("max-autotune-no-cudagraphs", True),
}
_KEPT_PLANS = 8  # sets of lanes held at a time: a few sizes and types, each in a few batch sizes
_COMPILED_PLANS = 64  # torch.compile drops nothing by itself; sizes beyond this run uncompiled
_GPU_LANES = 2
_HOT_PIXEL = 1024.0  # times the mean level, as in the ONNX graph: beyond it half precision might overflow
_SIGNED = {np.dtype(np.uint16): np.dtype(np.int16), np.dtype(np.uint32): np.dtype(np.int32)}


@dataclass
class _Lane:
    """Room for one batch in flight; all buffers (capacity, H, W)."""

    stream: Any
    uploaded: Any
    computed: Any
    downloaded: Any
    staged_counts: Tensor
    """In the host's page-locked memory, of the camera's type but signed."""
    counts: Tensor
    expected: Tensor
    staged_expected: Tensor
    run: Callable[[int], None]
    """Put `expected` of so many frames of `counts` on the current stream."""


@dataclass
class _Ticket:
    lane: _Lane
    idle: deque[_Lane]
    expected: np.ndarray
    staged: Tensor | None
    """Where the result comes in when it cannot come into `expected` itself."""


class TorchEngine(Engine):
    """Runs a .pt2 written by ``train.export``. One thread may submit while another collects."""

    depth = 1

    def __init__(
        self,
        path: Path,
        *,
        threads: int | None = None,
        device: str = "cpu",
        mode: str | None = None,
        _as_on_gpu: bool = False,
    ) -> None:
        """`device` is "cpu" or "cuda:N", `mode` one of MODES: on a GPU "max-autotune", else "eager".

        `_as_on_gpu` does on a CPU what is done on a GPU, for the tests.
        """
        self._place = _place(device)
        self._on_gpu = self._place.type == "cuda"
        mode = mode or ("max-autotune" if self._on_gpu else "eager")
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        program, self.card = _read(path)
        self.name = self.card.name
        self.sha256 = sha256_of(path)
        if threads:
            torch.set_num_threads(threads)
        self._half = self._on_gpu or _as_on_gpu
        self._network = program.module()
        if self._half:
            self._network = self._network.half().to(memory_format=torch.channels_last).to(self._place)
            self.depth = _GPU_LANES
        if self._on_gpu:
            torch.backends.cudnn.benchmark = True  # sizes come again and again: worth trying its algorithms
        processor = torch.cuda.get_device_name(self._place) if self._on_gpu else "CPU"
        precision = "f16" if self._half else "f32"
        self.device = f"{processor}, {precision} {mode}, PyTorch {torch.__version__.split('+')[0]}"
        compiler, graphs = MODES[mode]
        self._graphs = graphs and self._on_gpu
        self._pads_batches = compiler is not None
        self._expect = counts_to_intensity
        if compiler:
            self._expect = torch.compile(
                counts_to_intensity,
                mode=compiler,
                dynamic=False,
                recompile_limit=_COMPILED_PLANS,
                isolate_recompiles=True,
            )
        self._compute = self._new_stream()
        self._plans: OrderedDict[tuple[Any, ...], deque[_Lane]] = OrderedDict()  # -> idle lanes

    def allocate(self, nbytes: int) -> np.ndarray:
        if not self._on_gpu:
            return allocate_pageable(nbytes)
        memory: np.ndarray = torch.zeros(nbytes, dtype=torch.uint8, pin_memory=True).numpy()
        return memory

    def submit(self, counts: np.ndarray, expected: np.ndarray) -> _Ticket:
        try:
            with torch.inference_mode():
                return self._submit(counts, expected)
        except torch.OutOfMemoryError:
            batch, height, width = counts.shape
            raise EngineError(
                f"{self.device}: no memory left for {batch} frames of {height}x{width}; "
                "take fewer frames per batch, or smaller tiles"
            ) from None

    def collect(self, ticket: _Ticket) -> np.ndarray:
        try:
            ticket.lane.downloaded.synchronize()
            if ticket.staged is not None:
                np.copyto(ticket.expected, ticket.staged.numpy())
        finally:
            ticket.idle.append(ticket.lane)
        return ticket.expected

    def prepare(self, shape: tuple[int, int], dtype: np.dtype[Any]) -> None:
        batch = 1
        while batch < 2 * self.best_batch:
            counts = np.zeros((batch, *shape), dtype)
            self.collect(self.submit(counts, np.empty(counts.shape, np.float32)))
            batch *= 2

    def close(self) -> None:
        self._plans.clear()

    # -- one batch ----------------------------------------------------------------

    def _submit(self, counts: np.ndarray, expected: np.ndarray) -> _Ticket:
        idle = self._lanes(counts)
        if not idle:
            raise EngineError(f"{self.depth} batches are in flight already: collect one first")
        lane = idle.popleft()
        try:
            staged = self._enqueue(lane, counts, expected)
        except BaseException:
            self._synchronize()  # the lane's buffers may still be read or written
            idle.append(lane)
            raise
        return _Ticket(lane, idle, expected, staged)

    def _enqueue(self, lane: _Lane, counts: np.ndarray, expected: np.ndarray) -> Tensor | None:
        """Put a batch on its way; returns where the result will be staged, None for in `expected`."""
        batch = len(counts)
        counts = counts.view(_SIGNED.get(counts.dtype, counts.dtype))
        if self._direct(counts):
            source = torch.from_numpy(counts)
        else:
            source = lane.staged_counts[:batch]
            np.copyto(source.numpy(), counts)
        staged = None if self._direct(expected) else lane.staged_expected[:batch]
        target = torch.from_numpy(expected) if staged is None else staged
        with self._on(lane.stream):
            lane.counts[:batch].copy_(source, non_blocking=True)
            lane.uploaded.record(lane.stream)
        with self._on(self._compute):
            self._compute.wait_event(lane.uploaded)
            lane.run(len(lane.counts) if self._pads_batches else batch)
            lane.computed.record(self._compute)
        with self._on(lane.stream):
            lane.stream.wait_event(lane.computed)
            target.copy_(lane.expected[:batch], non_blocking=True)
            lane.downloaded.record(lane.stream)
        return staged

    def _direct(self, array: np.ndarray) -> bool:
        """Whether the GPU can copy `array` as it is: page-locked, by whomever."""
        plain = array.flags.c_contiguous and array.flags.writeable  # torch warns of arrays that are read-only
        return self._on_gpu and plain and bool(torch.from_numpy(array).is_pinned())

    # -- lanes --------------------------------------------------------------------

    def _lanes(self, counts: np.ndarray) -> deque[_Lane]:
        """The idle lanes for batches like this one, made when the first comes.

        Compiling takes up to minutes and is done for a batch size at a time. Batches come in
        any size up to the ring's; rounded up to a power of two they are few. What is
        computed in vain, less than half, are frames of earlier batches.
        """
        batch, height, width = counts.shape
        shape = (1 << (batch - 1).bit_length(), height, width)
        key = (counts.dtype, *shape)
        if key not in self._plans:
            while len(self._plans) >= _KEPT_PLANS:
                self._plans.popitem(last=False)  # lanes in flight live on in their tickets
            with self._on(self._compute):
                pool = torch.cuda.graph_pool_handle() if self._graphs else None
                lanes = deque(self._new_lane(counts.dtype, shape, pool) for _ in range(self.depth))
                self._synchronize()
            self._plans[key] = lanes
        self._plans.move_to_end(key)
        return self._plans[key]

    def _new_lane(self, dtype: np.dtype[Any], shape: tuple[int, ...], pool: Any) -> _Lane:
        signed = torch.from_numpy(np.empty(0, _SIGNED.get(dtype, dtype))).dtype
        counts = torch.zeros(shape, dtype=signed, device=self._place)
        expected = torch.zeros(shape, device=self._place)
        bits = 8 * dtype.itemsize if dtype in _SIGNED else None
        assert self.card
        multiple_px = self.card.multiple_px

        def run(batch: int) -> None:
            expected[:batch] = self._expect(self._network, counts[:batch], bits, multiple_px, self._half)

        return _Lane(
            stream=self._new_stream(),
            uploaded=self._new_event(),
            computed=self._new_event(),
            downloaded=self._new_event(),
            staged_counts=torch.zeros(shape, dtype=signed, pin_memory=self._on_gpu),
            counts=counts,
            expected=expected,
            staged_expected=torch.zeros(shape, pin_memory=self._on_gpu),
            run=_captured(run, shape[0], self._compute, pool) if self._graphs else run,
        )

    # -- the device ---------------------------------------------------------------

    def _new_stream(self) -> Any:
        return torch.cuda.Stream(self._place) if self._on_gpu else torch.cpu.Stream()

    def _new_event(self) -> Any:
        """Whoever waits for it sleeps."""
        return torch.cuda.Event(blocking=True) if self._on_gpu else torch.cpu.Event()

    def _on(self, stream: Any) -> Any:
        """`stream` and its GPU are the current ones for the length of a with statement."""
        return torch.cuda.stream(stream) if self._on_gpu else torch.cpu.stream(stream)

    def _synchronize(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize(self._place)


def counts_to_intensity(
    network: Callable[[Tensor], Tensor], counts: Tensor, bits: int | None, multiple_px: int, half: bool
) -> Tensor:
    """Counts (B, H, W) -> expected counts (B, H, W) float32; `bits` of unsigned counts that came as signed.

    Half precision reaches from 6e-8 to 65504, doses and their sums farther. The network
    is homogeneous, so each frame is brought near 1 first, by a power of two, which is exact.
    """
    height, width = counts.shape[1:]
    if bits:  # torch has next to no kernels for unsigned 16 and 32 bit, on a GPU fewer than elsewhere
        counts = counts.to(torch.int64) & (2**bits - 1)
    x = counts.to(torch.float32)[:, None]
    if half:
        level = x.abs().mean(dim=(2, 3), keepdim=True).clamp_min(1e-20)
        level = torch.pow(2.0, torch.floor(torch.log2(level)))
        x = (x / level).clamp(-_HOT_PIXEL, _HOT_PIXEL).to(torch.float16)
    # Two multiples at least: torch.export will not believe in a size of one.
    down = max(2 * multiple_px, height + (-height) % multiple_px) - height
    right = max(2 * multiple_px, width + (-width) % multiple_px) - width
    x = F.pad(x, (0, right, 0, down), mode="replicate")
    if not half:
        return network(x)[:, 0, :height, :width]
    x = x.contiguous(memory_format=torch.channels_last)
    return network(x)[:, 0, :height, :width].to(torch.float32) * level[:, 0]


def _captured(run: Callable[[int], None], batch: int, stream: Any, pool: Any) -> Callable[[int], None]:
    """`run` for `batch` frames as a CUDA graph."""
    run(batch)  # compiles and tunes, which a graph cannot hold
    graph = torch.cuda.CUDAGraph()
    # Other threads may go on allocating page-locked memory meanwhile.
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        run(batch)
    return lambda _: graph.replay()


def _place(device: str) -> torch.device:
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ValueError(f"device must be cpu or cuda:N, got {device!r}")
    if device == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        why = "finds no GPU" if torch.version.cuda else "was built without CUDA"
        raise EngineUnavailable(f"{device}: PyTorch {torch.__version__} {why}; device='cpu' runs here")
    index, count = int(device.partition(":")[2] or 0), torch.cuda.device_count()
    if index >= count:
        known = ", ".join(f"cuda:{n} ({torch.cuda.get_device_name(n)})" for n in range(count))
        raise EngineUnavailable(f"there is no {device}; this machine has {known}")
    return torch.device("cuda", index)


def _read(path: Path) -> tuple[Any, EngineCard]:
    """The exported program and its card."""
    metadata = {"card.json": ""}
    try:
        program = torch.export.load(path, extra_files=metadata)
    except Exception as error:  # torch raises whatever its zip and JSON readers raise
        raise EngineInvalid(f"{path} is not a readable exported program: {type(error).__name__}") from None
    if not metadata["card.json"]:
        raise EngineInvalid(f"{path} is not an emstream engine: it has no card; write it with train.export")
    return program, EngineCard.from_metadata(json.loads(metadata["card.json"]), where=str(path))
