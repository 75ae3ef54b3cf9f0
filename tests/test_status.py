"""``emstream status``: the service's own figures, read from its statistics alone."""

from __future__ import annotations

import json
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq
from rich.console import Console

from emstream import wire
from emstream.cli.report import print_report
from emstream.errors import SourceError
from emstream.inference import IdentityEngine
from emstream.printable import PrintableFormatter
from emstream.status import panel, status_once, statuses
from tests.conftest import Rig, exact, message
from tests.test_view import CARD

SILENT_S = 20.0


@pytest.fixture
def run(rig: Callable[..., Rig]) -> Rig:
    engine = IdentityEngine()
    engine.card = CARD
    run = rig(engine=engine)
    run.start()
    return run


def send(run: Rig, number: int, counts: int = 2) -> None:
    run.camera.send_multipart(message(number, np.full((32, 48), counts, np.uint8)))


def until(heard: Iterator[dict[str, Any]], **wanted: Any) -> dict[str, Any]:
    """The first of the next figures that say `wanted`."""
    for _, status in zip(range(20), heard, strict=False):
        if all(status.get(key) == value for key, value in wanted.items()):
            return status
    raise AssertionError(f"never saw {wanted}; last was {status}")


def printed(status: dict[str, Any]) -> str:
    console = Console(width=120, file=StringIO())
    console.print(panel(status))
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_figures_are_those_of_the_service(run: Rig) -> None:
    send(run, 0)
    send(run, 3)
    run.wait(lambda ledger: ledger["published"] == 2)
    status = until(statuses(run.service.publisher.endpoint, silent_s=SILENT_S), state="live")
    assert exact(status["ledger"])
    assert (status["ledger"]["published"], status["ledger"]["missing"]) == (2, 2)
    newest = status["newest"]
    assert (newest["frame"], newest["series"], newest["source"], newest["shape"]) == (
        3,
        "1",
        "test",
        [32, 48],
    )
    assert (newest["dose"], newest["in_domain"]) == (2.0, True)
    assert status["alarms"] == ["2 missing"]
    assert status["engine"]["name"] == "identity"
    assert status["latency_ms"].keys() >= {"p50", "p99", "max", "batched_to_inferred"}
    json.dumps(status, allow_nan=False)


def test_service_without_a_camera_is_waiting_and_one_that_falls_silent_is_said_to(run: Rig) -> None:
    heard = statuses(run.service.publisher.endpoint, silent_s=SILENT_S)
    waiting = until(heard, state="waiting")
    assert waiting["alarms"] == []
    assert "waiting for the first frame" in printed(waiting)
    send(run, 0)
    assert until(heard, state="live")
    quiet = until(heard, state="quiet")
    assert quiet["frames_per_s"] == 0
    assert "the camera is silent" in printed(quiet)
    for status in (waiting, quiet):
        hung = status | {"ledger": status["ledger"] | {"in_flight": 1}}
        assert "no frames come out: the engine has them" in printed(hung)
    run.stop()


def test_dose_outside_the_domain_is_an_alarm(run: Rig) -> None:
    send(run, 0, counts=9)
    run.wait(lambda ledger: ledger["published"] == 1)
    status = until(statuses(run.service.publisher.endpoint, silent_s=SILENT_S), state="live")
    assert status["alarms"] == ["dose outside the engine's range"]
    assert "dose outside the engine's range" in printed(status)


def test_nobody_there_is_a_source_error(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"nothing heard from ipc://.* within 0.05 s; is emstream serve"):
        status_once(f"ipc://{tmp_path}/nobody", silent_s=0.05)


def test_service_that_falls_silent_is_a_source_error_for_scripts(
    tmp_path: Path, context: zmq.Context[Any]
) -> None:
    publisher, endpoint = context.socket(zmq.XPUB), f"ipc://{tmp_path}/out"
    publisher.bind(endpoint)

    def speak_once() -> None:
        assert publisher.poll(20_000)
        publisher.send_multipart([b"stats", wire.pack({"htype": wire.STATS})])

    speaking = threading.Thread(target=speak_once)
    speaking.start()
    with pytest.raises(SourceError, match=r"ipc://.* fell silent 1 s ago; has emstream serve stopped\?"):
        status_once(endpoint, silent_s=1.0)
    speaking.join()
    publisher.close(linger=0)


