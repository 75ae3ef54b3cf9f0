from __future__ import annotations

import threading
from collections import deque
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from emstream.frame import now_ns
from emstream.ring import Ring, SeriesMark, Slot, State
from tests.conftest import header

U8 = np.dtype(np.uint8)
SHAPE = (4, 6)


def put(ring: Ring, number: int, shape: tuple[int, int] = SHAPE, dtype: Any = U8) -> bool:
    row = ring.reserve(shape, np.dtype(dtype))
    if row is None:
        return False
    row.fill(number % 251)
    ring.commit(header(number, shape, np.dtype(dtype).name), now_ns())
    return True


def claimed(ring: Ring) -> Slot:
    item = ring.claim(block=False)
    assert isinstance(item, Slot)
    return item


def test_frames_come_out_in_order_with_their_pixels() -> None:
    ring = Ring(slots=3, max_batch=2)
    assert all(put(ring, n) for n in range(5))
    numbers = []
    for _ in range(3):
        slot = claimed(ring)
        assert slot.state is State.IN_FLIGHT
        for head, pixels in zip(slot.headers, slot.counts, strict=True):
            assert (pixels == head.frame).all()
            numbers.append(head.frame)
        ring.release(slot)
    assert numbers == [0, 1, 2, 3, 4]


def test_full_ring_offers_no_row() -> None:
    ring = Ring(slots=2, max_batch=1)
    assert put(ring, 0)
    assert put(ring, 1)
    assert ring.reserve(SHAPE, U8) is None


def test_evicting_frees_the_oldest_batch_that_waits() -> None:
    ring = Ring(slots=2, max_batch=2)
    for n in range(4):
        put(ring, n)
    assert ring.evict() == 2
    assert put(ring, 4)
    assert [head.frame for head in claimed(ring).headers] == [2, 3]


def test_batch_in_flight_is_never_evicted() -> None:
    ring = Ring(slots=2, max_batch=1)
    put(ring, 0)
    put(ring, 1)
    claimed(ring)
    claimed(ring)
    assert ring.evict() == 0
    assert ring.reserve(SHAPE, U8) is None


def test_partial_batch_waits_for_company_until_its_deadline() -> None:
    ring = Ring(slots=2, max_batch=4, max_wait_ns=10**12)
    put(ring, 0)
    assert ring.claim(block=False) is None
    prompt = Ring(slots=2, max_batch=4, max_wait_ns=1)
    put(prompt, 0)
    assert len(claimed(prompt)) == 1


def test_full_batch_does_not_wait_for_its_deadline() -> None:
    ring = Ring(slots=2, max_batch=2, max_wait_ns=10**12)
    put(ring, 0)
    put(ring, 1)
    assert len(claimed(ring)) == 2


def test_blocked_consumer_wakes_at_the_deadline() -> None:
    ring = Ring(slots=2, max_batch=4, max_wait_ns=20_000_000)
    put(ring, 0)
    slot = ring.claim()
    assert isinstance(slot, Slot)
    assert slot.batched_ns - slot.received_ns[0] >= 20_000_000


def test_frame_of_another_size_or_type_closes_the_batch() -> None:
    ring = Ring(slots=4, max_batch=4)
    put(ring, 0)
    put(ring, 1, (8, 8))
    put(ring, 2, (8, 8), np.uint16)
    shapes = [(len(slot), slot.shape, slot.dtype) for slot in (claimed(ring), claimed(ring), claimed(ring))]
    assert shapes == [(1, SHAPE, U8), (1, (8, 8), U8), (1, (8, 8), np.dtype(np.uint16))]


def test_memory_is_reused_and_grows_only_for_larger_frames() -> None:
    asked: list[int] = []

    def allocate(nbytes: int) -> np.ndarray:
        asked.append(nbytes)
        return np.zeros(nbytes, np.uint8)

    ring = Ring(slots=2, max_batch=1, allocate=allocate)
    for n in range(20):
        put(ring, n, SHAPE if n % 3 else (2, 3))
        ring.release(claimed(ring))
    assert len(asked) == 2 * 2  # input and output of the slot used again and again, small and then larger


def test_huge_frames_make_smaller_batches() -> None:
    asked: list[int] = []

    def allocate(nbytes: int) -> np.ndarray:
        asked.append(nbytes)
        return np.empty(nbytes, np.uint8)

    ring = Ring(slots=2, max_batch=64, allocate=allocate)
    assert ring.reserve((4096, 4096), np.dtype(np.uint16)) is not None
    assert sum(asked) <= 256 * 1024**2


