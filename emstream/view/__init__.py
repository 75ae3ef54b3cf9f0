"""The live page of ``emstream view``: raw beside denoised in any browser, tablets included.

``receiver.py`` listens to a running emstream, ``picture.py`` paints, ``server.py`` serves the page to
browsers; ``page.html``, ``page.css`` and ``page.js`` are the page, as they are: no build step, nothing
from the network.
"""

from __future__ import annotations

from emstream.errors import OutputError

try:
    from emstream.view.server import ViewServer
except ModuleNotFoundError as error:
    raise OutputError(f"the live page needs {error.name}: pip install 'emstream[view]'") from None

__all__ = ["ViewServer"]
