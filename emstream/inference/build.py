"""ONNX -> plan. TensorRT needs the GPU it builds for; TensorRT for RTX needs none.

The network is strongly typed: its precision is what the ONNX file says. The camera's
raw pixels are its input; TensorRT knows no 16- and 32-bit unsigned numbers, so those come
in as bytes and are put together inside.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from emstream.cuda import Gpu
from emstream.errors import EngineError, EngineInvalid, EngineNotFound, EngineUnavailable
from emstream.inference.card import EngineCard
from emstream.inference.engine import sha256_of
from emstream.inference.flavour import Flavour
from emstream.inference.keep import keep, kept
from emstream.inference.plan import Profile, Record
from emstream.version import VERSION

log = logging.getLogger(__name__)
_TURING = "7.5"  # TensorRT for RTX builds for it only when told to, and then for no other
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
    gpu: Gpu | None = None,
    *,
    timing_cache: Path | None = None,
    progress: Progress | None = None,
) -> tuple[Record, bytes]:
    """Compile the ONNX engine at `path` for `profile`, on `gpu`.

    Raises EngineNotFound, EngineInvalid, EngineUnavailable (this flavour needs a GPU),
    EngineError with TensorRT's own reason, or KeyboardInterrupt.
    """
    if gpu is None and not flavour.portable:
        raise EngineUnavailable(
            f"{flavour.name} {flavour.version} builds on the GPU that the plan is for, and there is none; "
            "TensorRT for RTX builds without one: pip install 'emstream[rtx]', then --flavour tensorrt-rtx"
        )
    model = _read(path)
    card = _card(model, path)
    precision = _precision(model)
    model = _with_raw_input(model, profile)
    alone = gpu is not None and (not flavour.portable or gpu.info.capability not in _targets(flavour))
    with gpu.current() if gpu else nullcontext(), _interruptible() as interrupted:
        compiled = _compile(path, model, profile, flavour, alone, timing_cache, progress, interrupted)
    local = gpu.info if gpu and alone else None
    record = Record(
        onnx=str(path.absolute()),
        onnx_sha256=sha256_of(path),
        flavour=flavour.name,
        version=flavour.version,
        gpu=local.name if local else None,
        capability=local.capability if local else None,
        driver=local.driver if local else None,
        device=local.index if local else None,
        targets=() if local else _targets(flavour),
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
    try:
        if not path.is_file():
            raise EngineNotFound(f"no model at {path}; train.fit and train.export make one")
        model = onnx.load(path)
        if not model.graph.input:
            raise ValueError("it has no graph")
    except EngineNotFound:
        raise
    except Exception as error:  # protobuf's own error classes
        raise EngineInvalid(f"{path} is not a readable ONNX model: {error}") from None
    known = {each.name for each in model.graph.initializer}
    inputs = [each for each in model.graph.input if each.name not in known]
    if len(inputs) != 1 or len(model.graph.output) != 1:
        given, made = (", ".join(each.name for each in some) for some in (inputs, model.graph.output))
        raise EngineInvalid(
            f"{path} is no engine: its inputs are {given or 'none'} and its outputs {made or 'none'}, "
            "expected one of each; write engines with: python -m train.export"
        )
    for each in [each for each in model.graph.input if each.name in known]:
        model.graph.input.remove(each)
    return model


def _precision(model: Any) -> str:
    from onnx import TensorProto

    names = {TensorProto.FLOAT: "fp32", TensorProto.FLOAT16: "fp16", TensorProto.BFLOAT16: "bf16"}
    weights = {node.input[1] for node in model.graph.node if node.op_type == "Conv"}
    types = {each.data_type for each in model.graph.initializer if each.name in weights}
    return "+".join(sorted(names.get(each, "quantised") for each in types)) or "unknown"


def _with_raw_input(model: Any, profile: Profile) -> Any:
    """`model` with the input `raw` of `input_shape`, in front of what was its input.

    All other tensors but the output get names of their own.
    """
    from onnx import TensorProto, compose, helper, numpy_helper

    graph = model.graph
    compose.add_prefix_graph(graph, "network/", rename_nodes=False, inplace=True)
    counts = graph.input[0].name
    is_float = profile.type == "float32"
    kind = TensorProto.FLOAT if is_float else TensorProto.UINT8
    raw = helper.make_tensor_value_info(INPUT, kind, ["batch", *input_shape(profile, 1)[1:]])
    if is_float:
        nodes = [helper.make_node("Identity", [INPUT], [counts])]
    else:
        nodes = [helper.make_node("Cast", [INPUT], ["raw_bytes"], to=TensorProto.FLOAT)]
        graph.initializer.append(numpy_helper.from_array(np.array([3], np.int64), "byte_axis"))
        if profile.dtype.itemsize == 1:
            nodes.append(helper.make_node("Squeeze", ["raw_bytes", "byte_axis"], [counts]))
        else:
            weights = (256.0 ** np.arange(profile.dtype.itemsize)).astype(np.float32)
            graph.initializer.append(numpy_helper.from_array(weights, "byte_weights"))
            nodes += [
                helper.make_node("Mul", ["raw_bytes", "byte_weights"], ["weighted_bytes"]),
                helper.make_node("ReduceSum", ["weighted_bytes", "byte_axis"], [counts], keepdims=0),
            ]
    graph.input[0].CopyFrom(raw)
    for place, node in enumerate(nodes):
        graph.node.insert(place, node)
    graph.output[0].name, before = OUTPUT, graph.output[0].name
    for node in graph.node:
        for names in (node.input, node.output):
            for place, name in enumerate(names):
                if name == before:
                    names[place] = OUTPUT
    return model


def _compile(
    path: Path,
    model: Any,
    profile: Profile,
    flavour: Flavour,
    alone: bool,
    timing_cache: Path | None,
    progress: Progress | None,
    interrupted: Callable[[], bool],
) -> bytes:
    """What TensorRT makes of `model`; `alone` builds for just this GPU, listed or not."""
    trt, logger = flavour.module, flavour.logger(errors=logging.DEBUG)  # raised here, and so not logged, too
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model.SerializeToString()):
        errors = [parser.get_error(n) for n in range(parser.num_errors)]
        reasons = "; ".join(f"{each.node_operator()} {each.node_name()}: {each.desc()}" for each in errors)
        raise EngineInvalid(f"{flavour.name} cannot read the network: {reasons}")
    _check_output(path, network, profile, trt)
    config = builder.create_builder_config()
    shapes = builder.create_optimization_profile()
    shapes.set_shape(
        INPUT, *(input_shape(profile, batch) for batch in (1, profile.max_batch, profile.max_batch))
    )
    config.add_optimization_profile(shapes)
    if flavour.portable and alone:
        config.num_compute_capabilities = 1
        config.set_compute_capability(trt.ComputeCapability.CURRENT, 0)
    if timing_cache is not None and not config.set_timing_cache(
        config.create_timing_cache(kept(timing_cache)), False
    ):
        log.warning(
            "this build is as slow as the first one: TensorRT refuses the timings in %s", timing_cache
        )
    config.progress_monitor = _monitor_class(trt)(progress, interrupted)
    compiled = builder.build_serialized_network(network, config)
    if compiled is None or interrupted():
        raise EngineError(f"{flavour.name} {flavour.version} built no plan: {logger.last_error()}")
    if timing_cache is not None and (timings := config.get_timing_cache()) is not None:
        keep(timing_cache, bytes(timings.serialize()))
    return bytes(compiled)


def _check_output(path: Path, network: Any, profile: Profile, trt: Any) -> None:
    made = network.get_output(0)
    shape, wanted = tuple(made.shape), (-1, *profile.shape)
    if shape != wanted or made.dtype != trt.float32:
        found, expected = (
            str(each).replace("-1", "batch") + " " + kind
            for each, kind in ((shape, made.dtype.name.lower()), (wanted, "float32"))
        )
        raise EngineInvalid(
            f"{path} is no engine: of frames {profile.height}x{profile.width} it makes {found}, "
            f"expected {expected}; write engines with: python -m train.export"
        )


def _targets(flavour: Flavour) -> tuple[str, ...]:
    """Compute capabilities that TensorRT for RTX builds for unless told otherwise; none for TensorRT."""
    if not flavour.portable:
        return ()
    numbers = [name[2:] for name in flavour.module.ComputeCapability.__members__ if name.startswith("SM")]
    targets = {f"{number[:-1]}.{number[-1]}" for number in numbers} - {_TURING}
    return tuple(sorted(targets, key=float))


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Signals that come meanwhile only make the function return True; afterwards they do what they do.

    TensorRT calls back into Python, and drops what a signal's own handler would raise there.
    """
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # the only one that gets signals
        yield lambda: False
        return

    def handle(number: int, frame: FrameType | None) -> None:
        came.append(number)

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}
    before = {number: handler for number, handler in before.items() if callable(handler)}
    for number in before:
        signal.signal(number, handle)
    try:
        yield lambda: bool(came)
    except EngineError:
        if not came:
            raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:
        signal.raise_signal(came[0])
        raise EngineError("building the plan was interrupted")


def _monitor_class(trt: Any) -> type[Any]:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Raises nothing: TensorRT would drop it."""

        def __init__(self, progress: Progress | None, interrupted: Callable[[], bool]) -> None:
            super().__init__()
            self._progress, self._interrupted = progress, interrupted
            self._steps: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self._steps[phase] = steps
            self._say(phase, 0, steps)

        def step_complete(self, phase: str, step: int) -> bool:
            self._say(phase, step + 1, self._steps.get(phase, step + 1))
            return not self._interrupted()

        def phase_finish(self, phase: str) -> None:
            steps = self._steps.pop(phase, 1)
            self._say(phase, steps, steps)

        def _say(self, phase: str, done: int, steps: int) -> None:
            if self._progress is None:
                return
            try:
                self._progress(phase, done, steps)
            except Exception as error:
                log.warning("progress is not shown any more: %s", error)
                self._progress = None

    return Monitor
