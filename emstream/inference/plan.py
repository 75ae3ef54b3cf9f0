"""A plan file: what TensorRT compiled, behind the record of what it was compiled from.

::

    b"emstream plan 1\\n" | SHA-256 of the rest, 32 bytes | record length, 8 bytes little-endian
        | record, JSON | TensorRT's bytes

A plan is for one frame size and pixel type, a range of batches, one version of one
flavour, and (but for TensorRT for RTX) one kind of GPU. All of that is checked before
TensorRT sees it, so that a refusal can name both sides and the command that rebuilds.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import struct
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from emstream.cuda import GpuInfo
from emstream.errors import EngineInvalid, EngineUnavailable
from emstream.inference.card import EngineCard
from emstream.inference.keep import write_whole

_MAGIC = b"emstream plan 1\n"
_DIGEST_BYTES = 32
_LONGEST_RECORD = 1 << 20
PLAN_TYPES = ("uint8", "uint16", "uint32", "float32")


@dataclass(frozen=True, kw_only=True)
class Profile:
    """The frames that a plan takes, `max_batch` of them at a time."""

    height: int
    width: int
    type: str
    max_batch: int

    def __post_init__(self) -> None:
        if min(self.height, self.width) < 1:
            raise ValueError(f"a frame needs at least 1x1 pixels, got {self.height}x{self.width}")
        if self.type not in PLAN_TYPES:
            raise ValueError(f"a plan's pixel type must be one of {', '.join(PLAN_TYPES)}, got {self.type!r}")
        if self.max_batch < 1:
            raise ValueError(f"a plan's largest batch must be at least 1 frame, got {self.max_batch}")

    @property
    def shape(self) -> tuple[int, int]:
        return self.height, self.width

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self.type)

    def __str__(self) -> str:
        return f"{self.height}x{self.width}:{self.type}, batches of 1-{self.max_batch}"


@dataclass(frozen=True, kw_only=True)
class Record:
    """Where a plan comes from."""

    onnx: str
    """The model file's path when the plan was built."""
    onnx_sha256: str
    flavour: str
    version: str
    gpu: str | None
    """None: TensorRT for RTX built it for every GPU that it supports."""
    capability: str | None
    driver: str | None
    """Newest CUDA version that the driver knew."""
    precision: str
    profile: Profile
    built: str
    """UTC, ISO 8601."""
    emstream: str
    card: EngineCard

    def rebuild(self, path: Path, **changes: Any) -> str:
        """The command that builds this plan again, or with changes to its profile."""
        p = replace(self.profile, **changes)
        words = f"--size {p.height}x{p.width} --type {p.type} --max-batch {p.max_batch}".split()
        return shlex.join(
            ["emstream", "build", self.onnx, "-o", str(path), *words, "--flavour", self.flavour]
        )

    def check(self, path: Path, *, flavour: str, version: str, gpu: GpuInfo) -> None:
        """Raise EngineUnavailable, naming both sides, when this installation or GPU cannot run the plan."""
        sides = [(f"{self.flavour} {self.version}", f"{flavour} {version}")]
        if self.gpu is not None:
            sides.append((f"{self.gpu} ({self.capability})", f"{gpu.name} ({gpu.capability})"))
        for built, here in sides:
            if built != here:
                raise EngineUnavailable(
                    f"{path} was built for {built}, and here is {here}; build it again: {self.rebuild(path)}"
                )
        if self.driver is not None and _number(gpu.driver) < _number(self.driver):
            raise EngineUnavailable(
                f"{path} was built with a driver for CUDA {self.driver}, and the one here is for CUDA "
                f"{gpu.driver}; update the driver or build it again: {self.rebuild(path)}"
            )

    def as_dict(self) -> dict[str, Any]:
        """Plain values, the card's among them last."""
        return asdict(self)


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def write_plan(path: Path, record: Record, compiled: bytes) -> None:
    """Write a plan file; `path` is the old one or the whole new one, also when killed."""
    text = json.dumps(record.as_dict()).encode()
    rest = struct.pack("<Q", len(text)) + text + compiled
    write_whole(path, _MAGIC, hashlib.sha256(rest).digest(), rest)


def read_record(path: Path) -> Record:
    """What `path` was built from and for; needs no GPU. Raises EngineInvalid."""
    return read_plan(path)[0]


def read_plan(path: Path) -> tuple[Record, bytes]:
    """The record, and what TensorRT compiled, to the last bit. Raises EngineInvalid."""
    content = memoryview(path.read_bytes())
    if content[: len(_MAGIC)] != _MAGIC:
        raise EngineInvalid(
            f"{path} does not say what it was built from, as plans of emstream do; "
            f"build one: {_build_somehow(path)}"
        )
    digest, rest = content[len(_MAGIC) :][:_DIGEST_BYTES], content[len(_MAGIC) + _DIGEST_BYTES :]
    try:
        record, compiled = _split(rest)
    except (struct.error, ValueError, KeyError, TypeError) as error:
        raise EngineInvalid(
            f"{path} is a damaged plan ({error}); build it again: {_build_somehow(path)}"
        ) from None
    if hashlib.sha256(rest).digest() != digest:
        raise EngineInvalid(f"{path} is a damaged plan; build it again: {record.rebuild(path)}")
    return record, bytes(compiled)


def _build_somehow(path: Path) -> str:
    return shlex.join(["emstream", "build", "MODEL.onnx", "-o", str(path)])


def _split(rest: memoryview) -> tuple[Record, memoryview]:
    (length,) = struct.unpack_from("<Q", rest)
    if length > _LONGEST_RECORD:
        raise ValueError(f"a record of {length} bytes")
    values = json.loads(bytes(rest[8 : 8 + length]))
    values["profile"] = Profile(**values["profile"])
    values["card"] = EngineCard(**{**values["card"], "dose_range": tuple(values["card"]["dose_range"])})
    unknown = set(values) ^ {field.name for field in fields(Record)}
    if unknown:
        raise ValueError(f"fields {', '.join(sorted(unknown))} are missing or unknown")
    return Record(**values), rest[8 + length :]
