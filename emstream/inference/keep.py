"""Files that are the old one or the whole new one: plans, and what makes the next start faster."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

from emstream.errors import EngineError

log = logging.getLogger(__name__)


def check_writable(path: Path) -> None:
    """Raise the EngineError that `write_whole` would, before there is something to write."""
    trial = path.with_name(f"{path.name}.{os.getpid()}.trial")
    try:
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise EngineError(f"cannot write {path}: {error}") from None


def write_whole(path: Path, *parts: bytes) -> None:
    """Write `path`, also when killed or when others write it, too, so that no reader finds a part of it.

    Raises EngineError when it cannot be written.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as file:
                file.writelines(parts)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise EngineError(f"cannot write {path}: {error}") from None


def keep(path: Path, content: bytes) -> None:
    """Write a file that only saves time; when that fails it is logged."""
    try:
        write_whole(path, content)
    except EngineError as error:
        log.warning("the next start is as slow as this one: %s", error)


def kept(path: Path) -> bytes:
    """What `keep` wrote; nothing when there is none."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        log.warning("this start is as slow as the first one: %s", error)
        return b""
