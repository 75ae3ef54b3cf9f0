"""The reference engine: the exported network in PyTorch, on the CPU in float32 or on a GPU in half precision.

The only module of emstream that imports torch.

On a GPU a batch takes a lane: a stream, buffers, and the network captured as a CUDA graph
between these buffers. Everything on a lane happens in order; the copies of one lane go on
beside the computing of the other::

    lane 0   | upload | compute | download |
    lane 1            | upload  | compute  | download |

On a CPU torch's streams and events do nothing, and the same lines run one after another.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from emstream.errors import EngineError, EngineInvalid, EngineUnavailable
from emstream.inference.card import EngineCard
from emstream.inference.engine import Engine, sha256_of
from emstream.ring import allocate_pageable

# A mode of torch.compile -> what is asked of it, and whether a CUDA graph is captured here. The graphs that it
# captures itself belong to one thread, and the thread that prepares need not be the one that submits.
MODES: dict[str, tuple[str | None, bool]] = {
    "eager": (None, False),
    "default": ("default", False),
    "reduce-overhead": ("default", True),
    "max-autotune": ("max-autotune-no-cudagraphs", True),
}
_KEPT_PLANS = 8  # sets of lanes held at a time: a few frame sizes and types, each in a few batch sizes
_GPU_LANES = 2
_HOT_PIXEL = 1024.0  # times the mean level, as in the ONNX graph: beyond it half precision might overflow
_SIGNED: dict[np.dtype[Any], np.dtype[Any]] = {
    np.dtype(np.uint16): np.dtype(np.int16),
    np.dtype(np.uint32): np.dtype(np.int32),
}


@dataclass
class _Lane:
    """Room for one batch in flight. All buffers are (capacity, H, W), the staged ones on the host."""

    stream: Any
    done: Any
    staged_counts: Tensor
    counts: Tensor
    expected: Tensor
    staged_expected: Tensor
    run: Callable[[int], None]
    """Compute `expected` of the first so many `counts`."""


@dataclass
class _Ticket:
    lane: _Lane
    idle: deque[_Lane]
    counts: np.ndarray
    expected: np.ndarray
    staged: Tensor | None
    """Where the result comes in when the GPU cannot write `expected` itself."""


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
        """`device` is "cpu" or "cuda:N"; `mode` one of MODES, by default "max-autotune" on a GPU, else "eager".

        `_as_on_gpu` computes on the CPU as on a GPU, for the tests.
        """
        if mode not in (None, *MODES):
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        self._place = _place(device)
        self._on_gpu = self._place.type == "cuda"
        self._half = self._on_gpu or _as_on_gpu
        program, self.card = read_program(path)
        self.name, self.sha256 = self.card.name, sha256_of(path)
        self._multiple_px = self.card.multiple_px
        if threads:
            torch.set_num_threads(threads)
        self._network = program.module()
        if self._half:
            self._network = self._network.half().to(memory_format=torch.channels_last).to(self._place)
            self.depth = _GPU_LANES
        if self._on_gpu:
            torch.backends.cudnn.benchmark = True  # sizes come again and again: worth trying its algorithms
        mode = mode or ("max-autotune" if self._on_gpu else "eager")
        self._compiler, graphs = MODES[mode]
        self._graphs = graphs and self._on_gpu
        processor = torch.cuda.get_device_name(self._place) if self._on_gpu else "CPU"
        precision = "f16" if self._half else "f32"
        self.device = f"{processor}, {precision} {mode}, PyTorch {torch.__version__.split('+')[0]}"
        self._backend: Any = torch.cuda if self._on_gpu else torch.cpu
        self._new_stream: Any = partial(torch.cuda.Stream, self._place) if self._on_gpu else torch.cpu.Stream
        self._new_event: Any = partial(torch.cuda.Event, blocking=True) if self._on_gpu else torch.cpu.Event
        self._plans: OrderedDict[tuple[Any, ...], deque[_Lane]] = OrderedDict()  # -> idle lanes
        self._compiled: dict[tuple[Any, ...], Callable[..., Tensor]] = {}

    def memory_free(self) -> int | None:
        return int(torch.cuda.mem_get_info(self._place)[0]) if self._on_gpu else None

    def allocate(self, nbytes: int) -> np.ndarray:
        if not self._on_gpu:
            return allocate_pageable(nbytes)
        try:
            with self._current():
                memory: np.ndarray = torch.zeros(nbytes, dtype=torch.uint8, pin_memory=True).numpy()
        except RuntimeError as error:
            raise EngineError(f"{self.device}: no page-locked memory of {nbytes} bytes: {error}") from None
        return memory

    def _current(self) -> Any:
        """Within it this engine's GPU is the one that page-locks and captures."""
        return torch.cuda.device(self._place) if self._on_gpu else contextlib.nullcontext()

    def submit(self, counts: np.ndarray, expected: np.ndarray) -> _Ticket:
        try:
            with torch.inference_mode(), self._current():
                idle = self._lanes(counts)
                if not idle:
                    raise EngineError(f"{self.depth} batches are in flight already: collect one first")
                lane = idle.popleft()
                try:
                    return _Ticket(lane, idle, counts, expected, self._enqueue(lane, counts, expected))
                except BaseException:
                    self._backend.synchronize(self._place)  # what is under way may still use the lane
                    idle.append(lane)
                    raise
        except torch.OutOfMemoryError:
            batch, height, width = counts.shape
            raise EngineError(
                f"{self.device}: no memory left for {batch} frames of {height}x{width}; "
                "take fewer frames per batch, or smaller tiles"
            ) from None

    def collect(self, ticket: _Ticket) -> np.ndarray:
        try:
            ticket.lane.done.synchronize()
            if ticket.staged is not None:
                np.copyto(ticket.expected, ticket.staged.numpy())
        finally:
            ticket.idle.append(ticket.lane)
        return ticket.expected

    def close(self) -> None:
        self._plans.clear()

    # -- one batch ----------------------------------------------------------------

    def _enqueue(self, lane: _Lane, counts: np.ndarray, expected: np.ndarray) -> Tensor | None:
        """Put a batch on its way; returns where its result is staged, or None."""
        batch = len(counts)
        counts = counts.view(_SIGNED.get(counts.dtype, counts.dtype))
        source = lane.staged_counts[:batch]
        if self._direct(counts):
            source = torch.from_numpy(counts)
        else:
            np.copyto(source.numpy(), counts)
        staged = None if self._direct(expected) else lane.staged_expected[:batch]
        target = torch.from_numpy(expected) if staged is None else staged
        with self._backend.stream(lane.stream):
            lane.counts[:batch].copy_(source, non_blocking=True)
            lane.run(len(lane.counts) if self._compiler else batch)
            target.copy_(lane.expected[:batch], non_blocking=True)
            lane.done.record(lane.stream)
        return staged

    def _direct(self, array: np.ndarray) -> bool:
        """Whether the GPU can copy `array` as it is: page-locked, by whomever."""
        plain = array.flags.c_contiguous and array.flags.writeable  # torch warns of arrays that are read-only
        return self._on_gpu and plain and bool(torch.from_numpy(array).is_pinned())

    # -- lanes --------------------------------------------------------------------

    def _lanes(self, counts: np.ndarray) -> deque[_Lane]:
        """The idle lanes for batches like this one, made when the first comes.

        Compiling takes minutes, for each batch size anew, and batches come in any size up
        to the ring's. Rounded up to a power of two there are few sizes, and what is
        computed in vain, old frames left in the lane, is less than half.
        """
        batch, height, width = counts.shape
        shape = (1 << (batch - 1).bit_length(), height, width)
        key = (counts.dtype, *shape)
        if key not in self._plans:
            while len(self._plans) >= _KEPT_PLANS:
                self._plans.popitem(last=False)  # lanes in flight live on in their tickets
            expect = self._compile(key)
            self._plans[key] = deque(self._new_lane(counts.dtype, shape, expect) for _ in range(self.depth))
        self._plans.move_to_end(key)
        return self._plans[key]

    def _compile(self, key: tuple[Any, ...]) -> Callable[..., Tensor]:
        """`counts_to_intensity`, to be compiled when first called, for one plan.

        torch.compile keeps what it compiled with a function's code, eight sizes of it unless
        a setting says otherwise, which counts for one thread. So every plan has code of its
        own. torch never lets go of it; kept here, too, it serves a plan that comes back.
        """
        if self._compiler is None:
            return counts_to_intensity
        if key not in self._compiled:
            copy = FunctionType(counts_to_intensity.__code__.replace(), globals())
            self._compiled[key] = torch.compile(copy, mode=self._compiler, dynamic=False, fullgraph=True)
        return self._compiled[key]

    def _new_lane(self, dtype: np.dtype[Any], shape: tuple[int, ...], expect: Callable[..., Tensor]) -> _Lane:
        plain = torch.from_numpy(np.empty(0, _SIGNED.get(dtype, dtype))).dtype
        bits = 8 * dtype.itemsize if dtype in _SIGNED else None
        stream = self._new_stream()
        with self._backend.stream(stream):
            counts = torch.zeros(shape, dtype=plain, device=self._place)
            expected = torch.zeros(shape, device=self._place)

            def run(batch: int) -> None:
                x = counts[:batch]
                expected[:batch] = expect(self._network, x, bits, self._multiple_px, self._half)

            return _Lane(
                stream=stream,
                done=self._new_event(),
                staged_counts=torch.zeros(shape, dtype=plain, pin_memory=self._on_gpu),
                counts=counts,
                expected=expected,
                staged_expected=torch.zeros(shape, pin_memory=self._on_gpu),
                run=_captured(run, shape[0], stream) if self._graphs else run,
            )


