"""The machine itself: what is installed, whether emstream's CUDA calls do what they should, its memory."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np

from bench import report
from bench.gpu import engines, networks
from bench.gpu.engines import Frames
from bench.gpu.smi import said
from bench.gpu.stage import Context, Job, NotMeasured, Setting
from emstream.ring import allocate_pageable

_QUERIES = {
    "name": "GPU",
    "compute_cap": "compute capability",
    "driver_version": "driver",
    "memory.total": "memory of the GPU [MiB]",
    "memory.used": "of it used already [MiB]",
    "pcie.link.gen.current": "PCIe generation, now",
    "pcie.link.gen.max": "PCIe generation, at most",
    "pcie.link.width.current": "PCIe lanes, now",
    "pcie.link.width.max": "PCIe lanes, at most",
    "clocks.sm": "clock, now [MHz]",
    "clocks.max.sm": "clock, at most [MHz]",
    "clocks.mem": "memory clock, now [MHz]",
    "clocks.max.mem": "memory clock, at most [MHz]",
    "power.limit": "power limit [W]",
    "temperature.gpu": "temperature [C]",
}
_PACKAGES = {
    "tensorrt": "tensorrt.__version__",
    "tensorrt_rtx": "tensorrt_rtx.__version__",
    "pycuda.driver": "__import__('pycuda').VERSION_TEXT",
    "cuda.bindings.driver": "__import__('cuda.bindings').bindings.__version__",
    "torch": "torch.__version__, torch.version.cuda, torch.cuda.is_available()",
    "cupy": "cupy.__version__",
    "onnx": "onnx.__version__",
    "openvino": "openvino.__version__",
    "zmq": "zmq.__version__, 'libzmq ' + zmq.zmq_version()",
    "triton": "triton.__version__",
}


def machine(context: Context) -> None:
    hardware = report.hardware()
    for what in ("processor", "cores", "memory_gib", "system", "python"):
        context.row(what=what.replace("_gib", " [GiB]"), value=str(hardware[what]))
    for query, what in _QUERIES.items():
        value, why = said(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"])
        context.row(what=what, **({"value": value} if value else {"why": why}))
    for package, version in _PACKAGES.items():
        code = f"import {package}; print(*({version},))"
        value, why = said([sys.executable, "-c", code])
        context.row(what=f"import {package}", **({"value": value} if value else {"why": why}))
    context.row(what="compiler for torch.compile", value=str(said(["cc", "--version"])[0]))


# -- every CUDA call -------------------------------------------------------------------

_CUDA_PACKAGES = {"pycuda": ("pycuda", "_PyCuda"), "cuda-bindings": ("cuda.bindings", "_Bindings")}
_NBYTES = 1 << 20


def cuda(context: Context) -> None:
    """Each line in order; one that fails is followed by a fresh process for the rest."""
    for package in _CUDA_PACKAGES:
        context.sweep(_try, [{"package": package, "what": what} for what in _LINES], limit_s=30)
    tried = [row for row in context.rows if row.get("passed") or ":" in row["why"]]  # no mere NotMeasured
    passed = sum("passed" in row for row in tried)
    context.target(
        "CUDA calls that passed",
        f"{passed} of {len(tried)}" if tried else None,
        "all, through every installed package",
        passed == len(tried) if tried else None,
    )


def _try(setting: Setting, package: str, what: str) -> Job:
    return {"passed": True, "value": _LINES[what](_gpu(package))}


_gpus: dict[str, Any] = {}


def _gpu(package: str) -> Any:
    """GPU 0 through this very package, whatever else is installed."""
    from emstream import cuda

    module, maker = _CUDA_PACKAGES[package]
    if not find_spec(module.partition(".")[0]):
        raise NotMeasured(f"{package} is not installed")
    if not cuda.driver_present():
        raise NotMeasured("there is no NVIDIA driver")
    if package not in _gpus:
        _gpus[package] = getattr(cuda, maker)().open(0)
    return _gpus[package]


def _check(holds: bool, what: str) -> None:
    if not holds:
        raise AssertionError(what)


def _random(nbytes: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)


def _line_info(gpu: Any) -> str:
    info = gpu.info
    return (
        f"{gpu.api}; {info.name}, {info.capability}, CUDA {info.driver}, {info.memory_bytes / 2**30:.1f} GiB"
    )


def _line_pin(gpu: Any) -> str:
    from emstream.cuda import is_pinned

    for write_combined in (False, True):
        memory = gpu.pin(_NBYTES, write_combined=write_combined)
        _check(
            memory.shape == (_NBYTES,) and not memory.any(), "memory is not as long or as empty as asked for"
        )
        _check(is_pinned(memory[100:200]), "a part of it does not count as page-locked")
        memory[:] = _random(_NBYTES, 1)
        _check(bool((memory == _random(_NBYTES, 1)).all()), "it does not keep what is written")
    address = memory.ctypes.data
    view = memory[:10]
    del memory
    _check(is_pinned(view) and view.ctypes.data == address, "a view does not keep the memory")
    return "also write-combined"


def _line_round_trip(gpu: Any) -> str:
    source, target = gpu.pin(_NBYTES), gpu.pin(_NBYTES)
    with gpu.current():
        stream, done, buffer = gpu.stream(), gpu.event(), gpu.allocate(_NBYTES)
        for seed in range(20):
            source[:] = _random(_NBYTES, seed)
            target.fill(0)
            gpu.upload(buffer, source, stream)
            gpu.download(target, buffer, stream)
            gpu.record(done, stream)
            gpu.synchronize(done)
            _check(bool((source == target).all()), f"round {seed} came back different")
        gpu.free(buffer)
    return "20 times 1 MiB"


def _line_part(gpu: Any) -> str:
    """A part of page-locked memory to the start of a larger buffer, as a batch that is not full."""
    source, target = gpu.pin(_NBYTES), gpu.pin(_NBYTES)
    source[:] = _random(_NBYTES, 3)
    with gpu.current():
        stream, done, buffer = gpu.stream(), gpu.event(), gpu.allocate(_NBYTES)
        rows = source.view(np.uint16).reshape(-1, 64, 64)[3:5]
        gpu.upload(buffer, rows, stream)
        gpu.download(target[: rows.nbytes], buffer, stream)
        gpu.record(done, stream)
        gpu.synchronize(done)
        gpu.free(buffer)
    back = target[: rows.nbytes].view(np.uint16).reshape(rows.shape)
    _check(bool((back == rows).all()), "it came back different")
    _check(not target[rows.nbytes :].any(), "it wrote beyond its end")
    return "a slice of uint16 (2, 64, 64)"


def _line_streams(gpu: Any) -> str:
    """Copies on two streams, ordered by an event alone, the first one long."""
    nbytes = 256 << 20
    source, target = gpu.pin(nbytes), gpu.pin(64)
    with gpu.current():
        first, second, uploaded, done = gpu.stream(), gpu.stream(), gpu.event(), gpu.event()
        buffer = gpu.allocate(nbytes)
        for value in range(1, 6):
            source.fill(value)
            gpu.upload(buffer, source, first)
            gpu.record(uploaded, first)
            gpu.wait(second, uploaded)
            gpu.download(target, buffer, second)
            gpu.record(done, second)
            gpu.synchronize(done)
            _check(bool((target == value).all()), f"the second stream did not wait: {target[0]} for {value}")
        gpu.free(buffer)
    return "5 times 256 MiB"


def _line_graph(gpu: Any) -> str:
    if not gpu.has_graphs:
        raise NotMeasured(f"{gpu.api} captures no graphs")
    source, target = gpu.pin(_NBYTES), gpu.pin(_NBYTES)
    with gpu.current():
        stream, done, buffer = gpu.stream(), gpu.event(), gpu.allocate(_NBYTES)
        source[:] = _random(_NBYTES, 1)
        with gpu.capture(stream) as kept:
            gpu.upload(buffer, source, stream)
            gpu.download(target, buffer, stream)
        _check(not target.any(), "capturing copied already")
        for seed in range(2, 6):
            source[:] = _random(_NBYTES, seed)
            gpu.launch(kept[0], stream)
            gpu.record(done, stream)
            gpu.synchronize(done)
            _check(bool((source == target).all()), f"replay {seed} came back different")
        try:
            with gpu.capture(stream):
                raise KeyError
        except KeyError:
            pass
        gpu.upload(buffer, source, stream)
        gpu.record(done, stream)
        gpu.synchronize(done)
        gpu.free(buffer)
    return "4 replays; a capture given up leaves the stream usable"


def _line_latency(gpu: Any) -> str:
    source, target = gpu.pin(512 * 512), gpu.pin(512 * 512)
    times_us = []
    with gpu.current():
        stream, done, buffer = gpu.stream(), gpu.event(), gpu.allocate(512 * 512)
        for _ in range(500):
            start_ns = time.perf_counter_ns()
            gpu.upload(buffer, source, stream)
            gpu.download(target, buffer, stream)
            gpu.record(done, stream)
            gpu.synchronize(done)
            times_us.append((time.perf_counter_ns() - start_ns) / 1e3)
        gpu.free(buffer)
    low, high = np.percentile(times_us, (50, 99))
    return f"256 KiB up and down, slept for: median {low:.0f} us, p99 {high:.0f} us"


def _line_free(gpu: Any) -> str:
    with gpu.current():
        before = gpu.memory_free()
        buffer = gpu.allocate(1 << 30)
        held = before - gpu.memory_free()
        gpu.free(buffer)
        after = gpu.memory_free()
    _check(held >= 1 << 30, f"1 GiB allocated takes {held} bytes")
    _check(before - after < 1 << 28, f"{before - after} bytes stay behind")
    return f"{before / 2**30:.1f} GiB free"


_LINES: dict[str, Callable[[Any], str]] = {
    "open": _line_info,
    "pin": _line_pin,
    "upload and download": _line_round_trip,
    "copy a part": _line_part,
    "events across streams": _line_streams,
    "graph of copies": _line_graph,
    "wait for a copy": _line_latency,
    "free": _line_free,
}


# -- memory ------------------------------------------------------------------------------

_PAGEABLE, _PINNED, _COMBINED = "pageable", "page-locked", "page-locked, write-combined"
_BATCH = 8


def memory(context: Context) -> None:
    """Copies of a batch's size and of a large one; then UNet-32 with its ring in either kind of memory."""
    blocks = [1] if context.dry else [2, 64]
    names = networks.ensure(context, ["unet32"])
    kinds = [_PAGEABLE] if context.dry else [_PAGEABLE, _PINNED, _COMBINED]
    context.sweep(
        _measure_memory,
        [{"memory": kind, "megabytes": size} for size in blocks for kind in kinds],
        limit_s=40,
    )
    kind = next(iter(engines.working(context)), None)
    if kind is None or not names:
        return
    for where in kinds[:2]:
        context.sweep(
            _measure_ring, [{"memory": where, "megabytes": f"the ring's, {kind}", "kind": kind}], limit_s=60
        )
    rates = [
        (context.find(memory=where, megabytes=f"the ring's, {kind}") or {}).get("frames_per_s")
        for where in kinds[:2]
    ]
    if len(rates) == 2 and all(rates):
        context.target(
            "page-locked ring / pageable ring, frames/s",
            f"{rates[1] / rates[0]:.2f}",
            "above 1",
            rates[1] > rates[0],
        )


