"""Au nanoparticles on SrTiO3, seen along [110].

Axes of every model, in angstrom::

    x   [-110]   to the right in the image
    y   [001]    up in the image, normal to the Au|SrTiO3 interface
    z   [110]    along the beam

Gold on the (001) face of SrTiO3 grows with {111}, {100} or {110} on the oxide (Kuang and
Zhu, Crystals 12, 1414 (2022)), as truncated octahedra of {111} and {100} facets (Silly and
Castell, Phys. Rev. Lett. 96, 086104 (2006), for the growth). Here {100} lies on the oxide,
cube on cube: lattice constants of 4.078 A (Au) and 3.905 A (SrTiO3), 4.4 % apart. In this
zone the columns of gold stand 2.5 A apart, and the oxide shows columns of Sr with O, of Ti,
and of O. The oxide ends in TiO2.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from ase import Atoms

from train.structures import supported
from train.structures.supported import Metal, SupportedParticle

SRTIO3_LATTICE_A = 3.905
CELL_A = 10 * SRTIO3_LATTICE_A * np.sqrt(2)  # the support repeats without a seam along x: 55.23 A
# Measured for Au {100} on MgO, 2.47 +- 0.12 A (Han, Ferrando and Li, J. Phys. Chem. Lett. 5, 131 (2014)).
GAP_A = (2.3, 2.65)

GOLD = Metal(
    symbol="Au",
    lattice_a=4.078,
    directions=([-1, 1, 0], [0, 0, 1], [1, 1, 0]),
    shapes={
        "AuNp1": (1.155, 0.50),
        "AuNp2": (1.000, 0.55),
        "AuNp3": (1.400, 0.25),
        "AuNp4": (1.155, 0.75),
    },
)


@dataclass(frozen=True, kw_only=True)
class Specimen(SupportedParticle):
    """One Au particle on SrTiO3."""

    SHAPES = tuple(GOLD.shapes)

    shape: str = "AuNp1"


def random_specimen(seed: int, defects: str = "paper") -> Specimen:
    """Draw a specimen; see `supported.draw`."""
    return supported.draw(Specimen, seed, defects)


def build(specimen: Specimen) -> Atoms:
    """Build the atomic model of `specimen`."""
    return supported.build(specimen, GOLD, _support, CELL_A, GAP_A)


def _support(thickness_a: float, top_a: float, rng: np.random.Generator) -> Atoms:
    """SrTiO3 filling the cell from its bottom to `top_a`, with a step one unit cell high half of the time."""
    a = SRTIO3_LATTICE_A
    period_x = period_z = a * np.sqrt(2)
    # One period along x, y and z of this zone, in units of (a sqrt 2, a, a sqrt 2); y counts from TiO2 down.
    basis = {
        "Ti": [(0.0, 0.0, 0.0), (0.5, 0.0, 0.5)],
        "Sr": [(0.0, -0.5, 0.5), (0.5, -0.5, 0.0)],
        "O": [
            (0.25, 0.0, 0.25), (0.75, 0.0, 0.25), (0.25, 0.0, 0.75), (0.75, 0.0, 0.75),
            (0.0, -0.5, 0.0), (0.5, -0.5, 0.5),
        ],
    }  # fmt: skip
    symbols = [symbol for symbol, places in basis.items() for _ in places]
    one = np.array([place for places in basis.values() for place in places]) * [period_x, a, period_z]
    layers_y = int(np.ceil(top_a / a)) + 1
    layers_z = max(1, round(thickness_a / period_z))
    shifts = np.stack(np.meshgrid(range(10), range(-layers_y, 1), range(layers_z), indexing="ij"), axis=-1)
    positions = (shifts.reshape(-1, 1, 3) * [period_x, a, period_z] + one).reshape(-1, 3)
    symbols = np.tile(symbols, shifts.size // 3)
    positions[:, 1] += top_a
    limit = np.full(len(positions), top_a + 0.1)
    if rng.random() < 0.5:
        start, width = rng.uniform(0, CELL_A), rng.uniform(0.15, 0.4) * CELL_A
        limit[(positions[:, 0] - start) % CELL_A < width] -= a
    keep = (positions[:, 1] < limit) & (positions[:, 1] >= 0)
    return Atoms(list(symbols[keep]), positions=positions[keep])
