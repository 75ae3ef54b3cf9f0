"""Files and folders of files."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import typer

from emstream.cli.options import Device, EnginePath, Gain, Json, Offset, Precision, Threads
from emstream.cli.report import print_report
from emstream.errors import EmstreamError
from emstream.printable import printable, printable_lines


def denoise(
    input: Annotated[
        Path,
        typer.Argument(
            metavar="IN", help="A frame, a movie (.npy .tif .h5 .mrc .dm4 .emd .ser ...) or a folder of them."
        ),
    ],
    output: Annotated[Path, typer.Argument(metavar="OUT", help=".npy .tif .h5 .mrc; a folder for a folder.")],
    engine: EnginePath = None,
    dataset: Annotated[str | None, typer.Option(help="Which dataset of a file that holds several.")] = None,
    suffix: Annotated[str, typer.Option(help="Of the files written into a folder.")] = ".tif",
    compare: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Raw beside denoised: a film (.mp4 .gif) or a sheet of frames (.png)."
        ),
    ] = None,
    rate: Annotated[float, typer.Option(help="Of that film [frames/s].")] = 10.0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what exists.")] = False,
    gain: Gain = 1.0,
    offset: Offset = 0.0,
    device: Device = "auto",
    precision: Precision = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Denoise a file, or a folder of files: electron counts in, expected electrons out.

    Example: **emstream denoise noisy.tif clean.tif --compare talk.mp4**
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from emstream.denoise import denoise_file, denoise_folder
    from emstream.inference import load_engine

    columns = (
        *Progress.get_default_columns()[:2],
        MofNCompleteColumn(),
        TextColumn("frames"),
        TimeRemainingColumn(),
    )
    with (
        closing(load_engine(engine, precision=precision, threads=threads, device=device)) as loaded,
        Progress(*columns, console=Console(stderr=True), transient=True) as progress,
    ):
        task = progress.add_task(escape(printable(input.name)), total=None)
        failed: dict[str, str] = {}
        options: dict[str, Any] = {
            "gain": gain,
            "offset": offset,
            "dataset": dataset,
            "overwrite": overwrite,
            "on_frame": lambda done, total: progress.update(task, completed=done, total=total),
        }
        if not input.is_dir():
            report = denoise_file(input, output, loaded, compare=compare, rate=rate, **options)
            _warn_of_the_dose(input, report)
        elif compare is not None:
            raise ValueError(f"--compare {compare} is of one movie, and {input} is a folder; leave it out")
        else:
            reports: dict[str, Any] = {}
            skipped: list[str] = []
            for path, result in denoise_folder(input, output, loaded, suffix, **options):
                if isinstance(result, EmstreamError):
                    failed[path.name] = str(result)
                    typer.echo(printable_lines(f"error: {result}"), err=True)
                elif result is None:
                    skipped.append(path.name)
                else:
                    reports[path.name] = result
                    _warn_of_the_dose(path, result)
            report = {"files": reports, "skipped": skipped, "failed": failed}
            if skipped:
                total = len(reports) + len(skipped) + len(failed)
                typer.echo(
                    f"{len(skipped)} of {total} exist in {output} already and were skipped; "
                    "--overwrite makes them again",
                    err=True,
                )
    print_report(report if as_json or "files" not in report else _in_brief(report), as_json)
    if failed:
        raise typer.Exit(1)


def _in_brief(folder: dict[str, Any]) -> dict[str, str]:
    """A line for each file."""
    lines = {
        name: f"{each['frames']} frames, {each['frames_per_s']:.3g} frames/s, {each['dose']:.3g} electrons/px, "
        f"to {each['output']}"
        for name, each in folder["files"].items()
    }
    return lines | dict.fromkeys(folder["skipped"], "skipped") | dict.fromkeys(folder["failed"], "failed")


def _warn_of_the_dose(path: Path, report: dict[str, Any]) -> None:
    if not report["in_domain"]:
        typer.echo(
            f"warning: {path}: {report['dose']:.3g} electrons/pixel is outside the engine's dose range; "
            "if these are ADU, give --gain and --offset",
            err=True,
        )
