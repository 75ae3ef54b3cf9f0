"""The paper's tables beside ours: ``python -m train.tables runs engines --test data/test --out bench/results``.

Every network found in the folders (best.pt of a run, .pt2 of an engine) is scored on images
it has not seen and stands beside the published one with the same field of view and, within
1 %, as many parameters; of several the one with the best validation PSNR, or PSNR on its card.
Where there is none, the table says so. Runs on one group of images alone are for --generalisation.
A number means little without what was spent on it, so steps, time and hardware stand in the same
row, and a blur of the same images shows what takes no training at all.

    table (a)    TEM images, Poisson noise, 0.45 electrons per pixel
    table (b)    photographs, Gaussian noise (`train.photographs`)

    --generalisation KEY NAME=NETWORK ...   networks trained on images with one NAME of KEY (shape,
                                            defect, contrast ...), each tested on every other;
                                            without folders this matrix is all there is
    --baselines TUNED.json                  blur as wide as `python -m train.baselines` found best

Published figures are in train/published.toml. Networks run in PyTorch, float32.
"""

from __future__ import annotations

import argparse
import sys
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from bench import report
from train import baselines, networks, photographs, plots
from train.command import explained, writable_folder
from train.dataset import Images, group_of, specimens
from train.evaluate import (
    NOISE_SEED,
    TITLES,
    Denoiser,
    grouped,
    score_view,
    summary,
    write_csv,
)
from train.metrics import VIEW_PX, Spread
from train.networks import Trained
from train.noise import PAPER_DOSE

PUBLISHED = Path(__file__).with_name("published.toml")
SAME_PARAMETERS = 0.01  # with biases or without is the same network here
SIGMAS = tuple(f"{sigma:.0f}" for sigma in photographs.TEST_SIGMAS)
ALL = "all"
BLUR_PX = 7.3  # about the best for columns of this size at 0.45 electrons per pixel


def published() -> dict[str, Any]:
    return tomllib.loads(PUBLISHED.read_text())


def find(folders: Iterable[Path]) -> list[Path]:
    """Networks in folders: best.pt of runs, .pt2 of engines."""
    paths = []
    for folder in folders:
        found = [*folder.rglob("best.pt"), *folder.glob("*.pt2")] if folder.is_dir() else [folder]
        if not found:
            raise ValueError(f"no best.pt and no .pt2 in {folder}")
        paths += sorted(found)
    return paths


def same_network(row: Mapping[str, Any], trained: Trained) -> bool:
    """Whether the published network of `row` is `trained`'s."""
    parameters = row["parameters"]
    return (
        abs(trained.parameters - parameters) <= SAME_PARAMETERS * parameters
        and trained.field_of_view_px == row["field_of_view_px"]
    )


def task_of(trained: Trained) -> str:
    return trained.recipe.get("task", "tem")


def place(
    rows: Sequence[Mapping[str, Any]], trained: Sequence[Trained]
) -> list[tuple[dict[str, Any], Trained | None]]:
    """Published rows, each with its network or None, and the networks that were not published, by field of view."""
    placed: list[tuple[dict[str, Any], Trained | None]] = []
    left = list(trained)
    for row in rows:
        fitting = [one for one in left if same_network(row, one)]
        best = max(fitting, key=lambda one: one.rank_db, default=None)
        placed.append((dict(row), best))
        left = [one for one in left if one not in fitting]
    for one in left:
        counts = {key: getattr(one, key) for key in ("parameters", "field_of_view_px", "macs_per_pixel")}
        placed.append(({"model": one.name, **counts}, one))
    return sorted(placed, key=lambda pair: (pair[0]["field_of_view_px"], pair[0]["parameters"]))


def score_tem(denoisers: Mapping[str, Denoiser], images: Images, every: int) -> list[dict[str, Any]]:
    """Every image's PSNR and SSIM at 0.45 electrons per pixel, as rows of `train.evaluate`."""
    generator = torch.Generator().manual_seed(NOISE_SEED)
    rows = []
    for index in tqdm(range(0, len(images), every), unit="image", desc=", ".join(denoisers), mininterval=5):
        view = images.central_views(VIEW_PX, [index])[0, 0].numpy()
        rows += score_view(denoisers, view, PAPER_DOSE, index, generator)
    return rows


def score_photographs(denoise: Denoiser) -> dict[str, dict[str, float]]:
    """PSNR and SSIM of a denoiser of images in [0, 1], by the noise's standard deviation."""
    return photographs.evaluate(lambda noisy: 255 * denoise(noisy / 255))