def test_likelihood_is_shown_beside_the_quality(run: Rig) -> None:
    observer = run.service.pipeline._observer
    given = {"value": 0.004421, "low": 0.004352, "high": 0.004489}
    observer._known = observer._newest, {"psnr_db": "insufficient data", "likelihood": given}
    status = until(statuses(run.service.publisher.endpoint), state="waiting")
    shown = printed(status)
    assert "insufficient data" in shown
    assert "4.42 (4.35 to 4.49) millinats/px" in shown


def test_silence_is_shown_with_the_last_figures(run: Rig) -> None:
    send(run, 0)
    run.wait(lambda ledger: ledger["published"] == 1)
    heard = statuses(run.service.publisher.endpoint, silent_s=2.0)
    until(heard, state="live")
    run.stop()
    run.service.close()
    status = until(heard, state="silent")
    assert status["ledger"]["published"] == 1
    assert "has emstream serve stopped?" in printed(status)


def test_rate_is_that_of_the_last_second(tmp_path: Path, context: zmq.Context[Any]) -> None:
    publisher, endpoint = context.socket(zmq.XPUB), f"ipc://{tmp_path}/out"
    publisher.bind(endpoint)
    heard = statuses(endpoint, silent_s=SILENT_S)

    def say(published: int, sent_ns: int) -> dict[str, Any]:
        stats = {"htype": wire.STATS, "ledger": {"published": published}, "sent_ns": sent_ns}
        publisher.send_multipart([b"stats", wire.pack(stats)])
        return next(heard)

    subscribed = wait_for_subscriber(publisher, heard)
    assert subscribed["state"] == "waiting"
    assert say(100, 1_000_000_000)["frames_per_s"] is None
    assert say(140, 2_000_000_000)["frames_per_s"] == 40
    assert say(140, 2_010_000_000)["frames_per_s"] == 40  # news of a recorder; too soon for a rate
    assert say(170, 3_000_000_000)["frames_per_s"] == 30
    assert say(3, 4_000_000_000)["frames_per_s"] is None  # another run of the service
    heard.close()
    publisher.close(linger=0)


def wait_for_subscriber(publisher: Any, heard: Iterator[dict[str, Any]]) -> dict[str, Any]:
    """Send nonsense until it is heard; the first figures."""
    first: list[dict[str, Any]] = []
    listening = threading.Thread(target=lambda: first.append(next(heard)))
    listening.start()
    assert publisher.poll(20_000)
    publisher.recv()
    publisher.send_multipart([b"stats", b"\xff"])
    nonsense = {"htype": wire.STATS, "ledger": [1], "newest": {"shape": "x", "frame": None}, "engine": 3}
    publisher.send_multipart([b"stats", wire.pack(nonsense)])
    listening.join(20)
    return first[0]


HOSTILE = "[/x] \x1b]0;mine\x07\r\n\u202eend"
TAMED = "[/x] \ufffd]0;mine\ufffd\ufffd\ufffd\ufffdend"


def test_texts_from_the_wire_are_neither_markup_nor_orders_to_the_terminal(
    tmp_path: Path, context: zmq.Context[Any]
) -> None:
    publisher, endpoint = context.socket(zmq.XPUB), f"ipc://{tmp_path}/out"
    publisher.bind(endpoint)
    heard = statuses(endpoint, silent_s=SILENT_S)
    wait_for_subscriber(publisher, heard)
    stats = {
        "htype": wire.STATS,
        "ledger": {"published": 1},
        "newest": {"frame": 1, "source": HOSTILE, "series": HOSTILE},
        "engine": {"name": HOSTILE, "device": HOSTILE},
    }
    publisher.send_multipart([b"stats", wire.pack(stats)])
    status = next(heard)
    heard.close()
    publisher.close(linger=0)
    assert {status["newest"]["source"], status["newest"]["series"]} == {TAMED}
    assert {status["engine"]["name"], status["engine"]["device"]} == {TAMED}
    assert printed(status).count("[/x]") == 4
    assert "\x1b" not in printed(status)


