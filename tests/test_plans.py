"""Building plans, reading them back, refusing them, and which device an engine ends up on. No GPU is needed."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from emstream import cli, cuda, plans
from emstream.cli import app
from emstream.cuda import GpuInfo
from emstream.errors import CudaError, EngineError, EngineInvalid, EngineNotFound, EngineUnavailable
from emstream.inference import IdentityEngine, cached, default_engine, flavour, load_engine, plan
from emstream.inference import build as building
from emstream.inference.cached import CachedPlansEngine, cached_plan, kernel_cache, timing_cache
from emstream.inference.flavour import Flavour, installed
from emstream.inference.plan import PLAN_TYPES, Profile, Record, read_plan, read_record, write_plan
from emstream.inference.shared import SharedEngine
from emstream.inference.tensorrt import TensorRTEngine
from emstream.inference.tiling import TiledEngine
from emstream.plans import PlanOrder
from tests.doubles.gpu import PretendGpu
from tests.doubles.tensorrt import pretend_tensorrt, record_of

ONNX = default_engine()
PROFILE = Profile(height=64, width=48, type="uint16", max_batch=3)
SMALL = Profile(height=16, width=16, type="uint8", max_batch=1)
NO_DRIVER = "no NVIDIA driver: libcuda.so.1 cannot be loaded"
GPU = GpuInfo(0, "Pretend GPU", "8.9", "13.0", 1 << 30)


@pytest.fixture
def rtx() -> Flavour:
    """TensorRT for RTX, the real one."""
    pytest.importorskip("onnx", reason="building plans needs onnx: pip install 'emstream[rtx]'")
    pytest.importorskip("tensorrt_rtx", reason="building plans needs TensorRT: pip install 'emstream[rtx]'")
    return installed("tensorrt-rtx")


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine has no GPU, whether or not it has one."""

    def fail(*arguments: Any) -> Any:
        raise CudaError(NO_DRIVER)

    monkeypatch.setattr(cuda, "driver_present", lambda: False)
    monkeypatch.setattr(cuda, "devices", fail)
    monkeypatch.setattr(cuda, "open_gpu", fail)


class Machine:
    """A machine with pretended GPUs, and a TensorRT that runs the network of `engine` on them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, gpus: int = 1, real: Any = None) -> None:
        self.gpus = [PretendGpu(n) for n in range(gpus)]
        self.flavour = Flavour("tensorrt-rtx", "1.7", pretend_tensorrt(self.gpus, self._network, real))
        if real is not None:
            self.flavour = replace(self.flavour, version=real.__version__)
        self._engine = load_engine(ONNX, precision="f32")
        monkeypatch.setattr(cuda, "driver_present", lambda: True)
        monkeypatch.setattr(cuda, "devices", lambda: [gpu.info for gpu in self.gpus])
        monkeypatch.setattr(cuda, "open_gpu", self._open)
        monkeypatch.setattr(flavour, "installed", lambda name=None: self.flavour)

    def _network(self, frames: np.ndarray) -> np.ndarray:
        if not frames.any():  # as preparation has it; the network has no bias
            return np.zeros_like(frames)
        return self._engine.denoise(frames)

    def _open(self, index: int) -> PretendGpu:
        if index >= len(self.gpus):
            raise CudaError(f"there is no GPU {index}; this machine has 0 (Pretend GPU)")
        return self.gpus[index]


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache folder."""
    monkeypatch.setattr(cached, "cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache"


def run(*arguments: str | Path) -> Any:
    """Run a command in this process."""
    return CliRunner().invoke(app, [str(each) for each in arguments])


def failure(*arguments: str | Path, code: int) -> str:
    """What a command that fails writes to stderr, on one line."""
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.stderr
    return " ".join(result.stderr.replace("│", " ").split())


def deny(monkeypatch: pytest.MonkeyPatch, name: str, path: Path) -> None:
    """Let the method `name` of just this path fail for want of permission, whoever runs the test."""
    real = getattr(Path, name)

    def call(self: Path, *arguments: Any, **options: Any) -> Any:
        if self == path:
            raise PermissionError(13, "Permission denied", str(self))
        return real(self, *arguments, **options)

    monkeypatch.setattr(Path, name, call)


def plan_at(path: Path, compiled: bytes = b"compiled", **changes: Any) -> Record:
    record = record_of(changes.pop("profile", PROFILE), **changes)
    write_plan(path, record, compiled)
    return record


# -- building and reading back ----------------------------------------------------


@pytest.mark.usefixtures("rtx", "no_gpu")
@pytest.mark.parametrize(
    ("kind", "size"), [("uint8", "64x48"), ("uint16", "250x190"), ("uint32", "33x47"), ("float32", "1x1")]
)
def test_what_is_built_is_read_back(tmp_path: Path, kind: str, size: str) -> None:
    path = tmp_path / "u.plan"
    done = run("build", ONNX, "-o", path, "--size", size, "--type", kind, "--max-batch", "3", "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    height, width = map(int, size.split("x"))
    assert report | {"height": height, "width": width, "type": kind, "max_batch": 3} == report
    assert report["plan"] == str(path)
    assert report["plan_mib"] == round(path.stat().st_size / 1024**2, 2) > 0.5
    told = json.loads(run("info", path, "--json").stdout)
    assert {key: told[key] for key in set(told) & set(report)} == {
        key: report[key] for key in set(report) - {"plan", "plan_mib", "seconds"}
    }
    assert (told["name"], told["flavour"], told["gpu"]) == ("wide64", "tensorrt-rtx", None)
    assert told["onnx_sha256"] == load_engine(ONNX, device="cpu").sha256
    assert told["runs_here"] == (
        f"no: {path} cannot run on a GPU here: {NO_DRIVER}; {ONNX} runs on the CPU (--device cpu)"
    )
    assert [each.name for each in tmp_path.iterdir()] == ["u.plan"]


@pytest.mark.usefixtures("rtx", "no_gpu")
def test_the_command_that_rebuilds_a_plan_rebuilds_it(tmp_path: Path) -> None:
    folder = tmp_path / "my engines"
    folder.mkdir()
    shutil.copy(ONNX, folder / "it's.onnx")
    path = folder / "a plan.plan"
    assert (
        run("build", folder / "it's.onnx", "-o", path, "--size", "40x30", "--max-batch", "2").exit_code == 0
    )
    before, _ = read_plan(path)
    path.unlink()
    words = shlex.split(before.rebuild(path))
    assert words[0] == "emstream"
    assert run(*words[1:]).exit_code == 0
    assert replace(read_record(path), built=before.built) == before


@pytest.mark.usefixtures("rtx", "no_gpu")
def test_what_a_plan_is_can_be_read_without_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("build", ONNX, "--size", "48x32").exit_code == 0
    text = " ".join(run("info", "wide64.plan").stdout.split())
    for piece in ("name wide64", "height 48", "width 32", "type uint8", "max_batch 8", "flavour tensorrt-rtx",
                  "precision fp16", "rebuild emstream build", "runs_here no: wide64.plan"):  # fmt: skip
        assert piece in text


@pytest.mark.usefixtures("no_gpu")
def test_the_command_that_rebuilds_a_plan_works_in_any_folder(
    rtx: Flavour, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(ONNX, tmp_path / "u.onnx")
    monkeypatch.chdir(tmp_path)
    record, _ = building.build_plan(Path("u.onnx"), SMALL, rtx)
    assert record.onnx == str(tmp_path / "u.onnx")


@pytest.mark.usefixtures("no_gpu")
def test_a_plan_is_for_batches_of_one_to_the_largest(rtx: Flavour, monkeypatch: pytest.MonkeyPatch) -> None:
    """As TensorRT itself was told; no GPU is here to ask the plan."""
    shapes, networks = [], []
    real = rtx.module

    class Builder:
        def __init__(self, logger: Any) -> None:
            self._it = real.Builder(logger)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._it, name)

        def create_optimization_profile(self) -> Any:
            shapes.append(self._it.create_optimization_profile())
            return shapes[-1]

        def create_network(self, flags: int) -> Any:
            networks.append(self._it.create_network(flags))
            return networks[-1]

    module = SimpleNamespace(**{name: getattr(real, name) for name in dir(real) if name[0] != "_"})
    module.Builder = Builder
    for kind, pixel in (("uint8", (1,)), ("uint16", (2,)), ("uint32", (4,)), ("float32", ())):
        profile = Profile(height=40, width=30, type=kind, max_batch=5)
        building.build_plan(ONNX, profile, replace(rtx, module=module))
        smallest, usual, largest = shapes[-1].get_shape("raw")
        assert tuple(smallest) == (1, 40, 30, *pixel)
        assert tuple(usual) == tuple(largest) == (5, 40, 30, *pixel)
        network = networks[-1]
        assert (network.num_inputs, network.num_outputs) == (1, 1)
        given, made = network.get_input(0), network.get_output(0)
        assert (given.name, made.name) == ("raw", "expected_counts")
        assert tuple(given.shape) == (-1, 40, 30, *pixel)
        assert given.dtype == (real.float32 if kind == "float32" else real.uint8)
        assert made.dtype == real.float32
        assert tuple(made.shape)[1:] == (40, 30)


@pytest.mark.usefixtures("rtx", "no_gpu")
def test_all_builds_what_it_can_and_says_what_it_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "engines"
    folder.mkdir()
    shutil.copy(ONNX, folder / "small.onnx")
    recipe = 'size = "32x48"\ntype = "uint16"\nmax_batch = 2\n'
    (folder / "plans.toml").write_text(f"[small]\n{recipe}[absent]\n{recipe}")
    monkeypatch.setattr(plans, "default_engine", lambda: folder / "small.onnx")
    done = run("build", "--all", "-o", tmp_path / "out", "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["small"]["plan"] == str(tmp_path / "out" / "small.plan")
    record = read_record(tmp_path / "out" / "small.plan")
    assert record.profile == Profile(height=32, width=48, type="uint16", max_batch=2)
    assert report["absent"] == {
        "missing": f"not built: no model at {folder}/absent.onnx, which is made by: "
        f"python -m train.export RUN/best.pt {folder}/absent.onnx --test data/test"
    }
    brief = run("build", "--all", "-o", tmp_path / "out").stdout
    assert "small.plan" in "".join(brief.split())
    assert "notbuilt:nomodelat" in "".join(brief.split())
    shutil.copy(ONNX, folder / "absent.onnx")
    (folder / "small.onnx").write_bytes(b"this is no ONNX")
    done = run("build", "--all", "-o", tmp_path / "out", "--json")
    assert done.exit_code == 1, "one of two failed"
    assert "is not a readable ONNX model" in json.loads(done.stdout)["small"]["error"]
    assert "plan" in json.loads(done.stdout)["absent"]
    for name in ("small", "absent"):
        (folder / f"{name}.onnx").unlink()
    assert run("build", "--all", "-o", tmp_path / "out").exit_code == 1, "nothing was built"


def test_the_recipes_that_ship_are_possible() -> None:
    recipes = tomllib.loads((ONNX.parent / "plans.toml").read_text())
    assert ONNX.stem in recipes
    for name, recipe in recipes.items():
        PlanOrder(Path(f"{name}.onnx"), Path(f"{name}.plan"), **recipe).profile()


# -- building: what is refused ----------------------------------------------------


@pytest.mark.usefixtures("rtx", "no_gpu")
@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--size", "512"], "size must look like 512x512 (rows x columns), got '512'"),
        (["--size", "0x512"], "a frame needs at least 1x1 pixels, got 0x512"),
        (["--size", "-1x5"], "got '-1x5'"),
        (["--type", "int8"], "pixel type must be one of uint8, uint16, uint32, float32, got 'int8'"),
        (["--max-batch", "0"], "largest batch must be at least 1 frame, got 0"),
        (["--max-batch", "many"], "Invalid value for '--max-batch': "),
        (["--flavour", "tensort"], "flavour must be one of tensorrt, tensorrt-rtx, got 'tensort'"),
        (["--device", "-1"], "device must be the number of a GPU, of which there are 0, got -1"),
        (["--device", "2"], "got 2"),
        (["--device", "first"], "Invalid value for '--device': "),
        (
            ["--size", "1000000x1000000"],
            "at most 2147483647 bytes (of float32: pixels), got 8 frames of 1000000x",
        ),
        (["--max-batch", "100000"], "got 100000 frames of 512x512 uint8: 26214400000"),
        (["-o", "unet32.engine"], "a plan's name must end in .plan, got unet32.engine"),
        (["--all"], "give either MODEL.onnx or --all"),
    ],
)
def test_a_wrong_option_is_named_with_its_value(tmp_path: Path, arguments: list[str], text: str) -> None:
    assert text in failure("build", ONNX, "-o", tmp_path / "u.plan", *arguments, code=2)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("rtx", "no_gpu")
def test_there_must_be_something_to_build() -> None:
    assert "give either MODEL.onnx or --all" in failure("build", code=2)


@pytest.mark.usefixtures("rtx", "no_gpu")
@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["-o", "out", "--size", "64x64", "--type", "float32"], "leave out --size, --type"),
        (["-o", "out", "--max-batch", "2"], "leave out --max-batch"),
        (["-o", "x.plan"], "--all needs a folder for the plans: -o FOLDER, got x.plan"),
        ([], "--all needs a folder for the plans: -o FOLDER, got none"),
    ],
)
def test_an_option_that_all_would_ignore_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert text in failure("build", "--all", *arguments, code=2)
    assert not list(tmp_path.iterdir())


