"""Frames larger than a tile: cut with an overlap, denoise, blend.

Neighbouring tiles share at least half the network's field of view, and a linear ramp
across the middle of what they share blends them, so that no seam shows.
"""

from __future__ import annotations

import contextlib
import math
from collections import deque
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from emstream.errors import BatchRefused
from emstream.inference.engine import Engine

TILE_PX = 1024


@lru_cache(maxsize=32)
def tile_spans(length: int, tile: int, overlap: int, multiple: int = 16) -> tuple[tuple[int, int], ...]:
    """Cover `length` pixels with spans (start, stop) of at most `tile`, neighbours sharing at least `overlap`.

    As few as possible, and as short as that allows. They start at multiples of `multiple`, so that
    the network's pooling falls on the same pixels as without tiles; all but the last are equally long.
    """
    if length <= tile:
        return ((0, length),)
    largest_step = (tile - overlap) // multiple * multiple
    count = math.ceil((length - tile) / largest_step) + 1
    step = min(largest_step, _round_up((length - overlap) / count, multiple))
    size = min(tile, _round_up(max(step + overlap, length - (count - 1) * step), multiple))
    return tuple((i * step, min(i * step + size, length)) for i in range(count))


def _round_up(length: float, multiple: int) -> int:
    return math.ceil(length / multiple) * multiple


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
        """Tiles are as large as the engine says, or `tile_px` squared when it takes any size."""
        self._engine = engine
        self._tile = engine.largest_px or (tile_px, tile_px)
        card = engine.card
        self._overlap_px = math.ceil(card.field_of_view_px / 2) if card else 0
        self._multiple_px = card.multiple_px if card else 1
        self._smallest_px = 2 * self._overlap_px + self._multiple_px
        if engine.largest_px is None and tile_px < self._smallest_px:
            raise ValueError(f"tiles of {tile_px} px are too small: {self._too_small()}")
        self.name, self.device, self.sha256 = engine.name, engine.device, engine.sha256
        self.card, self.depth, self.best_batch = engine.card, engine.depth, engine.best_batch
        self.max_batch, self.made_for, self.attempts = engine.max_batch, engine.made_for, engine.attempts

    def allocate(self, nbytes: int) -> np.ndarray:
        return self._engine.allocate(nbytes)

    def memory_free(self) -> int | None:
        return self._engine.memory_free()

    def prepare(self, shape: tuple[int, int], dtype: np.dtype[Any]) -> None:
        if self._whole(shape):
            self._engine.prepare(shape, dtype)
        else:
            super().prepare(shape, dtype)

    def submit(self, counts: np.ndarray, expected: np.ndarray) -> Any:
        if self._whole(counts.shape[1:]):
            return self._engine.submit(counts, expected)
        cut = [tile for length, tile in zip(counts.shape[1:], self._tile, strict=True) if length > tile]
        if min(cut) < self._smallest_px:
            raise BatchRefused(
                f"frames of {counts.shape[1]}x{counts.shape[2]} are larger than the engine's "
                f"{self._tile[0]}x{self._tile[1]}, which is too small for tiles: {self._too_small()}"
            )
        return _Deferred(counts, expected)

    def _whole(self, shape: tuple[int, ...]) -> bool:
        return shape[0] <= self._tile[0] and shape[1] <= self._tile[1]

    def _too_small(self) -> str:
        return f"its field of view takes at least {self._smallest_px} px"

    def collect(self, ticket: Any) -> np.ndarray:
        if not isinstance(ticket, _Deferred):
            return self._engine.collect(ticket)
        for counts, expected in zip(ticket.counts, ticket.expected, strict=True):
            self._blend(counts, expected)
        return ticket.expected

    def depth_for(self, shape: tuple[int, int]) -> int:
        return self._engine.depth_for(shape) if self._whole(shape) else 1

    def close(self) -> None:
        self._engine.close()

    def _blend(self, counts: np.ndarray, expected: np.ndarray) -> None:
        """Denoise one frame (H, W), tile by tile."""
        rows, columns = (
            tile_spans(length, tile, self._overlap_px, self._multiple_px)
            for length, tile in zip(counts.shape, self._tile, strict=True)
        )
        expected.fill(0)
        flying: deque[tuple[Any, np.ndarray, np.ndarray, np.ndarray]] = deque()

        def land() -> None:
            ticket, _tile, place, weight = flying.popleft()
            place += self._engine.collect(ticket)[0] * weight

        try:
            for (top, bottom), down in zip(rows, ramp(rows), strict=True):
                for (left, right), across in zip(columns, ramp(columns), strict=True):
                    tile = np.ascontiguousarray(counts[None, top:bottom, left:right])
                    if len(flying) >= self._engine.depth_for(tile.shape[1:]):
                        land()
                    ticket = self._engine.submit(tile, np.empty(tile.shape, np.float32))
                    place = expected[top:bottom, left:right]
                    flying.append((ticket, tile, place, down[:, None] * across))
            while flying:
                land()
        finally:
            # After a failure: what is still in flight belongs to the engine until it is collected.
            while flying:
                with contextlib.suppress(Exception):
                    land()
