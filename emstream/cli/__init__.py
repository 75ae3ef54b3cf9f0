"""The commands. Each imports what it needs when it runs, so that ``--help`` is instant.

Exit codes: 0 done, 1 failed at run time, 2 wrong use.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Annotated

import typer

from emstream.cli import build, camera, config, demo, denoise, engine, keys, record, serve, view
from emstream.cli.errors import Command, Group, says_where_from
from emstream.errors import ConfigError
from emstream.printable import log_to_stderr

app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    context_settings={"auto_envvar_prefix": "EMSTREAM"},
    help="Denoise electron-microscope frames while the specimen is in the beam.",
)


@app.callback()
def _setup(
    context: typer.Context,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.toml", help="Options of the commands: a table for each, a key for each option."
        ),
    ] = None,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log every rejected frame.")] = False,
    log_json: Annotated[bool, typer.Option("--log-json", help="Log one JSON object a line.")] = False,
) -> None:
    log_to_stderr(logging.DEBUG if verbose else logging.INFO, as_json=log_json)
    if version:
        import emstream

        typer.echo(emstream.__version__)
        raise typer.Exit
    from emstream.config import misspelt, read

    for problem in misspelt(os.environ, context.command):
        logging.getLogger(__name__).warning("%s", problem)
    if config is not None:
        tables, problems = read(config, context.command.commands)  # type: ignore[attr-defined]
        context.default_map = dict(tables)
        context.obj = problems
        if problems and context.invoked_subcommand != "config":  # which shows what is right, too
            with says_where_from(context):
                raise ConfigError("; ".join(problems))


for _command in (
    demo.demo,
    serve.serve,
    keys.keygen,
    record.record,
    camera.camera,
    view.view,
    view.status,
    denoise.denoise,
    build.build,
    build.export,
    build.info,
):
    app.command(cls=Command)(_command)
app.add_typer(config.app, name="config")
app.add_typer(engine.app, name="engine")


def main() -> None:
    """The ``emstream`` command."""
    app()
