"""The live page of ``emstream view``: raw beside denoised in any browser, tablets included.

Follow a pair to a screen::

    receiver.py   listens to a running emstream and pairs its frames, pair.py
    history.py    keeps the last seconds
    request.py    what one viewer wants to see; viewer.py, what it has been shown
    picture.py    paints it: shrink.py, average.py, scale.py (contrast), spectrum.py
    server.py     sends it to browsers; door.py says who may look
    snapshot.py   the same pair as a file
    process.py    all of it in a process beside the service

``page.html``, ``page.css`` and the ``.js`` modules are the page, as they are: no build step, nothing
from the network.
"""

from __future__ import annotations

from emstream.errors import OutputError

try:
    from emstream.view.process import ViewProcess
    from emstream.view.server import ViewServer
except ModuleNotFoundError as error:
    raise OutputError(f"the live page needs {error.name}: pip install 'emstream[view]'") from None

__all__ = ["ViewProcess", "ViewServer"]
