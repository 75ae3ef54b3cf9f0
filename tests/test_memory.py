"""What glibc's allocator does with large blocks, in a process of its own: its options are for good."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

pytest.importorskip("psutil")

PROGRAM = """
import contextlib, sys
import numpy as np, psutil
from emstream.memory import blocks_that_go_back, keep_freed_blocks

keep_freed_blocks()
rss = lambda: psutil.Process().memory_info().rss / 2**20
with blocks_that_go_back() if sys.argv[1] == "apart" else contextlib.nullcontext():
    block = np.ones(16 * 2**20, np.uint8)
    behind = np.ones(2**20, np.uint8)
before = rss()
del block
print(round(before - rss()))
again = np.ones(16 * 2**20, np.uint8)
del again
kept = rss()
again = np.ones(16 * 2**20, np.uint8)
print(round(rss() - kept))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's own options")
@pytest.mark.parametrize(("kind", "returned_mib"), [("kept", 0), ("apart", 16)])
def test_large_blocks_are_kept_unless_they_are_to_go_back(kind: str, returned_mib: int) -> None:
    command = [sys.executable, "-c", PROGRAM, kind]
    out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    returned, grown = map(int, out.split())
    assert returned == returned_mib
    assert grown == 0  # afterwards they are kept again
