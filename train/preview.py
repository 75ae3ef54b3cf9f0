"""Contact sheet of simulated images; see ``python -m train.simulate --preview``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
from matplotlib.figure import Figure

from train import shards

TILES = 20
ACROSS = 5
MARGIN_PX = 45
PAPER_DOSE = 0.45
GREY_RANGE = (0.2, 0.75)  # electrons per pixel, for all tiles, so that their contrasts compare


class Tile(NamedTuple):
    """One image (H, W), its parameters, and its columns (M,) [px] if they are known."""

    image: np.ndarray
    parameters: dict[str, Any]
    columns: np.ndarray | None


def choose(paths: list[Path], count: int = TILES) -> list[Tile]:
    """Take images that differ: as many defects and contrast classes as there are, from all over the data set."""
    every = [
        (json.loads(text), path, place)
        for path in paths
        for place, text in enumerate(shards.parameters(path))
    ]
    np.random.default_rng(0).shuffle(every)  # type: ignore[arg-type]
    seen: dict[tuple[str, str | None], int] = {}
    rounds = []
    for found in every:
        kind = found[0]["defect"], found[0].get("contrast")
        rounds.append(seen.get(kind, 0))
        seen[kind] = rounds[-1] + 1
    chosen = [every[number] for number in np.argsort(rounds, kind="stable")[:count]]
    chosen.sort(key=lambda found: (found[0]["defect"], found[0].get("contrast") or ""))
    tiles = []
    for parameters, path, place in chosen:
        with h5py.File(path) as file:
            columns = file.get(f"columns/{parameters['seed']}")
            tiles.append(Tile(file["images"][place], parameters, None if columns is None else columns[:]))
    return tiles


def caption(parameters: dict[str, Any]) -> str:
    """What a tile shows, in three lines."""
    return (
        f"{parameters['seed']}: {parameters['shape']}, {parameters['defect']}\n"
        f"{parameters['thickness_nm']:.1f} nm thick, tilt {parameters['tilt_x_deg']:+.1f}, "
        f"{parameters['tilt_y_deg']:+.1f} deg\n"
        f"defocus {parameters['defocus_nm']:+.0f} nm, {parameters.get('contrast', 'contrast unknown')}"
    )


def draw(tiles: list[Tile], sheet: Path) -> None:
    """Draw `tiles` into an image file, each cut to its particle; rings mark the particle's surface columns."""
    down = -(-len(tiles) // ACROSS)
    figure = Figure(figsize=(3.2 * ACROSS, 3.8 * down), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.1)  # type: ignore[union-attr]
    axes = figure.subplots(down, ACROSS, squeeze=False).flat
    for ax in axes:
        ax.set_axis_off()
    for ax, tile in zip(figure.axes, tiles, strict=False):
        height, width = tile.image.shape
        ax.imshow(
            PAPER_DOSE * tile.image.astype(np.float32), cmap="gray", vmin=GREY_RANGE[0], vmax=GREY_RANGE[1]
        )
        ax.set_title(caption(tile.parameters), fontsize=9)
        if tile.columns is None:
            continue
        own = tile.columns[tile.columns["particle"]]
        half = max(np.ptp(own["x"]), np.ptp(own["y"])) / 2 + MARGIN_PX
        for name, size, limit in (("x", width, ax.set_xlim), ("y", height, ax.set_ylim)):
            middle = np.clip((own[name].min() + own[name].max()) / 2, half, max(half, size - half))
            limit(*(middle + np.array([-half, half] if name == "x" else [half, -half])))
        surface = own[own["surface"]]
        ax.scatter(surface["x"], surface["y"], s=30, facecolors="none", edgecolors="tab:cyan", linewidths=0.7)
    figure.savefig(sheet, dpi=100)
