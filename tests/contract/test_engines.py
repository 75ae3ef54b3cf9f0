"""What every engine must do. A new engine is done when it passes.

The network is bias-free, so f(a x) = a f(x): a property that any faithful engine keeps.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from emstream.inference import Engine, IdentityEngine, default_engine, load_engine
from emstream.inference.cached import CachedPlansEngine
from emstream.inference.openvino import OpenVINOEngine
from emstream.inference.plan import Profile
from emstream.inference.shared import SharedEngine
from emstream.inference.tensorrt import TensorRTEngine
from emstream.inference.tiling import TiledEngine
from emstream.repository import write_repository
from tests.doubles.gpu import PretendGpu, PretendProgram
from tests.doubles.tensorrt import record_of
from tests.triton import Triton

# Tiles see other borders than the whole frame, and the upsampling of the UNet (align_corners) depends a
# little on the size of what it is given; that one test in test_inference.py bounds what it does to the error.
TOLERANCE = {
    "identity": 0.0,
    "openvino-f32": 1e-4,
    "openvino-bf16": 2e-2,
    "tiled": 0.15,
    "torch": 1e-4,
    "tensorrt": 1e-4,
    "tensorrt, two GPUs": 1e-4,
    "two servers": 1e-4,
}


# Its field of view leaves room for tiles of 256 px.
MODEL = default_engine().with_name("unet32.onnx")


def tiled(path: Path) -> Engine:
    return TiledEngine(OpenVINOEngine(path, precision="f32"), tile_px=256)


def torch(path: Path) -> Engine:
    pytest.importorskip("torch", reason="the torch engine needs PyTorch: pip install 'emstream[train]'")
    return load_engine(path.with_suffix(".pt2"), device="cpu")


def cached_plans(path: Path, gpu: PretendGpu, network: Engine) -> Engine:
    """What runs an .onnx on a GPU, but for the GPU and TensorRT."""
    pytest.importorskip("onnx", reason="building plans needs onnx: pip install 'emstream[rtx]'")

    def quickly(frames: np.ndarray) -> np.ndarray:
        """Nothing comes of nothing, for the network has no bias: preparation takes no time."""
        return network.denoise(frames) if frames.any() else np.zeros_like(frames)

    def load(profile: Profile) -> Engine:
        program = PretendProgram(gpu, profile, quickly)
        return TensorRTEngine(path, record_of(profile), gpu, program)

    return CachedPlansEngine(path, gpu, gpu.info.name, load)


def tensorrt(path: Path) -> Engine:
    return TiledEngine(cached_plans(path, PretendGpu(), OpenVINOEngine(path, precision="f32")))


def two_gpus(path: Path) -> Engine:
    network = OpenVINOEngine(path, precision="f32")
    return TiledEngine(SharedEngine([cached_plans(path, PretendGpu(n), network) for n in (0, 1)]))


def two_servers(path: Path) -> Engine:
    folder = Path(tempfile.mkdtemp())
    write_repository(path, folder / "models")
    servers = []
    try:
        for n in ("1", "2"):
            servers.append(Triton(folder / "models", folder / n).start())
        engine = load_engine(f"grpc://{','.join(each.host for each in servers)}/{path.stem}")
    except BaseException:
        stop(servers, folder)
        raise
    close = engine.close

    def close_all() -> None:
        close()
        stop(servers, folder)

    engine.close = close_all  # type: ignore[method-assign]
    return engine


def stop(servers: list[Triton], folder: Path) -> None:
    for each in servers:
        each.stop()
    shutil.rmtree(folder)


ENGINES: dict[str, Callable[[Path], Engine]] = {
    "identity": lambda path: IdentityEngine(),
    "openvino-f32": lambda path: load_engine(path, precision="f32"),
    "openvino-bf16": lambda path: load_engine(path, precision="bf16"),
    "tiled": tiled,
    "torch": torch,
    "tensorrt": tensorrt,
    "tensorrt, two GPUs": two_gpus,
    "two servers": two_servers,
}


@pytest.fixture(params=list(ENGINES), scope="module")
def named(request: pytest.FixtureRequest) -> Iterator[tuple[str, Engine]]:
    engine = ENGINES[request.param](MODEL)
    yield request.param, engine
    engine.close()


@pytest.fixture
def engine(named: tuple[str, Engine]) -> Engine:
    return named[1]


@pytest.fixture(scope="module")
def reference() -> Engine:
    return load_engine(MODEL, precision="f32")


def counts(shape: tuple[int, ...], kind: str = "uint8", seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).poisson(0.45, shape).astype(kind)


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """Largest relative difference."""
    return float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-9))


@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (16, 16), (33, 47), (250, 190), (256, 256), (300, 513)])
def test_any_size_gives_what_the_reference_gives(
    named: tuple[str, Engine], reference: Engine, shape: tuple[int, int]
) -> None:
    name, engine = named
    y = counts(shape)
    expected = y.astype(np.float32) if name == "identity" else reference.denoise(y)
    result = engine.denoise(y)
    assert result.dtype == np.float32
    assert result.shape == shape
    if name == "torch" and max(shape) <= 16:
        return  # padded to 32 px there and to 16 px here: frames this small are nearly all padding
    assert difference(result, expected) <= TOLERANCE[name]


@pytest.mark.parametrize(
    "kind", ["uint8", "uint16", "uint32", "int8", "int16", "int32", "float32", "float64"]
)
def test_every_pixel_type_gives_the_same_picture(named: tuple[str, Engine], kind: str) -> None:
    name, engine = named
    result = engine.denoise(counts((40, 40), kind))
    assert difference(result, engine.denoise(counts((40, 40)))) <= TOLERANCE[name]


@pytest.mark.parametrize("kind", [">u2", ">f4", "int64", "uint64", "float16"])
def test_unusual_types_are_converted(engine: Engine, kind: str) -> None:
    assert difference(engine.denoise(counts((40, 40), kind)), engine.denoise(counts((40, 40)))) <= 2e-2


def test_batch_gives_what_its_frames_give_alone(named: tuple[str, Engine]) -> None:
    name, engine = named
    y = counts((3, 64, 48))
    expected = engine.collect(engine.submit(y, np.empty(y.shape, np.float32)))
    alone = np.stack([engine.denoise(frame) for frame in y])
    assert difference(expected, alone) <= TOLERANCE[name]


def test_batches_in_flight_do_not_mix(engine: Engine) -> None:
    frames = [counts((1, 64, 64), seed=n) for n in range(12)]
    alone = [engine.denoise(frame) for frame in frames]
    results = [np.full((1, 64, 64), np.nan, np.float32) for _ in frames]
    tickets: deque[object] = deque()
    for frame, result in zip(frames, results, strict=True):
        if len(tickets) == engine.depth:
            engine.collect(tickets.popleft())
        tickets.append(engine.submit(frame, result))
    while tickets:
        engine.collect(tickets.popleft())
    for result, truth in zip(results, alone, strict=True):
        np.testing.assert_array_equal(result, truth)


def test_sizes_in_flight_do_not_mix(engine: Engine) -> None:
    """A frame of a tile's own size behind one that needs tiles."""
    large, small = counts((1, 480, 480)), counts((1, 256, 256), seed=1)
    alone = engine.denoise(large), engine.denoise(small)
    results = np.empty(large.shape, np.float32), np.empty(small.shape, np.float32)
    if engine.depth < 2:
        pytest.skip("one batch at a time")
    tickets = [engine.submit(large, results[0]), engine.submit(small, results[1])]
    for ticket in tickets:
        engine.collect(ticket)
    for result, truth in zip(results, alone, strict=True):
        np.testing.assert_array_equal(result, truth)


