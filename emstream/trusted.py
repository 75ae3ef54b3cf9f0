"""What a service says of its picture and of itself beyond the ledger, checked: maps ``trust`` and ``stalled``."""

from __future__ import annotations

from typing import Any

from emstream import wire
from emstream.printable import printable
from emstream.trust import INSUFFICIENT

_POISSON = (0.8, 1.25)
"""Fano factors of frames that may be counts: farther off, the gain is wrong or the picture is."""
_CONTRADICTED = -5e-4
"""Nats per pixel below which the counts contradict a picture: of noise alone, where there is nothing to see,
every picture is a little worse than an even grey."""
_LONGEST = 100


def trust_of(message: dict[str, Any]) -> dict[str, Any]:
    """From a message that may hold anything: ``psnr_db`` and ``likelihood`` {value, low, high}, or None.

    ``fano``, a number, and ``spectrum`` {distance, farthest, in_domain} are None, too, where they are not known.
    ``state`` is "insufficient data" while the quality is not known, and None where nothing is estimated;
    ``faults`` says what is wrong in words.
    """
    said = message.get("trust")
    found: dict[str, Any] = {
        "psnr_db": None,
        "likelihood": None,
        "fano": None,
        "spectrum": None,
        "state": None,
        "faults": _faults_of(message),
    }
    if not isinstance(said, dict):
        return found
    for key in ("psnr_db", "likelihood"):
        interval = wire.numbers(said.get(key), ("value", "low", "high"))
        if len(interval) == 3:
            found[key] = interval
    if found["psnr_db"] is None:
        found["state"] = INSUFFICIENT
    if (likelihood := found["likelihood"]) and likelihood["high"] < _CONTRADICTED:
        found["faults"].append("the counts contradict the picture")
    found["fano"] = fano = wire.numbers(said, ["fano"]).get("fano")
    if fano is not None and not _POISSON[0] <= fano <= _POISSON[1]:
        found["faults"].append(
            f"frames are no counts, or the picture is wrong (Fano factor {fano:.3g}); check --gain"
        )
    spectrum = said.get("spectrum")
    in_domain = spectrum.get("in_domain") if isinstance(spectrum, dict) else None
    if in_domain is False:
        found["faults"].append("unlike all that the engine was trained on; check the pixel size")
    distances = wire.numbers(spectrum, ("distance", "farthest"))
    if len(distances) == 2 and isinstance(in_domain, bool):
        found["spectrum"] = {**distances, "in_domain": in_domain}
    return found


def _faults_of(message: dict[str, Any]) -> list[str]:
    """Of the service itself."""
    stalled = message.get("stalled")
    faults = []
    if isinstance(stalled, dict):
        for stage, seconds in wire.numbers(
            stalled, [key for key in stalled if isinstance(key, str)][:8]
        ).items():
            faults.append(f"the {printable(stage[:_LONGEST])} has stalled for {seconds:.0f} s")
    engine = message.get("engine")
    if isinstance(engine, dict) and isinstance(engine.get("fallback_for"), str):
        faults.append(f"a fallback is at work for {printable(engine['fallback_for'][:_LONGEST])}")
    return faults
