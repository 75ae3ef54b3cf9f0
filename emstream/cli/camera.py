"""The simulated camera."""

from __future__ import annotations

import logging
from typing import Annotated, Any

import typer

from emstream.cli.options import Dose, Height, Json, Rate, Seed, Width
from emstream.cli.report import print_report
from emstream.signals import stop_on_signals


def camera(
    output: Annotated[
        str | None,
        typer.Option(help="Endpoint to send on. [default: tcp://127.0.0.1:5555; dectris: port 31001]"),
    ] = None,
    protocol: Annotated[
        str, typer.Option(help="native, or dectris: a DECTRIS detector's Stream V2.")
    ] = "native",
    rate: Rate = 40.0,
    dose: Dose = 0.45,
    height: Height = 512,
    width: Width = 512,
    seed: Seed = 0,
    frames: Annotated[int | None, typer.Option(help="Stop after this many frames. [default: Ctrl-C]")] = None,
    push: Annotated[bool, typer.Option("--push", help="Lossless (PUSH), for pull+tcp:// inputs.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Start with the first subscriber.")] = False,
    gap: Annotated[float, typer.Option(help="Fault: probability that a frame is never sent.")] = 0.0,
    reorder: Annotated[float, typer.Option(help="Fault: probability that a frame is sent late.")] = 0.0,
    corrupt: Annotated[float, typer.Option(help="Fault: probability that a message is damaged.")] = 0.0,
    resize_every: Annotated[int, typer.Option(help="Fault: frames between changes of size.")] = 0,
    stall_every: Annotated[int, typer.Option(help="Fault: frames between pauses.")] = 0,
    stall_s: Annotated[float, typer.Option(help="Length of a pause [s].")] = 2.0,
    type: Annotated[
        str | None, typer.Option(help="dectris: uint8, uint16 or uint32. [default: uint16]")
    ] = None,
    compression: Annotated[
        str | None, typer.Option(help="dectris: bslz4, lz4 or none. [default: bslz4]")
    ] = None,
    thresholds: Annotated[
        int | None, typer.Option(help="dectris: channels of an image. [default: 1]")
    ] = None,
    dead: Annotated[int | None, typer.Option(help="dectris: bad pixels. [default: 0]")] = None,
    series_frames: Annotated[
        int | None, typer.Option(help="dectris: images of a series. [default: all]")
    ] = None,
    patterns: Annotated[
        int | None, typer.Option(help="dectris: images made beforehand and sent in turn, for high rates.")
    ] = None,
    no_end: Annotated[bool, typer.Option("--no-end", help="Fault, dectris: series never end.")] = False,
    as_json: Json = False,
) -> None:
    """A simulated camera: a moving specimen, fresh Poisson noise, exact pacing.

    Example: **emstream camera --output tcp://127.0.0.1:5555 --rate 40 --dose 0.45 --frames 400**
    """
    import threading

    from emstream.camera import CameraSettings, Faults, run_camera
    from emstream.camera.dectris import DectrisSettings, run_dectris

    common: dict[str, Any] = {
        "output": output, "rate": rate, "dose": dose, "height": height, "width": width, "seed": seed,
        "frames": frames, "push": push, "wait": wait,
        "faults": Faults(
            gap=gap, reorder=reorder, corrupt=corrupt, resize_every=resize_every,
            stall_every=stall_every, stall_s=stall_s,
        ),
    }  # fmt: skip
    detector: dict[str, Any] = {
        "type": type, "compression": compression, "thresholds": thresholds, "dead": dead,
        "series_frames": series_frames, "patterns": patterns, "end": False if no_end else None,
    }  # fmt: skip
    common, detector = (
        {name: value for name, value in each.items() if value is not None} for each in (common, detector)
    )
    if protocol not in ("native", "dectris"):
        raise ValueError(f"protocol must be native or dectris, got {protocol!r}")
    if protocol == "native" and detector:
        words = ", ".join("--no-end" if name == "end" else f"--{name.replace('_', '-')}" for name in detector)
        raise ValueError(f"{words}: only with --protocol dectris")
    stop = threading.Event()
    log = logging.getLogger("emstream.camera")

    def ready(endpoint: str) -> None:
        log.info("camera on %s", endpoint)

    with stop_on_signals(stop.set):
        if protocol == "dectris":
            report = run_dectris(DectrisSettings(**common, **detector), stop, on_ready=ready)
        else:
            report = run_camera(CameraSettings(**common), stop, on_ready=ready)
    print_report(report, as_json)
