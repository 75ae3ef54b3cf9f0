"""Score engines on specimens the network has not seen: ``python -m train.evaluate ENGINE data/test``.

PSNR and SSIM with a peak of 1 electron, as in the paper (`train.metrics`). At doses other
than 0.45 electrons/pixel estimates are first brought to 0.45, so that the figures compare.

    --baselines TUNED.json   score these, too; from `python -m train.baselines data/val`
    --by KEY ...             PSNR per thickness_nm, tilt, defocus_nm, defect, shape, contrast
    --surface                precision, recall, F1 and Jaccard of the surface's columns; a second or
                             two per picture
    --speed                  time per frame of everything scored, measured in turns in one run
    --out DIR                tables (Markdown, CSV), every image's figures (images.csv) and plots

Without --out it prints a line of JSON for each dose.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from bench import report
from emstream import load_engine
from train import baselines, networks, plots
from train.command import explained, writable_folder
from train.dataset import Images, group_of, refuse_made_from, specimens
from train.metrics import VIEW_PX, Spread, psnr_ssim
from train.noise import PAPER_DOSE, expose
from train.surface import Surface

NOISE_SEED = 11
SPEED_TURNS = 7
Denoiser = Callable[[np.ndarray], np.ndarray]
Row = dict[str, Any]
"""One estimate: denoiser, dose, image, psnr_db, ssim and, if asked for, the surface's figures."""

NOISY = "noisy"
CLEAN = "noiseless"
READABLE_F1 = 0.8  # below, the detector cannot read the noiseless picture either, and would be what is scored
SURFACE_KEYS = ("precision", "recall", "f1", "jaccard")
TITLES = {
    "thickness_nm": "thickness [nm], rounded to 1",
    "tilt": "total tilt [degrees], rounded to 1",
    "defocus_nm": "defocus [nm], rounded to 5",
    "defect": "surface defect",
    "shape": "particle shape",
    "contrast": "contrast of the columns",
}


def evaluate(denoisers: dict[str, Denoiser], views: Iterable[np.ndarray], dose: float) -> dict[str, Any]:
    """Score `denoisers` on noisy `views` (H, W; 1 in vacuum): {name: {psnr_db, psnr_sd, ssim, ssim_sd}}."""
    generator = torch.Generator().manual_seed(NOISE_SEED)
    rows = [row for n, view in enumerate(views) for row in score_view(denoisers, view, dose, n, generator)]
    return {name: summary([row for row in rows if row["denoiser"] == name]) for name in denoisers}


def score_view(
    denoisers: Mapping[str, Denoiser],
    view: np.ndarray,
    dose: float,
    image: int,
    generator: torch.Generator,
    true: Surface | None = None,
) -> list[Row]:
    """Score `denoisers` on one exposure of `view` (H, W; 1 in vacuum), and its surface against the `true` one."""
    counts = expose(torch.from_numpy(view)[None, None], torch.tensor([dose]), generator)[0, 0].numpy()
    rows = []
    for name, denoise in denoisers.items():
        estimate = denoise(counts) * (PAPER_DOSE / dose)
        psnr, ssim = psnr_ssim(estimate, PAPER_DOSE * view)
        rows.append({"denoiser": name, "dose": dose, "image": image, "psnr_db": psnr, "ssim": ssim})
        if true is not None and name != NOISY:
            rows[-1] |= _surface(estimate, true)
    return rows


def _surface(estimate: np.ndarray, true: Surface) -> Row:
    columns = true.columns(estimate)
    score, chance = true.score_columns(columns), true.chance(len(columns))
    counts = {"matched": score.matched, "found": score.found, "true": score.true, "chance_f1": chance.f1}
    return {key: getattr(score, key) for key in SURFACE_KEYS} | counts


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Means and standard deviations over images."""
    psnr, ssim = (Spread.of(row[key] for row in rows) for key in ("psnr_db", "ssim"))
    result = {
        "psnr_db": round(psnr.mean, 2), "psnr_sd": round(psnr.sd, 2),
        "ssim": round(ssim.mean, 3), "ssim_sd": round(ssim.sd, 3),
        "images": psnr.images,
    }  # fmt: skip
    return result | surface_summary(rows)


def surface_summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Means and standard deviations of the surface's figures over the images that have them."""
    rows = [row for row in rows if "f1" in row]
    if not rows:
        return {}
    spreads = {key: Spread.of(row[key] for row in rows) for key in (*SURFACE_KEYS, "chance_f1")}
    means = {key: round(spread.mean, 3) for key, spread in spreads.items()}
    return means | {f"{key}_sd": round(spread.sd, 3) for key, spread in spreads.items()}


