"""The composition root: settings in, a running pipeline out.

`build` is the whole service on one page; `serve` adds signals and a clean end.
"""

from __future__ import annotations

import contextlib
import logging
import re
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from emstream import outputs
from emstream.control import Answer, Control
from emstream.corrections import Corrections, Region, check_calibration
from emstream.endpoint import Door, only_with_keys, reachable
from emstream.errors import (
    EmstreamError,
    EngineError,
    EngineNotFound,
    EngineUnavailable,
    FileFormatError,
    MalformedFrame,
    OutputError,
    SourceError,
    Stalled,
)
from emstream.frame import PIXEL_TYPES
from emstream.inference import check_choice, check_is_there, load_engine
from emstream.inference.engine import Engine
from emstream.inference.remote import RemoteModel, is_remote
from emstream.inference.supervised import SupervisedEngine
from emstream.intake import Intake, Overrun, Source
from emstream.keys import Admitted, Doorkeeper, Peer, read_pair, read_public
from emstream.ledger import Ledger
from emstream.memory import blocks_that_go_back, keep_freed_blocks, physical_bytes
from emstream.metrics import MetricsServer, Watched, host_and_port
from emstream.movies import open_movie
from emstream.outputs.sockets import DEFAULT_QUEUE_BYTES
from emstream.pipeline import Pipeline
from emstream.publish import DEFAULT_QUEUE, Publisher
from emstream.quality import self_test
from emstream.ring import Ring, rows_for
from emstream.seldom import Seldom
from emstream.signals import end_on_signals, stop_on_signals
from emstream.sources import check_scheme, open_source
from emstream.watchdog import Watchdog
from emstream.wire import DEFAULT_MAX_FRAME_BYTES, DEFAULT_MAX_HEADER_BYTES, MOST_HEADER_BYTES

log = logging.getLogger(__name__)

