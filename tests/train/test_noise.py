"""Shot noise and what cameras add to it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the laboratory needs: pip install 'emstream[train]'")

from train.noise import Camera, blur, draw_doses, expose


def generator() -> Any:
    return torch.Generator().manual_seed(0)


def flat(dose: float, camera: Camera | None = None, px: int = 300) -> Any:
    return expose(torch.ones(1, 1, px, px), torch.tensor([dose]), generator(), camera)[0, 0]


def neighbour_correlation(frame: Any) -> float:
    return float(np.corrcoef(frame[:, 1:].ravel(), frame[:, :-1].ravel())[0, 1])


@pytest.mark.parametrize("dose", [0.01, 0.45, 30.0, 1e4])
def test_noise_is_poisson_at_any_dose(dose: float) -> None:
    counts = flat(dose)
    assert counts.mean().item() == pytest.approx(dose, rel=0.05)
    assert (counts.var() / counts.mean()).item() == pytest.approx(1, rel=0.05)
    assert torch.equal(counts, counts.round())


def test_camera_that_adds_nothing_changes_nothing() -> None:
    assert torch.equal(flat(0.45, Camera()), flat(0.45))


def test_same_generator_gives_the_same_frame() -> None:
    camera = Camera(counting=False, mtf_nyquist=0.3, read_noise_e=0.5, dead_pixel_fraction=0.01)
    assert torch.equal(flat(2.0, camera), flat(2.0, camera))


@pytest.mark.parametrize("mtf", [0.1, 0.5, 0.9])
def test_blur_transfers_what_it_says_at_nyquist_and_keeps_every_electron(mtf: float) -> None:
    waves = torch.ones(1, 1, 64, 64)
    waves[..., 1::2] = -1  # half a cycle per pixel
    assert blur(waves, mtf)[..., 8:-8, 8:-8].abs().mean().item() == pytest.approx(mtf, rel=1e-5)
    point = torch.zeros(1, 1, 9, 9)
    point[..., 4, 4] = 100
    spread = blur(point, mtf)
    assert spread.sum().item() == pytest.approx(100, rel=1e-5)
    assert spread.min() >= 0


def test_counting_cameras_blur_the_expectation_and_not_the_noise() -> None:
    counts = flat(5.0, Camera(mtf_nyquist=0.2))
    assert (counts.var() / counts.mean()).item() == pytest.approx(1, rel=0.03)
    assert abs(neighbour_correlation(counts)) < 0.01
    edge = torch.ones(1, 1, 200, 200)
    edge[..., 100:] = 0
    blurred = expose(edge, torch.tensor([1000.0]), generator(), Camera(mtf_nyquist=0.2))[0, 0]
    assert blurred[:, 100].mean().item() == pytest.approx(200, rel=0.02)


def test_integrating_cameras_blur_the_noise_and_correlate_neighbours() -> None:
    frame = flat(5.0, Camera(counting=False, mtf_nyquist=0.2))
    assert frame.mean().item() == pytest.approx(5, rel=0.02)
    k = 0.2
    kept = k**2 + (1 - 2 * k) ** 2 + k**2
    assert (frame.var() / frame.mean()).item() == pytest.approx(kept**2, rel=0.05)
    assert neighbour_correlation(frame) == pytest.approx(2 * k * (1 - 2 * k) / kept, abs=0.02)


def test_read_noise_adds_in_quadrature_and_gain_scales_all() -> None:
    frame = flat(4.0, Camera(counting=False, read_noise_e=3.0, gain=10.0, offset=100.0))
    assert frame.mean().item() == pytest.approx(140, rel=0.01)
    assert frame.std().item() == pytest.approx(10 * np.sqrt(4 + 9), rel=0.02)


def test_uneven_gains_show_at_high_dose() -> None:
    frame = flat(1e4, Camera(gain_spread=0.05))
    assert (frame.std() / frame.mean()).item() == pytest.approx(np.hypot(0.05, 0.01), rel=0.03)


def test_dead_pixels_read_the_offset_and_hot_ones_more() -> None:
    dead = flat(50.0, Camera(dead_pixel_fraction=0.02, offset=7.0))
    assert (dead == 7).float().mean().item() == pytest.approx(0.02, rel=0.1)
    hot = flat(0.45, Camera(hot_pixel_fraction=0.02, hot_pixel_e=100.0))
    assert (hot > 50).float().mean().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"gain": 0.0}, "gain must be positive, got 0.0 ADU per electron"),
        ({"mtf_nyquist": 1.5}, "mtf_nyquist must lie in 0-1, got 1.5"),
        ({"dead_pixel_fraction": -0.1}, "dead_pixel_fraction must lie in 0-1, got -0.1"),
        ({"counting": False, "read_noise_e": -1.0}, "read_noise_e must not be negative, got -1.0 electrons"),
        ({"read_noise_e": 2.0}, "a counting camera has no read noise, got 2.0 electrons"),
        ({"offset": float("nan")}, "offset must be finite, got nan ADU"),
    ],
)
def test_impossible_cameras_are_refused(change: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Camera(**change)


@pytest.mark.parametrize("dose", [-0.5, float("nan")])
def test_impossible_doses_are_refused(dose: float) -> None:
    with pytest.raises(ValueError, match=r"a dose cannot be (-0.5|nan) electrons/pixel"):
        flat(dose)


def test_doses_come_from_the_range_asked_for() -> None:
    doses = draw_doses(4000, generator(), (2.0, 40.0))
    near = (doses - 0.45).abs() < 0.35
    assert 0.45 < near.float().mean() < 0.55
    assert doses[~near].min() >= 1.99
    assert doses[~near].max() <= 40.01
    with pytest.raises(ValueError, match=r"from low to high, got 0\.0 to 1\.0 electrons/pixel"):
        draw_doses(1, generator(), (0.0, 1.0))
