"""`write_repository`: an engine where an inference server finds it.

The folder is laid out as NVIDIA Triton and OpenVINO Model Server both read it::

    DIR/NAME/config.pbtxt         for Triton; says what the network is for, too
    DIR/NAME/1/model.onnx         or model.plan; the next network of that name is 2, and so on
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emstream.errors import EngineInvalid, OutputError
from emstream.inference import check_is_there
from emstream.inference.card import EngineCard
from emstream.inference.keep import write_whole
from emstream.inference.plan import read_plan
from emstream.inference.remote import PARAMETER, network_of, parameter_of

BACKENDS = ("onnxruntime", "openvino")


@dataclass(frozen=True)
class _Model:
    """What goes into the repository."""

    file: str
    content: bytes
    header: str
    input: str
    output: str
    max_batch: int
    """0 where any number of frames goes in as it comes, and the first of `dims` is that number."""
    sha256: str
    card: EngineCard
    kind: str = ""
    """Of the instances; empty for GPUs where there are some."""


def write_repository(
    engine: Path,
    folder: Path,
    *,
    name: str | None = None,
    backend: str = "onnxruntime",
    max_batch: int | None = None,
    instances: int | None = None,
) -> dict[str, Any]:
    """Add an engine (.onnx, or .plan of TensorRT) to the model repository `folder`, made if need be.

    `name` is what clients call it, by default the network's own. `backend` is Triton's for an .onnx, `max_batch`
    the most frames that it computes together (8; a plan has its own, openvino none), `instances` how many batches
    at a time on each GPU, or on the CPU. A network that is there already stays; another one is its next version.
    Returns {model, version, path, url, config}. Raises EngineError, OutputError or ValueError.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    for value, what in ((max_batch, "max_batch"), (instances, "instances")):
        if value is not None and value < 1:
            raise ValueError(f"{what} must be at least 1, got {value}")
    check_is_there(engine)
    model = _of_plan(engine, max_batch) if engine.suffix == ".plan" else _of_onnx(engine, backend, max_batch)
    name = model.card.name if name is None else name
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name, re.ASCII):
        raise ValueError(f"a model's name is made of letters, digits, '.', '_' and '-', got {name!r}")
    home = folder / name
    try:
        version = _version(home, model)
        _write_model(home, version, model)
        write_whole(home / "config.pbtxt", _config(name, version, model, instances).encode())
    except OSError as error:
        raise OutputError(f"cannot write {error.filename or home}: {error.strerror}") from None
    return {
        "model": name,
        "version": version,
        "path": str(home / str(version) / model.file),
        "config": str(home / "config.pbtxt"),
        "url": f"grpc://HOST:8001/{name}",
    }


def _of_onnx(path: Path, backend: str, max_batch: int | None) -> _Model:
    if path.suffix != ".onnx":
        raise EngineInvalid(f"an inference server takes an .onnx or a .plan, got {path}")
    # Triton's openvino looks for model.xml, has no GPU, and with a max_batch_size takes full batches only.
    openvino = backend == "openvino"
    if openvino and max_batch is not None:
        raise ValueError(f"max_batch is {max_batch}, and Triton's openvino computes each batch as it comes")
    sha256, card = network_of(path)
    dims = "-1, -1, -1" if openvino else "-1, -1"
    return _Model(
        file="model.onnx",
        content=path.read_bytes(),
        header=f'backend: "{backend}"\ndefault_model_filename: "model.onnx"',
        input=f'name: "counts" data_type: TYPE_FP32 dims: [ {dims} ]',
        output=f'name: "expected_counts" data_type: TYPE_FP32 dims: [ {dims} ]',
        max_batch=0 if openvino else max_batch or 8,
        sha256=sha256,
        card=card,
        kind="KIND_CPU" if openvino else "",
    )


def _of_plan(path: Path, max_batch: int | None) -> _Model:
    record, compiled = read_plan(path)
    profile = record.profile
    if record.flavour != "tensorrt":
        raise EngineInvalid(
            f"{path} was built for {record.flavour}, which no inference server runs; build it with --flavour tensorrt, "
            "or export the .onnx"
        )
    if max_batch is not None and max_batch > profile.max_batch:
        raise ValueError(
            f"{path} takes batches of up to {profile.max_batch} frames, max_batch is {max_batch}"
        )
    size = f"{profile.height}, {profile.width}"
    given = (
        f"data_type: TYPE_FP32 dims: [ {size} ]"
        if profile.type == "float32"
        else f"data_type: TYPE_UINT8 dims: [ {size}, {profile.dtype.itemsize} ]"
    )
    return _Model(
        file="model.plan",
        content=compiled,
        header='platform: "tensorrt_plan"',
        input=f'name: "raw" {given}',
        output=f'name: "expected_counts" data_type: TYPE_FP32 dims: [ {size} ]',
        max_batch=max_batch or profile.max_batch,
        sha256=record.onnx_sha256,
        card=record.card,
    )


def _version(home: Path, model: _Model) -> int:
    """The newest version, if it is this very model, or the next one."""
    versions = sorted(
        int(each.name) for each in home.glob("[1-9]*") if each.is_dir() and each.name.isdecimal()
    )
    if not versions:
        return 1
    there = home / str(versions[-1]) / model.file
    same = there.is_file() and there.read_bytes() == model.content
    return versions[-1] if same else versions[-1] + 1


def _write_model(home: Path, version: int, model: _Model) -> None:
    """The version's folder, at once whole: a server that looks at it does not see half a model."""
    if (home / str(version)).exists():
        return
    home.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=".", dir=home))
    try:
        (unfinished / model.file).write_bytes(model.content)
        (unfinished / model.file).chmod(0o644)
        unfinished.chmod(0o755)
        unfinished.rename(home / str(version))
    except OSError:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _config(name: str, version: int, model: _Model, instances: int | None) -> str:
    """Triton's config.pbtxt. Quoted as in JSON, which is quoted as in protobuf's text."""
    parameter = json.dumps(parameter_of(model.sha256, model.card, version), ensure_ascii=False)
    group = [f"count: {instances}"] if instances else []
    group += [f"kind: {model.kind}"] if model.kind else []
    lines = [
        f"name: {json.dumps(name)}",
        model.header,
        f"max_batch_size: {model.max_batch}",
        f"input [ {{ {model.input} }} ]",
        f"output [ {{ {model.output} }} ]",
        *(["dynamic_batching { }"] if model.max_batch else []),
        *([f"instance_group [ {{ {' '.join(group)} }} ]"] if group else []),
        f"parameters {{ key: {json.dumps(PARAMETER)} value {{ string_value: {parameter} }} }}",
    ]
    return "\n".join(lines) + "\n"
