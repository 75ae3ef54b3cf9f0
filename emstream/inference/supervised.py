"""An engine that is looked after: tried again, loaded again, replaced, or exchanged while it runs.

A batch that fails is tried once more, with several devices once for each. After three failures
in a row the engine is loaded again, and if that does not mend it the fallback takes over, where
there is one; every frame says which engine made it. `swap` puts another engine in between two
batches.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from emstream.errors import BatchRefused, EngineError
from emstream.frame import now_ns
from emstream.inference.engine import Engine
from emstream.ring import Maker
from emstream.seldom import Seldom

log = logging.getLogger(__name__)
RELOAD_AFTER = 3
"""Batches in a row."""
_RELOAD_AGAIN_S = (10.0, 320.0)  # doubling from one to the other
_BATCHS_FAULT = (BatchRefused, ValueError)


@dataclass(eq=False)
class Ticket:
    """A batch that an engine has, or had."""

    counts: np.ndarray
    expected: np.ndarray
    engine: Engine
    """That denoises it; another one once it was tried again."""
    inner: Any = None
    result: np.ndarray | None = None
    error: Exception | None = None


class SupervisedEngine:
    """The engine of a running service. One thread submits, one collects, any other may `swap`.

    `submit` never raises: what it has to say comes out of `collect`.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        reload: Callable[[], Engine] | None = None,
        fallback: Engine | None = None,
    ) -> None:
        """`reload` makes `engine` anew; `fallback` waits, ready, for the day that this does not help."""
        self._current = engine
        self._reloads = {engine: reload}
        self._fallback = fallback
        self._replaced: Engine | None = None
        """What the fallback stands in for."""
        self._previous: Engine | None = None
        self._leaving: list[Engine] = []
        self._flying: deque[Ticket] = deque()
        self._lock = threading.RLock()
        self._failed_in_a_row = 0
        self._mended = Seldom()
        self._reload_not_before_ns, self._reload_again_s = 0, _RELOAD_AGAIN_S[0]

    @property
    def current(self) -> Engine:
        """That gets the next batch."""
        return self._current

    @property
    def identity(self) -> dict[str, Any]:
        """{name, sha256, device} of the current engine, and whose place it took if it is the fallback."""
        return self._identity_of(self._current)

    def maker_of(self, ticket: Ticket) -> Maker:
        """Who denoised a batch that was collected."""
        card = ticket.engine.card
        identity = self._identity_of(ticket.engine)
        return Maker(identity, card.dose_range, card.spectra) if card else Maker(identity, None)

    def _identity_of(self, engine: Engine) -> dict[str, Any]:
        if engine is self._fallback and self._replaced is not None:
            return {**engine.identity, "fallback_for": self._replaced.name}
        return engine.identity

    def submit(self, counts: np.ndarray, expected: np.ndarray) -> Ticket:
        """Start to denoise `counts` (B, H, W) into `expected` (B, H, W) float32."""
        with self._lock:
            ticket = Ticket(counts, expected, self._current)
            self._start(ticket)
            self._flying.append(ticket)
        return ticket

    def collect(self, ticket: Ticket) -> np.ndarray:
        """Wait for the batch and return it (B, H, W). Raises what the engine raised at last."""
        self._finish(ticket)
        with self._lock:
            if ticket.error is None:
                self._failed_in_a_row = 0
            elif not isinstance(ticket.error, _BATCHS_FAULT):
                self._recover(ticket)
            self._flying.remove(ticket)
            self._close_those_done()
        if ticket.error is not None:
            raise ticket.error
        assert ticket.result is not None
        return ticket.result

    def swap(self, engine: Engine, reload: Callable[[], Engine] | None = None) -> Engine:
        """`engine` gets the next batch; returns the one before, which stays ready for `swap_back`."""
        with self._lock:
            self._reloads[engine] = reload
            before, self._current = self._current, engine
            self._leave(self._previous)
            self._previous = before
            self._failed_in_a_row = 0
            self._close_those_done()
        return before

    def swap_back(self) -> Engine:
        """The engine of before the last swap gets the next batch. Raises EngineError when there is none."""
        with self._lock:
            if self._previous is None:
                raise EngineError("no engine to go back to: nothing was swapped in since the service began")
            self._current, self._previous = self._previous, self._current
            self._failed_in_a_row = 0
            return self._current

    def close(self) -> None:
        """Close every engine, once nothing is under way."""
        engines = [self._current, self._previous, self._fallback, *self._leaving]
        for engine in {id(each): each for each in engines if each is not None}.values():
            _close(engine)
        self._leaving.clear()

    # -- one batch ----------------------------------------------------------------

    def _start(self, ticket: Ticket) -> None:
        ticket.error = None
        try:
            ticket.inner = ticket.engine.submit(ticket.counts, ticket.expected)
        except Exception as error:
            ticket.error = error

    def _finish(self, ticket: Ticket) -> None:
        """Collect a batch from its engine, unless that is done."""
        if ticket.error is not None or ticket.result is not None:
            return
        try:
            ticket.result = ticket.engine.collect(ticket.inner)
        except Exception as error:
            ticket.error = error

    def _again(self, ticket: Ticket) -> None:
        ticket.engine = self._current
        self._start(ticket)
        self._finish(ticket)

    # -- faults, lock held --------------------------------------------------------

    def _recover(self, ticket: Ticket) -> None:
        """Try the batch again, with another engine if need be."""
        # Engines are collected in order: what came after this batch is finished first.
        for other in self._flying:
            self._finish(other)
        first = ticket.error
        for _ in range(self._current.attempts):
            self._again(ticket)
            if ticket.error is None:
                if self._mended.note(f"{type(first).__name__}: {first}"):
                    log.warning(
                        "%s failed on a batch and did it at another attempt: %s", ticket.engine.name, first
                    )
                self._failed_in_a_row = 0
                return
            if isinstance(ticket.error, _BATCHS_FAULT):
                return
        assert ticket.error is not None
        self._failed_in_a_row += 1
        if self._failed_in_a_row < RELOAD_AFTER:
            return
        if self._load_again(ticket.error):
            self._again(ticket)
        if ticket.error is not None and self._fall_back(ticket.error):
            self._again(ticket)
        if ticket.error is None:
            self._failed_in_a_row = 0

    def _load_again(self, error: Exception) -> bool:
        """Whether the engine was made anew."""
        reload = self._reloads.get(self._current)
        if reload is None or now_ns() < self._reload_not_before_ns:
            return False
        self._reload_not_before_ns = now_ns() + int(self._reload_again_s * 1e9)
        self._reload_again_s = min(2 * self._reload_again_s, _RELOAD_AGAIN_S[1])
        broken = self._current
        log.error(
            "%s failed on %d batches in a row and is loaded again: %s", broken.name, RELOAD_AFTER, error
        )
        try:
            self._current = reload()
        except Exception as problem:
            log.error("%s could not be loaded again: %s", broken.name, problem)
            return False
        self._reloads[self._current] = reload
        self._leave(broken)
        return True

    def _fall_back(self, error: Exception) -> bool:
        """Whether the fallback took over."""
        if self._fallback is None or self._current is self._fallback:
            return False
        log.error("%s is replaced by %s: %s", self._current.name, self._fallback.name, error)
        self._replaced, self._current = self._current, self._fallback
        self._leave(self._previous)
        self._previous = self._replaced
        return True

    def _leave(self, engine: Engine | None) -> None:
        if engine is not None and engine is not self._fallback:
            self._leaving.append(engine)

    def _close_those_done(self) -> None:
        busy = [ticket.engine for ticket in self._flying]
        for engine in [each for each in self._leaving if each not in busy]:
            self._leaving.remove(engine)
            self._reloads.pop(engine, None)
            _close(engine)


def _close(engine: Engine) -> None:
    try:
        engine.close()
    except Exception as error:
        log.warning("closing %s: %s", engine.name, error)
