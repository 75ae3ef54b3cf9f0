"""The whole chain from nothing: ``python -m train.reproduce --small`` on two cores, within half an hour.

Simulates, tunes the baselines, trains every row of both tables for the same time, scores
everything on specimens it has not seen, and draws every figure. Each step is one command
that you could type; it is printed, logged in OUT/logs, and left out when it is done
already: run the same command again after a kill.

    --small       a few dozen specimens and well under a minute for each network: shows that all
                  of it works, not how good any of it gets
    --full        about a thousand specimens, 20,000 images and the recipes' own budgets, on a GPU
    --minutes M   for each network, instead
    --specimens N to train on, instead
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

HERE = Path(__file__).parent
TEM_ROWS = (
    "durr", "unet32-two", "unet32", "unet32-six", "wide64", "dncnn", "unet64", "unet128", "unet128-six",
)  # fmt: skip
PHOTOGRAPH_ROWS = ("photographs-two", "photographs-four", "photographs-six")
EXPLAINED = "wide64"
# Rows of each generalisation matrix, which UNet-32 is trained for, and the images it takes.
GROUPS = {
    "shape": ("data", ("PtNp1", "PtNp2", "PtNp3", "PtNp4")),
    "contrast": ("either", ("black", "white")),
}
EITHER_DEFOCUS_NM = (-20, 20)  # columns are dark in half of the images, bright in most of the others


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
    held_out=16,
    recipes="cpu",
    minutes_each=0.6,
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
    data, runs, tuned = out / "data", out / "runs", out / "tuned.json"

    def step(name: str, module: str, *arguments: object) -> Step:
        command = [sys.executable, "-m", f"train.{module}", *map(str, arguments)]
        return Step(name, command, out / "done" / name)

    on = ("--device", "gpu") if scale.device == "cuda" else ()
    for folder, defocus, share in (("data", (), 1), ("either", ("--defocus", *EITHER_DEFOCUS_NM), 2)):
        for name, specimens, each, seed in (
            ("train", scale.specimens // share, scale.images_each, 0),
            ("val", scale.held_out, 2, 100_000),
            ("test", scale.held_out, 4, 200_000),
        ):
            many = "--specimens", specimens, "--images-each", each, "--first-seed", seed
            where = out / folder / name
            yield step(f"simulate-{folder}-{name}", "simulate", where, *many, *defocus, *on)
    yield step("preview", "simulate", data / "train", "--preview", out / "preview.png")
    yield step("baselines", "baselines", data / "val", "--views", scale.tuning_views, "--out", tuned)

    short = ()
    if scale.minutes_each is not None:
        short = "--hours", round(scale.minutes_each / 60, 4), "--no-compile"
    rows = (*TEM_ROWS, *PHOTOGRAPH_ROWS)
    for row in rows:
        yield step(f"fit-{row}", "fit", recipe(row, out, scale), runs / row, *short)
    matrices = {}
    for key, (folder, groups) in GROUPS.items():
        pairs = []
        for group in groups:
            path = recipe("unet32", out, scale, folder, {key: group})
            yield step(f"fit-{group}", "fit", path, runs / group, *short)
            pairs.append(f"{group}={runs / group / 'best.pt'}")
        matrices[folder] = ("--generalisation", key, *pairs)

    def best(*names: str) -> list[Path]:
        return [runs / name / "best.pt" for name in names]

    common = ("--every", scale.every, "--device", scale.device)
    yield step(
        "tables", "tables", *best(*rows), "--test", data / "test", *common, *matrices["data"],
        "--out", out / "tables",
    )  # fmt: skip
    yield step(
        "contrast", "tables", "--test", out / "either" / "test", *common, *matrices["either"],
        "--out", out / "contrast",
    )  # fmt: skip
    yield step(
        "evaluate", "evaluate", *best("unet32", EXPLAINED), data / "test", "--every", scale.every,
        "--baselines", tuned, "--by", "thickness_nm", "tilt", "defocus_nm", "defect",
        "--surface", "--speed", "--out", out / "evaluation",
    )  # fmt: skip
    yield step("explain", "explain", *best(EXPLAINED), data / "test", "--out", out / "explained")


def recipe(
    row: str, out: Path, scale: Scale, folder: str = "data", only: dict[str, str] | None = None
) -> Path:
    """The row's recipe with images of OUT/FOLDER in place of data, perhaps `only` a group; into OUT/recipes."""
    text = (HERE / "recipes" / f"{row}-{scale.recipes}.toml").read_text()
    for name in ("train", "val"):
        text = text.replace(f'"data/{name}"', f'"{(out / folder / name).as_posix()}"')
    for key, group in (only or {}).items():
        text += f'only = {{ {key} = "{group}" }}\n'
        row = group
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
    parser.add_argument("--minutes", type=float, help="to train each network")
    parser.add_argument("--specimens", type=int, help="to train on")
    parser.add_argument("--out", type=Path, help="default: runs/small or runs/full")
    arguments = parser.parse_args()
    scale: Scale = arguments.scale
    out: Path = arguments.out or Path("runs", "small" if scale is SMALL else "full")
    if arguments.minutes is not None:
        scale = replace(scale, minutes_each=arguments.minutes)
    if arguments.specimens is not None:
        scale = replace(scale, specimens=arguments.specimens)
    begin = time.monotonic()
    todo = [step for step in steps(out, scale) if not step.done.exists()]
    for step in tqdm(todo, unit="step"):
        tqdm.write(f"{shlex.join(step.command)}")
        run(step, out / "logs")
    print(f"{len(todo)} steps in {(time.monotonic() - begin) / 60:.1f} min; look into {out}")


if __name__ == "__main__":
    main()
