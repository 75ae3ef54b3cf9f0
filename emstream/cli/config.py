"""The configuration."""

from __future__ import annotations

import json
import os
from typing import Annotated, Any

import typer

from emstream.cli.errors import Command, Group, said, says_where_from
from emstream.cli.options import Json
from emstream.cli.report import print_report, text_of
from emstream.cli.serve import check_other_processes, settings_of
from emstream.errors import ConfigError, EmstreamError

app = typer.Typer(cls=Group, no_args_is_help=True, help="The configuration.")


@app.command(cls=Command)
def check(
    context: typer.Context,
    command: Annotated[str, typer.Argument(metavar="[COMMAND]", help="Whose options.")] = "serve",
    as_json: Json = False,
) -> None:
    """Every option of a command that is in force, where it comes from, and what is wrong with it.

    It comes from the file, the environment or is the default. Example:
    **emstream --config /etc/emstream.toml config check**
    """
    from emstream.config import in_force, misspelt

    root = context.find_root()
    commands = root.command.commands  # type: ignore[attr-defined]
    commands = {name: each for name, each in commands.items() if not hasattr(each, "commands")}
    if command not in commands:
        hint = f"; a file goes before: --config {command} config check" if command.endswith(".toml") else ""
        raise ValueError(f"there is no command {command!r}; there are {', '.join(commands)}{hint}")
    problems = [*(root.obj or ()), *misspelt(os.environ, root.command)]
    errors: list[Exception] = [ConfigError("; ".join(problems))] if problems else []
    try:
        made = commands[command].make_context(command, [], parent=root)
        if command == "serve":
            _look_over(made)
    except typer.BadParameter as error:
        made = commands[command].make_context(command, [], parent=root, resilient_parsing=True)
        errors.append(error)
    except (EmstreamError, ValueError) as error:
        errors.append(error)
    options = in_force(made, root.params.get("config"))
    if as_json:
        report: dict[str, Any] = {each.option: {"value": each.value, "from": each.source} for each in options}
        if errors:
            report["error"] = "; ".join(map(said, errors))
        typer.echo(json.dumps(report, default=str))
    else:
        texts = (
            (each, text_of(each.value) if each.value is not None else each.stands_for) for each in options
        )
        print_report({each.option: f"{text}   ({each.source})" for each, text in texts}, False)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise ConfigError("; ".join(map(said, errors)))


def _look_over(context: typer.Context) -> None:
    """Raise what `serve` would with the options of its `context`."""
    from emstream.serve import look_over

    with says_where_from(context):
        settings = settings_of(**context.params)
        others = ("record", "look_back", "split", "view_port")
        check_other_processes(**{name: context.params[name] for name in others})
        look_over(settings)
