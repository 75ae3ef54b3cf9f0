"""The configuration."""

from __future__ import annotations

import json
import os
from typing import Annotated

import typer

from emstream.cli.errors import Command, Group, says_where_from
from emstream.cli.options import Json
from emstream.cli.report import print_report, text_of
from emstream.cli.serve import check_other_processes, settings_of
from emstream.errors import ConfigError

app = typer.Typer(cls=Group, no_args_is_help=True, help="The configuration.")


@app.command(cls=Command)
def check(
    context: typer.Context,
    command: Annotated[str, typer.Argument(metavar="[COMMAND]", help="Whose options.")] = "serve",
    as_json: Json = False,
) -> None:
    """Every option of a command that is in force, and where it comes from: file, environment or default.

    Example: **emstream --config /etc/emstream.toml config check**
    """
    from emstream.config import in_force, misspelt
    from emstream.serve import look_over

    root = context.find_root()
    if problems := misspelt(os.environ, root.command):
        raise ConfigError("; ".join(problems))
    commands = root.command.commands  # type: ignore[attr-defined]
    commands = {name: each for name, each in commands.items() if not hasattr(each, "commands")}
    if command not in commands:
        hint = f"; a file goes before: --config {command} config check" if command.endswith(".toml") else ""
        raise ValueError(f"there is no command {command!r}; there are {', '.join(commands)}{hint}")
    made = commands[command].make_context(command, [], parent=root)
    options = in_force(made, root.params.get("config"))
    if command == "serve":
        with says_where_from(made):
            settings = settings_of(**made.params)
            others = ("record", "look_back", "split", "view_port")
            check_other_processes(**{name: made.params[name] for name in others})
            look_over(settings)
    report = {each.option: {"value": each.value, "from": each.source} for each in options}
    if as_json:
        typer.echo(json.dumps(report, default=str))
        return
    print_report({each.option: f"{text_of(each.value)}   ({each.source})" for each in options}, False)
