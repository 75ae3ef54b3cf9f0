"""How fast is the same network in OpenVINO, ONNX Runtime and PyTorch, on this machine, in one run?

All engines are loaded into one process and take turns: in each repeat every engine gets one
untimed frame, so that its threads and caches are awake and its predecessor's asleep, and then
--frames timed ones. Every engine may use --threads threads.

Timed span: from uint8 counts (1, H, W) in memory to float32 expected counts (1, H, W) in memory,
one frame at a time, conversion to the type that the engine takes included. A time is the median
over the frames of all repeats; a ratio is the median over repeats of the ratio of medians.

Engines are shipped in half precision. ONNX Runtime would compute that on a CPU with a cast around
every node, so it gets the same graph with its weights and casts widened to float32, which is what it
is fastest at. The weights are the same numbers in every engine.

The difference of outputs is max |a - b| / max |b| against ONNX Runtime in fp32.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from bench import report
from emstream.errors import EmstreamError
from emstream.inference import Engine, default_engine

Denoise = Callable[[np.ndarray], np.ndarray]

BASELINES = {"onnxruntime": 2.5, "torch": 4.0}  # how many times faster the CPU engine is to be
AGREEMENT = 1e-2  # largest relative difference of outputs
NAMES = {
    "openvino_bf16": "OpenVINO, bf16 (emstream)",
    "openvino_f32": "OpenVINO, f32 (emstream)",
    "onnxruntime": "ONNX Runtime, f32",
    "torch": "PyTorch eager, f32",
}
DOSE = 0.45  # electrons/pixel


class NotMeasured(Exception):
    """Why an engine has no row of numbers."""


def main(argv: list[str] | None = None) -> dict[str, Any]:
    argv = sys.argv[1:] if argv is None else argv
    parser = report.parser("engines", __doc__)
    parser.add_argument(
        "--engine", type=Path, help="an .onnx; its .pt2 beside it (default: the shipped engine)"
    )
    parser.add_argument(
        "--repeats", type=int, default=12, help="turns of every engine (default: %(default)s)"
    )
    parser.add_argument("--frames", type=int, default=5, help="timed in each turn (default: %(default)s)")
    parser.add_argument("--size", type=int, default=512, help="frames of SIZE x SIZE (default: %(default)s)")
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count(), help="of each engine (default: %(default)s)"
    )
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.repeats, arguments.frames, arguments.size = 2, 1, min(arguments.size, 128)
    path = arguments.engine or default_engine()

    counts = specimen_counts(arguments.size)
    engines, reasons = _load(path, arguments.threads)
    outputs: dict[str, np.ndarray] = {}
    times_ms: dict[str, list[list[float]]] = {name: [] for name in engines}
    with report.progress("engines", arguments.repeats * len(engines)) as show:
        for repeat in range(arguments.repeats):
            for turn, (name, denoise) in enumerate(engines.items()):
                show(repeat * len(engines) + turn, NAMES[name])
                outputs[name] = denoise(counts)
                times_ms[name].append([_time_ms(denoise, counts) for _ in range(arguments.frames)])

    results = {
        **report.stamp("engines", argv),
        "network": path.name,
        "size": arguments.size,
        "threads": arguments.threads,
        "engines": {
            name: _row(name, times_ms, outputs) if name in engines else {"not_measured": reasons[name]}
            for name in NAMES
        },
    }
    report.write("engines", "Engines", results, _markdown(results), arguments)
    return results


def specimen_counts(size: int) -> np.ndarray:
    """Poisson counts (1, size, size) uint8 of a lattice seen in projection."""
    y, x = np.mgrid[:size, :size]
    lattice = np.cos(2 * np.pi * x / 17) * np.cos(2 * np.pi * y / 17)
    shade = 0.5 + 0.5 * np.cos(np.pi * np.hypot(x / size - 0.5, y / size - 0.5))
    return (
        np.random.default_rng(0).poisson(DOSE * (1 + 0.5 * lattice * shade), (1, size, size)).astype(np.uint8)
    )


def _time_ms(denoise: Denoise, counts: np.ndarray) -> float:
    start_ns = time.perf_counter_ns()
    denoise(counts)
    return (time.perf_counter_ns() - start_ns) / 1e6


# -- the engines -----------------------------------------------------------------------


def _load(path: Path, threads: int) -> tuple[dict[str, Denoise], dict[str, str]]:
    """The engines that run here, and why the others do not."""
    makers: dict[str, Callable[[], Denoise]] = {
        "openvino_bf16": lambda: _openvino(path, "bf16", threads),
        "openvino_f32": lambda: _openvino(path, "f32", threads),
        "onnxruntime": lambda: _onnxruntime(path, threads),
        "torch": lambda: _torch(path.with_suffix(".pt2"), threads),
    }
    engines: dict[str, Denoise] = {}
    reasons: dict[str, str] = {}
    for name, make in makers.items():
        try:
            engines[name] = make()
        except (NotMeasured, EmstreamError) as error:
            reasons[name] = str(error).replace(str(path.parent) + os.sep, "")
    return engines, reasons


def _openvino(path: Path, precision: str, threads: int) -> Denoise:
    if find_spec("openvino") is None:
        raise NotMeasured("OpenVINO is not installed")
    from emstream.inference.openvino import OpenVINOEngine, core

    if precision == "bf16" and "BF16" not in core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise NotMeasured("this processor has no bfloat16")
    return _through(OpenVINOEngine(path, precision=precision, threads=threads))


def _torch(path: Path, threads: int) -> Denoise:
    if find_spec("torch") is None:
        raise NotMeasured("PyTorch is not installed")
    if not path.exists():
        raise NotMeasured(f"{path.name} is not there; write it with train.export")
    from emstream.inference.torch import TorchEngine

    return _through(TorchEngine(path, threads=threads))


def _through(engine: Engine) -> Denoise:
    def denoise(counts: np.ndarray) -> np.ndarray:
        expected = np.empty(counts.shape, np.float32)
        engine.collect(engine.submit(counts, expected))
        return expected

    return denoise


def _onnxruntime(path: Path, threads: int) -> Denoise:
    for module, name in {"onnxruntime": "ONNX Runtime", "onnx": "the onnx package"}.items():
        if find_spec(module) is None:
            raise NotMeasured(f"{name} is not installed")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(_in_float32(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def denoise(counts: np.ndarray) -> np.ndarray:
        return np.asarray(session.run(None, {name: counts.astype(np.float32)})[0])

    return denoise


def _in_float32(path: Path) -> bytes:
    """The ONNX model at `path` with everything that is half precision in it widened to single."""
    import onnx
    from onnx import AttributeProto, TensorProto, numpy_helper

    def widen(tensor: Any) -> None:
        if tensor.data_type == TensorProto.FLOAT16:
            wide = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(wide, tensor.name))

    model = onnx.load(path)
    for tensor in model.graph.initializer:
        widen(tensor)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.TENSOR:  # of Constant and ConstantOfShape
                widen(attribute.t)
            elif node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT16:
                attribute.i = TensorProto.FLOAT
    for value in (*model.graph.input, *model.graph.output):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT16:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    del model.graph.value_info[:]
    serialized: bytes = model.SerializeToString()
    return serialized


# -- on paper ------------------------------------------------------------------------------


def _row(name: str, times_ms: dict[str, list[list[float]]], outputs: dict[str, np.ndarray]) -> dict[str, Any]:
    frames = [time_ms for turn in times_ms[name] for time_ms in turn]
    low, high = np.percentile(frames, (25, 75))
    return {
        "ms": round(median(frames), 3),
        "quartiles_ms": [round(float(low), 3), round(float(high), 3)],
        "frames": len(frames),
        "frames_per_s": round(1000 / median(frames), 2),
        "times_as_fast_as": {
            other: _ratio(times_ms, name, other) for other in BASELINES if other in times_ms
        },
        "difference": _difference(outputs[name], outputs["onnxruntime"])
        if "onnxruntime" in outputs
        else None,
    }


def _ratio(times_ms: dict[str, list[list[float]]], name: str, other: str) -> float:
    turns = zip(times_ms[other], times_ms[name], strict=True)
    return round(median(median(theirs) / median(ours) for theirs, ours in turns), 3)


def _difference(ours: np.ndarray, reference: np.ndarray) -> float:
    return float(f"{np.abs(ours - reference).max() / np.abs(reference).max():.3g}")


def _markdown(results: dict[str, Any]) -> str:
    columns = [
        "engine", "median [ms/frame]", "quartiles [ms]", "frames/s", "times ONNX Runtime", "times PyTorch",
        "difference from ONNX Runtime",
    ]  # fmt: skip
    rows = []
    for name, row in results["engines"].items():
        if "not_measured" in row:
            rows.append([NAMES[name], f"not measured: {row['not_measured']}", *[None] * 5])
            continue
        times = row["times_as_fast_as"]
        rows.append(
            [
                NAMES[name],
                f"{row['ms']:.1f}",
                "{:.1f} - {:.1f}".format(*row["quartiles_ms"]),
                f"{row['frames_per_s']:.1f}",
                *(f"{times[other]:.2f}" if other in times else None for other in BASELINES),
                None if row["difference"] is None else f"{row['difference']:.1e}",
            ]
        )
    note = (
        f"{results['network']}, frames of {results['size']}x{results['size']} one at a time, {results['threads']} "
        f"threads each. Targets for the engine that emstream runs by default: {BASELINES['onnxruntime']} times ONNX "
        f"Runtime, {BASELINES['torch']} times PyTorch, outputs within {AGREEMENT:g}."
    )
    return report.table(columns, rows) + "\n\n" + note


if __name__ == "__main__":
    main()
