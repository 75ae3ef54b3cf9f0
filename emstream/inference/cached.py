"""An .onnx on a GPU: a plan for each frame size and type, built once and kept in the cache folder.

A cached plan's file name holds a digest of all that the plan depends on, so that another
GPU, driver, version or model finds none and builds its own.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from emstream.cuda import Gpu, GpuInfo
from emstream.errors import CudaError, EngineError, EngineNotFound
from emstream.inference.build import build_plan, read_card
from emstream.inference.engine import Engine, sha256_of
from emstream.inference.flavour import Flavour
from emstream.inference.plan import PLAN_TYPES, Profile, Record, read_plan, write_plan
from emstream.inference.tensorrt import load_compiled
from emstream.ring import rows_for
from emstream.version import VERSION

log = logging.getLogger(__name__)
_LARGEST_PX = (4096, 4096)  # larger frames are tiled
_BEST_BATCH = 8
_SAY_EVERY_S = 5.0
_KEPT_PLANS = 4  # loaded at a time; a camera rarely uses more frame sizes than this


def cache_folder() -> Path:
    """Where plans, timings and kernels are kept for this user."""
    from platformdirs import user_cache_path

    return user_cache_path("emstream", appauthor=False)


def timing_cache(flavour: Flavour, gpu: GpuInfo | None) -> Path | None:
    """Where TensorRT's measurements of kernels on this GPU are kept; None for a flavour that measures none."""
    return None if flavour.portable or gpu is None else _per_gpu("timings", flavour, gpu)


def kernel_cache(flavour: Flavour, gpu: GpuInfo, compiled: bytes) -> Path | None:
    """Where a plan's kernels compiled for this GPU are kept; None for a flavour whose plans hold them."""
    if not flavour.portable:
        return None
    place = _per_gpu("kernels", flavour, gpu)
    return place.with_name(f"{place.name}-{hashlib.sha256(compiled).hexdigest()[:16]}")


def _per_gpu(what: str, flavour: Flavour, gpu: GpuInfo) -> Path:
    key = f"{flavour.version}-{gpu.name}-{gpu.capability}-{gpu.driver}".replace(" ", "-").replace("/", "-")
    return cache_folder() / what / f"{flavour.name}-{key}"


class CachedPlan(NamedTuple):
    path: Path
    """Where it is, unless it could not be written."""
    record: Record
    compiled: bytes


def cached_plan(onnx: Path, sha256: str, profile: Profile, flavour: Flavour, gpu: Gpu) -> CachedPlan:
    """The cached plan of `onnx`, built now if there is none yet."""
    info = gpu.info
    depends_on: dict[str, Any] = {"onnx": sha256, "flavour": flavour.name, "version": flavour.version}
    depends_on |= {"emstream": VERSION}
    depends_on |= asdict(profile) | {"gpu": info.name, "capability": info.capability, "driver": info.driver}
    digest = hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()[:16]
    size = f"{profile.height}x{profile.width}-{profile.type}-{profile.max_batch}"
    path = cache_folder() / "plans" / f"{onnx.stem}-{size}-{digest}.plan"
    try:
        return CachedPlan(path, *read_plan(path))
    except EngineNotFound:
        pass
    except EngineError as error:
        log.warning("building a cached plan again: %s", error)
    log.info("building a plan of %s for %s, once: this can take minutes", onnx, profile)
    record, compiled = build_plan(
        onnx, profile, flavour, gpu, timing_cache=timing_cache(flavour, info), progress=_LogProgress()
    )
    try:
        write_plan(path, record, compiled)
        log.info("built %s", path)
    except EngineError as error:
        log.warning("the next start builds this plan again: %s", error)
    return CachedPlan(path, record, compiled)


class _LogProgress:
    """Says every few seconds how far a build is: a service has no terminal to draw a bar on."""

    def __init__(self) -> None:
        self._next_s = time.monotonic() + _SAY_EVERY_S

    def __call__(self, phase: str, done: int, total: int) -> None:
        if time.monotonic() > self._next_s:
            self._next_s = time.monotonic() + _SAY_EVERY_S
            log.info("still building: %s, %d of %d", phase.lower(), done, total)


