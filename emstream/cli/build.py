"""Engines for other machines: TensorRT plans and inference servers; and what an engine is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from emstream.cli.options import Device, Json
from emstream.cli.report import print_report


def build(
    model: Annotated[
        Path | None, typer.Argument(metavar="MODEL.onnx", help="An engine as train.export writes it.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="MODEL.plan, or a folder with --all.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every plan in engines/plans.toml.")] = False,
    size: Annotated[
        str | None, typer.Option(help="Frame size, rows x columns [px]. [default: 512x512]")
    ] = None,
    type: Annotated[
        str | None, typer.Option(help="Pixel type: uint8, uint16, uint32 or float32. [default: uint8]")
    ] = None,
    max_batch: Annotated[int | None, typer.Option(help="Most frames in a batch. [default: 8]")] = None,
    flavour: Annotated[
        str | None,
        typer.Option(help="tensorrt or tensorrt-rtx. [default: what is installed and can build here]"),
    ] = None,
    device: Annotated[int, typer.Option(help="The GPU to build for.")] = 0,
    as_json: Json = False,
) -> None:
    """Compile a model for TensorRT: one frame size and type, batches up to the largest.

    Example: **emstream build engines/unet32.onnx -o unet32.plan --size 512x512 --type uint8**
    """
    from emstream.inference import check_is_there
    from emstream.plans import PlanOrder, build_all, build_one, builder

    if everything == (model is not None):
        raise ValueError("give either MODEL.onnx or --all")
    options: dict[str, Any] = {"size": size, "type": type, "max_batch": max_batch}
    given = {name: value for name, value in options.items() if value is not None}
    if model is None:
        if given:
            words = ", ".join("--" + name.replace("_", "-") for name in given)
            raise ValueError(f"with --all, engines/plans.toml says what each plan is for; leave out {words}")
        if output is None or output.suffix == ".plan":
            raise ValueError(f"--all needs a folder for the plans: -o FOLDER, got {output or 'none'}")
    if model is not None:
        order = PlanOrder(model, output or Path(model.stem + ".plan"), **given)
        order.profile()
        check_is_there(model)
        chosen, gpu = builder(flavour, device)
        with _phases() as progress:
            report = build_one(order, chosen, gpu, progress)
        print_report(report, as_json)
        return
    assert output is not None
    chosen, gpu = builder(flavour, device)
    with _phases() as progress:
        reports = build_all(output, chosen, gpu, progress)
    brief = {name: next(iter(each.values())) for name, each in reports.items()}
    print_report(reports if as_json else brief, as_json)
    failed = [each for each in reports.values() if "error" in each]
    if failed or all("missing" in each for each in reports.values()):
        raise typer.Exit(1)


@contextmanager
def _phases() -> Iterator[Callable[[str, int, int], None] | None]:
    """A progress bar for each of TensorRT's phases that is under way; none where nobody sees it."""
    from rich.console import Console
    from rich.progress import Progress, TaskID

    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    tasks: dict[str, TaskID] = {}
    with Progress(console=console, transient=True) as progress:

        def step(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = progress.add_task(phase, total=total)
            progress.update(tasks[phase], completed=done, total=total)
            if done == total:
                progress.remove_task(tasks.pop(phase))

        yield step


def export(
    engine: Annotated[
        Path | None, typer.Argument(metavar="ENGINE", help=".onnx or .plan. [default: the one that ships]")
    ] = None,
    triton: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Model repository of an inference server; made if need be."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="What clients call it. [default: the network's name]")
    ] = None,
    backend: Annotated[
        str, typer.Option(help="Triton's backend for an .onnx: onnxruntime or openvino.")
    ] = "onnxruntime",
    max_batch: Annotated[
        int | None, typer.Option(help="Frames computed together at most. [default: 8, or the plan's own]")
    ] = None,
    instances: Annotated[int | None, typer.Option(help="Batches at a time on each GPU. [default: 1]")] = None,
    as_json: Json = False,
) -> None:
    """An engine for an inference server (Triton, OpenVINO Model Server), then reached as --engine grpc://...

    Example: **emstream export engines/unet32.onnx --triton models**
    """
    from emstream.inference import default_engine
    from emstream.repository import write_repository

    if triton is None:
        raise ValueError("--triton DIR says which model repository to write to")
    report = write_repository(
        default_engine() if engine is None else engine, triton,
        name=name, backend=backend, max_batch=max_batch, instances=instances,
    )  # fmt: skip
    print_report(report, as_json)


def info(
    engine: Annotated[
        str | None, typer.Argument(metavar="ENGINE", help="[default: the one that ships]")
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """What an engine is: network, training domain, precision, device; where a plan comes from.

    Example: **emstream info engines/unet32.onnx**
    """
    from dataclasses import asdict

    from emstream.inference import load_engine

    if engine is not None and engine.endswith(".plan"):
        from emstream.plans import describe

        print_report(describe(Path(engine), device), as_json)
        return
    loaded = load_engine(engine, device=device)
    card = asdict(loaded.card) if loaded.card else {}
    card.pop("spectra", None)
    print_report({**card, **loaded.identity}, as_json)
    loaded.close()
