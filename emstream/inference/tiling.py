"""Frames larger than a tile: cut with an overlap, denoise, blend.

Neighbouring tiles share at least half the network's field of view, and a linear ramp
across the middle of what they share blends them, so that no seam shows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from emstream.inference.engine import Engine

TILE_PX = 1024
_MULTIPLE_PX = 16  # of the coarsest scale of the networks


@lru_cache(maxsize=32)
def tile_spans(length: int, tile: int, overlap: int) -> tuple[tuple[int, int], ...]:
    """Cover `length` pixels with spans (start, stop) of at most `tile`, neighbours sharing at least `overlap`.

    As few as possible, and as short as that allows. They start at multiples of 16, so that the
    network's pooling falls on the same pixels as without tiles; all but the last are equally long.
    """
    if length <= tile:
        return ((0, length),)
    largest_step = (tile - overlap) // _MULTIPLE_PX * _MULTIPLE_PX
    count = math.ceil((length - tile) / largest_step) + 1
    step = min(largest_step, _round_up((length - overlap) / count))
    size = min(tile, _round_up(max(step + overlap, length - (count - 1) * step)))
    return tuple((i * step, min(i * step + size, length)) for i in range(count))


def _round_up(length: float) -> int:
    return math.ceil(length / _MULTIPLE_PX) * _MULTIPLE_PX


@lru_cache(maxsize=32)
def ramp(spans: tuple[tuple[int, int], ...]) -> tuple[np.ndarray, ...]:
    """The weight of each span's pixels; over all spans they add up to 1 at every pixel.

    Of the pixels that two spans share, the outer quarters belong to the span that sees
    farther beyond them; only the middle half is blended.
    """
    length = spans[-1][1]
    weights, total = [], np.zeros(length, np.float32)
    for i, (start, stop) in enumerate(spans):
        position = np.arange(start, stop, dtype=np.float32) + 0.5
        weight = np.ones(stop - start, np.float32)
        if i > 0:
            weight = np.minimum(weight, _rise(position, start, spans[i - 1][1]))
        if i + 1 < len(spans):
            weight = np.minimum(weight, 1 - _rise(position, spans[i + 1][0], stop))
        weights.append(weight)
        total[start:stop] += weight
    return tuple(weight / total[start:stop] for (start, stop), weight in zip(spans, weights, strict=True))


def _rise(position: np.ndarray, start: int, stop: int) -> np.ndarray:
    """0 in the first quarter of start-stop, 1 in the last, linear between; a step when they share nothing."""
    return np.clip(2 * (position - start) / max(stop - start, 1e-6) - 0.5, 0, 1)


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

    def collect(self, ticket: Any) -> np.ndarray:
        if not isinstance(ticket, _Deferred):
            return self._engine.collect(ticket)
        for counts, expected in zip(ticket.counts, ticket.expected, strict=True):
            self._blend(counts, expected)
        return ticket.expected

    def depth_for(self, shape: tuple[int, int]) -> int:
        return self.depth if max(shape) <= self._tile_px else 1

    def close(self) -> None:
        self._engine.close()

    def _blend(self, counts: np.ndarray, expected: np.ndarray) -> None:
        """Denoise one frame (H, W), tile by tile."""
        rows = tile_spans(counts.shape[0], self._tile_px, self._overlap_px)
        columns = tile_spans(counts.shape[1], self._tile_px, self._overlap_px)
        expected.fill(0)
        for (top, bottom), down in zip(rows, ramp(rows), strict=True):
            for (left, right), across in zip(columns, ramp(columns), strict=True):
                tile = np.ascontiguousarray(counts[None, top:bottom, left:right])
                done = self._engine.collect(self._engine.submit(tile, np.empty(tile.shape, np.float32)))[0]
                expected[top:bottom, left:right] += done * down[:, None] * across
