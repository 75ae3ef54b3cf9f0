"""Engines opened by name, filled to the brim, and their networks timed alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from bench.gpu import networks, smi
from bench.gpu.stage import Context, NotMeasured, Setting
from emstream.inference import Engine
from emstream.inference.flavour import FLAVOURS
from emstream.ring import allocate_pageable

TORCH, OPENVINO = "torch", "openvino"
_MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx", TORCH: "torch", OPENVINO: "openvino"}
_SPAN_S, _DRY_SPAN_S = 0.5, 0.02


@dataclass(frozen=True)
class Frames:
    """What an engine is made for."""

    height: int
    width: int
    type: str
    max_batch: int

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self.type)


def kinds(setting: Setting) -> list[str]:
    """The kinds of engine that are installed, the preferred one first."""
    wanted = (OPENVINO, TORCH) if setting.dry else (*FLAVOURS, TORCH)
    return [kind for kind in wanted if find_spec(_MODULES[kind])]


def device(setting: Setting) -> str:
    """For `emstream.load_engine`."""
    return "cpu" if setting.dry else "0"


@dataclass(frozen=True)
class Plan:
    """A compiled plan and the GPU it is for."""

    gpu: Any
    flavour: Any
    path: Path

    def program(self) -> Any:
        """The plan in TensorRT, where the GPU's context must be current; close it to keep its kernels."""
        from emstream.inference.cached import kernel_cache
        from emstream.inference.plan import read_plan
        from emstream.inference.tensorrt import TensorRTProgram

        record, compiled = read_plan(self.path)
        kernels = kernel_cache(self.flavour, self.gpu.info, compiled)
        return TensorRTProgram(self.flavour, record.profile, compiled, self.path, kernels)


def plan(setting: Setting, kind: str, name: str, frames: Frames) -> Plan:
    """The plan that ``emstream serve --device 0`` with the .onnx would build and keep."""
    from emstream.cuda import open_gpu
    from emstream.inference.cached import cached_plan
    from emstream.inference.engine import sha256_of
    from emstream.inference.flavour import installed
    from emstream.inference.plan import Profile

    gpu, flavour = open_gpu(0), installed(kind)
    onnx = networks.files(setting, name).onnx
    profile = Profile(height=frames.height, width=frames.width, type=frames.type, max_batch=frames.max_batch)
    return Plan(gpu, flavour, cached_plan(onnx, sha256_of(onnx), profile, flavour, gpu).path)


def open_engine(
    setting: Setting, kind: str, name: str, frames: Frames, *, graphs: bool = True, mode: str = "eager"
) -> Engine:
    """An engine ready for `frames`; `graphs` is for TensorRT, `mode` for PyTorch."""
    found = networks.files(setting, name)
    engine: Engine
    if kind == OPENVINO:
        from emstream.inference.openvino import OpenVINOEngine

        engine = OpenVINOEngine(found.onnx)
    elif kind == TORCH:
        from emstream.inference.torch import TorchEngine

        if not found.pt2.exists():
            raise NotMeasured(f"there is no {found.pt2.name}")
        engine = TorchEngine(found.pt2) if setting.dry else TorchEngine(found.pt2, device="cuda:0", mode=mode)
    else:
        from emstream.inference.plan import read_record
        from emstream.inference.tensorrt import TensorRTEngine

        compiled = plan(setting, kind, name, frames)
        record = read_record(compiled.path)
        with compiled.gpu.current():
            program = compiled.program()
        engine = TensorRTEngine(compiled.path, record, compiled.gpu, program, graphs=graphs)
    shape = frames.height, frames.width
    engine.prepare(shape, frames.dtype)
    largest = np.zeros((frames.max_batch, *shape), frames.dtype)
    engine.collect(engine.submit(largest, np.empty(largest.shape, np.float32)))
    return engine


_opened: tuple[Any, Engine] | None = None


