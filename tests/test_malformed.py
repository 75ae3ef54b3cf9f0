"""What the benches flood a service with is malformed, every single message, and said to be."""

from __future__ import annotations

import contextlib
import random
import threading
from typing import Any

import pytest
import zmq

from emstream import wire
from emstream.control import Control
from emstream.errors import SourceError
from emstream.intake import Intake
from emstream.ledger import Ledger
from emstream.ring import Ring
from emstream.sources.zmq import ZmqSource

pytest.importorskip("psutil")

from bench import malformed


def test_each_message_is_rejected(context: Any) -> None:
    source = ZmqSource("inproc://flood", lossless=True, bind=True, context=context)
    camera = context.socket(zmq.PUSH)
    camera.linger = 0
    camera.connect("inproc://flood")
    ledger, ring, rng = Ledger(), Ring(2, 1), random.Random(1)
    intake = Intake(ring, ledger)
    for n in range(5000):
        kind, parts = malformed.message(rng)
        camera.send_multipart(parts)
        source._receive(intake)
        assert ledger.snapshot()["rejected"] == ledger.snapshot()["received"] == n + 1, (kind, parts)
    assert ring.claim(block=False) is None
    camera.close()
    stopped = threading.Event()
    stopped.set()
    source.run(intake, stopped)  # which closes it


def test_each_question_is_refused() -> None:
    def nothing_to_swap(question: Any) -> dict[str, Any]:
        raise SourceError("no such engine")

    answers: Any = {"status": lambda question: {}, "swap": nothing_to_swap, "swap-back": nothing_to_swap}
    rng, refused = random.Random(1), 0
    with contextlib.closing(Control("inproc://orders", answers)) as control:
        for _ in range(5000):
            kind, parts = malformed.question(rng)
            if malformed.refusable(parts):
                assert wire.unpack(control._answer(parts[1]), 2**20)["ok"] is False, (kind, parts)
                refused += 1
    assert 3000 < refused < 5000