def grouped(rows: Sequence[Row], images: Images, key: str) -> dict[float | str, Spread]:
    """PSNR of `rows` in each group of `key`."""
    groups: dict[float | str, list[float]] = {}
    for row in rows:
        groups.setdefault(group_of(images.parameters[row["image"]], key), []).append(row["psnr_db"])
    return {group: Spread.of(groups[group]) for group in sorted(groups)}


def measure_ms(
    denoisers: Mapping[str, Denoiser], counts: np.ndarray, turns: int = SPEED_TURNS
) -> dict[str, float]:
    """Median time per frame `counts` (H, W) [ms].

    Everything takes turns, so that what else the machine does meets all alike; before each
    timed frame there is an untimed one, so that threads and caches are awake.
    """
    times: dict[str, list[float]] = {name: [] for name in denoisers}
    for _ in range(turns):
        for name, denoise in denoisers.items():
            denoise(counts)
            start_ns = time.perf_counter_ns()
            denoise(counts)
            times[name].append((time.perf_counter_ns() - start_ns) / 1e6)
    return {name: round(median(values), 2) for name, values in times.items()}


# -- the command -----------------------------------------------------------------------


@explained
def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else list(argv)
    arguments = _parse(argv)
    stamp = report.stamp("evaluate", argv)  # the load average is to be that of others
    images = Images(arguments.test)
    tuned = baselines.read(arguments.baselines, specimens(images.parameters)) if arguments.baselines else []
    for key in arguments.by:
        group_of(images.parameters[0], key)
    if missing := sorted(set(arguments.doses) - {one.dose for one in tuned}) if tuned else []:
        raise ValueError(f"{arguments.baselines} holds nothing tuned at {missing} electrons/pixel")
    engines = _load_engines(arguments.engines, arguments.device)
    for name, engine in engines.items():
        if isinstance(engine, _Checkpoint):
            engine.trained.refuse_seen(images.parameters)
        elif engine.card is not None and engine.card.training:
            refuse_made_from(name, engine.card.training, specimens(images.parameters))
    if arguments.out:
        writable_folder(arguments.out)
    indices = range(0, len(images), arguments.every)

    rows: list[Row] = []
    truths, surfaces = _surfaces(images, indices) if arguments.surface else ({}, [])
    for dose in arguments.doses:
        denoisers = _denoisers(engines, tuned, dose)
        generator = torch.Generator().manual_seed(NOISE_SEED)
        for index in tqdm(indices, unit="image", desc=f"{dose} e/px", mininterval=5):
            view = images.central_views(VIEW_PX, [index])[0, 0].numpy()
            rows += score_view(denoisers, view, dose, index, generator, truths.get(index))
        if not arguments.out:
            print(json.dumps(_line(rows, dose, engines)))
    if not arguments.out:
        return

    clean = surfaces
    surfaces = [row for row in rows if "f1" in row] + clean
    speeds = {}
    if arguments.speed:
        generator = torch.Generator().manual_seed(NOISE_SEED)
        dose = arguments.doses[0]
        frame = expose(images.central_views(VIEW_PX, [0]), torch.tensor([dose]), generator)[0, 0]
        denoisers = {name: d for name, d in _denoisers(engines, tuned, dose).items() if name not in (NOISY,)}
        speeds = measure_ms(denoisers, frame.numpy().astype(np.uint8))
    results = stamp | {
        "test": str(arguments.test),
        "images": len(indices),
        "view_px": VIEW_PX,
        "images_with_surface": len(truths),
        "engines": {name: engine.identity for name, engine in engines.items()},
        "baselines": [vars(one) for one in tuned if one.dose in arguments.doses],
        "scores": [
            {"denoiser": name, "dose": dose, **summary(_of(rows, name, dose))} for name, dose in _kinds(rows)
        ],
        "surface": [
            {"denoiser": name, "dose": dose, **surface_summary(_of(surfaces, name, dose))}
            for name, dose in _kinds(surfaces)
        ],
        "by": {
            key: [
                {"denoiser": name, "dose": dose, "group": group, **vars(spread)}
                for name, dose in _kinds(rows)
                for group, spread in grouped(_of(rows, name, dose), images, key).items()
            ]
            for key in arguments.by
        },
        "ms_per_frame": speeds,
        "macs_per_pixel": _macs(arguments.engines, engines),
    }
    results["command"] = results["command"].replace("-m bench.", "-m train.", 1)
    write(results, rows + clean, arguments.out)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m train.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "engines", type=Path, nargs="+", metavar="ENGINE", help=".onnx, .pt2, .plan or a best.pt"
    )
    parser.add_argument("test", type=Path, help="a directory made by train.simulate, of unseen seeds")
    parser.add_argument("--doses", type=float, nargs="+", default=[PAPER_DOSE], help="[electrons/pixel]")
    parser.add_argument("--every", type=int, default=1, help="use every n-th image")
    parser.add_argument("--baselines", type=Path, metavar="TUNED.json")
    parser.add_argument("--by", nargs="+", choices=list(TITLES), default=[])
    parser.add_argument("--surface", action="store_true")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--device", default="cpu", help="cuda: runs' networks on a GPU")
    parser.add_argument("--out", type=Path, metavar="DIR")
    arguments = parser.parse_args(argv)
    if (arguments.by or arguments.speed) and not arguments.out:
        parser.error("--by and --speed need --out DIR")
    if arguments.every < 1:
        parser.error(f"--every must be at least 1, got {arguments.every}")
    if not all(dose > 0 for dose in arguments.doses):
        parser.error(f"doses must be positive [electrons/pixel], got {arguments.doses}")
    return arguments


