"""How fast the engines are, beside what the GPU can do; whether the GPU is ever idle."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bench.gpu import engines, networks, service
from bench.gpu.engines import OPENVINO, TORCH, Frames
from bench.gpu.stage import Context, Job, NotMeasured, Setting
from emstream.inference.flavour import FLAVOURS
from emstream.ring import rows_for

SIDE, TYPE, PLAN_BATCH = 512, "uint8", 8
FLOOR_SHARE, UNET128_FPS, LARGE_FPS = 0.6, 1000.0, 25.0
_DRY_SIDE = 64
_EAGER, _COMPILED = "torch eager", "torch.compile max-autotune"  # baselines: the network alone
_TORCH = "emstream torch, {}"  # and PyTorch as an engine
_MODES = ("eager", "max-autotune")


def side(setting: Setting) -> int:
    return _DRY_SIDE if setting.dry else SIDE


# -- every engine, every batch -------------------------------------------------------------


def engine(context: Context) -> None:
    """The shipped recipe first: plans for batches of up to 8. Then what PyTorch makes of the same networks."""
    if "matmul_tflops" not in context.facts:
        try:
            for name, value in context.isolated(engines.ceilings, limit_s=90).items():
                context.fact(name, value)
        except (NotMeasured, RuntimeError) as error:
            context.note(f"No floor: {error}")
    names = ["unet32"] if context.dry else ["unet128", "unet32", "unet64", "wide64", "unet128x6"]
    names = networks.ensure(context, names)
    macs = context.isolated(networks.costs, names, limit_s=60)
    context.fact("macs_per_pixel", macs)
    compiled = [kind for kind in engines.working(context) if kind in FLAVOURS]
    for jobs in _dry_jobs(names) if context.dry else _jobs(names, compiled):
        context.sweep(measure, jobs, limit_s=200)
    _add_shares(context, macs)
    _engine_targets(context, compiled)


def _jobs(names: list[str], compiled: list[str]) -> Iterator[list[Job]]:
    """The most important first; each list is for a process of its own."""
    for name in names:
        for kind in compiled:
            for how in (kind, f"{kind}, no graphs"):
                yield [_job(name, how, batch) for batch in (8, 1, 4, 2)]
    for how in (_EAGER, _COMPILED, *(_TORCH.format(mode) for mode in _MODES)):
        for name in names[:2]:
            yield [_job(name, how, 8)]
    for name in names:
        for kind in compiled:
            yield [_job(name, how, 16) for how in (kind, f"{kind}, no graphs")]
    for how in (_EAGER, _TORCH.format("eager"), _COMPILED, _TORCH.format("max-autotune")):
        for name in names:
            sizes = (1, 8, 4, 2, 16) if "eager" in how else (1, 8)
            yield [_job(name, how, batch) for batch in sizes]


def _dry_jobs(names: list[str]) -> Iterator[list[Job]]:
    for name in names:
        yield [_job(name, OPENVINO, 2)]
        yield [_job(name, how, 2) for how in (_EAGER, _TORCH.format("eager"))]


def _job(name: str, how: str, batch: int) -> Job:
    return {"network": name, "engine": how, "batch": batch}


def measure(setting: Setting, network: str, engine: str, batch: int) -> Job:
    """The network alone, the engine around it, or both."""
    length = side(setting)
    counts = networks.poisson(16, length, length)
    frames = Frames(length, length, TYPE, batch)
    if engine in (_EAGER, _COMPILED):
        mode = _MODES[engine == _COMPILED]
        start_s = time.monotonic()
        compute_ms = engines.compute_torch_ms(setting, network, frames, batch, mode)
        return {"compute_ms": _short(compute_ms / batch), "ready_s": round(time.monotonic() - start_s, 2)}
    found: Job = {}
    if engine.startswith("emstream torch"):
        made, ready_s = engines.opened(setting, TORCH, network, frames, mode=engine.partition(", ")[2])
    else:
        kind, graphs = engine.partition(",")[0], "no graphs" not in engine
        frames = Frames(length, length, TYPE, max(batch, PLAN_BATCH))
        made, ready_s = engines.opened(setting, kind, network, frames, graphs=graphs)
        if kind in FLAVOURS:
            compute_ms = engines.compute_tensorrt_ms(setting, kind, network, frames, batch, graphs)
            found["compute_ms"] = _short(compute_ms / batch)
    rate = engines.saturated(
        setting, made, engines.batches(made, counts, batch, made.depth_for((length, length)))
    )
    return {**found, "engine_ms": _short(1000 / rate), "frames_per_s": round(rate, 1), "ready_s": ready_s}


def _add_shares(context: Context, macs: dict[str, int]) -> None:
    facts, length = context.facts, side(context.setting)
    if not facts.get("matmul_tflops"):
        return
    floors = {name: 2 * cost * length**2 / facts["matmul_tflops"] / 1e9 for name, cost in macs.items()}
    context.fact("floor_ms", {name: _short(ms) for name, ms in floors.items()})
    for row in [row for row in context.rows if "why" not in row]:
        floor_ms = floors[row["network"]]
        shares = {
            f"{what}_share": round(floor_ms / row[f"{what}_ms"], 3)
            for what in ("compute", "engine")
            if f"{what}_ms" in row
        }
        context.row(**{**row, **shares})
    listed = ", ".join(f"{name} {ms:.4f} ms ({macs[name]:,} MAC/pixel)" for name, ms in floors.items())
    context.note(
        f"Measured on this GPU: matrix product {facts['matmul_tflops']:.4g} TFLOP/s, copy "
        f"{facts['copy_tb_per_s']:.3g} TB/s (read and written), {facts['clocks']}. Floors per frame: {listed}."
    )


def _engine_targets(context: Context, compiled: list[str]) -> None:
    def best(name: str, kinds: list[str], key: str) -> float | None:
        """The least of a column."""
        values = [
            row[key]
            for row in context.rows
            if row["network"] == name and row["engine"] in kinds and row.get(key) and "why" not in row
        ]
        return min(values, default=None)

    torch_engines = [_TORCH.format(mode) for mode in _MODES]
    ours = compiled or torch_engines  # where no TensorRT works, emstream's engine is PyTorch's
    spans = {"compute_ms": "compute", "engine_ms": "submit to collect"}
    for key, what in spans.items():
        ms = best("unet128", ours, key)
        floor_ms = context.facts.get("floor_ms", {}).get("unet128")
        share = floor_ms / ms if ms and floor_ms else None
        context.target(
            f"UNet-128, floor / {what}, {' or '.join(ours)}",
            None if share is None else f"{share:.2f}, {1000 / (ms or 1):,.0f} frames/s",
            f"at least {FLOOR_SHARE}, over {UNET128_FPS:,.0f} frames/s on an H200",
            None if share is None else share >= FLOOR_SHARE,
        )
    for name in ("unet32", "unet128"):
        for key, what in spans.items():
            theirs = best(name, [_COMPILED] if key == "compute_ms" else torch_engines, key)
            mine = best(name, compiled, key)
            ratio = theirs / mine if mine and theirs else None
            context.target(
                f"{name}, {what}: torch.compile / {' or '.join(compiled) or 'TensorRT'}",
                None if ratio is None else f"{ratio:.2f}",
                "above 1",
                None if ratio is None else ratio > 1,
            )


# -- sizes ---------------------------------------------------------------------------------


def sizes(context: Context) -> None:
    sides = [64, 128] if context.dry else [4096, 512, 1024, 2048, 256]
    names = networks.ensure(context, ["unet32"] if context.dry else ["unet32", "unet128"])
    kind = next(iter(engines.working(context)), None)
    if kind is None:
        raise NotMeasured("no engine works here")
    largest = max(sides)
    for name in names:
        jobs = [
            {"network": name, "size": f"{length}x{length}", "through": f"{kind} engine", "kind": kind}
            for length in sides
        ]
        context.sweep(_measure_size, jobs, limit_s=100)
        job = {"network": name, "size": f"{largest}x{largest}", "through": "the whole service", "kind": kind}
        context.sweep(_serve_size, [job], limit_s=100)
    for row in sorted(context.rows, key=lambda row: row["through"]):
        if row["network"] == "unet32" and row["size"] == "4096x4096":
            rate = row.get("frames_per_s")
            context.target(
                f"UNet-32, 4096x4096, {row['through']}",
                None if rate is None else f"{rate:.1f} frames/s",
                f"at least {LARGE_FPS:g} frames/s",
                None if rate is None else rate >= LARGE_FPS,
            )


def _measure_size(setting: Setting, network: str, size: str, through: str, kind: str) -> Job:
    length = int(size.partition("x")[0])
    batch = rows_for((length, length), np.dtype(TYPE), PLAN_BATCH)
    frames = Frames(length, length, TYPE, batch)
    made, ready_s = engines.opened(setting, kind, network, frames)
    full = engines.batches(made, networks.poisson(2, length, length), batch, made.depth_for((length, length)))
    rate = engines.saturated(setting, made, full)
    return {**_rates(rate, length), "batch": batch, "ready_s": ready_s}


def _serve_size(setting: Setting, network: str, size: str, through: str, kind: str) -> Job:
    length = int(size.partition("x")[0])
    line = service.line(setting, kind, network, length)
    found = service.closed_loop(line, frames=20 if setting.dry else 150, window=24)
    return {
        **_rates(found["frames_per_s"], length),
        "batch": rows_for((length, length), np.dtype(TYPE), PLAN_BATCH),
    }


def _rates(rate: float, length: int) -> Job:
    return {"frames_per_s": round(rate, 2), "megapixels_per_s": round(rate * length**2 / 1e6, 1)}


# -- idle or not -----------------------------------------------------------------------------

_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
_GAPS_US = (2, 10, 50, 200)
_BY_RATES, _BY_TRACE = "rates", "trace"


def busy(context: Context) -> None:
    """By a trace of one saturated second, if PyTorch's profiler can; and by comparing two rates, which any GPU can."""
    names = networks.ensure(context, ["unet32"] if context.dry else ["unet32", "unet128"])
    kind = TORCH if context.dry else next(iter(engines.working(context)), None)
    if kind is None:
        raise NotMeasured("no engine works here")
    keys = [{"network": name, "engine": kind} for name in names]
    context.sweep(_trace, [{**key, "how": _BY_TRACE} for key in keys], limit_s=80)
    context.sweep(_compare, [{**key, "how": _BY_RATES} for key in keys], limit_s=80)
    for name in names:
        row = context.find(network=name, how=_BY_TRACE) or context.find(network=name, how=_BY_RATES)
        share = row and row["compute_busy"]
        context.target(
            f"{name}: compute stream busy while saturated",
            None if share is None else f"{share:.1%}",
            "nearly always",
            None if share is None else share > 0.95,
        )
    context.note(
        "By rates: the network alone, back to back, over the engine's time from submit to collect; the trace's "
        "own cost is in its figures. Traces (chrome://tracing) lie beside this file as NAME.trace.json.gz."
    )


