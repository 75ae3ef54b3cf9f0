"""Noiseless HRTEM images of an atomic model, by multislice (abTEM).

The microscope: 300 kV, image-corrected (Cs -13 um, C5 5 mm), focal spread 4 nm,
convergence 0.2 mrad. Specimen vibration and the camera's modulation transfer are
one Gaussian each on the intensity. An image without these envelopes is far too
sharp and too strong beside a measured one.

Nothing here knows what is imaged: any atoms in a square cell will do.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import abtem
import numpy as np
from ase import Atoms
from scipy.ndimage import gaussian_filter, map_coordinates

ENERGY_EV = 300e3
GRID_PX = 512
CONTRAST_SHARE = 0.8


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


def use_device(device: str) -> None:
    """Compute on the ``cpu`` or on the ``gpu``, from now on in this process."""
    if device == "gpu":
        try:
            import cupy

            count = cupy.cuda.runtime.getDeviceCount()
        except Exception as error:  # no CuPy, no driver, another CUDA: each with an exception of its own
            raise RuntimeError(
                "simulating on the GPU needs an NVIDIA GPU and CuPy (pip install cupy-cuda12x, or cupy-cuda13x "
                f"for CUDA 13); without them use --device cpu. Here: {type(error).__name__}: {error}"
            ) from error
        if not count:
            raise RuntimeError("simulating on the GPU needs a GPU, and CuPy sees none; use --device cpu")
    elif device != "cpu":
        raise ValueError(f"device must be cpu or gpu, got {device!r}")
    abtem.config.set({"device": device})


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
    intensity = wave.apply_ctf(ctf).intensity().to_cpu().array
    sampling_a = wave.sampling[0]
    intensity = gaussian_filter(intensity, optics.blur_a / sampling_a, mode="wrap")
    return np.ascontiguousarray(intensity.T[::-1], dtype=np.float32)


def in_pixels(columns: np.ndarray, cell_a: float) -> np.ndarray:
    """Bring `train.structures.projected_columns` from A to pixels of `image`: x to the right, y down.

    (0, 0) is the centre of the first pixel.
    """
    placed = columns.copy()
    placed["x"] = columns["x"] * GRID_PX / cell_a
    placed["y"] = GRID_PX - 1 - columns["y"] * GRID_PX / cell_a
    return placed


def contrast_class(intensity: np.ndarray, columns: np.ndarray) -> str:
    """How the particle's columns (M,) [px] look in a noiseless image (H, W; 1 in vacuum).

    ``white`` when at least 80 % of them are brighter than vacuum, ``black`` when at least
    80 % are darker, else ``intermediate``. What counts is the intensity in the column's
    middle, interpolated between pixels.
    """
    own = columns[columns["particle"]]
    values = map_coordinates(intensity.astype(np.float32), [own["y"], own["x"]], order=1, mode="wrap")
    brighter = float((values > 1).mean())
    if brighter >= CONTRAST_SHARE:
        return "white"
    return "black" if brighter <= 1 - CONTRAST_SHARE else "intermediate"