class _Checkpoint:
    """A run's network as an engine: PyTorch, float32."""

    def __init__(self, path: Path, device: str) -> None:
        self.trained = networks.load(path, device)
        self.name, self.denoise = self.trained.name, self.trained.denoise
        processor = torch.cuda.get_device_name() if device.startswith("cuda") else "CPU"
        self.device = f"{processor}, f32, PyTorch {torch.__version__.split('+')[0]}"
        self.identity = {"name": self.name, "checkpoint": str(path), "device": self.device}


def _load_engines(paths: Sequence[Path], device: str) -> dict[str, Any]:
    """Engines by a name of their own: where that is taken, their file's ending is in it, or it is the whole path."""
    if twice := [path for n, path in enumerate(paths) if path in paths[:n]]:
        raise ValueError(f"{twice[0]} is named twice; name it once")
    engines = [_Checkpoint(path, device) if path.suffix == ".pt" else load_engine(path) for path in paths]
    names = [engine.name for engine in engines]
    for longer in (lambda name, path: f"{name}{path.suffix}", lambda _, path: str(path)):
        taken = [NOISY, CLEAN, *baselines.BASELINES, *names]
        names = [
            longer(name, path) if taken.count(name) > 1 else name
            for name, path in zip(names, paths, strict=True)
        ]
    return dict(zip(names, engines, strict=True))


def _denoisers(
    engines: Mapping[str, Any], tuned: Sequence[baselines.Tuned], dose: float
) -> dict[str, Denoiser]:
    """The noisy frame itself, the baselines tuned at `dose`, the engines."""
    return (
        {NOISY: lambda counts: counts}
        | {one.baseline: one.denoise for one in tuned if one.dose == dose}
        | {name: engine.denoise for name, engine in engines.items()}
    )


def _surfaces(images: Images, indices: Iterable[int]) -> tuple[dict[int, Surface], list[Row]]:
    """The true surface of every image whose noiseless picture the detector can read, and the score of that."""
    surfaces, rows = {}, []
    for index in tqdm(indices, unit="image", desc="true columns", mininterval=5):
        view = PAPER_DOSE * images.central_views(VIEW_PX, [index])[0, 0].numpy()
        true = Surface.of(images, index, view)
        row = _surface(view, true)
        if row["true"] and row["f1"] >= READABLE_F1:
            surfaces[index] = true
            rows.append({"denoiser": CLEAN, "dose": None, "image": index, **row})
    return surfaces, rows