def test_running_out_of_memory_loses_no_slot() -> None:
    def allocate(nbytes: int) -> np.ndarray:
        if nbytes > 1000:
            raise MemoryError
        return np.zeros(nbytes, np.uint8)

    ring = Ring(slots=2, max_batch=1, allocate=allocate)
    for _ in range(5):
        with pytest.raises(MemoryError):
            ring.reserve((100, 100), U8)
    assert put(ring, 0)
    assert put(ring, 1)


def test_mark_keeps_its_place_among_the_frames() -> None:
    ring = Ring(slots=4, max_batch=4)
    put(ring, 0)
    ring.mark(SeriesMark({"htype": "end"}))
    put(ring, 1)
    assert claimed(ring).headers[0].frame == 0
    assert isinstance(ring.claim(block=False), SeriesMark)
    assert claimed(ring).headers[0].frame == 1


def test_marks_without_frames_do_not_pile_up() -> None:
    ring = Ring(slots=2, max_batch=1)
    put(ring, 0)
    for n in range(1000):
        ring.mark(SeriesMark({"n": n}))
    ring.close()
    items = list(iter(ring.claim, None))
    assert len(items) <= 102
    assert isinstance(items[0], Slot)
    assert isinstance(items[-1], SeriesMark)
    assert items[-1].message == {"n": 999}


def test_consumer_waits_while_a_row_is_being_written() -> None:
    ring = Ring(slots=2, max_batch=2)
    put(ring, 0)
    row = ring.reserve(SHAPE, U8)
    assert row is not None
    assert ring.claim(block=False) is None
    row.fill(1)
    ring.commit(header(1, SHAPE), now_ns())
    assert len(claimed(ring)) == 2


def test_closed_ring_hands_out_what_is_left_and_then_none() -> None:
    ring = Ring(slots=2, max_batch=4, max_wait_ns=10**12)
    put(ring, 0)
    ring.close()
    assert isinstance(ring.claim(), Slot)
    assert ring.claim() is None


def test_producer_waiting_for_a_slot_is_woken_by_release() -> None:
    ring = Ring(slots=2, max_batch=1)
    put(ring, 0)
    put(ring, 1)
    slot = claimed(ring)
    waiter = threading.Thread(target=ring.wait_free, args=(30.0,))
    waiter.start()
    ring.release(slot)
    waiter.join(timeout=10)
    assert not waiter.is_alive()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"slots": 1, "max_batch": 1}, "at least 2 slots, got 1"),
        ({"slots": 2, "max_batch": 0}, "at least 1 frame, got 0"),
        ({"slots": 2, "max_batch": 1, "max_wait_ns": -1_000_000}, "got -1.0 ms"),
    ],
)
def test_impossible_rings_are_refused(arguments: dict[str, int], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Ring(**arguments)


class RingMachine(RuleBasedStateMachine):
    """Any order of calls: nothing is lost, nothing comes twice, order holds, pixels stay."""

    def __init__(self) -> None:
        super().__init__()
        self.ring = Ring(slots=3, max_batch=2)
        self.waiting: deque[int] = deque()
        self.held: list[Slot] = []
        self.next = 0

    @rule(shape=st.sampled_from([(4, 6), (2, 2)]))
    def offer(self, shape: tuple[int, int]) -> None:
        if put(self.ring, self.next, shape):
            self.waiting.append(self.next)
            self.next += 1
        else:
            assert len(self.held) + len(self.waiting) / 2 >= 1.5

    @rule()
    def reserve_and_cancel(self) -> None:
        if self.ring.reserve(SHAPE, U8) is not None:
            self.ring.cancel()

    @rule()
    def evict(self) -> None:
        for _ in range(self.ring.evict()):
            self.waiting.popleft()

    @rule()
    def claim(self) -> None:
        slot = self.ring.claim(block=False)
        if slot is None:
            assert not self.waiting
            return
        assert isinstance(slot, Slot)
        for head in slot.headers:
            assert head.frame == self.waiting.popleft()
        self.held.append(slot)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: Any) -> None:
        index = data.draw(st.integers(0, len(self.held) - 1))
        self.ring.release(self.held.pop(index))

    @invariant()
    def what_waits_is_counted(self) -> None:
        assert self.ring.frames == len(self.waiting)

    @invariant()
    def a_slot_being_read_keeps_its_pixels(self) -> None:
        for slot in self.held:
            assert slot.state is State.IN_FLIGHT
            for head, pixels in zip(slot.headers, slot.counts, strict=True):
                assert (pixels == head.frame % 251).all()


TestRingMachine = RingMachine.TestCase
