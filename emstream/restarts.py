"""When a process beside the service that died is started again, and when it is given up."""

from __future__ import annotations

import time
from collections import deque

MOST_DEATHS = 6
"""Within a minute; after one more it is given up."""
_WITHIN_S = 60.0
_FIRST_PAUSE_S = 0.1  # doubles with every death


class Restarts:
    """The deaths of one process. One thread calls it."""

    def __init__(self) -> None:
        self._died_s: deque[float] = deque(maxlen=MOST_DEATHS + 1)

    def note_death(self) -> float | None:
        """How long to wait before another one is started [s], the first time not at all; None: give it up."""
        now_s = time.monotonic()
        self._died_s.append(now_s)
        deaths = sum(now_s - died_s < _WITHIN_S for died_s in self._died_s)
        if deaths > MOST_DEATHS:
            return None
        return _FIRST_PAUSE_S * 2 ** (deaths - 2) if deaths > 1 else 0.0