def _macs(paths: Sequence[Path], engines: Mapping[str, Any]) -> dict[str, int]:
    """Multiplications per pixel of the engines whose PyTorch network is at hand."""
    macs = {}
    for path, name in zip(paths, engines, strict=True):
        if path.suffix in (".pt", ".pt2") or path.with_suffix(".pt2").exists():
            macs[name] = networks.load(
                path if path.suffix != ".plan" else path.with_suffix(".pt2")
            ).macs_per_pixel
    return macs


def _line(rows: Sequence[Row], dose: float, engines: Mapping[str, Any]) -> dict[str, Any]:
    identities = [engine.identity for engine in engines.values()]
    who = {"engine": identities[0]} if len(identities) == 1 else {"engines": identities}
    kinds = [name for name, d in _kinds(rows) if d == dose]
    return {"dose": dose, **who, **{name: summary(_of(rows, name, dose)) for name in kinds}}


def _kinds(rows: Sequence[Row]) -> list[tuple[str, float]]:
    """(denoiser, dose) in the order of their first row."""
    return list(dict.fromkeys((row["denoiser"], row["dose"]) for row in rows))


def _of(rows: Sequence[Row], denoiser: str, dose: float) -> list[Row]:
    return [row for row in rows if (row["denoiser"], row["dose"]) == (denoiser, dose)]


# -- what it writes --------------------------------------------------------------------


def write(results: dict[str, Any], rows: Sequence[Row], folder: Path) -> None:
    """Tables, every image's figures and plots."""
    folder.mkdir(parents=True, exist_ok=True)
    body = markdown(results)
    report.save("evaluate", "Evaluation", results, body, folder)
    print(body)
    write_csv(folder / "images.csv", rows)
    write_csv(folder / "scores.csv", results["scores"])
    scores = results["scores"]
    doses = list(dict.fromkeys(entry["dose"] for entry in scores))
    names = list(dict.fromkeys(entry["denoiser"] for entry in scores if entry["denoiser"] != NOISY))
    if results["surface"]:
        write_csv(folder / "surface.csv", results["surface"])
    if len(doses) > 1:
        against = {
            label(name): {entry["dose"]: _psnr(entry) for entry in scores if entry["denoiser"] == name}
            for name in names
        }
        plots.psnr_against_dose(against, folder / "psnr-against-dose.png")
    for dose in doses if results["by"] else ():
        panels: dict[str, dict[str, dict[Any, Spread]]] = {}
        for key, entries in results["by"].items():
            write_csv(folder / f"by-{key}.csv", entries)
            panels[TITLES[key]] = {
                label(name): {
                    entry["group"]: Spread(entry["mean"], entry["sd"], entry["images"])
                    for entry in entries
                    if (entry["denoiser"], entry["dose"]) == (name, dose)
                }
                for name in names
            }
        plots.psnr_by(panels, folder / f"psnr-by-{dose:g}.png")
    if results["ms_per_frame"]:
        points = [
            {
                "name": label(entry["denoiser"]),
                "psnr_db": entry["psnr_db"],
                "ms": results["ms_per_frame"][entry["denoiser"]],
                "macs_per_pixel": results["macs_per_pixel"].get(entry["denoiser"]),
            }
            for entry in scores
            if entry["dose"] == doses[0] and entry["denoiser"] != NOISY
        ]
        plots.quality_against_speed(points, results["view_px"], folder / "quality-against-speed.png")


