"""One shard of a data set: the images of a few specimens in an HDF5 file, with everything that decided them.

    images        (N, 512, 512) float16    noiseless, 1 in vacuum, row 0 at the top
    parameters    (N,) text                JSON: material, specimen, optics, contrast class
    columns/SEED  (M,) `COLUMN`            where the specimen's columns show, x and y [px] of the image
    attributes    sampling_a [A/pixel]; settings, JSON: what was asked for, and the versions that did it;
                  sha256 of the images, parameters and columns

A shard is written under another name and renamed when whole. Shards of earlier versions have
neither settings nor columns nor a checksum; they are read all the same.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

EARLIER_SETTINGS = {"material": "pt_ceo2", "defects": "paper", "defocus_nm": [0, 20]}


class ShardError(RuntimeError):
    """A shard on disk is not what was written."""


@dataclass(kw_only=True)
class Shard:
    """What one file holds."""

    images: np.ndarray
    parameters: list[str]
    sampling_a: float
    settings: dict[str, Any]
    columns: dict[int, np.ndarray] = field(default_factory=dict)
    """Of each specimen, by its seed; empty in shards of earlier versions."""
    sha256: str | None = None

    def digest(self) -> str:
        sha = hashlib.sha256(np.ascontiguousarray(self.images).data)
        sha.update("\n".join(self.parameters).encode())
        for seed in sorted(self.columns):
            sha.update(self.columns[seed].tobytes())
        return sha.hexdigest()


def write(path: Path, shard: Shard) -> str:
    """Write a shard, whole or not at all; returns its checksum."""
    partial, digest = path.with_suffix(".partial"), shard.digest()
    with h5py.File(partial, "w") as file:
        file["images"] = shard.images
        file["parameters"] = shard.parameters
        for seed, columns in shard.columns.items():
            file[f"columns/{seed}"] = columns
        file.attrs["sampling_a"] = shard.sampling_a
        file.attrs["settings"] = json.dumps(shard.settings)
        file.attrs["sha256"] = digest
    partial.replace(path)
    return digest


def shape(path: Path) -> tuple[int, int, int]:
    """Shape of a shard's images, without reading them."""
    with _open(path) as file:
        return file["images"].shape


def settings(path: Path) -> dict[str, Any]:
    """What was asked for when a shard was made, `seeds` and `images_each` among it, without its images."""
    with _open(path) as file:
        return _settings(file)


def parameters(path: Path) -> list[str]:
    """Parameters of every image, without the images."""
    with _open(path) as file:
        return list(file["parameters"].asstr())


def read(path: Path, images: np.ndarray | None = None) -> Shard:
    """Read a shard, into `images` (N, H, W) if given, and compare its checksum if it has one."""
    with _open(path) as file:
        if images is None:
            images = np.empty(file["images"].shape, file["images"].dtype)
        try:
            file["images"].read_direct(images)
            shard = Shard(
                images=images,
                parameters=list(file["parameters"].asstr()),
                columns={int(seed): file[f"columns/{seed}"][:] for seed in file.get("columns", ())},
                sampling_a=float(file.attrs["sampling_a"]),
                settings=_settings(file),
                sha256=file.attrs.get("sha256"),
            )
        except OSError as error:
            raise ShardError(f"{path} cannot be read ({error}); {_REMEDY}") from error
    if shard.sha256 is not None and (found := shard.digest()) != shard.sha256:
        raise ShardError(
            f"{path} has changed since it was written: its checksum is {found} and was {shard.sha256}; {_REMEDY}"
        )
    return shard


_REMEDY = "delete it and run the command of train.simulate again, which makes this shard alone anew"


def _open(path: Path) -> h5py.File:
    try:
        return h5py.File(path)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ShardError(f"{path} is no whole HDF5 file ({error}); {_REMEDY}") from error


def _settings(file: h5py.File) -> dict[str, Any]:
    if "settings" in file.attrs:
        return json.loads(file.attrs["settings"])
    every = [json.loads(text)["seed"] for text in file["parameters"].asstr()]
    seeds = list(dict.fromkeys(every))
    return EARLIER_SETTINGS | {"seeds": seeds, "images_each": len(every) // len(seeds)}
