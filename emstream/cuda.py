"""Every CUDA call there is: contexts, page-locked memory, copies, streams, events, graphs.

`open_gpu` returns a `Gpu`, through pycuda where that is installed and through NVIDIA's
cuda-bindings otherwise. pycuda has no call for graph capture: it borrows that from
cuda-bindings when they are there, and runs without graphs when they are not.

Order on a GPU is per stream. Work on two streams is ordered by an event alone::

    gpu.record(event, a)       after all that is on stream a by now,
    gpu.wait(b, event)         what comes next on stream b

Host arrays that are uploaded or downloaded must be page-locked (`Gpu.pin`) and stay
untouched until an event recorded after the copy has been waited for.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import sys
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from emstream.errors import CudaError

PORTABLE, WRITE_COMBINED = 1, 4  # CU_MEMHOSTALLOC_*: page-locked for every context; not cached by the CPU
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: not ordered with the default stream
_BLOCKING_SYNC, _DISABLE_TIMING = 1, 2  # CU_EVENT_*: sleep while waiting; cheaper to record
_CAPTURE_THREAD_LOCAL = 1  # other threads may allocate while this one captures

_DRIVER = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"

_pinned: dict[int, int] = {}  # address -> bytes of all page-locked memory of this process


def is_pinned(array: np.ndarray) -> bool:
    """Whether `array` is contiguous and lies in memory from `Gpu.pin`, of whichever GPU."""
    if not array.flags.c_contiguous:
        return False
    address = array.ctypes.data
    return any(start <= address and address + array.nbytes <= start + n for start, n in list(_pinned.items()))


@dataclass(frozen=True)
class GpuInfo:
    """What a plan may depend on."""

    index: int
    name: str
    capability: str
    """Compute capability, such as 9.0."""
    driver: str
    """Newest CUDA version that the driver knows, such as 13.0."""
    memory_bytes: int


class Gpu(ABC):
    """One GPU and its primary context, which TensorRT and torch share.

    Buffers, streams, events and graphs are opaque; `address` and `handle` give the
    integers that TensorRT wants. All but `pin` and `is_pinned` need `current()`.
    """

    info: GpuInfo
    api: str
    """The package that makes the calls, and its version."""
    has_graphs: bool

    @abstractmethod
    def current(self) -> contextlib.AbstractContextManager[None]:
        """This GPU's context is the calling thread's for the length of a with statement."""

    def pin(self, nbytes: int, *, write_combined: bool = False) -> np.ndarray:
        """Page-locked memory (nbytes,) uint8, freed with the last array that shows it.

        Write-combined memory is written fast and read very slowly by the CPU.
        """
        with self.current():
            array = self._pin(nbytes, PORTABLE | (WRITE_COMBINED if write_combined else 0))
        address = array.ctypes.data
        _pinned[address] = nbytes
        weakref.finalize(array, _pinned.pop, address, None)
        array.fill(0)
        return array

    @abstractmethod
    def _pin(self, nbytes: int, flags: int) -> np.ndarray:
        """The array must keep its memory alive by being the base of every view."""

    @abstractmethod
    def allocate(self, nbytes: int) -> Any:
        """Device memory."""

    @abstractmethod
    def address(self, buffer: Any) -> int:
        """Where it lies on the device."""

    @abstractmethod
    def free(self, buffer: Any) -> None:
        """Give device memory back; nothing under way may use it."""

    @abstractmethod
    def stream(self) -> Any:
        """A stream that is not ordered with the default stream."""

    @abstractmethod
    def handle(self, stream: Any) -> int:
        """The CUstream, as an integer."""

    @abstractmethod
    def event(self) -> Any:
        """An event; whoever waits for it sleeps."""

    @abstractmethod
    def record(self, event: Any, stream: Any) -> None:
        """`event` happens once all that is on `stream` by now is done."""

    @abstractmethod
    def wait(self, stream: Any, event: Any) -> None:
        """What comes on `stream` from now on starts after `event`, as recorded last."""

    @abstractmethod
    def synchronize(self, event: Any) -> None:
        """Sleep until `event`, as recorded last, has happened."""

    @abstractmethod
    def upload(self, buffer: Any, array: np.ndarray, stream: Any) -> None:
        """Copy a contiguous host array to the start of `buffer`."""

    @abstractmethod
    def download(self, array: np.ndarray, buffer: Any, stream: Any) -> None:
        """Copy the start of `buffer` into a contiguous host array."""

    @abstractmethod
    @contextlib.contextmanager
    def capture(self, stream: Any) -> Iterator[list[Any]]:
        """What is put on `stream` within is not done but kept: afterwards the list holds one graph."""

    @abstractmethod
    def launch(self, graph: Any, stream: Any) -> None:
        """Do on `stream` what a graph keeps."""

    @abstractmethod
    def memory_free(self) -> int:
        """Bytes of device memory not in use."""


def driver_present() -> bool:
    """Whether this machine has NVIDIA's driver."""
    try:
        ctypes.CDLL(_DRIVER)
    except OSError:
        return False
    return True


