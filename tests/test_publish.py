from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import zmq

import emstream
from emstream.errors import OutputError, SourceError
from emstream.frame import now_ns
from emstream.ledger import Ledger
from emstream.publish import Publisher
from emstream.ring import Maker, Ring, Slot
from tests.conftest import header

MAKER = Maker({"name": "test", "sha256": "0" * 64, "device": "none"}, None)


def batch(count: int, shape: tuple[int, int] = (64, 64)) -> Slot:
    ring = Ring(2, count)
    for n in range(count):
        row = ring.reserve(shape, np.dtype(np.uint8))
        assert row is not None
        row.fill(n)
        ring.commit(header(n, shape), now_ns())
    slot = ring.claim()
    assert isinstance(slot, Slot)
    slot.result, slot.maker = slot.expected, MAKER
    slot.result[:] = slot.counts
    return slot


def test_port_in_use_is_explained(context: Any) -> None:
    first = Publisher("tcp://127.0.0.1:*", Ledger(), context=context)
    with pytest.raises(OutputError, match=r"the address is in use.*--output takes"):
        Publisher(first.endpoint, Ledger(), context=context)
    first.close(linger_s=0)


@pytest.mark.parametrize("endpoint", ["nonsense", "tcp://nowhere.invalid:1", "tcp://127.0.0.1:99999"])
def test_endpoint_that_makes_no_sense_is_explained(context: Any, endpoint: str) -> None:
    with pytest.raises(OutputError, match="--output takes"):
        Publisher(endpoint, Ledger(), context=context)


def test_subscriber_that_never_reads_holds_nobody_up(context: Any, tmp_path: Any) -> None:
    ledger = Ledger()
    publisher = Publisher(f"ipc://{tmp_path}/out", ledger, queue=4, context=context)
    lazy = context.socket(zmq.SUB)
    lazy.linger = 0
    lazy.rcvhwm = 1
    lazy.connect(publisher.endpoint)
    lazy.subscribe(b"")
    while not publisher._wants(b"raw"):
        pass
    slot = batch(4, (512, 512))
    for _ in range(100):
        publisher.publish(slot)
    assert ledger.published == 400
    publisher.close(linger_s=0)
    lazy.close()


def test_one_subscriber_can_be_waited_for_among_others_who_want_everything(
    context: Any, tmp_path: Any
) -> None:
    publisher = Publisher(f"ipc://{tmp_path}/out", Ledger(), context=context)
    other, awaited = context.socket(zmq.SUB), context.socket(zmq.SUB)
    other.connect(publisher.endpoint)
    other.subscribe(b"")
    while not publisher._wants(b"hello"):
        pass
    assert not publisher.wait_for(b"hello", timeout_s=0.05)
    awaited.connect(publisher.endpoint)
    awaited.subscribe(b"hello")
    assert publisher.wait_for(b"hello", timeout_s=20)
    publisher.close(linger_s=0)
    other.close(linger=0)
    awaited.close(linger=0)


def test_published_frame_does_not_change_when_its_slot_is_filled_again(context: Any, tmp_path: Any) -> None:
    publisher = Publisher(f"ipc://{tmp_path}/out", Ledger(), context=context)
    frames = emstream.subscribe(publisher.endpoint, timeout_s=20)
    received: list[Any] = []
    thread = threading.Thread(target=lambda: received.append(next(frames)))
    thread.start()
    while not publisher._wants(b"denoised"):
        pass
    slot = batch(1)
    slot.expected[:] = 5
    publisher.publish(slot)
    slot.expected[:] = 9
    thread.join(timeout=20)
    frames.close()
    publisher.close(linger_s=0)
    assert (received[0].data == 5).all()


def test_silence_is_explained_to_a_subscriber(tmp_path: Any) -> None:
    with pytest.raises(
        SourceError, match=r"no frame from ipc://.* within 0\.05 s; is emstream serve running"
    ):
        next(emstream.subscribe(f"ipc://{tmp_path}/nobody", timeout_s=0.05))


def test_subscriber_stops_at_the_end_of_the_series(rig: Any) -> None:
    run = rig({"input": "sim://?rate=200&height=16&width=16&frames=5"})
    numbers: list[int] = []

    def listen() -> None:
        for frame in emstream.subscribe(run.service.publisher.endpoint, until_end=True, timeout_s=20):
            numbers.append(frame.number)

    thread = threading.Thread(target=listen)
    thread.start()
    while not run.service.publisher._wants(b"denoised"):
        pass
    run.start()
    run.join()
    run.service.close()
    thread.join(timeout=20)
    assert not thread.is_alive()
    assert numbers == sorted(numbers)
    assert numbers[-1] == 4
