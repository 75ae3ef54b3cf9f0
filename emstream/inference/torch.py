"""The reference engine: the exported network in PyTorch, float32.

The only module of emstream that imports torch.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from emstream.errors import EngineInvalid
from emstream.inference.card import EngineCard
from emstream.inference.engine import Engine, sha256_of

_MULTIPLE_PX = 16
_SMALLEST_PX = 32  # what torch.export takes for a free size; other engines pad tiny frames to 16


class TorchEngine(Engine):
    """Runs a .pt2 written by ``train.export``, on the CPU."""

    depth = 1

    def __init__(self, path: Path, *, threads: int | None = None) -> None:
        metadata = {"card.json": ""}
        try:
            program = torch.export.load(path, extra_files=metadata)
        except Exception as error:  # torch raises whatever its zip and JSON readers raise
            raise EngineInvalid(
                f"{path} is not a readable exported program: {type(error).__name__}"
            ) from None
        if not metadata["card.json"]:
            raise EngineInvalid(
                f"{path} is not an emstream engine: it has no card; write it with train.export"
            )
        self.card = EngineCard.from_metadata(json.loads(metadata["card.json"]), where=str(path))
        self.name = self.card.name
        self.sha256 = sha256_of(path)
        self.device = f"CPU, f32, PyTorch {torch.__version__}"
        if threads:
            torch.set_num_threads(threads)
        self._network = program.module()

    def submit(self, counts: np.ndarray, expected: np.ndarray) -> np.ndarray:
        height, width = counts.shape[1:]
        # Through float32 first: torch has no arithmetic for unsigned 16 and 32 bit.
        x = torch.from_numpy(counts.astype(np.float32))[:, None]
        down = max(_SMALLEST_PX, height + (-height) % _MULTIPLE_PX) - height
        right = max(_SMALLEST_PX, width + (-width) % _MULTIPLE_PX) - width
        x = F.pad(x, (0, right, 0, down), mode="replicate")
        with torch.inference_mode():
            expected[:] = self._network(x)[:, 0, :height, :width].numpy()
        return expected

    def collect(self, ticket: np.ndarray) -> np.ndarray:
        return ticket
