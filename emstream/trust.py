"""How far the picture can be trusted, from the stream alone.

Nobody knows the truth behind a live frame. But the next frame shows nearly the same scene with
noise of its own, so that the pair of one denoised frame f and the next raw one a tells:

- the mean square error: mean[(a - f)^2 - a] estimates it without bias for Poisson counts, whose
  variance is their mean (after Marcos-Morales et al., "Evaluating unsupervised denoising requires
  unsupervised metrics", ICML 2023); what moved in between counts as error, too;
- the likelihood: mean[f' - f + a ln(f / f')], with f' the mean of f, says by how much the counts a prefer
  the picture f to a grey one, in nats per pixel; below 0 they contradict it;
- the noise: mean[(a - f)^2] / mean[a] is 1 when the counts are Poisson and the picture is right.

One frame of half an electron per pixel says next to nothing: all three are pooled over many frames, and the
first two come with 95 % intervals.

The spectrum of the raw frames, less that of their noise, is compared with the specimens that the
engine was trained on.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

BAND_EDGES = tuple(float(edge) for edge in np.geomspace(1 / 200, 1 / 20, 11))  # [cycles/pixel]
SPECTRUM_PX = 512
_POOLED = 2000  # pairs
_BLOCK = (
    10  # neighbouring pairs show the same scene and are not independent: intervals come from blocks' means
)
_LEAST_BLOCKS = 20
_PRECISE = 0.5  # half an interval over the value
_SPECTRA = 50  # frames
_KEPT_SPECTRA = 128
_FAINT_POWER = 0.05  # pixel^2; less cannot be told from noise at half an electron per pixel
INSUFFICIENT = "insufficient data"
_FAINT = 1e-3  # electrons per pixel: the least that an engine may expect


@dataclass(frozen=True)
class Estimate:
    """A mean over pairs of frames with its 95 % interval."""

    value: float
    low: float
    high: float


class Pool:
    """Values of the last frames or pairs, in blocks of ten."""

    def __init__(self, most: int) -> None:
        self._blocks: deque[np.ndarray] = deque(maxlen=most // _BLOCK)
        self._block: list[np.ndarray] = []

    def add(self, values: Sequence[float]) -> None:
        self._block.append(np.asarray(values, np.float64))
        if len(self._block) == _BLOCK:
            self._blocks.append(np.mean(self._block, axis=0))
            self._block = []

    @property
    def pairs(self) -> int:
        return _BLOCK * len(self._blocks)

    def estimate(self, index: int) -> Estimate | None:
        """Of the values at `index`; None while there are too few, or when they are not numbers."""
        if len(self._blocks) < _LEAST_BLOCKS:
            return None
        values = np.array([block[index] for block in self._blocks])
        if not np.isfinite(values).all():
            return None
        mean = float(values.mean())
        half = _t(len(values)) * float(values.std(ddof=1)) / math.sqrt(len(values))
        return Estimate(mean, mean - half, mean + half)


def _t(count: int) -> float:
    """Student's 97.5 % quantile for `count` values of 20 or more, to 0.5 %."""
    degrees = count - 1
    z = 1.959964
    return z + (z**3 + z) / (4 * degrees)


def pair_values(denoised: np.ndarray, after: np.ndarray) -> tuple[float, float, float, float]:
    """Square error, likelihood, squared difference and counts of a denoised frame (H, W) and the next raw one.

    Means per pixel; see the top of this file.
    """
    counts = after.astype(np.float32)
    expected = np.maximum(denoised, _FAINT)
    square = float(np.mean(np.square(counts - denoised), dtype=np.float64))
    level = float(expected.mean(dtype=np.float64))
    mean = float(counts.mean(dtype=np.float64))
    gain = float(np.mean(counts * np.log(expected), dtype=np.float64)) - mean * math.log(level)
    return square - mean, gain, square, mean


def spectrum(frame: np.ndarray, poisson: bool = True) -> np.ndarray | None:
    """Power of the relative fluctuations of a frame (H, W) in each band between `BAND_EDGES` [pixel^2].

    That of the noise is taken off when the frame holds counts. None for a frame without electrons or
    with a side below `SPECTRUM_PX`; larger ones count with their centre.
    """
    height, width = frame.shape
    if min(height, width) < SPECTRUM_PX:
        return None
    top, left = (height - SPECTRUM_PX) // 2, (width - SPECTRUM_PX) // 2
    centre = frame[top : top + SPECTRUM_PX, left : left + SPECTRUM_PX].astype(np.float32)
    mean = float(centre.mean(dtype=np.float64))
    if mean <= 0:
        return None
    window, band, modes = _bands()
    power = np.square(np.abs(np.fft.rfft2(window * (centre - mean))))
    sums = np.bincount(band.ravel(), power.ravel(), minlength=len(BAND_EDGES) + 1)[1 : len(BAND_EDGES)]
    weight = np.square(window)
    noise = float((weight * centre).sum(dtype=np.float64)) if poisson else 0.0
    result: np.ndarray = (sums / modes - noise) / (float(weight.sum(dtype=np.float64)) * mean**2)
    return result


