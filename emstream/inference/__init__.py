"""Engines: a model file made ready to run. `load_engine` picks the one for a file."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

from emstream.errors import CudaError, EngineInvalid, EngineNotFound, EngineUnavailable
from emstream.inference.card import EngineCard
from emstream.inference.engine import Engine, IdentityEngine
from emstream.inference.remote import is_remote, load_remote
from emstream.inference.shared import SharedEngine
from emstream.inference.tiling import TiledEngine

__all__ = ["Engine", "EngineCard", "IdentityEngine", "default_engine", "load_engine"]

log = logging.getLogger(__name__)
PRECISIONS = ("bf16", "f32")
_SUFFIXES = (
    ".onnx (any CPU, or a GPU), .plan (TensorRT), .pt2 (PyTorch), grpc://HOST:8001/MODEL or the word identity"
)


def default_engine() -> Path:
    """The engine that ships with emstream and runs on any CPU."""
    package = Path(__file__).parents[1]
    for folder in (package / "engines", package.parent / "engines"):
        if (path := folder / "wide64.onnx").exists():
            return path
    raise EngineNotFound(f"emstream at {package} came without engines/wide64.onnx; install it again")


def load_engine(
    path: str | Path | None = None,
    *,
    precision: str | None = None,
    threads: int | None = None,
    device: str = "auto",
) -> Engine:
    """Load an engine from a model file; without a path, the one that ships with emstream.

    ``grpc://HOST:8001/MODEL`` is one on an inference server: `emstream.inference.remote`.

    `device` is "cpu", GPU numbers such as "0" or "0,1" that share the batches, or "auto": a
    GPU where there is one with all it needs, and the CPU otherwise. `precision` ("bf16" or
    "f32", by default the fastest this processor has) and `threads` (by default all its
    cores) are for the CPU, and choose it. Raises EngineNotFound, EngineInvalid or
    EngineUnavailable.
    """
    gpus = check_choice(device, precision, threads)
    for_cpu = precision is not None or threads is not None
    if str(path) == "identity":
        return IdentityEngine()
    if is_remote(path):
        if for_cpu or gpus:
            raise ValueError(
                f"precision, threads and device are for engines on this machine, {path} is on a server"
            )
        return load_remote(str(path))
    path = default_engine() if path is None else Path(path)
    check_is_there(path)
    if path.suffix not in (".onnx", ".pt2", ".plan"):
        raise EngineInvalid(f"{path} is no engine: expected {_SUFFIXES}")
    if for_cpu:
        device = "cpu"
    if path.suffix == ".plan":
        if device == "cpu":
            raise EngineUnavailable(f"{path} is a TensorRT plan and needs a GPU; {_sibling(path)}")
        return _on_gpus(path, gpus or [0])
    if path.suffix == ".pt2":
        return _load_torch(path, gpus, device, threads)
    if gpus:
        return _on_gpus(path, gpus)
    if device == "auto" and _worth_trying():
        try:
            return _on_gpus(path, [0])
        except EngineUnavailable as error:
            log.warning("there is a GPU, and the CPU is used: %s", error)
    from emstream.inference.openvino import OpenVINOEngine

    return TiledEngine(OpenVINOEngine(path, precision=precision, threads=threads))


def check_choice(device: str, precision: str | None, threads: int | None) -> list[int]:
    """The GPU numbers in `device`. Raises ValueError for values that make no sense, or not with each other."""
    gpus = _gpus(device)
    if precision is not None and precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    if gpus and (precision is not None or threads is not None):
        raise ValueError(f"precision and threads are for the CPU, and device is {device!r}")
    return gpus


def check_is_there(path: Path) -> None:
    """Raise EngineNotFound, which says what there is instead, when there is no file at `path`."""
    try:
        if path.is_file():
            return
        why = ""
    except OSError as error:  # a folder that may not be entered
        why = f" that can be read ({error.strerror})"
    raise EngineNotFound(
        f"no engine at {path}{why}; shipped: {', '.join(map(str, shipped_engines())) or 'none'}"
    )


def _gpus(device: str) -> list[int]:
    """GPU numbers in `device`; none for "auto" and "cpu"."""
    if device in ("auto", "cpu"):
        return []
    numbers = device.split(",")
    if not all(number.isascii() and number.isdecimal() for number in numbers) or len(set(numbers)) < len(
        numbers
    ):
        raise ValueError(f"device must be auto, cpu or GPU numbers such as 0 or 0,1, got {device!r}")
    return [int(number) for number in numbers]


def _worth_trying() -> bool:
    """Whether there is a GPU that an .onnx can run on; where only a package is missing, say so."""
    from emstream import cuda
    from emstream.inference import flavour

    try:
        first = cuda.devices()[:1]
    except CudaError as error:
        log.debug("no GPU: %s", error)
        if cuda.driver_present():
            log.warning("there is an NVIDIA driver, and the CPU is used: %s", error)
        return False
    if first:
        try:
            flavour.installed()
            return True
        except EngineUnavailable as error:
            log.warning("there is a GPU, %s, and the CPU is used: %s", first[0].name, error)
    return False


def _on_gpus(path: Path, gpus: list[int]) -> Engine:
    """A plan, or an .onnx through cached plans, on one GPU or several."""
    from emstream.cuda import open_gpu
    from emstream.inference import flavour
    from emstream.inference.cached import kernel_cache, load_onnx
    from emstream.inference.plan import read_plan
    from emstream.inference.tensorrt import load_compiled

    try:
        plan = read_plan(path) if path.suffix == ".plan" else None
    except EngineInvalid as error:
        raise EngineInvalid(f"{error}; {_sibling(path)}") from None
    engines: list[Engine] = []
    try:
        for index in gpus:
            gpu = open_gpu(index)
            if plan is None:
                engines.append(load_onnx(path, gpu, flavour.installed()))
            else:
                record, compiled = plan
                chosen = flavour.installed_or_other(record.flavour)
                kernels = kernel_cache(chosen, gpu.info, compiled)
                engines.append(load_compiled(path, record, compiled, gpu, chosen, kernels))
    except BaseException as error:
        for engine in engines:
            engine.close()
        if isinstance(error, (CudaError, EngineUnavailable)):
            raise EngineUnavailable(f"{path} cannot run on a GPU here: {error}; {_sibling(path)}") from None
        raise
    return TiledEngine(engines[0] if len(engines) == 1 else SharedEngine(engines))


def _load_torch(path: Path, gpus: list[int], device: str, threads: int | None) -> Engine:
    if importlib.util.find_spec("torch") is None:
        raise EngineUnavailable(f"{path} needs PyTorch: pip install 'emstream[train]'; {_sibling(path)}")
    from emstream.inference.torch import TorchEngine, cuda_available

    if device == "auto" and cuda_available():
        gpus = [0]
    engines = [TorchEngine(path, device=f"cuda:{index}") for index in gpus]
    if not engines:
        return TiledEngine(TorchEngine(path, threads=threads))
    return TiledEngine(engines[0] if len(engines) == 1 else SharedEngine(engines))


def shipped_engines() -> list[Path]:
    """Model files beside the default engine."""
    folder = default_engine().parent
    return sorted(folder.glob("*.onnx"))


def _sibling(path: Path) -> str:
    """Which engine does run here."""
    near = [path.with_suffix(".onnx"), default_engine().with_name(path.stem + ".onnx"), default_engine()]
    return f"{next(onnx for onnx in near if onnx.exists())} runs on the CPU (--device cpu)"
