"""Noiseless HRTEM images of an atomic model, by multislice (abTEM).

The microscope: 300 kV, image-corrected (Cs -13 um, C5 5 mm), focal spread 4 nm,
convergence 0.2 mrad. Specimen vibration and the camera's modulation transfer are
one Gaussian each on the intensity. An image without these envelopes is far too
sharp and too strong beside a measured one.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import abtem
import numpy as np
from ase import Atoms
from scipy.ndimage import gaussian_filter

ENERGY_EV = 300e3
GRID_PX = 512


@dataclass(frozen=True, kw_only=True)
class Optics:
    """One setting of the microscope."""

    defocus_nm: float
    cs_um: float = -13.0
    c5_mm: float = 5.0
    focal_spread_nm: float = 4.0
    convergence_mrad: float = 0.2
    blur_a: float = 0.6  # vibration and camera together, standard deviation

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def random_optics(rng: np.random.Generator, defocus_nm: float | None = None) -> Optics:
    """Draw optics around the nominal microscope: defocus 0-20 nm, envelopes varied."""
    return Optics(
        defocus_nm=float(rng.uniform(0.0, 20.0)) if defocus_nm is None else defocus_nm,
        cs_um=float(rng.normal(-13.0, 2.0)),
        focal_spread_nm=float(rng.uniform(3.0, 5.5)),
        convergence_mrad=float(rng.uniform(0.1, 0.4)),
        blur_a=float(rng.uniform(0.4, 0.8)),
    )


def exit_wave(atoms: Atoms) -> abtem.Waves:
    """Send a 300 kV plane wave through `atoms`; returns the exit wave (512, 512)."""
    potential = abtem.Potential(
        atoms, gpts=GRID_PX, slice_thickness=2.0, projection="infinite", parametrization="lobato"
    )
    wave = abtem.PlaneWave(energy=ENERGY_EV)
    return wave.multislice(potential, lazy=False)


def image(wave: abtem.Waves, optics: Optics) -> np.ndarray:
    """Form the image of an exit wave.

    Returns intensity (512, 512) float32 as seen on a screen (row 0 at the top),
    1 where the beam went through nothing.
    """
    ctf = abtem.CTF(
        energy=ENERGY_EV,
        defocus=10 * optics.defocus_nm,
        Cs=1e4 * optics.cs_um,
        C50=1e7 * optics.c5_mm,
        focal_spread=10 * optics.focal_spread_nm,
        angular_spread=optics.convergence_mrad,
        semiangle_cutoff=40.0,
    )
    intensity = wave.apply_ctf(ctf).intensity().array
    sampling_a = wave.sampling[0]
    intensity = gaussian_filter(intensity, optics.blur_a / sampling_a, mode="wrap")
    return np.ascontiguousarray(intensity.T[::-1], dtype=np.float32)
