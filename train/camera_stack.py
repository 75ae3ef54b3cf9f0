"""Simulate the specimen that the simulated camera shows: ``python -m train.camera_stack [OUT.npz]``.

One particle, six states, four defoci. Three adatom columns sit on the particle's
surface and each has two sites, 0 and 1; from a state to the next, and from the last
back to the first, exactly one of them hops::

    state      0    1    2    3    4    5   (0)
    sites     000  100  110  111  011  001  000

The specimen's seed lies outside of every training, validation and test set.

OUT.npz holds ``differences`` (6, 4, 512, 512) uint8, row by row what to add, modulo
256, to the state before (to 0 for state 0): most of it is 0 and takes no room. The
sums are the images, intensity = offset + scale * value, 1 in vacuum. With them go
``offset``, ``scale``, ``sampling_a`` [A/pixel], ``defoci_nm`` (4,), ``centre_px``
(row, column), where a frame should be centred, and ``provenance``, JSON text.
"""

from __future__ import annotations

import argparse
import json
from importlib.metadata import version
from pathlib import Path

import numpy as np
from ase import Atoms
from tqdm import tqdm

from train.command import explained, writable_file
from train.imaging import ENERGY_EV, GRID_PX, Optics, exit_wave, image
from train.structures import columns
from train.structures.pt_ceo2 import CELL_A, PLATINUM, Specimen, build

SPECIMEN = Specimen(
    seed=900009, shape="PtNp4", thickness_nm=4.0, radius_a=11.0, tilt_x_deg=1.0, tilt_y_deg=-0.7
)
DEFOCI_NM = (4.0, 7.0, 10.0, 13.0)  # columns are dark all along, so blends of neighbours keep their contrast
ADATOMS = 3
ADATOM_ATOMS = 5  # atoms in each adatom column, seen end on
SITES_OF_STATE = ((0, 0, 0), (1, 0, 0), (1, 1, 0), (1, 1, 1), (0, 1, 1), (0, 0, 1))
BOND_A = PLATINUM.bond_a
BELOW_CENTRE_A = 1.0  # a frame is centred this far below the particle's centre, to show more of the support


def untilted(positions: np.ndarray, specimen: Specimen) -> np.ndarray:
    """Shear positions (N, 3) [A] so that the columns stand along z again; see `train.structures.supported.build`."""
    tilts = np.tan(np.radians([specimen.tilt_x_deg, specimen.tilt_y_deg, 0.0]))
    return positions - positions[:, 2:] * tilts


def tilted(positions: np.ndarray, specimen: Specimen) -> np.ndarray:
    """Undo `untilted`."""
    tilts = np.tan(np.radians([specimen.tilt_x_deg, specimen.tilt_y_deg, 0.0]))
    return positions + positions[:, 2:] * tilts


def adatom_sites(particle: np.ndarray) -> np.ndarray:
    """Find the empty lattice sites on the surface of an untilted particle (N, 3) [A].

    Returns the adatom columns that fit there, (K, ADATOM_ATOMS, 3) [A]: sites with at least two
    neighbouring columns, above the interface layer, in order round the particle.
    """
    distances = np.linalg.norm(particle[:, None] - particle, axis=2)
    bonded = (distances > 0.1) & (distances < 1.1 * BOND_A)
    bulk = np.argmax(bonded.sum(axis=1))
    bonds = particle[bonded[bulk]] - particle[bulk]  # of this very particle, which may be a mirrored one
    index, places = columns(particle)
    interface_a = places[:, 1].min()

    found: list[np.ndarray] = []
    for column in range(len(places)):
        atoms = particle[index == column]
        atoms = atoms[np.argsort(atoms[:, 2])]
        if len(atoms) < ADATOM_ATOMS:
            continue
        first = (len(atoms) - ADATOM_ATOMS) // 2
        for bond in bonds:
            if np.linalg.norm(bond[:2]) < 0.1:
                continue
            adatoms = atoms[first : first + ADATOM_ATOMS] + bond
            to_columns = np.linalg.norm(places - adatoms[0, :2], axis=1)
            taken = to_columns.min() < 0.5 or any(
                np.linalg.norm(other[0, :2] - adatoms[0, :2]) < 0.5 for other in found
            )
            supported = np.count_nonzero(to_columns < 1.1 * BOND_A) >= 2
            if supported and not taken and adatoms[0, 1] > interface_a + 1.0:
                found.append(adatoms)
    sites = np.array(found)
    offset = sites[:, 0, :2] - places.mean(axis=0)
    return sites[np.argsort(np.arctan2(offset[:, 0], offset[:, 1]))]


