"""What one would use without a network: ``python -m train.baselines data/val --doses 0.45 --out tuned.json``.

Every baseline is a function of counts (H, W) [electrons] that returns expected counts
(H, W) float32. Its parameters are chosen on validation images, never on test images, by
mean PSNR over a grid, for each dose anew; `python -m train.evaluate --baselines tuned.json`
scores the choices.

    gaussian          a blur                                                     SciPy
    wiener            Wiener filter of local mean and variance                   SciPy
    wiener_fourier    Wiener filter of the frame's own spectrum                  SciPy
    fourier_spots     what a microscopist masks by hand: the spots that stand    SciPy
                      out of the flat noise of the diffractogram
    wavelet           undecimated wavelet thresholding of stabilised counts      PyWavelets
    nlm               non-local means of binned, stabilised counts               scikit-image
    pure_let          Haar wavelets, shrunk so that an unbiased estimate of the  NumPy
                      mean square error is least; tunes itself

All of these libraries are BSD or MIT. BM3D is not here: the package bm3d is binary and for
non-commercial use only.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field, fields
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pywt
import torch
from scipy import fft, ndimage
from scipy.stats import poisson
from skimage.restoration import denoise_nl_means
from tqdm import tqdm

from train.command import explained, writable_file
from train.dataset import Images, range_of, refuse_known, specimens
from train.metrics import VIEW_PX, psnr_db
from train.noise import PAPER_DOSE, expose

TUNING_SEED = 23
COEFFICIENTS_PER_WEIGHT = 50
Denoiser = Callable[[np.ndarray], np.ndarray]

# -- variance stabilisation ------------------------------------------------------------


def anscombe(counts: np.ndarray) -> np.ndarray:
    """Poisson counts -> about unit variance, whatever their mean (Anscombe, Biometrika 35, 1948)."""
    return 2 * np.sqrt(counts + 3 / 8)


@cache
def _anscombe_means() -> tuple[np.ndarray, np.ndarray]:
    """E[anscombe(counts)] of Poisson counts, and their means, in rising order."""
    means = np.concatenate([[0], np.geomspace(1e-3, 100, 400)])
    counts = np.arange(400)
    return (anscombe(counts) * poisson.pmf(counts, means[:, None])).sum(axis=1), means


def exact_unbiased_inverse(stabilised: np.ndarray) -> np.ndarray:
    """Averages of `anscombe` -> means of the counts.

    The mean of a root is not the root of the mean: at low counts the plain inverse is far
    too dark. (Makitalo and Foi, "Optimal inversion of the Anscombe transformation in
    low-count Poisson image denoising", IEEE Transactions on Image Processing 20, 2011.)
    """
    expectations, means = _anscombe_means()
    asymptotic = stabilised**2 / 4 - 1 / 8
    tabled = np.interp(stabilised, expectations, means)
    return np.where(stabilised < expectations[-1], tabled, asymptotic)


# -- the baselines ---------------------------------------------------------------------


def gaussian(counts: np.ndarray, *, width_px: float) -> np.ndarray:
    """Blur by a Gaussian of standard deviation `width_px`."""
    return ndimage.gaussian_filter(counts.astype(np.float32), width_px, mode="nearest")


def wiener(counts: np.ndarray, *, size_px: int, noise: float) -> np.ndarray:
    """Wiener filter of the mean and variance in squares of `size_px`.

    `noise` is the variance that counts as noise over what Poisson's law says, the mean.
    (Lim, "Two-Dimensional Signal and Image Processing", 1990.)
    """
    counts = counts.astype(np.float64)
    mean = ndimage.uniform_filter(counts, size_px, mode="reflect")
    variance = ndimage.uniform_filter(counts**2, size_px, mode="reflect") - mean**2
    gain = 1 - noise * counts.mean() / np.maximum(variance, 1e-12)
    return (mean + np.clip(gain, 0, 1) * (counts - mean)).astype(np.float32)


def _relative_power(spectrum: np.ndarray, counts: np.ndarray, smooth_px: float) -> np.ndarray:
    """Power over that of Poisson noise, which is flat and known: the sum of the counts."""
    power = np.abs(spectrum) ** 2 / max(counts.sum(), 1e-12)
    power[0, 0] = 0  # the mean, which is no noise
    return ndimage.gaussian_filter(power, smooth_px, mode="wrap")


def wiener_fourier(counts: np.ndarray, *, smooth_px: float, noise: float) -> np.ndarray:
    """Wiener filter of the frame's own power spectrum, smoothed over `smooth_px` of reciprocal space.

    `noise` is the power that counts as noise over what Poisson's law says. (Kilaas,
    "Optimal and near-optimal filters in high-resolution electron microscopy", Journal of
    Microscopy 190, 1998.)
    """
    spectrum = fft.fft2(counts.astype(np.float64))
    power = _relative_power(spectrum, counts, smooth_px)
    gain = np.clip(1 - noise / np.maximum(power, 1e-12), 0, 1)
    gain[0, 0] = 1
    return fft.ifft2(gain * spectrum).real.astype(np.float32)


def fourier_spots(
    counts: np.ndarray, *, spot_px: float, threshold: float, resolution_px: float
) -> np.ndarray:
    """Keep the spots of the diffractogram and the coarse shape.

    A spot is where the power, smoothed over `spot_px`, exceeds `threshold` times the noise; its
    edge is as soft as it is wide. What is coarser than `resolution_px` is always kept.
    """
    spectrum = fft.fft2(counts.astype(np.float64))
    spots = _relative_power(spectrum, counts, spot_px) > threshold
    frequency = np.hypot(*np.meshgrid(*(fft.fftfreq(n) for n in counts.shape), indexing="ij"))
    mask = ndimage.gaussian_filter((spots | (frequency < 1 / resolution_px)).astype(float), 1.0, mode="wrap")
    mask[0, 0] = 1
    return fft.ifft2(mask * spectrum).real.astype(np.float32)


def wavelet(
    counts: np.ndarray, *, bin_px: int, name: str, coarsest_px: int, threshold: float, mode: str
) -> np.ndarray:
    """Undecimated wavelet thresholding of stabilised counts, `threshold` in standard deviations.

    `coarsest_px`, a power of two times `bin_px`, is the scale of the coarsest wavelets. (Coifman
    and Donoho, "Translation-invariant de-noising", 1995.)
    """
    levels = round(np.log2(coarsest_px / bin_px))

    def shrink(stabilised: np.ndarray) -> np.ndarray:
        height, width = stabilised.shape
        margin = 2**levels
        padding = [(margin, margin + (-side - 2 * margin) % margin) for side in (height, width)]
        padded = np.pad(stabilised, padding, mode="symmetric")
        approximation, *details = pywt.swt2(padded, name, level=levels, norm=True, trim_approx=True)
        kept: list[Any] = [approximation]
        for level, bands in zip(range(levels, 0, -1), details, strict=True):
            # Normalised so, the noise of a band halves with every level.
            kept.append(tuple(pywt.threshold(band, threshold / 2**level, mode=mode) for band in bands))
        return pywt.iswt2(kept, name, norm=True)[margin : margin + height, margin : margin + width]

    return _stabilised(counts, bin_px, shrink)


def nlm(counts: np.ndarray, *, bin_px: int, patch_px: int, reach_px: int, strength: float) -> np.ndarray:
    """Non-local means of stabilised counts.

    `patch_px` and `reach_px` are in pixels of the frame, `strength` (the cut-off of the
    distance of patches) in standard deviations of the noise. (Buades, Coll and Morel,
    "A non-local algorithm for image denoising", CVPR 2005.)
    """
    return _stabilised(
        counts,
        bin_px,
        lambda stabilised: denoise_nl_means(
            stabilised, patch_size=max(3, patch_px // bin_px), patch_distance=reach_px // bin_px, h=strength,
            sigma=1.0, fast_mode=True,
        ),
    )  # fmt: skip


def _stabilised(counts: np.ndarray, bin_px: int, smooth: Denoiser) -> np.ndarray:
    """Apply `smooth`, which expects noise of variance 1, to stabilised counts in bins of `bin_px`.

    Below one or two counts nothing stabilises the variance; bins bring the counts there.
    (Azzari and Foi, "Variance stabilization for noisy+estimate combination in iterative
    Poisson denoising", IEEE Signal Processing Letters 23, 2016.)
    """
    height, width = counts.shape
    padding = ((0, (-height) % bin_px), (0, (-width) % bin_px))
    padded = np.pad(counts.astype(np.float64), padding, mode="symmetric")
    rows, columns = (side // bin_px for side in padded.shape)
    binned = padded.reshape(rows, bin_px, columns, bin_px).sum(axis=(1, 3))
    estimate = exact_unbiased_inverse(smooth(anscombe(binned))) / bin_px**2
    if bin_px > 1:
        estimate = ndimage.zoom(estimate, bin_px, order=3, mode="nearest", grid_mode=True)
    return estimate[:height, :width].astype(np.float32)


def pure_let(counts: np.ndarray, *, levels: int, shifts: int = 12) -> np.ndarray:
    """Haar wavelets whose shrinkage minimises an unbiased estimate of the risk, averaged over `shifts`.

    Sums of Poisson counts are Poisson, so in the unnormalised Haar transform the mean
    square error of any estimator of the details can be estimated without the truth, and
    for a linear expansion of thresholds (LET) the best one is a small linear system.
    (Luisier, Vonesch, Blu and Unser, "Fast interscale wavelet denoising of
    Poisson-corrupted images", Signal Processing 90, 2010.)
    """
    period = 2**levels
    height, width = counts.shape
    padding = [(period, period + (-side) % period) for side in (height, width)]
    padded = np.pad(counts.astype(np.float64), padding, mode="symmetric")
    mean = np.zeros_like(padded)
    for n in range(shifts):
        # Places of a rank-1 lattice cover the period evenly.
        shift = (round(n * period / shifts), round(n * 0.618 * period) % period)
        estimate = _haar_pure_let(np.roll(padded, shift, axis=(0, 1)), levels)
        mean += np.roll(estimate, (-shift[0], -shift[1]), axis=(0, 1)) / shifts
    return np.maximum(mean, 0)[period : period + height, period : period + width].astype(np.float32)


def _haar_pure_let(sums: np.ndarray, levels: int) -> np.ndarray:
    """Denoise counts (H, W), multiples of 2**levels, in one Haar basis."""
    if levels == 0:
        return sums
    a, b, c, d = sums[::2, ::2], sums[::2, 1::2], sums[1::2, ::2], sums[1::2, 1::2]
    coarse = a + b + c + d
    up, down = np.roll(coarse, 1, axis=0), np.roll(coarse, -1, axis=0)
    left, right = np.roll(coarse, 1, axis=1), np.roll(coarse, -1, axis=1)
    corners = np.roll(up, 1, axis=1) + np.roll(down, -1, axis=1)
    corners -= np.roll(up, -1, axis=1) + np.roll(down, 1, axis=1)
    vertical = _shrink(a + b - c - d, coarse, up - down)
    horizontal = _shrink(a - b + c - d, coarse, left - right)
    diagonal = _shrink(a - b - c + d, coarse, corners)
    coarse = _haar_pure_let(coarse, levels - 1)
    fine = np.empty_like(sums)
    fine[::2, ::2] = coarse + vertical + horizontal + diagonal
    fine[::2, 1::2] = coarse + vertical - horizontal - diagonal
    fine[1::2, ::2] = coarse - vertical + horizontal - diagonal
    fine[1::2, 1::2] = coarse - vertical - horizontal + diagonal
    return fine / 4


def _shrink(detail: np.ndarray, total: np.ndarray, predictor: np.ndarray) -> np.ndarray:
    """The linear expansion of thresholds of `detail` with the least estimated risk.

    `detail` is the difference of two Poisson counts whose sum is `total`; `predictor`, made
    of neighbouring totals, knows nothing of either. A band of few coefficients has few
    thresholds, or stays as it is: more weights would follow its noise.
    """
    most = detail.size // COEFFICIENTS_PER_WEIGHT
    if not most:
        return detail

    def thresholds(d: np.ndarray, s: np.ndarray) -> np.ndarray:
        variance = 12 * np.maximum(s, 1)
        small, flat = np.exp(-(d**2) / variance), np.exp(-(predictor**2) / variance)
        every = d, predictor, d * small, d * flat, d * small * flat, predictor * flat
        return np.stack(every[:most])

    # Poisson's law: E[mean * f(count)] = E[count * f(count - 1)]. So with one count fewer
    # on either side of the difference, E[true detail * f] needs no true detail.
    fewer, more = thresholds(detail - 1, total - 1), thresholds(detail + 1, total - 1)
    plus, minus = (total + detail) / 2, (total - detail) / 2
    products = (plus * fewer - minus * more).sum(axis=(1, 2))
    functions = thresholds(detail, total)
    gram = np.einsum("ahw,bhw->ab", functions, functions)
    weights = np.linalg.lstsq(gram, products, rcond=1e-10)[0]
    return np.einsum("a,ahw->hw", weights, functions)


# -- tuning ----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """A function of counts and parameters, and what values to try for each of these."""

    name: str
    label: str
    """For people."""
    function: Callable[..., np.ndarray]
    library: str
    grid: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def choices(self) -> list[dict[str, Any]]:
        """All combinations of the grid."""
        return [dict(zip(self.grid, values, strict=True)) for values in product(*self.grid.values())]


BASELINES = {
    baseline.name: baseline
    for baseline in (
        Baseline(
            name="gaussian", label="Gaussian blur", library="SciPy", function=gaussian,
            grid={"width_px": tuple(np.geomspace(1, 16, 17).round(2).tolist())},
        ),
        Baseline(
            name="wiener", label="Wiener, local", library="SciPy", function=wiener,
            grid={"size_px": (9, 13, 17, 21, 27, 35, 45), "noise": (0.8, 1.0, 1.3, 1.6, 2.0, 2.5)},
        ),
        Baseline(
            name="wiener_fourier", label="Wiener, Fourier", library="SciPy", function=wiener_fourier,
            grid={"smooth_px": (1.0, 1.5, 2.0, 3.0, 4.0, 6.0), "noise": (0.8, 1.0, 1.3, 1.7, 2.2, 3.0)},
        ),
        Baseline(
            name="fourier_spots", label="Fourier spots", library="SciPy", function=fourier_spots,
            grid={
                "spot_px": (0.7, 1.0, 1.4, 2.0, 2.8), "threshold": (1.3, 1.6, 2.0, 2.5, 3.5, 5.0),
                "resolution_px": (30, 60, 120, 240),
            },
        ),
        Baseline(
            name="wavelet", label="wavelet", library="PyWavelets", function=wavelet,
            grid={
                "bin_px": (2, 4), "name": ("sym4", "db8"), "coarsest_px": (32, 64, 128),
                "threshold": (2.0, 3.0, 3.5, 4.0, 5.0), "mode": ("soft", "hard"),
            },
        ),
        Baseline(
            name="nlm", label="NLM", library="scikit-image", function=nlm,
            grid={
                "bin_px": (4, 6, 8), "patch_px": (24, 40, 56, 72), "reach_px": (80, 120),
                "strength": (0.3, 0.4, 0.5, 0.6),
            },
        ),
        Baseline(
            name="pure_let", label="PURE-LET", library="NumPy", function=pure_let,
            grid={"levels": (4, 5, 6, 7, 8)},
        ),
    )
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """A baseline with the parameters that did best on validation views at one dose."""

    baseline: str
    dose: float
    parameters: dict[str, Any]
    psnr_db: float
    """Mean on the validation views: too good for a result, which is what test images are for."""
    views: int
    at_edge: tuple[str, ...]
    """Parameters whose choice is the first or last numeric value of their grid: it may be too narrow."""

    tuned_on: dict[str, Any] = field(default_factory=dict)
    """First and last seed and materials of the validation specimens; empty in files of earlier versions."""

    @property
    def denoise(self) -> Denoiser:
        return partial(BASELINES[self.baseline].function, **self.parameters)


def tune(
    baseline: Baseline, images: Images, dose: float, *, views: int = 12, size_px: int | None = None
) -> Tuned:
    """The grid's best parameters by mean PSNR on `views` of the `images`, spread evenly, at `dose`."""
    indices = np.unique(np.linspace(0, len(images) - 1, views).round().astype(int))
    generator = torch.Generator().manual_seed(TUNING_SEED)
    truths = [images.central_views(size_px or VIEW_PX, [int(index)]) for index in indices]
    noisy = [expose(truth, torch.tensor([dose]), generator)[0, 0].numpy() for truth in truths]
    scale = PAPER_DOSE / dose
    best, best_db = {}, -np.inf
    for choice in tqdm(baseline.choices(), desc=f"{baseline.name}, {dose} e/px", mininterval=5, leave=False):
        score_db = float(
            np.mean(
                [
                    psnr_db(scale * baseline.function(counts, **choice), PAPER_DOSE * truth[0, 0].numpy())
                    for counts, truth in zip(noisy, truths, strict=True)
                ]
            )
        )
        if score_db > best_db:
            best, best_db = choice, score_db
    edges = tuple(
        key
        for key, values in baseline.grid.items()
        if len(values) > 2 and not isinstance(values[0], str) and best[key] in (min(values), max(values))
    )
    return Tuned(
        baseline=baseline.name, dose=dose, parameters=best, psnr_db=round(best_db, 2),
        views=len(indices), at_edge=edges, tuned_on=range_of(specimens(images.parameters)),
    )  # fmt: skip


def read(path: Path, tests: Set[tuple[str, int]] = frozenset()) -> list[Tuned]:
    """What `python -m train.baselines` wrote. Raises ValueError if it was tuned on one of the specimens `tests`."""
    remedy = f"make it again with: python -m train.baselines data/val --out {path}"
    try:
        entries = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); {remedy}") from None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{path} is no list of tuned baselines; {remedy}")
    wanted = [each.name for each in fields(Tuned)]
    for entry in entries:
        if unknown := {entry["baseline"]} - set(BASELINES) if "baseline" in entry else ():
            known = ", ".join(sorted(BASELINES))
            raise ValueError(f"{path}: unknown baseline {', '.join(map(str, unknown))}; known: {known}")
        if missing := [name for name in wanted if name not in entry and name != "tuned_on"]:
            raise ValueError(f"{path}: an entry lacks {', '.join(missing)}; {remedy}")
        if more := sorted(set(entry) - set(wanted)):
            raise ValueError(f"{path}: an entry has {', '.join(more)}, which is not known here; {remedy}")
    tuned = [Tuned(**(entry | {"at_edge": tuple(entry["at_edge"])})) for entry in entries]
    for one in tuned:
        refuse_known(f"{path} was tuned on", one.tuned_on, tests)
    return tuned


