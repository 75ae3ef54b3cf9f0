"""The whole chain from nothing: ``python -m train.reproduce --small`` on two cores, within half an hour.

Simulates, tunes the baselines, trains every row of both tables for the same time, scores
everything on specimens it has not seen, and draws every figure. Each step is one command
that you could type; it is printed, logged in OUT/logs, and left out when it is done
already: run the same command again after a kill. With other options, what they change runs again,
and all that follows from it; networks that were trained otherwise move to OUT/earlier.

    --small       a few dozen specimens, small crops and well under a minute for each network: shows
                  that all of it works, not how good any of it gets
    --full        about a thousand specimens, 20,000 images and the recipes' own budgets, on a GPU
    --minutes M   for each network of the tables, instead
    --steps N     for each network of the generalisation matrices, instead: they train equally long
    --specimens N to train on, instead
    --crop-px P, --batch B    for every network, instead
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from train.command import explained, writable_folder
from train.recipe import Recipe

HERE = Path(__file__).parent
TEM_ROWS = (
    "durr", "unet32-two", "unet32", "unet32-six", "wide64", "dncnn", "unet64", "unet128", "unet128-six",
)  # fmt: skip
PHOTOGRAPH_ROWS = ("photographs-two", "photographs-four", "photographs-six")
EXPLAINED = "wide64"
DOSE_ROWS, DOSES = ("durr", "unet32", EXPLAINED), (0.1, 0.2, 0.45, 1, 3, 10)  # electrons per pixel
# Rows of each generalisation matrix, which UNet-32 is trained for.
GROUPS = {"shape": ("PtNp1", "PtNp2", "PtNp3", "PtNp4"), "contrast": ("black", "white")}


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much of everything."""

    specimens: int
    images_each: int
    held_out: int
    """Specimens to validate on, and as many again to test on."""
    recipes: str
    """Which of the two recipes of a row: cpu or gpu."""
    minutes_each: float | None
    """For each network of the tables; None leaves the recipe's own budget."""
    steps_matrix: int
    """For each network of the generalisation matrices."""
    crop_px: int | None = None
    batch: int | None = None
    """For every network; None leaves the recipe's own."""
    tuning_views: int
    every: int
    """Score every n-th test image."""
    device: str


