"""The simulated camera's specimen: recomputable, moving, and with Poisson noise and nothing else."""

from __future__ import annotations

import json
import re
from importlib.resources import files

import numpy as np
import pytest

from emstream.sources.specimen import MovingSpecimen


def hops(specimen: MovingSpecimen, frames: int) -> np.ndarray:
    """Numbers of the frames whose state is not that of the frame before."""
    return np.flatnonzero(np.diff([specimen.state(n) for n in range(frames)])) + 1


def test_same_seed_and_number_give_the_same_frame() -> None:
    one, other = MovingSpecimen(seed=3), MovingSpecimen(seed=3)
    np.testing.assert_array_equal(one.counts(17), other.counts(17))
    np.testing.assert_array_equal(one.intensity(17), other.intensity(17))


def test_frames_do_not_depend_on_the_order_of_the_calls() -> None:
    specimen = MovingSpecimen(height=64, width=64)
    forwards = [specimen.counts(n) for n in range(60)]
    backwards = [specimen.counts(n) for n in reversed(range(60))]
    np.testing.assert_array_equal(forwards, backwards[::-1])


def test_other_seeds_give_other_motion_and_other_noise() -> None:
    one, other = MovingSpecimen(seed=1), MovingSpecimen(seed=2)
    assert one.drift_px(0) != other.drift_px(0)
    assert one.defocus_nm(0) != other.defocus_nm(0)
    assert not np.array_equal(hops(one, 500), hops(other, 500))
    assert (one.counts(0) != other.counts(0)).mean() > 0.3


def test_frames_have_shape_and_type_of_a_camera() -> None:
    specimen = MovingSpecimen()
    assert specimen.intensity(0).shape == specimen.counts(0).shape == (512, 512)
    assert specimen.intensity(0).dtype == np.float32
    assert specimen.counts(0).dtype == specimen.dtype == np.uint8


def test_mean_of_the_counts_in_vacuum_is_the_dose() -> None:
    specimen = MovingSpecimen(drift_pm=0)
    vacuum = np.stack([specimen.counts(n)[:40] for n in range(20)])
    assert vacuum.mean() == pytest.approx(0.45, abs=0.006)


def test_counts_are_poisson_about_the_intensity() -> None:
    specimen = MovingSpecimen(seed=5)
    numbers = range(0, 500, 50)
    truth = np.stack([specimen.intensity(n) for n in numbers]).astype(np.float64)
    counts = np.stack([specimen.counts(n) for n in numbers]).astype(np.float64)
    residual = (counts - truth) / np.sqrt(truth)
    assert residual.mean() == pytest.approx(0, abs=0.005)
    assert residual.var() == pytest.approx(1, abs=0.01)
    for value in range(5):
        expected = np.exp(-truth) * truth**value / np.prod(np.arange(1, value + 1))
        assert (counts == value).mean() == pytest.approx(expected.mean(), abs=0.002)


def test_noise_of_neighbouring_frames_and_pixels_is_independent() -> None:
    specimen = MovingSpecimen()
    first, second = (specimen.counts(n) - specimen.intensity(n) for n in (40, 41))
    for one, other in ((first, second), (first[1:], first[:-1]), (first[:, 1:], first[:, :-1])):
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.01


def test_neighbouring_frames_are_similar_and_distant_ones_are_not() -> None:
    specimen = MovingSpecimen()
    start, neighbour, distant = (specimen.intensity(n) for n in (0, 1, 50))
    near, far = np.std(neighbour - start), np.std(distant - start)
    assert 0 < near < 0.2 * start.std()
    assert far > 0.2 * start.std()
    assert far > 5 * near


def test_drift_is_a_few_tenths_of_a_pixel_per_frame_and_bounded() -> None:
    specimen = MovingSpecimen()
    drift = np.array([specimen.drift_px(n) for n in range(5000)])
    steps = np.hypot(*np.diff(drift, axis=0).T)
    assert 0.2 < steps.mean() < 0.5
    assert steps.max() < 1.2
    assert np.all(np.abs(drift).max(axis=0) > 20)
    assert np.abs(drift).max() <= 230 / specimen.sampling_pm


def test_specimen_lies_where_the_drift_says() -> None:
    specimen = MovingSpecimen(height=855, width=855)
    first, second = 12, 400
    spectra = [np.fft.rfft2(specimen.intensity(n)) for n in (first, second)]
    correlation = np.fft.irfft2(spectra[1] * spectra[0].conj(), s=(855, 855))
    peak = np.array(np.unravel_index(correlation.argmax(), correlation.shape))
    moved = np.subtract(specimen.drift_px(second), specimen.drift_px(first))
    np.testing.assert_allclose((peak + 427) % 855 - 427, moved, atol=1)


def test_stage_without_drift_holds_still() -> None:
    assert MovingSpecimen(drift_pm=0).drift_px(1234) == (0, 0)


def test_defocus_wanders_smoothly_within_the_stack() -> None:
    specimen = MovingSpecimen()
    defocus = np.array([specimen.defocus_nm(n) for n in range(4000)])
    assert defocus.min() >= 4
    assert defocus.max() <= 13
    assert np.ptp(defocus) > 6
    assert np.abs(np.diff(defocus)).max() < 0.1


def test_atoms_hop_every_twenty_to_forty_frames() -> None:
    specimen = MovingSpecimen()
    intervals = np.diff(hops(specimen, 6000))
    assert intervals.min() >= 20
    assert intervals.max() <= 40
    assert len(np.unique(intervals)) > 5
    assert {specimen.state(n) for n in range(6000)} == set(range(6))


