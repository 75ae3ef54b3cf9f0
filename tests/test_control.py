from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import zmq

from emstream import wire
from emstream.control import LARGEST_QUESTION, Control, ask
from emstream.errors import OutputError, SourceError


def refuse(question: Any) -> dict[str, Any]:
    raise OutputError("not now")


@pytest.fixture
def control(tmp_path: Any) -> Iterator[Control]:
    answers = {"double": lambda question: {"twice": 2 * question["n"]}, "refuse": refuse}
    control = Control(f"ipc://{tmp_path}/control", answers)
    control.start()
    yield control
    control.close()


def test_question_is_answered(control: Control) -> None:
    assert ask(control.endpoint, {"do": "double", "n": 4}, 10) == {"ok": True, "twice": 8}


@pytest.mark.parametrize(
    ("question", "why"),
    [
        ({"do": "refuse"}, "not now"),
        ({"do": "nothing"}, "do must be one of double, refuse, got 'nothing'"),
        ({}, "do must be one of double, refuse, got None"),
        ({"do": "double"}, "KeyError: 'n'"),
    ],
)
def test_refusal_says_why(control: Control, question: dict[str, Any], why: str) -> None:
    with pytest.raises(SourceError, match=f"refuses: {why}"):
        ask(control.endpoint, question, 10)


def test_silence_is_explained(tmp_path: Any) -> None:
    with pytest.raises(SourceError, match=r"no answer .* within 0\.05 s"):
        ask(f"ipc://{tmp_path}/nobody", {"do": "double"}, 0.05)


def test_garbage_neither_stops_nor_fills_it(control: Control, context: Any) -> None:
    rubbish: zmq.Socket[bytes] = context.socket(zmq.DEALER)
    rubbish.linger = 0
    rubbish.connect(control.endpoint)
    for parts in ([b""], [b"", b""], [b"x"] * 9, [b"", b"\xc1"], [b"", wire.pack({"do": [1]})]):
        rubbish.send_multipart(parts)
    for _ in range(2):  # what was a question gets its answer
        assert rubbish.poll(10_000)
        assert wire.unpack(rubbish.recv_multipart()[1])["ok"] is False
    large: zmq.Socket[bytes] = context.socket(zmq.REQ)
    large.linger = 0
    large.connect(control.endpoint)
    large.send(bytes(LARGEST_QUESTION + 1))
    assert not large.poll(300)
    assert ask(control.endpoint, {"do": "double", "n": 1}, 10)["twice"] == 2
    rubbish.close()
    large.close()