def test_a_gpu_that_is_not_there_cannot_be_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "devices", lambda: [GPU, replace(GPU, index=1)])
    with pytest.raises(ValueError, match="of which there are 2, got 2"):
        plans.builder(None, 2)
    monkeypatch.setattr(cuda, "open_gpu", lambda index: f"GPU {index}")
    monkeypatch.setattr(flavour, "installed", lambda name: Flavour(name or "tensorrt", "10", None))
    assert plans.builder(None, 1) == (Flavour("tensorrt", "10", None), "GPU 1")
    assert plans.builder("tensorrt-rtx", 0)[0].name == "tensorrt-rtx"


@pytest.mark.usefixtures("rtx", "no_gpu")
@pytest.mark.parametrize("content", [b"", b"this is no ONNX", None])
def test_a_file_that_is_no_model_is_named(tmp_path: Path, content: bytes | None) -> None:
    model = tmp_path / "model.onnx"
    model.write_bytes(ONNX.read_bytes()[:5000] if content is None else content)
    text = failure("build", model, "-o", tmp_path / "u.plan", code=1)
    assert f"{model} is not a readable ONNX model" in text


@pytest.mark.usefixtures("no_gpu")
def test_a_model_that_is_missing_is_named(tmp_path: Path, rtx: Flavour) -> None:
    with pytest.raises(
        EngineNotFound, match=r"no model at .*/no\.onnx; train\.fit and train\.export make one"
    ):
        building.build_plan(tmp_path / "no.onnx", SMALL, rtx)


def test_a_model_that_is_missing_is_named_before_what_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(name: str | None = None) -> Flavour:
        raise EngineUnavailable("TensorRT is not installed")

    monkeypatch.setattr(flavour, "installed", nothing)
    text = failure("build", tmp_path / "no.onnx", "-o", tmp_path / "u.plan", code=1)
    assert f"no engine at {tmp_path}/no.onnx; shipped: " in text
    assert "TensorRT is not installed" in failure("build", ONNX, "-o", tmp_path / "u.plan", code=1)


@pytest.mark.usefixtures("rtx", "no_gpu")
def test_a_model_without_a_card_is_refused(tmp_path: Path) -> None:
    import onnx

    model = onnx.load(ONNX)
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "foreign.onnx")
    text = failure("build", tmp_path / "foreign.onnx", "-o", tmp_path / "u.plan", code=1)
    assert "foreign.onnx is not an emstream engine: its metadata lack 'name'" in text
    assert "python -m train.export" in text


