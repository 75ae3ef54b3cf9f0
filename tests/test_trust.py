"""Estimates without a truth, held against the truth."""

from __future__ import annotations

import json
import math
import queue
import time
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest

from emstream.frame import now_ns
from emstream.observe import Observer
from emstream.ring import Maker, Ring, Slot
from emstream.sources.specimen import MovingSpecimen
from emstream.trust import INSUFFICIENT, KnownSpectra, Pool, Trust, pair_values, spectrum
from tests.conftest import header

DOSE = 0.45


def scene(shape: tuple[int, int] = (32, 32)) -> np.ndarray:
    """Expected electrons per pixel."""
    rows, columns = np.indices(shape)
    return (DOSE * (1 + 0.5 * np.sin(rows / 3) * np.sin(columns / 4))).astype(np.float32)


def pairs(count: int, error: float, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """Denoised frames that are off by `error` on average, and the raw frames after them."""
    rng, truth = np.random.default_rng(seed), scene()
    wrong = rng.normal(0, error, (count, *truth.shape)).astype(np.float32)
    return [(truth + off, rng.poisson(truth).astype(np.uint8)) for off in wrong]


def test_square_error_is_estimated_without_bias() -> None:
    values = np.array([pair_values(*pair) for pair in pairs(2000, 0.2)])[:, 0]
    standard_error = values.std() / math.sqrt(len(values))
    assert standard_error < 0.001
    assert abs(values.mean() - 0.04) < 4 * standard_error


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    covered = 0
    for seed in range(60):
        trust = Trust(None)
        for pair in pairs(300, 0.3, seed):
            trust.pair(*pair)
        told = trust.report()["psnr_db"]
        covered += told["low"] <= -10 * math.log10(0.09) <= told["high"]
    assert covered >= 51  # 57 expected


def test_nothing_is_said_before_there_is_enough() -> None:
    trust = Trust(None)
    for n, pair in enumerate(pairs(199, 0.3)):
        told = trust.report()
        assert (told["psnr_db"], told["likelihood"], told["fano"], told["spectrum"]) == (
            INSUFFICIENT,
        ) * 3 + (None,), n
        trust.pair(*pair)


def test_error_lost_in_the_noise_is_not_given_a_figure() -> None:
    trust = Trust(None)
    for pair in pairs(300, 0.001):
        trust.pair(*pair)
    assert trust.report()["psnr_db"] == INSUFFICIENT
    assert trust.report()["fano"] == pytest.approx(1, abs=0.01)


def test_likelihood_tells_a_picture_that_the_counts_support_from_one_they_do_not() -> None:
    right, grey, invented = Trust(None), Trust(None), Trust(None)
    for _, after in pairs(400, 0):
        right.pair(scene(), after)
        grey.pair(np.full_like(scene(), DOSE), after)
        invented.pair(2 * DOSE - scene(), after)
    assert right.report()["likelihood"]["low"] > 0.01
    assert abs(grey.report()["likelihood"]["value"]) < 1e-6
    assert invented.report()["likelihood"]["high"] < 0


def test_frames_that_are_no_counts_are_noticed() -> None:
    trust = Trust(None)
    for _, after in pairs(300, 0):
        trust.pair(3 * scene(), 3 * after)  # ADU
    assert trust.report()["fano"] == pytest.approx(3, rel=0.05)


def test_zero_and_negative_pictures_have_a_finite_likelihood() -> None:
    assert np.isfinite(pair_values(np.full((8, 8), -1, np.float32), np.ones((8, 8), np.uint8))).all()
    assert np.isfinite(pair_values(np.zeros((8, 8), np.float32), np.zeros((8, 8), np.uint8))).all()


def test_picture_that_is_no_number_is_never_given_a_figure() -> None:
    for wrong in (np.nan, np.inf, 1e30):
        trust = Trust(None)
        for picture, after in pairs(300, 0.3):
            picture[0, 0] = wrong
            trust.pair(picture, after)
        told = json.loads(json.dumps(trust.report()))
        assert not any(isinstance(value, float) and not math.isfinite(value) for value in told.values()), told
        assert told["psnr_db"] == INSUFFICIENT or told["psnr_db"]["value"] < 0


def test_pool_keeps_the_latest() -> None:
    pool = Pool(200)
    for n in range(1000):
        pool.add([n])
    assert pool.pairs == 200
    estimate = pool.estimate(0)
    assert estimate is not None
    assert estimate.value == np.arange(800, 1000).mean()


# -- spectra


def test_spectrum_of_counts_is_that_of_the_scene_whatever_the_dose() -> None:
    specimen = MovingSpecimen(dose=DOSE)
    clean = spectrum(specimen.intensity(0), poisson=False)
    assert clean is not None
    rng = np.random.default_rng(0)
    strong = (clean > 0.5) & (np.arange(len(clean)) >= 4)  # those below have few modes
    assert strong.sum() >= 3
    for dose in (0.45, 2.0):
        frames = [rng.poisson(specimen.intensity(0) / DOSE * dose) for _ in range(40)]
        noisy = np.mean([spectrum(frame) for frame in frames], axis=0)
        np.testing.assert_allclose(noisy[strong], clean[strong], rtol=0.15)


def test_spectrum_takes_the_centre_and_refuses_what_is_small_or_empty() -> None:
    large = np.zeros((600, 700), np.uint8)
    rng = np.random.default_rng(1)
    large[44:556, 94:606] = centre = rng.poisson(1, (512, 512))
    np.testing.assert_array_equal(spectrum(large), spectrum(centre))
    assert spectrum(centre[:511]) is None
    assert spectrum(np.zeros((512, 512), np.uint8)) is None


@pytest.fixture(scope="module")
def known() -> KnownSpectra:
    powers = []
    for seed in range(6):
        specimen = MovingSpecimen(seed=seed, frames_per_hop=5)
        powers += [spectrum(specimen.intensity(97 * n), poisson=False) for n in range(40)]
    return KnownSpectra.of(np.random.default_rng(0).permutation(powers))


@pytest.mark.parametrize(
    ("options", "in_domain"),
    [
        ({}, True),
        ({"dose": 2.0}, True),
        ({"dose": 0.1}, True),
        ({"sampling_pm": 9.0}, False),
        ({"sampling_pm": 4.5}, False),
    ],
)
def test_specimen_at_another_pixel_size_is_out_of_domain(
    known: KnownSpectra, options: dict[str, float], in_domain: bool
) -> None:
    specimen, trust = MovingSpecimen(seed=77, **options), Trust(known)  # type: ignore[arg-type]
    for n in range(50):
        assert trust.report()["spectrum"] == INSUFFICIENT
        trust.raw(specimen.counts(20 * n))
    assert trust.report()["spectrum"]["in_domain"] is in_domain


def test_noise_alone_is_out_of_domain(known: KnownSpectra) -> None:
    trust, rng = Trust(known), np.random.default_rng(0)
    for _ in range(50):
        trust.raw(rng.poisson(DOSE, (512, 512)))
    assert trust.report()["spectrum"]["in_domain"] is False


def test_known_spectra_come_back_from_json(known: KnownSpectra) -> None:
    assert KnownSpectra.read(json.loads(json.dumps(asdict(known)))) == known


@pytest.mark.parametrize(
    "change",
    [{"spread": [1.0]}, {"log_powers": [[1.0]]}, {"log_powers": "x"}, {"farthest": None}, {"spread": None}],
)
def test_broken_spectra_are_refused(known: KnownSpectra, change: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError)):
        KnownSpectra.read(asdict(known) | change)