@lru_cache(maxsize=1)
def _bands() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A Hann window, the band of each mode of its transform (0 below all), and how many modes each band has."""
    hann = np.hanning(SPECTRUM_PX + 2)[1:-1].astype(np.float32)
    rows, columns = np.fft.fftfreq(SPECTRUM_PX), np.fft.rfftfreq(SPECTRUM_PX)
    band = np.digitize(np.hypot(rows[:, None], columns[None]), BAND_EDGES)
    modes = np.bincount(band.ravel(), minlength=len(BAND_EDGES) + 1)[1 : len(BAND_EDGES)]
    return np.outer(hann, hann), band, modes


@dataclass(frozen=True)
class KnownSpectra:
    """Spectra of training images, and how far one of them may lie from the rest; travels in the engine's card."""

    log_powers: tuple[tuple[float, ...], ...]
    """(images, bands), decadic."""
    spread: tuple[float, ...]
    """Standard deviation of each band."""
    farthest: float
    """All but one training image in a hundred are nearer than this to one of those above [spreads]."""

    @classmethod
    def of(cls, powers: np.ndarray) -> KnownSpectra:
        """Of the `spectrum` of each of 200 or more clean images (N, bands), in random order."""
        logs = _log(powers)
        kept, rest = logs[:_KEPT_SPECTRA], logs[_KEPT_SPECTRA:]
        if len(rest) < 64:
            raise ValueError(f"spectra of at least {_KEPT_SPECTRA + 64} images are needed, got {len(logs)}")
        tuples = tuple(tuple(float(value) for value in row) for row in kept.round(2))
        known = cls(tuples, tuple(float(value) for value in logs.std(axis=0).clip(0.05).round(3)), 0.0)
        distances = [known.distance(power)[0] for power in powers[_KEPT_SPECTRA:]]
        return replace(known, farthest=round(float(np.quantile(distances, 0.99)), 3))

    @classmethod
    def read(cls, values: Any) -> KnownSpectra:
        """From what `dataclasses.asdict` made of it, as JSON. Raises ValueError, TypeError or KeyError."""
        logs = np.array(values["log_powers"], np.float64)
        spread = np.array(values["spread"], np.float64)
        if logs.ndim != 2 or spread.shape != (len(BAND_EDGES) - 1,) or logs.shape[1:] != spread.shape:
            raise ValueError(f"spectra need {len(BAND_EDGES) - 1} bands, got {logs.shape} and {spread.shape}")
        return cls(tuple(map(tuple, logs.tolist())), tuple(spread.tolist()), float(values["farthest"]))

    def distance(self, power: np.ndarray, error: np.ndarray | None = None) -> tuple[float, float]:
        """From a spectrum (bands,) to the nearest known one, and how far the farthest may be [spreads].

        What its standard error explains, to two standard deviations, is granted.
        """
        variance, noise = np.square(self.spread), np.zeros(len(self.spread))
        if error is not None:
            noise = np.square(error / np.maximum(power, _FAINT_POWER) / math.log(10))
            variance = variance + noise
        apart = np.square(np.array(self.log_powers) - _log(power)) / variance
        granted = float((noise / variance).sum() + 2 * math.sqrt(2 * np.square(noise / variance).sum()))
        return math.sqrt(apart.sum(axis=1).min()), math.sqrt(self.farthest**2 + granted)


def _log(powers: np.ndarray) -> np.ndarray:
    logs: np.ndarray = np.log10(np.maximum(powers, _FAINT_POWER))
    return logs


class Trust:
    """What is known of a stream by now. One thread calls it."""

    def __init__(self, known: KnownSpectra | None) -> None:
        """`known` is what the engine was trained on."""
        self._known = known
        self._pool = Pool(_POOLED)
        self._spectra: deque[np.ndarray] = deque(maxlen=_SPECTRA)

    def pair(self, denoised: np.ndarray, after: np.ndarray) -> None:
        """A denoised frame (H, W) [electrons] and the raw one that came next."""
        with np.errstate(over="ignore", invalid="ignore"):  # of an engine that went wrong
            self._pool.add(pair_values(denoised, after))

    def raw(self, counts: np.ndarray) -> None:
        """A raw frame (H, W) [electrons], for its spectrum."""
        if self._known is None or (power := spectrum(counts)) is None:
            return
        if np.isfinite(power).all():
            self._spectra.append(power)

    def report(self) -> dict[str, Any]:
        """Estimates with their intervals; "insufficient data" in place of one that is not precise yet."""
        return {
            "frames": self._pool.pairs,
            "psnr_db": self._psnr_db(),
            "likelihood": self._given(1),
            "fano": self._fano(),
            "spectrum": self._spectrum(),
        }

    def _psnr_db(self) -> dict[str, float] | str:
        """With a peak of 1 electron: the interval of the mean square error, then its logarithm."""
        error = self._pool.estimate(0)
        if error is None or error.low <= 0 or (error.high - error.low) / 2 > _PRECISE * error.value:
            return INSUFFICIENT
        db = [round(-10 * math.log10(each), 2) for each in (error.value, error.high, error.low)]
        return dict(zip(("value", "low", "high"), db, strict=True))

    def _given(self, index: int) -> dict[str, float] | str:
        estimate = self._pool.estimate(index)
        if estimate is None:
            return INSUFFICIENT
        return {"value": _round(estimate.value), "low": _round(estimate.low), "high": _round(estimate.high)}

    def _fano(self) -> float | str:
        """Square difference over counts: 1 when the frames are counts and the picture is right."""
        square, counts = self._pool.estimate(2), self._pool.estimate(3)
        if square is None or counts is None or counts.value <= 0:
            return INSUFFICIENT
        return _round(square.value / counts.value)

    def _spectrum(self) -> dict[str, Any] | str | None:
        """How unlike the training images' the stream's spectrum is; None if those are not known."""
        if self._known is None:
            return None
        if len(self._spectra) < _SPECTRA:
            return INSUFFICIENT
        powers = np.array(self._spectra)
        error = powers.std(axis=0, ddof=1) / math.sqrt(len(powers))
        distance, farthest = self._known.distance(powers.mean(axis=0), error)
        return {
            "distance": _round(distance),
            "farthest": _round(farthest),
            "in_domain": distance <= farthest,
        }


def _round(value: float) -> float:
    return float(f"{value:.4g}")