def test_frames_per_hop_sets_the_mean_interval() -> None:
    assert np.diff(hops(MovingSpecimen(frames_per_hop=7), 7000)).mean() == pytest.approx(7, abs=0.1)
    assert len(hops(MovingSpecimen(frames_per_hop=1), 100)) == 99


def test_a_hop_moves_a_single_column() -> None:
    specimen = MovingSpecimen(drift_pm=0)
    for hop in hops(specimen, 300):
        before, after = specimen.intensity(hop - 1) / 0.45, specimen.intensity(hop) / 0.45
        change = np.abs(after - before)
        assert change.max() > 0.15
        assert 0.002 < (change > 0.05).mean() < 0.02
        still = np.abs(before - specimen.intensity(hop - 2) / 0.45)
        assert still.max() < 0.02


def test_default_frame_shows_vacuum_particle_and_support() -> None:
    frame = MovingSpecimen(drift_pm=0).intensity(0) / 0.45
    vacuum, particle, support = frame[:40], frame[200:300, 200:300], frame[-90:]
    assert np.abs(vacuum - 1).max() < 0.05
    assert particle.min() < 0.8
    assert support.min() < 0.6
    assert support.max() > 1.05


@pytest.mark.parametrize("size", [(101, 333), (16, 17), (1025, 31)])
def test_frames_may_have_any_size(size: tuple[int, int]) -> None:
    specimen = MovingSpecimen(height=size[0], width=size[1])
    assert specimen.intensity(9).shape == specimen.counts(9).shape == size


def test_small_frame_is_the_centre_of_a_large_one() -> None:
    small = MovingSpecimen(height=99, width=200).intensity(33)
    large = MovingSpecimen(height=301, width=400).intensity(33)
    np.testing.assert_allclose(small, large[101:200, 100:300], rtol=1e-5)


def test_frame_larger_than_the_cell_repeats_the_specimen() -> None:
    frame = MovingSpecimen(height=900, width=1000).intensity(5)
    np.testing.assert_array_equal(frame[:, :145], frame[:, 855:])
    np.testing.assert_array_equal(frame[:45], frame[855:])


@pytest.mark.parametrize("sampling_pm", [4.883, 6.2, 10.356, 20.0])
def test_sampling_is_nearly_the_one_asked_for(sampling_pm: float) -> None:
    specimen = MovingSpecimen(sampling_pm=sampling_pm, height=128, width=128)
    assert specimen.sampling_pm == pytest.approx(sampling_pm, rel=0.002)
    assert 0.3 < specimen.intensity(0).min() / 0.45 < 0.8


def test_coarse_pixels_show_the_same_specimen() -> None:
    cell_a = MovingSpecimen(sampling_pm=10.3548, height=512, width=512, drift_pm=0)
    cell_b = MovingSpecimen(sampling_pm=20.7097, height=256, width=256, drift_pm=0)
    pairs = cell_a.intensity(0).reshape(256, 2, 256, 2).mean(axis=(1, 3))
    np.testing.assert_allclose(pairs, cell_b.intensity(0), atol=0.01)


def test_counts_are_sixteen_bit_where_eight_could_overflow() -> None:
    specimen = MovingSpecimen(dose=200, height=64, width=64, drift_pm=0)
    assert specimen.counts(0).dtype == specimen.dtype == np.uint16
    residual = specimen.counts(0) - specimen.intensity(0)
    assert np.abs(residual).max() < 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dose": -1}, "dose must be positive, got -1 electrons/pixel"),
        ({"dose": 0}, "dose must be positive, got 0 electrons/pixel"),
        ({"dose": float("nan")}, "dose must be positive, got nan electrons/pixel"),
        ({"dose": 1e6}, "got 1000000.0 electrons/pixel"),
        ({"height": 15}, "height must lie in 16-16384, got 15 pixels"),
        ({"width": 10**6}, "width must lie in 16-16384, got 1000000 pixels"),
        ({"sampling_pm": 0}, "sampling must lie in 3-50, got 0 pm/pixel"),
        ({"sampling_pm": float("nan")}, "sampling must lie in 3-50, got nan pm/pixel"),
        ({"drift_pm": float("inf")}, "drift must be zero or positive, got inf pm"),
        ({"frames_per_hop": 0}, "frames_per_hop must lie in 1-1000000, got 0 frames"),
        ({"seed": -1}, "seed must lie in 0-4294967295, got -1"),
    ],
)
def test_bad_input_is_refused_with_its_value_and_unit(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        MovingSpecimen(**arguments)  # type: ignore[arg-type]


def test_negative_frame_number_is_refused() -> None:
    specimen = MovingSpecimen(height=16, width=16)
    for method in (specimen.counts, specimen.intensity, specimen.state, specimen.drift_px):
        with pytest.raises(ValueError, match="frame number must be zero or positive, got -1"):
            method(-1)


def test_shipped_stack_is_small_and_says_where_it_comes_from() -> None:
    path = files("emstream.sources") / "specimen.npz"
    with path.open("rb") as stream, np.load(stream) as file:
        provenance = json.loads(str(file["provenance"]))
    assert len(path.read_bytes()) < 4_000_000
    assert provenance["made_by"] == "python -m train.camera_stack"
    assert provenance["specimen"]["seed"] >= 900_000  # no network has trained on it
