"""The running average of raw frames: what operators look at where there is no denoiser."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from emstream.view.pair import Pair


class RunningAverage:
    """The mean of the last raw frames; from one frame to the next only what changed is added and taken away.

    To take integers away again it holds the frames that it has summed, however old they become.
    """

    def __init__(self) -> None:
        self.last_key = 0
        """Of the pair that was asked for last."""
        self._summed: dict[int, np.ndarray] = {}
        self._sum = np.zeros((0, 0))

    def of(self, pairs: Sequence[Pair], frames: int) -> tuple[np.ndarray, int]:
        """Mean (H, W), float32, of the last `frames` raw frames in `pairs`, and of how many it is.

        Only frames of the last one's series and shape count; there may be fewer than asked for.
        """
        wanted = {pair.key: pair.raw.data for pair in last_of_series(pairs, frames)}
        added = wanted.keys() - self._summed.keys()
        removed = self._summed.keys() - wanted.keys()
        shape = pairs[-1].raw.header.shape
        exact = pairs[-1].raw.data.dtype.kind in "iu"  # sums of floats would drift
        if not exact or self._sum.shape != shape or len(added) + len(removed) >= len(wanted):
            self._sum = np.zeros(shape)
            self._summed, added, removed = {}, set(wanted), set()
        for key in added:
            self._sum += wanted[key]
        for key in removed:
            self._sum -= self._summed[key]
        self._summed, self.last_key = wanted if exact else {}, pairs[-1].key
        return (self._sum / len(wanted)).astype(np.float32), len(wanted)


def last_of_series(pairs: Sequence[Pair], frames: int) -> list[Pair]:
    """The last `frames` of `pairs`, or those after a change of source, series or shape, newest first."""
    series, found = pairs[-1].series, []
    for pair in reversed(pairs[-frames:]):
        if pair.series != series:
            break
        found.append(pair)
    return found
