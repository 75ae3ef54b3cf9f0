"""The engine that runs on any CPU: an ONNX model in OpenVINO, bfloat16 where the CPU has it."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

from emstream.errors import EngineInvalid
from emstream.inference import check_choice
from emstream.inference.card import EngineCard
from emstream.inference.engine import Engine, sha256_of

_KEPT_SHAPES = 4  # compiled models held at a time; a camera rarely uses more frame sizes than this


@dataclass
class _Compiled:
    """The network for one frame size and type, and its idle requests."""

    model: ov.CompiledModel
    idle: list[ov.InferRequest]


@dataclass
class _Ticket:
    compiled: _Compiled
    request: ov.InferRequest
    expected: np.ndarray


@cache
def core() -> ov.Core:
    """One for the process, and for good.

    The thread that first asks OpenVINO for its CPU gets from it the stack that signal handlers run on. With
    the Core that stack goes, and the next signal, a Ctrl-C say, would end the process with a segmentation fault.
    """
    return ov.Core()


class OpenVINOEngine(Engine):
    """Runs a shipped or exported .onnx. Any H and W: the graph pads and crops by itself."""

    def __init__(self, path: Path, *, precision: str | None = None, threads: int | None = None) -> None:
        """Read and check the model; it is compiled for each frame size when that first comes."""
        self._core = core()
        capabilities = self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        precision = precision or ("bf16" if "BF16" in capabilities else "f32")
        check_choice("cpu", precision, threads)
        try:
            self._model = self._core.read_model(path)
        except RuntimeError as error:
            raise EngineInvalid(f"{path} is not a readable ONNX model: {_first_line(error)}") from None
        self.card = EngineCard.from_metadata(_metadata(self._model), where=str(path))
        self.name = self.card.name
        self.sha256 = sha256_of(path)
        self._config: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": precision,
            "PERFORMANCE_HINT": "LATENCY",
            "PERFORMANCE_HINT_NUM_REQUESTS": self.depth,
        }
        if threads:
            self._config["INFERENCE_NUM_THREADS"] = threads
        processor = self._core.get_property("CPU", "FULL_DEVICE_NAME")
        version = ov.get_version().split("-")[0]
        self.device = f"{processor.strip()}, {precision}, OpenVINO {version}"
        self._lock = threading.Lock()
        self._compiled: OrderedDict[tuple[Any, ...], _Compiled] = OrderedDict()

    def submit(self, counts: np.ndarray, expected: np.ndarray) -> _Ticket:
        with self._lock:
            compiled = self._compile(counts)
            request = compiled.idle.pop() if compiled.idle else compiled.model.create_infer_request()
        request.set_input_tensor(ov.Tensor(counts, shared_memory=True))
        request.set_output_tensor(ov.Tensor(expected, shared_memory=True))
        request.start_async()
        return _Ticket(compiled, request, expected)

    def collect(self, ticket: _Ticket) -> np.ndarray:
        ticket.request.wait()
        with self._lock:
            ticket.compiled.idle.append(ticket.request)
        return ticket.expected

    def _compile(self, counts: np.ndarray) -> _Compiled:
        key = (counts.dtype.name, *counts.shape[1:])
        if key in self._compiled:
            self._compiled.move_to_end(key)
            return self._compiled[key]
        model = self._model.clone()
        model.reshape([-1, *counts.shape[1:]])
        steps = ov.preprocess.PrePostProcessor(model)
        steps.input().tensor().set_element_type(ov.Type(counts.dtype))
        self._compiled[key] = _Compiled(self._core.compile_model(steps.build(), "CPU", self._config), idle=[])
        if len(self._compiled) > _KEPT_SHAPES:
            self._compiled.popitem(last=False)
        return self._compiled[key]


def _metadata(model: ov.Model) -> dict[str, str]:
    """The ONNX file's metadata entries, which OpenVINO keeps as run-time information."""
    if not model.has_rt_info(["framework"]):
        return {}
    entries = model.get_rt_info(["framework"]).value
    return {key: str(value.value if hasattr(value, "value") else value) for key, value in entries.items()}


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:200] if lines else type(error).__name__
