"""A decoder's messages in, and what comes of them out, with no socket."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Self

import numpy as np

from emstream import wire
from emstream.intake import Intake
from emstream.ledger import Ledger
from emstream.ring import Ring, SeriesMark, Slot
from emstream.wire import DEFAULT_MAX_FRAME_BYTES


class Desk:
    """A decoder with an intake behind it."""

    def __init__(self, decoder: Any, limit: int = DEFAULT_MAX_FRAME_BYTES) -> None:
        """`limit`: bytes of a frame."""
        self.ring, self.ledger = Ring(8, 1), Ledger()
        self.intake = Intake(self.ring, self.ledger, max_frame_bytes=limit)
        self.decoder = decoder

    def give(self, *messages: Any) -> Self:
        for message in messages:
            self.decoder.decode(message, self.intake)
        return self

    def items(self) -> Iterator[Any]:
        """Marks, and headers with their pixels, that have come out."""
        while (item := self.ring.claim(block=False)) is not None:
            if isinstance(item, SeriesMark):
                yield item.message
            else:
                assert isinstance(item, Slot)
                for row, head in enumerate(item.headers):
                    yield head, item.counts[row].copy()
                self.ring.release(item)

    def frames(self) -> list[tuple[Any, np.ndarray]]:
        return [item for item in self.items() if isinstance(item, tuple)]

    def marks(self) -> list[str]:
        kinds = {wire.START: "start", wire.END: "end"}
        return [kinds[item["htype"]] if isinstance(item, dict) else "frame" for item in self.items()]

    @property
    def reasons(self) -> list[str]:
        return list(self.ledger.reasons())