SMALL = Scale(
    specimens=64,
    images_each=8,
    held_out=16,
    recipes="cpu",
    minutes_each=0.6,
    steps_matrix=300,
    crop_px=128,
    batch=2,
    tuning_views=4,
    every=8,
    device="cpu",
)
FULL = Scale(
    specimens=960, images_each=21, held_out=64, recipes="gpu", minutes_each=None, steps_matrix=6000, tuning_views=12,
    every=1, device="cuda",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Step:
    """One command."""

    name: str
    command: list[str]
    output: Path
    """A file that is there once it has been done."""
    marker: Path
    """Says in JSON which command was run, of which recipe, and whether it came to its end."""
    needs: tuple[Step, ...] = ()
    recipe: Path | None = None
    run: Path | None = None
    """A folder that only the very same command may go on in."""

    def asks(self) -> dict[str, Any]:
        """All that decides what the step does, but for what it needs."""
        digest = hashlib.sha256(self.recipe.read_bytes()).hexdigest() if self.recipe else None
        return {"command": self.command[1:], "recipe": digest}

    def begun(self) -> dict[str, Any]:
        """The marker, or {} if it is of another command or older than what the step needs."""
        try:
            marker = json.loads(self.marker.read_text())
            if any(need.marker.stat().st_mtime_ns > self.marker.stat().st_mtime_ns for need in self.needs):
                return {}
        except (FileNotFoundError, ValueError):
            return {}
        return marker if marker | self.asks() == marker else {}

    def done(self) -> bool:
        return self.output.exists() and self.begun().get("done") is True

    def mark(self, done: bool) -> None:
        self.marker.parent.mkdir(parents=True, exist_ok=True)
        self.marker.write_text(json.dumps(self.asks() | {"done": done}, indent=2) + "\n")


def steps(out: Path, scale: Scale) -> Iterator[Step]:
    """Everything, in order."""
    data, runs, tuned = out / "data", out / "runs", out / "tuned.json"

    def step(name: str, module: str, *arguments: object, output: Path, **more: Any) -> Step:
        command = [sys.executable, "-m", f"train.{module}", *map(str, arguments)]
        return Step(name=name, command=command, output=output, marker=out / "done" / f"{name}.json", **more)

    on = ("--device", "gpu") if scale.device == "cuda" else ()
    simulated = {}
    for name, specimens, each, seed in (
        ("train", scale.specimens, scale.images_each, 0),
        ("val", scale.held_out, 2, 100_000),
        ("test", scale.held_out, 4, 200_000),
    ):
        many = "--specimens", specimens, "--images-each", each, "--first-seed", seed
        simulated[name] = step(
            f"simulate-{name}", "simulate", data / name, *many, *on,
            output=data / name / f"shard-{seed:06d}.h5",
        )  # fmt: skip
        yield simulated[name]
    sheet = out / "preview.png"
    yield step(
        "preview", "simulate", data / "train", "--preview", sheet, output=sheet, needs=(simulated["train"],)
    )
    tuning = step(
        "baselines", "baselines", data / "val", "--views", scale.tuning_views, "--out", tuned,
        output=tuned, needs=(simulated["val"],),
    )  # fmt: skip
    yield tuning

    def fit(name: str, path: Path, *budget: object) -> Step:
        return step(
            f"fit-{name}", "fit", path, runs / name, *budget, output=runs / name / "best.pt", recipe=path,
            run=runs / name, needs=(simulated["train"], simulated["val"]),
        )  # fmt: skip

    short = ()
    if scale.minutes_each is not None:
        short = "--hours", f"{scale.minutes_each / 60:.4g}", "--no-compile"
    rows = {row: fit(row, recipe(row, out, scale), *short) for row in (*TEM_ROWS, *PHOTOGRAPH_ROWS)}
    yield from rows.values()
    members, matrices = [], []
    for key, groups in GROUPS.items():
        matrices += ["--generalisation", key]
        for group in groups:
            path = recipe("unet32", out, scale, {key: group})
            members.append(fit(group, path, "--steps", scale.steps_matrix, *short[2:]))
            matrices.append(f"{group}={members[-1].output}")
    yield from members

    tem = tuple(rows[row] for row in TEM_ROWS)
    common = ("--every", scale.every, "--device", scale.device)
    yield step(
        "tables", "tables", *(row.output for row in rows.values()), "--test", data / "test", *common, *matrices,
        "--baselines", tuned, "--out", out / "tables", output=out / "tables" / "tables.md",
        needs=(simulated["test"], tuning, *rows.values(), *members),
    )  # fmt: skip
    yield step(
        "evaluate", "evaluate", *(row.output for row in tem), data / "test", *common,
        "--baselines", tuned, "--by", "thickness_nm", "tilt", "defocus_nm", "defect", "contrast",
        "--surface", "--speed", "--out", out / "evaluation", output=out / "evaluation" / "evaluate.md",
        needs=(simulated["test"], tuning, *tem),
    )  # fmt: skip
    few = tuple(rows[row] for row in DOSE_ROWS)
    yield step(
        "doses", "evaluate", *(row.output for row in few), data / "test", *common,
        "--doses", *DOSES, "--out", out / "doses", output=out / "doses" / "evaluate.md",
        needs=(simulated["test"], *few),
    )  # fmt: skip
    one = rows[EXPLAINED]
    yield step(
        "explain", "explain", one.output, data / "test", "--out", out / "explained",
        output=out / "explained" / "explain.json", needs=(simulated["test"], one),
    )  # fmt: skip


def recipe(row: str, out: Path, scale: Scale, only: dict[str, str] | None = None) -> Path:
    """The row's recipe for OUT/data and the scale's crops, perhaps for `only` a group of images; into OUT/recipes."""
    text = (HERE / "recipes" / f"{row}-{scale.recipes}.toml").read_text()
    for name in ("train", "val"):
        text = text.replace(f'"data/{name}"', f'"{(out / "data" / name).as_posix()}"')
    for key in ("crop_px", "batch"):
        if (value := getattr(scale, key)) is not None:
            text, times = re.subn(rf"(?m)^{key} = .*$", f"{key} = {value}", text)
            assert times == 1, f"{row}-{scale.recipes}.toml has {times} lines of {key}"
    for key, group in (only or {}).items():
        text += f'only = {{ {key} = "{group}" }}\n'
        row = group
    path = out / "recipes" / f"{row}.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    Recipe.read(path)  # what is wrong is told now, and not after hours
    return path


def set_aside(folder: Path, earlier: Path) -> None:
    """Move a run's `folder`, if there is one, to a new name in `earlier`."""
    if folder.exists():
        earlier.mkdir(parents=True, exist_ok=True)
        number = 1
        while (place := earlier / f"{folder.name}-{number}").exists():
            number += 1
        folder.rename(place)
        tqdm.write(f"{folder} was trained otherwise and is now {place}")


def run(step: Step, out: Path) -> None:
    """Run one step; its output goes to OUT/logs. Raises SystemExit with the end of that when it fails."""
    if step.run is not None and not step.begun():
        set_aside(step.run, out / "earlier")
    step.mark(done=False)
    path = out / "logs" / f"{step.name}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as log:
        log.write(f"$ {shlex.join(step.command)}\n")
        log.flush()
        code = subprocess.run(step.command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        end = "\n".join(path.read_text().replace("\r", "\n").splitlines()[-12:])
        raise SystemExit(f"{step.name} failed with exit code {code}; {path} ends:\n{end}")
    step.mark(done=True)


@explained
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--small", action="store_const", dest="scale", const=SMALL)
    which.add_argument("--full", action="store_const", dest="scale", const=FULL)
    parser.add_argument("--minutes", type=float, help="to train each network of the tables")
    parser.add_argument("--steps", type=int, help="to train each network of the matrices")
    parser.add_argument("--specimens", type=int, help="to train on")
    parser.add_argument("--crop-px", type=int, help="that every network trains on")
    parser.add_argument("--batch", type=int, help="of such crops")
    parser.add_argument("--out", type=Path, help="default: runs/small or runs/full")
    arguments = parser.parse_args()
    scale: Scale = arguments.scale
    out: Path = arguments.out or Path("runs", "small" if scale is SMALL else "full")
    keys = {"minutes": "minutes_each", "steps": "steps_matrix"}
    for option in ("minutes", "steps", "specimens", "crop_px", "batch"):
        key, value = keys.get(option, option), getattr(arguments, option)
        if value is not None and not value > 0:
            parser.error(f"--{option.replace('_', '-')} must be positive, got {value}")
        if value is not None:
            scale = replace(scale, **{key: value})
    writable_folder(out)
    begin, number = time.monotonic(), 0
    for step in tqdm(list(steps(out, scale)), unit="step"):
        if not step.done():
            tqdm.write(f"{shlex.join(step.command)}")
            run(step, out)
            number += 1
    print(f"{number} steps in {(time.monotonic() - begin) / 60:.1f} min; look into {out}")


if __name__ == "__main__":
    main()
