"""Simulate a data set of noiseless images: ``python -m train.simulate DIR --specimens 480``.

Each shard is one HDF5 file of a few specimens, written under a temporary name and
renamed when whole: a run that is killed loses the shard it was in, seconds of work,
and the same command goes on with the next missing one.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import h5py
import numpy as np
from tqdm import tqdm

from train.imaging import GRID_PX, exit_wave, image, random_optics
from train.structures import CELL_A, build, random_specimen

SPECIMENS_PER_SHARD = 8
log = logging.getLogger("train.simulate")


def write_shard(path: Path, seeds: list[int], images_each: int) -> None:
    """Simulate `images_each` images of every seeded specimen into one HDF5 file.

    Datasets: ``images`` (N, 512, 512) float16, 1 in vacuum; ``parameters`` (N,) JSON text.
    """
    images, parameters = [], []
    for seed in seeds:
        specimen = random_specimen(seed)
        wave = exit_wave(build(specimen))
        rng = np.random.default_rng((seed, 2))
        for defocus_nm in rng.permutation(np.linspace(0.0, 20.0, 21))[:images_each]:
            optics = random_optics(rng, float(defocus_nm))
            images.append(image(wave, optics).astype(np.float16))
            parameters.append(json.dumps(specimen.as_dict() | optics.as_dict()))
    partial = path.with_suffix(".partial")
    with h5py.File(partial, "w") as file:
        file["images"] = np.stack(images)
        file["parameters"] = parameters
        file.attrs["sampling_a"] = CELL_A / GRID_PX
    partial.rename(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--specimens", type=int, default=480)
    parser.add_argument("--images-each", type=int, default=8, help="images per specimen, 1-21 defoci")
    parser.add_argument("--first-seed", type=int, default=0, help="disjoint ranges make disjoint data sets")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    if not 1 <= arguments.images_each <= 21:
        parser.error(f"--images-each must lie in 1-21, got {arguments.images_each}")
    if arguments.specimens < 1:
        parser.error(f"--specimens must be at least 1, got {arguments.specimens}")
    arguments.directory.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(filename=arguments.directory / "simulate.log", level=logging.INFO)

    first, last = arguments.first_seed, arguments.first_seed + arguments.specimens
    todo = {}
    for start in range(first, last, SPECIMENS_PER_SHARD):
        path = arguments.directory / f"shard-{start:06d}.h5"
        if not path.exists():
            todo[path] = list(range(start, min(start + SPECIMENS_PER_SHARD, last)))
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.workers, mp_context=spawn) as pool:
        jobs = {pool.submit(write_shard, p, seeds, arguments.images_each): p for p, seeds in todo.items()}
        for job in tqdm(as_completed(jobs), total=len(jobs), unit="shard"):
            job.result()
            log.info("wrote %s", jobs[job])


if __name__ == "__main__":
    main()