DEFAULT_OUTPUT = "tcp://127.0.0.1:5556"
_PRIVATE_OUTPUT = "tcp://127.0.0.1:*"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One service. Each field is a flag of ``emstream serve``."""

    input: str
    """URL of the camera."""
    output: str | Sequence[str] = DEFAULT_OUTPUT
    """Endpoint to publish on, or several, in other formats: `emstream.outputs`.

    Where none is native, that one is on a free port of this machine.
    """
    engine: str | Path | None = None
    """Model file; None is the one that ships with emstream."""
    fallback: str | Path | None = None
    """Model file that takes over, on the CPU, when the engine goes on failing."""
    device: str = "auto"
    """cpu, GPU numbers such as 0 or 0,1, or auto."""
    precision: str | None = None
    threads: int | None = None
    max_batch: int | None = None
    """Frames; None is what the engine likes best."""
    max_wait_ms: float = 0.0
    """How long a batch's first frame may wait for company while the engine is idle."""
    overrun: Overrun | None = None
    """What gives way under overload; None lets sources wait that can, and drops the oldest of the others."""
    slots: int | None = None
    """Batches in the ring: what a burst may pile up before the overrun policy applies.

    None is what the engine holds at a time and two more.
    """
    gain: float = 1.0
    offset: float = 0.0
    offset_map: Path | None = None
    """ADU without any electron, pixel by pixel, on top of `offset`; as the next three a file with one frame."""
    gain_map: Path | None = None
    """ADU per electron, pixel by pixel, on top of `gain`."""
    flat_field: Path | None = None
    """The camera's answer to even light, in any unit."""
    mask: Path | None = None
    """Bad pixels: those that are not 0."""
    binning: int = 1
    """Squares of so many by so many pixels are added up."""
    roi: str | None = None
    """Part of the frame that is kept: rows x columns + top + left."""
    max_frame_bytes: int = DEFAULT_MAX_FRAME_BYTES
    """Larger frames are rejected."""
    max_header_bytes: int = DEFAULT_MAX_HEADER_BYTES
    """Messages whose header is larger are rejected."""
    max_rate: float | None = None
    """Frames beyond so many a second are rejected, a second's worth at a time; None takes all."""
    queue: int = DEFAULT_QUEUE
    """Messages a subscriber may lag by before it loses some."""
    queue_bytes: int = DEFAULT_QUEUE_BYTES
    """What those may add up to."""
    expect: str | None = None
    """Frame size and type to be ready for; other frames are taken, too, but the first has to wait.

    None is what the engine was compiled for, or 512x512:uint8.
    """
    drain_s: float = 10.0
    """How long frames already received may take to finish after a stop."""
    stall_limit_s: float = 120.0
    """How long the engine or another part may hang before the service gives up."""
    frames: int | None = None
    """Stop after this many published frames."""
    key: Path | None = None
    """This service's .key_secret file; with `admit`, what it binds takes keys."""
    admit: Path | None = None
    """Folder of the .key files of those who may connect."""
    camera_key: Path | None = None
    """The .key file of a camera that takes keys."""
    insecure: bool = False
    """Without keys, bind addresses that other machines can reach all the same."""
    metrics: str | None = None
    """HOST:PORT that answers monitoring; None for none."""
    control: str | None = "tcp://127.0.0.1:*"
    """Endpoint that takes orders; None for none."""

    def __post_init__(self) -> None:
        self.expected_frame()
        outputs.orders(self.output)
        check_calibration(self.gain, self.offset)
        if self.roi is not None:
            Region.of(self.roi)
        check_choice(self.device, self.precision, self.threads)
        least = {
            "max_batch": (1, "frame"), "slots": (2, "batches"), "queue": (1, "message"), "queue_bytes": (1, "byte"),
        }  # fmt: skip
        for name, (number, unit) in least.items():
            value = getattr(self, name)
            if value is not None and value < number:
                raise ValueError(f"{name} must be at least {number} {unit}, got {value}")
        if self.binning < 1:
            raise ValueError(f"binning must be at least 1 pixel, got {self.binning}")
        if self.max_frame_bytes < 1:
            raise ValueError(f"the largest frame must be positive, got {self.max_frame_bytes} bytes")
        if not 1024 <= self.max_header_bytes <= MOST_HEADER_BYTES:
            raise ValueError(
                f"the largest header must lie in 1024-{MOST_HEADER_BYTES} bytes, got {self.max_header_bytes}"
            )
        if self.max_rate is not None and not 0 < self.max_rate < 1e6:
            raise ValueError(f"max_rate must lie in 0-1000000 frames/s, got {self.max_rate}")
        for name in ("max_wait_ms", "drain_s", "stall_limit_s"):
            if not 0 <= getattr(self, name) < 1e6:
                unit = name.rpartition("_")[2]
                raise ValueError(f"{name} must lie in 0-1000000 {unit}, got {getattr(self, name)} {unit}")
        if self.metrics is not None:
            host_and_port(self.metrics)
            if not self.insecure and reachable(f"tcp://{self.metrics}"):
                raise ValueError(
                    f"cannot serve metrics on {self.metrics}: other machines can reach it, and anybody there could "
                    "look on; give an address of this machine alone such as 127.0.0.1:9095, or --insecure"
                )
        if self.admit and not self.key:
            raise ValueError("--admit takes --key, the service's own secret key, too")
        if self.key and not self.admit and not self.camera_key:
            raise ValueError("--key takes --admit, the folder of those who may connect, or --camera-key, too")
        if self.camera_key and not self.key:
            raise ValueError("--camera-key takes --key, the service's own secret key, too")
        if self.frames is not None and self.frames < 1:
            raise ValueError(f"frames must be at least 1, got {self.frames}")

    def corrections(self) -> Corrections:
        """What every frame goes through before the engine. Raises SourceError for a map that cannot be read."""
        return Corrections(
            gain=self.gain,
            offset=self.offset,
            offset_map=_map_from(self.offset_map),
            gain_map=_map_from(self.gain_map),
            flat_field=_map_from(self.flat_field),
            mask=_map_from(self.mask),
            binning=self.binning,
            roi=None if self.roi is None else Region.of(self.roi),
        )

    def expected_frame(
        self, engine: Engine | None = None, corrections: Corrections | None = None
    ) -> tuple[tuple[int, int], np.dtype[Any]]:
        """(H, W) and type of the frames that `engine` should be ready for: what `corrections` leave."""
        shape, dtype = (engine.made_for if engine else None) or ((512, 512), PIXEL_TYPES["uint8"])
        if self.expect is not None:
            match = re.fullmatch(r"(\d+)x(\d+):(\w+)", self.expect)
            if not match or match[3] not in PIXEL_TYPES or 0 in (int(match[1]), int(match[2])):
                raise ValueError(
                    "expect must look like 512x512:uint8 (rows, columns, type), with a type of "
                    f"{', '.join(PIXEL_TYPES)}, got {self.expect!r}"
                )
            shape, dtype = (int(match[1]), int(match[2])), PIXEL_TYPES[match[3]]
            if (nbytes := shape[0] * shape[1] * dtype.itemsize) > self.max_frame_bytes:
                raise ValueError(
                    f"expect {self.expect!r} is a frame of {nbytes / 2**20:,.0f} MiB, and frames above "
                    f"{self.max_frame_bytes / 2**20:,.0f} MiB are rejected (--max-frame-mib)"
                )
        if corrections is None:
            return shape, dtype
        if self.expect is not None:
            try:
                shape = corrections.shape_of(shape)
            except MalformedFrame as error:
                raise ValueError(f"expect {self.expect!r}: {error}") from None
        return shape, corrections.type_of(dtype)