def cuda_available() -> bool:
    """Whether this PyTorch can use a GPU of this machine."""
    return bool(torch.cuda.is_available())


def counts_to_intensity(
    network: Callable[[Tensor], Tensor], counts: Tensor, bits: int | None, multiple_px: int, half: bool
) -> Tensor:
    """Counts (B, H, W) -> expected counts (B, H, W) float32; `bits` of unsigned counts that come as signed.

    Half precision reaches from 6e-8 to 65504, doses and their sums farther. The network
    is homogeneous, so each frame is brought near 1 first, by a power of two, which is exact.
    """
    height, width = counts.shape[1:]
    if bits:  # torch can do next to nothing with unsigned 16 and 32 bit
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


def _captured(run: Callable[[int], None], batch: int, stream: Any) -> Callable[[int], None]:
    """`run` for `batch` frames as a CUDA graph."""
    run(batch)  # compiles and tunes, which a graph cannot hold
    graph = torch.cuda.CUDAGraph()
    # Other threads may go on allocating page-locked memory meanwhile.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        run(batch)
    return lambda _: graph.replay()


def _place(device: str) -> torch.device:
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ValueError(f"device must be cpu or cuda:N, got {device!r}")
    if device == "cpu":
        return torch.device("cpu")
    if not cuda_available():
        why = "finds no GPU" if torch.version.cuda else "is built without CUDA"
        raise EngineUnavailable(f"{device}: this PyTorch, {torch.__version__}, {why}; what runs here is cpu")
    index, count = int(device.partition(":")[2] or 0), torch.cuda.device_count()
    if index >= count:
        known = ", ".join(f"cuda:{n} ({torch.cuda.get_device_name(n)})" for n in range(count))
        raise EngineUnavailable(f"there is no {device}; what runs here is cpu, {known}")
    return torch.device("cuda", index)


def read_program(path: Path) -> tuple[Any, EngineCard]:
    """The exported program in a .pt2 and its card. Raises EngineInvalid."""
    metadata = {"card.json": ""}
    try:
        program = torch.export.load(path, extra_files=metadata)
    except Exception as error:  # torch raises whatever its zip and JSON readers raise
        raise EngineInvalid(f"{path} is not a readable exported program: {type(error).__name__}") from None
    if not metadata["card.json"]:
        raise EngineInvalid(f"{path} is not an emstream engine: it has no card; write it with train.export")
    return program, EngineCard.from_metadata(json.loads(metadata["card.json"]), where=str(path))