# -- the observer


def published(numbers: list[int], maker: Maker, **fields: Any) -> Slot:
    ring = Ring(2, len(numbers))
    for n in numbers:
        row = ring.reserve((64, 64), np.dtype(np.uint8))
        assert row is not None
        row.fill(n)
        ring.commit(header(n, (64, 64), **fields), now_ns())
    slot = ring.claim()
    assert isinstance(slot, Slot)
    slot.result, slot.maker = slot.expected, maker
    slot.result[:] = slot.counts
    return slot


MAKER = Maker({"sha256": "a"}, (0.1, 10))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    now = [10**12]
    monkeypatch.setattr("emstream.observe.now_ns", lambda: now[0])
    return now


def seen(
    batches: list[list[int]], clock: list[int], maker: Maker = MAKER, step_s: float = 1.0
) -> list[tuple[int, int]]:
    """Which frames an observer pairs, by their pixels."""
    observer = Observer()
    found = []
    observer._weigh = lambda pair: found.append((int(pair.first.denoised[0, 0]), int(pair.after[0, 0])))  # type: ignore[method-assign]
    observer.start()
    for batch in batches:
        clock[0] += int(step_s * 1e9)
        observer.see(published(batch, maker))
        while observer._queue.qsize():
            time.sleep(0.001)
    observer._queue.put(None)
    observer._thread.join()
    return found


