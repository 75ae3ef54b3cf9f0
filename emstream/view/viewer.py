"""One browser that is looking: what it wants, what it has been shown."""

from __future__ import annotations

import asyncio
import contextlib

from emstream.view.pair import Pair
from emstream.view.request import Request, parse


class Viewer:
    """State of one viewer. Lives in the event loop's thread."""

    def __init__(self) -> None:
        self.request = Request()
        self.asked = 0
        """Requests heard so far."""
        self.shown: Pair | None = None
        self._shown_as: Request | None = None
        self._acknowledged = asyncio.Event()
        self._news = asyncio.Event()

    @property
    def is_live(self) -> bool:
        return self.request.at is None

    def hear(self, text: str) -> None:
        """A message: what the viewer wants from now on; ``shown`` says that the last picture is on its screen."""
        if text == "shown":
            self._acknowledged.set()
            return
        self.request = parse(text)
        self.asked += 1
        self._news.set()

    def wants(self, pair: Pair | None) -> bool:
        """Whether `pair` is not what is on the screen already."""
        return pair is not None and (pair is not self.shown or self.request != self._shown_as)

    def note_shown(self, pair: Pair, request: Request) -> None:
        self.shown, self._shown_as = pair, request

    def wake(self) -> None:
        """Something new has come."""
        self._news.set()

    async def acknowledged(self) -> None:
        """Until the viewer has shown what it was sent last."""
        await self._acknowledged.wait()
        self._acknowledged.clear()

    async def news(self, timeout_s: float) -> None:
        """Until something new has come or is wanted, or `timeout_s` is over."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._news.wait(), timeout_s)
        self._news.clear()