def opened(
    setting: Setting, kind: str, name: str, frames: Frames, *, graphs: bool = True, mode: str = "eager"
) -> tuple[Engine, float | None]:
    """`open_engine`, which keeps the last one; and the seconds that took, if it did."""
    global _opened
    key = (kind, name, frames, graphs, mode)
    if _opened is not None and _opened[0] == key:
        return _opened[1], None
    close()
    start_s = time.monotonic()
    _opened = key, open_engine(setting, kind, name, frames, graphs=graphs, mode=mode)
    return _opened[1], round(time.monotonic() - start_s, 2)


def close() -> None:
    """Close the engine that `opened` keeps."""
    global _opened
    if _opened is not None:
        _opened[1].close()
    _opened = None


# -- rates ---------------------------------------------------------------------------


def batches(
    engine: Engine, counts: np.ndarray, batch: int, how_many: int, *, page_locked: bool = True
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Batches of `counts` (N, H, W) in turn, and room for their results, in memory as the ring has it."""
    allocate = engine.allocate if page_locked else allocate_pageable
    made = []
    for index in range(how_many):
        rows = [(index * batch + row) % len(counts) for row in range(batch)]
        taken = allocate(batch * counts[0].nbytes).view(counts.dtype).reshape(batch, *counts.shape[1:])
        taken[:] = counts[rows]
        expected = allocate(4 * taken.size).view(np.float32).reshape(taken.shape)
        made.append((taken, expected))
    return made


def saturated(
    setting: Setting, engine: Engine, full: list[tuple[np.ndarray, np.ndarray]], seconds: float = 1.0
) -> float:
    """Frames/s from submit to collect with as many batches in flight as `full` and the engine have room for."""
    height, width = full[0][0].shape[1:]
    depth = min(len(full), engine.depth_for((height, width)))
    seconds = _DRY_SPAN_S if setting.dry else seconds

    def run(seconds: float) -> float:
        tickets = [engine.submit(*full[place]) for place in range(depth)]
        done, start_s = 0, time.perf_counter()
        while time.perf_counter() < start_s + seconds or done < depth:
            engine.collect(tickets[done % depth])
            tickets[done % depth] = engine.submit(*full[done % depth])
            done += 1
        span_s = time.perf_counter() - start_s
        for place in range(depth):
            engine.collect(tickets[(done + place) % depth])
        return done * len(full[0][0]) / span_s

    run(seconds / 4)
    return run(seconds)


def back_to_back(setting: Setting, launch: Callable[[], None], wait: Callable[[], None]) -> float:
    """Milliseconds per `launch`, `wait` being for all of them."""

    def run(times: int) -> float:
        start_s = time.perf_counter()
        for _ in range(times):
            launch()
        wait()
        return (time.perf_counter() - start_s) / times

    span_s = _DRY_SPAN_S if setting.dry else _SPAN_S
    run(1)
    once_s = run(1 if setting.dry else 5)
    times = max(1, min(20_000, round(span_s / max(once_s, 1e-6))))
    return 1000 * median(run(times) for _ in range(1 if setting.dry else 3))


def compute_tensorrt_ms(
    setting: Setting, kind: str, name: str, frames: Frames, batch: int, graphs: bool
) -> float:
    """One batch, from device memory to device memory, next to others like it on one stream."""
    compiled = plan(setting, kind, name, frames)
    counts = networks.poisson(batch, frames.height, frames.width).astype(frames.type)
    with compiled.gpu.current():  # all that TensorRT made is gone before this ends
        return _compute_tensorrt_ms(setting, compiled, counts, graphs)


def _compute_tensorrt_ms(setting: Setting, compiled: Plan, counts: np.ndarray, graphs: bool) -> float:
    gpu, program = compiled.gpu, compiled.program()
    source = gpu.pin(counts.nbytes)
    source[:] = counts.view(np.uint8).reshape(-1)
    buffers = [gpu.allocate(n) for n in (counts.nbytes, 4 * counts.size, max(1, program.working_bytes))]
    context = program.context(len(counts), *(gpu.address(buffer) for buffer in buffers))
    stream, done = gpu.stream(), gpu.event()

    def wait() -> None:
        gpu.record(done, stream)
        gpu.synchronize(done)

    gpu.upload(buffers[0], source, stream)
    context.execute(gpu.handle(stream))
    wait()
    if not graphs:
        ms = back_to_back(setting, lambda: context.execute(gpu.handle(stream)), wait)
    elif not gpu.has_graphs:
        raise NotMeasured(f"{gpu.api} cannot capture graphs")
    else:
        with gpu.capture(stream) as kept:
            context.execute(gpu.handle(stream))
        ms = back_to_back(setting, lambda: gpu.launch(kept[0], stream), wait)
    program.close()
    for buffer in buffers:
        gpu.free(buffer)
    return ms


def compute_torch_ms(setting: Setting, name: str, frames: Frames, batch: int, mode: str) -> float:
    """The exported module in PyTorch, half precision, channels last; `mode` is eager or one of torch.compile."""
    import torch

    network = networks.half_network(setting, name)
    place = "cpu" if setting.dry else "cuda:0"
    network = network.to(place, memory_format=torch.channels_last)
    counts = torch.from_numpy(networks.poisson(batch, frames.height, frames.width)).to(place)
    if mode != "eager":
        network = torch.compile(network, mode=mode, dynamic=False)
    if not setting.dry:
        torch.backends.cudnn.benchmark = True
    with torch.inference_mode():
        for _ in range(1 if setting.dry else 3):
            network(counts)
        return back_to_back(
            setting,
            lambda: network(counts),
            (lambda: None) if setting.dry else torch.cuda.synchronize,
        )


# -- what this GPU can do ----------------------------------------------------------------


def ceilings(setting: Setting) -> dict[str, Any]:
    """{matmul_tflops, clocks, copy_tb_per_s}: half-precision matrix product; a copy, bytes read and written."""
    import torch

    side, n_bytes = (256, 1 << 20) if setting.dry else (8192, 1 << 32)
    place, kind = ("cpu", torch.float32) if setting.dry else ("cuda:0", torch.float16)
    a, b = (torch.randn(side, side, device=place, dtype=kind) for _ in range(2))
    product = torch.empty_like(a)
    source = torch.randint(0, 255, (n_bytes,), device=place, dtype=torch.uint8)
    target = torch.empty_like(source)
    wait = (lambda: None) if setting.dry else torch.cuda.synchronize
    multiply_ms = back_to_back(setting, lambda: torch.matmul(a, b, out=product), wait)
    for _ in range(
        0 if setting.dry else round(2000 / multiply_ms)
    ):  # two seconds of work to look at meanwhile
        torch.matmul(a, b, out=product)
    clocks = smi.clocks()
    wait()
    copy_ms = back_to_back(setting, lambda: target.copy_(source), wait)
    return {
        "matmul_tflops": round(2 * side**3 / multiply_ms / 1e9, 4),
        "clocks": f"clocks meanwhile: {clocks}",
        "copy_tb_per_s": round(2 * n_bytes / copy_ms / 1e9, 4),
    }


# -- which of them works -------------------------------------------------------------------


def working(context: Context) -> list[str]:
    """The kinds of engine that work here, the preferred one first.

    Those with a good row under correctness; where there is no such row yet, the first that denoises a frame.
    """
    here = kinds(context.setting)
    checked = context.known.get("correctness", {}).get("rows", [])
    if good := {row["engine"] for row in checked if row.get("within")}:
        return [kind for kind in here if kind in good]
    for kind in here:
        try:
            context.isolated(_try, kind, limit_s=90)
            return [kind]
        except (NotMeasured, RuntimeError) as error:
            context.note(f"{kind} does not work here: {error}")
    return []


def _try(setting: Setting, kind: str) -> None:
    side = 64 if setting.dry else 512
    engine = open_engine(setting, kind, "unet32", Frames(side, side, "uint8", 8))
    engine.denoise(networks.poisson(1, side, side))
    engine.close()