def pairs_of_sites(sites: np.ndarray) -> np.ndarray:
    """Choose two neighbouring sites for every adatom, all adatoms well apart: indices (ADATOMS, 2)."""
    hop = np.linalg.norm(np.diff(sites[:, 0, :2], axis=0), axis=1)
    starts = np.flatnonzero(hop < 1.1 * BOND_A)
    chosen = starts[np.linspace(0, len(starts) - 1, 2 * ADATOMS + 1).round().astype(int)[1::2]]
    return np.stack([chosen, chosen + 1], axis=1)


def states(specimen: Specimen) -> list[Atoms]:
    """Build the atomic models of all states; they differ in the adatoms' places alone."""
    bare = build(specimen)
    sites = adatom_sites(untilted(bare.positions[bare.symbols == "Pt"], specimen))
    pairs = pairs_of_sites(sites)
    models = []
    for choice in SITES_OF_STATE:
        adatoms = sites[pairs[np.arange(ADATOMS), choice]].reshape(-1, 3)
        added = Atoms("Pt" * len(adatoms), positions=tilted(adatoms, specimen))
        models.append(bare + added)
    return models


def quantised(images: np.ndarray) -> tuple[np.ndarray, float, float]:
    """Bring images to uint8; returns values, offset and scale. Vacuum, 1, is hit exactly."""
    low, high = float(images.min()), float(images.max())
    scale = (high - low) / 254
    offset = 1.0 - scale * np.ceil((1.0 - low) / scale)
    return np.rint((images - offset) / scale).astype(np.uint8), offset, scale


@explained
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default=Path("emstream/sources/specimen.npz"))
    arguments = parser.parse_args()
    if arguments.out.suffix != ".npz":
        parser.error(f"OUT must end in .npz, got {arguments.out}")
    writable_file(arguments.out)

    optics = [Optics(defocus_nm=defocus_nm) for defocus_nm in DEFOCI_NM]
    models = states(SPECIMEN)
    images = np.empty((len(models), len(optics), GRID_PX, GRID_PX), np.float32)
    for state, atoms in enumerate(tqdm(models, unit="state")):
        wave = exit_wave(atoms)
        for focus, setting in enumerate(optics):
            images[state, focus] = image(wave, setting)
    values, offset, scale = quantised(images)

    sampling_a = CELL_A / GRID_PX
    particle = models[0].positions[models[0].symbols == "Pt"]
    x, y = (particle[:, :2].min(axis=0) + particle[:, :2].max(axis=0)) / 2
    provenance = {
        "made_by": "python -m train.camera_stack",
        "what": "noiseless HRTEM images of a Pt nanoparticle on CeO2 along [110], abTEM multislice",
        "energy_ev": ENERGY_EV,
        "specimen": SPECIMEN.as_dict(),
        "adatom_columns": ADATOMS,
        "atoms_per_adatom_column": ADATOM_ATOMS,
        "sites_of_state": SITES_OF_STATE,
        "optics": [setting.as_dict() for setting in optics],
        "versions": {name: version(name) for name in ("abtem", "ase", "numpy")},
    }
    np.savez_compressed(
        arguments.out,
        differences=np.diff(values, axis=0, prepend=np.zeros_like(values[:1])),
        offset=offset,
        scale=scale,
        sampling_a=sampling_a,
        defoci_nm=np.array(DEFOCI_NM),
        centre_px=np.array([GRID_PX - 1 - (y - BELOW_CENTRE_A) / sampling_a, x / sampling_a]),
        provenance=json.dumps(provenance),
    )
    print(f"{arguments.out}: {values.shape}, {arguments.out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
