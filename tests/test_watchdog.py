from __future__ import annotations

import pytest

from emstream.watchdog import Watchdog


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr("emstream.watchdog.now_ns", lambda: int(now[0] * 1e9))
    return now


def wait(watchdog: Watchdog, clock: list[float], seconds: float) -> dict[str, float]:
    """What it sees at last, looking five times a second."""
    for _ in range(round(5 * seconds)):
        clock[0] += 0.2
        seen = watchdog.look()
    return seen


def test_stage_that_does_not_end_is_named_and_released(
    clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    watchdog = Watchdog()
    watchdog.begin("engine")
    watchdog.begin("publisher", limit_s=10)
    assert wait(watchdog, clock, 1) == {}
    assert wait(watchdog, clock, 1) == {"engine": pytest.approx(2)}
    assert watchdog.stalled.keys() == {"engine"}
    watchdog.end("engine")
    assert wait(watchdog, clock, 0.2) == {}
    assert [record.message for record in caplog.records] == [
        "the engine has stalled: at work for 1.2 s",
        "the engine goes on, after a stall of at least 2.0 s",
    ]


def test_stage_that_is_idle_or_begins_again_has_not_stalled(clock: list[float]) -> None:
    watchdog = Watchdog()
    for _ in range(30):
        watchdog.begin("engine")
        assert wait(watchdog, clock, 0.4) == {}
        watchdog.end("engine")
        assert wait(watchdog, clock, 3) == {}


def test_process_that_stood_still_blames_no_stage(clock: list[float]) -> None:
    watchdog = Watchdog()
    watchdog.begin("engine")
    wait(watchdog, clock, 0.4)
    clock[0] += 30
    assert watchdog.look() == {}
    assert wait(watchdog, clock, 0.4) == {}
    assert wait(watchdog, clock, 1) == {"engine": pytest.approx(1.8)}
