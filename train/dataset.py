"""Simulated images on disk -> views for training and testing, and the truth about their columns.

A view is a square of the specimen resampled to the camera's pixels, (N, 1, S, S)
float32, 1 in vacuum. Noise is not part of a view: `train.noise` draws it afresh
every time.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from ase.data import chemical_symbols
from torch import Tensor

from train import shards
from train.shards import Shard, ShardError
from train.structures import material, projected_columns

SAMPLING_A = 0.062  # pixel size of the camera's frames [A], as in the paper
FINEST, COARSEST = 0.9, 1.1  # times that, in training
USABLE = 0.94  # of an image's side: at the outermost 3 % the periodic cell wraps around
# Numbers fall into the nearest multiple of the step: a group per unit, like the paper's settings.
STEPS = {"thickness_nm": 1.0, "tilt": 1.0, "defocus_nm": 5.0}


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Atomic columns of one view, as the atomic model has them."""

    positions: np.ndarray
    """(N, 2) x, y [px], x to the right, y down, (0, 0) the centre of the first pixel."""
    element: np.ndarray
    """(N,) chemical symbol of the heaviest atom."""
    on_particle: np.ndarray
    """(N,) bool: of the particle, not of its support."""

    def __len__(self) -> int:
        return len(self.positions)


class Images:
    """All shards of a directory in memory: images (N, 512, 512) float16 and their parameters.

    Checksums are compared while loading.
    """

    def __init__(self, directory: Path) -> None:
        paths = sorted(Path(directory).glob("shard-*.h5"))
        if not paths:
            raise FileNotFoundError(
                f"no shard-*.h5 in {directory}; make some with: python -m train.simulate {directory}"
            )
        shapes = [shards.shape(path) for path in paths]
        if len({shape[1:] for shape in shapes}) > 1:
            raise ShardError(f"images in {directory} differ in size: {sorted({s[1:] for s in shapes})} px")
        ends = np.cumsum([shape[0] for shape in shapes])
        images = np.empty((ends[-1], *shapes[0][1:]), np.float16)

        def read(path: Path, end: int, shape: tuple[int, int, int]) -> Shard:
            return shards.read(path, images[end - shape[0] : end])

        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(read, paths, ends, shapes))
        if len(samplings := {shard.sampling_a for shard in found}) > 1:
            raise ShardError(
                f"images in {directory} differ in pixel size, {sorted(samplings)} A: one directory per material"
            )
        if unchecked := sum(shard.sha256 is None for shard in found):
            warnings.warn(
                f"{unchecked} of {len(found)} shards in {directory} are of an earlier version without "
                "checksums and are taken as they are; to have some, delete them and simulate them again",
                stacklevel=2,
            )
        self.images = torch.from_numpy(images)
        self.parameters = [json.loads(text) for shard in found for text in shard.parameters]
        self.sampling_a = found[0].sampling_a
        self._columns = {seed: columns for shard in found for seed, columns in shard.columns.items()}

    def __len__(self) -> int:
        return len(self.images)

    def keep(self, key: str, group: str) -> None:
        """Forget all images but those of one `group` of `key`, by `group_of`. Raises ValueError if there is none."""
        groups = [str(group_of(parameters, key)) for parameters in self.parameters]
        kept = [n for n, found in enumerate(groups) if found == group]
        if not kept:
            raise ValueError(f"no image has the {key} {group}, only {', '.join(sorted(set(groups)))}")
        self.images = self.images[kept]
        self.parameters = [self.parameters[n] for n in kept]

    def view(
        self, index: Tensor, size_px: int, sampling_a: Tensor, angle: Tensor, flip: Tensor, centre: Tensor
    ) -> Tensor:
        """Resample images `index` (B,) to views (B, 1, size_px, size_px).

        `angle` (B,) in radians, `flip` (B,) of +1 or -1, `centre` (B, 2) in (x, y) of the
        image's own [-1, 1].
        """
        source = self.images[index][:, None].float()
        scale = size_px * sampling_a / (source.shape[-1] * self.sampling_a)
        cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
        matrix = torch.stack(
            [
                torch.stack([cos * flip, -sin, centre[:, 0]], dim=1),
                torch.stack([sin * flip, cos, centre[:, 1]], dim=1),
            ],
            dim=1,
        )
        grid = F.affine_grid(matrix, [len(index), 1, size_px, size_px], align_corners=False)
        return F.grid_sample(source, grid, mode="bicubic", padding_mode="reflection", align_corners=False)

    def random_views(self, count: int, size_px: int, generator: torch.Generator) -> Tensor:
        """Views at random places, any rotation, mirrored or not, pixels of 5.6-6.8 pm.

        Raises ValueError for views that do not fit into the image's usable part at every angle.
        """
        side_a = self.images.shape[-1] * self.sampling_a
        largest_px = int(USABLE * side_a / (np.sqrt(2) * COARSEST * SAMPLING_A))
        if size_px > largest_px:
            raise ValueError(
                f"crops of {size_px} px do not fit into images of {side_a / 10:.1f} nm at every angle; "
                f"crop_px can be {largest_px} at most"
            )

        def uniform(low: float, high: float, *shape: int) -> Tensor:
            return low + (high - low) * torch.rand(count, *shape, generator=generator)

        index = torch.randint(len(self), (count,), generator=generator)
        sampling_a = uniform(FINEST, COARSEST) * SAMPLING_A
        angle = uniform(-np.pi, np.pi)
        half = size_px * sampling_a / (self.images.shape[-1] * self.sampling_a)
        reach = USABLE - half * (angle.cos().abs() + angle.sin().abs())
        centre = uniform(-1, 1, 2) * reach[:, None]
        flip = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
        return self.view(index, size_px, sampling_a, angle, flip, centre)

    def central_views(self, size_px: int, indices: Any = None) -> Tensor:
        """The centre of each image at 6.2 pm per pixel: what networks are scored on."""
        index = torch.arange(len(self)) if indices is None else torch.as_tensor(indices)
        n = len(index)
        return self.view(
            index, size_px, torch.full((n,), SAMPLING_A), torch.zeros(n), torch.ones(n), torch.zeros(n, 2)
        )

    def columns(self, index: int, size_px: int) -> Columns:
        """Columns that show in the central view (size_px, size_px) of an image.

        Shards of an earlier version do not have them; their atomic model is built anew.
        """
        parameters = self.parameters[index]
        if parameters["seed"] not in self._columns:
            self._columns[parameters["seed"]] = _rebuilt_columns(parameters)
        found = self._columns[parameters["seed"]]
        scale = self.sampling_a / SAMPLING_A
        image_px = self.images.shape[-1]
        positions = np.stack([found["x"], found["y"]], axis=1).astype(float)
        positions = (positions - (image_px - 1) / 2) * scale + (size_px - 1) / 2
        seen = ((positions >= -0.5) & (positions < size_px - 0.5)).all(axis=1)
        found = found[seen]
        return Columns(
            positions=positions[seen],
            element=np.array(chemical_symbols)[found["element"]],
            on_particle=found["particle"],
        )


