"""Telling a running service what to do: one question, one answer, over a ZeroMQ socket of its own.

A question is a msgpack map ``{"do": NAME, ...}``, the answer ``{"ok": true, ...}`` or
``{"ok": false, "error": TEXT}``. Where to ask is in every message on the ``stats`` topic.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections.abc import Callable, Mapping
from typing import Any

import zmq

from emstream import wire
from emstream.endpoint import Door, bind, connect, reachable
from emstream.errors import EmstreamError, SourceError
from emstream.keys import Peer

log = logging.getLogger(__name__)
LARGEST_QUESTION = 64 * 1024  # bytes
_POLL_MS = 100
_LAST_ANSWER_S = 5.0
_LONGEST_S = 1e6

Answer = Callable[[Mapping[str, Any]], Mapping[str, Any]]


class Control:
    """Answers questions in a thread of its own, one at a time."""

    def __init__(
        self,
        endpoint: str,
        answers: Mapping[str, Answer],
        context: zmq.Context[zmq.Socket[bytes]] | None = None,
        door: Door | None = None,
    ) -> None:
        """Bind `endpoint`. `answers` by the name of what is to be done: they raise EmstreamError or ValueError."""
        self._answers = answers
        self._socket = (context or zmq.Context.instance()).socket(zmq.ROUTER)
        self._socket.linger = 500
        self._socket.set(zmq.MAXMSGSIZE, LARGEST_QUESTION)
        self._socket.set(zmq.ROUTER_HANDOVER, 1)
        self.endpoint = bind(self._socket, endpoint, door)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="control", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Answer what is being answered, then no more. What takes longer than a few seconds is not waited for."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join(timeout=_LAST_ANSWER_S)
            if self._thread.is_alive():  # and has the socket
                log.warning("an order is still being carried out, %g s after the end", _LAST_ANSWER_S)
                return
        self._socket.close()

    def _run(self) -> None:
        while not self._stopping.is_set():
            if not self._socket.poll(_POLL_MS):
                continue
            parts = self._socket.recv_multipart()
            if len(parts) != 3 or parts[1]:  # what a REQ socket sends
                log.debug("a control message of %d parts was ignored", len(parts))
                continue
            self._socket.send_multipart([parts[0], b"", self._answer(parts[2])])

    def _answer(self, packed: bytes) -> bytes:
        try:
            question = wire.unpack(packed, LARGEST_QUESTION)
            answer = self._answers.get(str(question.get("do")))
            if answer is None:
                raise ValueError(f"do must be one of {', '.join(self._answers)}, got {question.get('do')!r}")
            return wire.pack({"ok": True, **answer(question)})
        except (EmstreamError, ValueError) as error:
            return _refusal(str(error))
        except Exception as error:
            log.exception("control")
            return _refusal(f"{type(error).__name__}: {error}")


def _refusal(why: str) -> bytes:
    # A file name that is no UTF-8 could not be packed.
    return wire.pack({"ok": False, "error": why.encode(errors="replace").decode()})


def ask(
    endpoint: str, question: Mapping[str, Any], timeout_s: float, peer: Peer | None = None
) -> dict[str, Any]:
    """Ask the service at a control endpoint; returns its answer. Raises SourceError when it refuses or is silent."""
    if not 0 < timeout_s <= _LONGEST_S:
        raise ValueError(f"timeout-s must be positive and at most {_LONGEST_S:g} s, got {timeout_s} s")
    asking: zmq.Socket[bytes]
    with zmq.Context.instance().socket(zmq.REQ) as asking:
        asking.setsockopt(zmq.LINGER, 0)
        connect(asking, endpoint, peer)
        asking.send(wire.pack(question))
        if not asking.poll(round(1000 * timeout_s)):
            raise SourceError(
                f"no answer from the service at {endpoint} within {timeout_s:g} s; what it began, it will still do"
            )
        answer = wire.unpack(asking.recv())
    if not answer.get("ok"):
        raise SourceError(f"the service at {endpoint} refuses: {answer.get('error')}")
    return answer


def control_of(service: str, timeout_s: float = 3.0, peer: Peer | None = None) -> str:
    """The control endpoint of the service that publishes on `service`; it says so on its stats topic.

    Raises SourceError when it is silent, or takes no orders from where one is.
    """
    asking: zmq.Socket[bytes]
    with zmq.Context.instance().socket(zmq.SUB) as asking:
        asking.setsockopt(zmq.LINGER, 0)
        connect(asking, service, peer)
        asking.subscribe(b"stats")
        if not asking.poll(round(1000 * timeout_s)):
            raise SourceError(
                f"no service at {service}: nothing came within {timeout_s:g} s; --service takes tcp://HOST:PORT, "
                "and --key and --service-key where the service takes keys"
            )
        endpoint = wire.unpack(asking.recv_multipart()[1]).get("control")
    if endpoint is None:
        raise SourceError(f"the service at {service} takes no orders; start it without --control none")
    return _seen_from_here(str(endpoint), service)


def _seen_from_here(control: str, service: str) -> str:
    """The endpoint that a service says it takes orders on, for one who reaches it at `service`."""
    if not service.startswith("tcp://"):
        return control
    tcp_host = service.rpartition(":")[0]
    for everywhere in ("tcp://0.0.0.0:", "tcp://[::]:"):
        if control.startswith(everywhere):
            return f"{tcp_host}:{control.removeprefix(everywhere)}"
    if not reachable(control) and not _is_here(tcp_host.removeprefix("tcp://")):
        raise SourceError(
            f"the service at {service} takes orders on its own machine alone, at {control}: give them there, or start "
            "it with --control 'tcp://*:5557' and keys"
        )
    return control


def _is_here(host: str) -> bool:
    """Whether an address or name is this machine's: then one can listen there."""
    family = socket.AF_INET6 if "[" in host else socket.AF_INET
    with contextlib.suppress(OSError), socket.create_server((host.strip("[]"), 0), family=family):
        return True
    return False
