"""The machine's memory, and how this process's allocator treats large blocks."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
_KEPT_BYTES = 512 * 1024**2
_LARGEST_BYTES = 32 * 1024**2  # glibc's upper limit for the threshold
_USUAL_BYTES = 128 * 1024  # its threshold to begin with


def physical_bytes() -> int | None:
    """Of this machine; None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def keep_freed_blocks() -> None:
    """Let glibc reuse the memory of messages instead of returning it to the system each time.

    Otherwise every frame that ZeroMQ copies costs a fresh mapping and its page faults,
    more than the copy itself. Elsewhere than on glibc this does nothing.
    """
    _set(_M_MMAP_THRESHOLD, _LARGEST_BYTES)
    _set(_M_TRIM_THRESHOLD, _KEPT_BYTES)


@contextlib.contextmanager
def blocks_that_go_back() -> Iterator[None]:
    """In between, take large blocks from the system one by one, so that each goes back when it is freed.

    For what is loaded to stay a while and go as a whole, such as an engine: among the blocks that are kept, each
    leaves holes that the next one does not fit into, and the process grows from one to the next.
    """
    _set(_M_MMAP_THRESHOLD, _USUAL_BYTES)
    try:
        yield
    finally:
        _set(_M_MMAP_THRESHOLD, _LARGEST_BYTES)


def _set(option: int, nbytes: int) -> None:
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(option, nbytes)
