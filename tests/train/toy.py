"""A particle of 28 columns on a support of two rows, drawn as Gaussians: everything about it is known."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

SPACING_PX = 40
SIZE_PX = 340
ROWS, ACROSS = 4, 7


@dataclass
class ToyColumns:
    positions: np.ndarray
    on_particle: np.ndarray
    on_surface: np.ndarray


def toy_columns(size_px: int = SIZE_PX) -> ToyColumns:
    """Rows of a triangular lattice, the particle's above the support's, which is wider."""
    positions, on_particle = [], []
    step = SPACING_PX * np.sqrt(3) / 2
    for row in range(ROWS + 2):
        support = row >= ROWS
        across = ACROSS + 2 if support else ACROSS - (ROWS - 1 - row) % 2
        y = size_px / 2 + (row - (ROWS + 1) / 2) * step
        for n in range(across):
            positions.append((size_px / 2 + (n - (across - 1) / 2) * SPACING_PX, y))
            on_particle.append(not support)
    places, particle = np.array(positions), np.array(on_particle)
    near = np.linalg.norm(places[:, None] - places[None], axis=2) < 1.2 * SPACING_PX
    return ToyColumns(places, particle, particle & (near.sum(axis=1) - 1 < 6))


def draw(positions: np.ndarray, size_px: int = SIZE_PX, depth: float = -0.4) -> np.ndarray:
    """Gaussians of `depth` on 1, (size_px, size_px) float32."""
    y, x = np.mgrid[:size_px, :size_px]
    image = np.ones((size_px, size_px))
    for column, row in positions:
        image += depth * np.exp(-((x - column) ** 2 + (y - row) ** 2) / (2 * 9.0**2))
    return image.astype(np.float32)


class ToyImages:
    """What `train.dataset.Images` is: the same particle in shallow and deep contrast."""

    def __init__(self, directory: Path | None = None, count: int = 4) -> None:
        self.parameters: list[dict[str, Any]] = [
            {
                "seed": n, "shape": f"PtNp{1 + n % 2}", "defect": "D0", "thickness_nm": 3.0 + n, "tilt_x_deg": 3.0,
                "tilt_y_deg": 4.0, "defocus_nm": 2.0 + 5 * n, "contrast": "black",
            }
            for n in range(count)
        ]  # fmt: skip

    def __len__(self) -> int:
        return len(self.parameters)

    def central_views(self, size_px: int, indices: list[int]) -> Tensor:
        views = [draw(toy_columns(size_px).positions, size_px, -0.3 - 0.1 * (n % 2)) for n in indices]
        return torch.from_numpy(np.stack(views))[:, None]

    def columns(self, index: int, size_px: int) -> ToyColumns:
        return toy_columns(size_px)