@pytest.mark.usefixtures("rtx", "no_gpu")
def test_a_network_that_tensorrt_does_not_know_is_refused_with_its_reason(tmp_path: Path) -> None:
    import onnx

    model = onnx.load(ONNX)
    next(node for node in model.graph.node if node.op_type == "Conv").op_type = "Frobnicate"
    onnx.save(model, tmp_path / "odd.onnx")
    text = failure("build", tmp_path / "odd.onnx", "-o", tmp_path / "u.plan", "--size", "32x32", code=1)
    assert "tensorrt-rtx cannot read the network: " in text
    assert "Frobnicate /network/stem" in text


@pytest.mark.usefixtures("no_gpu")
def test_a_network_that_cannot_be_built_gives_tensorrts_reason_once(
    rtx: Flavour, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(plan, "_MOST_NUMBERS", 10**18)
    text = failure("build", ONNX, "-o", tmp_path / "u.plan", "--size", "100000x100000", code=1)
    assert text.startswith(f"error: {rtx.name} {rtx.version} built no plan: ")
    assert "tensor volume exceeds" in text
    assert not [each for each in caplog.records if each.levelno >= logging.WARNING]
    assert not list(tmp_path.iterdir())


def test_tensorrt_proper_builds_on_a_gpu_only() -> None:
    text = "tensorrt 10 builds on the GPU that the plan is for, and there is none; .* builds without one: pip install"
    with pytest.raises(EngineUnavailable, match=text):
        building.build_plan(ONNX, PROFILE, Flavour("tensorrt", "10", None))


def test_a_flavour_that_is_not_installed_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EngineUnavailable, match=r"tensorrt is not installed: pip install 'emstream\[gpu\]'"):
        installed("tensorrt")
    with pytest.raises(EngineUnavailable, match=r"tensorrt or tensorrt-rtx is not installed: pip install "
                       r"'emstream\[gpu\]' or pip install 'emstream\[rtx\]'"):  # fmt: skip
        installed()


def test_a_flavour_that_is_installed_and_broken_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(name: str) -> Any:
        raise ImportError("libnvinfer.so.10: cannot open shared object file")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(EngineUnavailable):
        installed("tensorrt")
    assert "tensorrt is installed and cannot be imported: libnvinfer.so.10" in caplog.text


@pytest.mark.parametrize(
    ("capability", "name"), [("8.9", None), ("9.0", "Pretend GPU"), ("7.5", "Pretend GPU")]
)
def test_a_plan_for_a_gpu_that_is_not_listed_is_for_that_gpu_alone(
    rtx: Flavour, monkeypatch: pytest.MonkeyPatch, capability: str, name: str | None
) -> None:
    """TensorRT for RTX lists the GPUs it builds for; others get a plan of their own."""
    targets = []
    real = rtx.module

    class Builder:
        def __init__(self, logger: Any) -> None:
            self._it = real.Builder(logger)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._it, name)

        def build_serialized_network(self, network: Any, config: Any) -> bytes:
            count = config.num_compute_capabilities
            targets.append([config.get_compute_capability(n) for n in range(count)])
            return b"compiled"

    module = SimpleNamespace(**{each: getattr(real, each) for each in dir(real) if each[0] != "_"})
    module.Builder = Builder
    gpu = replace(GPU, capability=capability)
    record, _ = building.build_plan(
        ONNX, PROFILE, replace(rtx, module=module), PretendGpu(capability=capability)
    )
    assert record.gpu == name
    assert record.targets == (() if name else ("8.0", "8.6", "8.9", "12.0", "12.1"))
    assert (real.ComputeCapability.CURRENT in targets[0]) == (name is not None)
    if name is not None:
        text = rf"for Pretend GPU \({capability}\), and here is Other \({capability}\)"
        with pytest.raises(EngineUnavailable, match=text):
            record.check(
                Path("u.plan"), flavour=rtx.name, version=rtx.version, gpu=replace(gpu, name="Other")
            )


# -- building: on which GPU, and until when -----------------------------------------


