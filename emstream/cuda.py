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
import logging
import sys
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from emstream.errors import CudaError

log = logging.getLogger(__name__)

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
    integers that TensorRT wants. They and page-locked memory are given back with the last
    reference, from any thread. All but `pin` and `is_pinned` need `current()`.
    """

    info: GpuInfo
    api: str
    """The package that makes the calls, and its version."""
    _bindings: _Bindings | None = None

    @property
    def has_graphs(self) -> bool:
        return self._bindings is not None

    @abstractmethod
    def current(self) -> contextlib.AbstractContextManager[None]:
        """This GPU's context is the calling thread's for the length of a with statement."""

    def pin(self, nbytes: int, *, write_combined: bool = False) -> np.ndarray:
        """Page-locked memory (nbytes,) uint8, freed with the last array that shows it.

        Write-combined memory is written fast and read very slowly by the CPU.
        """
        with self.current():
            array, owner = self._pin(nbytes, PORTABLE | (WRITE_COMBINED if write_combined else 0))
        address = array.ctypes.data
        _pinned[address] = nbytes
        # On the array, which is the base of all its views. Not at exit: a thread may be writing there still.
        weakref.finalize(array, self._forget, address, owner).atexit = False
        array.fill(0)
        return array

    def _forget(self, address: int, owner: Any) -> None:
        del _pinned[address]
        with contextlib.suppress(CudaError), self.current():
            self._unpin(owner)

    @abstractmethod
    def _pin(self, nbytes: int, flags: int) -> tuple[np.ndarray, Any]:
        """The memory, and what `_unpin` needs."""

    @abstractmethod
    def _unpin(self, owner: Any) -> None:
        """Give page-locked memory back."""

    @abstractmethod
    def allocate(self, nbytes: int) -> Any:
        """Device memory."""

    @abstractmethod
    def address(self, buffer: Any) -> int:
        """Where it lies on the device."""

    def free(self, buffer: Any) -> None:
        """Give device memory back now; nothing under way may use it."""
        buffer.give_back()

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

    @contextlib.contextmanager
    def capture(self, stream: Any) -> Iterator[list[Any]]:
        """What is put on `stream` within is not done but kept: afterwards the list holds one graph."""
        call, kept = self._graphs(), list[Any]()
        handle = call.cuda.CUstream(self.handle(stream))
        call("cuStreamBeginCapture", handle, call.cuda.CUstreamCaptureMode(_CAPTURE_THREAD_LOCAL))
        try:
            yield kept
        except BaseException:
            with contextlib.suppress(CudaError):  # ends the capture, whatever it holds
                call("cuGraphDestroy", call("cuStreamEndCapture", handle))
            raise
        graph = call("cuStreamEndCapture", handle)
        try:
            kept.append(
                _Owned(self, call("cuGraphInstantiate", graph, 0), partial(call, "cuGraphExecDestroy"))
            )
        finally:
            call("cuGraphDestroy", graph)

    def launch(self, graph: Any, stream: Any) -> None:
        """Do on `stream` what a graph keeps."""
        call = self._graphs()
        call("cuGraphLaunch", graph.it, call.cuda.CUstream(self.handle(stream)))

    def _graphs(self) -> _Bindings:
        if self._bindings is None:
            raise CudaError("graphs need cuda-bindings: pip install cuda-bindings")
        return self._bindings

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
        try:
            return _PyCuda()
        except CudaError as error:
            if not _has_bindings():
                raise
            log.warning("cuda-bindings are used: %s", error)
    if _has_bindings():
        return _Bindings()
    raise CudaError("neither pycuda nor cuda-bindings is installed: pip install 'emstream[rtx]'")


def _has_bindings() -> bool:
    return bool(importlib.util.find_spec("cuda") and importlib.util.find_spec("cuda.bindings"))


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise CudaError(f"{name} is installed and cannot be imported: {error}") from None


class _Owned:
    """A buffer, stream, event or graph, given back in its own context with the last reference to it.

    That may happen in any thread; pycuda by itself only gives back in the one that opened the GPU.
    """

    def __init__(self, gpu: Gpu, it: Any, give_back: Callable[[Any], object] = lambda it: None) -> None:
        """`give_back` may be left out for what goes when nothing refers to it."""
        self._it = [it]
        self._finalizer = weakref.finalize(self, _finalize, gpu, self._it, give_back)
        self._finalizer.atexit = False  # a thread may be using it still

    @property
    def it(self) -> Any:
        if not self._it:
            raise ValueError("used after it was given back to the GPU")
        return self._it[0]

    def give_back(self) -> None:
        """Now, where the context is current; again does nothing."""
        alive = self._finalizer.detach()
        if alive is not None:
            _, _, (_, it, give_back), _ = alive
            give_back(it.pop())


def _finalize(gpu: Gpu, it: list[Any], give_back: Callable[[Any], object]) -> None:
    with contextlib.suppress(CudaError), gpu.current():
        give_back(it.pop())


def _info(index: int, name: str, capability: Any, version: Any, memory_bytes: Any) -> GpuInfo:
    major, minor = capability
    driver = f"{version // 1000}.{version % 1000 // 10}"
    return GpuInfo(index, name, f"{major}.{minor}", driver, int(memory_bytes))


# -- cuda-bindings ---------------------------------------------------------------


class _Bindings:
    """The driver through cuda-bindings, which are wheels and need no compiler."""

    def __init__(self) -> None:
        self.cuda = _import("cuda.bindings.driver")
        self.api = f"cuda-bindings {_import('cuda.bindings').__version__}"
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
        device, attribute = self("cuDeviceGet", index), self.cuda.CUdevice_attribute
        major = self("cuDeviceGetAttribute", attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device)
        minor = self("cuDeviceGetAttribute", attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device)
        name = self("cuDeviceGetName", 256, device).split(b"\0")[0].decode()
        memory = self("cuDeviceTotalMem", device)
        return _info(index, name, (major, minor), self("cuDriverGetVersion"), memory)

    def open(self, index: int) -> Gpu:
        return _BindingsGpu(self, index)


class _BindingsGpu(Gpu):
    def __init__(self, call: _Bindings, index: int) -> None:
        self._call, self._bindings = call, call
        self.info, self.api = call.info(index), call.api
        self._context = call("cuDevicePrimaryCtxRetain", call("cuDeviceGet", index))

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        self._call("cuCtxPushCurrent", self._context)
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent")

    def _pin(self, nbytes: int, flags: int) -> tuple[np.ndarray, Any]:
        address = int(self._call("cuMemHostAlloc", nbytes, flags))
        block: Any = (ctypes.c_uint8 * nbytes).from_address(address)
        return np.frombuffer(block, np.uint8), address

    def _unpin(self, owner: Any) -> None:
        self._call("cuMemFreeHost", owner)

    def allocate(self, nbytes: int) -> Any:
        return self._owned("cuMemFree", self._call("cuMemAlloc", nbytes))

    def address(self, buffer: Any) -> int:
        return int(buffer.it)

    def stream(self) -> Any:
        return self._owned("cuStreamDestroy", self._call("cuStreamCreate", _NON_BLOCKING))

    def handle(self, stream: Any) -> int:
        return int(stream.it)

    def event(self) -> Any:
        return self._owned("cuEventDestroy", self._call("cuEventCreate", _BLOCKING_SYNC | _DISABLE_TIMING))

    def record(self, event: Any, stream: Any) -> None:
        self._call("cuEventRecord", event.it, stream.it)

    def wait(self, stream: Any, event: Any) -> None:
        self._call("cuStreamWaitEvent", stream.it, event.it, 0)

    def synchronize(self, event: Any) -> None:
        self._call("cuEventSynchronize", event.it)

    def upload(self, buffer: Any, array: np.ndarray, stream: Any) -> None:
        self._call("cuMemcpyHtoDAsync", buffer.it, _start(array), array.nbytes, stream.it)

    def download(self, array: np.ndarray, buffer: Any, stream: Any) -> None:
        self._call("cuMemcpyDtoHAsync", _start(array), buffer.it, array.nbytes, stream.it)

    def memory_free(self) -> int:
        return int(self._call("cuMemGetInfo")[0])

    def _owned(self, give_back: str, it: Any) -> _Owned:
        return _Owned(self, it, partial(self._call, give_back))


def _start(array: np.ndarray) -> int:
    if not array.flags.c_contiguous:
        raise ValueError("only contiguous arrays can be copied to or from a GPU")
    return int(array.ctypes.data)


# -- pycuda ----------------------------------------------------------------------


class _PyCuda:
    """The driver through pycuda, which is compiled against a CUDA toolkit."""

    def __init__(self) -> None:
        self.cuda = _import("pycuda.driver")
        self.api = f"pycuda {_import('pycuda').VERSION_TEXT}"
        self(self.cuda.init)

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call pycuda; what it returns, or CudaError with the driver's call and the error's name."""
        try:
            return function(*arguments)
        except self.cuda.Error as error:
            raise CudaError(_with_name(str(error))) from None

    def count(self) -> int:
        return int(self(self.cuda.Device.count))

    def info(self, index: int) -> GpuInfo:
        device = self(self.cuda.Device, index)
        name, capability, memory = map(self, (device.name, device.compute_capability, device.total_memory))
        return _info(index, name, capability, self(self.cuda.get_driver_version), memory)

    def open(self, index: int) -> Gpu:
        return _PyCudaGpu(self, index)


