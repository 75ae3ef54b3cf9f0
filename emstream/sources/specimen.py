"""What the simulated camera looks at: a platinum particle on ceria, drifting, hopping, wandering in focus.

Every frame is a pure function of (seed, n): whoever knows both can recompute what
frame n shows without noise. The motion is a sum of sines with seeded phases,
bounded for ever, and the noise of each frame has a generator of its own.

The clean images come with the package (specimen.npz, made by train/camera_stack.py).
Their cell repeats without end in both directions.
"""

from __future__ import annotations

import io
import math
import operator
from functools import lru_cache
from importlib.resources import files

import numpy as np

# From slow stage drift to jitter: shares of the bound, and periods in frames. No period divides another, so
# that the path does not repeat within any movie worth watching.
DRIFT_SHARES = np.array([0.65, 0.25, 0.08, 0.02])
DRIFT_PERIODS = np.array([907.0, 293.0, 89.0, 21.7])
FOCUS_SHARES = np.array([0.6, 0.4])
FOCUS_PERIODS = np.array([1103.0, 367.0])
HOPS = 4096  # length of the seeded walk over the states; it ends where it began and goes round again
NOISE, MOTION = 1, 2  # last words of the generators' seeds, to keep them apart


@lru_cache(maxsize=1)
def _stack(sampling_pm: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Load the images and resample the periodic cell to about `sampling_pm` by Fourier interpolation.

    Returns images (states, foci, N, N) float32, 1 in vacuum; defoci (foci,) [nm]; where a frame is
    centred, (row, column) [px]; and the pixel size [pm], the nearest that divides the cell.
    """
    with np.load(io.BytesIO((files("emstream.sources") / "specimen.npz").read_bytes())) as file:
        values = np.add.accumulate(file["differences"], axis=0, dtype=np.uint8)
        offset, scale, defoci_nm = float(file["offset"]), float(file["scale"]), file["defoci_nm"]
        centre_px, stored_pm = file["centre_px"], 100 * float(file["sampling_a"])
    stored = values.shape[-1]
    size = round(stored * stored_pm / sampling_pm)
    ratio = size / stored
    kept = (min(stored, size) - 1) // 2  # the highest frequency below both Nyquist limits
    images = np.empty((*values.shape[:2], size, size), np.float32)
    for place in np.ndindex(values.shape[:2]):
        spectrum = np.fft.rfft2(values[place].astype(np.float32))
        resized = np.zeros((size, size // 2 + 1), np.complex64)
        resized[: kept + 1, : kept + 1] = spectrum[: kept + 1, : kept + 1]
        resized[-kept:, : kept + 1] = spectrum[-kept:, : kept + 1]
        images[place] = np.fft.irfft2(resized, s=(size, size))
    images *= scale * ratio**2
    images += offset
    images.setflags(write=False)
    return images, defoci_nm, ratio * centre_px, stored_pm / ratio


def _whole(name: str, value: int, low: int, high: int, unit: str) -> int:
    number = operator.index(value)
    if not low <= number <= high:
        raise ValueError(f"{name} must lie in {low}-{high}, got {number} {unit}".rstrip())
    return number


class MovingSpecimen:
    """Frames of a drifting Pt nanoparticle on CeO2 whose surface atoms hop, as a counting camera sees it.

    Parameters
    ----------
    seed
        Decides motion, hops and noise, 0 to 2**32 - 1.
    dose
        Expected counts in vacuum [electrons per pixel and frame].
    height, width
        Frame size [px]. The default shows particle, support and vacuum; a smaller frame shows the
        particle's centre, and in one larger than the cell (855 px by default) the specimen repeats.
    sampling_pm
        Pixel size [pm]; the nearest one that divides the cell is used, `self.sampling_pm`.
    frames_per_hop
        Frames from one hop to the next on average; each interval differs from it by up to a third.
    drift_pm
        Farthest the specimen strays from the centre along each axis [pm]; 0 holds the stage still.
    """

    def __init__(
        self,
        *,
        seed: int = 0,
        dose: float = 0.45,
        height: int = 512,
        width: int = 512,
        sampling_pm: float = 6.2,
        frames_per_hop: int = 30,
        drift_pm: float = 230.0,
    ) -> None:
        if not (math.isfinite(dose) and dose > 0):
            raise ValueError(f"dose must be positive, got {dose} electrons/pixel")
        if dose > 10_000:
            raise ValueError(f"dose must be at most 10000 to fit 16-bit counts, got {dose} electrons/pixel")
        if not 3 <= sampling_pm <= 50:
            raise ValueError(f"sampling must lie in 3-50, got {sampling_pm} pm/pixel")
        if not (math.isfinite(drift_pm) and drift_pm >= 0):
            raise ValueError(f"drift must be zero or positive, got {drift_pm} pm")
        self.seed = _whole("seed", seed, 0, 2**32 - 1, "")
        self.dose = float(dose)
        self.height = _whole("height", height, 16, 16384, "pixels")
        self.width = _whole("width", width, 16, 16384, "pixels")
        self.frames_per_hop = _whole("frames_per_hop", frames_per_hop, 1, 10**6, "frames")
        self._images, self._defoci_nm, self._centre_px, self.sampling_pm = _stack(float(sampling_pm))
        peak = self.dose * float(self._images.max())
        self.dtype = np.dtype(np.uint8 if peak + 10 * math.sqrt(peak) + 20 <= 255 else np.uint16)

        rng = np.random.default_rng((self.seed, 0, MOTION))
        self._drift_bound_px = float(drift_pm) / self.sampling_pm
        self._drift_phases = rng.uniform(0, 2 * np.pi, (2, len(DRIFT_PERIODS)))
        self._drift_periods = DRIFT_PERIODS * rng.uniform(0.9, 1.1, (2, len(DRIFT_PERIODS)))
        self._focus_phases = rng.uniform(0, 2 * np.pi, len(FOCUS_PERIODS))
        # Neighbouring states, the last and the first too, differ by one hop: as many steps forth as back.
        steps = rng.permutation(np.repeat([1, -1], HOPS // 2))
        self._walk = (rng.integers(len(self._images)) + np.cumsum(steps)) % len(self._images)
        spread = self.frames_per_hop // 6
        self._hop_times = self.frames_per_hop // 2 + rng.integers(-spread, spread + 1, HOPS)

    def drift_px(self, n: int) -> tuple[float, float]:
        """How far the specimen of frame `n` lies (down, right) of the centred position [px]."""
        waves = np.sin(2 * np.pi * _frame(n) / self._drift_periods + self._drift_phases) @ DRIFT_SHARES
        return self._drift_bound_px * float(waves[0]), self._drift_bound_px * float(waves[1])

    def defocus_nm(self, n: int) -> float:
        """Defocus of frame `n` [nm]."""
        return float(np.interp(self._focus(n), np.arange(len(self._defoci_nm)), self._defoci_nm))

    def state(self, n: int) -> int:
        """Which of the specimen's states frame `n` shows; from one to the next a single column hops."""
        interval, frame = divmod(_frame(n), self.frames_per_hop)
        hops = interval + (frame >= self._hop_times[interval % HOPS])
        return int(self._walk[hops % HOPS])

    def intensity(self, n: int) -> np.ndarray:
        """Frame `n` without noise: (height, width) float32 [expected electrons per pixel]."""
        focus = self._focus(n)
        near = min(int(focus), len(self._defoci_nm) - 2)
        down, right = self.drift_px(n)
        top, row_part = divmod(float(self._centre_px[0]) - (self.height - 1) / 2 - down, 1.0)
        left, column_part = divmod(float(self._centre_px[1]) - (self.width - 1) / 2 - right, 1.0)
        rows = int(top) + np.arange(self.height + 1)
        columns = int(left) + np.arange(self.width + 1)
        first, second = (
            image.take(rows, axis=0, mode="wrap").take(columns, axis=1, mode="wrap")
            for image in self._images[self.state(n), near : near + 2]
        )
        field = _blend(first, second, focus - near)
        field = _blend(field[:-1], field[1:], row_part)
        return self.dose * _blend(field[:, :-1], field[:, 1:], column_part)

    def counts(self, n: int) -> np.ndarray:
        """Frame `n` as the camera sends it: (height, width) uint8, or uint16 at high dose [electrons]."""
        rng = np.random.default_rng((self.seed, _frame(n), NOISE))
        return rng.poisson(self.intensity(n)).astype(self.dtype)

    def _focus(self, n: int) -> float:
        """Defocus of frame `n` in steps of the stack, 0 to foci - 1."""
        wave = np.sin(2 * np.pi * _frame(n) / FOCUS_PERIODS + self._focus_phases) @ FOCUS_SHARES
        return float((len(self._defoci_nm) - 1) * (1 + wave) / 2)


def _blend(first: np.ndarray, second: np.ndarray, part: float) -> np.ndarray:
    mixed: np.ndarray = first + part * (second - first)
    return mixed


def _frame(n: int) -> int:
    number = operator.index(n)
    if number < 0:
        raise ValueError(f"frame number must be zero or positive, got {number}")
    return number
