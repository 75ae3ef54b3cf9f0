"""Are the columns on the particle's surface right? What PSNR cannot see.

One wrong surface atom hardly moves PSNR, and it is what a catalyst's picture is taken
for. So, after Mohan et al. (arXiv 2010.12970): find the atomic columns of a picture, take
those on the surface, match them with the true ones and count::

    precision  matched / found        recall   matched / true
    F1         2 matched / (found + true)
    Jaccard    matched / (missed + extra + matched)

Columns are blobs of the Laplacian of Gaussian (scikit-image), a surface is the boundary of
their alpha shape, the union of the Delaunay triangles whose circumcircle is small. True
columns come from the atomic model (`Images.columns`), where the paper takes those seen in
the noiseless image: so the noiseless image itself can be scored, which shows how much the
detector sees at best. The same rule says for true and found columns which lie on the surface.
What was found belongs to the particle when the nearest true column does: the measure knows where the
particle is, so even blobs at random places score something, and `Surface.chance` says how much.
The `surface` that shards hold is another one, by neighbours in the atomic model; contact sheets alone show it.

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
# electrons where vacuum has 0.45, radius (sigma times root two) above 9 px.
MIN_SIGMA_PX, MAX_SIGMA_PX, SIGMAS = 2.0, 20.0, 10
THRESHOLD = 0.03
MIN_RADIUS_PX = 9.0
# Largest circumradius. Triangles of Pt columns have 25 px, the notch that a missing one leaves
# 39 px, which the paper's 40 px would close.
ALPHA_PX = 34.0
MATCH_PX = 10.0
CHANCE_SEED = 41
BORDER_PX = 45.0  # a boundary nearer to the frame's edge than one spacing is the frame's, not a surface


class TrueColumns(Protocol):
    """What the atomic model knows, as `Images.columns` returns it."""

    positions: np.ndarray
    """(N, 2) x, y [px]."""
    on_particle: np.ndarray
    """(N,) bool: of the particle, not of its support."""


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


def _inside(points: np.ndarray, shape: tuple[int, int], margin_px: float) -> np.ndarray:
    x, y = points.T
    return (x > margin_px) & (x < shape[1] - 1 - margin_px) & (y > margin_px) & (y < shape[0] - 1 - margin_px)


def columns_are_bright(clean: np.ndarray, contrast: str | None = None) -> bool:
    """Whether columns look brighter than vacuum in the noiseless image (H, W), 0.45 in vacuum.

    `contrast` as the data set has it decides when it is "white" or "black"; else the larger
    excursions do.
    """
    if contrast in ("white", "black"):
        return contrast == "white"
    return float(np.mean((clean - PAPER_DOSE) ** 3)) > 0


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


class Surface:
    """The surface columns of one picture's particle: the true ones, and the measure for found ones."""

    def __init__(self, true: TrueColumns, shape: tuple[int, int], *, bright: bool) -> None:
        self._tree = cKDTree(true.positions)
        self._on_particle = np.asarray(true.on_particle, bool)
        self._support = true.positions[~self._on_particle]
        self._shape, self._bright = shape, bright
        self.positions = self._on_surface(true.positions[self._on_particle])
        """(M, 2) x, y [px] of the true ones."""

    @classmethod
    def of(cls, images: Any, index: int, clean: np.ndarray) -> Surface:
        """That of an image's central view `clean` (H, W; 0.45 in vacuum)."""
        bright = columns_are_bright(clean, images.parameters[index].get("contrast"))
        return cls(images.columns(index, clean.shape[0]), clean.shape, bright=bright)

    def columns(self, image: np.ndarray) -> np.ndarray:
        """Columns (N, 2) seen in an image (H, W) in electrons, 0.45 in vacuum."""
        return detect(image, bright=self._bright)[:, :2]

    def score(self, image: np.ndarray, within_px: float = MATCH_PX) -> SurfaceScore:
        """How well an image (H, W) in electrons, 0.45 in vacuum, shows the surface."""
        return self.score_columns(self.columns(image), within_px)

    def score_columns(self, columns: np.ndarray, within_px: float = MATCH_PX) -> SurfaceScore:
        """How well `columns` (N, 2) seen in an image show the surface."""
        if len(columns):
            columns = self._on_surface(columns[self._on_particle[self._tree.query(columns)[1]]])
        matched = len(match(columns, self.positions, within_px))
        return SurfaceScore(matched, len(columns), len(self.positions))

    def chance(self, number: int) -> SurfaceScore:
        """What `number` columns at random places of the frame score, the same ones each time."""
        places = np.random.default_rng(CHANCE_SEED).uniform(size=(number, 2))
        return self.score_columns(places * (np.array(self._shape[::-1]) - 1))

    def _on_surface(self, particle: np.ndarray) -> np.ndarray:
        """Those of the particle's columns (N, 2) that face vacuum: the true support covers its underside.

        Columns near the frame's edge do not count: what is beyond them is not known.
        """
        exposed = boundary(np.concatenate([particle, self._support]))[: len(particle)]
        return particle[exposed & _inside(particle, self._shape, BORDER_PX)]