def _map_from(path: Path | None) -> np.ndarray | None:
    """The one frame (H, W) of a file."""
    if path is None:
        return None
    try:
        with open_movie(path) as movie:
            if len(movie) != 1:
                raise ValueError(
                    f"{path} has {len(movie)} frames; a mask or map is one: save their mean or sum"
                )
            frame: np.ndarray = np.array(movie[0])
    except FileFormatError as error:
        raise SourceError(str(error)) from None
    return frame


def look_over(settings: Settings) -> None:
    """Raise what `build` would about files and addresses; opens no socket and loads no engine.

    Raises EmstreamError or ValueError.
    """
    check_scheme(settings.input)
    for engine in (settings.engine, settings.fallback):
        if is_remote(engine):
            RemoteModel.of(str(engine))
        elif engine is not None and str(engine) != "identity":
            check_is_there(Path(engine))
    if settings.key is not None:
        read_pair(settings.key)
    if settings.admit is not None:
        Admitted(settings.admit, b"")
    if settings.camera_key is not None:
        read_public(settings.camera_key)
    settings.corrections()
    native, others = outputs.orders(settings.output)
    bound = [native.endpoint if native else _PRIVATE_OUTPUT, *(order.endpoint for order in others)]
    for endpoint in (*bound, *([] if settings.control is None else [settings.control])):
        if settings.admit is None and Door(insecure=settings.insecure).stands_open(endpoint):
            raise OutputError(only_with_keys(endpoint))


@dataclass(frozen=True)
class Service:
    """A pipeline ready to run, and the parts one may want to look at."""

    pipeline: Pipeline
    publisher: Publisher
    engine: SupervisedEngine
    ledger: Ledger
    ring: Ring
    settings: Settings
    corrections: Corrections
    door: Door
    _refused: Seldom = field(default_factory=Seldom, init=False, repr=False)

    @property
    def peer(self) -> Peer | None:
        """What those who belong to the service connect to it with."""
        return self.door.keeper.peer if self.door.keeper else None

    def swap(self, path: str | Path) -> dict[str, Any]:
        """Load, prepare and test another engine beside the running one, and let it have the next batch.

        It must take the frames that come. Returns what the test measured. Raises EngineError or ValueError,
        and nothing has changed then.
        """
        load = partial(_load_prepared, replace(self.settings, engine=path), self.corrections)
        try:
            try:
                engine = load()
            except EngineNotFound as error:  # whoever asked may be in another folder, on another machine
                raise EngineNotFound(f"{error}; looked for {_from_here(path)}") from None
            try:
                _check_max_batch(engine, self.ring.max_batch)
                if self.ring.newest is not None:
                    engine.prepare(*self.ring.newest)
                with blocks_that_go_back():
                    tested = self_test(engine)
            except BaseException:
                engine.close()
                raise
        except (EmstreamError, ValueError) as error:
            if self._refused.note(type(error).__name__):  # whoever asked hears of each
                log.warning("%.200s is not swapped in: %.500s", path, error)
            raise
        before = self.engine.swap(engine, load)
        log.info(
            "%s takes over from %s, after %.1f dB in its self-test", engine.name, before.name, tested.psnr_db
        )
        if tested.far_from_card:
            log.warning("the card of %s says %.1f dB", engine.name, tested.card_psnr_db)
        return {"engine": engine.identity, "before": before.identity, "self_test": tested.report()}

    def swap_back(self) -> dict[str, Any]:
        """Let the engine of before the last swap have the next batch."""
        before = self.engine.current
        engine = self.engine.swap_back()
        log.info("%s takes over again from %s", engine.name, before.name)
        return {"engine": engine.identity, "before": before.identity}

    def answers(self) -> dict[str, Answer]:
        """What its control socket can be asked."""
        return {
            "status": lambda question: self.pipeline.report(),
            "swap": lambda question: self.swap(_text(question, "engine")),
            "swap-back": lambda question: self.swap_back(),
        }

    def close(self) -> None:
        self.publisher.close()
        self.engine.close()
        if self.door.keeper:
            self.door.keeper.close()


