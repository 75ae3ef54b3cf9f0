"""A faceted particle of an fcc metal on an oxide support: what such materials share.

A material brings its `Metal`, its support and the cell that the support repeats in;
here are the particle's shape, its defects, its tilt and its place on the support.
The beam runs along a <110> of the metal, so that {111} and {100} facets stand edge on.

Defects of the particle's surface, one per specimen. Of the paper:

    D0        none
    D1        a column of the surface is missing
    D2        two columns of the surface are missing
    Dh        a column of the surface is half empty
    Ds        an extra column sits on the surface

and more:

    adatoms   one to three short columns, of one to five atoms each, in hollow sites round the particle's edge
    row       every second column of a facet's outermost layer is missing, as in the (1x2) missing-row surface
    step      a facet's outermost layer ends half way: a terrace one atom high
    twin      the particle's upper part is the mirror image of the lower across a {111} plane seen edge on
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any, ClassVar, TypeVar

import numpy as np
from ase import Atoms
from ase.lattice.cubic import FaceCenteredCubic
from scipy.spatial import cKDTree

from train.structures import columns

PAPER_DEFECTS = ("D0", "D1", "D2", "Dh", "Ds")
MORE_DEFECTS = ("adatoms", "row", "step", "twin")
DEFECTS = PAPER_DEFECTS + MORE_DEFECTS
LARGEST_TILT_DEG = 10.0  # tilts are shears, good to first order
EDGE_SLACK_A = 0.5
SAME_A = 0.1

Facets = list[tuple[np.ndarray, float]]  # outward normals and distances from the particle's centre [A]


@dataclass(frozen=True, kw_only=True)
class Metal:
    """What the particle is made of and how it stands in the image.

    `shapes` gives, for each shape, the distance of the {100} facets over that of the
    {111} facets, and the height of the centre above the interface over the latter.
    """

    symbol: str
    lattice_a: float
    directions: tuple[list[int], list[int], list[int]]  # crystal directions along x, y and z
    shapes: dict[str, tuple[float, float]]

    @property
    def rotation(self) -> np.ndarray:
        """Crystal coordinates to those of the image."""
        return np.array([np.array(d) / np.linalg.norm(d) for d in self.directions])

    @property
    def bond_a(self) -> float:
        return self.lattice_a / np.sqrt(2)

    @property
    def layer_a(self) -> float:
        """Distance of {111} layers."""
        return self.lattice_a / np.sqrt(3)


@dataclass(frozen=True, kw_only=True)
class SupportedParticle:
    """Everything that decides one atomic model; a material's own `Specimen` names its shapes."""

    SHAPES: ClassVar[tuple[str, ...]]

    seed: int
    shape: str
    defect: str = "D0"
    thickness_nm: float = 4.0
    radius_a: float = 11.0
    tilt_x_deg: float = 0.0
    tilt_y_deg: float = 0.0

    def __post_init__(self) -> None:
        if self.shape not in self.SHAPES:
            raise ValueError(f"shape must be one of {', '.join(self.SHAPES)}, got {self.shape!r}")
        if self.defect not in DEFECTS:
            raise ValueError(f"defect must be one of {', '.join(DEFECTS)}, got {self.defect!r}")
        if not self.thickness_nm > 0:
            raise ValueError(f"thickness must be positive, got {self.thickness_nm} nm")
        if not 4 <= self.radius_a <= 18:
            raise ValueError(f"radius must lie in 4-18 A to fit the cell, got {self.radius_a} A")
        for name in ("tilt_x_deg", "tilt_y_deg"):
            tilt_deg = getattr(self, name)
            if not abs(tilt_deg) <= LARGEST_TILT_DEG:
                raise ValueError(
                    f"{name[:6].replace('_', ' about ')} must lie within "
                    f"{LARGEST_TILT_DEG} degrees, got {tilt_deg} degrees"
                )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


Specimen = TypeVar("Specimen", bound=SupportedParticle)
Support = Callable[[float, float, np.random.Generator], Atoms]


