"""Which frame numbers are missing from a recording."""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np

from emstream.recording.layout import UNKNOWN

_LATE_GAPS = 64  # how far back a late frame is looked for
_LARGEST_GAP = 1_000_000
_REPEAT_WINDOW = 64


class GapMap:
    """The gaps in the numbers of the frames noted, series by series.

    As in the ledger, a late frame closes its gap and a repeated one changes nothing; a number
    of 0, or one far behind or absurdly far ahead, means that the camera began again.
    """

    def __init__(self, last: dict[Hashable, int] | None = None) -> None:
        self._last = dict(last or {})
        self._begun = dict.fromkeys(self._last, 0)
        self._gaps: list[tuple[int, int, int, Hashable]] = []
        self._unchanged = 0
        self.missing = 0
        """Frames."""

    def note(self, series: Hashable, number: int, row: int) -> None:
        """Frame `number` of a series was recorded as `row`."""
        last = self._last.setdefault(series, number - 1)
        begun = self._begun.setdefault(series, len(self._gaps))
        ahead = number - last
        if 0 < ahead <= _LARGEST_GAP:
            if ahead > 1:
                self._gaps.append((last + 1, number - 1, row, series))
                self.missing += ahead - 1
            self._last[series] = number
        elif not self._close(series, number, begun) and (number == 0 or abs(ahead) > _REPEAT_WINDOW):
            self._last[series] = number
            self._begun[series] = len(self._gaps)

    def continued(self) -> GapMap:
        """An empty map for the next file of the same recording."""
        return GapMap(self._last)

    def changes(self) -> tuple[int, np.ndarray]:
        """Rows (G, 3) that are new or other than at the last call, and the first one's place.

        Each holds the first and last number missing and the row before which; rows never go
        away, -1 marks a gap that was closed.
        """
        start, closed = self._unchanged, (UNKNOWN, UNKNOWN, UNKNOWN)
        rows = [gap[:3] if gap[0] <= gap[1] else closed for gap in self._gaps[start:]]
        self._unchanged = len(self._gaps)
        return start, np.array(rows, np.int64).reshape(-1, 3)

    def _close(self, series: Hashable, number: int, begun: int) -> bool:
        for i in range(len(self._gaps) - 1, max(begun, len(self._gaps) - _LATE_GAPS) - 1, -1):
            first, last, row, whose = self._gaps[i]
            if whose == series and first <= number <= last:
                before, after = (first, number - 1), (number + 1, last)
                if before[0] <= before[1] and after[0] <= after[1]:
                    self._gaps.append((*after, row, series))
                self._gaps[i] = (*(before if before[0] <= before[1] else after), row, series)
                self._unchanged = min(self._unchanged, i)
                self.missing -= 1
                return True
        return False
