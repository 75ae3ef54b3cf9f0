"""The exceptions of emstream.

::

    EmstreamError
    ├── SourceError          the camera's endpoint, or the file standing in for it
    ├── OutputError          the endpoint that frames are published on, or the file they are recorded in
    ├── EngineError
    │   ├── EngineNotFound     no such file
    │   ├── EngineInvalid      not a model, or not one of ours
    │   ├── EngineUnavailable  right file, but this machine or installation cannot run it
    │   ├── CudaError          no GPU, or a call to it that failed
    │   ├── ServerFailed       an inference server that is away, silent, broken or not what it was
    │   └── BatchRefused       frames that the engine was not made for; it takes others
    ├── ConfigError          a configuration file that cannot be read or names what there is not
    ├── KeyFileError         a key that cannot be read or written
    ├── FileFormatError      a movie or recording that cannot be read or written
    ├── MalformedFrame       one message; the service counts it as rejected and goes on
    └── Stalled              a part of the service that does not come back; only a new process helps

A caller's mistake (a negative dose, an unknown policy) is a ValueError instead.
"""

from __future__ import annotations

from typing import Any


class EmstreamError(Exception):
    """Anything that goes wrong at run time; the text says where and what to do."""

    report: dict[str, Any] | None = None
    """What a service had done by then, as ``--json`` prints it."""


class SourceError(EmstreamError):
    pass


class OutputError(EmstreamError):
    pass


class EngineError(EmstreamError):
    pass


class EngineNotFound(EngineError):
    pass


class EngineInvalid(EngineError):
    pass


class EngineUnavailable(EngineError):
    pass


class CudaError(EngineError):
    pass


class ServerFailed(EngineError):
    pass


class BatchRefused(EngineError):
    pass


class FileFormatError(EmstreamError):
    pass


class ConfigError(EmstreamError):
    pass


class KeyFileError(EmstreamError):
    pass


class MalformedFrame(EmstreamError):
    pass


class Stalled(EmstreamError):
    pass