def draw(kind: type[Specimen], seed: int, defects: str) -> Specimen:
    """Draw a specimen over the axes of the paper's data set: 3-6 nm thick, tilts of 0-4 degrees.

    `defects` is ``paper`` for its five classes or ``all`` for those and ours, each as likely as any
    other. A seed means the same specimen in both but for the defect.
    """
    rng = np.random.default_rng(seed)
    values: dict[str, Any] = {
        "shape": str(rng.choice(kind.SHAPES)),
        "defect": str(rng.choice(PAPER_DEFECTS)),
        "thickness_nm": float(rng.uniform(3.0, 6.0)),
        "radius_a": float(rng.uniform(8.0, 14.0)),
        "tilt_x_deg": float(rng.uniform(0.0, 4.0) * rng.choice([-1, 1])),
        "tilt_y_deg": float(rng.uniform(0.0, 4.0) * rng.choice([-1, 1])),
    }
    if defects == "all":
        more = np.random.default_rng((seed, 3))
        if more.random() < len(MORE_DEFECTS) / len(DEFECTS):
            values["defect"] = str(more.choice(MORE_DEFECTS))
    elif defects != "paper":
        raise ValueError(f"defects must be paper or all, got {defects!r}")
    return kind(seed=seed, **values)


def build(
    specimen: SupportedParticle,
    metal: Metal,
    support: Support,
    cell_a: float,
    gap_a: tuple[float, float],
) -> Atoms:
    """Put a particle on its support; returns atoms in a cell of (cell_a, cell_a, thickness + 4) A, tilted.

    `support` makes an oxide from its thickness [A], the height of its surface [A] and a
    generator. `gap_a` is the range of the distance between the oxide's uppermost and the
    metal's lowest layer.

    Tilts shear the model instead of rotating it, x' = x + z tan(tilt): the same
    projection to first order at 4 degrees, and the support stays periodic.
    """
    rng = np.random.default_rng((specimen.seed, 1))
    thickness_a = 10 * specimen.thickness_nm
    top = rng.uniform(0.20, 0.42) * cell_a
    oxide = support(thickness_a, top, rng)
    oxide.positions[:, 2] -= oxide.positions[:, 2].mean()

    metal_a = particle(metal, specimen, rng)
    metal_a[:, 0] *= rng.choice([-1, 1])
    metal_a[:, 0] += cell_a * rng.uniform(0.35, 0.65) - metal_a[:, 0].mean()
    metal_a[:, 1] += top + rng.uniform(*gap_a)
    metal_a[:, 2] += rng.uniform(-0.2, 0.2) * thickness_a - metal_a[:, 2].mean()

    atoms = oxide + Atoms(metal.symbol * len(metal_a), positions=metal_a)
    mark_columns(atoms, np.arange(len(atoms)) >= len(oxide), metal.lattice_a)
    depth = np.ptp(atoms.positions[:, 2]) + 4.0
    x, y, z = atoms.positions.T
    x = (x + z * np.tan(np.radians(specimen.tilt_x_deg))) % cell_a
    y = y + z * np.tan(np.radians(specimen.tilt_y_deg))
    atoms.positions = np.stack([np.where(x < cell_a, x, 0), np.maximum(y, 0), z - z.min() + 2.0], axis=1)
    atoms.set_cell([cell_a, cell_a, depth])
    atoms.set_pbc(True)
    # The support ends at the cell's bottom; further down than a little, the atoms put back there would collide.
    return atoms[y > -EDGE_SLACK_A]


def mark_columns(atoms: Atoms, of_particle: np.ndarray, lattice_a: float) -> None:
    """Set the arrays that a material's atoms carry; see `train.structures`. Atoms are not tilted yet."""
    index, _ = columns(atoms.positions)
    surface = np.zeros(len(atoms), bool)
    own, places = columns(atoms.positions[of_particle])
    places[:, 1] -= places[:, 1].min()
    surface[of_particle] = np.isin(own, surface_columns(places, lattice_a))
    atoms.set_array("column", index)
    atoms.set_array("particle", of_particle)
    atoms.set_array("surface", surface)


