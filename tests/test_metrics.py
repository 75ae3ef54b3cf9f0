from __future__ import annotations

import json
import socket
import struct
import threading
import time
import urllib.error
import urllib.request
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from emstream.errors import OutputError
from emstream.ledger import Histogram, Ledger
from emstream.metrics import BOUNDS_S, MetricsServer, Watched


class Served:
    def __init__(self) -> None:
        self.ledger = Ledger()
        self.engine: dict[str, Any] = {"name": "test", "sha256": None, "device": "none"}
        self.stalled: dict[str, float] = {}
        self.free: int | None = None
        watched = Watched(
            self.ledger, lambda: 3, lambda: self.engine, lambda: self.stalled, lambda: self.free
        )  # fmt: skip
        self.server = MetricsServer("127.0.0.1:0", watched)
        self.server.start()

    def get(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(self.server.url + path, timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def metrics(self) -> dict[tuple[str, str], float]:
        """Values by name and the first label's value."""
        families = text_string_to_metric_families(self.get("/metrics")[1])
        return {
            (sample.name, next(iter(sample.labels.values()), "")): sample.value
            for family in families
            for sample in family.samples
        }


@pytest.fixture
def served() -> Any:
    served = Served()
    yield served
    served.server.close()


def test_ledger_is_read_by_prometheus(served: Served) -> None:
    ledger = served.ledger
    for n in (0, 1, 3, 4, 5, 6):
        ledger.receive()
        ledger.number("camera", 1, n)
    ledger.publish()
    ledger.drop(2)
    ledger.fail(1)
    ledger.reject('a "bad"\nframe')
    seen = served.metrics()
    assert seen["emstream_frames_received_total", ""] == 6
    outcomes = {
        name: seen["emstream_frames_total", name] for name in ("published", "dropped", "rejected", "failed")
    }
    assert outcomes == {"published": 1, "dropped": 2, "rejected": 1, "failed": 1}
    assert seen["emstream_frames_in_flight", ""] == 1
    assert seen["emstream_frames_missing", ""] == 1
    assert seen["emstream_rejections_total", 'a "bad"\nframe'] == 1
    assert seen["emstream_ring_frames", ""] == 3
    assert ("emstream_gpu_free_bytes", "") not in seen
    served.free = 5
    assert served.metrics()["emstream_gpu_free_bytes", ""] == 5


def test_latencies_are_histograms(served: Served) -> None:
    for milliseconds in (0.7, 3, 3, 40, 20_000):
        served.ledger.latency["total"].add(int(milliseconds * 1e6))
    text = served.get("/metrics")[1]
    assert 'emstream_latency_seconds_bucket{le="0.0005",stage="total"} 0.0' in text
    assert 'emstream_latency_seconds_bucket{le="0.001",stage="total"} 1.0' in text
    assert 'emstream_latency_seconds_bucket{le="0.005",stage="total"} 3.0' in text
    assert 'emstream_latency_seconds_bucket{le="10.0",stage="total"} 4.0' in text
    assert 'emstream_latency_seconds_bucket{le="+Inf",stage="total"} 5.0' in text
    assert 'emstream_latency_seconds_count{stage="total"} 5.0' in text
    assert 'emstream_latency_seconds_sum{stage="total"} 20.0467' in text


def test_histogram_counts_below_bounds_as_a_plain_count_does() -> None:
    histogram = Histogram()
    durations_s = [1.03**n * 1e-5 for n in range(500)]
    for duration_s in durations_s:
        histogram.add(int(duration_s * 1e9))
    below, sum_s = histogram.cumulative(BOUNDS_S)
    assert sum_s == pytest.approx(sum(durations_s), rel=1e-3)
    for bound, counted in zip(BOUNDS_S, below, strict=False):
        assert abs(counted - sum(duration <= bound for duration in durations_s)) <= 1
    assert below[-1] == 500


def test_health_follows_stalls_and_readiness_the_fallback_too(served: Served) -> None:
    assert [served.get(path)[0] for path in ("/healthz", "/readyz")] == [200, 200]
    served.engine["fallback_for"] = "better"
    assert [served.get(path)[0] for path in ("/healthz", "/readyz")] == [200, 503]
    assert served.metrics()["emstream_engine_is_fallback", ""] == 1
    served.stalled["engine"] = 2.345
    status, body = served.get("/healthz?x=1")
    assert status == 503
    assert json.loads(body)["stalled"] == {"engine": 2.3}
    assert served.metrics()["emstream_stalled_seconds", "engine"] == 2.345


def test_other_paths_say_which_there_are(served: Served) -> None:
    assert served.get("/") == (404, "/metrics, /healthz or /readyz\n")


def test_address_that_cannot_be_had_is_explained(served: Served) -> None:
    watched = Watched(Ledger(), lambda: 0, dict, dict, lambda: None)
    with pytest.raises(ValueError, match=r"must be HOST:PORT .*, got '9095'"):
        MetricsServer("9095", watched)
    with pytest.raises(OutputError, match=r"cannot serve metrics on .*in use; --metrics takes HOST:PORT"):
        MetricsServer(served.server.url.removeprefix("http://"), watched)


def test_hundred_at_once_cost_one_look(served: Served) -> None:
    looks = []
    snapshot = served.ledger.snapshot
    served.ledger.snapshot = lambda: looks.append(1) or time.sleep(0.01) or snapshot()  # type: ignore[method-assign,func-returns-value]
    answers: list[int] = []
    asking = [
        threading.Thread(target=lambda: answers.append(served.get("/metrics")[0]), daemon=True)
        for _ in range(100)
    ]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join(20)
    assert answers == [200] * 100
    assert len(looks) < 50


def test_who_asks_and_goes_away_is_no_traceback(served: Served, capfd: Any, caplog: Any) -> None:
    host, port = served.server.url.removeprefix("http://").split(":")
    caplog.set_level("DEBUG")
    end = time.monotonic() + 20
    while "went away" not in caplog.text and time.monotonic() < end:  # some are answered before they go
        with socket.create_connection((host, int(port))) as rude:
            rude.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            rude.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        assert served.get("/healthz")[0] == 200
    assert "went away" in caplog.text
    assert "Traceback" not in capfd.readouterr().err + caplog.text


def test_address_of_ipv6_is_served() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 here")
    server = MetricsServer("[::1]:0", Watched(Ledger(), lambda: 0, dict, dict, lambda: None))
    server.start()
    with urllib.request.urlopen(server.url + "/healthz", timeout=10) as answer:
        assert answer.status == 200
    server.close()