def test_frames_are_paired_with_their_successors_also_across_batches(clock: list[int]) -> None:
    assert seen([[1, 2], [3], [4], [5]], clock) == [(1, 2), (3, 4)]


def test_frames_with_a_gap_between_are_a_pair_while_it_is_small(clock: list[int]) -> None:
    assert seen([[1], [9], [20], [29], [30], [31]], clock) == [(1, 9), (30, 31)]
    assert seen([[5], [4], [6], [7]], clock) == [(6, 7)]


def test_pairs_are_taken_now_and_then(clock: list[int]) -> None:
    assert len(seen([[n] for n in range(100)], clock, step_s=0.01)) == 10


def test_engine_without_a_network_is_not_judged(clock: list[int]) -> None:
    assert seen([[1], [2]], clock, Maker({"sha256": None}, None)) == []


def test_observer_closes_while_its_thread_empties_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    observer = Observer()
    observer.start()
    put, full = observer._queue.put_nowait, [True]

    def full_at_first(item: Any) -> None:
        if full and full.pop():
            raise queue.Full
        put(item)

    monkeypatch.setattr(observer._queue, "put_nowait", full_at_first)
    observer.close()
    assert not observer._thread.is_alive()


def test_what_is_known_of_an_engine_is_not_said_of_another(clock: list[int]) -> None:
    observer = Observer()
    observer.start()
    for n in range(0, 40, 2):
        clock[0] += 10**9
        observer.see(published([n, n + 1], MAKER))
        while observer._queue.qsize():
            time.sleep(0.001)
    observer.close()
    assert observer.report_on(published([40], MAKER)) is not None
    for other in (Maker({"sha256": "b"}, (0.1, 10)), Maker({"sha256": None}, None)):
        assert observer.report_on(published([41], other)) is None
        assert observer.report is None
    assert observer.report_on(published([42], MAKER)) is not None


def test_of_a_large_frame_a_part_is_weighed_another_one_each_time(clock: list[int]) -> None:
    observer, found = Observer(), []
    observer._weigh = found.append  # type: ignore[method-assign]
    observer.start()
    ring = Ring(2, 2)
    rows, columns = np.indices((1500, 1100), np.uint16)
    for n in range(0, 8, 2):
        for number in (n, n + 1):
            row = ring.reserve((1500, 1100), np.dtype(np.uint16))
            assert row is not None
            row[:] = rows * 7 + columns
            ring.commit(header(number, (1500, 1100)), now_ns())
        slot = ring.claim()
        assert isinstance(slot, Slot)
        slot.result, slot.maker = slot.expected, MAKER
        slot.result[:] = slot.counts
        clock[0] += 10**9
        observer.see(slot)
        ring.release(slot)
    observer.close()
    assert len({pair.after[0, 0] for pair in found}) == len(found) == 4
    for pair in found:
        assert pair.after.shape == (1024, 1024)
        np.testing.assert_array_equal(pair.after, pair.first.denoised)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_picture_that_is_no_number_costs_no_estimate(clock: list[int], value: float) -> None:
    observer = Observer()
    observer.start()
    for n in range(0, 500, 2):
        clock[0] += 10**9
        slot = published([n % 5 + 1, n % 5 + 2], MAKER)
        if n == 250:  # the publisher counts it as failed
            slot.result[0, 3, 3] = value
        observer.report_on(slot)
        observer.see(slot)
        while observer._queue.qsize():
            time.sleep(0.0001)
    observer.close()
    assert observer.report is not None
    assert observer.report["frames"] == 240
    assert isinstance(observer.report["likelihood"], dict)
    assert isinstance(observer.report["fano"], float)


def test_another_engine_begins_anew(clock: list[int]) -> None:
    observer = Observer()
    observer.start()
    for sha in ("a", "b"):
        for n in range(0, 60, 2):
            clock[0] += 10**9
            observer.see(published([n, n + 1], Maker({"sha256": sha}, (0.1, 10))))
            while observer._queue.qsize():
                time.sleep(0.001)
    observer.close()
    observer.report_on(published([0], Maker({"sha256": "b"}, (0.1, 10))))
    assert observer.report is not None
    assert observer.report["frames"] in (20, 30)