def surface_columns(places: np.ndarray, lattice_a: float) -> np.ndarray:
    """Columns (K,) with fewer than the bulk's six neighbours in projection, interface layer left out."""
    neighbours = cKDTree(places).query_ball_point(places, r=0.78 * lattice_a, return_length=True)
    exposed = (neighbours - 1 < 6) & (places[:, 1] > 1.0)
    return np.flatnonzero(exposed)


def particle(metal: Metal, specimen: SupportedParticle, rng: np.random.Generator) -> np.ndarray:
    """Positions (N, 3) of a particle with its defect, whose interface layer lies at y = 0."""
    ratio, height = metal.shapes[specimen.shape]
    repeats = int(np.ceil(4 * specimen.radius_a / metal.lattice_a)) + 2
    lattice = FaceCenteredCubic(
        metal.symbol,
        directions=metal.directions,
        size=(repeats, repeats, 2 * repeats),
        latticeconstant=metal.lattice_a,
    )
    r = (
        lattice.positions
        - lattice.positions[np.argmin(np.linalg.norm(lattice.positions - lattice.positions.mean(0), axis=1))]
    )
    r = r + metal.rotation @ (rng.choice([0.0, 0.25, 0.5], 3) * metal.lattice_a)
    facets: Facets = []
    for signs in product((-1, 1), repeat=3):
        normal = metal.rotation @ (np.array(signs) / np.sqrt(3))
        facets.append((normal, specimen.radius_a * rng.uniform(0.88, 1.12)))
    for axis, sign in product(range(3), (-1, 1)):
        normal = metal.rotation[:, axis] * sign
        facets.append((normal, specimen.radius_a * ratio * rng.uniform(0.88, 1.12)))

    if specimen.defect == "twin":
        r = _twinned(r, facets, -height * specimen.radius_a, metal, specimen.radius_a, rng)
    else:
        r = r[_inside(r, facets)]
        r = r[r[:, 1] >= -height * specimen.radius_a]
    r[:, 1] -= r[:, 1].min()
    return _with_defect(r, facets, specimen.defect, metal, rng)


def _inside(r: np.ndarray, facets: Facets) -> np.ndarray:
    inside = np.ones(len(r), bool)
    for normal, distance in facets:
        inside &= r @ normal <= distance
    return inside


def _twinned(
    r: np.ndarray, facets: Facets, bottom_a: float, metal: Metal, radius_a: float, rng: np.random.Generator
) -> np.ndarray:
    """Cut a lattice (N, 3) into a twin: the modified Wulff construction (Marks, J. Cryst. Growth 61, 1983).

    The twin plane is a {111} layer seen edge on; beyond it, the crystal and its facets are
    mirrored. Where the plane meets the support, both parts end at the lower one's last layer.
    """
    edge_on = [normal for normal, _ in facets[:8] if abs(normal[2]) < 1e-6 and normal[1] > SAME_A]
    across = edge_on[rng.integers(len(edge_on))]
    height = r @ across
    layers = np.round((height - height[0]) / metal.layer_a)
    wanted = rng.uniform(0.0, 0.35) * radius_a
    nearest = np.argmin(np.abs(height - wanted))
    plane, below = height[nearest], layers < layers[nearest]

    lower = r[layers <= layers[nearest]]
    lower = lower[_inside(lower, facets)]
    lower = lower[lower[:, 1] >= bottom_a]
    upper = r[below] - 2 * np.outer(height[below] - plane, across)
    upper = upper[_inside(upper, [(n - 2 * (n @ across) * across, d) for n, d in facets])]
    upper = upper[upper[:, 1] >= lower[:, 1].min() - 1e-6]
    return np.concatenate([lower, upper])


