"""The pretended GPU notices what it is there to notice."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from emstream.errors import CudaError, EngineError
from emstream.inference.plan import Profile
from tests.doubles.gpu import PretendGpu, PretendProgram, Race

PROFILE = Profile(height=2, width=3, type="uint16", max_batch=2)
NBYTES = 2 * 2 * 3


def doubled(frames: np.ndarray) -> np.ndarray:
    return 2 * frames


def pinned(gpu: PretendGpu, values: Any, kind: str) -> np.ndarray:
    values = np.asarray(values, kind)
    array = gpu.pin(values.nbytes).view(kind).reshape(values.shape)
    array[:] = values
    return array


def test_a_batch_goes_through_when_its_event_is_waited_for_and_not_before() -> None:
    gpu = PretendGpu()
    counts = pinned(gpu, [[[0, 1, 2], [256, 65535, 5]]], "uint16")
    expected = pinned(gpu, np.full((1, 2, 3), -1), "float32")
    with gpu.current():
        device, result, working = gpu.allocate(NBYTES), gpu.allocate(24), gpu.allocate(1000)
        stream, event = gpu.stream(), gpu.event()
        context = PretendProgram(gpu, PROFILE, doubled).context(
            1, gpu.address(device), gpu.address(result), gpu.address(working)
        )
        gpu.upload(device, counts, stream)
        context.execute(gpu.handle(stream))
        gpu.download(expected, result, stream)
        gpu.record(event, stream)
        assert not gpu.done
        assert (expected == -1).all()
        gpu.synchronize(event)
    np.testing.assert_array_equal(expected, 2 * counts.astype(np.float32))
    assert gpu.waiting == 0


def test_only_what_an_event_depends_on_is_done() -> None:
    gpu = PretendGpu()
    array = gpu.pin(8)
    with gpu.current():
        a, b = gpu.stream(), gpu.stream()
        uploaded, later, other = gpu.event(), gpu.event(), gpu.event()
        first, second = gpu.allocate(8), gpu.allocate(8)
        gpu.upload(first, array, a)
        gpu.record(uploaded, a)
        gpu.wait(b, uploaded)
        gpu.download(array, first, b)
        gpu.record(other, b)
        gpu.upload(second, array, a)
        gpu.record(later, a)
        gpu.synchronize(other)
        assert gpu.done == {"upload": 1, "record": 2, "wait": 1, "download": 1}
        gpu.synchronize(later)
        assert gpu.done["upload"] == 2


def test_a_wait_is_for_the_event_as_it_was_recorded_then() -> None:
    gpu = PretendGpu()
    array = gpu.pin(8)
    with gpu.current():
        a, b, event, end = gpu.stream(), gpu.stream(), gpu.event(), gpu.event()
        buffers = [gpu.allocate(8) for _ in range(2)]
        for buffer in buffers:
            gpu.upload(buffer, array, a)
            gpu.record(event, a)
            if buffer is buffers[0]:
                gpu.wait(b, event)
        gpu.record(end, b)
        gpu.synchronize(end)
        assert gpu.done["upload"] == 1


def test_an_array_changed_too_early_is_uploaded_as_it_is_then() -> None:
    gpu = PretendGpu()
    array, back = gpu.pin(4), gpu.pin(4)
    with gpu.current():
        buffer, stream, event = gpu.allocate(4), gpu.stream(), gpu.event()
        gpu.upload(buffer, array, stream)
        gpu.download(back, buffer, stream)
        gpu.record(event, stream)
        array[:] = 9
        gpu.synchronize(event)
    assert (back == 9).all()


def test_an_array_that_is_gone_before_its_upload_is_noticed() -> None:
    gpu = PretendGpu()
    array = gpu.pin(4)
    with gpu.current():
        buffer, stream, event = gpu.allocate(4), gpu.stream(), gpu.event()
        gpu.upload(buffer, array[:2], stream)
        gpu.record(event, stream)
        del array
        with pytest.raises(Race, match="freed"):
            gpu.synchronize(event)


@pytest.mark.parametrize("ordered", [True, False])
def test_networks_that_share_working_memory_must_be_in_order(ordered: bool) -> None:
    gpu = PretendGpu()
    with gpu.current():
        streams, event, working = [gpu.stream() for _ in range(2)], gpu.event(), gpu.allocate(1000)
        contexts = [
            PretendProgram(gpu, PROFILE, doubled).context(
                1, gpu.address(gpu_counts), gpu.address(gpu_expected), gpu.address(working)
            )
            for gpu_counts, gpu_expected in [(gpu.allocate(12), gpu.allocate(24)) for _ in range(2)]
        ]
        contexts[0].execute(gpu.handle(streams[0]))
        if ordered:
            gpu.record(event, streams[0])
            gpu.wait(streams[1], event)
            contexts[1].execute(gpu.handle(streams[1]))
        else:
            with pytest.raises(Race, match="execute could overlap"):
                contexts[1].execute(gpu.handle(streams[1]))


def test_overwriting_what_another_stream_still_reads_is_noticed() -> None:
    gpu = PretendGpu()
    array = gpu.pin(8)
    with gpu.current():
        buffer, a, b, event = gpu.allocate(8), gpu.stream(), gpu.stream(), gpu.event()
        gpu.download(array, buffer, a)
        with pytest.raises(Race):
            gpu.upload(buffer, array, b)
        gpu.record(event, a)
        gpu.synchronize(event)
        gpu.upload(buffer, array, b)


def test_a_graph_does_again_what_was_captured_with_what_is_there_then() -> None:
    gpu = PretendGpu()
    array, back = gpu.pin(4), gpu.pin(4)
    with gpu.current():
        buffer, stream, event = gpu.allocate(4), gpu.stream(), gpu.event()
        with gpu.capture(stream) as kept:
            gpu.upload(buffer, array, stream)
        assert gpu.waiting == 0
        for value in (3, 4):
            array[:] = value
            gpu.launch(kept[0], stream)
            gpu.download(back, buffer, stream)
            gpu.record(event, stream)
            gpu.synchronize(event)
            assert (back == value).all()
        gpu.free(buffer)
        with pytest.raises(CudaError, match="freed"):
            gpu.launch(kept[0], stream)


@pytest.mark.parametrize(
    "call",
    [
        lambda gpu: gpu.allocate(1),
        lambda gpu: gpu.stream(),
        lambda gpu: gpu.event(),
        lambda gpu: gpu.free(None),
        lambda gpu: gpu.record(None, None),
        lambda gpu: gpu.wait(None, None),
        lambda gpu: gpu.launch(None, None),
        lambda gpu: gpu.upload(None, gpu.pin(1), None),
        lambda gpu: gpu.download(gpu.pin(1), None, None),
        lambda gpu: gpu.capture(None).__enter__(),
        lambda gpu: PretendProgram(gpu, PROFILE, doubled).context(1, 0, 0, 0),
    ],
)
def test_a_call_without_a_current_context_is_refused(call: Callable[[PretendGpu], Any]) -> None:
    gpu = PretendGpu()
    with pytest.raises(CudaError, match="not current"):
        call(gpu)


def test_a_context_is_current_in_its_own_thread_only() -> None:
    gpu = PretendGpu()
    raised: list[Exception] = []

    def allocate() -> None:
        try:
            gpu.allocate(1)
        except CudaError as error:
            raised.append(error)

    with gpu.current():
        thread = threading.Thread(target=allocate)
        thread.start()
        thread.join(timeout=20)
    assert raised


MISUSES: dict[str, Callable[[PretendGpu, PretendGpu], Any]] = {
    "not device memory of this GPU": lambda gpu, other: gpu.free(other.allocate(1)),
    "not a stream of this GPU": lambda gpu, other: gpu.record(gpu.event(), other.stream()),
    "not an event of this GPU": lambda gpu, other: gpu.wait(gpu.stream(), other.event()),
    "not a graph of this GPU": lambda gpu, other: gpu.launch(None, gpu.stream()),
    "2 bytes in an allocation of 1": lambda gpu, other: gpu.upload(gpu.allocate(1), gpu.pin(2), gpu.stream()),
    "3 bytes in an allocation of 1": lambda gpu, other: gpu.download(
        gpu.pin(3), gpu.allocate(1), gpu.stream()
    ),
    "not page-locked": lambda gpu, other: gpu.upload(gpu.allocate(2), np.zeros(2), gpu.stream()),
    "gaps": lambda gpu, other: gpu.upload(gpu.allocate(4), gpu.pin(8)[::2], gpu.stream()),
    "out of memory": lambda gpu, other: gpu.allocate(1 << 40),
    "never recorded": lambda gpu, other: gpu.synchronize(gpu.event()),
    "is no stream": lambda gpu, other: gpu.stream_of(other.handle(other.stream())),
    "no device memory starts": lambda gpu, other: PretendProgram(gpu, PROFILE, doubled).context(1, 1, 2, 3),
}


@pytest.mark.parametrize("text", MISUSES)
def test_misuse_is_refused(text: str) -> None:
    gpu, other = PretendGpu(0), PretendGpu(1)
    with gpu.current(), other.current(), pytest.raises(CudaError, match=text):
        MISUSES[text](gpu, other)


def test_freed_memory_is_not_used_again() -> None:
    gpu = PretendGpu()
    array = gpu.pin(4)
    with gpu.current():
        buffer, stream, event = gpu.allocate(4), gpu.stream(), gpu.event()
        gpu.upload(buffer, array, stream)
        with pytest.raises(CudaError, match="under way"):
            gpu.free(buffer)
        gpu.record(event, stream)
        gpu.synchronize(event)
        gpu.free(buffer)
        assert gpu.live_bytes == 0
        for use in (gpu.free, gpu.address, lambda each: gpu.upload(each, array, stream)):
            with pytest.raises(CudaError, match="freed"):
                use(buffer)


def test_nothing_else_is_done_while_a_thread_captures() -> None:
    gpu = PretendGpu()
    with gpu.current():
        stream, event = gpu.stream(), gpu.event()
        gpu.record(event, stream)
        with gpu.capture(stream):
            for call in (
                lambda: gpu.allocate(1),
                lambda: gpu.pin(1),
                lambda: gpu.synchronize(event),
                lambda: gpu.record(event, stream),
            ):
                with pytest.raises(CudaError, match="captur"):
                    call()


def test_a_context_is_captured_from_its_second_run_on() -> None:
    gpu = PretendGpu()
    with gpu.current():
        counts, expected, working = (gpu.allocate(n) for n in (NBYTES, 24, 1000))
        stream = gpu.stream()
        program = PretendProgram(gpu, PROFILE, doubled)
        context = program.context(1, *map(gpu.address, (counts, expected, working)))
        with pytest.raises(EngineError, match="first run"), gpu.capture(stream):
            context.execute(gpu.handle(stream))
        context.execute(gpu.handle(stream))
        with gpu.capture(stream) as kept:
            context.execute(gpu.handle(stream))
        assert len(kept) == 1


def test_what_is_told_to_fail_fails_as_often_as_told() -> None:
    gpu = PretendGpu()
    with gpu.current():
        gpu.fail("event", after=1, times=2)
        gpu.event()
        for _ in range(2):
            with pytest.raises(CudaError, match="event: told to fail"):
                gpu.event()
        gpu.event()
        gpu.fail("event")
        for _ in range(5):
            with pytest.raises(CudaError):
                gpu.event()
        gpu.heal()
        gpu.event()


def test_what_nothing_refers_to_is_given_back() -> None:
    gpu = PretendGpu()
    with gpu.current():
        kept = [gpu.allocate(10), gpu.stream(), gpu.event()]
        with gpu.capture(kept[1]) as graphs:
            pass
    array = gpu.pin(7)[:3]
    assert gpu.alive == {"bytes": 10, "streams": 1, "events": 1, "graphs": 1}
    assert gpu.pinned_bytes == 7
    del kept, graphs, array
    assert not any(gpu.alive.values())
    assert gpu.pinned_bytes == 0
