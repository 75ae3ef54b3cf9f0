"""Pixels that do not count, filled from those that do.

Each takes the value of its nearest good neighbour, so that what comes out are still whole
electrons with the noise of one pixel, as the network was trained on; a hole, a mean or the
65535 of a dead pixel would look like structure to it.
"""

from __future__ import annotations

import numpy as np

FARTHEST_PX = 64  # beyond this from every good pixel there is nothing to take: 0
_STEPS = ((-1, 0), (1, 0), (0, -1), (0, 1))


class BadPixels:
    """A mask (H, W), bad where it is not 0, ready to be applied to frame after frame."""

    def __init__(self, mask: np.ndarray) -> None:
        if mask.ndim != 2:
            raise ValueError(f"a pixel mask has two axes, rows and columns, got shape {mask.shape}")
        bad = mask != 0
        if bad.all():
            raise ValueError(
                f"all {bad.size} pixels of the mask are bad; bad pixels are those that are not 0"
            )
        self.shape = bad.shape
        self._bad, self._from = _nearest_good(bad)
        self._nowhere = self._bad[self._from < 0]
        reached = self._from >= 0
        self._bad, self._from = self._bad[reached], self._from[reached]

    def __len__(self) -> int:
        return len(self._bad) + len(self._nowhere)

    def fill(self, pixels: np.ndarray) -> None:
        """Replace the bad pixels of a frame (H, W), C-contiguous, in place."""
        flat = pixels.reshape(-1)
        flat[self._bad] = flat[self._from]
        flat[self._nowhere] = 0


def _nearest_good(bad: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Flat indices of the bad pixels, and of a nearest good one for each, -1 where none is near."""
    height, width = bad.shape
    source = np.full((height + 2, width + 2), -1)
    source[1:-1, 1:-1] = np.where(bad, -1, np.arange(bad.size).reshape(bad.shape))
    wanted = np.flatnonzero(source.reshape(-1) < 0)
    rows, columns = np.divmod(wanted, width + 2)
    inside = (rows > 0) & (rows <= height) & (columns > 0) & (columns <= width)
    places = open_places = wanted[inside]
    flat = source.reshape(-1)
    for _ in range(FARTHEST_PX):
        if not len(open_places):
            break
        found = np.full(len(open_places), -1)
        for down, right in _STEPS:
            found = np.where(found < 0, flat[open_places + down * (width + 2) + right], found)
        flat[open_places] = found
        open_places = open_places[found < 0]
    rows, columns = np.divmod(places, width + 2)
    return (rows - 1) * width + columns - 1, flat[places]
