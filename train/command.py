"""How the laboratory's commands end when something is wrong, and where they may write.

Wrong use ends with status 2, as argparse has it. All else that a person can mend ends with one
line, ``error: ...``, and status 1; with ``python -X dev`` there is a traceback instead.
"""

from __future__ import annotations

import functools
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ParamSpec, TypeVar

from filelock import FileLock, Timeout

from emstream.errors import EmstreamError

P = ParamSpec("P")
R = TypeVar("R")


def explained(main: Callable[P, R]) -> Callable[P, R]:
    """A `main` whose errors are one line on stderr and status 1."""

    @functools.wraps(main)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return main(*args, **kwargs)
        except (EmstreamError, OSError, ValueError, RuntimeError, ImportError) as error:
            if sys.flags.dev_mode:
                raise
            raise SystemExit("error: " + (" ".join(str(error).split()) or type(error).__name__)) from None

    return wrapped


def writable_folder(path: Path) -> Path:
    """The folder `path`, made if it is not there. Raises ValueError where nothing can be written."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"{path} cannot be a folder, since a file is in its place; choose another") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be written to ({error.strerror}); choose another folder") from None
    return path


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other processes out of `folder`. Raises RuntimeError while one is in it, like a child of what was killed."""
    writable_folder(folder)
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout:
        raise RuntimeError(f"another process is writing to {folder}: wait until it ends, or end it") from None


def writable_file(path: Path) -> Path:
    """The file `path`, in a folder made if it is not there. Raises ValueError where it cannot be written."""
    writable_folder(path.parent)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file in it")
    if path.exists() and not os.access(path, os.W_OK):
        raise ValueError(f"{path} is write-protected; choose another file")
    return path
