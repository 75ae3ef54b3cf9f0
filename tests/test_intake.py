from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from emstream import intake
from emstream.corrections import Corrections
from emstream.frame import FrameHeader
from emstream.intake import Intake, Overrun
from emstream.ledger import Ledger
from emstream.ring import Ring, Slot
from tests.conftest import exact, header

SHAPE = (8, 8)


class Desk:
    def __init__(self, slots: int = 2, max_batch: int = 1, **options: Any) -> None:
        self.ring, self.ledger = Ring(slots, max_batch), Ledger()
        self.intake = Intake(self.ring, self.ledger, **options)

    def give(self, head: FrameHeader, pixels: np.ndarray | int = 1) -> bool:
        row = self.intake.offer(head)
        if row is None:
            return False
        row[:] = pixels
        self.intake.accept()
        return True

    def take(self) -> Slot:
        item = self.ring.claim(block=False)
        assert isinstance(item, Slot)
        return item

    def numbers(self) -> list[int]:
        found = []
        while isinstance(item := self.ring.claim(block=False), Slot):
            found += [head.frame for head in item.headers]
        return found


def test_full_ring_drops_the_oldest_frame() -> None:
    desk = Desk(overrun=Overrun.drop_oldest)
    assert all(desk.give(header(n, SHAPE)) for n in range(5))
    assert desk.ledger.snapshot()["dropped"] == 3
    assert desk.numbers() == [3, 4]


def test_full_ring_drops_the_newest_frame() -> None:
    desk = Desk(overrun=Overrun.drop_newest)
    assert [desk.give(header(n, SHAPE)) for n in range(5)] == [True, True, False, False, False]
    assert desk.ledger.snapshot()["dropped"] == 3
    assert desk.numbers() == [0, 1]


def test_full_ring_makes_a_blocking_source_wait() -> None:
    desk = Desk(overrun=Overrun.block)
    desk.give(header(0, SHAPE))
    desk.give(header(1, SHAPE))
    third = threading.Thread(target=desk.give, args=(header(2, SHAPE),))
    third.start()
    desk.ring.release(desk.take())
    third.join(timeout=10)
    assert desk.numbers() == [1, 2]
    assert desk.ledger.snapshot()["dropped"] == 0


def test_abort_ends_the_wait() -> None:
    desk = Desk(overrun=Overrun.block)
    desk.give(header(0, SHAPE))
    desk.give(header(1, SHAPE))
    desk.intake.abort()
    assert not desk.give(header(2, SHAPE))
    assert desk.ledger.snapshot()["dropped"] == 1


def test_everything_in_flight_drops_the_newcomer_even_under_drop_oldest() -> None:
    desk = Desk(overrun=Overrun.drop_oldest)
    for n in range(2):
        desk.give(header(n, SHAPE))
        desk.take()
    assert not desk.give(header(2, SHAPE))
    assert exact(desk.ledger.snapshot())


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_frame_with_a_pixel_that_is_no_number_is_rejected(bad: float) -> None:
    desk = Desk()
    pixels = np.ones(SHAPE, np.float32)
    pixels[3, 4] = bad
    desk.give(header(0, SHAPE, "float32"), pixels)
    assert desk.ledger.snapshot()["rejected"] == 1
    assert "not numbers" in next(iter(desk.ledger.reasons()))
    assert desk.give(header(1, SHAPE, "float32"))
    assert desk.numbers() == [1]


def test_infinities_of_both_signs_are_rejected_quietly() -> None:
    desk = Desk()
    pixels = np.ones(SHAPE, np.float32)
    pixels[0, 0], pixels[1, 1] = np.inf, -np.inf
    desk.give(header(0, SHAPE, "float32"), pixels)
    assert desk.ledger.snapshot()["rejected"] == 1


def test_huge_but_finite_pixels_are_taken() -> None:
    desk = Desk()
    desk.give(header(0, SHAPE, "float32"), np.full(SHAPE, 3e38, np.float32))
    assert desk.numbers() == [0]


def test_big_endian_pixels_are_turned_round() -> None:
    desk = Desk()
    pixels = np.arange(64, dtype=np.uint16).reshape(SHAPE)
    row = desk.intake.offer(header(0, SHAPE, "uint16", endianness="big"))
    assert row is not None
    row[:] = pixels.byteswap()
    desk.intake.accept()
    slot = desk.take()
    assert (slot.counts[0] == pixels).all()
    assert slot.headers[0].endianness == "little"


