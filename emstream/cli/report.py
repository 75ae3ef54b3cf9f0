"""Reports: JSON for scripts, a table for people."""

from __future__ import annotations

import json
from typing import Any

import typer

from emstream.printable import printable, printable_lines


def print_report(report: dict[str, Any], as_json: bool) -> None:
    """On stdout."""
    if as_json:
        typer.echo(json.dumps(report, default=str))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    table = Table(show_header=False, box=None)
    table.add_column()
    table.add_column(overflow="fold")  # paths and commands are there to be copied
    for name, value in report.items():
        if isinstance(value, dict):
            value = "  ".join(
                f"{key} {text_of(each)}" for key, each in value.items() if not isinstance(each, dict)
            )
        if isinstance(value, list) and value and all(isinstance(each, dict) for each in value):
            value = "\n".join(
                "  ".join(f"{key} {text_of(item)}" for key, item in each.items()) for each in value
            )
        table.add_row(Text(printable(name)), Text(printable_lines(text_of(value))))
    console.print(table)


def text_of(value: Any) -> str:
    """As people read it: numbers to five digits, - for nothing."""
    return "-" if value is None or value == () else f"{value:.5g}" if isinstance(value, float) else str(value)