def _with_name(text: str) -> str:
    """pycuda's "CALL failed: MEANING - REMARK" as "CALL: CUDA_ERROR_...", which can be looked up."""
    call, _, meaning = text.partition(" - ")[0].partition(" failed: ")
    driver, found = ctypes.CDLL(_DRIVER), ctypes.c_char_p()
    for code in range(1, 1000):
        if driver.cuGetErrorString(code, ctypes.byref(found)) == 0 and found.value == meaning.encode():
            driver.cuGetErrorName(code, ctypes.byref(found))
            return f"{call}: {(found.value or b'').decode()}"
    return text


class _PyCudaGpu(Gpu):
    def __init__(self, call: _PyCuda, index: int) -> None:
        self._call, self._cuda = call, call.cuda
        self.info, self.api = call.info(index), call.api
        self._context = call(call(self._cuda.Device, index).retain_primary_context)
        # Never given back: pycuda would call cuCtxDetach, which is not for primary contexts.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._context))
        if _has_bindings():
            self._bindings = _Bindings()
            self.api = f"{self.api}, {self._bindings.api} for graphs"

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        self._call(self._context.push)
        try:
            yield
        finally:
            self._call(self._cuda.Context.pop)

    def _pin(self, nbytes: int, flags: int) -> tuple[np.ndarray, Any]:
        array: np.ndarray = self._call(self._cuda.pagelocked_empty, nbytes, np.uint8, "C", flags)
        return array, array.base

    def _unpin(self, owner: Any) -> None:
        self._call(owner.free)

    def allocate(self, nbytes: int) -> Any:
        return _Owned(self, self._call(self._cuda.mem_alloc, nbytes), lambda it: self._call(it.free))

    def address(self, buffer: Any) -> int:
        return int(buffer.it)

    def stream(self) -> Any:
        return _Owned(self, self._call(self._cuda.Stream, _NON_BLOCKING))

    def handle(self, stream: Any) -> int:
        return int(stream.it.handle)

    def event(self) -> Any:
        return _Owned(self, self._call(self._cuda.Event, _BLOCKING_SYNC | _DISABLE_TIMING))

    def record(self, event: Any, stream: Any) -> None:
        self._call(event.it.record, stream.it)

    def wait(self, stream: Any, event: Any) -> None:
        self._call(stream.it.wait_for_event, event.it)

    def synchronize(self, event: Any) -> None:
        self._call(event.it.synchronize)

    def upload(self, buffer: Any, array: np.ndarray, stream: Any) -> None:
        self._call(self._cuda.memcpy_htod_async, buffer.it, array, stream.it)

    def download(self, array: np.ndarray, buffer: Any, stream: Any) -> None:
        self._call(self._cuda.memcpy_dtoh_async, array, buffer.it, stream.it)

    def memory_free(self) -> int:
        return int(self._call(self._cuda.mem_get_info)[0])
