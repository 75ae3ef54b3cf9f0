"""A DECTRIS detector, simulated: ``emstream camera --protocol dectris``, Stream V2 on a PUSH socket.

Start, images and end of one series after the other, as the detector's control unit sends them,
to whoever connects a PULL socket. For clients of every kind to be tested without a detector.
"""

from __future__ import annotations

import importlib
import struct
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import zmq

from emstream.camera import QUEUE_FRAMES, CameraSettings, send
from emstream.endpoint import bind
from emstream.errors import OutputError
from emstream.frame import now_ns
from emstream.sources.cbor import COMPRESSED
from emstream.sources.compressed import HEADER
from emstream.sources.simulated import paced
from emstream.sources.specimen import MovingSpecimen
from emstream.sources.stream2 import ROW_MAJOR

DEFAULT_OUTPUT = "tcp://127.0.0.1:31001"
COMPRESSIONS = ("bslz4", "lz4", "none")
TYPED = {"uint8": 64, "uint16": 69, "uint32": 70, "float32": 85}
TYPES = ("uint8", "uint16", "uint32")
_SHUFFLED_BLOCK = 8192  # [bytes], as bitshuffle's HDF5 filter has it
_LZ4_BLOCK = 1024**2
_TICKS_PER_S = 50_000_000
_ENERGY_EV = 300_000.0
_THRESHOLD_EV = 20_000.0


@dataclass(frozen=True, kw_only=True)
class DectrisSettings(CameraSettings):
    """One run of the simulated detector. `reorder` and `resize_every` are not among its faults."""

    output: str = DEFAULT_OUTPUT
    type: str = "uint16"
    compression: str = "bslz4"
    thresholds: int = 1
    """Channels; each counts half of the electrons of the one before."""
    dead: int = 0
    """Bad pixels: in the mask, and without data in every image."""
    series_frames: int | None = None
    """Images of a series, after which the next begins; None is one series."""
    end: bool = True
    """Whether a series ends with a message that says so."""
    patterns: int = 0
    """Images made and compressed beforehand and sent in turn, for high rates; 0 makes each afresh."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.type not in TYPES:
            raise ValueError(f"type must be one of {', '.join(TYPES)}, got {self.type!r}")
        if self.compression not in COMPRESSIONS:
            raise ValueError(
                f"compression must be one of {', '.join(COMPRESSIONS)}, got {self.compression!r}"
            )
        if not 1 <= self.thresholds <= 8:
            raise ValueError(f"thresholds must lie in 1-8, got {self.thresholds}")
        if not 0 <= self.dead < self.height * self.width:
            raise ValueError(
                f"dead must be less than the frame's {self.height * self.width} pixels, got {self.dead}"
            )
        if self.patterns < 0:
            raise ValueError(f"patterns must not be negative, got {self.patterns}")
        if self.series_frames is not None and self.series_frames < 1:
            raise ValueError(f"series-frames must be at least 1, got {self.series_frames}")
        if self.faults.reorder or self.faults.resize_every:
            raise ValueError(
                "a DECTRIS detector sends in order and at one size; leave out --reorder and --resize-every"
            )


def run_dectris(
    settings: DectrisSettings,
    stop: threading.Event,
    on_ready: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Send images until `settings.frames` are sent or `stop` is set; returns what was sent."""
    detector = Detector(settings)
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PUSH)
    socket.sndhwm = QUEUE_FRAMES
    try:
        endpoint = bind(socket, settings.output)
        if on_ready:
            on_ready(endpoint)
        return _stream(detector, socket, stop)
    finally:
        socket.close(linger=2000)


def _stream(detector: Detector, socket: zmq.Socket[bytes], stop: threading.Event) -> dict[str, Any]:
    settings, faults = detector.settings, detector.settings.faults
    rng = np.random.default_rng((settings.seed, 3))
    report = {"sent": 0, "gaps": 0, "corrupted": 0, "series": 0}
    length = settings.series_frames or settings.frames
    # A detector that nobody listens to waits with its series.
    while not stop.is_set() and not socket.poll(100, zmq.POLLOUT):
        pass
    begin_ns, series = now_ns(), None
    for number in paced(settings.rate, stop, settings.frames):
        image_id = number % length if length else number
        if faults.stall_every and number and number % faults.stall_every == 0:
            stop.wait(faults.stall_s)
        if image_id == 0:
            if series and settings.end:
                send(socket, [series.end()], stop)
            report["series"] += 1
            series = detector.arm(report["series"], length or 0)
            send(socket, [series.start()], stop)
        assert series is not None
        is_gap, is_corrupt = rng.random(2) < (faults.gap, faults.corrupt)
        if is_gap:
            report["gaps"] += 1
            continue
        message = series.image(image_id, number)
        if is_corrupt:
            report["corrupted"] += 1
            message = message[: -1 - number % 7]
        report["sent"] += send(socket, [message], stop)
    if series and settings.end:
        send(socket, [series.end()], stop)
    seconds = (now_ns() - begin_ns) / 1e9
    return report | {"frames_per_s": round(report["sent"] / seconds, 3)}