def _from_here(path: str | Path) -> str:
    """Where a file of that name is looked for: the folder, if the name has none of its own, and the machine."""
    machine = f"on {socket.gethostname()}"
    return machine if Path(path).is_absolute() else f"in {Path.cwd()} {machine}"


def _text(question: Mapping[str, Any], key: str) -> str:
    value = question.get(key)
    if not isinstance(value, str) or not value:
        raise ValueError(f"{key} must be a text, got {value!r}")
    return value


def build(
    settings: Settings,
    *,
    source: Source | None = None,
    engine: Engine | None = None,
    fallback: Engine | None = None,
) -> Service:
    """Put a service together. The parts given here stand in for those the settings name."""
    keep_freed_blocks()
    ledger, corrections = Ledger(), settings.corrections()
    reload = None
    with contextlib.ExitStack() as stack:
        if engine is None:
            reload = partial(_load_prepared, settings, corrections)
            engine = reload()
            stack.callback(engine.close)
        else:
            stack.callback(engine.close)
            engine.prepare(*settings.expected_frame(engine, corrections))
        if fallback is None and settings.fallback is not None:
            on_cpu = replace(settings, engine=settings.fallback, device="cpu")
            fallback = _load_prepared(on_cpu, corrections)
        if fallback is not None:
            stack.callback(fallback.close)
        supervised = SupervisedEngine(engine, reload=reload, fallback=fallback)
        door = _door(settings)
        if door.keeper:
            stack.callback(door.keeper.close)
        service = _assemble(settings, ledger, corrections, supervised, source, door)
        stack.pop_all()
    return service


def _door(settings: Settings) -> Door:
    if settings.admit is None:
        return Door(insecure=settings.insecure)
    assert settings.key is not None
    return Door(Doorkeeper(read_pair(settings.key), settings.admit))


def _load_prepared(settings: Settings, corrections: Corrections) -> Engine:
    """The engine, ready for the first frame; the CPU's when the GPU, not asked for by number, cannot."""

    def load(device: str) -> Engine:
        engine = load_engine(
            settings.engine, precision=settings.precision, threads=settings.threads, device=device
        )
        try:
            engine.prepare(*settings.expected_frame(engine, corrections))
        except BaseException:
            engine.close()
            raise
        return engine

    try:
        with blocks_that_go_back():
            return load(settings.device)
    except (EngineNotFound, EngineUnavailable):
        raise
    except EngineError as error:
        onnx = settings.engine is None or Path(settings.engine).suffix == ".onnx"
        if settings.device != "auto" or not onnx or is_remote(settings.engine):
            raise
        with blocks_that_go_back():
            engine = load("cpu")
        log.warning("the CPU is used: %s", error)
        return engine


def _check_max_batch(engine: Engine, max_batch: int) -> None:
    if engine.max_batch is not None and max_batch > engine.max_batch:
        raise ValueError(
            f"{engine.name} takes batches of up to {engine.max_batch} frames, max_batch is {max_batch}"
        )


def _check_room(slots: int, max_batch: int, shape: tuple[int, int], dtype: np.dtype[Any]) -> None:
    """Refuse a ring that this machine's memory cannot hold, before the system runs out of it."""
    rows = rows_for(shape, dtype, max_batch)
    nbytes, there = slots * rows * shape[0] * shape[1] * (dtype.itemsize + 4), physical_bytes()
    if there is not None and nbytes > there:
        raise ValueError(
            f"{slots:,} slots of {rows} frames of {shape[0]}x{shape[1]} {dtype.name} take {nbytes / 2**30:,.1f} GiB, "
            f"and this machine has {there / 2**30:,.1f} GiB of memory; give fewer --slots, or a smaller --max-batch"
        )


