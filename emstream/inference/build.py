"""ONNX -> plan. TensorRT needs the GPU it builds for; TensorRT for RTX needs none.

The network is strongly typed: its precision is what the ONNX file says. The camera's
raw pixels are its input; TensorRT knows no 16- and 32-bit unsigned numbers, so those come
in as bytes and are put together inside.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from emstream.cuda import GpuInfo
from emstream.errors import EngineError, EngineInvalid, EngineNotFound, EngineUnavailable
from emstream.inference.card import EngineCard
from emstream.inference.engine import sha256_of
from emstream.inference.flavour import Flavour
from emstream.inference.keep import keep, kept
from emstream.inference.plan import Profile, Record
from emstream.version import VERSION

log = logging.getLogger(__name__)
INPUT, OUTPUT = "raw", "expected_counts"
Progress = Callable[[str, int, int], None]
"""Called with a phase's name, and how many of its steps are done, of how many."""


def input_shape(profile: Profile, batch: int) -> tuple[int, ...]:
    """Shape of the network's input: (B, H, W) float32, or bytes (B, H, W, bytes per pixel)."""
    frame = (batch, profile.height, profile.width)
    return frame if profile.type == "float32" else (*frame, profile.dtype.itemsize)


def build_plan(
    path: Path,
    profile: Profile,
    flavour: Flavour,
    gpu: GpuInfo | None = None,
    *,
    timing_cache: Path | None = None,
    progress: Progress | None = None,
) -> tuple[Record, bytes]:
    """Compile the ONNX engine at `path` for `profile`, on `gpu`.

    Raises EngineNotFound, EngineInvalid, EngineUnavailable (this flavour needs a GPU), or
    EngineError with TensorRT's own reason.
    """
    if gpu is None and not flavour.portable:
        raise EngineUnavailable(
            f"{flavour.name} {flavour.version} builds on the GPU that the plan is for, and there is none; "
            "TensorRT for RTX builds without one: pip install 'emstream[rtx]', then --flavour tensorrt-rtx"
        )
    model = _read(path)
    card = _card(model, path)
    precision = _precision(model)
    compiled = _compile(_with_raw_input(model, profile), profile, flavour, gpu, timing_cache, progress)
    local = gpu if not flavour.portable or _unlisted(flavour, gpu) else None
    record = Record(
        onnx=str(path),
        onnx_sha256=sha256_of(path),
        flavour=flavour.name,
        version=flavour.version,
        gpu=local.name if local else None,
        capability=local.capability if local else None,
        driver=local.driver if local else None,
        precision=precision,
        profile=profile,
        built=datetime.now(UTC).isoformat(timespec="seconds"),
        emstream=VERSION,
        card=card,
    )
    return record, compiled


def read_card(path: Path) -> EngineCard:
    """The card in an ONNX engine."""
    return _card(_read(path), path)


def _card(model: Any, path: Path) -> EngineCard:
    return EngineCard.from_metadata({each.key: each.value for each in model.metadata_props}, where=str(path))


def _read(path: Path) -> Any:
    try:
        import onnx
    except ImportError:
        raise EngineUnavailable(
            "building plans needs the onnx package: pip install 'emstream[rtx]' or 'emstream[gpu]'"
        ) from None
    if not path.is_file():
        raise EngineNotFound(f"no model at {path}; train.fit and train.export make one")
    try:
        model = onnx.load(path)
        if not model.graph.input:
            raise ValueError("it has no graph")
        return model
    except Exception as error:  # protobuf's own error classes
        raise EngineInvalid(f"{path} is not a readable ONNX model: {error}") from None


def _precision(model: Any) -> str:
    from onnx import TensorProto

    names = {TensorProto.FLOAT: "fp32", TensorProto.FLOAT16: "fp16", TensorProto.BFLOAT16: "bf16"}
    weights = {node.input[1] for node in model.graph.node if node.op_type == "Conv"}
    types = {each.data_type for each in model.graph.initializer if each.name in weights}
    return "+".join(sorted(names.get(each, "quantised") for each in types)) or "unknown"


