from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import zmq

from emstream import control as control_module
from emstream import wire
from emstream.control import LARGEST_QUESTION, Control, ask, control_of
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


@pytest.mark.parametrize("timeout_s", [-1, 0, float("nan"), float("inf")])
def test_wait_that_makes_no_sense_is_refused(tmp_path: Any, timeout_s: float) -> None:
    with pytest.raises(ValueError, match=r"timeout-s must be positive .*, got "):
        ask(f"ipc://{tmp_path}/nobody", {"do": "double"}, timeout_s)


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


@pytest.fixture
def said(context: Any, tmp_path: Any) -> Iterator[Any]:
    """Has a service say where it takes orders; returns what `control_of` makes of it."""
    open_sockets = []

    def at(service: str, control: str) -> str:
        publisher = context.socket(zmq.XPUB)
        open_sockets.append(publisher)
        publisher.bind("tcp://127.0.0.1:*")
        endpoint = publisher.get(zmq.LAST_ENDPOINT).decode().rstrip("\0")
        port = endpoint.rpartition(":")[2]

        def say() -> None:
            if publisher.poll(10_000):
                publisher.send_multipart([b"stats", wire.pack({"htype": wire.STATS, "control": control})])

        saying = threading.Thread(target=say)
        saying.start()
        try:
            return control_of(f"tcp://{service}:{port}", timeout_s=10)
        finally:
            saying.join()

    yield at
    for each in open_sockets:
        each.close(linger=0)


@pytest.mark.parametrize("control", ["tcp://0.0.0.0:5557", "tcp://[::]:5557"])
def test_orders_go_to_the_host_where_the_service_is(said: Any, control: str) -> None:
    assert said("localhost", control) == "tcp://localhost:5557"
    assert said("127.0.0.1", control) == "tcp://127.0.0.1:5557"
    assert said("127.0.0.1", "tcp://10.1.2.3:5557") == "tcp://10.1.2.3:5557"
    assert said("127.0.0.1", "ipc:///run/x") == "ipc:///run/x"


def test_service_elsewhere_that_takes_orders_there_alone_is_explained(
    said: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert said("127.0.0.1", "tcp://127.0.0.1:5557") == "tcp://127.0.0.1:5557"

    def not_ours(*arguments: Any, **options: Any) -> Any:
        raise OSError("cannot assign requested address")

    monkeypatch.setattr(socket, "create_server", not_ours)
    with pytest.raises(
        SourceError, match=r"takes orders on its own machine alone, .*--control 'tcp://\*:5557'"
    ):
        said("127.0.0.1", "tcp://127.0.0.1:5557")


def test_order_that_takes_long_does_not_hold_up_the_end(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr(control_module, "_LAST_ANSWER_S", 0.1)
    begun, go_on = threading.Event(), threading.Event()

    def slow(question: Any) -> dict[str, Any]:
        begun.set()
        assert go_on.wait(20)
        return {"done": True}

    control = Control(f"ipc://{tmp_path}/slow", {"slow": slow})
    control.start()
    answers: list[dict[str, Any]] = []
    asking = threading.Thread(target=lambda: answers.append(ask(control.endpoint, {"do": "slow"}, 20)))
    asking.start()
    assert begun.wait(20)
    control.close()
    assert "still being carried out" in caplog.text
    go_on.set()  # whoever asked hears of it all the same
    asking.join(20)
    assert answers == [{"ok": True, "done": True}]
    control.close()