def test_a_plan_is_built_on_the_gpu_that_is_asked_for(
    rtx: Flavour, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(monkeypatch, gpus=3, real=rtx.module)
    machine.gpus[2].info = replace(machine.gpus[2].info, capability="9.0")
    path = tmp_path / "u.plan"
    for number, words in ((1, []), (2, ["--device", "2"])):
        done = run("build", ONNX, "-o", path, "--size", "16x16", "--max-batch", "1", "--device", str(number))
        assert done.exit_code == 0, done.output
        assert [gpu.calls["build"] for gpu in machine.gpus] == [0, 1, number - 1]
        assert read_record(path).rebuild(path).endswith(shlex.join(["--flavour", "tensorrt-rtx", *words]))


def test_plans_for_the_cache_are_built_on_the_gpu_that_runs_them(
    rtx: Flavour, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(monkeypatch, gpus=2, real=rtx.module)
    for gpu in machine.gpus[::-1]:
        cached_plan(ONNX, str(gpu.info.index), SMALL, machine.flavour, gpu)
        assert gpu.calls["build"] == 1


@pytest.mark.usefixtures("no_gpu", "heeds_ctrl_c")
@pytest.mark.parametrize("steps", [0, 3])
def test_a_build_that_is_interrupted_stops_and_says_so(rtx: Flavour, steps: int) -> None:
    seen: list[str] = []

    def progress(phase: str, done: int, total: int) -> None:
        seen.append(phase)
        if len(seen) > steps:
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        building.build_plan(ONNX, SMALL, rtx, progress=progress)
    assert signal.getsignal(signal.SIGINT) is before
    interrupted = len(seen)
    building.build_plan(ONNX, SMALL, rtx, progress=lambda *step: seen.append(step[0]))
    assert len(seen) > 2 * interrupted, "it was built to the end"


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_a_build_reaches_whoever_waits_for_it(rtx: Flavour, number: int) -> None:
    came: list[int] = []
    before = signal.signal(number, lambda number, frame: came.append(number))
    try:
        with pytest.raises(EngineError, match="building the plan was interrupted"):
            building.build_plan(ONNX, SMALL, rtx, progress=lambda *step: signal.raise_signal(number))
    finally:
        signal.signal(number, before)
    assert came == [number]


@pytest.mark.usefixtures("rtx", "no_gpu", "heeds_ctrl_c")
def test_ctrl_c_ends_a_build_and_writes_no_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def phases() -> Iterator[Any]:
        yield lambda *step: signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(cli.build, "_phases", phases)
    assert run("build", ONNX, "-o", tmp_path / "u.plan", "--size", "16x16").exit_code == 130
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("no_gpu")
def test_a_build_in_another_thread_leaves_signals_alone(rtx: Flavour) -> None:
    before, during = signal.getsignal(signal.SIGINT), set()
    made: list[Any] = []

    def build() -> None:
        made.append(building.build_plan(
            ONNX, SMALL, rtx, progress=lambda *step: during.add(signal.getsignal(signal.SIGINT))
        ))  # fmt: skip

    thread = threading.Thread(target=build)
    thread.start()
    thread.join(timeout=60)
    assert made
    assert during == {before}


@pytest.mark.usefixtures("no_gpu")
def test_progress_that_cannot_be_shown_costs_no_plan(rtx: Flavour, caplog: pytest.LogCaptureFixture) -> None:
    def progress(phase: str, done: int, total: int) -> None:
        raise BrokenPipeError("nobody reads this")

    building.build_plan(ONNX, SMALL, rtx, progress=progress)
    assert caplog.text.count("progress is not shown any more: nobody reads this") == 1


@pytest.mark.usefixtures("rtx", "no_gpu")
def test_a_build_whose_stderr_is_no_terminal_writes_nothing_there(tmp_path: Path) -> None:
    done = run("build", ONNX, "-o", tmp_path / "u.plan", "--size", "16x16", "--max-batch", "1")
    assert (done.exit_code, done.stderr) == (0, "")


@pytest.mark.usefixtures("rtx", "no_gpu")
@pytest.mark.parametrize("place", ["file/u.plan", "folder.plan"])
def test_a_place_where_no_plan_can_be_is_named_before_the_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.plan").mkdir()
    monkeypatch.setattr(plans, "build_plan", None)
    assert f"cannot write {tmp_path / place}: " in failure("build", ONNX, "-o", tmp_path / place, code=1)


# -- building: which networks -------------------------------------------------------


def network_of(*nodes: Any, path: Path, given: str = "counts", made: tuple[str, ...] = ("made",),
               shape: tuple[Any, ...] = ("batch", "height", "width"), kind: int = 1) -> Path:  # fmt: skip
    """An ONNX of `nodes` with the card of the shipped one."""
    import onnx

    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        list(nodes), "network", [value(given, 1, ["batch", "height", "width"])],
        [value(name, kind, shape) for name in made],
    )  # fmt: skip
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    model.metadata_props.extend(onnx.load(ONNX).metadata_props)
    onnx.save(model, path)
    return path


def node(operator: str, given: str, made: str, **options: Any) -> Any:
    import onnx

    return onnx.helper.make_node(operator, [given], [made], name=f"the {operator}", **options)


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("names", [
    ("raw", "middle", "made"), ("counts", "raw", "made"), ("counts", "raw_bytes", "byte_axis"),
    ("expected_counts", "raw", "weighted_bytes"), ("counts", "expected_counts", "raw"),
])  # fmt: skip
def test_networks_may_name_their_tensors_as_they_like(
    rtx: Flavour, tmp_path: Path, names: tuple[str, str, str]
) -> None:
    given, middle, made = names
    path = network_of(node("Relu", given, middle), node("Neg", middle, made), path=tmp_path / "u.onnx",
                      given=given, made=(made,))  # fmt: skip
    for kind in ("uint8", "uint16", "float32"):
        building.build_plan(path, replace(SMALL, type=kind), rtx)


@pytest.mark.usefixtures("no_gpu")
def test_an_output_may_be_used_inside_the_network(rtx: Flavour, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    import onnx

    add = onnx.helper.make_node("Add", ["made", "negative"], ["unused"])
    path = network_of(node("Relu", "counts", "made"), node("Neg", "made", "negative"), add,
                      path=tmp_path / "u.onnx")  # fmt: skip
    building.build_plan(path, SMALL, rtx)
    model = building._with_raw_input(onnx.load(path), SMALL)
    counts = poisson((1, 16, 16))
    (made,) = runtime.InferenceSession(model.SerializeToString()).run(None, {"raw": raw_bytes(counts)})
    np.testing.assert_array_equal(made, counts)


@pytest.mark.usefixtures("no_gpu")
def test_a_network_that_makes_something_else_is_refused_with_what_it_makes(
    rtx: Flavour, tmp_path: Path
) -> None:
    path = tmp_path / "u.onnx"
    networks = [
        ([node("Cast", "counts", "made", to=10)], {"kind": 10}, "(batch, 16, 16) half"),
        ([node("Unsqueeze", "counts", "made", axes=[1])], {"shape": None}, "(batch, 1, 16, 16) float"),
        ([node("MaxPool", "counts", "made", kernel_shape=[2], strides=[2])], {}, "(batch, 16, 8) float"),
    ]
    for nodes, options, found in networks:
        network_of(*nodes, path=path, **options)
        if "Unsqueeze" in nodes[0].name:
            import onnx

            model = onnx.load(path)
            model.opset_import[0].version = 11
            onnx.save(model, path)
        text = failure("build", path, "-o", tmp_path / "u.plan", "--size", "16x16", code=1)
        assert f"{path} is no engine: of frames 16x16 it makes {found}" in text
        assert "expected (batch, 16, 16) float" in text
    assert not (tmp_path / "u.plan").exists()


@pytest.mark.usefixtures("rtx", "no_gpu")
def test_a_network_needs_one_input_and_one_output(tmp_path: Path) -> None:
    path = tmp_path / "u.onnx"
    for made, named in (((), "none"), (("made", "other"), "made, other")):
        network_of(node("Relu", "counts", "made"), node("Neg", "counts", "other"), path=path, made=made)
        text = failure("build", path, "-o", tmp_path / "u.plan", "--size", "16x16", code=1)
        assert f"{path} is no engine: its inputs are counts and its outputs {named}, expected one" in text


@pytest.mark.usefixtures("no_gpu")
def test_one_byte_pixels_are_not_multiplied_and_added(rtx: Flavour) -> None:
    onnx = pytest.importorskip("onnx")
    before = {each.op_type for each in onnx.load(ONNX).graph.node}
    model = building._with_raw_input(onnx.load(ONNX), SMALL)
    assert [each.op_type for each in model.graph.node[:2]] == ["Cast", "Squeeze"]
    assert {each.op_type for each in model.graph.node} - before <= {"Cast", "Squeeze"}


# -- the camera's raw bytes -------------------------------------------------------


def raw_bytes(counts: np.ndarray) -> np.ndarray:
    """What is uploaded, as the network takes it: (B, H, W, bytes per pixel) uint8, or float32 itself."""
    if counts.dtype == np.float32:
        return counts
    little = counts.astype(counts.dtype.newbyteorder("<"))
    return little.view(np.uint8).reshape(*counts.shape, counts.dtype.itemsize)


def with_raw_input(kind: str, shape: tuple[int, int], extra: str | None = None) -> tuple[Any, Any]:
    """The shipped network with raw pixels as its input, and as it was; with one of its tensors given out."""
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    plain = onnx.load(ONNX)
    profile = Profile(height=shape[0], width=shape[1], type=kind, max_batch=4)
    model = building._with_raw_input(onnx.load(ONNX), profile)
    onnx.checker.check_model(model)
    if extra is not None:
        value = onnx.helper.make_tensor_value_info(extra, onnx.TensorProto.FLOAT, None)
        model.graph.output.append(value)
    return tuple(runtime.InferenceSession(each.SerializeToString()) for each in (model, plain))


@pytest.mark.parametrize("kind", PLAN_TYPES)
def test_raw_bytes_become_the_counts_they_are(kind: str) -> None:
    """To the last bit up to 2^24, which float32 holds, and to its precision beyond."""
    model, plain = with_raw_input(kind, (8, 16), extra="network/counts")
    rng = np.random.default_rng(0)
    if kind == "float32":
        counts = rng.uniform(0, 1e9, (3, 8, 16)).astype(np.float32)
    else:
        most = np.iinfo(kind).max
        counts = rng.integers(0, most, (3, 8, 16), kind, endpoint=True)
        counts[0] >>= rng.integers(0, 8 * counts.itemsize, (8, 16)).astype(kind)
        counts[1, 0, :8] = [0, 1, 255, most, most - 1, most // 2, most // 2 + 1, most // 256]
    _, seen = model.run(None, {"raw": raw_bytes(counts)})
    assert seen.dtype == np.float32
    exact = counts <= 2**24
    np.testing.assert_array_equal(seen[exact], counts[exact].astype(np.float32))
    np.testing.assert_allclose(seen, counts.astype(np.float64), rtol=2.0**-23)
    assert {each.name for each in plain.get_inputs()} == {"counts"}


@pytest.mark.parametrize("kind", PLAN_TYPES)
@pytest.mark.parametrize(("shape", "dose"), [((33, 47), 0.45), ((64, 32), 200.0), ((16, 16), 0.0)])
def test_raw_bytes_give_the_picture_that_the_counts_give(
    kind: str, shape: tuple[int, int], dose: float
) -> None:
    model, plain = with_raw_input(kind, shape)
    counts = np.random.default_rng(0).poisson(dose, (2, *shape)).clip(0, 255).astype(kind)
    (picture,) = model.run(["expected_counts"], {"raw": raw_bytes(counts)})
    (truth,) = plain.run(None, {"counts": counts.astype(np.float32)})
    np.testing.assert_array_equal(picture, truth)


# -- plan files -------------------------------------------------------------------


def test_a_plan_file_holds_its_record_and_its_plan(tmp_path: Path) -> None:
    compiled = bytes(range(256)) * 50
    record = plan_at(tmp_path / "u.plan", compiled)
    assert read_plan(tmp_path / "u.plan") == (record, compiled)
    assert json.loads(json.dumps(record.as_dict()))["profile"] == asdict(PROFILE)


def test_a_plan_that_ends_early_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    whole, part = tmp_path / "whole.plan", tmp_path / "part.plan"
    plan_at(whole)
    content = whole.read_bytes()
    for length in (*range(64), *range(64, len(content), 7), len(content) - 1):
        part.write_bytes(content[:length])
        with pytest.raises(EngineInvalid, match=rf"{part} .*emstream build .* -o {part}"):
            read_plan(part)


def test_a_plan_with_one_wrong_bit_is_refused_wherever_it_is(tmp_path: Path) -> None:
    path = tmp_path / "u.plan"
    plan_at(path)
    content = path.read_bytes()
    for place in (*range(64), *range(64, len(content), 7), len(content) - 1):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :])
        with pytest.raises(EngineInvalid, match=rf"{path} .*emstream build .* -o {path}"):
            read_plan(path)


def test_a_damaged_plan_is_refused_with_its_own_command_where_that_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "u.plan"
    record = plan_at(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(EngineInvalid) as raised:
        read_plan(path)
    assert str(raised.value) == f"{path} is a damaged plan; build it again: {record.rebuild(path)}"
    assert "--size 64x48 --type uint16 --max-batch 3 --flavour tensorrt-rtx" in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"ftrt\x00\x01\x02", b"PK\x03\x04", None])
