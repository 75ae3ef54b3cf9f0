"""emstream denoises electron-microscope frames while the specimen is in the beam.

Follow a frame through the package::

    sources/     a camera's messages (ZeroMQ, DECTRIS), a file, or a simulated specimen
    intake.py    checks, overrun policy; corrections.py: gain, mask, flat field, binning
    ring.py      the frame's place in a batch, written once
    inference/   the engine: electron counts in, expected electrons out
    publish.py   out again, with its header and history; outputs/ in formats of others
    ledger.py    every frame accounted for
    pipeline.py  runs these; serve.py puts them together
    client.py    what displays use: view/ (the live page), status.py (a terminal), napari.py
    record.py    what a recorder does; recording/ is the file it leaves, for replays, too

From Python::

    engine = emstream.load_engine()
    expected = engine.denoise(counts)

    for frame in emstream.subscribe("tcp://127.0.0.1:5556"):
        show(frame.data)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from emstream.version import VERSION

if TYPE_CHECKING:
    from emstream.client import subscribe as subscribe
    from emstream.inference import load_engine as load_engine

__all__ = ["load_engine", "subscribe"]

__version__ = VERSION

_HOMES = {"load_engine": "emstream.inference", "subscribe": "emstream.client"}


def __getattr__(name: str) -> Any:
    """Import on first use: ``import emstream`` itself stays instant."""
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'emstream' has no attribute {name!r}")
