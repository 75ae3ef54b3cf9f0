"""How good is the picture? ``python -m bench.quality``

Question: how close are the engine's frames to the truth, beside a Gaussian blur whose
width was tuned for the purpose?

1. Simulated: frames of the moving specimen, whose truth is known. PSNR [dB], peak 1
   electron, both clipped to [0, 1] electrons, mean over frames. The blur is tuned on
   other frames than it is scored on.
2. Measured: a real TEM movie without any ground truth (bench/data/real_tem_movie.h5).
   Each pixel's counts are thinned binomially with probability p into y, a frame of
   0.45 electrons/pixel, and the rest a, independent of y. With c = p / (1 - p),
   mean[(f(y) - c a)^2 - c^2 a] estimates the mean square error of f without bias
   (Poisson counts: the variance of a is its mean). The blur is tuned on even frames;
   odd frames are scored.

Writes bench/results/quality.json and the two pictures of the README.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import matplotlib.pyplot as plt
import numpy as np
from rich.progress import track
from scipy.ndimage import gaussian_filter

from bench import report
from emstream import load_engine
from emstream.inference import Engine
from emstream.quality import psnr_db
from emstream.sources.specimen import MovingSpecimen

DOSE = 0.45
MOVIE = Path(__file__).parent / "data" / "real_tem_movie.h5"
WIDTHS_PX = np.geomspace(1.0, 30.0, 25)
Denoiser = Callable[[np.ndarray], np.ndarray]


def blur(width_px: float) -> Denoiser:
    """A Gaussian blur of standard deviation `width_px`."""
    return lambda counts: gaussian_filter(counts.astype(np.float32), width_px, mode="nearest")


def simulated(engine: Engine, frames: int, folder: Path | None) -> dict[str, Any]:
    """PSNR [dB] of noisy, blurred and denoised frames of the simulated specimen."""
    specimen = MovingSpecimen(seed=17, dose=DOSE)
    tuning = [(specimen.counts(n), specimen.intensity(n)) for n in range(1000, 1004)]
    width = max(WIDTHS_PX, key=lambda w: np.mean([psnr_db(blur(w)(y), x) for y, x in tuning]))
    denoisers: dict[str, Denoiser] = {"noisy": lambda y: y, "gaussian": blur(width), "engine": engine.denoise}
    scores: dict[str, list[float]] = {name: [] for name in denoisers}
    for n in track(range(frames), "simulated"):
        truth, counts = specimen.intensity(10 * n), specimen.counts(10 * n)
        for name, denoise in denoisers.items():
            scores[name].append(psnr_db(denoise(counts), truth))
    scored: dict[str, Any] = {"frames": frames, "gaussian_width_px": round(float(width), 2)}
    for name, values in scores.items():
        scored[name] = {"psnr_db": round(float(np.mean(values)), 2), "sd": round(float(np.std(values)), 2)}
    counts = specimen.counts(0)
    panels = {"noisy": counts, f"Gaussian blur, {width:.1f} px": denoisers["gaussian"](counts),
              "emstream": engine.denoise(counts), "clean": specimen.intensity(0)}  # fmt: skip
    low, high = np.percentile(panels["clean"], (0.1, 99.9))
    if folder:
        windows = {name: (0, 3) if name == "noisy" else (low, high) for name in panels}
        picture(panels, folder / "simulated.png", windows)
    return scored


def measured(engine: Engine, frames: int, folder: Path | None) -> dict[str, Any]:
    """PSNR [dB] estimated without ground truth on the thinned real movie."""
    with h5py.File(MOVIE) as file:
        movie = file["movie"][:]
    vacuum = float(movie[:, :, :60].mean())  # [electrons/pixel], left of the particle
    p = DOSE / vacuum
    c = p / (1 - p)
    rng = np.random.default_rng(0)
    thinned = rng.binomial(movie, p).astype(np.uint8)
    rest = (movie - thinned).astype(np.float64)

    def error(denoise: Denoiser, n: int) -> float:
        return float(np.mean((denoise(thinned[n]) - c * rest[n]) ** 2 - c**2 * rest[n]))

    def psnr(errors: list[float]) -> float | None:
        mean = float(np.mean(errors))
        return round(-10 * np.log10(mean), 2) if mean > 0 else None

    even, odd = list(range(0, len(movie), 2)), list(range(1, len(movie), 2))[:frames]
    width = min(WIDTHS_PX, key=lambda w: np.mean([error(blur(w), n) for n in even]))
    scored: dict[str, Any] = {
        "frames": len(odd),
        "p": round(p, 4),
        "gaussian_width_px": round(float(width), 2),
    }
    errors: dict[str, list[float]] = {}
    for name, denoise in {"noisy": lambda y: y, "gaussian": blur(width), "engine": engine.denoise}.items():
        errors[name] = [error(denoise, n) for n in track(odd, f"real movie, {name}")]
        spread = np.std(errors[name]) / np.sqrt(len(odd))
        scored[name] = {
            "upsnr_db": psnr(errors[name]),
            "mse": float(np.mean(errors[name])),
            "mse_se": float(spread),
        }
    paired = np.array(errors["engine"]) - np.array(errors["gaussian"])
    scored["engine_minus_gaussian"] = {
        "mse": float(paired.mean()),
        "se": float(paired.std() / np.sqrt(len(odd))),
    }
    n = odd[0]
    panels = {
        "one frame, thinned to 0.45 e/px": thinned[n],
        "emstream, of that frame": engine.denoise(thinned[n]),
        f"one frame as measured, {movie[n].mean():.1f} e/px": movie[n],
        "emstream, of that frame ": engine.denoise(movie[n]),
        f"mean of {len(movie)} frames": movie.mean(axis=0),
    }
    if folder:
        windows = {name: tuple(np.percentile(image, (0.5, 99.5))) for name, image in panels.items()}
        picture(panels, folder / "real_movie.png", windows)
    return scored


def picture(panels: dict[str, np.ndarray], path: Path, windows: dict[str, Any]) -> None:
    """Images side by side, grey, each from the low to the high value of its window."""
    height, width = next(iter(panels.values())).shape
    figure, axes = plt.subplots(1, len(panels), figsize=(3.6 * len(panels), 3.6 * height / width + 0.4))
    for axis, (title, image) in zip(axes, panels.items(), strict=True):
        low, high = windows[title]
        axis.imshow(image, cmap="gray", vmin=low, vmax=high, interpolation="nearest")
        axis.set_title(title, fontsize=10)
        axis.set_axis_off()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def table_of(results: dict[str, Any]) -> str:
    """The figures as Markdown."""
    sim, real = results["simulated"], results["measured"]
    rows = [
        [name, f"{sim[name]['psnr_db']:.2f} +- {sim[name]['sd']:.2f}", _upsnr(real[name])]
        for name in ("noisy", "gaussian", "engine")
    ]
    columns = ["", "simulated, PSNR [dB]", "real movie thinned to 0.45 e/px, uPSNR [dB]"]
    difference = real["engine_minus_gaussian"]
    return (
        report.table(columns, rows)
        + f"\n\nBlur tuned to {sim['gaussian_width_px']} px (simulated) and {real['gaussian_width_px']} px (real); "
        f"{sim['frames']} and {real['frames']} frames. On the real movie the engine's mean square error minus the "
        f"blur's, frame by frame, is {difference['mse']:.2e} +- {difference['se']:.1e} electrons squared."
    )


def _upsnr(entry: dict[str, Any]) -> str:
    return "below its own noise" if entry["upsnr_db"] is None else f"{entry['upsnr_db']:.2f}"


def main() -> None:
    parser = report.parser("quality", __doc__)
    parser.add_argument("--engine", type=Path, help="model file [default: the one that ships]")
    parser.add_argument("--frames", type=int, default=50)
    arguments = parser.parse_args()
    frames = 2 if arguments.quick else arguments.frames
    folder = arguments.results or (None if arguments.quick else report.RESULTS)
    engine = load_engine(arguments.engine)
    results = report.stamp("quality", sys.argv[1:]) | {
        "engine": engine.identity,
        "simulated": simulated(engine, frames, folder),
        "measured": measured(engine, frames, folder),
    }
    report.write("quality", "Picture quality", results, table_of(results), arguments)


if __name__ == "__main__":
    main()
