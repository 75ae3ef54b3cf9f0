"""The whole chain from nothing: ``python -m train.reproduce --small`` on two cores, within half an hour.

Simulates, tunes the baselines, trains every row of both tables for the same time, scores
everything on specimens it has not seen, and draws every figure. Each step is one command
that you could type; it is printed, logged in OUT/logs, and left out when it is done
already: run the same command again after a kill.

    --small    a few dozen specimens and about a minute for each network: shows that all of it
               works, and the order of the rows as far as a minute can
    --full     about a thousand specimens, 20,000 images and the recipes' own budgets, on a GPU
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

HERE = Path(__file__).parent
TEM_ROWS = ("durr", "unet32", "wide64", "unet64", "dncnn", "unet128", "unet128-six")
PHOTOGRAPH_ROWS = ("photographs-two", "photographs-four", "photographs-six")
EXPLAINED = "wide64"


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
    """For each network; None leaves the recipe's own budget."""
    tuning_views: int
    every: int
    """Score every n-th test image."""
    device: str


SMALL = Scale(
    specimens=64,
    images_each=8,
    held_out=8,
    recipes="cpu",
    minutes_each=1.1,
    tuning_views=1,
    every=4,
    device="cpu",
)
FULL = Scale(
    specimens=960, images_each=21, held_out=64, recipes="gpu", minutes_each=None, tuning_views=12, every=1,
    device="cuda",
)  # fmt: skip


@dataclass(frozen=True)
class Step:
    """One command, and the file that is there once it has been done."""

    name: str
    command: list[str]
    done: Path


def steps(out: Path, scale: Scale) -> Iterator[Step]:
    """Everything, in order."""
    data, runs, tables = out / "data", out / "runs", out / "tables"

    def python(module: str, *arguments: object) -> list[str]:
        return [sys.executable, "-m", f"train.{module}", *map(str, arguments)]

    for name, specimens, each, seed in (
        ("train", scale.specimens, scale.images_each, 0),
        ("val", scale.held_out, 2, 100_000),
        ("test", scale.held_out, 4, 200_000),
    ):
        command = python(
            "simulate", data / name, "--specimens", specimens, "--images-each", each, "--first-seed", seed
        )
        if scale.device == "cuda":
            command += ["--device", "gpu"]
        yield Step(f"simulate-{name}", command, out / "done" / f"simulate-{name}")
    sheet = data / "preview.png"
    yield Step("preview", python("simulate", data / "train", "--preview", sheet), sheet)
    tuned = out / "tuned.json"
    yield Step(
        "baselines",
        python("baselines", data / "val", "--views", scale.tuning_views, "--out", tuned),
        out / "done" / "baselines",
    )
    rows = (*TEM_ROWS, *PHOTOGRAPH_ROWS)
    for row in rows:
        command = python("fit", recipe(row, out, scale), runs / row)
        if scale.minutes_each is not None:
            command += ["--hours", str(round(scale.minutes_each / 60, 4)), "--no-compile"]
        yield Step(f"fit-{row}", command, out / "done" / f"fit-{row}")
    networks = [runs / row / "best.pt" for row in rows]
    yield Step(
        "tables",
        python(
            "tables",
            *networks,
            "--test",
            data / "test",
            "--every",
            scale.every,
            "--device",
            scale.device,
            "--out",
            tables,
        ),
        out / "done" / "tables",
    )
    best = [runs / row / "best.pt" for row in ("unet32", EXPLAINED)]
    yield Step(
        "evaluate",
        python(
            "evaluate",
            *best,
            data / "test",
            "--every",
            scale.every,
            "--baselines",
            tuned,
            "--by",
            "thickness_nm",
            "tilt",
            "defocus_nm",
            "defect",
            "contrast",
            "--surface",
            "--speed",
            "--out",
            out / "evaluation",
        ),
        out / "done" / "evaluate",
    )
    yield Step(
        "explain",
        python("explain", runs / EXPLAINED / "best.pt", data / "test", "--out", out / "explained"),
        out / "done" / "explain",
    )


def recipe(row: str, out: Path, scale: Scale) -> Path:
    """The row's recipe with this run's data in place of data/train and data/val, written into OUT/recipes."""
    text = (HERE / "recipes" / f"{row}-{scale.recipes}.toml").read_text()
    for name in ("train", "val"):
        text = text.replace(f'"data/{name}"', f'"{(out / "data" / name).as_posix()}"')
    path = out / "recipes" / f"{row}.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def run(step: Step, logs: Path) -> None:
    """Run one step; its output goes to LOGS/NAME.log. Raises SystemExit with the end of that when it fails."""
    logs.mkdir(parents=True, exist_ok=True)
    path = logs / f"{step.name}.log"
    with path.open("a") as log:
        log.write(f"$ {shlex.join(step.command)}\n")
        log.flush()
        code = subprocess.run(step.command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        end = "\n".join(path.read_text().replace("\r", "\n").splitlines()[-12:])
        raise SystemExit(f"{step.name} failed with exit code {code}; {path} ends:\n{end}")
    step.done.parent.mkdir(parents=True, exist_ok=True)
    step.done.touch()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--small", action="store_const", dest="scale", const=SMALL)
    which.add_argument("--full", action="store_const", dest="scale", const=FULL)
    parser.add_argument("--out", type=Path, help="default: runs/small or runs/full")
    arguments = parser.parse_args()
    scale: Scale = arguments.scale
    out: Path = arguments.out or Path("runs", "small" if scale is SMALL else "full")
    begin = time.monotonic()
    todo = [step for step in steps(out, scale) if not step.done.exists()]
    for step in tqdm(todo, unit="step"):
        tqdm.write(f"{shlex.join(step.command)}")
        run(step, out / "logs")
    print(f"{len(todo)} steps in {(time.monotonic() - begin) / 60:.1f} min; look into {out}")


if __name__ == "__main__":
    main()
