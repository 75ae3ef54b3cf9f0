"""Keys for encrypted connections."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from emstream.cli.options import Json
from emstream.cli.report import print_report


def keygen(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Whose keys: service, display3, ...")],
    folder: Annotated[Path, typer.Option("-d", "--folder", help="Where to put them.")] = Path(),
    as_json: Json = False,
) -> None:
    """A pair of keys for an encrypted connection: NAME.key to give away, NAME.key_secret to keep.

    Example: **emstream keygen service**
    """
    from emstream.keys import make

    public, secret = make(name, folder)
    print_report({"public": str(public), "secret": str(secret)}, as_json)
