"""How much room there is, and how much a recording needs."""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path

from emstream.errors import OutputError

RESERVE_BYTES = 64 * 1024**2
START_S = 60.0
LOW_S = 5.0
_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4,
          "ki": 1024, "mi": 1024**2, "gi": 1024**3, "ti": 1024**4}  # fmt: skip


def free_bytes(folder: Path) -> int:
    """What may still be written there. Raises OutputError where nobody can tell."""
    try:
        return shutil.disk_usage(folder).free
    except OSError as error:
        raise OutputError(f"{folder} cannot be written any more: {error.strerror}") from None


def check_writable(folder: Path) -> None:
    """Raise OutputError unless files can be made in `folder`."""
    try:
        with tempfile.NamedTemporaryFile(prefix=".emstream-", dir=folder):
            pass
    except OSError as error:
        raise OutputError(
            f"nothing can be written in {folder}: {error.strerror}; let this user write there, or record elsewhere"
        ) from None


def check_room(folder: Path, bytes_per_s: float) -> None:
    """Raise OutputError unless a minute at `bytes_per_s` finds room in `folder`."""
    free, needed = free_bytes(folder), RESERVE_BYTES + int(START_S * bytes_per_s)
    if free < needed:
        raise OutputError(
            f"no recording: {folder} has {text_of(free)} free, and a minute at {bytes_per_s / 1e6:.3g} MB/s "
            f"takes {text_of(needed)}; make room or record elsewhere"
        )


def is_low(folder: Path, bytes_per_s: float) -> bool:
    """Whether a recording had better end now, while it still can."""
    return free_bytes(folder) < RESERVE_BYTES + LOW_S * bytes_per_s


def seconds_left(free: int, bytes_per_s: float) -> int | None:
    """How long a recording may go on with `free` bytes [s]; None when nothing comes."""
    return max(0, int((free - RESERVE_BYTES) / bytes_per_s)) if bytes_per_s > 1 else None


def bytes_of(text: str, what: str) -> int:
    """``10GiB``, ``500MB`` or plain bytes."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", text.lower())
    if not match or match[2] not in _UNITS or (value := int(float(match[1]) * _UNITS[match[2]])) < 1:
        raise ValueError(f"{what} must be a size such as 10GiB, got {text!r}")
    return value


def text_of(nbytes: float) -> str:
    """As people read it."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1024
    return f"{nbytes:.3g} TiB"
