"""What one viewer wants to see; everything a browser may say, checked."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

AVERAGES = (1, 2, 4, 8, 16, 32, 64)  # frames
MOST_HALVINGS = 6
MOST_PX = 4096  # of a side on the viewer's screen
SHOWN_PX = 1024
PERCENTILES = (0.5, 99.5)  # what is shown black and white
_KEYS = {"region", "screen", "raw", "denoised", "average", "spectra", "halvings", "at"}
_LARGEST = 2**31
SIDES = ("raw", "denoised")

Contrast = tuple[str, float, float]


@dataclass(frozen=True, slots=True)
class Request:
    """One way to look at a pair. Equal requests for the same pair are painted once."""

    region: tuple[int, int, int, int] | None = None
    """(top, left, height, width) of the part to send [px of the frame]; None is all of it."""
    screen: tuple[int, int] = (SHOWN_PX, SHOWN_PX)
    """(height, width) that the region fills on the viewer's screen [px]; more is not sent."""
    raw: Contrast = ("percentiles", *PERCENTILES)
    denoised: Contrast = ("percentiles", *PERCENTILES)
    """What is black and what is white: ("percentiles", low, high) [%] or ("values", low, high) [units]."""
    average: int = 1
    """Raw frames averaged on the raw side, the newest and those before it; one of `AVERAGES`."""
    spectra: tuple[str, ...] = ()
    """Sides whose Fourier transform is wanted, of the region."""
    halvings: int = 0
    """How often the spectra's reach, Nyquist, is halved."""
    at: int | None = None
    """Key of the pair to stay at; None follows the newest."""

    def contrast(self, side: str) -> Contrast:
        return self.raw if side == "raw" else self.denoised


def parse(text: str) -> Request:
    """A viewer's message, a JSON map with any of the fields of `Request`; ValueError when it makes no sense."""
    try:
        message = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("a request must be JSON") from None
    if not isinstance(message, dict) or not message.keys() <= _KEYS:
        raise ValueError(f"a request is a map with keys among {', '.join(sorted(_KEYS))}")
    fields: dict[str, Any] = {key: value for key, value in message.items() if value is not None}
    if "region" in fields:
        fields["region"] = _integers(fields, "region", 4, 0, _LARGEST)
    if "screen" in fields:
        fields["screen"] = _integers(fields, "screen", 2, 1, MOST_PX)
    for side in SIDES:
        if side in fields:
            fields[side] = _contrast(fields[side])
    for key, low, high in (("average", 1, AVERAGES[-1]), ("halvings", 0, MOST_HALVINGS), ("at", 1, 2**53)):
        if key in fields:
            (fields[key],) = _integers({key: [fields[key]]}, key, 1, low, high)
    if fields.get("average", 1) not in AVERAGES:
        raise ValueError(f"average must be one of {', '.join(map(str, AVERAGES))}, got {fields['average']}")
    if "spectra" in fields:
        wanted = fields["spectra"]
        if not isinstance(wanted, list) or not all(side in SIDES for side in wanted):
            raise ValueError(f"spectra must be a list of {' and '.join(SIDES)}")
        fields["spectra"] = tuple(side for side in SIDES if side in wanted)
    return Request(**fields)


def _integers(fields: dict[str, Any], key: str, count: int, low: int, high: int) -> tuple[int, ...]:
    values = fields[key]
    if (
        not isinstance(values, list)
        or len(values) != count
        or not all(isinstance(value, int) and not isinstance(value, bool) for value in values)
        or not all(low <= value <= high for value in values)
    ):
        raise ValueError(f"{key} must be {count} integers from {low} to {high}")
    return tuple(values)


def _contrast(value: Any) -> Contrast:
    if isinstance(value, list) and len(value) == 3 and value[0] in ("percentiles", "values"):
        kind, low, high = value
        numeric = all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in (low, high))
        limit = 100 if kind == "percentiles" else 1e30
        if numeric and -limit <= low < high <= limit and (kind == "values" or low >= 0):
            # In steps of 0.1 %, so that there are only so many.
            return kind, *((round(low, 1), round(high, 1)) if kind == "percentiles" else (low, high))
    raise ValueError('contrast must be ["percentiles", LOW, HIGH] in % or ["values", LOW, HIGH], LOW < HIGH')
