from __future__ import annotations

import threading

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from emstream.ledger import Histogram, Ledger
from tests.conftest import exact


def numbered(*frames: int) -> int:
    ledger = Ledger()
    for frame in frames:
        ledger.number("camera", 1, frame)
    return ledger.snapshot()["missing"]


def test_gap_in_the_cameras_numbers_is_missing() -> None:
    assert numbered(0, 1, 4, 5) == 2


def test_late_frame_closes_its_gap() -> None:
    assert numbered(0, 1, 3, 2, 4) == 0


def test_late_frame_splits_a_longer_gap() -> None:
    assert numbered(0, 10, 5) == 8


def test_repeated_frame_changes_nothing() -> None:
    assert numbered(0, 1, 2, 1, 2, 3) == 0


def test_first_frame_seen_may_have_any_number() -> None:
    assert numbered(1000, 1001) == 0


def test_camera_that_begins_again_opens_a_new_count() -> None:
    assert numbered(500, 501, 0, 1, 3) == 1


def test_camera_that_begins_again_and_is_heard_late_opens_a_new_count() -> None:
    assert numbered(500, 501, 3, 4, 9) == 4


def test_one_absurd_number_does_not_spoil_the_count() -> None:
    assert numbered(0, 1, 2**52, 2, 3) == 0


def test_two_cameras_are_counted_apart() -> None:
    ledger = Ledger()
    for frame in range(0, 10, 2):
        ledger.number("left", 1, frame)
        ledger.number("right", 1, frame)
    assert ledger.snapshot()["missing"] == 8


def test_new_series_opens_a_new_count() -> None:
    ledger = Ledger()
    ledger.number("camera", 1, 99)
    ledger.number("camera", 2, 0)
    ledger.number("camera", 2, 2)
    assert ledger.snapshot()["missing"] == 1


@given(st.sets(st.integers(0, 300), min_size=1).flatmap(lambda s: st.permutations(sorted(s))))
def test_missing_is_what_was_skipped_whatever_the_order(frames: list[int]) -> None:
    first = frames[0]
    later = [frame for frame in frames[1:] if frame > first]
    expected = (max(later) - first) - len(later) if later else 0
    assert numbered(first, *later) == expected


@given(st.lists(st.sampled_from(["receive", "publish", "drop", "reject", "fail"])))
def test_in_flight_is_what_is_not_settled(events: list[str]) -> None:
    ledger = Ledger()
    for event in events:
        match event:
            case "reject":
                ledger.reject("because")
            case "fail":
                ledger.fail(1)
            case _:
                getattr(ledger, event)()
        assert exact(ledger.snapshot())
    assert ledger.snapshot()["in_flight"] == 2 * events.count("receive") - len(events)


def test_counters_survive_many_threads() -> None:
    ledger = Ledger()

    def work() -> None:
        for _ in range(2000):
            ledger.receive()
            ledger.publish()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    snapshot = ledger.snapshot()
    assert (snapshot["received"], snapshot["published"], snapshot["in_flight"]) == (8000, 8000, 0)


def test_reasons_are_counted_and_bounded() -> None:
    ledger = Ledger()
    for n in range(10_000):
        ledger.reject(f"reason {n}")
        ledger.reject("the usual")
    assert len(ledger.reasons()) <= 51
    assert ledger.snapshot()["rejected"] == 20_000


@given(st.lists(st.integers(1, 10**13), min_size=1, max_size=300))
def test_percentiles_are_within_two_percent_of_the_exact_ones(durations: list[int]) -> None:
    histogram = Histogram()
    for duration in durations:
        histogram.add(duration)
    for percent in (50, 99, 100):
        exact_ms = np.percentile(durations, percent, method="inverted_cdf") / 1e6
        measured = histogram.percentile_ms(percent)
        assert measured is not None
        assert abs(measured - exact_ms) <= 0.02 * exact_ms + 2e-6


def test_histogram_without_durations_has_no_percentile() -> None:
    assert Histogram().percentile_ms(50) is None


def test_clock_that_ran_backwards_does_not_break_the_histogram() -> None:
    histogram = Histogram()
    histogram.add(-5)
    assert histogram.percentile_ms(50) == 0


@given(st.lists(st.booleans(), min_size=1, max_size=60), st.lists(st.integers(0, 59), max_size=20))
def test_frames_that_the_camera_skips_are_missing_once_until_they_come(
    sent: list[bool], late: list[int]
) -> None:
    ledger = Ledger()
    for frame, is_sent in enumerate(sent):
        (ledger.number if is_sent else ledger.skip)("camera", 1, frame)
        if not is_sent:
            ledger.skip("camera", 1, frame)
    assert ledger.snapshot()["missing"] == sent.count(False)
    came = {frame for frame in late if 0 < frame < len(sent) - 1}
    for frame in came:
        ledger.number("camera", 1, frame)
    assert ledger.snapshot()["missing"] == sum(
        not is_sent and frame not in came for frame, is_sent in enumerate(sent)
    )
    assert ledger.snapshot()["received"] == 0


def test_first_frames_of_a_series_that_do_not_come_are_missing() -> None:
    ledger = Ledger()
    for series in (1, 2):
        ledger.begin("camera", series, 0)
        for frame in (3, 4, 1):
            ledger.number("camera", series, frame)
    assert ledger.snapshot()["missing"] == 4


def test_series_that_has_begun_is_the_same_whatever_is_repeated() -> None:
    ledger = Ledger()
    ledger.begin("camera", 1, 0)
    for frame in (*range(200), 0, 200, 7, 201):
        ledger.number("camera", 1, frame)
    assert ledger.snapshot()["missing"] == 0


def test_absurd_number_does_not_spoil_the_count_of_a_series_that_has_begun() -> None:
    ledger = Ledger()
    ledger.begin("camera", 1, 0)
    for frame in (0, 1, 2**52, 2, 3, 5):
        ledger.number("camera", 1, frame)
    assert ledger.snapshot()["missing"] == 1
