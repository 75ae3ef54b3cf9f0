"""The camera of the README's guide, and its source: installed as a package of somebody else's would be."""

from __future__ import annotations

import contextlib
import importlib
import re
import socket
import struct
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

README = Path(__file__).parents[1] / "README.md"


def guide() -> str:
    found = re.search(r"^### Add your camera\n.*?(?=^### )", README.read_text(), re.S | re.M)
    assert found, "the README has lost its guide"
    return found[0]


def _code(language: str) -> str:
    found = re.findall(rf"```{language}\n(.*?)```", guide(), re.S)
    assert len(found) == 1
    return str(found[0])


@contextlib.contextmanager
def installed(folder: Path) -> Iterator[None]:
    """The guide's module and entry point in `folder`, where Python looks."""
    (folder / "mycam.py").write_text(_code("python"))
    about = folder / "mycam-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: mycam\nVersion: 1.0\n")
    groups = tomllib.loads(_code("toml"))["project"]["entry-points"]
    (about / "entry_points.txt").write_text(
        "\n".join(
            line
            for group, entries in groups.items()
            for line in (f"[{group}]", *(f"{name} = {value}" for name, value in entries.items()))
        )
    )
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop("mycam", None)


def frame(number: int, pixels: np.ndarray) -> bytes:
    """A frame (H, W) uint16 as that camera sends it."""
    return struct.pack("<4sIHH", b"MYC1", number, *pixels.shape) + pixels.astype("<u2").tobytes()


class Camera:
    """Sends one message after the other to whoever connects; None closes the connection."""

    def __init__(self, background: Callable[[Callable[[], None]], Any], messages: list[bytes | None]) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(10)
        self.port = self._listener.getsockname()[1]
        self._messages = messages
        background(self._run)

    def _run(self) -> None:
        with self._listener, contextlib.suppress(OSError):
            while self._messages:
                with self._listener.accept()[0] as connection:
                    connection.settimeout(10)
                    while self._messages and (message := self._messages.pop(0)) is not None:
                        try:
                            connection.sendall(message)
                        except OSError:  # the source gave this connection up
                            self._messages.insert(0, message)
                            break
                    if not self._messages:
                        connection.recv(1)  # until the source has gone


def url(camera: Camera) -> str:
    return f"mycam://127.0.0.1:{camera.port}"