def devices() -> list[GpuInfo]:
    """The GPUs of this machine; raises CudaError that says what is missing when there is none."""
    driver = _driver()
    return [driver.info(index) for index in range(driver.count())]


def open_gpu(index: int = 0) -> Gpu:
    """GPU number `index`; raises CudaError that says what is missing."""
    driver = _driver()
    if not 0 <= index < driver.count():
        known = ", ".join(f"{n} ({driver.info(n).name})" for n in range(driver.count()))
        raise CudaError(f"there is no GPU {index}; this machine has {known or 'none'}")
    return driver.open(index)


def _driver() -> _PyCuda | _Bindings:
    """The installed package, with CUDA initialised."""
    if not driver_present():
        raise CudaError(f"no NVIDIA driver: {_DRIVER} cannot be loaded")
    if importlib.util.find_spec("pycuda"):
        return _PyCuda()
    if importlib.util.find_spec("cuda") and importlib.util.find_spec("cuda.bindings"):
        return _Bindings()
    raise CudaError("neither pycuda nor cuda-bindings is installed: pip install 'emstream[rtx]'")


# -- cuda-bindings ---------------------------------------------------------------


class _Bindings:
    """The driver through cuda-bindings, which are wheels and need no compiler."""

    def __init__(self) -> None:
        self.cuda = importlib.import_module("cuda.bindings.driver")
        self.api = f"cuda-bindings {importlib.import_module('cuda.bindings').__version__}"
        self("cuInit", 0)

    def __call__(self, name: str, *arguments: Any) -> Any:
        """Call the driver; its values, or CudaError with the call and the error's name."""
        error, *values = getattr(self.cuda, name)(*arguments)
        if error != self.cuda.CUresult.CUDA_SUCCESS:
            raise CudaError(f"{name}: {error.name}")
        return values[0] if len(values) == 1 else values

    def count(self) -> int:
        return int(self("cuDeviceGetCount"))

    def info(self, index: int) -> GpuInfo:
        device = self("cuDeviceGet", index)
        attribute = self.cuda.CUdevice_attribute
        capability = [
            self("cuDeviceGetAttribute", attribute[f"CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_{part}"], device)
            for part in ("MAJOR", "MINOR")
        ]
        name = self("cuDeviceGetName", 256, device).split(b"\0")[0].decode()
        version = int(self("cuDriverGetVersion"))
        return _info(index, name, capability, version, int(self("cuDeviceTotalMem", device)))

    def open(self, index: int) -> Gpu:
        return _BindingsGpu(self, index)


def _info(index: int, name: str, capability: Any, version: int, memory_bytes: int) -> GpuInfo:
    major, minor = capability
    return GpuInfo(
        index, name, f"{major}.{minor}", f"{version // 1000}.{version % 1000 // 10}", int(memory_bytes)
    )


class _Graphs:
    """Graph capture through cuda-bindings, for streams of either package."""

    def __init__(self, call: _Bindings) -> None:
        self._call = call

    @contextlib.contextmanager
    def capture(self, handle: int) -> Iterator[list[Any]]:
        call, kept = self._call, []
        stream = call.cuda.CUstream(handle)
        call("cuStreamBeginCapture", stream, call.cuda.CUstreamCaptureMode(_CAPTURE_THREAD_LOCAL))
        try:
            yield kept
        except BaseException:
            with contextlib.suppress(CudaError):  # ends the capture, whatever it holds
                call("cuStreamEndCapture", stream)
            raise
        graph = call("cuStreamEndCapture", stream)
        kept.append(call("cuGraphInstantiate", graph, 0))
        call("cuGraphDestroy", graph)

    def launch(self, graph: Any, handle: int) -> None:
        self._call("cuGraphLaunch", graph, self._call.cuda.CUstream(handle))


class _BindingsGpu(Gpu):
    has_graphs = True

    def __init__(self, call: _Bindings, index: int) -> None:
        self._call, self.info, self.api = call, call.info(index), call.api
        self._context = call("cuDevicePrimaryCtxRetain", call("cuDeviceGet", index))
        self._graphs = _Graphs(call)

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        self._call("cuCtxPushCurrent", self._context)
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent")

    def _pin(self, nbytes: int, flags: int) -> np.ndarray:
        address = int(self._call("cuMemHostAlloc", nbytes, flags))
        block = (ctypes.c_uint8 * nbytes).from_address(address)
        weakref.finalize(block, self._unpin, address)
        return np.frombuffer(block, np.uint8)

    def _unpin(self, address: int) -> None:
        with contextlib.suppress(CudaError), self.current():  # at exit the driver may be gone
            self._call("cuMemFreeHost", address)

    def allocate(self, nbytes: int) -> Any:
        return self._call("cuMemAlloc", nbytes)

    def address(self, buffer: Any) -> int:
        return int(buffer)

    def free(self, buffer: Any) -> None:
        self._call("cuMemFree", buffer)

    def stream(self) -> Any:
        return self._call("cuStreamCreate", _NON_BLOCKING)

    def handle(self, stream: Any) -> int:
        return int(stream)

    def event(self) -> Any:
        return self._call("cuEventCreate", _BLOCKING_SYNC | _DISABLE_TIMING)

    def record(self, event: Any, stream: Any) -> None:
        self._call("cuEventRecord", event, stream)

    def wait(self, stream: Any, event: Any) -> None:
        self._call("cuStreamWaitEvent", stream, event, 0)

    def synchronize(self, event: Any) -> None:
        self._call("cuEventSynchronize", event)

    def upload(self, buffer: Any, array: np.ndarray, stream: Any) -> None:
        self._call("cuMemcpyHtoDAsync", buffer, array.ctypes.data, array.nbytes, stream)

    def download(self, array: np.ndarray, buffer: Any, stream: Any) -> None:
        self._call("cuMemcpyDtoHAsync", array.ctypes.data, buffer, array.nbytes, stream)

    def capture(self, stream: Any) -> contextlib.AbstractContextManager[list[Any]]:  # type: ignore[override]
        return self._graphs.capture(int(stream))

    def launch(self, graph: Any, stream: Any) -> None:
        self._graphs.launch(graph, int(stream))

    def memory_free(self) -> int:
        return int(self._call("cuMemGetInfo")[0])


