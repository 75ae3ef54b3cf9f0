"""Several engines, one per GPU, that share the batches and keep their order."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from emstream.inference.engine import Engine


@dataclass
class _Ticket:
    place: int
    ticket: Any


class SharedEngine(Engine):
    """Gives each batch to the engine with the least to do.

    Tickets are collected in the order of their submission, so frames keep theirs.
    """

    def __init__(self, engines: Sequence[Engine]) -> None:
        if not engines:
            raise ValueError("engines to share batches among: at least 1, got none")
        if len({engine.sha256 for engine in engines}) > 1:
            raise ValueError("engines that share batches must hold the same network")
        first = engines[0]
        self._engines = list(engines)
        self._under_way = [0] * len(engines)
        self._lock = threading.Lock()
        self.name, self.sha256, self.card = first.name, first.sha256, first.card
        self.device = " + ".join(engine.device for engine in engines)
        self.depth = sum(engine.depth for engine in engines)
        self.best_batch = min(engine.best_batch for engine in engines)
        self.max_batch, self.largest_px = first.max_batch, first.largest_px
        self.made_for = first.made_for

    def allocate(self, nbytes: int) -> np.ndarray:
        return self._engines[0].allocate(nbytes)  # page-locked for every GPU

    def submit(self, counts: np.ndarray, expected: np.ndarray) -> _Ticket:
        with self._lock:
            load = [n / engine.depth for n, engine in zip(self._under_way, self._engines, strict=True)]
            place = load.index(min(load))
            self._under_way[place] += 1
        try:
            return _Ticket(place, self._engines[place].submit(counts, expected))
        except BaseException:
            self._settle(place)
            raise

    def collect(self, ticket: _Ticket) -> np.ndarray:
        try:
            return self._engines[ticket.place].collect(ticket.ticket)
        finally:
            self._settle(ticket.place)

    def depth_for(self, shape: tuple[int, int]) -> int:
        return sum(engine.depth_for(shape) for engine in self._engines)

    def prepare(self, shape: tuple[int, int], dtype: np.dtype[Any]) -> None:
        for engine in self._engines:
            engine.prepare(shape, dtype)

    def close(self) -> None:
        for engine in self._engines:
            engine.close()

    def _settle(self, place: int) -> None:
        with self._lock:
            self._under_way[place] -= 1
