"""`emstream.cuda` through the real packages, on pretend GPUs (tests/doubles/libcuda.c).

Tests `with_packages` run in a process of their own, which is handed the pretend driver.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from emstream import cuda
from emstream.cuda import Gpu, GpuInfo, is_pinned, open_gpu
from emstream.errors import CudaError
from tests.doubles.libcuda import Driver, PretendDriver, installed, why_not

BYTES = 1000
_left_over: list[Any] = []


@pytest.fixture(scope="session")
def pretend_driver(tmp_path_factory: pytest.TempPathFactory) -> PretendDriver:
    reason = why_not()
    if reason:
        pytest.skip(reason)
    return PretendDriver(tmp_path_factory.mktemp("cuda"))


BOTH = (("cuda-bindings",), ("pycuda", "cuda-bindings"))


def with_packages(*choices: tuple[str, ...]) -> Callable[[Callable[[Driver], None]], Callable[..., None]]:
    """The test, for each choice in a process where only those packages are installed."""

    def decorate(check: Callable[[Driver], None]) -> Callable[..., None]:
        @pytest.mark.parametrize("packages", choices, ids=lambda packages: "+".join(packages) or "neither")
        def test(packages: tuple[str, ...], pretend_driver: PretendDriver) -> None:
            missing = [package for package in packages if not installed(package)]
            if missing:
                pytest.skip(f"{missing[0]} is not installed")
            pretend_driver.run(check.__module__, check.__name__, *packages)

        test.__name__, test.__qualname__ = check.__name__, check.__qualname__
        test.check = check
        return test

    return decorate


class Rig:
    """A GPU whose context is current, and what a copy there and back needs."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.up, self.down, self.uploaded, self.downloaded = (
            gpu.stream(),
            gpu.stream(),
            gpu.event(),
            gpu.event(),
        )
        self.buffer = gpu.allocate(BYTES)
        self.source, self.target = gpu.pin(BYTES), gpu.pin(BYTES)
        self.source[:] = np.arange(BYTES) % 251

    def round_trip(self) -> None:
        """Put one on both streams; not waited for."""
        gpu = self.gpu
        gpu.upload(self.buffer, self.source, self.up)
        gpu.record(self.uploaded, self.up)
        gpu.wait(self.down, self.uploaded)
        gpu.download(self.target, self.buffer, self.down)
        gpu.record(self.downloaded, self.down)

    def works(self) -> bool:
        self.target.fill(0)
        self.round_trip()
        self.gpu.synchronize(self.downloaded)
        return bool((self.target == self.source).all())


@contextmanager
def rig(index: int = 0) -> Iterator[Rig]:
    gpu = open_gpu(index)
    with gpu.current():
        yield Rig(gpu)


@contextmanager
def fails(call: str, error: str) -> Iterator[None]:
    """The block raises CudaError with this call and CUDA_ERROR_`error`."""
    with pytest.raises(CudaError) as caught:
        yield
    assert str(caught.value) == f"{call}: CUDA_ERROR_{error}"


