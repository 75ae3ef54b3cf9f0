"""Simulate a data set of noiseless images: ``python -m train.simulate DIR --specimens 480``.

Specimens are simulated in parallel by dask, on a cluster of this machine's cores or, with
``--scheduler``, on yours. Each task is one specimen: abTEM sends the wave through it once,
which is most of the work, and forms all of its images. Tasks share nothing, so that
nothing within abTEM needs to be parallel. This process alone writes, one HDF5 file for
every few specimens (`train.shards`), and what is not enough for one every half minute: a run that is
killed loses less than a minute, and the same command goes on from there.

For the paper's scale, 1,000 specimens with 20 images each, 10.5 GB::

    python -m train.simulate data/large --specimens 1000 --images-each 20 --defects all

``--defocus`` is in nm, in steps of 1 nm, and positive for underfocus. With the negative Cs
of this microscope columns are dark at underfocus and mostly bright beyond 10 nm of overfocus.
The default, -20 20, has all three contrast classes of the paper; its own range, 0-20 nm, here has dark columns alone.

The workers of a cluster of your own need this project, too: start them in its folder,
``dask worker tcp://HOST:8786 --nthreads 1 --no-nanny`` (a nanny makes them three times slower,
see `WORKER_ENVIRONMENT`), or on GPUs, one worker for each, ``dask cuda worker`` of dask-cuda.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import dask
import numpy as np
from distributed import Client, LocalCluster, as_completed
from tqdm import tqdm

from train import shards
from train.command import alone_in, explained, writable_file
from train.imaging import GRID_PX, contrast_class, exit_wave, image, in_pixels, random_optics, use_device
from train.shards import Shard, ShardError
from train.structures import DEFECT_SETS, MATERIALS, check_atoms, material, projected_columns

SPECIMENS_PER_SHARD = 8  # fewer when each has many images,
IMAGES_PER_SHARD = 64  # so that little is lost when a run is killed
AHEAD = 2  # tasks handed out for each worker: one to do, one to do next
SAVE_S = 30.0
PREVIEW_SPECIMENS = 12
WORKERS_TIMEOUT_S = 60
# Without dask's MALLOC_TRIM_THRESHOLD_, with which freed memory goes back to the system at once:
# every image would then fault its pages in again, all 60,000, and take three times as long.
WORKER_ENVIRONMENT = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
log = logging.getLogger("train.simulate")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to simulate of each specimen."""

    material: str = "pt_ceo2"
    defects: str = "paper"
    defocus_nm: tuple[int, int] = (-20, 20)
    """From, to; in steps of 1 nm, positive for underfocus."""
    images_each: int = 8
    """How many of these defoci, drawn anew for each specimen."""

    def __post_init__(self) -> None:
        material(self.material)
        if self.defects not in DEFECT_SETS:
            raise ValueError(f"defects must be one of {', '.join(DEFECT_SETS)}, got {self.defects!r}")
        low, high = self.defocus_nm
        if not low <= high:
            raise ValueError(f"defocus must go from low to high, got {low} to {high} nm")
        if not 1 <= self.images_each <= high - low + 1:
            raise ValueError(
                f"images of each specimen must lie in 1-{high - low + 1}, "
                f"the defoci of {low} to {high} nm, got {self.images_each}"
            )

    def settings(self, seeds: list[int]) -> dict[str, Any]:
        """What a shard of these seeds says of how it was made."""
        asked = json.loads(json.dumps(asdict(self)))
        return asked | {
            "seeds": seeds,
            "versions": {name: version(name) for name in ("abtem", "ase", "numpy")},
        }


def simulate_specimen(seed: int, plan: Plan, device: str = "cpu") -> tuple[np.ndarray, list[str], np.ndarray]:
    """Images (N, 512, 512) float16 of one specimen, parameters (N,) JSON text, columns (M,) [px]."""
    use_device(device)
    substance = material(plan.material)
    try:
        specimen = substance.random_specimen(seed, plan.defects)
        atoms = substance.build(specimen)
        check_atoms(atoms)
    except ValueError as error:
        raise ValueError(f"specimen {seed} of {plan.material} is impossible: {error}") from error
    columns = in_pixels(projected_columns(atoms), substance.CELL_A)
    wave = exit_wave(atoms)
    rng = np.random.default_rng((seed, 2))
    low, high = plan.defocus_nm
    images, parameters = [], []
    for defocus_nm in rng.permutation(np.linspace(low, high, high - low + 1))[: plan.images_each]:
        optics = random_optics(rng, float(defocus_nm))
        intensity = image(wave, optics)
        images.append(intensity.astype(np.float16))
        labels = {"material": plan.material, "contrast": contrast_class(intensity, columns)}
        parameters.append(json.dumps(labels | specimen.as_dict() | optics.as_dict()))
    return np.stack(images), parameters, columns


