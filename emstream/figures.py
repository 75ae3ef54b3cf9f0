"""A service's figures in words, each a line with its units: for ``emstream status`` and for the report at the end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.text import Text

from emstream.printable import printable

FAULTS = ("missing", "dropped", "rejected", "failed")
SETTLED = ("published", "dropped", "rejected", "failed", "in_flight")
STAGES = {
    "camera": "camera_to_received",
    "wait": "received_to_batched",
    "infer": "batched_to_inferred",
    "send": "inferred_to_published",
}


def latency(latency_ms: Mapping[str, Any]) -> str:
    return "  ".join(
        f"{name.replace('_', '.')} {digits(latency_ms.get(name))}" for name in ("p50", "p99", "p99_9", "max")
    ) + " ms"  # fmt: skip


def stages(p50_ms: Mapping[str, Any]) -> str:
    """The medians of those stages [ms] that are known; nothing where none is."""
    known = [f"{name} {digits(p50_ms[key])}" for name, key in STAGES.items() if key in p50_ms]
    return "  ".join(known) + " ms (p50)" if known else ""


def trust(known: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What `trusted.trust_of` found out: names and lines, of what is known only."""
    if estimate := known["psnr_db"]:
        value, low, high = (f"{estimate[key]:.1f}" for key in ("value", "low", "high"))
        yield "quality", f"PSNR {value} dB ({low} to {high}), estimated from the stream"
    elif known["state"]:
        yield "quality", str(known["state"])
    if given := known["likelihood"]:
        value, low, high = (f"{1000 * given[key]:.2f}" for key in ("value", "low", "high"))
        yield "likelihood", f"{value} ({low} to {high}) millinats/px against an even grey"
    if (fano := known["fano"]) is not None:
        yield "noise", f"Fano factor {fano:.4g} (1 for counts)"
    if spectrum := known["spectrum"]:
        word = "like" if spectrum["in_domain"] else "unlike"
        yield (
            "spectrum",
            (
                f"{word} what the engine was trained on: {spectrum['distance']:.3g} spreads from it, "
                f"{spectrum['farthest']:.3g} are usual"
            ),
        )


def ledger(counted: Mapping[str, int]) -> Text:
    """``received 85 = published 83 + dropped 2 + ...``, what went wrong in red."""
    text = Text(f"received {grouped(counted.get('received'))} =")
    for i, name in enumerate((*SETTLED, "missing")):
        sign = "   " if name == "missing" else " + " if i else " "
        wrong = name in FAULTS and counted.get(name)
        text.append(sign)
        text.append(
            f"{name.replace('_', ' ')} {grouped(counted.get(name))}", style="bold red" if wrong else ""
        )
    return text


def engine(identity: Mapping[str, Any]) -> str:
    name = f"{identity.get('name', '-')} {str(identity.get('sha256') or '')[:8]}"
    return printable(f"{name}   {identity.get('device', '')}")


def grouped(number: float | None) -> str:
    return "-" if number is None else f"{number:,}"


def digits(number: float | None) -> str:
    return "-" if number is None else f"{number:.3g}" if abs(number) < 1000 else f"{number:,.0f}"