@dataclass
class _Ticket:
    engine: Engine
    ticket: Any


class CachedPlansEngine(Engine):
    """Runs an .onnx through a plan for each frame size and type that comes.

    One thread may submit while another collects.
    """

    depth = 3
    best_batch = max_batch = _BEST_BATCH
    largest_px = _LARGEST_PX

    def __init__(self, path: Path, gpu: Gpu, device: str, load: Callable[[Profile], Engine]) -> None:
        """`load` makes the engine for one kind of frame."""
        self.card = read_card(path)
        self.name, self.sha256, self.device = self.card.name, sha256_of(path), device
        self._gpu, self._load = gpu, load
        self._engines: OrderedDict[Profile, Engine] = OrderedDict()  # only the thread that submits uses it
        self._refused: dict[Profile, EngineError] = {}
        self._under_way: dict[int, int] = {}
        self._lock = threading.Lock()  # for _under_way; never held while a plan is built or loaded

    def allocate(self, nbytes: int) -> np.ndarray:
        return self._gpu.pin(nbytes)

    def memory_free(self) -> int:
        with self._gpu.current():
            return self._gpu.memory_free()

    def prepare(self, shape: tuple[int, int], dtype: np.dtype[Any]) -> None:
        self._engine(shape, dtype).prepare(shape, dtype)

    def submit(self, counts: np.ndarray, expected: np.ndarray) -> _Ticket:
        engine = self._engine((counts.shape[1], counts.shape[2]), counts.dtype)
        with self._lock:
            self._under_way[id(engine)] += 1
        try:
            return _Ticket(engine, engine.submit(counts, expected))
        except BaseException:
            self._settle(engine)
            raise

    def collect(self, ticket: _Ticket) -> np.ndarray:
        try:
            return ticket.engine.collect(ticket.ticket)
        finally:
            self._settle(ticket.engine)

    def close(self) -> None:
        for engine in self._engines.values():
            engine.close()
        self._engines.clear()

    def _engine(self, shape: tuple[int, int], dtype: np.dtype[Any]) -> Engine:
        """The engine for frames of `shape` and `dtype`."""
        kind = dtype.name if dtype.name in PLAN_TYPES else "float32"
        rows = rows_for(shape, dtype, self.best_batch)  # as the ring's slots, which hold the camera's type
        profile = Profile(height=shape[0], width=shape[1], type=kind, max_batch=rows)
        if profile not in self._engines:
            self._make_room()
            engine = self._loaded(profile)
            self._engines[profile], self._under_way[id(engine)] = engine, 0
            try:
                engine.prepare(shape, dtype)
            except EngineError as error:
                log.warning("the first batches of %s may be late: %s", profile, error)
        self._engines.move_to_end(profile)
        return self._engines[profile]

    def _loaded(self, profile: Profile) -> Engine:
        """A new engine. What cannot be built is not tried again; what the GPU had no room for is."""
        if profile in self._refused:
            raise self._refused[profile].with_traceback(None)
        try:
            return self._load(profile)
        except CudaError:
            raise
        except EngineError as error:
            self._refused[profile] = error
            raise

    def _make_room(self) -> None:
        """Close the engines used longest ago, but for those with batches under way."""
        for profile, engine in list(self._engines.items())[: 1 - _KEPT_PLANS]:
            with self._lock:
                if self._under_way[id(engine)]:
                    continue
                del self._under_way[id(engine)]
            del self._engines[profile]
            engine.close()

    def _settle(self, engine: Engine) -> None:
        with self._lock:
            self._under_way[id(engine)] -= 1


def load_onnx(path: Path, gpu: Gpu, flavour: Flavour) -> Engine:
    """The ONNX engine at `path` on one GPU."""
    digest = sha256_of(path)

    def load(profile: Profile) -> Engine:
        plan = cached_plan(path, digest, profile, flavour, gpu)
        return load_compiled(*plan, gpu, flavour, kernel_cache(flavour, gpu.info, plan.compiled))

    return CachedPlansEngine(path, gpu, f"{gpu.info.name}, {flavour.name} {flavour.version}, {gpu.api}", load)
