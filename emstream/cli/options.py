"""Options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, for scripts.")]
EnginePath = Annotated[
    str | None,
    typer.Option(
        "--engine",
        metavar="PATH",
        help="Model file, or grpc://HOST:8001/MODEL on an inference server. [default: the one that ships]",
    ),
]
Rate = Annotated[float, typer.Option(help="Frames per second.")]
Dose = Annotated[float, typer.Option(help="Electrons per pixel and frame in vacuum.")]
Height = Annotated[int, typer.Option(help="Frame height [px].")]
Width = Annotated[int, typer.Option(help="Frame width [px].")]
Seed = Annotated[int, typer.Option(help="Same seed, same frames.")]
Frames = Annotated[int | None, typer.Option(help="Stop after this many published frames.")]
Gain = Annotated[float, typer.Option(help="ADU per electron, for cameras that do not count.")]
Offset = Annotated[float, typer.Option(help="ADU without any electron.")]
Precision = Annotated[str | None, typer.Option(help="bf16 or f32. [default: the fastest this CPU has]")]
Threads = Annotated[int | None, typer.Option(help="Cores for the engine. [default: all]")]
Device = Annotated[
    str, typer.Option(help="cpu, GPU numbers such as 0 or 0,1, or auto: a GPU where there is one.")
]
LookBack = Annotated[
    float, typer.Option(help="Record when told to, with what came this long before [s]. [default: at once]")
]
Split = Annotated[str | None, typer.Option(help="Begin another file at this size, e.g. 10GiB.")]
ViewHost = Annotated[str, typer.Option(help="Address the live page listens on.")]
ViewToken = Annotated[
    str | None,
    typer.Option(
        envvar="EMSTREAM_VIEW_TOKEN",
        help="What the page asks for. [default: nothing on loopback, else a new one each time]",
    ),
]
ViewPort = Annotated[int, typer.Option(help="Port of the live page; 0 picks a free one.")]


Key = Annotated[
    Path | None, typer.Option(metavar="FILE.key_secret", help="Your keys, for a service that takes keys.")
]
ServiceKey = Annotated[Path | None, typer.Option(metavar="FILE.key", help="That service's public key.")]
ServiceAddress = Annotated[
    str,
    typer.Option(metavar="URL", help="What the service publishes on; it says there where it takes orders."),
]
