"""One frame twice: what the camera sent and what the engine made of it."""

from __future__ import annotations

from dataclasses import dataclass

from emstream.frame import Frame


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """What the camera sent and what the engine made of it."""

    raw: Frame
    denoised: Frame
    arrived_ns: int
    key: int = 0
    """1 is the first pair that this page received."""
    fault: bool = False
    """Since the pair before, frames were lost, rejected or failed, or this one is outside the engine's domain."""

    @property
    def series(self) -> tuple[str, int | str, tuple[int, int]]:
        """Pairs that are equal in this have the same scale and may be averaged."""
        header = self.raw.header
        return header.source, header.series, header.shape

    @property
    def nbytes(self) -> int:
        return int(self.raw.data.nbytes + self.denoised.data.nbytes)
