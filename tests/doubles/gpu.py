"""A GPU that does nothing before it must, and forgives nothing.

What is put on a stream waits there until `synchronize` asks for an event; then just what that
event depends on is done, in the order that streams and events give. So an array that changes
too early, or is read too early, gives wrong pixels, as on a bad day it would on a real GPU::

    gpu = PretendGpu()
    program = PretendProgram(gpu, profile, network)
    engine = TensorRTEngine(path, record, gpu, program)

Two accesses to the same device memory, one of them writing, that no stream or event puts in
order raise `Race`, which is no CudaError: nothing is to catch it. Everything else that a real
GPU would refuse, or answer with rubbish, raises CudaError: a call without `current()`, a
buffer, stream, event or graph that is freed or another GPU's, a copy beyond an allocation or
with memory that is not page-locked.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from emstream.cuda import Gpu, GpuInfo, is_pinned
from emstream.errors import CudaError, EngineError
from emstream.inference.plan import Profile
from emstream.inference.tensorrt import Program

Network = Callable[[np.ndarray], np.ndarray]
"""(B, H, W) float32 -> (B, H, W) float32."""

_ADDRESSES = itertools.count(0x7F00_0000_0000, 0x1_0000_0000)  # each GPU's own, and never the host's
_HANDLES = itertools.count(1)
_PAGE = 256  # TensorRT wants its memory aligned to as much
_RUBBISH = 0xFF  # a NaN, where it is read as float32


class Race(AssertionError):
    """Two accesses to the same memory, one of them writing, could overlap in time."""


Clock = Counter[int]
"""How far each stream (its handle) is; what is no farther has happened before."""


@dataclass(eq=False)
class _Buffer:
    gpu: PretendGpu
    address: int
    memory: np.ndarray | None
    """(nbytes,) uint8; None once freed."""
    written: tuple[int, int] | None = None
    """Where it was written last, and in which step of that stream."""
    read: Clock = field(default_factory=Counter)
    """Since then."""
    waiting: int = 0
    """Operations not yet done that use it."""


@dataclass(eq=False)
class _Stream:
    gpu: PretendGpu
    handle: int
    last: _Operation | None = None
    clock: Clock = field(default_factory=Counter)
    capture: list[_Step] | None = None
    thread: int = 0
    """Which captures."""


@dataclass(eq=False)
class _Event:
    gpu: PretendGpu
    recorded: _Operation | None = None
    clock: Clock = field(default_factory=Counter)


@dataclass(frozen=True)
class _Step:
    """What a graph keeps, and what an operation does."""

    what: str
    do: Callable[[], None]
    reads: tuple[_Buffer, ...] = ()
    writes: tuple[_Buffer, ...] = ()


@dataclass(eq=False)
class _Operation:
    step: _Step
    after: list[_Operation]
    """The one before it on its stream, and those its stream waits for; emptied once it is done."""
    done: bool = False


@dataclass(eq=False)
class _Graph:
    gpu: PretendGpu
    steps: list[_Step]


@dataclass
class _Orders:
    """Which calls of one name fail."""

    after: int
    times: int | None


class PretendGpu(Gpu):
    api = "pretend 1.0"

    def __init__(
        self,
        index: int = 0,
        *,
        has_graphs: bool = True,
        memory_bytes: int = 1 << 30,
        name: str = "Pretend GPU",
        capability: str = "8.9",
        driver: str = "13.0",
    ) -> None:
        self.info = GpuInfo(index, name, capability, driver, memory_bytes)
        self._has_graphs = has_graphs
        self.made: Counter[str] = Counter()
        """Buffers, streams, events, graphs and page-locked arrays made so far."""
        self.calls: Counter[str] = Counter()
        """By name: upload, launch, execute ..."""
        self.done: Counter[str] = Counter()
        """Operations that were not only put on a stream but done."""
        self._next_address = next(_ADDRESSES)
        self._buffers: weakref.WeakValueDictionary[int, _Buffer] = weakref.WeakValueDictionary()
        self._streams: weakref.WeakValueDictionary[int, _Stream] = weakref.WeakValueDictionary()
        self._events: weakref.WeakSet[_Event] = weakref.WeakSet()
        self._graphs_alive: weakref.WeakSet[_Graph] = weakref.WeakSet()
        self._pinned: dict[int, int] = {}
        self._seen: Clock = Counter()  # what the host has waited for
        self._orders: dict[str, _Orders] = {}
        self._here = threading.local()
        self._lock = threading.RLock()

    # -- what a test asks for -------------------------------------------------------

    def fail(self, name: str, *, after: int = 0, times: int | None = None) -> None:
        """Let calls of `name` raise, but for the first `after`: so many `times`, or from then on."""
        self._orders[name] = _Orders(after, times)

    def heal(self) -> None:
        """Let nothing fail any more."""
        self._orders.clear()

    @property
    def waiting(self) -> int:
        """Operations that are put on streams and not done."""
        with self._lock:
            return len(_not_done([stream.last for stream in self._streams.values() if stream.last]))

    @property
    def live_bytes(self) -> int:
        """Device memory not given back."""
        return sum(len(each.memory) for each in self._buffers.values() if each.memory is not None)

    @property
    def pinned_bytes(self) -> int:
        """Page-locked memory not given back."""
        return sum(self._pinned.values())

    @property
    def alive(self) -> dict[str, int]:
        """What is not given back, by kind."""
        return {
            "bytes": self.live_bytes,
            "streams": len(self._streams),
            "events": len(self._events),
            "graphs": len(self._graphs_alive),
        }

    # -- what a program asks for ----------------------------------------------------

    @property
    def is_current(self) -> bool:
        """Whether this GPU's context is the calling thread's."""
        return bool(getattr(self._here, "depth", 0))

    def call(self, name: str, error: type[EngineError] = CudaError) -> None:
        """Count a call; raises if its context is not current or it was told to fail."""
        if not self.is_current:
            raise CudaError(f"{name}: the GPU's context is not current in this thread")
        with self._lock:
            self.calls[name] += 1
            orders = self._orders.get(name)
            if orders is None:
                return
            if orders.after:
                orders.after -= 1
                return
            if orders.times is not None:
                orders.times -= 1
                if not orders.times:
                    del self._orders[name]
        raise error(f"{name}: told to fail")

    def put(
        self,
        stream: _Stream,
        what: str,
        do: Callable[[], None],
        reads: Sequence[_Buffer] = (),
        writes: Sequence[_Buffer] = (),
    ) -> None:
        """Put an operation on `stream`, or into the graph that is captured there."""
        with self._lock:
            step = _Step(what, do, tuple(reads), tuple(writes))
            self._check_stream(stream)
            for buffer in (*reads, *writes):
                self._check_buffer(buffer)
            if stream.capture is not None:
                if stream.thread != threading.get_ident():
                    raise CudaError(f"{what}: another thread captures this stream")
                stream.capture.append(step)
            else:
                self._enqueue(stream, step)

    def buffer_at(self, address: int, nbytes: int) -> _Buffer:
        """The device memory that starts at `address`, if it has so many bytes."""
        buffer = self._buffers.get(address)
        if buffer is None or buffer.memory is None:
            raise CudaError(f"no device memory starts at {address:#x}")
        if len(buffer.memory) < nbytes:
            raise CudaError(f"{nbytes} bytes in an allocation of {len(buffer.memory)}")
        return buffer

    def memory(self, buffer: _Buffer) -> np.ndarray:
        """(nbytes,) uint8."""
        self._check_buffer(buffer)
        assert buffer.memory is not None
        return buffer.memory

    def stream_of(self, handle: int) -> _Stream:
        stream = self._streams.get(handle)
        if stream is None:
            raise CudaError(f"{handle} is no stream of this GPU")
        return stream

    # -- Gpu ------------------------------------------------------------------------

    @property
    def has_graphs(self) -> bool:
        return self._has_graphs

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        self._here.depth = getattr(self._here, "depth", 0) + 1
        try:
            yield
        finally:
            self._here.depth -= 1

    def _pin(self, nbytes: int, flags: int) -> tuple[np.ndarray, int]:
        self.call("pin")
        self._not_while_capturing("pin")
        array = np.empty(nbytes, np.uint8)
        with self._lock:
            self.made["pinned"] += 1
            self._pinned[self.made["pinned"]] = nbytes
            return array, self.made["pinned"]

    def _unpin(self, owner: int) -> None:
        assert self.is_current
        del self._pinned[owner]

    def allocate(self, nbytes: int) -> _Buffer:
        self.call("allocate")
        self._not_while_capturing("allocate")
        with self._lock:
            if nbytes < 1:
                raise CudaError(f"allocate: {nbytes} bytes")
            if nbytes > self.memory_free():
                raise CudaError("allocate: out of memory")
            buffer = _Buffer(self, self._next_address, np.full(nbytes, _RUBBISH, np.uint8))
            self._next_address += (nbytes // _PAGE + 2) * _PAGE  # never given out again
            self._buffers[buffer.address] = buffer
            self.made["buffers"] += 1
            return buffer

    def address(self, buffer: _Buffer) -> int:
        self._check_buffer(buffer)
        return buffer.address

    def free(self, buffer: _Buffer) -> None:
        self.call("free")
        with self._lock:
            self._check_buffer(buffer)
            if buffer.waiting:
                raise CudaError(f"free: {buffer.waiting} operations under way use this memory")
            buffer.memory = None

    def stream(self) -> _Stream:
        self.call("stream")
        with self._lock:
            self.made["streams"] += 1
            stream = _Stream(self, next(_HANDLES))
            self._streams[stream.handle] = stream
            return stream

    def handle(self, stream: _Stream) -> int:
        self._check_stream(stream)
        return stream.handle

    def event(self) -> _Event:
        self.call("event")
        with self._lock:
            self.made["events"] += 1
            event = _Event(self)
            self._events.add(event)
            return event

    def record(self, event: _Event, stream: _Stream) -> None:
        self.call("record")
        with self._lock:
            self._check_event(event)
            self._not_captured("record", stream)
            event.recorded = self._enqueue(stream, _Step("record", _nothing))
            event.clock = stream.clock.copy()

    def wait(self, stream: _Stream, event: _Event) -> None:
        self.call("wait")
        with self._lock:
            self._check_event(event)
            self._not_captured("wait", stream)
            if event.recorded is None:
                raise CudaError("wait: the event was never recorded")
            operation = self._enqueue(stream, _Step("wait", _nothing))
            operation.after.append(event.recorded)
            stream.clock |= event.clock

    def synchronize(self, event: _Event) -> None:
        self._not_while_capturing("synchronize")
        with self._lock:
            self._check_event(event)
            if event.recorded is None:
                raise CudaError("synchronize: the event was never recorded")
            for operation in _not_done([event.recorded]):
                for buffer in (*operation.step.reads, *operation.step.writes):
                    buffer.waiting -= 1
                operation.done, operation.after = True, []
                operation.step.do()
                self.done[operation.step.what] += 1
            self._seen |= event.clock
        self.call("synchronize")  # an error that shows now does not undo what was done

    def upload(self, buffer: _Buffer, array: np.ndarray, stream: _Stream) -> None:
        self.call("upload")
        host = _Host.of(array, "upload")
        self.buffer_at(self.address(buffer), array.nbytes)

        def do() -> None:
            self.memory(buffer)[: host.nbytes] = host.bytes()

        self.put(stream, "upload", do, writes=[buffer])

    def download(self, array: np.ndarray, buffer: _Buffer, stream: _Stream) -> None:
        self.call("download")
        host = _Host.of(array, "download")
        if not array.flags.writeable:
            raise CudaError("download: the host array cannot be written")
        self.buffer_at(self.address(buffer), array.nbytes)

        def do() -> None:
            host.bytes()[:] = self.memory(buffer)[: host.nbytes]

        self.put(stream, "download", do, reads=[buffer])

    @contextlib.contextmanager
    def capture(self, stream: _Stream) -> Iterator[list[Any]]:
        self.call("capture")
        if not self._has_graphs:
            raise CudaError("capture: this GPU has no graphs")
        with self._lock:
            self._not_captured("capture", stream)
            stream.capture, stream.thread = [], threading.get_ident()
        kept: list[Any] = []
        try:
            yield kept
        finally:
            steps, stream.capture = stream.capture, None
        self.call("instantiate")
        with self._lock:
            self.made["graphs"] += 1
            graph = _Graph(self, steps or [])
            self._graphs_alive.add(graph)
            kept.append(graph)

    def launch(self, graph: _Graph, stream: _Stream) -> None:
        self.call("launch")
        with self._lock:
            if not isinstance(graph, _Graph) or graph.gpu is not self:
                raise CudaError("launch: not a graph of this GPU")
            self._not_captured("launch", stream)
            for step in graph.steps:
                self.put(stream, step.what, step.do, step.reads, step.writes)

    def memory_free(self) -> int:
        return self.info.memory_bytes - self.live_bytes

    # -- lock held ------------------------------------------------------------------

    def _enqueue(self, stream: _Stream, step: _Step) -> _Operation:
        self._check_stream(stream)
        stream.clock |= self._seen
        stream.clock[stream.handle] += 1
        for buffer in {*step.reads, *step.writes}:
            self._check_order(stream.clock, step, buffer)
            buffer.waiting += (buffer in step.reads) + (buffer in step.writes)
        for buffer in step.reads:
            buffer.read[stream.handle] = stream.clock[stream.handle]
        for buffer in step.writes:
            buffer.written, buffer.read = (stream.handle, stream.clock[stream.handle]), Counter()
        operation = _Operation(step, [stream.last] if stream.last else [])
        stream.last = operation
        return operation

    def _check_order(self, now: Clock, step: _Step, buffer: _Buffer) -> None:
        before = [buffer.written] if buffer.written else []
        if buffer in step.writes:
            before += list(buffer.read.items())
        for stream, number in before:
            if now[stream] < number:
                raise Race(f"{step.what} could overlap with what is on another stream, in the same memory")

    def _check_buffer(self, buffer: _Buffer) -> None:
        if not isinstance(buffer, _Buffer) or buffer.gpu is not self:
            raise CudaError("not device memory of this GPU")
        if buffer.memory is None:
            raise CudaError("this device memory is freed")

    def _check_stream(self, stream: _Stream) -> None:
        if not isinstance(stream, _Stream) or stream.gpu is not self:
            raise CudaError("not a stream of this GPU")

    def _check_event(self, event: _Event) -> None:
        if not isinstance(event, _Event) or event.gpu is not self:
            raise CudaError("not an event of this GPU")

    def _not_captured(self, name: str, stream: _Stream) -> None:
        self._check_stream(stream)
        if stream.capture is not None:
            raise CudaError(f"{name}: this stream is being captured")

    def _not_while_capturing(self, name: str) -> None:
        here = threading.get_ident()
        with self._lock:
            mine = [
                each for each in self._streams.values() if each.capture is not None and each.thread == here
            ]
        if mine:
            raise CudaError(f"{name}: this thread captures a stream")


def _nothing() -> None:
    pass


def _not_done(last: list[_Operation]) -> list[_Operation]:
    """`last` and all they come after that is not done, in an order in which it can be."""
    order: list[_Operation] = []
    seen: set[int] = set()
    left = [(operation, False) for operation in last]
    while left:
        operation, ready = left.pop()
        if ready:
            order.append(operation)
        elif not operation.done and id(operation) not in seen:
            seen.add(id(operation))
            left.append((operation, True))
            left.extend((earlier, False) for earlier in operation.after)
    return order


@dataclass(frozen=True)
class _Host:
    """Page-locked memory that an operation will use, without keeping it alive."""

    owner: weakref.ref[Any]
    address: int
    nbytes: int

    @staticmethod
    def of(array: np.ndarray, what: str) -> _Host:
        if not array.flags.c_contiguous:
            raise CudaError(f"{what}: the host array has gaps")
        if not is_pinned(array):
            raise CudaError(f"{what}: the host array is not page-locked")
        owner = array
        while isinstance(owner.base, np.ndarray):
            owner = owner.base
        return _Host(weakref.ref(owner), array.ctypes.data, array.nbytes)

    def bytes(self) -> np.ndarray:
        """(nbytes,) uint8."""
        if self.owner() is None:
            raise Race("the host array was freed while the GPU was to copy it")
        return np.ctypeslib.as_array((ctypes.c_uint8 * self.nbytes).from_address(self.address))


# -- the program -----------------------------------------------------------------


class PretendProgram(Program):
    """A plan for a `PretendGpu`: computes `network`, and spoils the working memory as TensorRT would."""

    def __init__(
        self, gpu: PretendGpu, profile: Profile, network: Network, working_bytes: int = 1000
    ) -> None:
        self.working_bytes = working_bytes
        self.contexts: list[tuple[int, int]] = []
        """Batch and address of the counts, of each context made."""
        self.closed = False
        self._gpu, self._profile, self._network = gpu, profile, network

    def context(self, batch: int, counts: int, expected: int, working: int) -> _Context:
        if self.closed:
            raise EngineError("the program is closed")
        if not 1 <= batch <= self._profile.max_batch:
            raise EngineError(f"a batch of {batch}, and the plan is for {self._profile}")
        self._gpu.call("context", EngineError)
        p = self._profile
        pixels = batch * p.height * p.width
        self.contexts.append((batch, counts))
        return _Context(
            self,
            (batch, *p.shape),
            self._gpu.buffer_at(counts, pixels * p.dtype.itemsize),
            self._gpu.buffer_at(expected, pixels * 4),
            self._gpu.buffer_at(working, self.working_bytes),
        )

    def close(self) -> None:
        self._gpu.call("close")
        self.closed = True

    def compute(self, shape: tuple[int, ...], counts: _Buffer, expected: _Buffer, working: _Buffer) -> None:
        """What a stream does when it comes to it."""
        gpu, dtype = self._gpu, self._profile.dtype.newbyteorder("<")
        nbytes = int(np.prod(shape)) * dtype.itemsize
        frames = gpu.memory(counts)[:nbytes].view(dtype).reshape(shape).astype(np.float32)
        gpu.memory(working)[:] ^= 0xFF
        result = self._network(frames)
        assert result.dtype == np.float32
        assert result.shape == shape
        gpu.memory(expected)[: result.nbytes] = np.ascontiguousarray(result).reshape(-1).view(np.uint8)


class _Context:
    def __init__(
        self,
        program: PretendProgram,
        shape: tuple[int, ...],
        counts: _Buffer,
        expected: _Buffer,
        working: _Buffer,
    ) -> None:
        self._program, self._shape = program, shape
        self._counts, self._expected, self._working = counts, expected, working
        self._settled = False

    def execute(self, stream: int) -> None:
        gpu = self._program._gpu
        gpu.call("execute", EngineError)
        if self._program.closed:
            raise EngineError("the program is closed")
        place = gpu.stream_of(stream)
        if place.capture is not None and not self._settled:
            raise EngineError("the first run of a context cannot be captured")
        self._settled = True

        def do() -> None:
            self._program.compute(self._shape, self._counts, self._expected, self._working)

        gpu.put(place, "execute", do, reads=[self._counts], writes=[self._expected, self._working])