def test_a_plan_that_is_not_ours_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "u.plan"
    path.write_bytes(ONNX.read_bytes() if content is None else content)
    text = rf"{path} does not say what it was built from.*build one: emstream build MODEL\.onnx -o {path}"
    with pytest.raises(EngineInvalid, match=text):
        read_record(path)


def test_a_plan_of_another_emstream_names_the_fields_that_differ(tmp_path: Path) -> None:
    path = tmp_path / "u.plan"
    record = record_of(PROFILE)
    older = SimpleNamespace(as_dict=lambda: {"colour": 1} | record.as_dict())
    write_plan(path, older, b"compiled")  # type: ignore[arg-type]
    with pytest.raises(EngineInvalid, match="fields colour are missing or unknown"):
        read_record(path)


@pytest.mark.parametrize(
    ("here", "sides"),
    [
        ({"flavour": "tensorrt"}, ("tensorrt-rtx 1.7", "tensorrt 1.7")),
        ({"version": "1.8"}, ("tensorrt-rtx 1.7", "tensorrt-rtx 1.8")),
        ({"gpu": replace(GPU, name="Other")}, ("Pretend GPU (8.9)", "Other (8.9)")),
        ({"gpu": replace(GPU, capability="9.0")}, ("Pretend GPU (8.9)", "Pretend GPU (9.0)")),
        ({"gpu": replace(GPU, driver="12.8")}, ("CUDA 13.0", "CUDA 12.8")),
        ({"gpu": replace(GPU, driver="9.2")}, ("CUDA 13.0", "CUDA 9.2")),
    ],
)
def test_a_plan_for_something_else_is_refused_with_both_sides_and_the_command(
    here: dict[str, Any], sides: tuple[str, str]
) -> None:
    record = record_of(PROFILE, gpu=GPU.name, capability=GPU.capability, driver=GPU.driver)
    fits: dict[str, Any] = {"flavour": "tensorrt-rtx", "version": "1.7", "gpu": GPU}
    record.check(Path("u.plan"), **fits)
    record.check(Path("u.plan"), **fits | {"gpu": replace(GPU, driver="13.10", index=3)})
    with pytest.raises(EngineUnavailable) as raised:
        record.check(Path("u.plan"), **fits | here)
    command = record.rebuild(Path("u.plan"), flavour=here.get("flavour"))
    for piece in (*sides, "u.plan was built", f"build it again: {command}"):
        assert piece in str(raised.value)
    assert command.endswith(f"--flavour {here.get('flavour', 'tensorrt-rtx')}"), "what can be built here"


def test_a_plan_for_every_gpu_asks_for_none_in_particular() -> None:
    record = record_of(PROFILE)
    for gpu in (GPU, replace(GPU, name="Other", capability="12.0", driver="12.1")):
        record.check(Path("u.plan"), flavour="tensorrt-rtx", version="1.7", gpu=gpu)


@pytest.mark.parametrize("capability", ["9.0", "7.5"])
def test_a_plan_for_many_gpus_is_refused_on_another_with_the_command_for_it(capability: str) -> None:
    gpu = replace(GPU, capability=capability, index=2)
    with pytest.raises(EngineUnavailable) as raised:
        record_of(PROFILE).check(Path("u.plan"), flavour="tensorrt-rtx", version="1.7", gpu=gpu)
    assert "of compute capability 8.0, 8.6, 8.9, 12.0, and here is Pretend GPU" in str(raised.value)
    assert "build it on the machine with that GPU: emstream build engines/pretend.onnx" in str(raised.value)
    assert str(raised.value).endswith(" --device 2")


def test_a_plan_of_another_flavour_is_refused_with_both_and_the_command_for_the_one_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Machine(monkeypatch)
    here = flavour.installed

    def only_rtx(name: str | None = None) -> Flavour:
        if name == "tensorrt":
            raise EngineUnavailable("tensorrt is not installed: pip install 'emstream[gpu]'")
        return here(name)

    monkeypatch.setattr(flavour, "installed", only_rtx)
    for name in ("tensorrt", "evil"):
        plan_at(tmp_path / "u.plan", flavour=name, version="10.1")
        with pytest.raises(EngineUnavailable) as raised:
            load_engine(tmp_path / "u.plan")
        assert f"was built for {name} 10.1, and here is tensorrt-rtx 1.7" in str(raised.value)
        assert "--flavour tensorrt-rtx" in str(raised.value)

    def none(name: str | None = None) -> Flavour:
        raise EngineUnavailable(f"{name} is not installed: pip install")

    monkeypatch.setattr(flavour, "installed", none)
    plan_at(tmp_path / "u.plan", flavour="tensorrt")
    with pytest.raises(EngineUnavailable, match="tensorrt is not installed: pip install"):
        load_engine(tmp_path / "u.plan")


@pytest.mark.usefixtures("rtx", "no_gpu")
@pytest.mark.parametrize("changes", [{"version": "1.5.0.1"}, {"flavour": "evil"}])
def test_what_can_be_compared_without_a_gpu_is(tmp_path: Path, changes: dict[str, Any]) -> None:
    real = installed("tensorrt-rtx")
    record = plan_at(tmp_path / "u.plan", **{"version": real.version} | changes)
    told = json.loads(run("info", tmp_path / "u.plan", "--json").stdout)
    sides = f"{record.flavour} {record.version}, and here is tensorrt-rtx {real.version}"
    assert f"was built for {sides}; build it again" in told["runs_here"]
    told = json.loads(run("info", tmp_path / "u.plan", "--device", "cpu", "--json").stdout)
    assert "is a TensorRT plan and needs a GPU" in told["runs_here"]


@pytest.mark.parametrize("profile", [{"height": 0}, {"width": -1}, {"type": "int8"}, {"max_batch": 0}])
def test_impossible_profiles_are_refused(profile: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"got .*{next(iter(profile.values()))}"):
        replace(PROFILE, **profile)