def _with_defect(
    r: np.ndarray, facets: Facets, defect: str, metal: Metal, rng: np.random.Generator
) -> np.ndarray:
    if defect in ("D0", "twin"):
        return r
    if defect == "adatoms":
        return np.concatenate([r, _adatoms(r, metal, rng)])
    index, places = columns(r)
    if defect in ("row", "step"):
        layer = _facet_layer(places, facets, rng)
        gone = layer[1::2] if defect == "row" else layer[: rng.integers(2, len(layer) - 1)]
        return r[~np.isin(index, gone)]

    surface = surface_columns(places, metal.lattice_a)
    if len(surface) < 4:
        raise ValueError(f"the particle is too small for the defect {defect}: {len(r)} atoms")
    if defect in ("D1", "D2"):
        gone = rng.choice(surface, size=int(defect[1]), replace=False)
        return r[~np.isin(index, gone)]
    if defect == "Dh":
        atoms = np.flatnonzero(index == rng.choice(surface))
        atoms = atoms[np.argsort(r[atoms, 2])]
        return np.delete(r, atoms[: len(atoms) // 2], axis=0)
    sites = _free_sites(r, metal)
    index, places = columns(sites)
    lengths = np.bincount(index)
    extra = sites[index == rng.choice(np.flatnonzero(2 * lengths >= lengths.max()))]
    extra = extra[np.argsort(extra[:, 2])]
    keep = max(1, round(len(extra) * rng.uniform(0.3, 1.0)))
    return np.concatenate([r, extra[:keep]])


def _facet_layer(places: np.ndarray, facets: Facets, rng: np.random.Generator) -> np.ndarray:
    """Columns (K,) of the outermost layer of a facet seen edge on, K >= 4, in order along it from either end."""
    layers = []
    for normal, _ in facets:
        if abs(normal[2]) > 1e-6 or normal[1] < -SAME_A:
            continue
        height = places @ normal[:2]
        layer = np.flatnonzero((height > height.max() - SAME_A) & (places[:, 1] > 1.0))
        if len(layer) >= 4:
            along = places[layer] @ np.array([normal[1], -normal[0]])
            layers.append(layer[np.argsort(along)])
    if not layers:
        raise ValueError("the particle is too small: no facet is four columns wide")
    layer = layers[rng.integers(len(layers))]
    return layer[:: rng.choice([-1, 1])]


def _adatoms(r: np.ndarray, metal: Metal, rng: np.random.Generator) -> np.ndarray:
    """One to three short columns (N, 3), some way apart, in free sites of `r`."""
    sites = _free_sites(r, metal)
    index, places = columns(sites)
    chosen: list[int] = []
    for column in rng.permutation(len(places)):
        apart = np.linalg.norm(places[chosen] - places[column], axis=1)
        if (apart > 2 * metal.bond_a).all():
            chosen.append(column)
    adatoms = []
    for column in chosen[: rng.integers(1, 4)]:
        atoms = sites[index == column]
        atoms = atoms[np.argsort(atoms[:, 2])]
        count = min(len(atoms), int(rng.integers(1, 6)))
        first = rng.integers(len(atoms) - count + 1)
        adatoms.append(atoms[first : first + count])
    return np.concatenate(adatoms)


def _free_sites(r: np.ndarray, metal: Metal) -> np.ndarray:
    """Places (N, 3) where the lattice of `r` would go on, each with at least three neighbours in `r`.

    Those in front of a column or behind it are left out: in projection nobody would see an atom there.
    """
    tree = cKDTree(r)
    bonded = tree.query_ball_point(r, 1.1 * metal.bond_a)
    bulk = max(range(len(r)), key=lambda atom: len(bonded[atom]))
    bonds = r[[atom for atom in bonded[bulk] if atom != bulk]] - r[bulk]
    sites = (r[:, None] + bonds).reshape(-1, 3)
    sites = sites[np.unique(np.round(sites, 3), axis=0, return_index=True)[1]]
    supported = tree.query_ball_point(sites, 1.1 * metal.bond_a, return_length=True) >= 3
    vacant = cKDTree(columns(r)[1]).query(sites[:, :2])[0] > 0.5
    free: np.ndarray = sites[supported & vacant & (sites[:, 1] > 1.0)]
    return free
