"""Frames larger than a tile: cut with an overlap, denoise, blend.

Neighbouring tiles share at least half the network's field of view, and a linear ramp
across the shared pixels blends them, so that no seam shows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from emstream.inference.engine import Engine

TILE_PX = 1024
_MULTIPLE_PX = 16  # tiles that need no padding inside the network


@lru_cache(maxsize=32)
def tile_starts(length: int, tile: int, overlap: int) -> tuple[int, tuple[int, ...]]:
    """Cover `length` pixels with equal tiles of at most `tile`, neighbours sharing at least `overlap`.

    Returns the tile's length and where each tile starts.
    """
    if length <= tile:
        return length, (0,)
    count = math.ceil((length - overlap) / (tile - overlap))
    size = math.ceil((length + (count - 1) * overlap) / count / _MULTIPLE_PX) * _MULTIPLE_PX
    size = min(size, tile)
    return size, tuple(round(i * (length - size) / (count - 1)) for i in range(count))


@lru_cache(maxsize=32)
def ramp(size: int, starts: tuple[int, ...], length: int) -> tuple[np.ndarray, ...]:
    """The weight of each tile along one axis; over all tiles they add up to 1 at every pixel."""
    weights = []
    for i, start in enumerate(starts):
        weight = np.ones(size, np.float32)
        for j, side in ((i - 1, 0), (i + 1, 1)):
            if 0 <= j < len(starts):
                shared = size - abs(starts[j] - start)
                rise = (np.arange(shared, dtype=np.float32) + 0.5) / shared
                if side == 0:
                    weight[:shared] = np.minimum(weight[:shared], rise)
                else:
                    weight[size - shared :] = np.minimum(weight[size - shared :], rise[::-1])
        weights.append(weight)
    total = np.zeros(length, np.float32)
    for start, weight in zip(starts, weights, strict=True):
        total[start : start + size] += weight
    return tuple(w / total[s : s + size] for s, w in zip(starts, weights, strict=True))


@dataclass
class _Deferred:
    counts: np.ndarray
    expected: np.ndarray


class TiledEngine(Engine):
    """Any engine, for frames of any size.

    Frames up to a tile go straight through. Larger ones are done tile by tile while
    they are collected.
    """

    def __init__(self, engine: Engine, tile_px: int = TILE_PX) -> None:
        self._engine = engine
        self._tile_px = tile_px
        field_of_view = engine.card.field_of_view_px if engine.card else 0
        self._overlap_px = math.ceil(field_of_view / 2)
        if tile_px < 2 * self._overlap_px + _MULTIPLE_PX:
            raise ValueError(
                f"tiles of {tile_px} px are too small for a field of view of {field_of_view} px; "
                f"use at least {2 * self._overlap_px + _MULTIPLE_PX} px"
            )
        self.name, self.device, self.sha256 = engine.name, engine.device, engine.sha256
        self.card, self.depth, self.best_batch = engine.card, engine.depth, engine.best_batch

    def submit(self, counts: np.ndarray, expected: np.ndarray) -> Any:
        if max(counts.shape[1:]) <= self._tile_px:
            return self._engine.submit(counts, expected)
        return _Deferred(counts, expected)

    def collect(self, ticket: Any) -> None:
        if not isinstance(ticket, _Deferred):
            self._engine.collect(ticket)
            return
        for counts, expected in zip(ticket.counts, ticket.expected, strict=True):
            self._blend(counts, expected)

    def close(self) -> None:
        self._engine.close()

    def _blend(self, counts: np.ndarray, expected: np.ndarray) -> None:
        """Denoise one frame (H, W), tile by tile."""
        height, rows = tile_starts(counts.shape[0], self._tile_px, self._overlap_px)
        width, columns = tile_starts(counts.shape[1], self._tile_px, self._overlap_px)
        row_weights = ramp(height, rows, counts.shape[0])
        column_weights = ramp(width, columns, counts.shape[1])
        expected.fill(0)
        done = np.empty((1, height, width), np.float32)
        for y, down in zip(rows, row_weights, strict=True):
            for x, across in zip(columns, column_weights, strict=True):
                tile = np.ascontiguousarray(counts[None, y : y + height, x : x + width])
                self._engine.collect(self._engine.submit(tile, done))
                done[0] *= down[:, None]
                done[0] *= across
                expected[y : y + height, x : x + width] += done[0]
