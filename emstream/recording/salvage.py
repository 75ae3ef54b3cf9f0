"""What a recorder that died left on the disk, and how far that accounts for what was published."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from emstream.errors import FileFormatError
from emstream.recording.layout import TRACKS, UNKNOWN
from emstream.recording.reader import Recording

log = logging.getLogger(__name__)
DIED = "died"
"""How such a recording ended."""


@dataclass(frozen=True)
class Account:
    """How far it is known of every frame whether it was recorded."""

    published: int
    """Frames published up to the last denoised one that is accounted for."""
    raw_since: int
    """Raw frames that are accounted for beyond it."""


def salvage(paths: Sequence[Path], since: Account | None) -> tuple[dict[str, Any], Account | None]:
    """The report of a recording that nobody finished, as `Recorder.report` has it, and what it accounts for.

    `paths` are its files, in order; `since` is what was accounted for when it began, None where that is not known.
    What was published up to the last frame on disk and is not there was *lost*, as far as the recorder
    said so, or *unheard*.
    """
    report: dict[str, Any] = {
        "files": [], "frames": dict.fromkeys(TRACKS, 0), "lost": dict.fromkeys(TRACKS, 0),
        "unheard": dict.fromkeys(TRACKS, 0), "missing": 0, "bytes": 0, "seconds": 0.0, "ended": DIED,
        "ledger": {}, "engine": {},
    }  # fmt: skip
    until = since
    for path in paths:
        try:
            with Recording(path) as recording:
                _add(report, recording)
                since = since or _begin(recording)
                until = _until(recording, until)
        except FileFormatError as error:
            if path.exists():
                log.warning("%s", error)
                if str(path) not in report["files"]:  # only the header of its first or last frame is damaged
                    report["files"].append(str(path))
    if since and until:
        due = {
            "raw": until.published + until.raw_since - since.published - since.raw_since,
            "denoised": until.published - since.published,
        }
        for track, frames in due.items():
            left = max(0, frames - report["frames"][track])
            report["lost"][track] = min(report["lost"][track], left)
            report["unheard"][track] = left - report["lost"][track]
    return report, until


def _add(report: dict[str, Any], recording: Recording) -> None:
    tracks = {"raw": recording.raw, "denoised": recording.denoised}
    report["files"].append(str(recording.path))
    for name, track in tracks.items():
        report["frames"][name] += len(track)
        report["lost"][name] = recording.recorder[f"{name}_lost"]
    report["missing"] += recording.recorder["missing"]
    report["bytes"] += recording.path.stat().st_size
    report["seconds"] += round(float(np.ptp(recording.raw.arrived_ns)) / 1e9, 3)
    report["ledger"] = recording.ledger
    report["engine"] = recording.engines[-1] if recording.engines else {}


def _published(recording: Recording, row: int) -> int | None:
    """Frames published up to a denoised one, as its header says."""
    ledger = recording.denoised.header(row).get("ledger")
    published = ledger.get("published") if isinstance(ledger, dict) else None
    return published if isinstance(published, int) else None


def _begin(recording: Recording) -> Account | None:
    """Just before the first frame."""
    if not len(recording.denoised) or (published := _published(recording, 0)) is None:
        return None
    return Account(max(0, published - 1 - max(0, int(recording.raw_rows[0]))), 0)


def _until(recording: Recording, before: Account | None) -> Account | None:
    """Up to the last frames of this file; `before` is up to those of the file before it."""
    rows = np.flatnonzero(recording.raw_rows != UNKNOWN)
    last = len(recording.denoised) - 1
    if last < 0 or (published := _published(recording, last)) is None:
        return Account(before.published, before.raw_since + len(recording.raw)) if before else None
    beyond = len(recording.raw) - 1 - int(recording.raw_rows[rows[-1]]) if len(rows) else len(recording.raw)
    return Account(published, beyond)