# -- pycuda ----------------------------------------------------------------------


class _PyCuda:
    """The driver through pycuda, which is compiled against a CUDA toolkit."""

    def __init__(self) -> None:
        self.cuda = importlib.import_module("pycuda.driver")
        self.api = f"pycuda {importlib.import_module('pycuda').VERSION_TEXT}"
        with self.named("cuInit"):
            self.cuda.init()

    @contextlib.contextmanager
    def named(self, name: str) -> Iterator[None]:
        """pycuda's errors name the call and the reason already."""
        try:
            yield
        except self.cuda.Error as error:
            raise CudaError(f"{name}: {error}") from None

    def count(self) -> int:
        return int(self.cuda.Device.count())

    def info(self, index: int) -> GpuInfo:
        device = self.cuda.Device(index)
        return _info(
            index,
            device.name(),
            device.compute_capability(),
            self.cuda.get_driver_version(),
            device.total_memory(),
        )

    def open(self, index: int) -> Gpu:
        return _PyCudaGpu(self, index)


class _PyCudaGpu(Gpu):
    def __init__(self, driver: _PyCuda, index: int) -> None:
        self._cuda, self._named = driver.cuda, driver.named
        self.info, self.api = driver.info(index), driver.api
        with self._named("cuDevicePrimaryCtxRetain"):
            self._context = self._cuda.Device(index).retain_primary_context()
        self._graphs: _Graphs | None = None
        if importlib.util.find_spec("cuda") and importlib.util.find_spec("cuda.bindings"):
            bindings = _Bindings()
            self._graphs, self.api = _Graphs(bindings), f"{self.api}, {bindings.api} for graphs"
        self.has_graphs = self._graphs is not None

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        self._context.push()
        try:
            yield
        finally:
            self._cuda.Context.pop()

    def _pin(self, nbytes: int, flags: int) -> np.ndarray:
        with self._named("cuMemHostAlloc"):
            array: np.ndarray = self._cuda.pagelocked_empty(nbytes, np.uint8, mem_flags=flags)
        return array

    def allocate(self, nbytes: int) -> Any:
        with self._named("cuMemAlloc"):
            return self._cuda.mem_alloc(nbytes)

    def address(self, buffer: Any) -> int:
        return int(buffer)

    def free(self, buffer: Any) -> None:
        buffer.free()

    def stream(self) -> Any:
        with self._named("cuStreamCreate"):
            return self._cuda.Stream(_NON_BLOCKING)

    def handle(self, stream: Any) -> int:
        return int(stream.handle)

    def event(self) -> Any:
        with self._named("cuEventCreate"):
            return self._cuda.Event(_BLOCKING_SYNC | _DISABLE_TIMING)

    def record(self, event: Any, stream: Any) -> None:
        with self._named("cuEventRecord"):
            event.record(stream)

    def wait(self, stream: Any, event: Any) -> None:
        with self._named("cuStreamWaitEvent"):
            stream.wait_for_event(event)

    def synchronize(self, event: Any) -> None:
        with self._named("cuEventSynchronize"):
            event.synchronize()

    def upload(self, buffer: Any, array: np.ndarray, stream: Any) -> None:
        with self._named("cuMemcpyHtoDAsync"):
            self._cuda.memcpy_htod_async(buffer, array, stream)

    def download(self, array: np.ndarray, buffer: Any, stream: Any) -> None:
        with self._named("cuMemcpyDtoHAsync"):
            self._cuda.memcpy_dtoh_async(array, buffer, stream)

    def capture(self, stream: Any) -> contextlib.AbstractContextManager[list[Any]]:  # type: ignore[override]
        assert self._graphs, "graphs need cuda-bindings"
        return self._graphs.capture(self.handle(stream))

    def launch(self, graph: Any, stream: Any) -> None:
        assert self._graphs, "graphs need cuda-bindings"
        self._graphs.launch(graph, self.handle(stream))

    def memory_free(self) -> int:
        return int(self._cuda.mem_get_info()[0])
