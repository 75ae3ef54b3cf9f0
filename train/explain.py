"""What a network does with a frame: ``python -m train.explain engines/unet32.pt2 data/test --image 0 --out DIR``.

Equivalent filters (filters.png): a network of ReLUs is linear around every frame, f(x) = J_x x + b_x.
A row of the Jacobian J_x is the filter that makes one pixel of this very frame, so it shows
where that pixel's electrons come from: in the bulk, at the surface, in vacuum. In a bias-free network
b_x = 0, and f(x) = J_x x is checked to 1e-4. (Mohan et al., "Robust and interpretable blind
image denoising via bias-free convolutional neural networks", ICLR 2020.)

Likelihood maps (likelihood-DOSE.png): do the counts support a column that the network has drawn? Counts
that made a column always support it, so the frame is thinned binomially into two halves, which are
independent frames of half the dose: one is denoised, the other one is asked. For a blob B of
the denoised half with mean lambda_B, against vacuum with lambda_v,

    L_B = mean over B of log Poisson(y; lambda_B) - log Poisson(y; lambda_v)
        = lambda_v - lambda_B + mean_B(y) ln(lambda_B / lambda_v)

per pixel, y from the half that the network has not seen: above 0 these counts speak for the column, below
0 for vacuum, and within two standard errors of 0 for neither. (Mohan et al., arXiv 2010.12970.)
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle
from scipy.spatial import cKDTree
from torch import Tensor

from train import networks, plots
from train.command import explained, writable_folder
from train.dataset import Images
from train.metrics import VIEW_PX, psnr_db
from train.noise import PAPER_DOSE, expose
from train.surface import Surface, TrueColumns, columns_are_bright, detect

TOLERANCE = 1e-4
LARGEST_CROP_PX = 256  # half the side of what is shown of a filter
STANDARD_ERRORS = 2
NOISE_SEED = 31
THINNING_SEED = 37
VERDICTS = {"supported": "#56B4E9", "uncertain": "#E69F00", "unsupported": "#D55E00"}
Pixel = tuple[int, int]
"""Row and column."""


@dataclass(frozen=True, kw_only=True)
class EquivalentFilter:
    """The row of J_x that makes one pixel."""

    pixel: Pixel
    weights: np.ndarray
    """(H, W): expected electrons at the pixel per electron counted at each other."""
    value: float
    """f(x) at the pixel [electrons]."""
    linear: float
    """J_x x at the pixel [electrons]."""

    @property
    def error(self) -> float:
        """|f(x) - J_x x| over |f(x)|: what the network adds of its own."""
        return abs(self.value - self.linear) / max(abs(self.value), 1e-12)


def equivalent_filters(
    network: Callable[[Tensor], Tensor], counts: np.ndarray, pixels: Sequence[Pixel]
) -> list[EquivalentFilter]:
    """Rows of the Jacobian of `network`, (1, 1, H, W) to (1, 1, H, W), at counts (H, W)."""
    x = torch.from_numpy(counts.astype(np.float32))[None, None].requires_grad_()
    with torch.enable_grad():
        estimate = network(x)[0, 0]
    filters = []
    for n, (row, column) in enumerate(pixels):
        (gradient,) = torch.autograd.grad(estimate[row, column], x, retain_graph=n < len(pixels) - 1)
        linear = (gradient.double() * x.detach().double()).sum().item()
        value = estimate[row, column].item()
        filters.append(
            EquivalentFilter(pixel=(row, column), weights=gradient[0, 0].numpy(), value=value, linear=linear)
        )
    return filters


def places(columns: TrueColumns, surface: np.ndarray, shape: tuple[int, int]) -> dict[str, Pixel]:
    """A pixel on a column in the bulk, one on the `surface` (N, 2) and one in vacuum.

    Bulk is the particle's column farthest from all that is not bulk, surface the topmost
    column, vacuum as far from columns and the frame's edge as can be.
    """
    particle, support = columns.positions[columns.on_particle], columns.positions[~columns.on_particle]
    if not len(surface) or not len(particle):
        raise ValueError("the view shows no surface of the particle")
    last = np.array(shape[::-1]) - 1
    outside = cKDTree(np.concatenate([surface, support]))
    depth = np.minimum(outside.query(particle)[0], np.minimum(particle, last - particle).min(axis=1))
    bulk = particle[np.argmax(depth)]
    top = surface[np.argmin(surface[:, 1])]
    rows, places = np.mgrid[: shape[0], : shape[1]]
    pixels = np.stack([places.ravel(), rows.ravel()], axis=1)
    free = np.minimum(
        cKDTree(columns.positions).query(pixels)[0], np.minimum(pixels, last - pixels).min(axis=1)
    )
    column, row = pixels[np.argmax(free)]
    return {
        "bulk": (round(bulk[1]), round(bulk[0])),
        "surface": (round(top[1]), round(top[0])),
        "vacuum": (int(row), int(column)),
    }


@dataclass(frozen=True, kw_only=True)
class LikelihoodMap:
    """Which columns the counts support."""

    columns: np.ndarray
    """(N, 3) x, y, radius [px]."""
    ratios: np.ndarray
    """(N,) log-likelihood ratio of column and vacuum, per pixel."""
    errors: np.ndarray
    """(N,) their standard errors."""
    nats: np.ndarray
    """(N,) the ratios over all pixels of the column."""
    image: np.ndarray
    """(H, W): the ratio of the column that covers a pixel, NaN elsewhere."""

    @property
    def verdicts(self) -> list[str]:
        """What the counts say of each column: one of `VERDICTS`."""
        clear = np.abs(self.ratios) > STANDARD_ERRORS * self.errors
        return [
            ("supported" if ratio > 0 else "unsupported") if sure else "uncertain"
            for ratio, sure in zip(self.ratios, clear, strict=True)
        ]

    def count(self) -> dict[str, int]:
        """How many columns have each verdict."""
        return {verdict: self.verdicts.count(verdict) for verdict in VERDICTS}


def halves(counts: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Counts (H, W) thinned binomially into two independent frames of half the dose, which add up to them."""
    one = rng.binomial(counts.astype(np.int64), 0.5).astype(counts.dtype)
    return one, counts - one