@pytest.mark.parametrize(
    "changes",
    [
        {"profile": {"max_batch": 2.5}},
        {"profile": {"height": True}},
        {"profile": {"type": None}},
        {"profile": {"colour": 1}},
        {"profile": None},
        {"driver": "abc"},
        {"capability": "nine"},
        {"device": "0"},
        {"targets": [8.9]},
        {"targets": "8.9"},
        {"version": 1.7},
        {"card": {"dose_range": [1]}},
        {"card": {"parameters": "many"}},
        {"card": {"bias_free": 1}},
    ],
)
def test_a_record_whose_fields_are_of_other_types_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = tmp_path / "u.plan"
    values = record_of(PROFILE).as_dict()
    for name, value in changes.items():
        values[name] = values[name] | value if isinstance(value, dict) else value
    write_plan(path, SimpleNamespace(as_dict=lambda: values), b"compiled")  # type: ignore[arg-type]
    with pytest.raises(EngineInvalid, match=rf"{path} is a damaged plan \(.*build it again: emstream build"):
        read_plan(path)


def test_a_plan_without_anything_compiled_is_refused(tmp_path: Path) -> None:
    plan_at(tmp_path / "u.plan", b"")
    with pytest.raises(EngineInvalid, match="it holds no compiled network"):
        read_plan(tmp_path / "u.plan")


@pytest.mark.parametrize("whole", [True, False])
def test_a_record_that_is_nested_without_end_is_refused(tmp_path: Path, whole: bool) -> None:
    path = tmp_path / "u.plan"
    text = b"[" * 100_000
    rest = struct.pack("<Q", len(text)) + text + b"compiled"
    digest = hashlib.sha256(rest).digest() if whole else bytes(32)
    path.write_bytes(plan._MAGIC + digest + rest)
    assert f"{path} is a damaged plan" in failure("info", path, code=1)


@pytest.mark.usefixtures("no_gpu")
def test_a_plan_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "u.plan"
    plan_at(path)
    deny(monkeypatch, "read_bytes", path)
    for command in (["serve", "--input", "sim://", "--engine"], ["info"]):
        assert f"error: cannot read {path}: " in failure(*command, path, code=1)
    deny(monkeypatch, "is_file", path)
    for command in (["serve", "--input", "sim://", "--engine"], ["info"]):
        text = failure(*command, path, code=1)
        assert f"no engine at {path} that can be read (Permission denied); shipped: " in text


# -- writing plans ----------------------------------------------------------------


def test_a_write_that_fails_leaves_the_old_plan_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "u.plan"
    old = plan_at(path)

    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(EngineError, match=rf"cannot write {path}: .*No space left"):
        plan_at(path, b"new")
    monkeypatch.undo()
    assert read_plan(path) == (old, b"compiled")
    assert [each.name for each in tmp_path.iterdir()] == ["u.plan"]


def test_a_write_that_is_killed_leaves_the_old_plan(tmp_path: Path) -> None:
    path = tmp_path / "u.plan"
    old = plan_at(path)
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from emstream.inference import keep\n"
        "Path.replace = lambda self, target: os.kill(os.getpid(), signal.SIGKILL)\n"
        "keep.write_whole(Path(sys.argv[1]), b'half of a plan')\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(path)], timeout=60, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert read_plan(path) == (old, b"compiled")
    new = plan_at(path, b"new")
    assert read_plan(path) == (new, b"new")


@pytest.mark.usefixtures("rtx", "no_gpu")
def test_a_place_where_no_plan_can_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.plan").mkdir()
    for path in (tmp_path / "file" / "u.plan", tmp_path / "folder.plan"):
        text = failure("build", ONNX, "-o", path, "--size", "16x16", code=1)
        assert f"cannot write {path}: " in text
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file", "folder.plan"]


def test_whoever_reads_while_others_write_reads_a_whole_plan(tmp_path: Path) -> None:
    path = tmp_path / "u.plan"
    contents = [bytes([n]) * 100_000 for n in range(2)]
    plan_at(path, contents[0])
    stop = threading.Event()
    failed: list[Exception] = []

    def write(content: bytes) -> None:
        try:
            while not stop.is_set():
                plan_at(path, content)
        except Exception as error:
            failed.append(error)

    writers = [threading.Thread(target=write, args=(content,)) for content in contents]
    for writer in writers:
        writer.start()
    try:
        for _ in range(100):
            assert read_plan(path)[1] in contents
    finally:
        stop.set()
        for writer in writers:
            writer.join(timeout=30)
    assert not failed
    assert [each.name for each in tmp_path.iterdir()] == ["u.plan"]


# -- a plan where it cannot run ---------------------------------------------------


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("command", ["serve", "denoise"])
def test_a_plan_without_a_gpu_names_what_is_missing_and_what_runs(tmp_path: Path, command: str) -> None:
    path = tmp_path / "mine.plan"
    plan_at(path)
    shutil.copy(ONNX, tmp_path / "mine.onnx")
    arguments = {
        "serve": ["--input", "sim://", "--output", "tcp://127.0.0.1:*"],
        "denoise": [str(tmp_path / "in.npy"), str(tmp_path / "out.npy")],
    }[command]
    text = failure(command, *arguments, "--engine", path, code=1)
    assert f"{path} cannot run on a GPU here: {NO_DRIVER}; {tmp_path}/mine.onnx runs on the CPU" in text
    text = failure(command, *arguments, "--engine", path, "--device", "cpu", code=1)
    assert f"{path} is a TensorRT plan and needs a GPU; {tmp_path}/mine.onnx runs on the CPU" in text


def test_a_plan_in_a_process_of_its_own_fails_in_a_line(tmp_path: Path) -> None:
    if cuda.driver_present():
        pytest.skip("there is a GPU")
    plan_at(tmp_path / "u.plan")
    command = [
        sys.executable,
        "-m",
        "emstream",
        "serve",
        "--input",
        "sim://",
        "--engine",
        tmp_path / "u.plan",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "no NVIDIA driver" in done.stderr
    assert f"{ONNX} runs on the CPU" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.usefixtures("no_gpu")
def test_a_damaged_plan_names_what_runs(tmp_path: Path) -> None:
    (tmp_path / "u.plan").write_bytes(b"rubbish")
    with pytest.raises(EngineInvalid, match=r"emstream build MODEL\.onnx.*wide64\.onnx runs on the CPU"):
        load_engine(tmp_path / "u.plan")
    plan_at(tmp_path / "u.plan")
    (tmp_path / "u.plan").write_bytes((tmp_path / "u.plan").read_bytes()[:-2])
    text = failure("info", tmp_path / "u.plan", code=1)
    assert f"{tmp_path}/u.plan is a damaged plan; build it again" in text


@pytest.mark.usefixtures("no_gpu")
def test_info_of_a_plan_that_is_not_there_names_what_is(tmp_path: Path) -> None:
    assert "no engine at" in failure("info", tmp_path / "no.plan", code=1)
    plan_at(tmp_path / "u.plan")
    assert "got 'first'" in failure("info", tmp_path / "u.plan", "--device", "first", code=2)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"version": "1.6"}, "was built for tensorrt-rtx 1.6, and here is tensorrt-rtx 1.7"),
        ({"gpu": "Other", "capability": "8.9", "driver": "13.0"}, "was built for Other (8.9), and here is"),
        (
            {"gpu": GPU.name, "capability": GPU.capability, "driver": "14.0"},
            "with a driver for CUDA 14.0, and the one here is for CUDA 13.0",
        ),
    ],
)
def test_a_plan_for_something_else_is_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], text: str
) -> None:
    machine = Machine(monkeypatch)
    record = plan_at(tmp_path / "u.plan", **changes)
    with pytest.raises(EngineUnavailable) as raised:
        load_engine(tmp_path / "u.plan")
    assert text in str(raised.value)
    assert record.rebuild(tmp_path / "u.plan") in str(raised.value)
    assert "wide64.onnx runs on the CPU" in str(raised.value)
    assert machine.gpus[0].live_bytes == 0
    told = json.loads(run("info", tmp_path / "u.plan", "--json").stdout)
    assert text in told["runs_here"]


# -- plans that are built when they are needed ------------------------------------


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[Profile]:
    """The profiles of the plans that were built, by a builder that takes no time."""
    profiles: list[Profile] = []

    def build(path: Path, profile: Profile, flavour: Flavour, gpu: GpuInfo, **options: Any) -> Any:
        profiles.append(profile)
        return record_of(profile, onnx=str(path)), f"compiled {len(profiles)}".encode()

    monkeypatch.setattr(cached, "build_plan", build)
    return profiles


