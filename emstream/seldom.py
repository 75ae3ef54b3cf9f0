"""Saying what happens again and again only now and then."""

from __future__ import annotations

from dataclasses import dataclass

from emstream.frame import now_ns

_SAY_AGAIN_S = 10.0
_MAX_KINDS = 100


@dataclass
class _Kind:
    times: int = 0
    quiet_until_ns: int = 0


class Seldom:
    """Of each kind of message lets through the first, and one in ten seconds. One thread calls it."""

    def __init__(self) -> None:
        self._kinds: dict[str, _Kind] = {}

    def note(self, what: str, times: int = 1) -> tuple[int, bool] | None:
        """None when `what` is to be kept quiet, else how often it has been by now and whether it is the first."""
        kind = self._kinds.setdefault(what[:200], _Kind())
        if len(self._kinds) > _MAX_KINDS:
            del self._kinds[next(iter(self._kinds))]
        kind.times += times
        if now_ns() < kind.quiet_until_ns:
            return None
        first = kind.quiet_until_ns == 0
        kind.quiet_until_ns = now_ns() + int(_SAY_AGAIN_S * 1e9)
        return kind.times, first