def budget(trained: Trained | None) -> dict[str, Any]:
    """Which network, and what was spent on it."""
    if trained is None:
        return dict.fromkeys(("name", "network", "steps", "hours", "hardware", "trained"))
    hours = None if trained.hours is None else round(trained.hours, 4)
    return {
        "name": trained.name, "network": str(trained.path), "steps": trained.steps, "hours": hours,
        "hardware": trained.hardware, "trained": trained.trained,
    }  # fmt: skip


def blur(tuned: Sequence[baselines.Tuned] = ()) -> tuple[str, Denoiser]:
    """A Gaussian blur and its name, as wide as `tuned` says for 0.45 electrons per pixel."""
    width_px = BLUR_PX
    for one in tuned:
        if (one.baseline, one.dose) == ("gaussian", PAPER_DOSE):
            width_px = one.parameters["width_px"]
    return f"Gaussian blur, {width_px:g} px", partial(baselines.gaussian, width_px=width_px)


def table_a(
    trained: Sequence[Trained], images: Images, every: int = 1, tuned: Sequence[baselines.Tuned] = ()
) -> list[dict[str, Any]]:
    """Table (a): a blur and one entry per row, ours None where nothing was trained."""
    model, denoise = blur(tuned)
    row = {"model": model, **dict.fromkeys(("parameters", "field_of_view_px", "macs_per_pixel"))}
    entries = [row | {"ours": summary(score_tem({model: denoise}, images, every))} | budget(None)]
    for row, one in place(published()["tem"], [t for t in trained if task_of(t) == "tem"]):
        ours = summary(score_tem({one.name: one.denoise}, images, every)) if one else None
        entries.append(row | {"ours": ours} | budget(one))
    return entries


def table_b(trained: Sequence[Trained]) -> list[dict[str, Any]]:
    """Table (b): one entry per row, ours None where nothing was trained."""
    entries = []
    for row, one in place(published()["photographs"], [t for t in trained if task_of(t) == "photographs"]):
        entries.append(row | {"ours": score_photographs(one.denoise) if one else None} | budget(one))
    return entries


def generalisation(
    denoisers: Mapping[str, Denoiser], images: Images, key: str, every: int = 1
) -> dict[str, dict[str, Spread]]:
    """PSNR of networks trained on one group of `key` each, on every group and on all: {trained on: {tested on}}."""
    rows = score_tem(denoisers, images, every)
    matrix = {}
    for name in denoisers:
        own = [row for row in rows if row["denoiser"] == name]
        groups = {str(group): spread for group, spread in grouped(own, images, key).items()}
        matrix[name] = groups | {ALL: Spread.of(row["psnr_db"] for row in own)}
    return matrix


# -- as Markdown -----------------------------------------------------------------------


