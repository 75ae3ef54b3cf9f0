"""The live page of ``emstream view``: raw beside denoised in any browser, tablets included.

``server.py`` receives from a running emstream and serves the page; ``page.html``,
``page.css`` and ``page.js`` are the page, as they are: no build step, nothing from the network.
"""

from __future__ import annotations

from emstream.view.server import ViewServer

__all__ = ["ViewServer"]