RTX = Flavour("tensorrt-rtx", "1.7", None)


def test_a_plan_is_built_once(cache: Path, built: list[Profile]) -> None:
    first = cached_plan(ONNX, "0" * 64, PROFILE, RTX, PretendGpu())
    assert first.path.parent == cache / "plans"
    assert first.path.name.startswith("wide64-64x48-uint16-3-")
    for _ in range(3):
        assert cached_plan(ONNX, "0" * 64, PROFILE, RTX, PretendGpu(1, memory_bytes=1)) == first
    assert built == [PROFILE]
    assert read_plan(first.path) == (first.record, first.compiled) == (first.record, b"compiled 1")


def test_a_plan_is_built_anew_for_whatever_it_depends_on(
    cache: Path, built: list[Profile], monkeypatch: pytest.MonkeyPatch
) -> None:
    sha = "0" * 64
    gpu = PretendGpu()
    kinds: list[tuple[str, Profile, Flavour, PretendGpu]] = [
        (sha, PROFILE, RTX, gpu),
        ("1" * 64, PROFILE, RTX, gpu),
        *[(sha, replace(PROFILE, **change), RTX, gpu)
          for change in ({"height": 65}, {"width": 49}, {"type": "uint8"}, {"max_batch": 4})],
        (sha, PROFILE, replace(RTX, name="tensorrt"), gpu),
        (sha, PROFILE, replace(RTX, version="1.8"), gpu),
        *[(sha, PROFILE, RTX, PretendGpu(**change))
          for change in ({"name": "Other"}, {"capability": "9.0"}, {"driver": "13.1"})],
    ]  # fmt: skip
    paths = {cached_plan(ONNX, *kind).path for kind in kinds}
    assert len(paths) == len(built) == len(kinds)
    assert {cached_plan(ONNX, *kind).path for kind in kinds} == paths
    assert len(built) == len(kinds)
    monkeypatch.setattr(cached, "VERSION", "99.0")
    assert cached_plan(ONNX, *kinds[0]).path not in paths


@pytest.mark.parametrize(
    "damage", [lambda content: content[:-1], lambda content: b"", lambda content: b"x" * 99]
)
def test_a_damaged_plan_in_the_cache_is_built_again(
    cache: Path, built: list[Profile], caplog: pytest.LogCaptureFixture, damage: Any
) -> None:
    path = cached_plan(ONNX, "0" * 64, PROFILE, RTX, PretendGpu()).path
    path.write_bytes(damage(path.read_bytes()))
    assert cached_plan(ONNX, "0" * 64, PROFILE, RTX, PretendGpu()).path == path
    assert "building a cached plan again" in caplog.text
    assert str(path) in caplog.text
    assert read_plan(path)[1] == b"compiled 2"
    cached_plan(ONNX, "0" * 64, PROFILE, RTX, PretendGpu())
    assert len(built) == 2


