"""Engines: a model file made ready to run. `load_engine` picks the one for a file."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from emstream.errors import EngineInvalid, EngineNotFound, EngineUnavailable
from emstream.inference.card import EngineCard
from emstream.inference.engine import Engine, IdentityEngine
from emstream.inference.tiling import TiledEngine

__all__ = ["Engine", "EngineCard", "IdentityEngine", "default_engine", "load_engine"]

_SUFFIXES = ".onnx (OpenVINO, any CPU), .pt2 (PyTorch) or the word identity"


def default_engine() -> Path:
    """The engine that ships with emstream and runs on any CPU."""
    package = Path(__file__).parents[1]
    for folder in (package / "engines", package.parent / "engines"):
        if (path := folder / "unet32.onnx").exists():
            return path
    raise EngineNotFound(f"emstream at {package} came without engines/unet32.onnx; install it again")


def load_engine(
    path: str | Path | None = None, *, precision: str | None = None, threads: int | None = None
) -> Engine:
    """Load an engine from a model file; without a path, the one that ships with emstream.

    `precision` is "bf16" or "f32", by default the fastest this processor has; `threads`
    by default all its cores. Raises EngineNotFound, EngineInvalid or EngineUnavailable.
    """
    if str(path) == "identity":
        return IdentityEngine()
    path = default_engine() if path is None else Path(path)
    if not path.is_file():
        raise EngineNotFound(
            f"no engine at {path}; shipped: {', '.join(map(str, shipped_engines())) or 'none'}"
        )
    if path.suffix == ".onnx":
        from emstream.inference.openvino import OpenVINOEngine

        return TiledEngine(OpenVINOEngine(path, precision=precision, threads=threads))
    if path.suffix == ".pt2":
        if importlib.util.find_spec("torch") is None:
            raise EngineUnavailable(f"{path} needs PyTorch: pip install 'emstream[train]'; {_sibling(path)}")
        from emstream.inference.torch import TorchEngine

        return TiledEngine(TorchEngine(path, threads=threads))
    if path.suffix == ".plan":
        raise EngineUnavailable(
            f"{path} is a TensorRT plan, which this version of emstream cannot run; {_sibling(path)}"
        )
    raise EngineInvalid(f"{path} is no engine: expected {_SUFFIXES}")


def shipped_engines() -> list[Path]:
    """Model files beside the default engine."""
    folder = default_engine().parent
    return sorted(folder.glob("*.onnx"))


def _sibling(path: Path) -> str:
    onnx = path.with_suffix(".onnx")
    return f"{onnx if onnx.exists() else default_engine()} runs here"
