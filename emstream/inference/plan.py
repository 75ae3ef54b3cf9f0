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
import math
import re
import shlex
import struct
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np

from emstream.cuda import GpuInfo
from emstream.errors import EngineError, EngineInvalid, EngineNotFound, EngineUnavailable
from emstream.inference.card import EngineCard
from emstream.inference.keep import write_whole

_MAGIC = b"emstream plan 1\n"
_DIGEST_BYTES = 32
_LONGEST_RECORD = 1 << 20
_MOST_NUMBERS = 2**31 - 1  # in one of TensorRT's tensors
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
        numbers = (
            self.max_batch * math.prod(self.shape) * (1 if self.type == "float32" else self.dtype.itemsize)
        )
        if numbers > _MOST_NUMBERS:
            raise ValueError(
                f"a plan's largest batch must be at most {_MOST_NUMBERS} bytes (of float32: pixels), "
                f"got {self.max_batch} frames of {self.height}x{self.width} {self.type}: {numbers}"
            )

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
    """None: TensorRT for RTX built it for every GPU of its `targets`."""
    capability: str | None
    driver: str | None
    """Newest CUDA version that the driver knew."""
    device: int | None
    """The GPU's number when the plan was built."""
    targets: tuple[str, ...]
    """Compute capabilities of the GPUs it is for, where that is not one `gpu`."""
    precision: str
    profile: Profile
    built: str
    """UTC, ISO 8601."""
    emstream: str
    card: EngineCard

    def rebuild(
        self, path: Path, *, flavour: str | None = None, device: int | None = None, **changes: Any
    ) -> str:
        """The command that builds this plan again, or for something else."""
        p = replace(self.profile, **changes)
        words = f"--size {p.height}x{p.width} --type {p.type} --max-batch {p.max_batch}".split()
        words += ["--flavour", flavour or self.flavour]
        number = self.device if device is None else device
        if number:
            words += ["--device", str(number)]
        return shlex.join(["emstream", "build", self.onnx, "-o", str(path), *words])

    def check(self, path: Path, *, flavour: str, version: str, gpu: GpuInfo | None = None) -> None:
        """Raise EngineUnavailable, naming both sides, when this installation or GPU cannot run the plan."""
        command = self.rebuild(path, flavour=flavour, device=gpu.index if gpu else None)
        built, here = f"{self.flavour} {self.version}", f"{flavour} {version}"
        if built != here:
            raise EngineUnavailable(
                f"{path} was built for {built}, and here is {here}; build it again: {command}"
            )
        if gpu is None:
            return
        here = f"{gpu.name} ({gpu.capability})"
        if self.gpu is not None and (built := f"{self.gpu} ({self.capability})") != here:
            raise EngineUnavailable(
                f"{path} was built for {built}, and here is {here}; build it again: {command}"
            )
        if self.gpu is None and self.targets and gpu.capability not in self.targets:
            raise EngineUnavailable(
                f"{path} was built for GPUs of compute capability {', '.join(self.targets)}, and here is "
                f"{here}; build it on the machine with that GPU: {command}"
            )
        if self.driver is not None and _number(gpu.driver) < _number(self.driver):
            raise EngineUnavailable(
                f"{path} was built with a driver for CUDA {self.driver}, and the one here is for CUDA "
                f"{gpu.driver}; update the driver or build it again: {command}"
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
    """What `path` was built from and for; needs no GPU. Raises what `read_plan` does."""
    return read_plan(path)[0]


def read_plan(path: Path) -> tuple[Record, bytes]:
    """The record, and what TensorRT compiled, to the last bit.

    Raises EngineNotFound, EngineInvalid, or EngineError when it cannot be read.
    """
    try:
        content = memoryview(path.read_bytes())
    except FileNotFoundError:
        raise EngineNotFound(f"no plan at {path}; build one: {_build_somehow(path)}") from None
    except OSError as error:
        raise EngineError(f"cannot read {path}: {error}") from None
    if content[: len(_MAGIC)] != _MAGIC:
        raise EngineInvalid(
            f"{path} does not say what it was built from, as plans of emstream do; "
            f"build one: {_build_somehow(path)}"
        )
    digest, rest = content[len(_MAGIC) :][:_DIGEST_BYTES], content[len(_MAGIC) + _DIGEST_BYTES :]
    try:
        record, compiled = _split(rest)
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
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
    record = _made(Record, json.loads(bytes(rest[8 : 8 + length])))
    for name in ("capability", "driver"):
        version = getattr(record, name)
        if version is not None and not re.fullmatch(r"\d+(\.\d+)*", version, re.ASCII):
            raise ValueError(f"{name} must be a version such as 13.0, got {version!r}")
    if len(rest) == 8 + length:
        raise ValueError("it holds no compiled network")
    return record, rest[8 + length :]


def _made(kind: Any, values: Any) -> Any:
    """The dataclass `kind` of what JSON holds; raises ValueError unless it has all fields, each of its type."""
    kinds = get_type_hints(kind)
    optional = {field.name for field in fields(kind) if field.default is None}
    if unknown := (set(values) ^ set(kinds)) - (optional - set(values)):
        raise ValueError(f"fields {', '.join(sorted(unknown))} are missing or unknown")
    made = {}
    for name, value in values.items():
        wanted, value = kinds[name], _as_tuples(value)
        if name in optional:
            if value is None:
                continue
            wanted = get_args(wanted)[0]
        made[name] = _made(wanted, value) if is_dataclass(wanted) else value
        if not _is(made[name], wanted):
            raise ValueError(f"{name} cannot be {value!r}")
    return kind(**made)


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value


def _is(value: Any, wanted: Any) -> bool:
    if get_origin(wanted) is tuple:
        kinds = get_args(wanted)
        if not isinstance(value, tuple) or (len(value) != len(kinds) and kinds[-1] is not Ellipsis):
            return False
        return all(_is(each, kinds[0]) for each in value)
    if get_origin(wanted) is dict:
        return isinstance(value, dict)
    if wanted is float:
        wanted = int | float
    return isinstance(value, wanted) and (wanted is bool or not isinstance(value, bool))
