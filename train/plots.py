"""What the figures share: colours that everybody can tell apart, scale bars, axes with units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from matplotlib.transforms import Bbox

from train.metrics import Spread

# Okabe and Ito, "Color Universal Design" (2008), and three more
COLOURS = (
    "#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999", "#882255", "#666633",
)  # fmt: skip
MARKERS = "osD^vP*X<>"
PIXEL_PM = 6.2


def save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def show(
    axis: Axes, image: np.ndarray, title: str, window: tuple[float, float], cmap: str = "gray"
) -> AxesImage:
    """An image (H, W) without ticks, from the low to the high value of `window`."""
    shown = axis.imshow(image, cmap=cmap, vmin=window[0], vmax=window[1], interpolation="nearest")
    axis.set_title(title, fontsize=10)
    axis.set_xticks([])
    axis.set_yticks([])
    return shown


def scale_bar(axis: Axes, length_nm: float, pixel_pm: float = PIXEL_PM, colour: str = "white") -> None:
    """A bar of `length_nm` at the lower left of an image."""
    length_px = 1000 * length_nm / pixel_pm
    (left, right), (bottom, top) = axis.get_xlim(), axis.get_ylim()
    x, y = left + 0.05 * (right - left), bottom + 0.06 * (top - bottom)
    outline = [withStroke(linewidth=1.5, foreground="black" if colour == "white" else "white")]
    axis.plot([x, x + length_px], [y, y], color=colour, linewidth=3, solid_capstyle="butt")
    axis.text(
        x + length_px / 2, y + 0.02 * (top - bottom), f"{length_nm:g} nm", color=colour, ha="center", va="bottom",
        fontsize=9, path_effects=outline,
    )  # fmt: skip
    axis.set_xlim(left, right)
    axis.set_ylim(bottom, top)


def psnr_by(groups: Mapping[str, Mapping[str, Mapping[Any, Spread]]], path: Path) -> None:
    """One panel per key: {title: {denoiser: {group: PSNR}}}, mean and standard deviation over images."""
    columns = min(3, len(groups))
    rows = -(-len(groups) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.4 * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axis in axes.flat[len(groups) :]:
        axis.set_visible(False)
    for panel, (axis, (title, denoisers)) in enumerate(zip(axes.flat, groups.items(), strict=False)):
        ticks = sorted({group for spreads in denoisers.values() for group in spreads}, key=_order)
        for n, (name, spreads) in enumerate(denoisers.items()):
            shift = 0.5 * (n / max(len(denoisers) - 1, 1) - 0.5)
            places = [ticks.index(group) + shift for group in spreads]
            axis.errorbar(
                places, [s.mean for s in spreads.values()], [s.sd for s in spreads.values()], label=name,
                color=COLOURS[n % len(COLOURS)], marker=MARKERS[n % len(MARKERS)], markersize=5, linewidth=0,
                elinewidth=1, capsize=2,
            )  # fmt: skip
        axis.set_xticks(range(len(ticks)), [tick if isinstance(tick, str) else f"{tick:g}" for tick in ticks])
        axis.set_xlabel(title)
        axis.grid(axis="y", linewidth=0.3)
        if panel % columns == 0:
            axis.set_ylabel("PSNR [dB], mean and sd over images")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 6), fontsize=9)
    save(figure, path)


def psnr_against_dose(denoisers: Mapping[str, Mapping[float, Spread]], path: Path) -> None:
    """Lines of {denoiser: {dose: PSNR}}."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axis = figure.subplots()
    for n, (name, spreads) in enumerate(denoisers.items()):
        means, sds = (np.array([getattr(s, key) for s in spreads.values()]) for key in ("mean", "sd"))
        doses, colour = list(spreads), COLOURS[n % len(COLOURS)]
        axis.plot(doses, means, color=colour, marker=MARKERS[n % len(MARKERS)], markersize=5, label=name)
        axis.fill_between(doses, means - sds, means + sds, color=colour, alpha=0.12, linewidth=0)
    axis.set_xscale("log")
    ticks = sorted({dose for spreads in denoisers.values() for dose in spreads})
    axis.set_xticks(ticks, [f"{dose:g}" for dose in ticks])
    axis.minorticks_off()
    axis.set_xlabel("dose [electrons/pixel]")
    axis.set_ylabel("PSNR [dB] at 0.45 electrons/pixel, mean, band of one sd")
    axis.grid(linewidth=0.3)
    axis.legend(fontsize=8)
    save(figure, path)


