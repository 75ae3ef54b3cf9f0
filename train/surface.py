"""Are the columns on the particle's surface right? What PSNR cannot see.

One wrong surface atom hardly moves PSNR, and it is what a catalyst's picture is taken
for. So, after Mohan et al. (arXiv 2010.12970): find the atomic columns of a picture, take
those on the surface, match them with the true ones and count::

    precision  matched / found        recall   matched / true
    F1         2 matched / (found + true)
    Jaccard    matched / (missed + extra + matched)

Columns are blobs of the Laplacian of Gaussian (scikit-image), a surface is the boundary of
their alpha shape, the union of the Delaunay triangles whose circumcircle is small. True
columns come from the atomic model (`Images.columns`); where a data set does not know
them, those seen in the noiseless image stand in, as in the paper.

Lengths are in pixels of 6.2 pm, the paper's; `pixel_pm` scales them to other pixels.
Positions are (x, y) [px], x to the right, y down, (0, 0) the centre of the first pixel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.spatial import Delaunay, QhullError, cKDTree
from skimage.feature import blob_log

from train.noise import PAPER_DOSE

PIXEL_PM = 6.2
# The paper's, in its public notebook (surface-metrics-paperdemo.ipynb of
# sreyas-mohan/electron-microscopy-denoising): sigma 2-20 px in ten steps, threshold 0.03
# electrons where vacuum has 0.45, radius (sigma times root two) above 9 px, alpha 40 px.
MIN_SIGMA_PX, MAX_SIGMA_PX, SIGMAS = 2.0, 20.0, 10
THRESHOLD = 0.03
MIN_RADIUS_PX = 9.0
ALPHA_PX = 40.0  # 2.5 A: triangles of Pt columns have 1.6 A, the hole of a missing one 2.4 A or more
MATCH_PX = 10.0
BORDER_PX = 45.0  # a boundary nearer to the frame's edge than one spacing is the frame's, not a surface


class TrueColumns(Protocol):
    """What the atomic model knows, as `Images.columns` returns it."""

    positions: np.ndarray
    """(N, 2) x, y [px]."""
    on_particle: np.ndarray
    """(N,) bool: of the particle, not of its support."""
    on_surface: np.ndarray
    """(N,) bool: on the particle's surface."""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Columns of one picture."""

    positions: np.ndarray
    """(N, 2) x, y [px]."""
    on_surface: np.ndarray
    """(N,) bool."""
    on_particle: np.ndarray | None = None
    """(N,) bool; None where nobody knows."""
    radius_px: np.ndarray | None = None
    """(N,) of the blobs that were found."""

    def __len__(self) -> int:
        return len(self.positions)


@dataclass(frozen=True)
class SurfaceScore:
    """Counts of surface columns."""

    matched: int
    found: int
    true: int

    @property
    def precision(self) -> float:
        return self.matched / self.found if self.found else float(self.true == 0)

    @property
    def recall(self) -> float:
        return self.matched / self.true if self.true else 1.0

    @property
    def f1(self) -> float:
        return 2 * self.matched / (self.found + self.true) if self.found + self.true else 1.0

    @property
    def jaccard(self) -> float:
        union = self.found + self.true - self.matched
        return self.matched / union if union else 1.0


def detect(image: np.ndarray, *, bright: bool, pixel_pm: float = PIXEL_PM) -> np.ndarray:
    """Columns (N, 3) of an image (H, W) in electrons, 0.45 in vacuum: x, y, radius [px].

    `bright` columns have more electrons than what is around them, dark ones fewer.
    """
    scale = PIXEL_PM / pixel_pm
    blobs = blob_log(
        (image if bright else -image).astype(np.float64), threshold=THRESHOLD, num_sigma=SIGMAS,
        min_sigma=MIN_SIGMA_PX * scale, max_sigma=MAX_SIGMA_PX * scale,
    )  # fmt: skip
    y, x, sigma = blobs.T
    radius = np.sqrt(2) * sigma
    return np.stack([x, y, radius], axis=1)[radius > MIN_RADIUS_PX * scale]