def test_a_cache_that_cannot_be_written_is_named_and_its_plan_runs(
    cache: Path, built: list[Profile], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnx")
    cache.touch()
    machine = Machine(monkeypatch)
    engine = load_engine(ONNX)
    close(engine.denoise(poisson((64, 48))), machine._engine, poisson((64, 48)))
    assert f"the next start builds this plan again: cannot write {cache}/plans/wide64" in caplog.text
    engine.denoise(poisson((64, 48)))
    assert len(built) == 1
    engine.close()


def test_a_cached_plan_that_cannot_be_read_is_built_again(
    cache: Path, built: list[Profile], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = cached_plan(ONNX, "0" * 64, PROFILE, RTX, PretendGpu()).path
    deny(monkeypatch, "read_bytes", path)
    assert cached_plan(ONNX, "0" * 64, PROFILE, RTX, PretendGpu()).compiled == b"compiled 2"
    assert f"building a cached plan again: cannot read {path}: " in caplog.text


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have other places")
def test_the_cache_is_where_the_user_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cached.cache_folder() == tmp_path / "emstream"


def test_timings_and_kernels_are_kept_apart_for_every_gpu_and_version(cache: Path) -> None:
    proper = replace(RTX, name="tensorrt")
    assert timing_cache(RTX, GPU) is kernel_cache(proper, GPU, b"plan") is timing_cache(proper, None) is None

    def kernels(flavour: Flavour, gpu: GpuInfo) -> Path | None:
        paths = {kernel_cache(flavour, gpu, plan) for plan in (b"plan", b"plan", b"another plan")}
        assert len(paths) == 2, "one for each plan"
        return kernel_cache(flavour, gpu, b"plan")

    gpus = [GPU, replace(GPU, name="A/B C"), replace(GPU, capability="9.0"), replace(GPU, driver="13.1")]
    for keep_for, flavour_ in ((kernels, RTX), (timing_cache, proper)):
        paths = {keep_for(each, gpu) for each in (flavour_, replace(flavour_, version="2")) for gpu in gpus}
        assert len(paths) == 8
        folders = {path.parent for path in paths if path}
        assert folders == {cache / ("kernels" if flavour_ is RTX else "timings")}


def test_timings_are_kept_for_the_next_build_and_may_be_lost(
    rtx: Flavour, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    known: list[bytes] = []
    module = SimpleNamespace(
        **{name: getattr(rtx.module, name) for name in dir(rtx.module) if name[0] != "_"}
    )

    class Config:
        """TensorRT for RTX measures nothing, and so has no timings to keep."""

        def __init__(self, it: Any) -> None:
            object.__setattr__(self, "it", it)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.it, name)

        def __setattr__(self, name: str, value: Any) -> None:
            setattr(self.it, name, value)

        def create_timing_cache(self, content: bytes) -> bytes:
            return content

        def set_timing_cache(self, timings: bytes, ignore_mismatch: bool) -> bool:
            known.append(timings)
            return not ignore_mismatch

        def get_timing_cache(self) -> Any:
            return SimpleNamespace(serialize=lambda: known[-1] + b"timed ")

    class Builder:
        def __init__(self, logger: Any) -> None:
            self._it = rtx.module.Builder(logger)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._it, name)

        def create_builder_config(self) -> Config:
            return Config(self._it.create_builder_config())

        def build_serialized_network(self, network: Any, config: Config) -> Any:
            return self._it.build_serialized_network(network, config.it)

    module.Builder = Builder
    proper, kept = Flavour("tensorrt", "10.0", module), tmp_path / "timings" / "gpu-13.0"
    small = Profile(height=16, width=16, type="uint8", max_batch=1)
    for _ in range(2):
        record, _ = building.build_plan(ONNX, small, proper, PretendGpu(), timing_cache=kept)
    assert (record.gpu, record.capability, record.driver) == ("Pretend GPU", "8.9", "13.0")
    assert known == [b"", b"timed "]
    assert kept.read_bytes() == b"timed timed "
    kept.unlink()
    monkeypatch.setattr(Config, "get_timing_cache", lambda self: None)
    monkeypatch.setattr(Config, "set_timing_cache", lambda self, timings, ignore_mismatch: False)
    building.build_plan(ONNX, small, proper, PretendGpu(), timing_cache=kept)
    assert f"TensorRT refuses the timings in {kept}" in caplog.text
    assert not kept.exists()
    monkeypatch.undo()
    kept.mkdir()
    building.build_plan(ONNX, small, proper, PretendGpu(), timing_cache=kept)
    assert "the next start is as slow as this one: cannot write" in caplog.text


# -- from the file to the picture -------------------------------------------------


def poisson(shape: tuple[int, ...], kind: str = "uint8") -> np.ndarray:
    return np.random.default_rng(0).poisson(0.45, shape).astype(kind)


def close(result: np.ndarray, engine: Any, counts: np.ndarray) -> None:
    truth = engine.denoise(counts)
    np.testing.assert_allclose(result, truth, atol=1e-4 * np.abs(truth).max())


def test_a_plan_that_was_built_here_runs_on_a_gpu(
    rtx: Flavour, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "u.plan"
    assert run("build", ONNX, "-o", path, "--size", "64x48", "--type", "uint16").exit_code == 0
    machine = Machine(monkeypatch, real=rtx.module)
    engine = load_engine(path)
    assert engine.made_for == ((64, 48), np.dtype(np.uint16))
    counts = poisson((2, 64, 48), "uint16")
    close(engine.denoise(counts), machine._engine, counts)
    assert f"tensorrt-rtx {rtx.version}" in engine.device
    engine.close()
    assert not any(machine.gpus[0].alive.values())
    assert kernel_cache(rtx, machine.gpus[0].info, read_plan(path)[1]).exists()  # type: ignore[union-attr]
    told = json.loads(run("info", path, "--json").stdout)
    assert told["runs_here"] == engine.device
    assert not any(machine.gpus[0].alive.values())


def test_an_onnx_runs_on_a_gpu_through_plans_that_are_built_once(
    rtx: Flavour, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(monkeypatch, real=rtx.module)
    for _ in range(2):
        engine = load_engine(ONNX)
        for shape, kind in (((64, 48), "uint16"), ((33, 40), "uint8"), ((33, 40), "float64")):
            close(engine.denoise(poisson(shape, kind)), machine._engine, poisson(shape, kind))
        engine.close()
        assert not any(machine.gpus[0].alive.values())
        assert len(list((cache / "plans").iterdir())) == 3


# -- which device -----------------------------------------------------------------


def inner(engine: Any) -> Any:
    """What a `TiledEngine` runs."""
    assert isinstance(engine, TiledEngine)
    return engine._engine


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_without_a_gpu_an_onnx_runs_on_the_cpu_and_nothing_is_said(
    device: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert "OpenVINO" in load_engine(ONNX, device=device).device
    assert not [each for each in caplog.records if each.levelno >= logging.WARNING]


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("device", ["0", "0,1"])
def test_a_gpu_that_is_asked_for_and_missing_is_an_error(device: str) -> None:
    pytest.importorskip("onnx")
    with pytest.raises(EngineUnavailable, match=f"{NO_DRIVER}; .*wide64.onnx runs on the CPU"):
        load_engine(ONNX, device=device)


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(
    ("options", "gpus"),
    [
        ({}, [0]),
        ({"device": "auto"}, [0]),
        ({"device": "1"}, [1]),
        ({"device": "0,1"}, [0, 1]),
        ({"device": "1,0"}, [1, 0]),
        ({"device": "cpu"}, []),
        ({"precision": "f32"}, []),
        ({"threads": 1}, []),
        ({"precision": "f32", "device": "cpu"}, []),
    ],
)
def test_an_onnx_runs_where_it_should(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], gpus: list[int]
) -> None:
    pytest.importorskip("onnx")
    machine = Machine(monkeypatch, gpus=2)
    engine = load_engine(ONNX, **options)
    if not gpus:
        assert "OpenVINO" in engine.device
        return
    parts = inner(engine)._engines if len(gpus) > 1 else [inner(engine)]
    assert isinstance(inner(engine), SharedEngine if len(gpus) > 1 else CachedPlansEngine)
    assert [part._gpu for part in parts] == [machine.gpus[n] for n in gpus]
    assert engine.max_batch == 8


@pytest.mark.parametrize(("device", "gpus"), [("auto", 1), ("1", 1), ("0,1", 2)])
def test_a_plan_runs_where_it_should(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path, device: str, gpus: int
) -> None:
    machine = Machine(monkeypatch, gpus=2)
    plan_at(tmp_path / "u.plan")
    engine = load_engine(tmp_path / "u.plan", device=device)
    assert isinstance(inner(engine), SharedEngine if gpus > 1 else TensorRTEngine)
    assert [gpu.live_bytes > 0 for gpu in machine.gpus] == [device != "1", device != "auto"]
    engine.close()
    assert [gpu.live_bytes for gpu in machine.gpus] == [0, 0]


def test_when_one_gpu_of_several_is_missing_the_others_are_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    machine = Machine(monkeypatch, gpus=2)
    plan_at(tmp_path / "u.plan")
    with pytest.raises(EngineUnavailable, match="there is no GPU 2; this machine has 0"):
        load_engine(tmp_path / "u.plan", device="0,1,2")
    assert [gpu.live_bytes for gpu in machine.gpus] == [0, 0]
    assert [gpu.calls["allocate"] > 0 for gpu in machine.gpus] == [True, True]


@pytest.mark.parametrize("device", ["first", "", "0,", "0,0", "-1", "0;1", "cuda:0", "\u0663", "1.0"])
def test_a_device_that_makes_no_sense_is_refused(device: str) -> None:
    with pytest.raises(ValueError, match="device must be auto, cpu or GPU numbers such as 0 or 0,1, got"):
        load_engine(ONNX, device=device)
    with pytest.raises(ValueError, match="device must be"):
        load_engine("identity", device=device)


@pytest.mark.parametrize("options", [{"precision": "f32"}, {"threads": 2}])
def test_what_is_for_the_cpu_is_refused_on_a_gpu(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="precision and threads are for the CPU, and device is '0'"):
        load_engine(ONNX, device="0", **options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"precision": ""}, "precision must be one of bf16, f32, got ''"),
    ],
)
def test_an_impossible_option_is_no_reason_to_take_the_gpu(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], said: str
) -> None:
    Machine(monkeypatch)
    with pytest.raises(ValueError, match=said):
        load_engine(ONNX, **options)


def test_a_gpu_without_tensorrt_is_said_and_the_cpu_is_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Machine(monkeypatch)

    def missing(name: str | None = None) -> Any:
        raise EngineUnavailable("tensorrt or tensorrt-rtx is not installed: pip install 'emstream[gpu]'")

    monkeypatch.setattr(flavour, "installed", missing)
    assert "OpenVINO" in load_engine(ONNX).device
    assert "there is a GPU, Pretend GPU, and the CPU is used: tensorrt or tensorrt-rtx is not" in caplog.text
    with pytest.raises(EngineUnavailable, match=r"is not installed: pip install.*runs on the CPU"):
        load_engine(ONNX, device="0")


def test_a_driver_without_its_python_package_is_said_and_the_cpu_is_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, no_gpu: None
) -> None:
    monkeypatch.setattr(cuda, "driver_present", lambda: True)
    assert "OpenVINO" in load_engine(ONNX).device
    assert f"there is an NVIDIA driver, and the CPU is used: {NO_DRIVER}" in caplog.text


def test_a_gpu_that_cannot_be_opened_is_said_and_the_cpu_is_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Machine(monkeypatch)

    def taken(index: int) -> Any:
        raise CudaError("cuDevicePrimaryCtxRetain: CUDA_ERROR_DEVICE_UNAVAILABLE")

    monkeypatch.setattr(cuda, "open_gpu", taken)
    assert "OpenVINO" in load_engine(ONNX).device
    assert "there is a GPU, and the CPU is used: " in caplog.text
    assert "CUDA_ERROR_DEVICE_UNAVAILABLE" in caplog.text
    with pytest.raises(EngineUnavailable, match="CUDA_ERROR_DEVICE_UNAVAILABLE"):
        load_engine(ONNX, device="0")


def test_a_gpu_without_onnx_is_said_and_the_cpu_is_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Machine(monkeypatch)
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert "OpenVINO" in load_engine(ONNX).device
    assert "building plans needs the onnx package: pip install 'emstream[rtx]'" in caplog.text


def test_a_machine_whose_gpus_are_hidden_uses_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    Machine(monkeypatch, gpus=0)
    assert "OpenVINO" in load_engine(ONNX).device


def test_no_model_means_no_engine_on_any_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Machine(monkeypatch)
    for device in ("auto", "cpu", "0"):
        with pytest.raises(EngineNotFound, match="no engine at"):
            load_engine(tmp_path / "no.plan", device=device)
        assert isinstance(load_engine("identity", device=device), IdentityEngine)
