"""Builds libcuda.c, a CUDA driver that needs no GPU, and runs tests on it.

A process loads libcuda.so.1 once and for good, and the machine may have a real one: so each
test that is to find the pretend one runs in a process of its own.
"""

from __future__ import annotations

import ctypes
import faulthandler
import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = {"pycuda": "pycuda", "cuda-bindings": "cuda"}  # name on PyPI -> what it installs


def why_not() -> str | None:
    """Why this machine cannot build or load the pretend driver; None if it can."""
    if sys.platform != "linux":
        return "the pretend CUDA driver is for Linux"
    if shutil.which("cc") is None:
        return "there is no C compiler (cc) for the pretend CUDA driver"
    return None


def installed(package: str) -> bool:
    return importlib.util.find_spec(PACKAGES[package]) is not None


class PretendDriver:
    """libcuda.so.1 in a folder, and processes that find it there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        source = Path(__file__).with_name("libcuda.c")
        library = folder / "libcuda.so.1"
        how = ["-O1", "-shared", "-fPIC", "-pthread", f"-Wl,-soname,{library.name}"]
        done = subprocess.run(
            ["cc", "-std=c11", *how, "-o", library, source, "-ldl"],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr

    def run(self, module: str, function: str, *packages: str) -> None:
        """Run ``module.function.check`` where only `packages` are installed.

        It is handed `Driver`. Warnings are errors, and so is whatever it writes to stderr.
        """
        environment = dict(os.environ)
        inherited = environment.get("LD_LIBRARY_PATH")
        environment["LD_LIBRARY_PATH"] = f"{self._folder}:{inherited}" if inherited else str(self._folder)
        code = f"from tests.doubles import libcuda; libcuda.run_check({module!r}, {function!r}, {packages!r})"
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", code],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=90,
        )
        assert (done.returncode, done.stderr) == (0, ""), f"exit code {done.returncode}\n{done.stderr}"


def run_check(module: str, function: str, packages: tuple[str, ...]) -> None:
    """What `PretendDriver.run` runs."""
    faulthandler.enable()
    faulthandler.dump_traceback_later(60, exit=True)
    sys.setdlopenflags(os.RTLD_LAZY)  # pycuda links with the whole driver
    for package in PACKAGES.keys() - set(packages):
        sys.modules[PACKAGES[package]] = None
    getattr(importlib.import_module(module), function).check(Driver())


class Driver:
    """The pretend driver seen from within."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")

    def pending(self) -> int:
        """Pieces of work that were put off."""
        return int(self._library.pretend_pending())

    def live(self) -> dict[str, int]:
        """What was made and not given back, contexts aside."""
        kinds = ("stream", "event", "graph", "exec", "device", "host")
        counts = {kind: int(self._library.pretend_live(kind.encode())) for kind in kinds}
        return {kind: count for kind, count in counts.items() if count}

    def flags(self, kind: str) -> int:
        """What the newest of a kind was made with."""
        return int(self._library.pretend_flags(kind.encode()))

    @staticmethod
    def fail(call: str | None, error: int = 999) -> None:
        """From now on this call fails, or none does."""
        os.environ.pop("PRETEND_CUDA_FAIL", None)
        if call:
            os.environ["PRETEND_CUDA_FAIL"] = f"{call}={error}"