def quality_against_speed(points: Sequence[Mapping[str, Any]], size_px: int, path: Path) -> None:
    """PSNR against time and, for three networks or more, against multiplications.

    Points of name, psnr_db, ms, macs_per_pixel or None.
    """
    both = sum(point["macs_per_pixel"] is not None for point in points) >= 3
    figure = Figure(figsize=(11 if both else 7, 4.8), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, 1 + both, sharey=True))
    keys = {
        "ms": f"time per frame of {size_px} x {size_px} [ms], median",
        "macs_per_pixel": "multiplications per pixel (networks)",
    }
    for axis, (key, label) in zip(axes, keys.items(), strict=False):
        shown = [(n, point) for n, point in enumerate(points) if point[key] is not None]
        for n, point in shown:
            axis.plot(
                point[key], point["psnr_db"], color=COLOURS[n % len(COLOURS)], marker=MARKERS[n % len(MARKERS)],
                markersize=8, linewidth=0,
            )  # fmt: skip
        low, high = (bound(point[key] for _, point in shown) for bound in (min, max))
        axis.set_xscale("log")
        axis.set_xlim(low / 3, high * 3)
        axis.margins(y=0.12)
        # At the ends of a long axis 1, 2 and 5 would run into each other.
        axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 30 * low else (1.0,)))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_xlabel(label)
        axis.grid(linewidth=0.3)
    axes[0].set_ylabel("PSNR [dB], mean over images")
    FigureCanvasAgg(figure)
    figure.draw_without_rendering()
    for axis, key in zip(axes, keys, strict=False):
        shown = [(n, point) for n, point in enumerate(points) if point[key] is not None]
        places = [
            (point[key], point["psnr_db"], point["name"], COLOURS[n % len(COLOURS)]) for n, point in shown
        ]
        _name_points(axis, places)
    save(figure, path)


# Where a point's name may stand, nearest first: offset [points] and alignments
_SIDES = [
    (dx, dy, across, up)
    for far in (1, 2, 3, 4)
    for dx, dy, across, up in (
        (8, 0, "left", "center"), (-8, 0, "right", "center"), (0, 8 * far, "center", "bottom"),
        (0, -8 * far, "center", "top"), (7 * far, 7 * far, "left", "bottom"), (7 * far, -7 * far, "left", "top"),
        (-7 * far, 7 * far, "right", "bottom"), (-7 * far, -7 * far, "right", "top"),
    )
]  # fmt: skip


def _name_points(axis: Axes, places: Sequence[tuple[float, float, str, str]]) -> None:
    """Write names beside the points (x, y, name, colour) of a drawn axis, where they cover nothing."""
    taken = []
    for x, y, _, _ in places:
        across, up = axis.transData.transform((x, y))
        taken.append(Bbox.from_bounds(across - 8, up - 8, 16, 16))
    for x, y, name, colour in places:
        text = axis.annotate(
            name, (x, y), xytext=(8, 0), textcoords="offset points", fontsize=8, color=colour
        )
        for dx, dy, across, up in _SIDES:
            text.xyann = (dx, dy)
            text.set_horizontalalignment(across)
            text.set_verticalalignment(up)
            box = text.get_window_extent()
            frame = axis.get_window_extent()
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            if inside and not any(box.overlaps(other) for other in taken):
                break
        taken.append(text.get_window_extent())


def psnr_against_field_of_view(series: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Points of {series: [{name, field_of_view_px, psnr_db, psnr_sd}]}, such as ours and the paper's."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axis = figure.subplots()
    for n, (label, points) in enumerate(series.items()):
        axis.errorbar(
            [point["field_of_view_px"] for point in points], [point["psnr_db"] for point in points],
            [point["psnr_sd"] for point in points], color=COLOURS[n], marker=MARKERS[n], markersize=6, linewidth=0,
            elinewidth=0.8, capsize=2, label=label, markerfacecolor="none" if n else COLOURS[n],
        )  # fmt: skip
        for point in points:
            x, y = point["field_of_view_px"], point["psnr_db"]
            crowded = any(
                abs(np.log(x / other["field_of_view_px"])) < 0.2 and 0 < other["psnr_db"] - y < 1
                for other in points
            )
            axis.annotate(
                point["name"], (x, y), textcoords="offset points", xytext=(-7 if n else 7, -10 if crowded else 2),
                ha="right" if n else "left", fontsize=7, color=COLOURS[n],
            )  # fmt: skip
    axis.set_xscale("log")
    ticks: list[int] = []
    for tick in sorted({point["field_of_view_px"] for points in series.values() for point in points}):
        if not ticks or tick > 1.3 * ticks[-1]:
            ticks.append(tick)
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()
    axis.set_xlim(ticks[0] / 3, ticks[-1] * 3)  # room for names
    axis.set_xlabel("field of view [px of 6.2 pm]")
    axis.set_ylabel("PSNR [dB], mean and sd over images")
    axis.grid(linewidth=0.3)
    axis.legend(fontsize=9, loc="upper left")
    save(figure, path)


def matrix(
    values: np.ndarray, trained_on: Sequence[str], tested_on: Sequence[str], key: str, path: Path
) -> None:
    """Mean PSNR of networks trained on the row's images, tested on the column's; NaN where there is none."""
    figure = Figure(figsize=(1.1 * len(tested_on) + 2.6, 0.7 * len(trained_on) + 1.6), layout="constrained")
    axis = figure.subplots()
    shown = axis.imshow(values, cmap="cividis", aspect="auto")
    middle = (np.nanmin(values) + np.nanmax(values)) / 2
    for (row, column), value in np.ndenumerate(values):
        text = "-" if np.isnan(value) else f"{value:.2f}"
        axis.text(column, row, text, ha="center", va="center", color="white" if value < middle else "black")
    axis.set_xticks(range(len(tested_on)), tested_on)
    axis.set_yticks(range(len(trained_on)), trained_on)
    axis.set_xlabel(f"tested on {key}")
    axis.set_ylabel(f"trained on {key}")
    figure.colorbar(shown, label="mean PSNR [dB]")
    save(figure, path)


def _order(group: Any) -> tuple[bool, Any]:
    """Numbers in order, then words."""
    return isinstance(group, str), group
