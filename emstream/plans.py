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
from emstream.cuda import Gpu
from emstream.errors import CudaError, EmstreamError, EngineUnavailable
from emstream.inference import check_is_there, default_engine, flavour, load_engine
from emstream.inference.build import Progress, build_plan
from emstream.inference.cached import timing_cache
from emstream.inference.flavour import Flavour
from emstream.inference.keep import check_writable
from emstream.inference.plan import Profile, Record, read_plan, write_plan

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


def builder(name: str | None = None, device: int = 0) -> tuple[Flavour, Gpu | None]:
    """The flavour to build with, and the GPU to build for if there is one."""
    try:
        gpus = cuda.devices()
    except CudaError as error:
        log.debug("no GPU: %s", error)
        gpus = []
    if not 0 <= device < max(1, len(gpus)):
        raise ValueError(f"device must be the number of a GPU, of which there are {len(gpus)}, got {device}")
    if name is None and not gpus:
        try:
            return flavour.installed("tensorrt-rtx"), None  # the one that builds without
        except EngineUnavailable as error:
            log.debug("%s", error)
    return flavour.installed(name), cuda.open_gpu(device) if gpus else None


def build_one(
    order: PlanOrder, flavour: Flavour, gpu: Gpu | None, progress: Progress | None = None
) -> dict[str, Any]:
    """Build a plan and write it; returns its record, path, size and the time it took."""
    profile = order.profile()
    if order.output.suffix != ".plan":
        raise ValueError(f"a plan's name must end in .plan, got {order.output}")
    check_writable(order.output)
    start = time.monotonic()
    timings = timing_cache(flavour, gpu.info if gpu else None)
    record, compiled = build_plan(order.model, profile, flavour, gpu, timing_cache=timings, progress=progress)
    write_plan(order.output, record, compiled)
    return {
        "plan": str(order.output),
        "plan_mib": round(order.output.stat().st_size / 1024**2, 2),
        "seconds": round(time.monotonic() - start, 2),
        **_flat(record.as_dict()),
    }


def build_all(
    folder: Path, flavour: Flavour, gpu: Gpu | None, progress: Progress | None = None
) -> dict[str, Any]:
    """Build every plan of engines/plans.toml into `folder`: {name: report}.

    The report of a model that is not there has only `missing`, of one that cannot be built only `error`.
    """
    engines = default_engine().parent
    reports: dict[str, Any] = {}
    for name, recipe in tomllib.loads((engines / "plans.toml").read_text()).items():
        order = PlanOrder(engines / f"{name}.onnx", folder / f"{name}.plan", **recipe)
        if not order.model.exists():
            command = f"python -m train.export RUN/best.pt {order.model} --test data/test"
            reports[name] = {"missing": f"not built: no model at {order.model}, which is made by: {command}"}
            continue
        try:
            reports[name] = build_one(order, flavour, gpu, progress)
        except EmstreamError as error:
            reports[name] = {"error": str(error)}
    return reports


def describe(path: Path, device: str = "auto") -> dict[str, Any]:
    """A plan's record, and whether it runs here; needs no GPU."""
    check_is_there(path)
    record, _ = read_plan(path)
    try:
        engine = load_engine(path, device=device)
        runs_here = engine.device
        engine.close()
    except EmstreamError as error:
        runs_here = f"no: {(device != 'cpu' and _mismatch(record, path)) or error}"
    return {**_flat(record.as_dict()), "rebuild": record.rebuild(path), "runs_here": runs_here}


def _mismatch(record: Record, path: Path) -> EmstreamError | None:
    """What keeps a plan from the TensorRT that is installed here, whichever GPU there is."""
    try:
        here = flavour.installed_or_other(record.flavour)
    except EngineUnavailable:
        return None
    try:
        record.check(path, flavour=here.name, version=here.version)
    except EngineUnavailable as error:
        return error
    return None


def _flat(record: dict[str, Any]) -> dict[str, Any]:
    """The record with the card's and the profile's fields beside its own, but for the spectra: pages of numbers."""
    card, profile = record.pop("card"), record.pop("profile")
    card.pop("spectra", None)
    return {**card, **record, **profile}