def test_twice_the_counts_give_twice_the_picture(named: tuple[str, Engine]) -> None:
    name, engine = named
    y = counts((64, 64))
    assert difference(engine.denoise(2 * y), 2 * engine.denoise(y)) <= TOLERANCE[name]


def test_read_only_and_strided_frames_are_taken(engine: Engine) -> None:
    y = counts((80, 80))
    view = y[::2, ::2]
    view.setflags(write=False)
    np.testing.assert_array_equal(engine.denoise(view), engine.denoise(view.copy()))


def test_prepared_engine_gives_the_same_picture(engine: Engine) -> None:
    before = engine.denoise(counts((48, 48)))
    engine.prepare((48, 48), np.dtype(np.uint8))
    np.testing.assert_array_equal(engine.denoise(counts((48, 48))), before)


def test_identity_is_complete(engine: Engine) -> None:
    assert set(engine.identity) == {"name", "sha256", "device"}
    assert engine.device
    if engine.card:
        assert engine.sha256 is not None
        assert len(engine.sha256) == 64


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        (np.full((8, 8), np.nan, np.float32), "finite"),
        (np.zeros((2, 2, 8, 8)), "got shape"),
        (np.zeros((0, 8)), "got shape"),
        (np.zeros((8, 8), complex), "got complex128"),
        (np.zeros((8, 8), bool), "got bool"),
    ],
)
def test_counts_that_make_no_sense_are_refused(engine: Engine, bad: np.ndarray, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        engine.denoise(bad)
