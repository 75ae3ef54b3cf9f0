"""Engines behind inference servers: the Open Inference Protocol, also known as KServe v2, over gRPC.

NVIDIA Triton, OpenVINO Model Server and others speak it. The address::

    grpc://HOST[:PORT][,HOST[:PORT]...]/MODEL[/VERSION][?card=FILE&timeout_s=5]

Several servers share the batches. ``grpcs://`` encrypts, with ``?ca=FILE`` for servers
whose certificate nobody else vouches for and ``&certificate=FILE&key=FILE`` for servers that
ask who is there. What the network is for stands in the model's configuration, where
``emstream export`` wrote it; of a server that has none, or of a model that came there in
another way, the same network's file tells it, `card`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import re
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import numpy as np

from emstream.errors import (
    BatchRefused,
    EngineError,
    EngineInvalid,
    EngineNotFound,
    EngineUnavailable,
    ServerFailed,
)
from emstream.frame import now_ns
from emstream.inference.card import EngineCard
from emstream.inference.engine import Engine
from emstream.inference.plan import read_plan
from emstream.inference.shared import SharedEngine
from emstream.inference.tiling import TiledEngine

log = logging.getLogger(__name__)
PARAMETER = "emstream"
"""In a model's configuration: a JSON map of the network's ``sha256``, its ``version`` and its card's entries."""
_DEFAULT_PORT = 8001
_TYPES: dict[str, np.dtype[Any]] = {
    "FP32": np.dtype(np.float32),
    "FP16": np.dtype(np.float16),
    "UINT8": np.dtype(np.uint8),
    "UINT16": np.dtype(np.uint16),
    "UINT32": np.dtype(np.uint32),
}
_OPTIONS = ("card", "timeout_s", "ca", "certificate", "key")
_REFUSALS = ("StatusCode.INVALID_ARGUMENT", "StatusCode.OUT_OF_RANGE")
_MARGIN_S = 1.0  # gRPC ends a call that is late by itself
_BELIEVED_NS = 1_000_000_000
"""How long what a server said of its network holds: another one may take its place at any time."""
_CHECK_S = 1.0  # a server that is well says at once what it has
_CHANNEL = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # A server that comes back is noticed within a second; otherwise that may take two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
]


@dataclass(frozen=True, kw_only=True)
class RemoteModel:
    """A model on one or several inference servers."""

    hosts: tuple[str, ...]
    """host:port of each."""
    model: str
    version: str = ""
    """Empty for the newest."""
    encrypted: bool = False
    card: Path | None = None
    """The same network as a file of this machine."""
    timeout_s: float = 5.0
    """How long a server may take to answer."""
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None

    @classmethod
    def of(cls, url: str) -> RemoteModel:
        """Take an address apart. Raises ValueError, which says what it should look like."""
        parts = urlsplit(url)
        path = re.fullmatch(r"/([^/]+)(?:/(\d+))?", parts.path)
        hosts = tuple(_host_and_port(each, url) for each in parts.netloc.split(","))
        options = dict(parse_qsl(parts.query, keep_blank_values=True))
        if parts.scheme not in ("grpc", "grpcs") or not path or parts.fragment:
            raise ValueError(f"an engine's address must look like grpc://HOST:8001/MODEL, got {url!r}")
        if len(set(hosts)) < len(hosts):
            raise ValueError(
                f"{url!r} names one server twice; for more batches at a time, let it have more instances"
            )
        if unknown := set(options) - set(_OPTIONS):
            raise ValueError(f"{url!r}: options are {', '.join(_OPTIONS)}, got {', '.join(sorted(unknown))}")
        encrypted = parts.scheme == "grpcs"
        if not encrypted and (given := {"ca", "certificate", "key"} & set(options)):
            raise ValueError(f"{url!r}: {', '.join(sorted(given))} are for grpcs://, which encrypts")
        if ("certificate" in options) != ("key" in options):
            raise ValueError(f"{url!r}: certificate and key go together")
        return cls(
            hosts=hosts,
            model=path[1],
            version=path[2] or "",
            encrypted=encrypted,
            timeout_s=_timeout(options.pop("timeout_s", "5"), url),
            **{name: Path(value) for name, value in options.items()},
        )