def test_gain_and_offset_turn_adu_into_electrons() -> None:
    desk = Desk(corrections=Corrections(gain=32.2, offset=100.0))
    electrons = np.arange(64).reshape(SHAPE)
    desk.give(header(0, SHAPE, "uint16", units="ADU"), np.round(electrons * 32.2 + 100))
    slot = desk.take()
    assert slot.counts.dtype == np.float32
    assert np.abs(slot.counts[0] - electrons).max() < 0.02
    assert (slot.headers[0].type, slot.headers[0].units) == ("float32", "electrons")


def test_big_endian_adu_are_turned_round_before_the_gain() -> None:
    desk = Desk(corrections=Corrections(gain=2.0))
    row = desk.intake.offer(header(0, SHAPE, "uint16", endianness="big"))
    assert row is not None
    row[:] = np.full(SHAPE, 8, np.uint16).byteswap()
    desk.intake.accept()
    assert (desk.take().counts[0] == 4).all()


def test_refused_frame_is_rejected_and_leaves_its_row_free() -> None:
    desk = Desk()
    desk.intake.offer(header(0, SHAPE))
    desk.intake.refuse("payload too short")
    desk.intake.malformed("garbage")
    desk.give(header(1, SHAPE))
    ledger = desk.ledger.snapshot()
    assert (ledger["received"], ledger["rejected"]) == (3, 2)
    assert desk.numbers() == [1]


def test_frame_that_no_memory_can_hold_is_rejected() -> None:
    def allocate(nbytes: int) -> np.ndarray:
        raise MemoryError

    ledger = Ledger()
    intake = Intake(Ring(2, 1, allocate=allocate), ledger)
    assert intake.offer(header(0, SHAPE)) is None
    assert ledger.snapshot()["rejected"] == 1


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_frame_bytes": 0}, "got 0 bytes"),
    ],
)
def test_impossible_settings_are_refused(options: dict[str, float], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Desk(**options)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"shape": (0, 8)}, "shape must be [rows, columns] of one frame, got 0x8"),
        ({"shape": (-3, 8)}, "shape must be [rows, columns] of one frame, got -3x8"),
        ({"shape": (60_000, 60_000)}, "frame of 60000x60000 uint8 is 3600000000 bytes, more than the limit"),
        ({"kind": "uint64"}, "type must be one of uint8, uint16"),
    ],
)
def test_frame_that_cannot_be_is_rejected_whatever_its_source_looked_at(
    change: dict[str, Any], reason: str
) -> None:
    desk = Desk()
    assert not desk.give(header(0, **({"shape": SHAPE} | change)))
    assert desk.ledger.snapshot()["rejected"] == 1
    assert next(iter(desk.ledger.reasons())).startswith(reason)
    assert desk.give(header(1, SHAPE))


def test_frames_beyond_the_rate_allowed_are_rejected_with_the_limit_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 5 * 10**18
    monkeypatch.setattr(intake, "now_ns", lambda: now)
    desk = Desk(slots=300, overrun=Overrun.drop_oldest, max_rate=100.0)
    assert [desk.give(header(n, SHAPE)) for n in range(101)] == [True] * 100 + [False]  # a second's worth
    assert desk.ledger.reasons() == {"more than 100 frames/s, the limit of --max-rate": 1}
    taken = 0
    for n in range(101, 1101):  # five times the rate allowed, for two seconds
        now += 2_000_000
        taken += desk.give(header(n, SHAPE))
    assert taken == 200
    ledger = desk.ledger.snapshot()
    assert ledger["rejected"] == 1 + 800
    assert ledger["missing"] == 0
    assert exact(ledger)
    now += 10**10  # nothing is saved up beyond a second's worth
    assert sum(desk.give(header(n, SHAPE)) for n in range(1101, 1300)) == 100


def test_rate_below_one_a_second_is_kept_too(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 5 * 10**18
    monkeypatch.setattr(intake, "now_ns", lambda: now)
    desk = Desk(slots=300, max_rate=0.5)
    taken = 0
    for n in range(100):
        now += 200_000_000
        taken += desk.give(header(n, SHAPE))
    assert taken == 10