def in_a_thread(work: Callable[[], None]) -> None:
    """Do it there, and raise here what it raises."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(30)
    assert not thread.is_alive(), "the thread did not end"
    if raised:
        raise raised[0]


# -- which GPUs there are --------------------------------------------------------------


def test_without_a_driver_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_DRIVER", "libcuda-of-nobody.so.1")
    assert not cuda.driver_present()
    for look in (cuda.devices, open_gpu):
        with pytest.raises(CudaError, match=r"no NVIDIA driver: libcuda-of-nobody\.so\.1 cannot be loaded"):
            look()


@with_packages(())
def test_without_a_package_the_error_names_the_command(driver: Driver) -> None:
    assert cuda.driver_present()
    with pytest.raises(
        CudaError, match=r"neither pycuda nor cuda-bindings .*: pip install 'emstream\[rtx\]'"
    ):
        cuda.devices()


@with_packages(*BOTH)
def test_a_package_that_cannot_be_imported_is_named(driver: Driver) -> None:
    name = "pycuda.driver" if installed("pycuda") else "cuda.bindings.driver"
    sys.modules[name] = None
    with pytest.raises(CudaError, match=rf"{name} is installed and cannot be imported: "):
        cuda.devices()


@with_packages(*BOTH)
def test_the_gpus_are_described(driver: Driver) -> None:
    names = ("Pretend GPU 0", "Pretend GPU 1")
    assert cuda.devices() == [GpuInfo(n, name, "9.0", "13.0", 2**30) for n, name in enumerate(names)]
    assert [open_gpu(n).info for n in range(2)] == cuda.devices()


@with_packages(*BOTH)
def test_the_package_in_use_is_named(driver: Driver) -> None:
    api = open_gpu().api
    assert "cuda-bindings 1" in api
    assert api.startswith("pycuda 20") == installed("pycuda"), api


@with_packages(*BOTH)
def test_a_gpu_that_is_not_there_is_refused_with_those_that_are(driver: Driver) -> None:
    for index in (2, -1):
        with pytest.raises(CudaError, match=rf"no GPU {index}; .* 0 \(Pretend GPU 0\), 1 \(Pretend GPU 1\)"):
            open_gpu(index)


@with_packages(*BOTH)
def test_a_driver_without_a_gpu_says_so(driver: Driver) -> None:
    os.environ["PRETEND_CUDA_GPUS"] = "0"
    with fails("cuInit", "NO_DEVICE"):
        cuda.devices()


# -- page-locked memory ----------------------------------------------------------------


@with_packages(*BOTH)
def test_page_locked_memory_comes_zeroed_and_is_known_by_its_contiguous_parts(driver: Driver) -> None:
    memory = open_gpu().pin(BYTES)
    assert (memory.shape, memory.dtype, memory.any()) == ((BYTES,), np.uint8, False)
    frames = memory[:800].view(np.float32).reshape(2, 10, 10)
    for part in (memory, memory[10:20], memory[-1:], frames, frames[1], frames[1, 3]):
        assert is_pinned(part), part.shape
    for part in (memory[::2], frames[:, 2:], frames.T, frames[:, :, 1], frames[::-1]):
        assert not is_pinned(part), part.strides
    for other in (memory.copy(), frames * 1, np.zeros(BYTES, np.uint8)):
        assert not is_pinned(other)


@with_packages(*BOTH)
def test_a_view_keeps_page_locked_memory_alive_and_the_last_one_gives_it_back(driver: Driver) -> None:
    memory = open_gpu().pin(4096)
    frame = memory[1024:2048].view(np.uint16).reshape(16, 32)[2:4]
    exported = memoryview(memory[:10])
    memory[:] = 3
    del memory
    assert (frame == 0x0303).all()
    assert is_pinned(frame)
    del frame
    assert exported[0] == 3
    assert driver.live() == {"host": 1}
    address = np.asarray(exported).ctypes.data
    del exported
    assert driver.live() == {}
    elsewhere = np.ndarray((10,), np.uint8, buffer=(cuda.ctypes.c_uint8 * 10).from_address(address))
    assert not is_pinned(elsewhere), "freed memory is forgotten"


@with_packages(*BOTH)
def test_page_locked_memory_is_for_all_gpus_and_write_combined_when_asked(driver: Driver) -> None:
    gpu = open_gpu()
    memory = [gpu.pin(BYTES)]
    assert driver.flags("host") == cuda.PORTABLE
    memory.append(gpu.pin(BYTES, write_combined=True))
    assert driver.flags("host") == cuda.PORTABLE | cuda.WRITE_COMBINED
    assert all(map(is_pinned, memory))


# -- streams, events, copies -----------------------------------------------------------


@with_packages(*BOTH)
def test_events_order_a_copy_there_and_back_on_two_streams(driver: Driver) -> None:
    with rig() as each:
        for _ in range(3):
            each.source[:] += 1
            assert each.works()
        part = each.source[100:200].view(np.uint16).reshape(5, 10)
        each.gpu.upload(each.buffer, part, each.up)
        back = each.target[:100].view(np.uint16).reshape(5, 10)
        each.gpu.download(back, each.buffer, each.up)
        each.gpu.record(each.downloaded, each.up)
        each.gpu.synchronize(each.downloaded)
        assert (back == part).all()
        assert (each.target[100:] == each.source[100:]).all(), "copied more than was asked for"


@with_packages(*BOTH)
def test_a_copy_happens_when_it_is_waited_for(driver: Driver) -> None:
    with rig() as each:
        each.round_trip()
        assert driver.pending() == 5
        assert not each.target.any()
        each.source[:] = 77  # too early, and so it is what arrives
        each.gpu.synchronize(each.downloaded)
        assert (each.target == 77).all()
        assert driver.pending() == 0


@with_packages(*BOTH)
def test_without_an_event_streams_do_not_wait_for_each_other(driver: Driver) -> None:
    with rig() as each:
        each.gpu.upload(each.buffer, each.source, each.up)
        each.gpu.download(each.target, each.buffer, each.down)
        each.gpu.record(each.downloaded, each.down)
        each.gpu.synchronize(each.downloaded)
        assert (each.target == 0xA5).all(), "the rubbish that new memory holds"
        assert driver.pending() == 1


@with_packages(*BOTH)
def test_an_event_counts_as_recorded_last(driver: Driver) -> None:
    with rig() as each:
        gpu, event = each.gpu, each.uploaded
        gpu.synchronize(event)  # recorded never: nothing to wait for
        gpu.wait(each.down, event)
        gpu.record(event, each.up)
        gpu.upload(each.buffer, each.source, each.up)
        gpu.synchronize(event)
        assert driver.pending() == 1, "the upload came after it"
        gpu.record(event, each.up)
        gpu.synchronize(event)
        assert driver.pending() == 0


@with_packages(*BOTH)
def test_streams_ignore_the_default_stream_and_whoever_waits_for_an_event_sleeps(driver: Driver) -> None:
    gpu = open_gpu()
    with gpu.current():
        made = [gpu.stream(), gpu.event()]
    assert driver.flags("stream") == 1
    assert driver.flags("event") == 1 | 2, "sleeps, and takes no times"
    made.clear()


@with_packages(*BOTH)
def test_arrays_that_are_not_contiguous_are_refused(driver: Driver) -> None:
    with rig() as each:
        with pytest.raises(ValueError, match="contiguous"):
            each.gpu.upload(each.buffer, each.source[::2], each.up)
        with pytest.raises(ValueError, match="contiguous"):
            each.gpu.download(each.target[::2], each.buffer, each.up)
        assert driver.pending() == 0


@with_packages(*BOTH)
def test_free_memory_is_what_is_left(driver: Driver) -> None:
    gpu = open_gpu()
    with gpu.current():
        buffer = gpu.allocate(BYTES)
        assert gpu.memory_free() == gpu.info.memory_bytes - BYTES
        gpu.free(buffer)
        assert gpu.memory_free() == gpu.info.memory_bytes


# -- graphs ----------------------------------------------------------------------------


@with_packages(*BOTH)
def test_a_graph_does_on_each_launch_what_was_captured(driver: Driver) -> None:
    with rig() as each:
        gpu = each.gpu
        assert gpu.has_graphs
        with gpu.capture(each.up) as kept:
            gpu.upload(each.buffer, each.source, each.up)
            gpu.download(each.target, each.buffer, each.up)
        assert driver.pending() == 0, "captured work is kept, not done"
        assert driver.live()["exec"] == len(kept) == 1
        assert "graph" not in driver.live(), "only the executable graph stays"
        for number in range(1, 4):
            each.source[:] = number
            gpu.launch(kept[0], each.up)
            gpu.launch(kept[0], each.up)
            gpu.record(each.downloaded, each.up)
            assert (each.target == number - 1).all()
            gpu.synchronize(each.downloaded)
            assert (each.target == number).all()
        kept.clear()
        assert "exec" not in driver.live()


@with_packages(*BOTH)
def test_an_exception_within_a_capture_leaves_the_stream_usable(driver: Driver) -> None:
    with rig() as each:

        def breaks() -> None:
            with each.gpu.capture(each.up):
                each.gpu.upload(each.buffer, each.source, each.up)
                raise KeyError("ours")

        with pytest.raises(KeyError, match="ours"):
            breaks()
        assert driver.live().keys().isdisjoint({"graph", "exec"})
        assert each.works()
        with each.gpu.capture(each.up) as kept:
            each.gpu.upload(each.buffer, each.source, each.up)
        assert len(kept) == 1


@with_packages(*BOTH)
def test_a_capture_that_is_spoilt_leaves_the_stream_usable(driver: Driver) -> None:
    with rig() as each:
        gpu = each.gpu
        with fails("cuMemAlloc", "STREAM_CAPTURE_UNSUPPORTED"), gpu.capture(each.up):
            gpu.allocate(BYTES)
        assert each.works()
        ended, spoilt = fails("cuStreamEndCapture", "STREAM_CAPTURE_INVALIDATED"), pytest.raises(CudaError)
        with ended, gpu.capture(each.up) as kept, spoilt:
            gpu.allocate(BYTES)
        assert kept == []
        assert each.works()
        gpu.record(each.uploaded, each.down)
        with fails("cuStreamWaitEvent", "STREAM_CAPTURE_ISOLATION"), gpu.capture(each.up):
            gpu.wait(each.up, each.uploaded)
        assert each.works()
        assert driver.live().keys().isdisjoint({"graph", "exec"})


@with_packages(*BOTH)
def test_other_threads_allocate_and_copy_during_a_capture(driver: Driver) -> None:
    with rig() as each:

        def elsewhere() -> None:
            with rig() as other:
                assert other.works()

        with each.gpu.capture(each.up) as kept:
            in_a_thread(elsewhere)
        assert len(kept) == 1


@with_packages(("pycuda",))
def test_pycuda_alone_has_no_graphs_and_copies_all_the_same(driver: Driver) -> None:
    with rig() as each:
        assert not each.gpu.has_graphs
        assert each.works()
        with pytest.raises(CudaError, match="graphs need cuda-bindings"):
            each.gpu.capture(each.up).__enter__()


# -- errors ----------------------------------------------------------------------------


@with_packages(*BOTH)
def test_errors_of_use_carry_the_call_and_the_name(driver: Driver) -> None:
    gpu, other = open_gpu(), open_gpu(1)
    with fails("cuMemAlloc", "INVALID_CONTEXT"):
        gpu.allocate(BYTES)
    with pytest.raises(CudaError, match="CUDA_ERROR_INVALID_CONTEXT"):  # pycuda finds out before it calls
        gpu.stream()
    with rig() as each:
        too_large = gpu.pin(BYTES + 1)
        with fails("cuMemcpyHtoDAsync", "INVALID_VALUE"):
            gpu.upload(each.buffer, too_large, each.up)
        with fails("cuMemcpyDtoHAsync", "INVALID_VALUE"):
            gpu.download(too_large, each.buffer, each.up)
        with fails("cuMemcpyHtoDAsync", "INVALID_VALUE"):
            gpu.upload(each.buffer, np.zeros(4, np.uint8), each.up)  # not page-locked
        with fails("cuMemAlloc", "OUT_OF_MEMORY"):
            gpu.allocate(gpu.info.memory_bytes)
        with fails("cuMemHostAlloc", "INVALID_VALUE"):
            gpu.pin(0)
        with other.current(), fails("cuEventRecord", "INVALID_HANDLE"):
            gpu.record(each.uploaded, each.up)
        assert each.works()


@with_packages(*BOTH)
def test_every_call_that_fails_is_named(driver: Driver) -> None:
    def captured(each: Rig) -> Any:
        with each.gpu.capture(each.up) as kept:
            each.gpu.upload(each.buffer, each.source, each.up)
        return kept[0]

    with rig() as each:
        gpu, graph = each.gpu, captured(each)
        calls: dict[str, Callable[[], object]] = {
            "cuInit": cuda.devices,
            "cuDeviceGetCount": cuda.devices,
            "cuDeviceGet": cuda.devices,
            "cuDeviceGetName": cuda.devices,
            "cuDeviceTotalMem": cuda.devices,
            "cuDriverGetVersion": cuda.devices,
            "cuDevicePrimaryCtxRetain": open_gpu,
            "cuCtxPushCurrent": lambda: in_a_thread(gpu.current().__enter__),
            "cuMemHostAlloc": lambda: gpu.pin(BYTES),
            "cuMemAlloc": lambda: gpu.allocate(BYTES),
            "cuStreamCreate": gpu.stream,
            "cuEventCreate": gpu.event,
            "cuEventRecord": lambda: gpu.record(each.uploaded, each.up),
            "cuStreamWaitEvent": lambda: gpu.wait(each.up, each.uploaded),
            "cuEventSynchronize": lambda: gpu.synchronize(each.uploaded),
            "cuMemcpyHtoDAsync": lambda: gpu.upload(each.buffer, each.source, each.up),
            "cuMemcpyDtoHAsync": lambda: gpu.download(each.target, each.buffer, each.up),
            "cuMemGetInfo": gpu.memory_free,
            "cuStreamBeginCapture": lambda: captured(each),
            "cuStreamEndCapture": lambda: captured(each),
            "cuGraphInstantiateWithFlags": lambda: captured(each),
            "cuGraphLaunch": lambda: gpu.launch(graph, each.up),
        }
        before = driver.live()
        for call, do in calls.items():
            driver.fail(call)
            with fails(call.removesuffix("WithFlags"), "UNKNOWN"):
                do()
            driver.fail(None)
            if call == "cuStreamEndCapture":  # it is still to be ended
                with pytest.raises(CudaError, match="ILLEGAL_STATE"):
                    captured(each)
                each.up = gpu.stream()
            gc.collect()  # what the tracebacks keep
            assert driver.live() == before, call
        assert each.works()


@with_packages(*BOTH)
def test_the_context_is_current_for_its_block_only_whatever_happens_there(driver: Driver) -> None:
    gpu, other = open_gpu(), open_gpu(1)
    with pytest.raises(KeyError), gpu.current():
        raise KeyError
    with gpu.current(), other.current(), gpu.current():
        pass
    with pytest.raises(CudaError, match="CUDA_ERROR_INVALID_CONTEXT"):
        gpu.allocate(BYTES)
    with gpu.current():
        with other.current():
            there = other.allocate(BYTES)
            assert other.memory_free() < other.info.memory_bytes
        assert gpu.memory_free() == gpu.info.memory_bytes
    del there
    assert driver.live() == {}


# -- several GPUs, several threads -----------------------------------------------------


@with_packages(*BOTH)
def test_two_gpus_work_side_by_side_on_shared_page_locked_memory(driver: Driver) -> None:
    with rig(0) as first, rig(1) as second:  # the second is current
        first.source = second.source
        first.target = second.target
        with first.gpu.current():
            first.round_trip()
            first.gpu.synchronize(first.downloaded)
        assert (second.target == second.source).all()
        assert second.works()
        with pytest.raises(CudaError, match="CUDA_ERROR_INVALID_VALUE"):
            second.gpu.upload(first.buffer, second.source, second.up)


@with_packages(*BOTH)
def test_one_thread_submits_while_another_collects(driver: Driver) -> None:
    gpu, rounds = open_gpu(), 50
    with gpu.current():
        lanes = [Rig(gpu) for _ in range(3)]
    idle, under_way = threading.Semaphore(len(lanes)), threading.Semaphore(0)

    def submit() -> None:
        for number in range(rounds):
            assert idle.acquire(timeout=20)
            each = lanes[number % len(lanes)]
            each.source[:] = number
            with gpu.current():
                each.round_trip()
            under_way.release()

    submitting = threading.Thread(target=submit)
    submitting.start()
    for number in range(rounds):
        assert under_way.acquire(timeout=20)
        each = lanes[number % len(lanes)]
        with gpu.current():
            gpu.synchronize(each.downloaded)
        assert (each.target == number).all()
        idle.release()
    submitting.join(20)
    assert not submitting.is_alive()


@with_packages(*BOTH)
def test_a_thread_that_did_not_open_the_gpu_uses_it_and_gives_everything_back(driver: Driver) -> None:
    gpu = open_gpu()

    def elsewhere() -> None:
        with gpu.current():
            each = Rig(gpu)
            assert each.works()
        assert sum(driver.live().values()) == 7
        del each

    in_a_thread(elsewhere)
    assert driver.live() == {}
    in_a_thread(lambda: _left_over.append(open_gpu()))
    with _left_over[0].current():
        each = Rig(_left_over[0])
    del each
    assert driver.live() == {}


# -- giving back -----------------------------------------------------------------------


@with_packages(*BOTH)
def test_everything_is_given_back_with_the_last_reference(driver: Driver) -> None:
    with rig() as each:
        assert each.works()
        with each.gpu.capture(each.up) as kept:
            each.gpu.upload(each.buffer, each.source, each.up)
        each.round_trip()
        assert driver.live() == {"stream": 2, "event": 2, "device": 1, "host": 2, "exec": 1}
    target, expected = each.target, each.source.copy()
    kept.clear()
    del each
    assert driver.live() == {"host": 1}
    assert (target == expected).all(), "what was under way is finished first"
    del target
    gc.collect()
    assert driver.live() == {}


@with_packages(*BOTH)
def test_a_buffer_that_was_freed_is_gone_at_once(driver: Driver) -> None:
    with rig() as each:
        each.gpu.free(each.buffer)
        assert "device" not in driver.live()
        each.gpu.free(each.buffer)  # harmless
        with pytest.raises(ValueError, match="after it was given back"):
            each.gpu.upload(each.buffer, each.source, each.up)


@with_packages(("cuda-bindings",))
def test_a_free_that_fails_says_so(driver: Driver) -> None:
    with rig() as each:
        driver.fail("cuMemFree", 700)
        with fails("cuMemFree", "ILLEGAL_ADDRESS"):
            each.gpu.free(each.buffer)


@with_packages(*BOTH)
def test_what_is_left_at_the_end_of_the_process_is_no_trouble(driver: Driver) -> None:
    with rig() as each, each.gpu.capture(each.up) as kept:
        each.gpu.upload(each.buffer, each.source, each.up)
    _left_over.extend([each, kept, each.source[10:20]])
