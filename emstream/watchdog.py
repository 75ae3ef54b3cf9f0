"""Noticing that a stage does not come to an end, and naming it."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass

from emstream.frame import now_ns

log = logging.getLogger(__name__)
_ABSENT_NS = 500_000_000


@dataclass
class _Work:
    since_ns: int
    limit_ns: int


class Watchdog:
    """Which stages are at work, since when, and for how long they may be.

    Each stage belongs to one thread, which says `begin` and `end`; one more thread looks.
    """

    def __init__(self) -> None:
        self._work: dict[str, _Work] = {}
        self._lock = threading.Lock()
        self._stalled: dict[str, float] = {}
        self._looked_ns = now_ns()

    def begin(self, stage: str, limit_s: float = 1.0) -> None:
        """`stage` is at work, and has stalled when that takes longer than `limit_s`."""
        with self._lock:
            self._work[stage] = _Work(now_ns(), int(limit_s * 1e9))

    def end(self, stage: str) -> None:
        with self._lock:
            self._work.pop(stage, None)

    def look(self) -> dict[str, float]:
        """How long each stalled stage has been at work [s]; logs which begin and cease to be stalled."""
        with self._lock:
            now = now_ns()
            absent_ns, self._looked_ns = now - self._looked_ns, now
            if absent_ns > _ABSENT_NS:  # the whole process stood still, and no stage is to blame
                for work in self._work.values():
                    work.since_ns += absent_ns
            before, self._stalled = (
                self._stalled,
                {
                    stage: (now - work.since_ns) / 1e9
                    for stage, work in self._work.items()
                    if now - work.since_ns > work.limit_ns
                },
            )
            stalled = self._stalled
        for stage in stalled.keys() - before.keys():
            log.error("the %s has stalled: at work for %.1f s", stage, stalled[stage])
        for stage in before.keys() - stalled.keys():
            log.warning("the %s goes on, after a stall of at least %.1f s", stage, before[stage])
        return stalled

    @property
    def stalled(self) -> dict[str, float]:
        """What the last look found."""
        return dict(self._stalled)