def test_log_lines_quote_what_they_got_and_do_not_obey_it() -> None:
    record = logging.LogRecord("name", logging.INFO, "path", 1, "heard %s", (HOSTILE,), None)
    assert PrintableFormatter("%(levelname)s %(message)s").format(record) == f"INFO heard {TAMED}"
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        record.exc_info = sys.exc_info()
    lines = PrintableFormatter("%(message)s").format(record).split("\n")
    assert lines[1].startswith("Traceback")
    assert not any(set("\x1b\x07\r\u202e") & set(line) for line in lines)


REPORT: dict[str, Any] = {
    "ledger": {
        "received": 1012, "published": 1009, "dropped": 2, "rejected": 1, "failed": 0, "in_flight": 0, "missing": 0,
    },
    "latency_ms": {"p50": 85.06, "p99": 132.1, "p99_9": 140.0, "max": 151.2, "batched_to_inferred": {"p50": 84.0}},
    "frames_per_s": 8.041,
    "rejected_because": {"header of 70 KiB": 1},
    "engine": {"name": "wide64", "sha256": "72992d4c" + 56 * "0", "device": "a CPU"},
    "stalled": {},
    "trust": {
        "frames": 370,
        "psnr_db": {"value": 33.0, "low": 32.6, "high": 33.5},
        "likelihood": {"value": 0.004421, "low": 0.004352, "high": 0.004489},
        "fano": 1.001,
        "spectrum": {"distance": 2.1, "farthest": 4.4, "in_domain": True},
    },
    "psnr_db": {"noisy": 6.42, "denoised": 33.84},
}  # fmt: skip


def test_report_of_a_service_says_in_a_line_each_what_matters(capsys: pytest.CaptureFixture[str]) -> None:
    print_report(REPORT, as_json=False)
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert [" ".join(line.split()) for line in lines] == [
        "ledger received 1,012 = published 1,009 + dropped 2 + rejected 1 + failed 0 + in flight 0 missing 0",
        "latency p50 85.1 p99 132 p99.9 140 max 151 ms",
        "stages infer 84 ms (p50)",
        "rate 8.04 frames/s",
        "rejected header of 70 KiB 1",
        "engine wide64 72992d4c a CPU",
        "quality PSNR 33.0 dB (32.6 to 33.5), estimated from the stream",
        "likelihood 4.42 (4.35 to 4.49) millinats/px against an even grey",
        "noise Fano factor 1.001 (1 for counts)",
        "spectrum like what the engine was trained on: 2.1 spreads from it, 4.4 are usual",
        "truth PSNR 6.42 dB noisy, 33.8 dB denoised, against the simulated specimen",
    ]


def test_report_names_what_has_stalled_and_nothing_that_is_empty(capsys: pytest.CaptureFixture[str]) -> None:
    print_report(REPORT | {"stalled": {"engine": 12.0}, "rejected_because": {}, "files": []}, as_json=False)
    out = capsys.readouterr().out
    assert "the engine has stalled for 12 s" in out
    assert "rejected_because" not in out
    assert "files" not in out


def test_report_shows_maps_in_maps(capsys: pytest.CaptureFixture[str]) -> None:
    recording = {"files": ["a.h5", "b.h5"], "lost": {"raw": 3, "denoised": 0}, "engine": REPORT["engine"]}
    print_report({"recording": recording, "shape": [20, 512, 512]}, as_json=False)
    out = capsys.readouterr().out
    assert "files a.h5  b.h5  lost (raw 3  denoised 0)" in out
    assert "wide64" not in out
    assert "[20, 512, 512]" in out


def test_reports_print_brackets_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    print_report({"[/x]": "runs/[bold]7[/y].tif", "device": {"name": HOSTILE}}, as_json=False)
    out = capsys.readouterr().out
    assert "[/x]" in out
    assert "runs/[bold]7[/y].tif" in out
    assert "\x1b" not in out
