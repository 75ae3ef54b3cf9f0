"""The engine of a running service."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from emstream.cli.errors import Command, Group
from emstream.cli.options import Json, Key, ServiceAddress, ServiceKey
from emstream.cli.report import print_report

app = typer.Typer(cls=Group, no_args_is_help=True, help="The engine of a running service.")


@app.command(cls=Command)
def swap(
    engine: Annotated[str, typer.Argument(metavar="NEW", help="Model file, where the service runs.")],
    service: ServiceAddress = "tcp://127.0.0.1:5556",
    timeout_s: Annotated[float, typer.Option(help="Longest to wait for the answer.")] = 300.0,
    key: Key = None,
    service_key: ServiceKey = None,
    as_json: Json = False,
) -> None:
    """Another engine: loaded and tested beside the running one, then it takes the next batch. No frame is lost.

    Example: **emstream engine swap engines/unet32.onnx**
    """
    from emstream.control import ask, control_of
    from emstream.keys import Peer

    path = engine
    with suppress(OSError):  # a name that is too long: the service says so
        if Path(engine).is_file():
            path = str(Path(engine).absolute())
    peer = Peer.of(key, service_key)
    answer = ask(control_of(service, peer=peer), {"do": "swap", "engine": path}, timeout_s, peer)
    print_report(answer, as_json)


@app.command(cls=Command)
def back(
    service: ServiceAddress = "tcp://127.0.0.1:5556",
    timeout_s: Annotated[float, typer.Option(help="Longest to wait for the answer.")] = 30.0,
    key: Key = None,
    service_key: ServiceKey = None,
    as_json: Json = False,
) -> None:
    """The engine of before the last swap, which stayed ready.

    Example: **emstream engine back**
    """
    from emstream.control import ask, control_of
    from emstream.keys import Peer

    peer = Peer.of(key, service_key)
    print_report(ask(control_of(service, peer=peer), {"do": "swap-back"}, timeout_s, peer), as_json)
