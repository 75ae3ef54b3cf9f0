"""What ``emstream build`` and ``emstream info x.plan`` do."""

from __future__ import annotations

import logging
import re
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emstream import cuda
from emstream.cuda import GpuInfo
from emstream.errors import CudaError, EmstreamError, EngineUnavailable
from emstream.inference import default_engine
from emstream.inference.build import Progress, build_plan
from emstream.inference.cached import timing_cache
from emstream.inference.flavour import Flavour, installed
from emstream.inference.plan import Profile, read_plan, write_plan

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlanOrder:
    """One plan to build."""

    model: Path
    output: Path
    size: str = "512x512"
    """Rows x columns [px]."""
    type: str = "uint8"
    max_batch: int = 8

    def profile(self) -> Profile:
        match = re.fullmatch(r"(\d+)x(\d+)", self.size)
        if not match:
            raise ValueError(f"size must look like 512x512 (rows x columns), got {self.size!r}")
        return Profile(height=int(match[1]), width=int(match[2]), type=self.type, max_batch=self.max_batch)


def builder(flavour: str | None = None, device: int = 0) -> tuple[Flavour, GpuInfo | None]:
    """The flavour to build with, and the GPU to build for if there is one."""
    try:
        gpus = cuda.devices()
    except CudaError as error:
        log.debug("no GPU: %s", error)
        gpus = []
    if not 0 <= device < max(1, len(gpus)):
        raise ValueError(f"device must be the number of a GPU, of which there are {len(gpus)}, got {device}")
    if flavour is None and not gpus:
        try:
            return installed("tensorrt-rtx"), None  # the one that builds without
        except EngineUnavailable as error:
            log.debug("%s", error)
    return installed(flavour), gpus[device] if gpus else None


def build_one(
    order: PlanOrder, flavour: Flavour, gpu: GpuInfo | None, progress: Progress | None = None
) -> dict[str, Any]:
    """Build a plan and write it; returns its record, path, size and the time it took."""
    profile = order.profile()
    if order.output.suffix != ".plan":
        raise ValueError(f"a plan's name must end in .plan, got {order.output}")
    start = time.monotonic()
    record, compiled = build_plan(
        order.model, profile, flavour, gpu, timing_cache=timing_cache(flavour, gpu), progress=progress
    )
    write_plan(order.output, record, compiled)
    return {
        "plan": str(order.output),
        "plan_mib": round(order.output.stat().st_size / 1024**2, 2),
        "seconds": round(time.monotonic() - start, 2),
        **_flat(record.as_dict()),
    }


def build_all(
    folder: Path, flavour: Flavour, gpu: GpuInfo | None, progress: Progress | None = None
) -> dict[str, Any]:
    """Build every plan of engines/plans.toml into `folder`; those that cannot be built say why."""
    engines = default_engine().parent
    reports: dict[str, Any] = {}
    for name, recipe in tomllib.loads((engines / "plans.toml").read_text()).items():
        order = PlanOrder(engines / f"{name}.onnx", folder / f"{name}.plan", **recipe)
        try:
            reports[name] = build_one(order, flavour, gpu, progress)
        except EmstreamError as error:
            reports[name] = {"error": str(error)}
    return reports


def describe(path: Path, device: str = "auto") -> dict[str, Any]:
    """A plan's record, and whether it runs here; needs no GPU."""
    from emstream.inference import load_engine

    if not path.is_file():
        load_engine(path)  # says what there is instead
    record, _ = read_plan(path)
    try:
        engine = load_engine(path, device=device)
        runs_here = engine.device
        engine.close()
    except EmstreamError as error:
        runs_here = f"no: {error}"
    return {**_flat(record.as_dict()), "rebuild": record.rebuild(path), "runs_here": runs_here}


def _flat(record: dict[str, Any]) -> dict[str, Any]:
    """The record with the card's and the profile's fields beside its own."""
    card, profile = record.pop("card"), record.pop("profile")
    return {**card, **record, **profile}