def _rebuilt_columns(parameters: dict[str, Any]) -> np.ndarray:
    from train.imaging import in_pixels  # abTEM takes seconds to import, and training does without

    substance: Any = material(parameters.get("material", shards.EARLIER_SETTINGS["material"]))
    names = substance.Specimen.__dataclass_fields__
    specimen = substance.Specimen(**{name: parameters[name] for name in names if name in parameters})
    return in_pixels(projected_columns(substance.build(specimen)), substance.CELL_A)


def specimens(parameters: Iterable[Mapping[str, Any]]) -> set[tuple[str, int]]:
    """Material and seed of every specimen that images with these `parameters` show."""
    return {(one.get("material", shards.EARLIER_SETTINGS["material"]), one["seed"]) for one in parameters}


def range_of(found: set[tuple[str, int]]) -> dict[str, Any]:
    """What a file says of `specimens`: first and last seed, and the materials; {} of none."""
    if not found:
        return {}
    seeds = [seed for _, seed in found]
    return {"seeds": [min(seeds), max(seeds)], "materials": sorted({name for name, _ in found})}


def refuse_known(what: str, known: Mapping[str, Any], tests: Set[tuple[str, int]]) -> None:
    """Raise ValueError if one of the specimens `tests` lies in the `known` range, which `what` was made from."""
    first, last = known.get("seeds", (0, -1))
    for name, seed in sorted(tests):
        if name in known.get("materials", ()) and first <= seed <= last:
            raise ValueError(
                f"{what} specimens {first}-{last} of {name}, and the test images show specimen {seed}: "
                "test on others, made by train.simulate with another --first-seed"
            )


def refuse_made_from(what: str, made: Mapping[str, Any], tests: Set[tuple[str, int]]) -> None:
    """Raise ValueError if one of the specimens `tests` made the network `what`, of which `made` tells.

    It was trained on it, or chosen by it, or its teacher was, or the weights that it began from.
    """
    every = [made]
    for training in every:
        refuse_known(f"{what} was trained on", training, tests)
        refuse_known(f"{what} was validated on", training.get("validated_on", {}), tests)
        every += [training[key] for key in ("began_from", "taught_by") if key in training]


def group_of(parameters: Mapping[str, Any], key: str) -> float | str:
    """Which group of `key` an image with these `parameters` belongs to."""
    if key == "tilt":
        value: Any = float(np.hypot(parameters["tilt_x_deg"], parameters["tilt_y_deg"]))
    elif key in parameters:
        value = parameters[key]
    else:
        raise ValueError(
            f"the images do not know their {key}, only {', '.join(sorted(parameters))}; "
            "simulate them again with: python -m train.simulate"
        )
    step = STEPS.get(key)
    return str(value) if step is None else step * round(value / step)
