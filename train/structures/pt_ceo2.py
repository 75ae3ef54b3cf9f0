"""Pt nanoparticles on CeO2, seen along [110].

Axes of every model, in angstrom::

    x   [11-2]   to the right in the image
    y   [111]    up in the image, normal to the Pt|CeO2 interface
    z   [1-10]   along the beam

Pt and CeO2 are both face-centred cubic and share these directions
(cube-on-cube epitaxy, {111} interface), as in the catalyst of Mohan et al.,
"Deep denoising for scientific discovery" (arXiv 2010.12970).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from ase import Atoms
from ase.lattice.cubic import FaceCenteredCubic

from train.structures import supported
from train.structures.supported import Metal, SupportedParticle

CEO2_LATTICE_A = 5.411
CEO2_PERIOD_X_A = CEO2_LATTICE_A * np.sqrt(6) / 2
CELL_A = 8 * CEO2_PERIOD_X_A  # the support repeats without a seam along x: 53.02 A
GAP_A = (1.9, 2.4)  # from the uppermost layer of the support to the lowest of Pt

PLATINUM = Metal(
    symbol="Pt",
    lattice_a=3.924,
    directions=([1, 1, -2], [1, 1, 1], [1, -1, 0]),
    shapes={
        "PtNp1": (1.155, 0.35),
        "PtNp2": (1.000, 0.55),
        "PtNp3": (1.400, 0.20),
        "PtNp4": (1.155, 0.75),
    },
)


@dataclass(frozen=True, kw_only=True)
class Specimen(SupportedParticle):
    """One Pt particle on CeO2."""

    SHAPES = tuple(PLATINUM.shapes)

    shape: str = "PtNp1"


def random_specimen(seed: int, defects: str = "paper") -> Specimen:
    """Draw a specimen; see `supported.draw`."""
    return supported.draw(Specimen, seed, defects)


def build(specimen: Specimen) -> Atoms:
    """Build the atomic model of `specimen`."""
    return supported.build(specimen, PLATINUM, _support, CELL_A, GAP_A)


def _support(thickness_a: float, top_a: float, rng: np.random.Generator) -> Atoms:
    """CeO2 filling the cell from its bottom to `top_a`, with a one-layer step half of the time."""
    layers_z = max(1, round(thickness_a / (CEO2_LATTICE_A / np.sqrt(2))))
    blocks_y = int(np.ceil(CELL_A / (CEO2_LATTICE_A * np.sqrt(3)))) + 1
    cerium = FaceCenteredCubic(
        "Ce", directions=PLATINUM.directions, size=(8, blocks_y, layers_z), latticeconstant=CEO2_LATTICE_A
    )
    bond = CEO2_LATTICE_A * np.sqrt(3) / 4  # oxygen sits straight above and below cerium in [111]
    trilayer = CEO2_LATTICE_A / np.sqrt(3)
    ce = cerium.positions.copy()
    ce[:, 1] += top_a - bond - np.floor((top_a - bond) / trilayer) * trilayer
    limit = np.full(len(ce), top_a - bond + 0.1)
    if rng.random() < 0.5:
        start, width = rng.uniform(0, CELL_A), rng.uniform(0.15, 0.4) * CELL_A
        limit[(ce[:, 0] - start) % CELL_A < width] -= trilayer
    ce = ce[(ce[:, 1] < limit) & (ce[:, 1] > bond)]
    above = np.array([0, bond, 0])
    oxygen = np.concatenate([ce + above, ce - above])
    return Atoms(["Ce"] * len(ce) + ["O"] * len(oxygen), positions=np.concatenate([ce, oxygen]))
