"""Looking on at a running service: its page, and its figures in a terminal."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Annotated

import typer

from emstream.cli.options import Json, Key, ServiceKey, ViewHost, ViewPort, ViewToken
from emstream.cli.report import print_report
from emstream.signals import stop_on_signals


def view(
    input: Annotated[str, typer.Option(help="What emstream serve publishes on.")] = "tcp://127.0.0.1:5556",
    host: ViewHost = "127.0.0.1",
    port: ViewPort = 8080,
    token: ViewToken = None,
    key: Key = None,
    service_key: ServiceKey = None,
    as_json: Json = False,
) -> None:
    """The live page of a running service, until Ctrl-C: raw beside denoised.

    Example: **emstream view --input tcp://127.0.0.1:5556 --port 8080**
    """
    import threading

    from emstream.keys import Peer
    from emstream.view import ViewServer

    page, stop = ViewServer(input, host, port, token, peer=Peer.of(key, service_key)), threading.Event()
    with stop_on_signals(stop.set):
        page.start()
        try:
            typer.echo(f"live page: {page.url}   (Ctrl-C ends it)", err=True)
            while not stop.wait(0.5):
                pass
        finally:
            page.stop()
    print_report(page.report(), as_json)


def status(
    input: Annotated[str, typer.Option(help="What emstream serve publishes on.")] = "tcp://127.0.0.1:5556",
    key: Key = None,
    service_key: ServiceKey = None,
    as_json: Json = False,
) -> None:
    """The figures of a running service in a terminal, until Ctrl-C; with --json once.

    Example: **emstream status --input tcp://127.0.0.1:5556**
    """
    from rich.live import Live

    from emstream.keys import Peer
    from emstream.status import panel, status_once, statuses

    peer = Peer.of(key, service_key)
    if as_json:
        typer.echo(json.dumps(status_once(input, peer=peer)))
        return
    with suppress(KeyboardInterrupt), Live(auto_refresh=False) as display:
        for each in statuses(input, peer=peer):
            display.update(panel(each), refresh=True)
