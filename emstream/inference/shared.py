"""Several engines, one per GPU or server, that share the batches and keep their order."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from emstream.errors import CudaError, EngineError, ServerFailed
from emstream.inference.engine import Engine

log = logging.getLogger(__name__)
_REST = (100, 1600)  # batches, doubling from one to the other


@dataclass
class _Ticket:
    place: int
    ticket: Any


class SharedEngine(Engine):
    """Gives each batch to the engine with the least to do.

    Tickets are collected in the order of their submission, so frames keep theirs. An engine
    that failed rests for the next batches: a broken one, always the first to be idle, would
    otherwise get nearly all of them. A server that fails again rests for longer: if it hangs,
    each trial costs as long as it is waited for.
    """

    def __init__(self, engines: Sequence[Engine]) -> None:
        if not engines:
            raise ValueError("engines to share batches among: at least 1, got none")
        if len({engine.sha256 for engine in engines}) > 1:
            raise ValueError("engines that share batches must hold the same network")
        first = engines[0]
        self._engines = list(engines)
        self._under_way = [0] * len(engines)
        self._resting = [0] * len(engines)  # batches yet to be given to others
        self._next_rest = [_REST[0]] * len(engines)
        self._failures = 0
        self._failed_at = [0] * len(
            engines
        )  # which of these it was that was last its own; 0: none since it did well
        self._last = len(engines) - 1  # the one chosen last
        self._lock = threading.Lock()
        self.name, self.sha256, self.card = first.name, first.sha256, first.card
        self.device = " + ".join(engine.device for engine in engines)
        self.depth = sum(engine.depth for engine in engines)
        self.best_batch = min(engine.best_batch for engine in engines)
        self.max_batch = min((each.max_batch for each in engines if each.max_batch is not None), default=None)
        self.largest_px = first.largest_px
        self.made_for = first.made_for
        self.attempts = len(engines)

    def allocate(self, nbytes: int) -> np.ndarray:
        return self._engines[0].allocate(nbytes)  # page-locked for every GPU

    def submit(self, counts: np.ndarray, expected: np.ndarray) -> _Ticket:
        with self._lock:
            place = self._choose()
            self._under_way[place] += 1
            self._resting = [max(0, n - 1) for n in self._resting]
        try:
            return _Ticket(place, self._engines[place].submit(counts, expected))
        except BaseException as error:
            self._settle(place, error)
            raise

    def collect(self, ticket: _Ticket) -> np.ndarray:
        try:
            done = self._engines[ticket.place].collect(ticket.ticket)
        except BaseException as error:
            self._settle(ticket.place, error)
            raise
        self._settle(ticket.place)
        return done

    def depth_for(self, shape: tuple[int, int]) -> int:
        with self._lock:
            awake = [engine for engine, rest in zip(self._engines, self._resting, strict=True) if not rest]
        return sum(engine.depth_for(shape) for engine in awake or self._engines)

    def memory_free(self) -> int | None:
        left = [free for engine in self._engines if (free := engine.memory_free()) is not None]
        return min(left, default=None)

    def prepare(self, shape: tuple[int, int], dtype: np.dtype[Any]) -> None:
        for engine in self._engines:
            engine.prepare(shape, dtype)

    def close(self) -> None:
        for engine in self._engines:
            engine.close()

    def _choose(self) -> int:
        """The engine with the least to do of those that are not resting, in turns; lock held.

        When all are, the one that failed longest ago, or has done well since: nobody else is left.
        """
        load = [n / engine.depth for n, engine in zip(self._under_way, self._engines, strict=True)]
        free = [place for place, part in enumerate(load) if part < 1]
        awake = [place for place in free if not self._resting[place]]
        turn = [(place - self._last - 1) % len(load) for place in range(len(load))]
        long_ago = [0] * len(load) if awake else self._failed_at
        self._last = min(
            awake or free or range(len(load)), key=lambda place: (long_ago[place], load[place], turn[place])
        )
        return self._last

    def _settle(self, place: int, error: BaseException | None = None) -> None:
        with self._lock:
            self._under_way[place] -= 1
            if error is None:
                self._next_rest[place], self._failed_at[place] = _REST[0], 0
                if all(self._resting):  # else one that is dead would get what this one has no room for
                    self._resting[place] = 0
                return
            if len(self._engines) == 1 or _is_the_batchs_fault(error):
                return
            self._failures += 1
            self._failed_at[place] = self._failures
            if self._resting[place]:  # of what it had when it failed
                return
            rest = self._resting[place] = self._next_rest[place]
            if isinstance(error, ServerFailed):
                self._next_rest[place] = min(2 * rest, _REST[1])
        device = self._engines[place].device
        log.warning("%s failed: the others get its share of the next %d batches", device, rest)


def _is_the_batchs_fault(error: BaseException) -> bool:
    return isinstance(error, (EngineError, ValueError)) and not isinstance(error, (CudaError, ServerFailed))