def boundary(points: np.ndarray, alpha_px: float = ALPHA_PX) -> np.ndarray:
    """Which points (N, 2) lie on the boundary of their alpha shape, as bool (N,).

    (Edelsbrunner, Kirkpatrick and Seidel, "On the shape of a set of points in the plane",
    IEEE Transactions on Information Theory 29, 1983.) A point in no small triangle, an
    adatom far out, is a boundary of its own.
    """
    if len(points) < 4:
        return np.ones(len(points), bool)
    try:
        triangles = Delaunay(points).simplices
    except QhullError:  # all on one line
        return np.ones(len(points), bool)
    corners = points[triangles]
    sides = np.linalg.norm(corners - np.roll(corners, 1, axis=1), axis=2)
    (ax, ay), (bx, by) = (corners[:, 1] - corners[:, 0]).T, (corners[:, 2] - corners[:, 0]).T
    area = np.abs(ax * by - ay * bx) / 2
    small = triangles[sides.prod(axis=1) < 4 * alpha_px * np.maximum(area, 1e-12)]
    edges = np.sort(np.concatenate([small[:, [0, 1]], small[:, [1, 2]], small[:, [2, 0]]]), axis=1)
    edges, times = np.unique(edges, axis=0, return_counts=True)
    on_boundary = np.ones(len(points), bool)
    on_boundary[small.ravel()] = False
    on_boundary[edges[times == 1].ravel()] = True
    return on_boundary


def surface(points: np.ndarray, shape: tuple[int, int], pixel_pm: float = PIXEL_PM) -> np.ndarray:
    """Which columns (N, 2) of a picture of `shape` lie on a surface, as bool (N,).

    Columns at the picture's edge do not count: what is beyond them is not known.
    """
    scale = PIXEL_PM / pixel_pm
    return boundary(points, ALPHA_PX * scale) & _inside(points, shape, BORDER_PX * scale)


def _inside(points: np.ndarray, shape: tuple[int, int], margin_px: float) -> np.ndarray:
    x, y = points.T
    return (x > margin_px) & (x < shape[1] - 1 - margin_px) & (y > margin_px) & (y < shape[0] - 1 - margin_px)


def find(image: np.ndarray, *, bright: bool, pixel_pm: float = PIXEL_PM) -> Columns:
    """The columns of an image (H, W) in electrons, 0.45 in vacuum."""
    blobs = detect(image, bright=bright, pixel_pm=pixel_pm)
    positions = blobs[:, :2]
    return Columns(
        positions=positions, on_surface=surface(positions, image.shape, pixel_pm), radius_px=blobs[:, 2]
    )


def columns_are_bright(clean: np.ndarray, contrast: str | None = None) -> bool:
    """Whether columns look brighter than vacuum in the noiseless image (H, W), 0.45 in vacuum.

    `contrast` as the data set has it decides when it is "white" or "black"; else the larger
    excursions do.
    """
    if contrast in ("white", "black"):
        return contrast == "white"
    return float(np.mean((clean - PAPER_DOSE) ** 3)) > 0


def reference(images: Any, index: int, clean: np.ndarray) -> tuple[Columns, bool]:
    """True columns of an image's central view `clean` (H, W, 0.45 in vacuum), and whether they are bright.

    Columns are the atomic model's, or where the data set has none, those seen in `clean`.
    """
    bright = columns_are_bright(clean, images.parameters[index].get("contrast"))
    if not hasattr(images, "columns"):
        return find(clean, bright=bright), bright
    true: TrueColumns = images.columns(index, clean.shape[0])
    inside = _inside(true.positions, clean.shape, BORDER_PX)
    columns = Columns(
        positions=true.positions, on_surface=true.on_surface & inside, on_particle=true.on_particle
    )
    return columns, bright


def match(found: np.ndarray, true: np.ndarray, within_px: float = MATCH_PX) -> np.ndarray:
    """Pairs (K, 2) of indices of points (N, 2) and (M, 2), each used once, at most `within_px` apart.

    As many pairs as there can be, and of these the nearest together.
    """
    if not len(found) or not len(true):
        return np.empty((0, 2), int)
    distance = np.linalg.norm(found[:, None] - true[None], axis=2)
    far = within_px * (len(found) + len(true) + 1)  # dearer than any number of good pairs
    rows, columns = linear_sum_assignment(np.where(distance <= within_px, distance, far))
    near = distance[rows, columns] <= within_px
    return np.stack([rows[near], columns[near]], axis=1)


def score(found: Columns, true: Columns, within_px: float = MATCH_PX) -> SurfaceScore:
    """Surface columns found against the true ones.

    Where it is known which true columns are the particle's, only these count, and of what
    was found that whose nearest true column is.
    """
    found_surface = found.positions[found.on_surface]
    true_surface = true.positions[true.on_surface]
    if true.on_particle is not None and len(true) and len(found_surface):
        nearest = cKDTree(true.positions).query(found_surface)[1]
        found_surface = found_surface[true.on_particle[nearest]]
    pairs = match(found_surface, true_surface, within_px)
    return SurfaceScore(len(pairs), len(found_surface), len(true_surface))
