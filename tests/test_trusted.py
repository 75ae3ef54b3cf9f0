from __future__ import annotations

import re
from typing import Any

import pytest

from emstream.trust import INSUFFICIENT
from emstream.trusted import trust_of

GOOD: dict[str, Any] = {
    "frames": 400,
    "psnr_db": {"value": 33.0, "low": 32.5, "high": 33.6},
    "likelihood": {"value": 0.02, "low": 0.01, "high": 0.03},
    "fano": 1.01,
    "spectrum": {"distance": 1.0, "farthest": 2.0, "in_domain": True},
}


def test_what_is_well_has_a_figure_and_no_fault() -> None:
    said = trust_of({"trust": GOOD, "stalled": {}, "engine": {"name": "x"}})
    assert said == {key: GOOD[key] for key in GOOD if key != "frames"} | {"state": None, "faults": []}


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"trust": GOOD | {"likelihood": {"value": -1, "low": -2, "high": -0.5}}}, "contradict the picture"),
        ({"trust": GOOD | {"fano": 3.1}}, r"Fano factor 3.1\); check --gain"),
        ({"trust": GOOD | {"spectrum": {"in_domain": False}}}, "unlike all that the engine was trained on"),
        ({"stalled": {"engine": 3.4}}, "the engine has stalled for 3 s"),
        ({"engine": {"fallback_for": "unet128"}}, "a fallback is at work for unet128"),
    ],
)
def test_what_is_wrong_is_said_in_words(change: dict[str, Any], fault: str) -> None:
    (said,) = trust_of(change)["faults"]
    assert re.search(fault, said)


def test_empty_field_of_view_is_no_contradiction() -> None:
    """Of Poisson noise alone at 0.45 electrons per pixel, as the shipped engine denoises it."""
    vacuum = {"value": -4.6e-5, "low": -4.8e-5, "high": -4.5e-5}
    assert trust_of({"trust": GOOD | {"likelihood": vacuum}})["faults"] == []


@pytest.mark.parametrize(
    "message",
    [
        {},
        {"trust": None},
        {"trust": [1]},
        {"trust": {"psnr_db": "x", "likelihood": {"value": True}, "fano": "y", "spectrum": 3}},
        {"stalled": [1], "engine": 3},
        {"stalled": {"a": "b", 3: 4.0}, "engine": {"fallback_for": 3}},
    ],
)
def test_anything_may_come_over_the_wire(message: Any) -> None:
    said = trust_of(message)
    assert said["psnr_db"] is None
    assert said["faults"] == []
    assert said["state"] in (None, INSUFFICIENT)


def test_escapes_do_not_reach_a_terminal() -> None:
    (fault,) = trust_of({"stalled": {"\x1b[31mengine": 2.0}})["faults"]
    assert "\x1b" not in fault
