"""An engine that fails is tried again, loaded again, replaced; one that runs can be exchanged."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from emstream.errors import BatchRefused, EngineError
from emstream.inference import IdentityEngine
from emstream.inference.shared import SharedEngine
from emstream.inference.supervised import RELOAD_AFTER, SupervisedEngine


class Plus(IdentityEngine):
    """Adds `amount` to every pixel, in the order of submission alone; fails when `fails` says so."""

    depth = 3

    def __init__(
        self, amount: int = 0, fails: Callable[[np.ndarray], Exception | None] = lambda c: None
    ) -> None:
        self.name = f"plus{amount}"
        self.amount, self.fails = amount, fails
        self.flying: list[np.ndarray] = []
        self.tried = 0
        self.closed = False

    def submit(self, counts: np.ndarray, expected: np.ndarray) -> Any:
        assert not self.closed
        self.tried += 1
        if error := self.fails(counts):
            raise error
        expected[:] = counts + self.amount
        self.flying.append(expected)
        return expected

    def collect(self, ticket: Any) -> np.ndarray:
        assert not self.closed
        assert self.flying.pop(0) is ticket, "collected out of order"
        return np.asarray(ticket)

    def close(self) -> None:
        assert not self.flying
        self.closed = True


class Late(Plus):
    """Fails in `collect`, as a GPU does."""

    def submit(self, counts: np.ndarray, expected: np.ndarray) -> Any:
        fails, self.fails = self.fails, lambda c: None
        try:
            return super().submit(counts, expected), fails(counts)
        finally:
            self.fails = fails

    def collect(self, ticket: Any) -> np.ndarray:
        done = super().collect(ticket[0])
        if ticket[1]:
            raise ticket[1]
        return done


def broken(counts: np.ndarray) -> Exception:
    return RuntimeError("broken")


def once(kind: type[Exception] = RuntimeError, pixel: int = 5) -> Callable[[np.ndarray], Exception | None]:
    """Fails on the first batch with this pixel, the first time."""
    left = [pixel]
    return lambda counts: kind("once") if left and counts[0, 0, 0] == pixel and left.pop() else None


def batch(value: int) -> tuple[np.ndarray, np.ndarray]:
    return np.full((1, 4, 4), value, np.uint8), np.zeros((1, 4, 4), np.float32)


def through(engine: SupervisedEngine, values: range, flying: int = 3) -> list[float | None]:
    """First pixels of the results, with up to `flying` batches under way; None where it failed."""
    tickets, results = [], []

    def collect() -> None:
        ticket = tickets.pop(0)
        try:
            results.append(float(engine.collect(ticket)[0, 0, 0]))
        except Exception:
            results.append(None)

    for value in values:
        if len(tickets) == flying:
            collect()
        tickets.append(engine.submit(*batch(value)))
    while tickets:
        collect()
    return results


@pytest.mark.parametrize("kind", [Plus, Late])
def test_batch_that_fails_once_is_done_at_the_second_attempt(kind: type[Plus]) -> None:
    engine = kind(100, once())
    assert through(SupervisedEngine(engine), range(12)) == [100 + n for n in range(12)]


@pytest.mark.parametrize("kind", [Plus, Late])
def test_batch_that_fails_twice_is_lost_and_no_other(kind: type[Plus]) -> None:
    engine = kind(0, lambda counts: RuntimeError("bad") if counts[0, 0, 0] % 4 == 1 else None)
    results = through(SupervisedEngine(engine), range(12))
    assert results == [None if n % 4 == 1 else n for n in range(12)]


@pytest.mark.parametrize("error", [ValueError, BatchRefused])
def test_batch_that_does_not_suit_the_engine_is_not_tried_again(error: type[Exception]) -> None:
    engine, loaded = Plus(0, lambda counts: error("too large")), []
    results = through(SupervisedEngine(engine, reload=lambda: loaded.append(1) or Plus()), range(10))
    assert results == [None] * 10
    assert engine.tried == 10
    assert not loaded


@pytest.mark.parametrize("kind", [Plus, Late])
def test_engine_that_goes_on_failing_is_loaded_again(kind: type[Plus]) -> None:
    first, second = kind(0, broken), kind(200)
    engine = SupervisedEngine(first, reload=lambda: second)
    results = through(engine, range(10), flying=2)
    assert results[: RELOAD_AFTER - 1] == [None] * (RELOAD_AFTER - 1)
    assert results[RELOAD_AFTER:] == [200 + n for n in range(RELOAD_AFTER, 10)]
    assert first.closed
    assert not second.closed
    assert engine.identity["name"] == "plus200"
    assert "fallback_for" not in engine.identity


def test_engine_is_not_loaded_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, times = [0], []
    monkeypatch.setattr("emstream.inference.supervised.now_ns", lambda: clock[0])

    def reload() -> Plus:
        times.append(clock[0] / 1e9)
        return Plus(0, broken)

    engine = SupervisedEngine(Plus(0, broken), reload=reload)
    for _ in range(200):
        clock[0] += 10**9
        through(engine, range(1))
    assert times == [3, 13, 33, 73, 153]


@pytest.mark.parametrize("reload", [None, lambda: Plus(0, broken), lambda: 1 / 0])
def test_fallback_takes_over_when_loading_again_does_not_help(reload: Any) -> None:
    first, fallback = Plus(0, broken), Plus(50)
    engine = SupervisedEngine(first, reload=reload, fallback=fallback)
    makers = []
    for n in range(6):
        ticket = engine.submit(*batch(n))
        try:
            assert engine.collect(ticket)[0, 0, 0] == 50 + n
        except RuntimeError:
            continue
        makers.append(engine.maker_of(ticket).identity)
    assert len(makers) == 6 - (RELOAD_AFTER - 1)
    assert all(maker["name"] == "plus50" and maker["fallback_for"] == "plus0" for maker in makers)


def test_frames_of_an_engine_that_was_swapped_out_name_it() -> None:
    first, second = Plus(100), Plus(200)
    engine = SupervisedEngine(first)
    before = [engine.submit(*batch(n)) for n in range(2)]
    engine.swap(second)
    after = engine.submit(*batch(2))
    assert [engine.collect(ticket)[0, 0, 0] for ticket in (*before, after)] == [100, 101, 202]
    assert [engine.maker_of(ticket).identity["name"] for ticket in (*before, after)] == [
        "plus100",
        "plus100",
        "plus200",
    ]


def test_swap_keeps_one_engine_to_go_back_to_and_closes_those_before() -> None:
    engines = [Plus(100 * n) for n in range(3)]
    engine = SupervisedEngine(engines[0])
    with pytest.raises(EngineError, match="no engine to go back to"):
        engine.swap_back()
    flying = engine.submit(*batch(1))
    engine.swap(engines[1])
    engine.swap(engines[2])
    assert not engines[0].closed  # a batch of its is under way
    assert engine.collect(flying)[0, 0, 0] == 1
    assert engines[0].closed
    assert engine.swap_back() is engines[1]
    assert through(engine, range(2)) == [100, 101]
    assert engine.swap_back() is engines[2]
    engine.close()
    assert all(each.closed for each in engines)


def test_swapping_while_batches_fly_loses_none_and_keeps_their_order() -> None:
    engine = SupervisedEngine(Plus(0))
    done = threading.Event()

    def swaps() -> None:
        for _ in range(200):
            engine.swap(Plus(0))
        done.set()

    thread = threading.Thread(target=swaps)
    thread.start()
    rounds = 0
    while not done.is_set() or rounds < 3:
        assert through(engine, range(100)) == list(range(100))
        rounds += 1
    thread.join()


def test_engine_that_was_swapped_in_is_loaded_again_as_itself() -> None:
    second, third = Plus(20, broken), Plus(30)
    engine = SupervisedEngine(Plus(10), reload=lambda: Plus(11))
    engine.swap(second, lambda: third)
    assert through(engine, range(RELOAD_AFTER + 1))[-1] == 30 + RELOAD_AFTER


def test_batch_that_another_attempt_refuses_says_nothing_against_the_engine() -> None:
    errors = itertools.cycle([RuntimeError("broken"), BatchRefused("too large")])
    engine, loaded = Plus(0, lambda counts: next(errors)), []
    engine.attempts = 3
    results = through(
        SupervisedEngine(engine, reload=lambda: loaded.append(1) or Plus()), range(10), flying=1
    )
    assert results == [None] * 10
    assert engine.tried == 20
    assert not loaded


def test_close_closes_all_even_when_one_cannot() -> None:
    class Stubborn(Plus):
        def close(self) -> None:
            super().close()
            raise RuntimeError("no")

    first, second, fallback = Stubborn(), Plus(), Plus()
    engine = SupervisedEngine(first, fallback=fallback)
    engine.swap(second)
    engine.close()
    assert first.closed
    assert second.closed
    assert fallback.closed


def test_batches_of_an_engine_that_dies_are_done_by_one_that_was_dead_before() -> None:
    parts = [Late(1), Late(1)]
    engine = SupervisedEngine(SharedEngine(parts))
    for dead, alive in (parts, parts[::-1], parts):
        dead.fails, alive.fails = broken, lambda counts: None
        tickets = [engine.submit(*batch(value)) for value in range(5)]
        assert [int(engine.collect(ticket)[0, 0, 0]) for ticket in tickets] == [1, 2, 3, 4, 5]


def test_dead_engine_gets_nothing_while_one_that_failed_once_does_well() -> None:
    dead, well = Late(1, broken), Late(1)
    shared = SharedEngine([dead, well])
    engine, tickets = SupervisedEngine(shared), []

    def run(batches: int) -> None:
        for n in range(batches):
            while len(tickets) >= shared.depth_for((4, 4)):
                engine.collect(tickets.pop(0))
            tickets.append(engine.submit(*batch(n)))
        while tickets:
            engine.collect(tickets.pop(0))

    run(10)
    well.fails = once(pixel=3)
    run(4)
    tried = dead.tried
    run(60)
    assert dead.tried == tried
    assert shared.depth_for((4, 4)) == well.depth


def test_batch_that_fails_once_is_done_by_the_only_engine_that_lives() -> None:
    parts = [Late(1, broken), Late(1)]
    engine = SupervisedEngine(SharedEngine(parts))
    engine.collect(engine.submit(*batch(0)))
    parts[1].fails = once(pixel=3)
    assert int(engine.collect(engine.submit(*batch(3)))[0, 0, 0]) == 4
