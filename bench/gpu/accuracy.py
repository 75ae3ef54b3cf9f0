"""Is what comes out the same as the same network in double precision?

Rows of plain arrays: Poisson counts of 0.45 electrons per pixel in batches of 1 to 8, each batch
twice, results poisoned before. Rows of the ring: batches of raw counts in a ring in the engine's own
memory, as many in flight as it takes, hundreds of them; each result must equal the first of the same
counts bit by bit.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from typing import Any

import numpy as np

from bench.gpu import engines, networks
from bench.gpu.engines import TORCH, Frames
from bench.gpu.networks import Reference
from bench.gpu.stage import Context, Job, Setting
from emstream.cuda import is_pinned
from emstream.frame import FrameHeader, now_ns
from emstream.inference.plan import PLAN_TYPES
from emstream.ring import Ring, Slot, rows_for

TARGET = 1e-2
_BATCHES = range(1, 9)
_BATCH = 8
_PLAIN, _RING = "arrays", "ring"


def correctness(context: Context) -> None:
    names = ["unet32", "unet8"] if context.dry else ["unet32", "unet128", "unet64"]
    sizes = [(50, 38)] if context.dry else [(512, 512), (250, 190), (1024, 1024)]
    references = {
        (name, *size): Reference(name, *size, 2 if size[0] > 512 or context.dry else _BATCH)
        for size in sizes
        for name in names
    }
    names = networks.ensure(context, names, list(references.values()))
    kinds = engines.kinds(context.setting)
    there = [
        (name, size)
        for name, size in itertools.product(names, sizes)
        if references[name, *size].file(context.setting).exists()
    ]
    jobs = sorted(
        (
            {
                "network": name,
                "engine": kind,
                "size": _text(size),
                "type": pixels,
                "memory": memory,
            }
            for name, size in there
            for kind in kinds
            for pixels in (PLAN_TYPES[: 1 if kind == TORCH else 2] if context.dry else PLAN_TYPES)
            for memory in (_PLAIN, _RING)
            if memory == _PLAIN or pixels in ("uint8", "uint16")
        ),
        key=lambda job: _importance(job, sizes),
    )
    usual = [job for job in jobs if (job["size"], job["type"]) == (_text(sizes[0]), PLAN_TYPES[0])]
    for part in (usual, [job for job in jobs if job not in usual]):
        for kind in kinds:
            mine = [job for job in part if job["engine"] == kind]
            if part is usual or context.find(engine=kind):
                context.sweep(measure, mine, limit_s=100)
            else:
                context.skip(mine, "it did not work with the usual size and type")
    for kind in kinds:
        rows = [row for row in context.rows if row["engine"] == kind and "why" not in row]
        worst = max((row["difference"] for row in rows), default=None)
        context.target(
            f"{kind}: largest difference from double precision / maximum, {len(rows)} rows",
            None if worst is None else f"{worst:.1e}",
            f"at most {TARGET:g}",
            None if worst is None else worst <= TARGET,
        )
        equal = [row["repeats_equal"] for row in rows]
        context.target(
            f"{kind}: repeats equal", f"{sum(equal)} of {len(equal)}", "all", all(equal) if equal else None
        )
    context.note(
        "Double precision was computed by PyTorch with the very weights that the files hold"
        + (
            "."
            if context.dry
            else ", on the GPU, whose results for a small frame were compared with the CPU's."
        )
    )


def _text(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _importance(job: Job, sizes: list[tuple[int, int]]) -> tuple[Any, ...]:
    """What the first rows should be: the usual size and type, every network; then more sizes, more types."""
    place = [_text(size) for size in sizes].index(job["size"])
    kind = PLAN_TYPES.index(job["type"])
    return (place + kind, kind, job["network"] != "unet32", job["network"], job["memory"] == _RING)


def measure(setting: Setting, network: str, engine: str, size: str, type: str, memory: str) -> Job:
    height, width = map(int, size.split("x"))
    expected = np.load(Reference(network, height, width, 0).file(setting))
    counts = networks.poisson(len(expected), height, width).astype(type)
    batch = rows_for((height, width), counts.dtype, _BATCH)
    made, ready_s = engines.opened(setting, engine, network, Frames(height, width, type, batch))
    found = (_through_the_ring if memory == _RING else _plainly)(setting, made, counts, expected, batch)
    found["within"] = found["difference"] <= TARGET
    return {**found, "ready_s": ready_s}


def _plainly(
    setting: Setting, engine: Any, counts: np.ndarray, expected: np.ndarray, largest: int
) -> dict[str, Any]:
    difference, equal, sizes = 0.0, True, [n for n in _BATCHES if n <= largest]
    for batch in sizes[::3] if setting.dry else sizes:
        rows = [row % len(counts) for row in range(batch)]
        taken, results = counts[rows], []
        for _ in range(2):
            result = np.full((batch, *counts.shape[1:]), np.nan, np.float32)
            engine.collect(engine.submit(taken, result))
            results.append(result)
            difference = max(difference, _difference(result, expected[rows]))
        equal &= bool(np.array_equal(*results))
    return {"batches": f"{sizes[0]}-{sizes[-1]}", "difference": _short(difference), "repeats_equal": equal}


def _through_the_ring(
    setting: Setting, engine: Any, counts: np.ndarray, expected: np.ndarray, batch: int
) -> dict[str, Any]:
    shape = counts.shape[1:]
    depth = engine.depth_for(shape)
    ring = Ring(slots=depth + 2, max_batch=batch, allocate=engine.allocate)
    first: dict[int, np.ndarray] = {}
    difference, equal, pinned = 0.0, True, True
    in_flight: deque[tuple[Any, Slot, int]] = deque()
    how_many = 6 if setting.dry else 300
    end_s = time.monotonic() + 15

    def settle() -> None:
        nonlocal difference, equal
        ticket, slot, start = in_flight.popleft()
        result = engine.collect(ticket)
        if start not in first:
            first[start] = result.copy()
            rows = [(start + row) % len(counts) for row in range(len(result))]
            difference = max(difference, _difference(result, expected[rows]))
        equal &= bool(np.array_equal(result, first[start]))
        ring.release(slot)

    done = 0
    while done < how_many and time.monotonic() < end_s:
        start = 3 * done % len(counts)  # batches that begin with another frame each time
        for row in range(batch):
            place = ring.reserve(shape, counts.dtype)
            assert place is not None
            place[:] = counts[(start + row) % len(counts)]
            ring.commit(FrameHeader(frame=done * batch + row, shape=shape, type=counts.dtype.name), now_ns())
        slot = ring.claim()
        assert isinstance(slot, Slot)
        slot.expected.fill(np.nan)
        pinned &= is_pinned(slot.counts) and is_pinned(slot.expected)
        in_flight.append((engine.submit(slot.counts, slot.expected), slot, start))
        done += 1
        if len(in_flight) == depth:
            settle()
    while in_flight:
        settle()
    ring.close()
    return {
        "batches": f"{done} of {batch}, {depth} in flight{'' if pinned else ', not page-locked by emstream.cuda'}",
        "difference": _short(difference),
        "repeats_equal": equal,
    }


def _difference(ours: np.ndarray, reference: np.ndarray) -> float:
    """Largest difference over the largest value; infinite where a pixel was not written."""
    if not np.isfinite(ours).all():
        return 1e9
    return float(np.abs(ours - reference).max() / np.abs(reference).max())


def _short(value: float) -> float:
    return float(f"{value:.3g}")
