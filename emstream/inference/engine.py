"""The protocol that every engine follows.

Shapes: counts (B, H, W) of any PIXEL_TYPES, expected (B, H, W) float32 [electrons].
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np

from emstream.inference.card import EngineCard
from emstream.ring import allocate_pageable


class Engine(ABC):
    """Turns counts into expected counts.

    `submit` starts a batch and returns a ticket, `collect` waits for it. At most `depth`
    tickets are out at a time, collected in the order of their submission. Until then
    `counts` must not change and `expected` must not be read. One thread may submit while
    another collects.
    """

    name: str
    device: str
    """Processor, precision and library, for people."""
    sha256: str | None = None
    """Of the model file; of the ONNX file that a plan was built from."""
    card: EngineCard | None = None
    depth: int = 2
    best_batch: int = 1
    """Frames per batch beyond which the engine gains nothing."""
    max_batch: int | None = None
    """Most frames per batch; None for any number."""
    attempts: int = 1
    """How often a batch that failed is worth another try: once for each device that it may get."""
    largest_px: tuple[int, int] | None = None
    """Rows and columns of the largest frame it takes whole; None for any."""
    made_for: tuple[tuple[int, int], np.dtype[Any]] | None = None
    """Frame size and pixel type that it was compiled for; None for any."""

    @abstractmethod
    def submit(self, counts: np.ndarray, expected: np.ndarray) -> Any:
        """Start to denoise `counts` (B, H, W) into `expected` (B, H, W) float32; returns a ticket.

        Both belong to the engine until the ticket is collected: nobody writes them or lets them go.
        """

    @abstractmethod
    def collect(self, ticket: Any) -> np.ndarray:
        """Wait for the ticket's batch and return it (B, H, W): its `expected`, now written.

        Raises what the engine raised.
        """

    def allocate(self, nbytes: int) -> np.ndarray:
        """Memory (nbytes,) uint8 for batches, of the kind that this engine reads and writes fastest."""
        return allocate_pageable(nbytes)

    def depth_for(self, shape: tuple[int, int]) -> int:
        """How many batches of frames (H, W) gain from being in flight together."""
        return self.depth

    def memory_free(self) -> int | None:
        """What its GPU has left [bytes]; None without one."""
        return None

    def prepare(self, shape: tuple[int, int], dtype: np.dtype[Any]) -> None:
        """Do now what the first frame (H, W) of this size and type would otherwise wait for."""
        self.denoise(np.zeros(shape, dtype))

    def denoise(self, counts: np.ndarray) -> np.ndarray:
        """Denoise a frame (H, W) or frames (B, H, W) of electron counts.

        Returns float32 of the same shape: expected electrons per pixel.
        """
        counts = np.asarray(counts)
        if counts.ndim not in (2, 3) or counts.size == 0:
            raise ValueError(f"counts must be (H, W) or (B, H, W), got shape {counts.shape}")
        if counts.dtype.kind not in "uif":
            raise ValueError(f"counts must be numbers [electrons], got {counts.dtype}")
        if counts.dtype.kind == "f" and not np.isfinite(counts).all():
            raise ValueError("counts must be finite, got NaN or infinite pixels")
        batch = counts if counts.ndim == 3 else counts[None]
        native = np.ascontiguousarray(batch, dtype=_native(batch.dtype))
        expected = np.empty(batch.shape, np.float32)
        for row in range(len(batch)):
            one = slice(row, row + 1)
            expected[one] = self.collect(self.submit(native[one], expected[one]))
        return expected.reshape(counts.shape)

    @property
    def identity(self) -> dict[str, Any]:
        """{name, sha256, device}: goes out with every denoised frame."""
        return {"name": self.name, "sha256": self.sha256, "device": self.device}

    def close(self) -> None:  # noqa: B027  most engines hold nothing
        """Free what the engine holds."""


def _native(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """`dtype` in this machine's byte order, in a width that engines take."""
    if (dtype.itemsize == 8 and dtype.kind in "ui") or dtype == np.float16:
        return np.dtype(np.float32)
    return dtype.newbyteorder("=")


class IdentityEngine(Engine):
    """Publishes what came in, as float32: the transport without a network, and without a copy of its own."""

    name = "identity"
    device = "none"
    best_batch = 1

    def submit(self, counts: np.ndarray, expected: np.ndarray) -> np.ndarray:
        if counts.dtype == expected.dtype:
            return counts
        np.copyto(expected, counts, casting="unsafe")
        return expected

    def collect(self, ticket: np.ndarray) -> np.ndarray:
        return ticket


def sha256_of(path: Path) -> str:
    """Hex digest of a model file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
