"""The two packages that make and run plans: TensorRT, and TensorRT for RTX.

They share one Python API. Plans of one cannot be run by the other.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections import deque
from dataclasses import dataclass
from typing import Any

from emstream.errors import EngineUnavailable

log = logging.getLogger(__name__)
_MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
_EXTRAS = {"tensorrt": "gpu", "tensorrt-rtx": "rtx"}
FLAVOURS = tuple(_MODULES)


@dataclass(frozen=True)
class Flavour:
    """One installed package."""

    name: str
    version: str
    module: Any

    @property
    def portable(self) -> bool:
        """Whether plans are built without a GPU, for whichever GPU they meet."""
        return self.name == "tensorrt-rtx"

    def logger(self, errors: int = logging.ERROR) -> Any:
        """A logger for its builders and runtimes, which keeps what went wrong last; `errors` is their level."""
        return _logger_class(self.module, errors)()


def installed(name: str | None = None) -> Flavour:
    """The flavour `name`, or the one that is installed, TensorRT first; raises EngineUnavailable."""
    if name is not None and name not in FLAVOURS:
        raise ValueError(f"flavour must be one of {', '.join(FLAVOURS)}, got {name!r}")
    for each in FLAVOURS if name is None else (name,):
        if importlib.util.find_spec(_MODULES[each]) is None:
            continue
        try:
            module = importlib.import_module(_MODULES[each])
        except (ImportError, OSError, RuntimeError) as error:
            log.warning("%s is installed and cannot be imported: %s", each, error)
            continue
        return Flavour(each, module.__version__, module)
    wanted = FLAVOURS if name is None else (name,)
    install = " or ".join(f"pip install 'emstream[{_EXTRAS[each]}]'" for each in wanted)
    raise EngineUnavailable(f"{' or '.join(wanted)} is not installed: {install}")


def installed_or_other(name: str) -> Flavour:
    """The flavour `name`, or where that is not installed the one that is; raises EngineUnavailable."""
    try:
        return installed(name if name in FLAVOURS else None)
    except EngineUnavailable as error:
        missing = error
    try:
        return installed()
    except EngineUnavailable:
        raise missing from None


def _logger_class(trt: Any, errors: int) -> type[Any]:
    wrong = (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR)
    levels = {
        **dict.fromkeys(wrong, errors),
        trt.ILogger.WARNING: logging.INFO,  # it warns about much that is none of a user's business
        trt.ILogger.INFO: logging.DEBUG,
    }

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.errors: deque[str] = deque(maxlen=5)

        def log(self, severity: Any, message: str) -> None:
            if severity not in levels:  # every step it takes
                return
            log.log(levels[severity], "%s", message)
            if severity in wrong:
                self.errors.append(message)

        def last_error(self) -> str:
            return self.errors[-1] if self.errors else "it gave no reason"

    return Logger