def load_remote(url: str) -> Engine:
    """The engine at an address: its servers, sharing the batches, without those that are away.

    Raises EngineError or ValueError.
    """
    at = RemoteModel.of(url)
    engines: list[RemoteEngine] = []
    away: list[EngineUnavailable] = []
    with contextlib.ExitStack() as stack:
        for host in at.hosts:
            try:
                engines.append(stack.enter_context(contextlib.closing(RemoteEngine(at, host))))
            except EngineUnavailable as error:
                away.append(error)
        if not engines:
            raise away[0]
        for each in engines[1:]:
            if (each.sha256, each.made_for) != (engines[0].sha256, engines[0].made_for):
                raise EngineInvalid(
                    f"{each.where} and {engines[0].where} are not the same: {each.describe()}, and "
                    f"{engines[0].describe()}"
                )
        stack.pop_all()
    for missing in away:
        log.warning("%s; until the engine is loaded again the others do without it", missing)
    engine = engines[0] if len(engines) == 1 else SharedEngine(engines)
    return engine if engine.made_for else TiledEngine(engine)


def is_remote(path: str | Path | None) -> bool:
    """Whether an engine is named by an address instead of a file."""
    return isinstance(path, str) and path.lower().startswith(("grpc:", "grpcs:"))


def _host_and_port(text: str, url: str) -> str:
    match = re.fullmatch(r"([^:\s@]+|\[[0-9a-fA-F:.]+\])(?::(\d{1,5}))?", text)
    port = int(match[2]) if match and match[2] else _DEFAULT_PORT
    if not match or not 0 < port < 65536:
        raise ValueError(f"{url!r}: a server must look like HOST:{_DEFAULT_PORT}, got {text!r}")
    return f"{match[1]}:{port}"