def _assemble(
    settings: Settings,
    ledger: Ledger,
    corrections: Corrections,
    supervised: SupervisedEngine,
    source: Source | None,
    door: Door,
) -> Service:
    engine = supervised.current
    max_batch = settings.max_batch if settings.max_batch is not None else engine.best_batch
    _check_max_batch(engine, max_batch)
    shape, dtype = settings.expected_frame(engine, corrections)
    slots = settings.slots if settings.slots is not None else engine.depth + 2
    _check_room(slots, max_batch, shape, dtype)
    ring = Ring(
        slots=slots,
        max_batch=max_batch,
        max_wait_ns=int(settings.max_wait_ms * 1e6),
        allocate=engine.allocate,
    )
    ring.prepare(shape, dtype)
    native, others = outputs.orders(settings.output)
    limits = {"queue_bytes": settings.queue_bytes, "largest": 4 * shape[0] * shape[1]}
    publisher = Publisher(
        native.endpoint if native else _PRIVATE_OUTPUT, ledger, settings.queue, None, door, **limits
    )
    try:
        for order in others:
            publisher.add(outputs.Output(order, settings.queue, None, door, **limits))
        peer = None if settings.camera_key is None else Peer.of(settings.key, settings.camera_key)
        source = source or open_source(
            settings.input, settings.max_frame_bytes, peer, door, settings.max_header_bytes
        )
    except Exception:
        publisher.close(linger_s=0)
        raise
    watchdog = Watchdog()
    intake = Intake(
        ring,
        ledger,
        overrun=settings.overrun or (Overrun.block if source.lossless else Overrun.drop_oldest),
        corrections=corrections,
        max_frame_bytes=settings.max_frame_bytes,
        watchdog=watchdog,
        max_header_bytes=settings.max_header_bytes,
        max_rate=settings.max_rate,
    )
    pipeline = Pipeline(
        source=source,
        intake=intake,
        ring=ring,
        engine=supervised,
        publisher=publisher,
        ledger=ledger,
        frames=settings.frames,
        drain_s=settings.drain_s,
        stall_limit_s=settings.stall_limit_s,
        watchdog=watchdog,
    )
    return Service(pipeline, publisher, supervised, ledger, ring, settings, corrections, door)


def serve(
    settings: Settings, on_ready: Callable[[Service], None] | None = None, **parts: Any
) -> dict[str, Any]:
    """Run a service until its source ends, `frames` are published, or SIGINT or SIGTERM comes.

    Returns the final report. A first signal drains: frames received are still denoised
    and published. A second one drops them. A third one ends the process at once; and so does the first
    while the service is still being put together.
    """
    with end_on_signals():
        service = build(settings, **parts)
    try:
        with stop_on_signals(service.pipeline.stop), _control(service), _metrics(service):
            if on_ready:
                on_ready(service)
            service.pipeline.run()
    except EmstreamError as error:
        error.report = service.pipeline.report()
        if not isinstance(error, Stalled):  # what hangs would hang again while it is closed
            service.close()
        raise
    except BaseException:
        service.close()
        raise
    service.close()
    return service.pipeline.report()


@contextlib.contextmanager
def _metrics(service: Service) -> Iterator[None]:
    """Answer monitoring."""
    if service.settings.metrics is None:
        yield
        return
    watched = Watched(
        ledger=service.ledger,
        waiting=lambda: service.ring.frames,
        engine=lambda: service.engine.identity,
        stalled=lambda: service.pipeline.stalled,
        free_gpu_bytes=lambda: service.engine.current.memory_free(),
    )
    server = MetricsServer(service.settings.metrics, watched)
    log.info("metrics: %s/metrics", server.url)
    server.start()
    try:
        yield
    finally:
        server.close()


@contextlib.contextmanager
def _control(service: Service) -> Iterator[None]:
    """Take orders, and say on the stats topic where."""
    if service.settings.control is None:
        yield
        return
    control = Control(service.settings.control, service.answers(), door=service.door)
    service.publisher.about["control"] = control.endpoint
    control.start()
    try:
        yield
    finally:
        control.close()