@explained
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m train.baselines",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "validation", type=Path, help="a directory made by train.simulate; not the test images"
    )
    parser.add_argument("--doses", type=float, nargs="+", default=[PAPER_DOSE], help="[electrons/pixel]")
    parser.add_argument("--only", nargs="+", choices=sorted(BASELINES), default=list(BASELINES))
    parser.add_argument("--views", type=int, default=12, help="images to tune on (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="TUNED.json", required=True)
    arguments = parser.parse_args(argv)
    if arguments.views < 1:
        parser.error(f"--views must be at least 1, got {arguments.views}")
    if not all(dose > 0 for dose in arguments.doses):
        parser.error(f"doses must be positive [electrons/pixel], got {arguments.doses}")
    images = Images(arguments.validation)
    writable_file(arguments.out)
    tuned = []
    for dose in arguments.doses:
        for name in arguments.only:
            one = tune(BASELINES[name], images, dose, views=arguments.views)
            tuned.append(vars(one))
            edge = f"; at the edge of its grid: {', '.join(one.at_edge)}" if one.at_edge else ""
            print(f"{dose} e/px, {name}: {one.parameters}, {one.psnr_db} dB{edge}", flush=True)
            arguments.out.write_text(json.dumps(tuned, indent=2) + "\n")


if __name__ == "__main__":
    main()
