"""What gives way under overload; apart from `emstream.intake`, so that the commands' help takes no NumPy."""

from __future__ import annotations

from enum import StrEnum


class Overrun(StrEnum):
    """What gives way when frames come faster than the engine takes them."""

    drop_oldest = "drop-oldest"
    drop_newest = "drop-newest"
    block = "block"
