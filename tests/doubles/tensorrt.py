"""The calls that emstream makes to load and run plans in TensorRT, on `PretendGpu`s.

`pretend_tensorrt` stands in for the module tensorrt_rtx, or for tensorrt. It reads no plan: any
bytes but those that start with BAD are one, of the network that it is given. Engines and
contexts hold device memory until Python drops them, which is to happen while the GPU's
context is current; calls in a wrong order fail.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum, auto
from types import SimpleNamespace
from typing import Any

from emstream.inference.build import INPUT, OUTPUT
from emstream.inference.card import EngineCard
from emstream.inference.plan import Profile, Record
from tests.doubles.gpu import Network, PretendGpu, PretendProgram

BAD = b"not a plan"
WEIGHTS_BYTES, PERSISTENT_BYTES, WORKING_BYTES = 5000, 300, 2000
_KERNELS = b"kernels "

CARD = EngineCard(
    name="pretend",
    architecture="none",
    parameters=0,
    field_of_view_px=9,
    multiple_px=1,
    bias_free=True,
    dose_range=(0.1, 10.0),
    sampling_pm=6.2,
    psnr_db=30.0,
    ssim=0.9,
    trained="never",
    commit="0000000",
)


def record_of(profile: Profile, **changes: Any) -> Record:
    """The record of a plan that TensorRT for RTX would have built for any GPU."""
    values: dict[str, Any] = {
        "onnx": "engines/pretend.onnx",
        "onnx_sha256": "0" * 64,
        "flavour": "tensorrt-rtx",
        "version": "1.7",
        "gpu": None,
        "capability": None,
        "driver": None,
        "device": None,
        "targets": ("8.0", "8.6", "8.9", "12.0"),
        "precision": "fp16",
        "profile": profile,
        "built": "2026-01-01T00:00:00+00:00",
        "emstream": "0",
        "card": CARD,
    }
    return Record(**values | changes)


class ILogger:
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class ExecutionContextAllocationStrategy(Enum):
    STATIC = auto()
    USER_MANAGED = auto()


class DynamicShapesKernelSpecializationStrategy(Enum):
    LAZY = auto()
    EAGER = auto()


def pretend_tensorrt(
    gpus: Sequence[PretendGpu], network: Network, real: Any = None, version: str = "1.7"
) -> Any:
    """A module that runs plans on `gpus`; whatever else `real` has, such as a builder, is in it, too."""
    if real is not None:
        names = {name: getattr(real, name) for name in dir(real) if not name.startswith("__")}
        version = real.__version__
        names["Builder"] = lambda logger: Builder(real.Builder(logger), logger, gpus)
    else:
        names = {"ILogger": ILogger}
    names |= {
        "__version__": version,
        "ExecutionContextAllocationStrategy": ExecutionContextAllocationStrategy,
        "DynamicShapesKernelSpecializationStrategy": DynamicShapesKernelSpecializationStrategy,
        "Runtime": lambda logger: Runtime(logger, gpus, network),
    }
    return SimpleNamespace(**names)


class Builder:
    """The real one, where the context of the GPU to build for is current."""

    def __init__(self, real: Any, logger: Any, gpus: Sequence[PretendGpu]) -> None:
        self._real, self._logger, self._gpus = real, logger, gpus

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def build_serialized_network(self, network: Any, config: Any) -> Any:
        here = [gpu for gpu in self._gpus if gpu.is_current]
        if self._gpus and not here:
            self._logger.log(self._logger.ERROR, "no CUDA context is current")
            return None
        for gpu in here:
            gpu.call("build")
        if config.num_compute_capabilities:
            config.num_compute_capabilities = 0  # for the GPU that is not really here
        return self._real.build_serialized_network(network, config)


class Runtime:
    def __init__(self, logger: Any, gpus: Sequence[PretendGpu], network: Network) -> None:
        self._logger, self._gpus, self._network = logger, gpus, network

    def deserialize_cuda_engine(self, plan: bytes) -> ICudaEngine | None:
        gpu = next((gpu for gpu in self._gpus if gpu.is_current), None)
        if gpu is None or not plan or plan.startswith(BAD):
            why = "CUDA driver is not initialized" if gpu is None else "Serialization assertion failed"
            self._logger.log(self._logger.ERROR, why)
            return None
        return ICudaEngine(gpu, self._network, self._logger)


class ICudaEngine:
    device_memory_size_v2 = WORKING_BYTES

    def __init__(self, gpu: PretendGpu, network: Network, logger: Any) -> None:
        self._gpu, self._network, self._logger = gpu, network, logger
        self._memory = [gpu.allocate(WEIGHTS_BYTES)]

    def __del__(self) -> None:
        for weights in getattr(self, "_memory", []):
            self._gpu.free(weights)

    def create_runtime_config(self) -> IRuntimeConfig:
        return IRuntimeConfig(self._gpu)

    def create_execution_context(self, how: Any) -> IExecutionContext | None:
        if isinstance(how, IRuntimeConfig):
            assert how.dynamic_shapes_kernel_specialization_strategy is (
                DynamicShapesKernelSpecializationStrategy.EAGER
            )
            cache, how = how.cache, how.strategy
            if cache is not None:
                cache.kernels += 1
        assert how is ExecutionContextAllocationStrategy.USER_MANAGED
        if self._gpu.memory_free() < PERSISTENT_BYTES:
            self._logger.log(self._logger.ERROR, "out of memory")
            return None
        return IExecutionContext(self, self._gpu, self._network, self._logger)


class IRuntimeConfig:
    def __init__(self, gpu: PretendGpu) -> None:
        self._gpu = gpu
        self.cache: IRuntimeCache | None = None
        self.strategy = ExecutionContextAllocationStrategy.STATIC
        self.dynamic_shapes_kernel_specialization_strategy = DynamicShapesKernelSpecializationStrategy.LAZY

    def set_execution_context_allocation_strategy(self, strategy: ExecutionContextAllocationStrategy) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> IRuntimeCache:
        return IRuntimeCache(self._gpu)

    def set_runtime_cache(self, cache: IRuntimeCache) -> None:
        self.cache = cache


class IRuntimeCache:
    def __init__(self, gpu: PretendGpu) -> None:
        self._gpu = gpu
        self.kernels = 0
        """How often a context asked for some."""

    def deserialize(self, blob: bytes) -> bool:
        self._gpu.call("deserialize")
        if not blob.startswith(_KERNELS):
            return False
        self.kernels = int(blob.removeprefix(_KERNELS))
        return True

    def serialize(self) -> bytes:
        self._gpu.call("serialize")
        return _KERNELS + str(self.kernels).encode()


class IExecutionContext:
    def __init__(self, engine: ICudaEngine, gpu: PretendGpu, network: Network, logger: Any) -> None:
        self._engine, self._gpu, self._network, self._logger = engine, gpu, network, logger
        self._persistent = gpu.allocate(PERSISTENT_BYTES)
        self._working: tuple[int, int] | None = None
        self._shape: tuple[int, ...] = ()
        self._addresses: dict[str, int] = {}
        self._ready: Any = None

    def __del__(self) -> None:
        self._gpu.free(self._persistent)
        if self._working is not None:
            self._gpu.buffer_at(*self._working)  # still there

    def set_device_memory(self, memory: int, size: int) -> None:
        assert memory % 256 == 0, "device memory must be aligned to 256 bytes"
        assert size >= self._engine.device_memory_size_v2, "too little device memory"
        self._working, self._ready = (memory, size), None

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._shape, self._ready = shape, None
        return name == INPUT and len(shape) in (3, 4) and shape[0] > 0

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name], self._ready = address, None
        return name in (INPUT, OUTPUT)

    def execute_async_v3(self, stream_handle: int) -> bool:
        if self._working is None or not self._shape or set(self._addresses) != {INPUT, OUTPUT}:
            self._logger.log(self._logger.ERROR, "addresses, shape or device memory are not set")
            return False
        if self._ready is None:
            batch, height, width, *pixel = self._shape
            kind = f"uint{8 * pixel[0]}" if pixel else "float32"
            profile = Profile(height=height, width=width, type=kind, max_batch=batch)
            program = PretendProgram(self._gpu, profile, self._network, self._working[1])
            self._ready = program.context(
                batch, self._addresses[INPUT], self._addresses[OUTPUT], self._working[0]
            )
        self._ready.execute(stream_handle)
        return True
