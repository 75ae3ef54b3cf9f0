"""Reports: JSON for scripts, a table for people."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import typer

from emstream.printable import printable, printable_lines

if TYPE_CHECKING:
    from rich.text import Text

_FILE_COLUMNS = 1000
_EMPTY: tuple[Any, ...] = ({}, [], (), "")
_UNITS = {"dose": "electrons/px", "seconds": "s"}


def print_report(report: dict[str, Any], as_json: bool) -> None:
    """On stdout."""
    if as_json:
        typer.echo(json.dumps(report, default=str))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        console = Console(width=_FILE_COLUMNS)  # lines are not broken in a file
    table = Table(show_header=False, box=None)
    table.add_column()
    table.add_column(overflow="fold")  # paths and commands are there to be copied
    for name, text in _rows(report):
        table.add_row(Text(printable(name)), text)
    console.print(table)


def _rows(report: dict[str, Any]) -> Iterator[tuple[str, Text]]:
    """What a person reads of it; the figures of a service as ``emstream status`` says them, nothing that is empty."""
    from rich.text import Text

    from emstream import figures
    from emstream.trusted import trust_of

    for name, value in report.items():
        if name == "trust":
            known = trust_of(report)
            for fault in known["faults"]:
                yield "", Text(fault, style="bold red")
            for row, line in figures.trust(known):
                yield row, Text(line)
        elif name == "stalled" or value in _EMPTY:
            continue  # what has stalled is among the faults
        elif name == "ledger":
            yield name, figures.ledger(value)
        elif name == "latency_ms":
            yield "latency", Text(figures.latency(value))
            p50_ms = {stage: each["p50"] for stage, each in value.items() if isinstance(each, dict)}
            yield "stages", Text(figures.stages(p50_ms))
        elif name == "frames_per_s":
            yield "rate", Text(f"{figures.digits(value)} frames/s")
        elif name == "engine" and isinstance(value, dict):
            yield name, Text(figures.engine(value))
        elif name == "psnr_db" and isinstance(value, dict) and value.keys() == {"noisy", "denoised"}:
            noisy, denoised = (figures.digits(value[key]) for key in ("noisy", "denoised"))
            yield (
                "truth",
                Text(f"PSNR {noisy} dB noisy, {denoised} dB denoised, against the simulated specimen"),
            )
        elif name == "rejected_because":
            yield "rejected", Text(printable_lines(text_of(value)))
        elif name == "recording":  # whose ledger and engine are the service's
            mine = {key: each for key, each in value.items() if key not in ("ledger", "engine")}
            yield name, Text(printable_lines(text_of(mine)))
        else:
            unit = f" {_UNITS[name]}" if name in _UNITS else ""
            yield name, Text(printable_lines(text_of(value)) + unit)


def text_of(value: Any) -> str:
    """As people read it: numbers to five digits, - for nothing, each map of a list on a line of its own."""
    if isinstance(value, dict):
        pairs = ((key, each[:8] if key == "sha256" else each) for key, each in value.items())
        return "  ".join(
            f"{key} ({text_of(each)})" if isinstance(each, dict) else f"{key} {text_of(each)}"
            for key, each in pairs
            if each not in _EMPTY
        )
    if isinstance(value, list) and value and not isinstance(value[0], int | float):
        return ("\n" if isinstance(value[0], dict) else "  ").join(map(text_of, value))
    return "-" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)