def _with_raw_input(model: Any, profile: Profile) -> Any:
    """`model` with the input `raw` of `input_shape`, in front of what was its input."""
    from onnx import TensorProto, helper, numpy_helper

    graph = model.graph
    counts = graph.input[0].name
    is_float = profile.type == "float32"
    kind = TensorProto.FLOAT if is_float else TensorProto.UINT8
    raw = helper.make_tensor_value_info(INPUT, kind, ["batch", *input_shape(profile, 1)[1:]])
    if is_float:
        nodes = [helper.make_node("Identity", [INPUT], [counts])]
    else:
        weights = (256.0 ** np.arange(profile.dtype.itemsize)).astype(np.float32)
        graph.initializer.append(numpy_helper.from_array(weights, "byte_weights"))
        graph.initializer.append(numpy_helper.from_array(np.array([3], np.int64), "byte_axis"))
        nodes = [
            helper.make_node("Cast", [INPUT], ["raw_bytes"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["raw_bytes", "byte_weights"], ["weighted_bytes"]),
            helper.make_node("ReduceSum", ["weighted_bytes", "byte_axis"], [counts], keepdims=0),
        ]
    graph.input[0].CopyFrom(raw)
    for place, node in enumerate(nodes):
        graph.node.insert(place, node)
    graph.output[0].name, before = OUTPUT, graph.output[0].name
    for node in graph.node:
        for place, name in enumerate(node.output):
            if name == before:
                node.output[place] = OUTPUT
    return model


def _compile(
    model: Any,
    profile: Profile,
    flavour: Flavour,
    gpu: GpuInfo | None,
    timing_cache: Path | None,
    progress: Progress | None,
) -> bytes:
    trt, logger = flavour.module, flavour.logger()
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model.SerializeToString()):
        errors = [parser.get_error(n) for n in range(parser.num_errors)]
        reasons = "; ".join(f"{each.node_operator()} {each.node_name()}: {each.desc()}" for each in errors)
        raise EngineInvalid(f"{flavour.name} cannot read the network: {reasons}")
    config = builder.create_builder_config()
    shapes = builder.create_optimization_profile()
    shapes.set_shape(
        INPUT, *(input_shape(profile, batch) for batch in (1, profile.max_batch, profile.max_batch))
    )
    config.add_optimization_profile(shapes)
    if _unlisted(flavour, gpu):  # build for just this GPU, and see
        config.num_compute_capabilities = 1
        config.set_compute_capability(trt.ComputeCapability.CURRENT, 0)
    if timing_cache is not None:
        config.set_timing_cache(config.create_timing_cache(kept(timing_cache)), False)
    if progress is not None:
        config.progress_monitor = _monitor_class(trt)(progress)
    compiled = builder.build_serialized_network(network, config)
    if compiled is None:
        raise EngineError(f"{flavour.name} {flavour.version} built no plan: {logger.last_error()}")
    if timing_cache is not None:
        keep(timing_cache, bytes(config.get_timing_cache().serialize()))
    return bytes(compiled)


def _unlisted(flavour: Flavour, gpu: GpuInfo | None) -> bool:
    """Whether TensorRT for RTX builds for this GPU only when told to, and then for no other."""
    if gpu is None or not flavour.portable:
        return False
    return not hasattr(flavour.module.ComputeCapability, "SM" + gpu.capability.replace(".", ""))


def _monitor_class(trt: Any) -> type[Any]:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self, progress: Progress) -> None:
            super().__init__()
            self._progress = progress
            self._steps: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self._steps[phase] = steps
            self._progress(phase, 0, steps)

        def step_complete(self, phase: str, step: int) -> bool:
            self._progress(phase, step + 1, self._steps.get(phase, step + 1))
            return True

        def phase_finish(self, phase: str) -> None:
            steps = self._steps.pop(phase, 1)
            self._progress(phase, steps, steps)

    return Monitor