def remarks_a(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Sentences on what in table (a) is otherwise than it should be."""
    ours = [entry for entry in entries if entry["ours"]]
    sentences = []
    for better, worse in permutations([entry for entry in ours if "psnr_db" in entry], 2):
        here = better["ours"]["psnr_db"], worse["ours"]["psnr_db"]
        if better["psnr_db"] > worse["psnr_db"] and here[0] < here[1]:
            sentences.append(
                f"In the paper {better['model']} is above {worse['model']}, here it is below, {here[0]:.2f} after "
                f"{_steps(better)} and {here[1]:.2f} dB after {_steps(worse)}."
            )
    floor = next((entry for entry in ours if entry["field_of_view_px"] is None), None)
    if floor:
        below = [e["model"] for e in ours if e["ours"]["psnr_db"] < floor["ours"]["psnr_db"]]
        if below:
            sentences.append(
                f"Not trained long enough, below a Gaussian blur of the same images: {', '.join(below)}."
            )
    return sentences


def _steps(entry: Mapping[str, Any]) -> str:
    return "unknown steps" if entry["steps"] is None else f"{entry['steps']:,} steps"


def markdown_a(entries: Sequence[Mapping[str, Any]]) -> str:
    columns = [
        "model", "parameters", "field of view [px]", "multiplications/pixel", "PSNR [dB], paper", "ours", "difference",
        "SSIM, paper", "ours", "steps", "time", "hardware",
    ]  # fmt: skip
    rows = []
    for entry in entries:
        ours = entry["ours"]
        rows.append(
            [
                entry["model"], entry["parameters"], entry["field_of_view_px"], entry["macs_per_pixel"],
                _spread(entry, "psnr", 2), _spread(ours, "psnr", 2) if ours else "not trained",
                _difference(entry.get("psnr_db"), ours and ours["psnr_db"]),
                _spread(entry, "ssim", 2), _spread(ours, "ssim", 3) if ours else "-", *_spent(entry),
            ]
        )  # fmt: skip
    return "\n\n".join([report.table(columns, rows) + _notes(entries), *remarks_a(entries)])


def markdown_b(entries: Sequence[Mapping[str, Any]]) -> str:
    columns = ["model", "parameters", "field of view [px]"]
    for sigma in SIGMAS:
        columns += [f"PSNR [dB] at {sigma}, paper", "ours", "difference"]
    for sigma in SIGMAS:
        columns += [f"SSIM at {sigma}, paper", "ours"]
    rows = []
    for entry in entries:
        ours = entry["ours"] or {}
        theirs = {
            sigma: {
                key: entry[key][sigma] for key in ("psnr_db", "psnr_sd", "ssim", "ssim_sd") if key in entry
            }
            for sigma in SIGMAS
        }
        row: list[Any] = [entry["model"], entry["parameters"], entry["field_of_view_px"]]
        for sigma in SIGMAS:
            here = ours.get(sigma)
            difference = _difference(theirs[sigma].get("psnr_db"), here and here["psnr_db"])
            row += [
                _spread(theirs[sigma], "psnr", 2), _spread(here, "psnr", 2) if here else "not trained", difference
            ]  # fmt: skip
        for sigma in SIGMAS:
            here = ours.get(sigma)
            row += [_spread(theirs[sigma], "ssim", 2), _spread(here, "ssim", 3) if here else "-"]
        rows.append([*row, *_spent(entry)])
    return report.table([*columns, "steps", "time", "hardware"], rows) + _notes(entries)


def markdown_generalisation(
    matrix: Mapping[str, Mapping[str, Spread]], key: str, steps: Mapping[str, int | None]
) -> str:
    """A row for each network, with the `steps` it was trained for."""
    tested_on = list(dict.fromkeys(group for groups in matrix.values() for group in groups))
    theirs = published()["generalisation"].get(key, {})
    columns = ["trained on", "steps", *tested_on, *([f"paper, on {theirs['tested_on']}"] if theirs else [])]
    rows = [
        [
            name,
            "-" if steps.get(name) is None else f"{steps[name]:,}",
            *(_beside_diagonal(matrix, name, group) for group in tested_on),
            *([f"{theirs[name]:.2f}" if name in theirs else "-"] if theirs else []),
        ]
        for name, groups in matrix.items()
    ]
    caption = "In brackets: the difference from the network that was trained on the images of that column."
    return f"{report.table(columns, rows)}\n\n{caption}"


def _beside_diagonal(matrix: Mapping[str, Mapping[str, Spread]], name: str, group: str) -> str:
    here, own = matrix[name].get(group), matrix.get(group, {}).get(group)
    if here is None:
        return "-"
    return here.text(2) + (f" ({here.mean - own.mean:+.2f})" if own and name != group else "")


def _spread(entry: Mapping[str, Any], key: str, digits: int) -> str:
    mean = entry.get("psnr_db" if key == "psnr" else key)
    return "-" if mean is None else f"{mean:.{digits}f} +- {entry[f'{key}_sd']:.{digits}f}"


def _difference(theirs: float | None, ours: float | None) -> str:
    return "-" if theirs is None or ours is None else f"{ours - theirs:+.2f}"


def _spent(entry: Mapping[str, Any]) -> list[str]:
    steps, hours = entry["steps"], entry["hours"]
    time = "-" if hours is None else f"{60 * hours:.1f} min" if hours < 0.1 else f"{hours:.2f} h"
    return ["-" if steps is None else f"{steps:,}", time, entry["hardware"] or "-"]


def _notes(entries: Sequence[Mapping[str, Any]]) -> str:
    """What is known in words alone."""
    notes = [f"- {entry['network']}: {entry['trained']}." for entry in entries if entry["trained"]]
    return "\n\n" + "\n".join(notes) if notes else ""


# -- the command -----------------------------------------------------------------------


@explained
def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        prog="python -m train.tables",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folders", type=Path, nargs="*", help="of runs and engines, or files")
    parser.add_argument("--test", type=Path, required=True, help="made by train.simulate, of unseen seeds")
    parser.add_argument("--every", type=int, default=1, help="use every n-th image")
    parser.add_argument("--baselines", type=Path, metavar="TUNED.json", help="from train.baselines")
    parser.add_argument("--device", default="cpu", help="cuda: on a GPU")
    parser.add_argument(
        "--generalisation", nargs="+", action="append", default=[], metavar=("KEY", "NAME=NETWORK")
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    arguments = parser.parse_args(argv)
    for key, *pairs in arguments.generalisation:
        if key not in TITLES or not pairs or not all("=" in pair for pair in pairs):
            parser.error(f"--generalisation takes one of {', '.join(TITLES)} and NAME=NETWORK pairs")
    if arguments.every < 1:
        parser.error(f"--every must be at least 1, got {arguments.every}")
    images = Images(arguments.test)
    for key, *_ in arguments.generalisation:
        group_of(images.parameters[0], key)
    tuned = baselines.read(arguments.baselines, specimens(images.parameters)) if arguments.baselines else ()
    trained = [networks.load(path, arguments.device) for path in find(arguments.folders)]
    trained = [one for one in trained if not one.recipe.get("only")]
    members = {
        key: {
            name: networks.load(Path(path), arguments.device)
            for name, path in (pair.split("=", 1) for pair in pairs)
        }
        for key, *pairs in arguments.generalisation
    }
    for one in (*trained, *(one for named in members.values() for one in named.values())):
        if task_of(one) == "tem":
            one.refuse_seen(images.parameters)
    writable_folder(arguments.out)

    first, second = [], []
    if trained or not arguments.generalisation:
        first = table_a(trained, images, arguments.every, tuned)
        second = table_b(trained)
    matrices = {
        key: generalisation({name: one.denoise for name, one in named.items()}, images, key, arguments.every)
        for key, named in members.items()
    }
    steps = {key: {name: one.steps for name, one in named.items()} for key, named in members.items()}
    results = report.stamp("tables", argv) | {
        "test": str(arguments.test),
        "images": len(range(0, len(images), arguments.every)),
        "source": published()["source"],
        "tem": first,
        "photographs": second,
        "generalisation": {
            key: {
                name: {group: vars(spread) for group, spread in groups.items()}
                for name, groups in matrix.items()
            }
            for key, matrix in matrices.items()
        },
        "generalisation_steps": steps,
    }
    results["command"] = results["command"].replace("-m bench.", "-m train.", 1)
    write(results, matrices, arguments.out)


def write(results: dict[str, Any], matrices: Mapping[str, Any], folder: Path) -> None:
    """Markdown, CSV and plots."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    if results["tem"]:
        parts += [
            f"## (a) TEM images at {PAPER_DOSE} electrons per pixel",
            markdown_a(results["tem"]),
            f"{results['images']} images of {results['test']}; the paper is {results['source']}, on its own images.",
            "## (b) Photographs with Gaussian noise [grey levels of 255]",
            markdown_b(results["photographs"]),
        ]
    for key, matrix in matrices.items():
        parts += [
            f"## Generalisation: {TITLES[key]}, mean PSNR [dB]",
            markdown_generalisation(matrix, key, results["generalisation_steps"][key]),
        ]
        tested_on = list(dict.fromkeys(group for groups in matrix.values() for group in groups))
        values = [
            [groups[g].mean if g in groups else np.nan for g in tested_on] for groups in matrix.values()
        ]
        plots.matrix(
            np.array(values), list(matrix), tested_on, TITLES[key], folder / f"generalisation-{key}.png"
        )
        cells = [
            {"trained_on": name, "tested_on": group, **vars(spread)}
            for name, groups in matrix.items()
            for group, spread in groups.items()
        ]
        write_csv(folder / f"generalisation-{key}.csv", cells)
    body = "\n\n".join(parts)
    report.save("tables", "The paper's tables and ours", results, body, folder)
    print(body)
    if not results["tem"]:
        return
    write_csv(folder / "table-a.csv", [_flat(entry) for entry in results["tem"]])
    write_csv(folder / "table-b.csv", [_flat(entry) for entry in results["photographs"]])
    theirs = [dict(entry, name=entry["model"]) for entry in results["tem"] if "psnr_db" in entry]
    ours = [
        {"name": entry["name"], "field_of_view_px": entry["field_of_view_px"], **entry["ours"]}
        for entry in results["tem"]
        if entry["ours"] and entry["field_of_view_px"] is not None
    ]
    series = {"here": ours} if ours else {}
    plots.psnr_against_field_of_view(series | {"paper": theirs}, folder / "psnr-against-field-of-view.png")


def _flat(entry: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as columns: ours_psnr_db, psnr_db_30 ..."""
    flat: dict[str, Any] = {}
    for key, value in entry.items():
        flat |= _flat(value, f"{prefix}{key}_") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


if __name__ == "__main__":
    main()