def _psnr(entry: Mapping[str, Any]) -> Spread:
    return Spread(entry["psnr_db"], entry["psnr_sd"], entry["images"])


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """One line per row; columns are all keys that any row has."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def markdown(results: Mapping[str, Any]) -> str:
    """All tables."""
    scores = results["scores"]
    doses = list(dict.fromkeys(entry["dose"] for entry in scores))
    names = list(dict.fromkeys(entry["denoiser"] for entry in scores))
    find = {(entry["denoiser"], entry["dose"]): entry for entry in scores}
    columns = ["", *(f"{dose:g} e/px" for dose in doses)]

    def cells(name: str, key: str, sd: str, digits: int) -> list[str]:
        return [f"{find[name, d][key]:.{digits}f} +- {find[name, d][sd]:.{digits}f}" for d in doses]

    parts = [
        f"{results['images']} images of {results['test']}, {results['view_px']} x {results['view_px']} px; "
        "mean +- standard deviation over images, peak 1 electron, brought to 0.45 electrons per pixel.",
        "## PSNR [dB]",
        report.table(columns, [[label(name), *cells(name, "psnr_db", "psnr_sd", 2)] for name in names]),
        "## SSIM",
        report.table(columns, [[label(name), *cells(name, "ssim", "ssim_sd", 3)] for name in names]),
    ]
    if results["surface"]:
        rows = [
            [
                label(entry["denoiser"]),
                "-" if entry["dose"] is None else f"{entry['dose']:g}",
                *(f"{entry[key]:.3f} +- {entry[f'{key}_sd']:.3f}" for key in (*SURFACE_KEYS, "chance_f1")),
            ]
            for entry in results["surface"]
            if "f1" in entry
        ]
        parts += [
            "## Columns on the surface",
            report.table(["", "dose [e/px]", "precision", "recall", "F1", "Jaccard", "F1 by chance"], rows),
            f"{results['images_with_surface']} of {results['images']} images: those in whose noiseless picture the "
            f"detector finds the surface with an F1 of {READABLE_F1} or more. The row *{CLEAN}* is the best it can do; "
            "by chance is what as many columns at random places would score.",
        ]
    for key, entries in results["by"].items():
        for dose in doses:
            here = [entry for entry in entries if entry["dose"] == dose]
            groups = list(dict.fromkeys(entry["group"] for entry in here))
            groups.sort(key=lambda group: (isinstance(group, str), group))
            found = {(entry["denoiser"], entry["group"]): entry for entry in here}
            images = {group: next(e["images"] for e in here if e["group"] == group) for group in groups}
            rows = [[label(name), *(_cell(found[name, g]) for g in groups)] for name in names]
            parts += [
                f"## PSNR [dB] by {TITLES[key]}, at {dose:g} e/px",
                report.table(["", *(f"{_text(g)} ({images[g]})" for g in groups)], rows),
            ]
    if results["by"]:
        parts.append("In brackets: images.")
    if results["ms_per_frame"]:
        rows = [
            [
                name,
                results["ms_per_frame"][name],
                results["macs_per_pixel"].get(name),
                find[name, doses[0]]["psnr_db"],
            ]
            for name in names
            if name != NOISY
        ]
        parts += [
            "## Quality and speed",
            report.table(
                ["", "median [ms/frame]", "multiplications/pixel", f"PSNR [dB] at {doses[0]:g} e/px"],
                [[label(name), f"{ms:.1f}", macs, f"{psnr:.2f}"] for name, ms, macs, psnr in rows],
            ),
            f"Frames of {results['view_px']} x {results['view_px']} uint8, one at a time, {SPEED_TURNS} turns.",
        ]
        load, cores = (results["hardware"][key] for key in ("load_average", "cores"))
        if load > cores:
            parts.append(
                f"**These times are too long:** other work kept the machine busy, with a load average of {load:.1f} on "
                f"{cores} cores at the start. Only their ratios mean something."
            )
    if results["baselines"]:
        rows = [
            [
                f"{one['dose']:g}", label(one["baseline"]), baselines.BASELINES[one["baseline"]].library,
                ", ".join(f"{key} {value}" for key, value in one["parameters"].items()),
                ", ".join(one["at_edge"]) or "-",
            ]
            for one in results["baselines"]
        ]  # fmt: skip
        parts += [
            "## What the baselines were tuned to, on validation images",
            report.table(
                ["dose [e/px]", "baseline", "library", "parameters", "at the edge of the grid"], rows
            ),
            f"Tuned on {_numbers(one['views'] for one in results['baselines'])} views.",
        ]
    return "\n\n".join(parts)


def label(denoiser: str) -> str:
    """Its name for people."""
    known = baselines.BASELINES.get(denoiser)
    return known.label if known else denoiser


def _cell(entry: Mapping[str, Any]) -> str:
    return Spread(entry["mean"], entry["sd"], entry["images"]).text(2)


def _numbers(values: Iterable[int]) -> str:
    return " or ".join(map(str, sorted(set(values))))


def _text(group: float | str) -> str:
    return group if isinstance(group, str) else f"{group:g}"


if __name__ == "__main__":
    main()