def likelihood_map(
    counts: np.ndarray, denoised: np.ndarray, columns: np.ndarray, vacuum: float
) -> LikelihoodMap:
    """Score the `columns` (N, 3; x, y, radius [px]) of a denoised frame (H, W) against counts (H, W) of the same dose.

    `vacuum` is that dose [electrons/pixel]. The counts should be others than those that were denoised.
    """
    if not vacuum > 0:
        raise ValueError(f"vacuum must have a positive dose, got {vacuum} electrons/pixel")
    rows, places = np.mgrid[: counts.shape[0], : counts.shape[1]]
    image = np.full(counts.shape, np.nan)
    ratios, errors, nats = [], [], []
    for x, y, radius in columns:
        inside = (places - x) ** 2 + (rows - y) ** 2 <= radius**2
        level = max(float(denoised[inside].mean()), 1e-6)
        pixels, electrons = int(inside.sum()), float(counts[inside].sum())
        logarithm = np.log(level / vacuum)
        ratios.append(vacuum - level + electrons / pixels * logarithm)
        errors.append(abs(logarithm) * np.sqrt(max(electrons, 1)) / pixels)
        nats.append(ratios[-1] * pixels)
        image[inside] = ratios[-1]
    return LikelihoodMap(
        columns=columns, ratios=np.array(ratios), errors=np.array(errors), nats=np.array(nats), image=image
    )


# -- figures ---------------------------------------------------------------------------


