"""What a service says of the recorder beside it: the map ``recording`` of its statistics, checked."""

from __future__ import annotations

from typing import Any

from emstream import wire
from emstream.printable import printable

STATES = ("waiting", "looking back", "recording", "finishing", "silent", "ended", "restarting", "failed")
_WRONG = {
    "silent": "the recorder is silent",
    "ended": "recording ended",
    "restarting": "the recorder died, another one starts",
    "failed": "the recorder failed",
}
_TRACKS = ("raw", "denoised")
_LONGEST = 500


def recording_of(message: dict[str, Any]) -> dict[str, Any] | None:
    """The state of the recorder from a message that may hold anything; None when there is no recorder.

    Keys, where the service has them: ``state`` (one of `STATES`), ``path``, ``why``, texts; ``frames``,
    ``lost``, ``unheard`` {raw, denoised}; ``missing``; ``died``, how often the recorder did; ``look_back_s``,
    ``disk_s`` [s]; ``free_bytes``; and
    always ``faults``, what is wrong in words.
    """
    said = message.get("recording")
    if not isinstance(said, dict) or said.get("state") not in STATES:
        return None
    found: dict[str, Any] = {"state": said["state"]}
    for key in ("path", "why"):
        if isinstance(said.get(key), str):
            found[key] = printable(said[key][:_LONGEST])
    for key in ("frames", "lost", "unheard"):
        found[key] = {name: int(n) for name, n in wire.numbers(said.get(key), _TRACKS).items()}
    found |= wire.numbers(said, ("missing", "died", "look_back_s", "free_bytes", "disk_s"))
    found["faults"] = _faults(found)
    return found


def _faults(recording: dict[str, Any]) -> list[str]:
    faults = [
        f"{n:,} {track} not recorded: {word}"
        for key, word in (("lost", "no room or slow disk"), ("unheard", "never heard"))
        for track, n in recording[key].items()
        if n
    ]
    if state := _WRONG.get(recording["state"]):
        faults.append(f"{state}: {recording['why']}" if "why" in recording else state)
    return faults


def duration(seconds: float) -> str:
    """``45 s``, ``12 min``, ``3 h``."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
