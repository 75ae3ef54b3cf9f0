"""Simulated images on disk -> views for training and testing.

A view is a square of the specimen resampled to the camera's pixels, (N, 1, S, S)
float32, 1 in vacuum. Noise is not part of a view: `train.noise` draws it afresh
every time.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SAMPLING_A = 0.062  # pixel size of the camera's frames [A], as in the paper


class Images:
    """All shards of a directory in memory: images (N, 512, 512) float16 and their parameters."""

    def __init__(self, directory: Path) -> None:
        paths = sorted(Path(directory).glob("shard-*.h5"))
        if not paths:
            raise FileNotFoundError(
                f"no shard-*.h5 in {directory}; make some with: python -m train.simulate {directory}"
            )
        images, self.parameters = [], []
        for path in paths:
            with h5py.File(path) as file:
                images.append(file["images"][:])
                self.parameters += [json.loads(text) for text in file["parameters"].asstr()]
                self.sampling_a = float(file.attrs["sampling_a"])
        self.images = torch.from_numpy(np.concatenate(images))

    def __len__(self) -> int:
        return len(self.images)

    def view(
        self, index: Tensor, size_px: int, sampling_a: Tensor, angle: Tensor, flip: Tensor, centre: Tensor
    ) -> Tensor:
        """Resample images `index` (B,) to views (B, 1, size_px, size_px).

        `angle` (B,) in radians, `flip` (B,) of +1 or -1, `centre` (B, 2) in (x, y) of the
        image's own [-1, 1].
        """
        source = self.images[index][:, None].float()
        scale = size_px * sampling_a / (source.shape[-1] * self.sampling_a)
        cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
        matrix = torch.stack(
            [
                torch.stack([cos * flip, -sin, centre[:, 0]], dim=1),
                torch.stack([sin * flip, cos, centre[:, 1]], dim=1),
            ],
            dim=1,
        )
        grid = F.affine_grid(matrix, [len(index), 1, size_px, size_px], align_corners=False)
        return F.grid_sample(source, grid, mode="bicubic", padding_mode="reflection", align_corners=False)

    def random_views(self, count: int, size_px: int, generator: torch.Generator) -> Tensor:
        """Views at random places, any rotation, mirrored or not, pixels of 5.6-6.8 pm.

        The outermost 3 % of an image is left out: there the periodic cell wraps around.
        """

        def uniform(low: float, high: float, *shape: int) -> Tensor:
            return low + (high - low) * torch.rand(count, *shape, generator=generator)

        index = torch.randint(len(self), (count,), generator=generator)
        sampling_a = uniform(0.9, 1.1) * SAMPLING_A
        angle = uniform(-np.pi, np.pi)
        half = size_px * sampling_a / (self.images.shape[-1] * self.sampling_a)
        reach = (0.94 - half * (angle.cos().abs() + angle.sin().abs())).clamp_min(0)
        centre = uniform(-1, 1, 2) * reach[:, None]
        flip = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
        return self.view(index, size_px, sampling_a, angle, flip, centre)

    def central_views(self, size_px: int, indices: Any = None) -> Tensor:
        """The centre of each image at 6.2 pm per pixel: what networks are scored on."""
        index = torch.arange(len(self)) if indices is None else torch.as_tensor(indices)
        n = len(index)
        return self.view(
            index, size_px, torch.full((n,), SAMPLING_A), torch.zeros(n), torch.ones(n), torch.zeros(n, 2)
        )