def _compare(setting: Setting, network: str, engine: str, how: str) -> Job:
    length = side(setting)
    frames = Frames(length, length, TYPE, PLAN_BATCH)
    made, _ = engines.opened(setting, engine, network, frames, mode="reduce-overhead")
    full = engines.batches(
        made, networks.poisson(16, length, length), PLAN_BATCH, made.depth_for((length, length))
    )
    rate = engines.saturated(setting, made, full)
    if engine == TORCH:
        mode = "eager" if setting.dry else "max-autotune"
        alone_ms = engines.compute_torch_ms(setting, network, frames, PLAN_BATCH, mode)
    else:
        alone_ms = engines.compute_tensorrt_ms(setting, engine, network, frames, PLAN_BATCH, graphs=True)
    return {"compute_busy": round(min(1.0, alone_ms * rate / PLAN_BATCH / 1000), 4)}


def _trace(setting: Setting, network: str, engine: str, how: str) -> Job:
    import torch
    from torch.profiler import ProfilerActivity, profile

    activity = ProfilerActivity.CPU if setting.dry else ProfilerActivity.CUDA
    if activity not in torch.profiler.supported_activities():
        raise NotMeasured("PyTorch's profiler cannot see the GPU here")
    with profile(activities=[activity]):  # before any graph is captured, or its kernels go unseen
        torch.zeros(1, device="cpu" if setting.dry else "cuda:0").add_(1)
    length = side(setting)
    frames = Frames(length, length, TYPE, PLAN_BATCH)
    made, _ = engines.opened(setting, engine, network, frames, mode="reduce-overhead")
    full = engines.batches(
        made, networks.poisson(16, length, length), PLAN_BATCH, made.depth_for((length, length))
    )
    engines.saturated(setting, made, full, 0.2)
    with profile(activities=[activity]) as recorded:
        rate = engines.saturated(setting, made, full, 0.8)
    path = setting.out / f"{network}.trace.json"
    recorded.export_chrome_trace(str(path))
    events = json.loads(path.read_text())["traceEvents"]
    _shorten(path, events)
    found = timeline(events, ("cpu_op",) if setting.dry else _WORK)
    print(f"{network}: {rate:.0f} frames/s while traced")
    return found