def _measure_memory(setting: Setting, memory: str, megabytes: int) -> Job:
    nbytes, spare = megabytes * 1_000_000, _random(megabytes * 1_000_000, 0)
    gpu = None
    if not setting.dry:
        from emstream.cuda import open_gpu

        gpu = open_gpu(0)
    if memory == _PAGEABLE:
        held, other = allocate_pageable(nbytes), allocate_pageable(nbytes)
    else:
        assert gpu is not None
        held, other = (gpu.pin(nbytes, write_combined=memory == _COMBINED) for _ in range(2))
    slow = memory == _COMBINED  # reading it takes some 100 times as long
    found: Job = {
        "cpu_write": _rate(setting, nbytes, lambda: np.copyto(held, spare)),
        "cpu_read": _rate(setting, nbytes, lambda: np.copyto(spare, held), seconds=0.05 if slow else 0.5),
    }
    if gpu is None:
        return found
    with gpu.current():
        up, down, done, other_done = gpu.stream(), gpu.stream(), gpu.event(), gpu.event()
        buffers = [gpu.allocate(nbytes) for _ in range(2)]

        def upload() -> None:
            gpu.upload(buffers[0], held, up)
            gpu.record(done, up)

        def download() -> None:
            gpu.download(other, buffers[1], down)
            gpu.record(other_done, down)

        def wait() -> None:
            gpu.synchronize(done)
            gpu.synchronize(other_done)

        def both() -> None:
            upload()
            download()

        upload(), download(), wait()
        for name, copy in {"upload": upload, "download": download, "both": both}.items():
            found[name] = round(nbytes / engines.back_to_back(setting, copy, wait) / 1e6, 2)
        for buffer in buffers:
            gpu.free(buffer)
    return found


def _rate(setting: Setting, nbytes: int, work: Callable[[], Any], seconds: float = 0.5) -> float:
    """GB/s."""
    work()
    end_s, times, start_s = time.perf_counter() + (0.02 if setting.dry else seconds), 0, time.perf_counter()
    while times == 0 or time.perf_counter() < end_s:
        work()
        times += 1
    return round(nbytes * times / (time.perf_counter() - start_s) / 1e9, 3)


def _measure_ring(setting: Setting, memory: str, megabytes: str, kind: str) -> Job:
    side = 64 if setting.dry else 512
    engine, _ = engines.opened(setting, kind, "unet32", Frames(side, side, "uint8", _BATCH))
    full = engines.batches(
        engine,
        networks.poisson(16, side, side),
        _BATCH,
        engine.depth_for((side, side)),
        page_locked=memory == _PINNED,
    )
    return {"frames_per_s": round(engines.saturated(setting, engine, full), 1)}