class Detector:
    """What stays the same from series to series: the specimen, the dead pixels, the images made beforehand."""

    def __init__(self, settings: DectrisSettings) -> None:
        self.settings = settings
        self.cbor = _library("cbor2")
        self._rng = np.random.default_rng((settings.seed, 4))
        self._specimen = MovingSpecimen(
            seed=settings.seed, dose=settings.dose, height=settings.height, width=settings.width
        )
        self.channels = [f"threshold_{n + 1}" for n in range(settings.thresholds)]
        self.mask = np.zeros((settings.height, settings.width), np.uint32)
        places = self._rng.choice(self.mask.size, settings.dead, replace=False)
        self.mask.reshape(-1)[places] = 2  # bit 1: dead
        self._made = [self._encode(n) for n in range(settings.patterns)]

    def arm(self, number: int, images: int) -> Series:
        return Series(self, number, images)

    def pixels(self, number: int) -> dict[str, np.ndarray]:
        """The images (H, W) of all channels at one exposure."""
        counts, found = self._specimen.counts(number), {}
        for name in self.channels:
            found[name] = counts.astype(self.settings.type)
            found[name][self.mask != 0] = np.iinfo(self.settings.type).max
            counts = self._rng.binomial(counts, 0.5)
        return found

    def data(self, number: int) -> dict[str, Any]:
        """The same as CBOR has them."""
        return self._made[number % len(self._made)] if self._made else self._encode(number)

    def _encode(self, number: int) -> dict[str, Any]:
        compression = self.settings.compression
        return {name: self.array(image, compression) for name, image in self.pixels(number).items()}

    def array(self, values: np.ndarray, compression: str) -> Any:
        """A multi-dimensional array of typed values, compressed or not."""
        content = compressed(values, compression)
        if compression != "none":
            element = values.itemsize if compression == "bslz4" else 0
            content = self.cbor.CBORTag(COMPRESSED, [compression, element, content])
        typed = self.cbor.CBORTag(TYPED[values.dtype.name], content)
        return self.cbor.CBORTag(ROW_MAJOR, [list(values.shape), typed])


class Series:
    """One acquisition, from arm to disarm."""

    def __init__(self, detector: Detector, number: int, images: int) -> None:
        self._detector = detector
        self._images = images
        self._armed = datetime.now(UTC)
        self._armed_ns = now_ns()
        self._names = {"series_id": number, "series_unique_id": uuid.uuid4().hex}

    def start(self) -> bytes:
        detector, settings = self._detector, self._detector.settings
        thresholds = {name: _THRESHOLD_EV * (n + 1) for n, name in enumerate(detector.channels)}
        mask = detector.array(detector.mask, "bslz4")
        return self._pack(
            "start",
            arm_date=self._armed,
            beam_center_x=settings.width / 2,
            beam_center_y=settings.height / 2,
            channels=detector.channels,
            count_time=1 / settings.rate,
            countrate_correction_enabled=False,
            detector_description="emstream simulated detector",
            detector_serial_number=f"S-{settings.seed:04d}",
            detector_translation=[0.0, 0.0, 0.0],
            flatfield_enabled=False,
            frame_time=1 / settings.rate,
            goniometer={},
            image_dtype=settings.type,
            image_size_x=settings.width,
            image_size_y=settings.height,
            incident_energy=_ENERGY_EV,
            number_of_images=self._images,
            pixel_mask=dict.fromkeys(detector.channels, mask),
            pixel_mask_enabled=True,
            pixel_size_x=75e-6,
            pixel_size_y=75e-6,
            saturation_value=int(np.iinfo(settings.type).max) - 1,
            sensor_material="Si",
            sensor_thickness=4.5e-4,
            threshold_energy=thresholds,
            user_data=None,
            virtual_pixel_interpolation_enabled=False,
        )

    def image(self, image_id: int, number: int) -> bytes:
        """Image `image_id` of the series, which is `number` of the run."""
        data = self._detector.data(number)
        stop = (now_ns() - self._armed_ns) * _TICKS_PER_S // 1_000_000_000
        real = round(_TICKS_PER_S / self._detector.settings.rate)
        return self._pack(
            "image",
            data=data,
            image_id=image_id,
            real_time=[real, _TICKS_PER_S],
            series_date=self._armed,
            start_time=[max(0, stop - real), _TICKS_PER_S],
            stop_time=[stop, _TICKS_PER_S],
            user_data=None,
        )

    def end(self) -> bytes:
        return self._pack("end")

    def _pack(self, kind: str, **fields: Any) -> bytes:
        return bytes(self._detector.cbor.dumps({"type": kind, **self._names, **fields}))


def compressed(pixels: np.ndarray, compression: str) -> bytes:
    """The pixels, framed as in HDF5 unless `compression` is none."""
    raw = np.ascontiguousarray(pixels)
    if compression == "none":
        return raw.tobytes()
    if compression == "bslz4":
        blocks = _library("bitshuffle").compress_lz4(raw, _SHUFFLED_BLOCK // raw.itemsize)
        return HEADER.pack(raw.nbytes, _SHUFFLED_BLOCK) + bytes(blocks)
    return HEADER.pack(raw.nbytes, _LZ4_BLOCK) + b"".join(_lz4_blocks(raw.tobytes()))


def _lz4_blocks(data: bytes) -> Iterator[bytes]:
    compress = _library("lz4.block").compress
    for start in range(0, len(data), _LZ4_BLOCK):
        block = data[start : start + _LZ4_BLOCK]
        smaller = compress(block, store_size=False)
        # A block that does not shrink is stored, which its size tells.
        content = smaller if len(smaller) < len(block) else block
        yield struct.pack(">I", len(content)) + content


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise OutputError(f"a DECTRIS camera needs {name}: pip install 'emstream[cameras]'") from None