def timeline(events: list[dict[str, Any]], work: tuple[str, ...] = _WORK) -> Job:
    """How much of the time there was work on the GPU, from the events of a Chrome trace [us]."""
    spans: dict[Any, list[tuple[float, float]]] = {}
    kernels_us: dict[Any, float] = {}
    for event in events:
        if event.get("ph") != "X" or event.get("cat") not in work:
            continue
        stream = event.get("args", {}).get("stream", event.get("tid"))
        spans.setdefault(stream, []).append((event["ts"], event["ts"] + event["dur"]))
        if event["cat"] in (work[0],):
            kernels_us[stream] = kernels_us.get(stream, 0.0) + event["dur"]
    if not kernels_us:
        raise NotMeasured("the trace holds no kernels")
    compute = union(spans[max(kernels_us, key=kernels_us.__getitem__)])
    together = union([span for stream in spans.values() for span in stream])
    start, stop = compute[0, 0], compute[-1, 1]
    gaps = compute[1:, 0] - compute[:-1, 1]
    length = max(stop - start, 1e-9)
    inside = together.clip(start, stop)
    texts = []
    for low, high in zip(_GAPS_US, (*_GAPS_US[1:], np.inf), strict=True):
        chosen = gaps[(gaps >= low) & (gaps < high)]
        label = f"{low}-{high} us" if np.isfinite(high) else f"over {low} us"
        texts.append(f"{label}: {len(chosen):,}, {chosen.sum() / length:.1%}")
    return {
        "compute_busy": round(float((compute[:, 1] - compute[:, 0]).sum() / length), 4),
        "any_busy": round(float((inside[:, 1] - inside[:, 0]).sum() / length), 4),
        "largest_gap_us": round(float(gaps.max(initial=0.0)), 1),
        "gaps": "; ".join(texts),
    }


def union(spans: list[tuple[float, float]]) -> np.ndarray:
    """Spans (N, 2) that do not overlap, in order, covering the same."""
    ordered = np.array(sorted(spans))
    ends = np.maximum.accumulate(ordered[:, 1])
    first = np.concatenate([[True], ordered[1:, 0] > ends[:-1]])
    last = np.concatenate([first[1:], [True]])
    return np.stack([ordered[first, 0], ends[last]], axis=1)


def _shorten(path: Path, events: list[dict[str, Any]], keep_s: float = 0.1) -> None:
    """Keep the last tenth of a second of a trace, gzipped: a whole one is too large to look at."""
    timed = [event for event in events if "ts" in event]
    end = max(
        (event["ts"] + event.get("dur", 0) for event in timed if event.get("cat") in _WORK), default=None
    )
    kept = events if end is None else [e for e in events if "ts" not in e or e["ts"] > end - keep_s * 1e6]
    with gzip.open(path.with_suffix(".json.gz"), "wt") as file:
        json.dump({"traceEvents": kept}, file)
    path.unlink()


def _short(value: float) -> float:
    return float(f"{value:.4g}")
