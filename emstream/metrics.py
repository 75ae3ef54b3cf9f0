"""What monitoring asks a running service: ``/metrics`` for Prometheus, ``/healthz`` and ``/readyz``.

A thread of its own answers; it only reads what the service counts anyway.
"""

from __future__ import annotations

import json
import logging
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from emstream.errors import OutputError
from emstream.ledger import Ledger
from emstream.version import VERSION

log = logging.getLogger(__name__)
BOUNDS_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_SETTLED = ("published", "dropped", "rejected", "failed")
_IDLE_S = 10.0


@dataclass(frozen=True)
class Watched:
    """What there is to see of a service. Each call returns at once."""

    ledger: Ledger
    waiting: Callable[[], int]
    """Frames in the ring that no engine has taken yet."""
    engine: Callable[[], Mapping[str, Any]]
    """{name, sha256, device, perhaps fallback_for}."""
    stalled: Callable[[], Mapping[str, float]]
    """Stages that hang, and for how long [s]."""
    free_gpu_bytes: Callable[[], int | None]
    """Memory left on the engine's GPU; None without one."""


class _Collector(Collector):
    def __init__(self, watched: Watched) -> None:
        self._watched = watched

    def collect(self) -> Iterator[Metric]:
        watched = self._watched
        counts = watched.ledger.snapshot()
        yield CounterMetricFamily("emstream_frames_received", "Frames that came in.", counts["received"])
        settled = CounterMetricFamily("emstream_frames", "Frames by what became of them.", labels=["outcome"])
        for outcome in _SETTLED:
            settled.add_metric([outcome], counts[outcome])
        yield settled
        yield GaugeMetricFamily(
            "emstream_frames_in_flight", "Received and not yet settled.", counts["in_flight"]
        )
        # A late frame takes its number back, so this is no counter.
        yield GaugeMetricFamily("emstream_frames_missing", "Gaps in the camera's numbers.", counts["missing"])
        reasons = CounterMetricFamily("emstream_rejections", "Rejected frames by reason.", labels=["reason"])
        for reason, times in watched.ledger.reasons().items():
            reasons.add_metric([reason], times)
        yield reasons
        stages = HistogramMetricFamily(
            "emstream_latency_seconds",
            "Time per frame, from receiving to publishing and by stage.",
            labels=["stage"],
        )
        for stage, histogram in watched.ledger.latency.items():
            below, sum_s = histogram.cumulative(BOUNDS_S)
            buckets = [(str(bound), number) for bound, number in zip((*BOUNDS_S, "+Inf"), below, strict=True)]
            stages.add_metric([stage], buckets, sum_s)
        yield stages
        yield GaugeMetricFamily("emstream_ring_frames", "Frames waiting for the engine.", watched.waiting())
        engine = {key: str(value) for key, value in watched.engine().items() if value is not None}
        yield InfoMetricFamily("emstream_engine", "The engine at work.", engine)
        yield GaugeMetricFamily(
            "emstream_engine_is_fallback",
            "1 when the engine stands in for another.",
            "fallback_for" in engine,
        )
        stalled = GaugeMetricFamily("emstream_stalled_seconds", "How long a stage hangs.", labels=["stage"])
        for stage, seconds in watched.stalled().items():
            stalled.add_metric([stage], seconds)
        yield stalled
        if (free_bytes := watched.free_gpu_bytes()) is not None:
            yield GaugeMetricFamily("emstream_gpu_free_bytes", "Memory left on the engine's GPU.", free_bytes)
        yield InfoMetricFamily("emstream_build", "Version.", {"version": VERSION})


class _Page:
    """The text of ``/metrics``, made once for all who wait for it: making it keeps the frames from the interpreter."""

    def __init__(self, watched: Watched) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Collector(watched))
        self._lock = threading.Lock()
        self._text, self._begun_ns = b"", 0

    def newest(self) -> bytes:
        asked_ns = time.monotonic_ns()
        with self._lock:
            if self._begun_ns < asked_ns:
                self._begun_ns = time.monotonic_ns()
                self._text = generate_latest(self._registry)
            return self._text


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(address, handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """One who asked and went away is no event; anything else is one line of the log and its traceback."""
        if isinstance(sys.exception(), OSError):
            log.debug("%s went away: %s", client_address[0], sys.exception())
        else:
            log.exception("metrics")


class MetricsServer:
    """Answers on HOST:PORT until closed."""

    def __init__(self, address: str, watched: Watched) -> None:
        """Bind `address`, "HOST:PORT"; port 0 picks a free one. Raises OutputError when that cannot be had."""
        host, port = host_and_port(address)
        page = _Page(watched)

        class Handler(BaseHTTPRequestHandler):
            timeout = _IDLE_S
            server_version = "emstream"
            sys_version = ""

            def do_GET(self) -> None:
                stalled = {stage: round(seconds, 1) for stage, seconds in watched.stalled().items()}
                path = self.path.partition("?")[0]
                if path == "/metrics":
                    self._send(HTTPStatus.OK, page.newest(), CONTENT_TYPE_LATEST)
                elif path in ("/healthz", "/readyz"):
                    # Ready is stricter: who looks for a picture wants the engine that was asked for, too.
                    well = not stalled and (path == "/healthz" or "fallback_for" not in watched.engine())
                    status = HTTPStatus.OK if well else HTTPStatus.SERVICE_UNAVAILABLE
                    body = {"ok": well, "stalled": stalled, "engine": dict(watched.engine())}
                    self._send(status, json.dumps(body).encode(), "application/json")
                else:
                    self._send(HTTPStatus.NOT_FOUND, b"/metrics, /healthz or /readyz\n", "text/plain")

            def _send(self, status: HTTPStatus, body: bytes, kind: str) -> None:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *arguments: Any) -> None:
                log.debug(format, *arguments)

        try:
            self._server = _Server((host.strip("[]"), port), Handler)
        except OSError as error:
            raise OutputError(
                f"cannot serve metrics on {address}: {error.strerror}; --metrics takes HOST:PORT"
            ) from None
        self.url = f"http://{host}:{self._server.server_port}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.1,), name="metrics", daemon=True
        )

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        if self._thread.ident is not None:
            self._server.shutdown()
        self._server.server_close()


def host_and_port(address: str) -> tuple[str, int]:
    """The parts of HOST:PORT. Raises ValueError."""
    host, _, port = address.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"metrics must be HOST:PORT such as 127.0.0.1:9095, got {address!r}")
    return host, int(port)