def missing(directory: Path, seeds: range, plan: Plan) -> dict[Path, list[int]]:
    """Shards that `directory` still lacks, with their seeds; an error if it holds what `plan` does not ask for."""
    todo = {}
    size = min(SPECIMENS_PER_SHARD, max(1, IMAGES_PER_SHARD // plan.images_each))
    for start in seeds[::size]:
        path = directory / f"shard-{start:06d}.h5"
        wanted = list(range(start, min(start + size, seeds.stop)))
        if path.exists():
            there = shards.settings(path)
            for name, value in plan.settings(wanted).items():
                if name not in ("seeds", "versions") and there[name] != value:
                    raise ValueError(
                        f"{path} was made with {name} {there[name]}, and now {name} is to be {value}: "
                        "choose another directory, or ask for the same again"
                    )
            if set(wanted) <= set(there["seeds"]):
                continue
        todo[path] = wanted
    return todo


def simulate(
    client: Client, todo: dict[Path, list[int]], plan: Plan, device: str = "cpu", quiet: bool = False
) -> None:
    """Make the shards `todo` with the workers of `client`."""
    done = {path: read_unfinished(path, seeds, plan) for path, seeds in todo.items()}
    waiting = deque((seed, path) for path, seeds in todo.items() for seed in seeds if seed not in done[path])
    shard_of: dict[str, tuple[int, Path]] = {}
    saved = time.monotonic()
    running = as_completed(with_results=True)

    def hand_out() -> None:
        while waiting and len(shard_of) < AHEAD * max(1, sum(client.nthreads().values())):
            seed, path = waiting.popleft()
            task = client.submit(simulate_specimen, seed, plan, device, pure=False)
            shard_of[task.key] = seed, path
            running.add(task)

    def write_if_whole(path: Path) -> None:
        if len(done[path]) == len(todo[path]):
            write_shard(path, done.pop(path), plan)
            _unfinished(path).unlink(missing_ok=True)

    for path in todo:
        write_if_whole(path)
    number = len(waiting) * plan.images_each
    hand_out()
    with tqdm(total=number, unit="image", disable=quiet) as progress:
        for task, result in running:
            seed, path = shard_of.pop(task.key)
            task.release()
            hand_out()
            done[path][seed] = result
            progress.update(plan.images_each)
            write_if_whole(path)
            if time.monotonic() - saved > SAVE_S:
                for part, results in done.items():
                    if results:
                        write_shard(_unfinished(part), results, plan)
                saved = time.monotonic()


def _unfinished(path: Path) -> Path:
    """Where the specimens of a shard wait for its last one."""
    return path.with_suffix(".unfinished")


def read_unfinished(path: Path, seeds: list[int], plan: Plan) -> dict[int, Any]:
    """What a run that was killed has left of the shard `path`, as `simulate_specimen` returned it for each seed."""
    try:
        shard = shards.read(_unfinished(path))
    except (FileNotFoundError, ShardError):
        return {}
    there = shard.settings["seeds"]
    if shard.settings != plan.settings(there) or not set(there) <= set(seeds):
        return {}
    own = {seed: slice(n * plan.images_each, (n + 1) * plan.images_each) for n, seed in enumerate(there)}
    return {
        seed: (shard.images[own[seed]], shard.parameters[own[seed]], shard.columns[seed]) for seed in there
    }


def surplus(directory: Path, seeds: range) -> list[int]:
    """Specimens in `directory` that are not among `seeds`."""
    there = {seed for path in directory.glob("shard-*.h5") for seed in shards.settings(path)["seeds"]}
    return sorted(there - set(seeds))


def write_shard(path: Path, results: dict[int, Any], plan: Plan) -> None:
    """Write what `simulate_specimen` returned for each seed."""
    seeds = sorted(results)
    shard = Shard(
        images=np.concatenate([results[seed][0] for seed in seeds]),
        parameters=[text for seed in seeds for text in results[seed][1]],
        columns={seed: results[seed][2] for seed in seeds},
        sampling_a=material(plan.material).CELL_A / GRID_PX,
        settings=plan.settings(seeds),
    )
    log.info("wrote %s, sha256 %s", path, shards.write(path, shard))


@contextmanager
def cluster(scheduler: str | None, workers: int) -> Iterator[Client]:
    """A client of the dask cluster at `scheduler`, or of one on this machine, one thread for each process."""
    if scheduler is None:
        with (
            dask.config.set({"distributed.nanny.pre-spawn-environ": WORKER_ENVIRONMENT}),
            LocalCluster(
                n_workers=workers, threads_per_worker=1, dashboard_address="127.0.0.1:0", host="127.0.0.1",
                memory_limit=None, silence_logs=logging.CRITICAL,
            ) as local,
            Client(local) as client,
        ):  # fmt: skip
            yield client
        return
    try:
        client = Client(scheduler, timeout=10)
    except (OSError, ValueError) as error:
        raise RuntimeError(f"no dask scheduler answers at {scheduler}: {error}") from error
    with client:
        try:
            client.wait_for_workers(1, timeout=WORKERS_TIMEOUT_S)
        except TimeoutError as error:
            raise RuntimeError(
                f"the dask scheduler at {scheduler} has no workers after {WORKERS_TIMEOUT_S} s; start some in "
                f"this project's folder: dask worker {scheduler} --nthreads 1"
            ) from error
        yield client


def preview(sheet: Path, directory: Path, seeds: range, plan: Plan, device: str) -> None:
    """Draw a contact sheet of `directory`'s images, or of a few fresh ones where there are none."""
    from train.preview import Tile, choose, draw

    paths = sorted(directory.glob("shard-*.h5"))
    if paths:
        tiles = choose(paths)
    else:
        few = Plan(**asdict(plan) | {"images_each": 1})
        tiles = []
        for seed in tqdm(seeds[:PREVIEW_SPECIMENS], unit="specimen"):
            images, parameters, columns = simulate_specimen(seed, few, device)
            tiles.append(Tile(images[0], json.loads(parameters[0]), columns))
    draw(tiles, sheet)
    print(sheet)


@explained
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--material", choices=MATERIALS, default=Plan.material)
    parser.add_argument("--specimens", type=int, default=480)
    parser.add_argument("--images-each", type=int, default=Plan.images_each, help="images per specimen")
    parser.add_argument("--first-seed", type=int, default=0, help="disjoint ranges make disjoint data sets")
    parser.add_argument(
        "--defects", choices=DEFECT_SETS, default=Plan.defects,
        help="the paper's five classes, or those and adatoms, missing rows, steps and twins",
    )  # fmt: skip
    parser.add_argument(
        "--defocus", type=int, nargs=2, metavar=("FROM", "TO"), default=Plan.defocus_nm,
        help="range of the defocus [nm], positive for underfocus; by default -20 20",
    )  # fmt: skip
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu", help="gpu takes CuPy")
    parser.add_argument("--scheduler", metavar="tcp://HOST:PORT", help="of your own dask cluster")
    parser.add_argument(
        "--workers", type=int, help="on this machine; by default one for each core, or one GPU"
    )
    parser.add_argument(
        "--preview", type=Path, metavar="SHEET.png",
        help="draw a contact sheet of what is in the directory, or of a few specimens if nothing is, and stop",
    )  # fmt: skip
    arguments = parser.parse_args()
    if arguments.specimens < 1:
        parser.error(f"--specimens must be at least 1, got {arguments.specimens}")
    if arguments.first_seed < 0:
        parser.error(f"--first-seed must be at least 0, got {arguments.first_seed}")
    if arguments.workers is not None and (arguments.workers < 1 or arguments.scheduler):
        parser.error("--workers must be at least 1, and a cluster at --scheduler brings its own")
    try:
        plan = Plan(
            material=arguments.material,
            defects=arguments.defects,
            defocus_nm=tuple(arguments.defocus),
            images_each=arguments.images_each,
        )
    except ValueError as error:
        parser.error(str(error))
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.specimens)
    try:
        if arguments.scheduler is None:
            use_device(arguments.device)
        if arguments.preview:
            writable_file(arguments.preview)
            preview(arguments.preview, arguments.directory, seeds, plan, arguments.device)
        else:
            with alone_in(arguments.directory):
                run(arguments, seeds, plan)
    except KeyboardInterrupt:
        sys.exit("interrupted: the shards written so far are whole; the same command goes on")


def run(arguments: argparse.Namespace, seeds: range, plan: Plan) -> None:
    """Simulate what the command line asks for and the directory lacks."""
    directory: Path = arguments.directory
    logging.basicConfig(
        filename=directory / "simulate.log", level=logging.INFO, format="%(asctime)s %(name)s: %(message)s"
    )
    todo = missing(directory, seeds, plan)
    specimens = sum(map(len, todo.values()))
    if specimens < len(seeds):
        print(f"{directory} has {len(seeds) - specimens} of {len(seeds)} specimens already", file=sys.stderr)
    if more := surplus(directory, seeds):
        print(
            f"warning: {directory} also has {len(more)} specimens that were not asked for, {more[0]}-{more[-1]}, and "
            "whoever reads it takes them, too; for these alone choose another directory",
            file=sys.stderr,
        )
    if not todo:
        return
    size = specimens * plan.images_each * GRID_PX**2 * 2
    if size > (free := shutil.disk_usage(directory).free):
        raise RuntimeError(
            f"the images take {size / 1e9:.1f} GB, and {directory} has {free / 1e9:.1f} GB left"
        )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = arguments.workers or (1 if arguments.device == "gpu" else cores)
    log.info("%d specimens, %s", specimens, plan)
    begin = time.monotonic()
    with cluster(arguments.scheduler, min(workers, specimens)) as client:
        simulate(client, todo, plan, arguments.device)
    log.info("done in %.0f s", time.monotonic() - begin)


if __name__ == "__main__":
    main()
