"""Camera, service and live page in one go."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Annotated

import typer

from emstream.cli.options import Device, Dose, EnginePath, Frames, Height, Json, Rate, Seed, ViewPort, Width
from emstream.cli.report import print_report


def demo(
    frames: Frames = None,
    rate: Rate = 10.0,
    dose: Dose = 0.45,
    height: Height = 512,
    width: Width = 512,
    seed: Seed = 0,
    engine: EnginePath = None,
    device: Device = "auto",
    output: Annotated[str, typer.Option(help="Publish here, too.")] = "tcp://127.0.0.1:*",
    headless: Annotated[bool, typer.Option("--headless", help="No live page.")] = False,
    view_port: ViewPort = 8080,
    as_json: Json = False,
) -> None:
    """Simulated camera, service and live page in one go.

    Example: **emstream demo --frames 100 --rate 5 --headless --json**
    """
    from emstream.demo import DemoSettings, run_demo

    if not headless and find_spec("uvicorn") is None:
        typer.echo("no live page without: pip install 'emstream[view]'", err=True)
        headless = True
    settings = DemoSettings(
        rate=rate, dose=dose, height=height, width=width, seed=seed, frames=frames, engine=engine,
        device=device, output=output, view=None if headless else ("127.0.0.1", view_port),
    )  # fmt: skip

    def ready(url: str | None) -> None:
        if url:
            typer.echo(f"live page: {url}   (Ctrl-C ends the demo)", err=True)

    print_report(run_demo(settings, on_ready=ready), as_json)