def _timeout(text: str, url: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0.01 <= seconds <= 3600:
        raise ValueError(f"{url!r}: timeout_s must lie in 0.01-3600 s, got {text!r}")
    return seconds


@dataclass
class _Ticket:
    answer: Future[Any]
    expected: np.ndarray


class RemoteEngine(Engine):
    """One model on one server. Its answers are waited for by time; what does not come raises ServerFailed."""

    def __init__(self, at: RemoteModel, host: str) -> None:
        """Connect and ask what the model is.

        Raises EngineUnavailable when nobody answers or there is no such model, and EngineInvalid when it
        is no denoiser of ours.
        """
        try:
            from tritonclient import grpc
        except ImportError:
            raise EngineUnavailable(
                f"{host}: inference servers are reached with tritonclient: pip install 'emstream[remote]'"
            ) from None
        self._grpc = grpc
        self._host, self._model, self._timeout_s = host, at.model, at.timeout_s
        self.where = f"{at.model} at {host}"
        self._client = grpc.InferenceServerClient(host, creds=_credentials(at), channel_args=_CHANNEL)
        try:
            self._describe(at)
        except BaseException:
            self._client.close()
            raise

    def _describe(self, at: RemoteModel) -> None:
        grpc = self._grpc
        try:
            server = self._client.get_server_metadata(client_timeout=self._timeout_s)
            model = self._client.get_model_metadata(at.model, at.version, client_timeout=self._timeout_s)
        except grpc.InferenceServerException as error:
            raise EngineUnavailable(self._why_unavailable(error, self._timeout_s)) from None
        self._version = at.version or max(model.versions, key=lambda text: (len(text), text), default="")
        self.device = f"{server.name or 'inference server'} {server.version} at {self._host}".replace(
            "  ", " "
        )
        if len(model.inputs) != 1 or len(model.outputs) != 1:
            raise EngineInvalid(
                f"{self.where} is no denoiser: it has {len(model.inputs)} inputs and {len(model.outputs)} outputs, "
                "expected one of each"
            )
        (self._input,), (self._output,) = model.inputs, model.outputs
        self._dtype = self._type_of(self._input)
        self._type_of(self._output)
        frames, *sides = (int(side) for side in self._input.shape[:3])
        if min(sides) > 0:
            self.made_for = ((sides[0], sides[1]), self._dtype)
        config = self._config(self._timeout_s)
        limit = config.max_batch_size if config is not None and config.max_batch_size > 0 else frames
        self.max_batch = limit if limit > 0 else None
        self.best_batch = self.max_batch or 1
        self.sha256, self.card = self._network(config, at.card)
        self.name = self.card.name

    def _type_of(self, tensor: Any) -> np.dtype[Any]:
        """Of the pixels; plans take those of 16 and 32 bits as bytes (B, H, W, bytes per pixel)."""
        shape = [int(side) for side in tensor.shape]
        if len(shape) == 3 and tensor.datatype in _TYPES:
            return _TYPES[tensor.datatype]
        if len(shape) == 4 and tensor.datatype == "UINT8" and shape[3] in (1, 2, 4):
            return np.dtype(f"<u{shape[3]}")
        raise EngineInvalid(
            f"{self.where} is no denoiser: {tensor.name} is {tensor.datatype} of shape {shape}, "
            f"expected frames (B, H, W) of one of {', '.join(_TYPES)}"
        )

    def _config(self, timeout_s: float) -> Any:
        """The model's configuration; None of a server that has none, for the protocol does not ask for it."""
        try:
            return self._client.get_model_config(self._model, self._version, client_timeout=timeout_s).config
        except self._grpc.InferenceServerException as error:
            if error.status() == "StatusCode.UNIMPLEMENTED":
                return None
            raise EngineUnavailable(self._why_unavailable(error, timeout_s)) from None

    def _network(self, config: Any, file: Path | None) -> tuple[str, EngineCard]:
        """SHA-256 and card of the network, as its server says, or else a file of this machine."""
        told = self._told(config)
        self._tells = told is not None
        self._believed_until_ns = now_ns() + _BELIEVED_NS
        if file is None:
            if told is None:
                raise EngineInvalid(
                    f"{self.where} does not say what version {self._version or 1} is for; write its repository with "
                    f"emstream export, or name the same network here: grpc://{self._host}/{self._model}?card=NETWORK.onnx"
                )
            return told
        mine = network_of(file)
        if told and told[0] != mine[0]:
            raise EngineInvalid(
                f"{self.where} has another network than {file}: SHA-256 {told[0][:12]}..., not {mine[0][:12]}..."
            )
        return mine

    def _told(self, config: Any) -> tuple[str, EngineCard] | None:
        """What a configuration says of the network; None when it says nothing, or only of another version."""
        if config is None or PARAMETER not in config.parameters:
            return None
        return read_parameter(config.parameters[PARAMETER].string_value, self.where, self._version)

    def _why_unavailable(self, error: Any, timeout_s: float) -> str:
        status = str(error.status()).removeprefix("StatusCode.")
        if status in ("UNAVAILABLE", "DEADLINE_EXCEEDED"):
            return (
                f"no inference server answers at {self._host} within {timeout_s:g} s, or it has no model "
                f"{self._model} ready ({_line(error)}); is it running, is the port its gRPC one (8001, not 8000)?"
            )
        return f"the inference server at {self._host} has no {self._model}: {_line(error)}"

    def submit(self, counts: np.ndarray, expected: np.ndarray) -> _Ticket:
        self._check(counts)
        pixels = np.ascontiguousarray(counts, self._dtype)
        if len(self._input.shape) == 4:
            pixels = pixels[..., None].view(np.uint8)
        tensor = self._grpc.InferInput(self._input.name, pixels.shape, self._input.datatype)
        tensor.set_data_from_numpy(pixels)
        answer: Future[Any] = Future()

        def settle(result: Any, error: Any) -> None:
            if error is None:
                answer.set_result(result)
            else:
                answer.set_exception(error)

        self._client.async_infer(
            self._model, [tensor], settle, model_version=self._version, client_timeout=self._timeout_s
        )
        return _Ticket(answer, expected)

    def collect(self, ticket: _Ticket) -> np.ndarray:
        # Before the answer is waited for: a server that hangs is found out sooner.
        if self._tells and now_ns() >= self._believed_until_ns:
            self._check_network()
        try:
            response = ticket.answer.result(self._timeout_s + _MARGIN_S).get_response()
        except (TimeoutError, self._grpc.InferenceServerException) as error:
            if isinstance(error, TimeoutError) or error.status() == "StatusCode.DEADLINE_EXCEEDED":
                said = f" did not answer within {self._timeout_s:g} s (see timeout_s, max_batch)"
            elif error.status() in _REFUSALS:
                raise BatchRefused(f"{self.where} refuses: {_line(error)}") from None
            else:
                said = f": {_line(error)}"
            self._believed_until_ns = 0
            raise ServerFailed(f"{self.where}{said}") from None
        try:
            pixels = _pixels(response, self._output.name)
            if pixels.shape != ticket.expected.shape:  # one frame would be spread over the whole batch
                raise ValueError(f"they are {pixels.shape}, expected {ticket.expected.shape}")
        except (ValueError, KeyError) as error:
            raise ServerFailed(f"{self.where} answered with something else than pictures: {error}") from None
        ticket.expected[:] = pixels
        return ticket.expected

    def describe(self) -> str:
        """Network and frame size, in words."""
        size = "any size" if self.made_for is None else f"{self.made_for[0][0]}x{self.made_for[0][1]}"
        return f"{self.name}, SHA-256 {(self.sha256 or '')[:12]}..., frames of {size}"

    def close(self) -> None:
        self._client.close()

    def _check(self, counts: np.ndarray) -> None:
        if self.made_for and counts.shape[1:] != self.made_for[0]:
            height, width = self.made_for[0]
            raise BatchRefused(
                f"{self.where} takes frames of {height}x{width}, got {counts.shape[1]}x{counts.shape[2]}"
            )
        if not _fits(counts, self._dtype):
            raise BatchRefused(
                f"{self.where} takes {self._dtype}, which does not hold these {counts.dtype} counts"
            )

    def _check_network(self) -> None:
        try:
            told = self._told(self._config(min(self._timeout_s, _CHECK_S)))
        except EngineError as error:
            raise ServerFailed(str(error)) from None
        if told is None:
            raise ServerFailed(f"{self.where} no longer says what the network is")
        if told[0] != self.sha256:
            raise ServerFailed(
                f"{self.where} came back with another network, {told[1].name}, SHA-256 {told[0][:12]}..."
            )
        self._believed_until_ns = now_ns() + _BELIEVED_NS


def read_parameter(text: str, where: str, version: str = "") -> tuple[str, EngineCard] | None:
    """SHA-256 and card in a model's configuration; None if they are not of this `version`. Raises EngineInvalid."""
    try:
        entries = json.loads(text)
        sha256, of = entries.pop("sha256"), str(entries.pop("version", version))
        metadata = {key: json.dumps(value) for key, value in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise EngineInvalid(
            f"{where}: its parameter {PARAMETER!r} is not what emstream export writes"
        ) from None
    if version and of != version:
        return None
    return str(sha256), EngineCard.from_metadata(metadata, where)


def parameter_of(sha256: str, card: EngineCard, version: int) -> str:
    """What `read_parameter` reads."""
    entries = {key: json.loads(text) for key, text in card.to_metadata().items()}
    return json.dumps({"sha256": sha256, "version": version} | entries)


def network_of(file: Path) -> tuple[str, EngineCard]:
    """SHA-256 and card of the network in an .onnx or .plan. Raises EngineError."""
    if file.suffix == ".plan":
        record, _ = read_plan(file)
        return record.onnx_sha256, record.card
    from emstream.inference.openvino import OpenVINOEngine

    if not file.is_file():
        raise EngineNotFound(f"no network at {file}")
    engine = OpenVINOEngine(file)
    assert engine.sha256
    assert engine.card
    return engine.sha256, engine.card


def _pixels(response: Any, name: str) -> np.ndarray:
    """One output of an answer, which comes as bytes or, of some servers, as numbers."""
    place = next((n for n, output in enumerate(response.outputs) if output.name == name), None)
    if place is None:
        raise KeyError(f"there is no {name}")
    output = response.outputs[place]
    flat: np.ndarray
    if place < len(response.raw_output_contents):
        flat = np.frombuffer(response.raw_output_contents[place], _TYPES[output.datatype])
    else:
        flat = np.asarray(output.contents.fp32_contents, np.float32)
    return flat.reshape(tuple(output.shape))


def _fits(counts: np.ndarray, dtype: np.dtype[Any]) -> bool:
    """Whether counts stay what they are in `dtype`; float32 holds all there are."""
    if dtype in (np.float32, counts.dtype):
        return True
    with np.errstate(invalid="ignore", over="ignore"):
        return bool((counts.astype(dtype) == counts).all())


def _credentials(at: RemoteModel) -> Any:
    """Of an encrypted connection. Raises EngineUnavailable for a file that cannot be read."""
    if not at.encrypted:
        return None
    import grpc

    def content(path: Path | None) -> bytes | None:
        try:
            return None if path is None else path.read_bytes()
        except OSError as error:
            raise EngineUnavailable(f"cannot read {path}: {error.strerror}") from None

    return grpc.ssl_channel_credentials(content(at.ca), content(at.key), content(at.certificate))


def _line(error: Any) -> str:
    return " ".join(str(error.message()).split())[:300]
