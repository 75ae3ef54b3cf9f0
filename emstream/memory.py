"""How this process's allocator treats large blocks."""

from __future__ import annotations

import contextlib
import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
_KEPT_BYTES = 512 * 1024**2
_LARGEST_BYTES = 32 * 1024**2  # glibc's upper limit for the threshold


def keep_freed_blocks() -> None:
    """Let glibc reuse the memory of messages instead of returning it to the system each time.

    Otherwise every frame that ZeroMQ copies costs a fresh mapping and its page faults,
    more than the copy itself. Elsewhere than on glibc this does nothing.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
