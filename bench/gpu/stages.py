"""The stages, in the order in which they run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One question and the table that answers it."""

    name: str
    question: str
    work: str
    """module:function, called with a `Context`."""
    columns: Mapping[str, str]
    """Key of a row -> title of its column."""
    keys: int
    """How many columns, the first ones, tell rows apart."""
    needs_s: float
    """Less time than this is not worth starting."""
    limit_s: float
    dry_s: float = 45
    """Limit of a dry run."""


STAGES = (
    Stage(
        name="machine",
        question="What is here?",
        work="bench.gpu.machine:machine",
        columns={"what": "what", "value": "value"},
        keys=1,
        needs_s=2,
        limit_s=60,
    ),
    Stage(
        name="cuda",
        question="Does every CUDA call that emstream makes do what it should?",
        work="bench.gpu.machine:cuda",
        columns={"package": "package", "what": "what", "passed": "passed", "value": "value"},
        keys=2,
        needs_s=5,
        limit_s=60,
    ),
    Stage(
        name="correctness",
        question="Is what comes out the same as the same network in double precision?",
        work="bench.gpu.accuracy:correctness",
        columns={
            "network": "network",
            "engine": "engine",
            "size": "size",
            "type": "type",
            "memory": "memory",
            "batches": "batches",
            "difference": "difference / maximum",
            "within": "within 1e-2",
            "repeats_equal": "repeats equal, bit by bit",
            "ready_s": "build, load, compile [s]",
        },
        keys=5,
        needs_s=20,
        limit_s=200,
    ),
    Stage(
        name="engine",
        question="How fast is each engine, frames of 512x512 uint8, and how near to the floor?",
        work="bench.gpu.speed:engine",
        columns={
            "network": "network",
            "engine": "engine",
            "batch": "batch",
            "compute_ms": "compute [ms/frame]",
            "compute_share": "floor / compute",
            "engine_ms": "submit to collect [ms/frame]",
            "frames_per_s": "submit to collect [frames/s]",
            "engine_share": "floor / submit to collect",
            "ready_s": "build, load, compile [s]",
        },
        keys=3,
        needs_s=30,
        limit_s=270,
    ),
    Stage(
        name="service",
        question="What does the whole service reach, 512x512 uint8, and how long does a frame take?",
        work="bench.gpu.service:service",
        columns={
            "network": "network",
            "file": "engine file",
            "load": "load",
            "offered_per_s": "offered [frames/s]",
            "frames_per_s": "got [frames/s]",
            "frames": "frames",
            "p50": "schedule to subscriber, p50 [ms]",
            "p99": "p99",
            "p99_9": "p99.9",
            "max": "max",
            "inside_p50": "received to published, p50 [ms]",
            "inside_p99": "received to published, p99 [ms]",
            "dropped": "dropped",
            "unaccounted": "unaccounted",
            "lost_by_subscriber": "lost by the subscriber",
            "wrong": "wrong or out of order",
            "cpu_ms": "CPU of the service [ms/frame]",
            "late_p99": "camera late, p99 [ms]",
        },
        keys=3,
        needs_s=25,
        limit_s=180,
    ),
    Stage(
        name="lossless",
        question="Do 100,000 frames all arrive when the camera waits (pull+tcp, block)?",
        work="bench.gpu.service:lossless",
        columns={
            "network": "network",
            "frames": "frames",
            "arrived": "arrived",
            "lost": "lost",
            "wrong": "wrong or out of order",
            "unaccounted": "unaccounted",
            "frames_per_s": "frames/s",
            "cpu_ms": "CPU of the service [ms/frame]",
            "ledger": "ledger",
        },
        keys=2,
        needs_s=30,
        limit_s=240,
    ),
    Stage(
        name="sizes",
        question="How does the rate go with the frame's size?",
        work="bench.gpu.speed:sizes",
        columns={
            "network": "network",
            "size": "size",
            "through": "through",
            "batch": "batch",
            "frames_per_s": "frames/s",
            "megapixels_per_s": "Mpx/s",
            "ready_s": "build, load, compile [s]",
        },
        keys=3,
        needs_s=25,
        limit_s=150,
    ),
    Stage(
        name="memory",
        question="What does page-locked memory bring?",
        work="bench.gpu.machine:memory",
        columns={
            "memory": "host memory",
            "megabytes": "block [MB]",
            "upload": "upload [GB/s]",
            "download": "download [GB/s]",
            "both": "both at once, each way [GB/s]",
            "cpu_write": "CPU writes [GB/s]",
            "cpu_read": "CPU reads [GB/s]",
            "frames_per_s": "UNet-32, submit to collect [frames/s]",
        },
        keys=2,
        needs_s=15,
        limit_s=90,
    ),
    Stage(
        name="busy",
        question="Is the GPU ever idle while there is work?",
        work="bench.gpu.speed:busy",
        columns={
            "network": "network",
            "engine": "engine",
            "how": "measured by",
            "compute_busy": "compute stream busy",
            "any_busy": "any stream busy",
            "largest_gap_us": "largest gap [us]",
            "gaps": "gaps of the compute stream: how many, share of the time",
        },
        keys=3,
        needs_s=20,
        limit_s=90,
    ),
    Stage(
        name="soak",
        question="Does the service's memory stay where it is?",
        work="bench.gpu.service:soak",
        columns={
            "network": "network",
            "seconds": "seconds",
            "frames": "frames",
            "frames_per_s": "got [frames/s]",
            "unaccounted": "unaccounted",
            "p50": "schedule to subscriber, p50 [ms]",
            "p99": "p99",
            "max": "max",
            "rss_start_mib": "memory after 2 s [MiB]",
            "rss_end_mib": "at the end [MiB]",
            "growth": "growth",
        },
        keys=1,
        needs_s=40,
        limit_s=600,
    ),
)