def draw_filters(
    frames: Mapping[float, tuple[np.ndarray, np.ndarray, Mapping[str, EquivalentFilter]]],
    scores_db: Mapping[float, float],
    columns: np.ndarray,
    field_of_view_px: int,
    path: Path,
) -> None:
    """A row per dose of {dose: (counts, denoised, {place: filter})} with its PSNR; `columns` (N, 2) are marked.

    The colours of a place's filters mean the same at every dose.
    """
    names = list(next(iter(frames.values()))[2])
    half = min(field_of_view_px // 2 + 1, LARGEST_CROP_PX)
    share = "" if 2 * half >= field_of_view_px else f"\n{2 * half} of {field_of_view_px} px"
    # A few pixels around the middle weigh far more than the rest.
    limits = {
        name: max(
            1e3 * float(np.percentile(np.abs(_crop(filters[name], half)), 99.8))
            for _, _, filters in frames.values()
        )
        for name in names
    }
    figure = Figure(figsize=(3.6 * (2 + len(names)), 3.2 * len(frames) + 0.2), layout="constrained")
    axes = figure.subplots(len(frames), 2 + len(names), squeeze=False)
    for (dose, (counts, denoised, filters)), row in zip(frames.items(), axes, strict=True):
        highest = max(1.0, float(np.percentile(counts, 99.8)))
        shown = plots.show(row[0], counts, f"counts, {dose:g} electrons/pixel", (0, highest))
        figure.colorbar(shown, ax=row[0], shrink=0.85, label="electrons")
        low, high = np.percentile(denoised, (0.2, 99.8))
        shown = plots.show(row[1], denoised, f"denoised, PSNR {scores_db[dose]:.2f} dB", (low, high))
        figure.colorbar(shown, ax=row[1], shrink=0.85, label="expected electrons")
        plots.scale_bar(row[1], 0.5)
        for n, (name, one) in enumerate(filters.items()):
            (y, x), colour = one.pixel, plots.COLOURS[(2, 6, 5)[n % 3]]
            for axis in row[:2]:
                axis.plot(x, y, "+", color=colour, markersize=11, markeredgewidth=2)
                axis.annotate(
                    name, (x, y), textcoords="offset points", xytext=(6, 5), color=colour, fontsize=9,
                    fontweight="bold",
                )  # fmt: skip
            axis = row[2 + n]
            limit = limits[name]
            shown = axis.imshow(
                1e3 * one.weights, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest"
            )
            title = f"{name}: weights add up to {one.weights.sum():.2f}\n|f(x) - J x| / f(x) = {one.error:.0e}{share}"
            axis.set_title(title, fontsize=10)
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_xlim(x - half - 0.5, x + half + 0.5)
            axis.set_ylim(y + half + 0.5, y - half - 0.5)
            axis.set_facecolor("0.85")  # beyond the frame
            axis.plot(
                *columns.T, "o", color="0.3", markerfacecolor="none", markersize=11, markeredgewidth=0.6
            )
            axis.plot(x, y, "+", color=colour, markersize=11, markeredgewidth=2)
            plots.scale_bar(axis, 0.5, colour="black")
            figure.colorbar(shown, ax=axis, shrink=0.85, label="weight, thousandths", extend="both")
    plots.save(figure, path)


def _crop(one: EquivalentFilter, half: int) -> np.ndarray:
    row, column = one.pixel
    return one.weights[max(0, row - half) : row + half + 1, max(0, column - half) : column + half + 1]


def draw_likelihood(
    clean: np.ndarray, counts: np.ndarray, denoised: np.ndarray, found: LikelihoodMap, dose: float, path: Path
) -> None:
    """Truth, one half's counts, the other half denoised with its columns, and their likelihood; (H, W) [electrons].

    `dose` is that of a half.
    """
    figure = Figure(figsize=(16.5, 4.3), layout="constrained")
    axes = figure.subplots(1, 4)
    low, high = np.percentile(clean, (0.2, 99.8))
    plots.show(axes[0], clean, "noiseless", (low, high))
    plots.scale_bar(axes[0], 0.5)
    highest = max(1.0, float(np.percentile(counts, 99.8)))
    shown = plots.show(axes[1], counts, f"one half of the counts, {dose:g} electrons/pixel", (0, highest))
    figure.colorbar(shown, ax=axes[1], shrink=0.85, label="electrons")
    shown = plots.show(
        axes[2], denoised, f"the other half, denoised: {len(found.columns)} columns", (low, high)
    )
    figure.colorbar(shown, ax=axes[2], shrink=0.85, label="expected electrons")
    limit = float(np.abs(found.ratios).max()) if len(found.ratios) else 1.0
    axes[3].imshow(denoised, cmap="gray", vmin=low, vmax=high, alpha=0.35)
    number = found.count()
    shown = plots.show(
        axes[3], found.image, "what the first half says: " + ", ".join(f"{number[v]} {v}" for v in VERDICTS),
        (-limit, limit), "RdBu",
    )  # fmt: skip
    figure.colorbar(shown, ax=axes[3], shrink=0.85, label="ln(column / vacuum) per pixel")
    for (x, y, radius), verdict in zip(found.columns, found.verdicts, strict=True):
        for axis in axes[2:]:
            width = 0.8 if verdict == "supported" else 1.6
            axis.add_patch(Circle((x, y), radius, fill=False, color=VERDICTS[verdict], linewidth=width))
    handles = [Line2D([], [], color=colour, label=verdict) for verdict, colour in VERDICTS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=9)
    plots.save(figure, path)


# -- the command -----------------------------------------------------------------------


def explain(
    trained: networks.Trained, images: Images, index: int, doses: Sequence[float], out: Path
) -> dict[str, Any]:
    """Draw both figures of one image's central view; returns the check of f(x) = J_x x and the likelihoods."""
    out.mkdir(parents=True, exist_ok=True)
    view = images.central_views(VIEW_PX, [index])
    shape, clean = tuple(view.shape[2:]), view[0, 0].numpy()
    columns = images.columns(index, VIEW_PX)
    bright = columns_are_bright(PAPER_DOSE * clean, images.parameters[index].get("contrast"))
    pixels = places(columns, Surface(columns, shape, bright=bright).positions, shape)
    generator = torch.Generator().manual_seed(NOISE_SEED)
    thinning = np.random.default_rng(THINNING_SEED)
    frames, scores_db, checks, likelihoods = {}, {}, [], []
    for dose in doses:
        counts = expose(view, torch.tensor([dose]), generator)[0, 0].numpy()
        rows = equivalent_filters(trained, counts, list(pixels.values()))
        filters = dict(zip(pixels, rows, strict=True))
        denoised = trained.denoise(counts)
        frames[dose] = counts, denoised, filters
        scores_db[dose] = psnr_db(denoised * (PAPER_DOSE / dose), PAPER_DOSE * clean)
        for place, one in filters.items():
            checks.append(
                {
                    "dose": dose, "place": place, "pixel": one.pixel, "value": one.value, "linear": one.linear,
                    "relative_error": one.error, "sum_of_weights": float(one.weights.sum()),
                }
            )  # fmt: skip
        asked, seen = halves(counts, thinning)
        drawn = trained.denoise(seen)
        blobs = detect(drawn * (PAPER_DOSE / (dose / 2)), bright=bright)
        found = likelihood_map(asked, drawn, blobs, vacuum=dose / 2)
        draw_likelihood(dose / 2 * clean, asked, drawn, found, dose / 2, out / f"likelihood-{dose:g}.png")
        likelihoods.append(
            {
                "dose": dose, "columns": len(found.ratios), **found.count(),
                "ratios": found.ratios.round(5).tolist(), "standard_errors": found.errors.round(5).tolist(),
                "nats": found.nats.round(2).tolist(),
            }
        )  # fmt: skip
    draw_filters(
        frames,
        scores_db,
        columns.positions[columns.on_particle],
        trained.field_of_view_px,
        out / "filters.png",
    )
    worst = max(check["relative_error"] for check in checks)
    return {
        "network": trained.name, "bias_free": trained.bias_free, "image": index,
        "psnr_db": {str(dose): round(score_db, 2) for dose, score_db in scores_db.items()},
        "largest_relative_error": worst, "linear": worst <= TOLERANCE, "filters": checks, "likelihood": likelihoods,
    }  # fmt: skip


@explained
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m train.explain",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("network", type=Path, help="a run's best.pt, or an engine's .pt2 or .onnx")
    parser.add_argument("test", type=Path, help="a directory made by train.simulate, of unseen seeds")
    parser.add_argument("--image", type=int, default=0, help="its number (default: %(default)s)")
    parser.add_argument(
        "--doses", type=float, nargs="+", default=[0.1, PAPER_DOSE, 3.0], help="[electrons/pixel]"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    arguments = parser.parse_args(argv)
    if not all(dose > 0 for dose in arguments.doses):
        parser.error(f"doses must be positive [electrons/pixel], got {arguments.doses}")
    images = Images(arguments.test)
    if not 0 <= arguments.image < len(images):
        parser.error(f"--image must lie in 0-{len(images) - 1}, got {arguments.image}")
    trained = networks.load(arguments.network)
    trained.refuse_seen(images.parameters)
    writable_folder(arguments.out)
    result = explain(trained, images, arguments.image, arguments.doses, arguments.out)
    (arguments.out / "explain.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key not in ("filters", "likelihood")}))


if __name__ == "__main__":
    main()
