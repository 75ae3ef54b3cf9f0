"""Errors as lines of text and exit codes, with where the values come from that they speak of."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from emstream.errors import EmstreamError, Stalled
from emstream.printable import logs_json, printable_lines


class Command(TyperCommand):
    """Says with an error where the values come from that it speaks of."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        with _says_what_is_refused():
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        with says_where_from(ctx):
            return super().invoke(ctx)


class Group(TyperGroup):
    """Turns our errors into a line of text and an exit code."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        with _says_what_is_refused():
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            if not logs_json():
                raise
            _say_error(error)
            raise typer.Exit(2) from None
        except EmstreamError as error:
            _say_error(error)
            if isinstance(error, Stalled):
                sys.stdout.flush()
                os._exit(1)  # a thread hangs: nothing could wait for its end
            raise typer.Exit(1) from None
        except ValueError as error:
            _say_error(error)
            if not logs_json():
                typer.echo(f"Try '{ctx.command_path} {ctx.invoked_subcommand} --help'.", err=True)
            raise typer.Exit(2) from None


@contextmanager
def _says_what_is_refused() -> Iterator[None]:
    """Add to an error about a value of the wrong type what it is, and where it was given."""
    try:
        yield
    except typer.BadParameter as error:
        from emstream.config import refused

        error.message = refused(error)
        raise


@contextmanager
def says_where_from(context: Any) -> Iterator[None]:
    """Add to an error about options of `context` where their values were given."""
    try:
        yield
    except (EmstreamError, ValueError) as error:
        from emstream.config import origins

        if not hasattr(error, "__notes__") and (found := origins(context, str(error))):
            error.add_note(f"({found})")
        raise


def said(error: Exception) -> str:
    """What an error says, with where the values come from that it speaks of."""
    if isinstance(error, typer.BadParameter):
        return error.format_message()
    return " ".join([str(error), *getattr(error, "__notes__", ())])


def _say_error(error: Exception) -> None:
    """The line that a command ends with: for people, or like every other of --log-json."""
    text = said(error)
    if logs_json():
        logging.getLogger("emstream").error("%s", text)
    else:
        typer.echo(printable_lines(f"error: {text}"), err=True)
