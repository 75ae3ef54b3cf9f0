"""Binding and connecting ZeroMQ sockets, with errors that say what to do."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

import zmq

from emstream.errors import OutputError, SourceError
from emstream.keys import Doorkeeper, Peer


@dataclass(frozen=True)
class Door:
    """Who may connect to what a service binds: those whom `keeper` admits, or else who is on this machine."""

    keeper: Doorkeeper | None = None
    insecure: bool = False
    """Anybody who can reach it."""

    def stands_open(self, endpoint: str) -> bool:
        """Whether anybody on the network could come in at `endpoint`, which nobody allowed."""
        return not self.keeper and not self.insecure and reachable(endpoint)


def bind(socket: zmq.Socket[bytes], endpoint: str, door: Door | None = None) -> str:
    """Bind `socket` and return the endpoint with its real port, or close it and raise OutputError.

    Without a `door` it is left open to all; with one, an address that other machines can reach takes keys.
    """
    problem = _port_problem(endpoint, "*", "0")
    if not problem and door and door.stands_open(endpoint):
        socket.close(linger=0)
        raise OutputError(only_with_keys(endpoint))
    if not problem:
        try:
            if door and door.keeper:
                door.keeper.guard(socket)
            socket.ipv6 = "[" in endpoint
            socket.bind(endpoint)
        except zmq.ZMQError as error:
            problem = error.strerror
            if error.errno == zmq.EADDRINUSE:
                problem = "the address is in use; stop the other program or choose another one"
    if problem:
        socket.close(linger=0)
        raise OutputError(
            f"cannot publish on {endpoint}: {problem}; --output takes tcp://HOST:PORT or ipc://PATH"
        )
    return last_endpoint(socket)


def only_with_keys(endpoint: str) -> str:
    """Why `endpoint` is not bound."""
    return (
        f"cannot publish on {endpoint}: other machines can reach it, and anybody there could look on; give --key and "
        "--admit (emstream keygen makes keys), or --insecure on a network where that is no harm"
    )


def reachable(endpoint: str) -> bool:
    """Whether a socket bound to `endpoint` can be connected to from other machines."""
    if endpoint.startswith(("ipc://", "inproc://")) or "://" not in endpoint:
        return False
    if not endpoint.startswith("tcp://"):  # ZeroMQ knows more of them, such as tipc://
        return True
    host = endpoint.removeprefix("tcp://").rpartition(":")[0].strip("[]")
    if host == "localhost":
        return False
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:  # *, an interface, a name
        return host != "lo"


def connect(socket: zmq.Socket[bytes], endpoint: str, peer: Peer | None = None) -> None:
    """Connect `socket` to what a service publishes, or close it and raise SourceError."""
    problem = _port_problem(endpoint)
    try:
        if not problem:
            if peer:
                peer.introduce(socket)
            socket.ipv6 = "[" in endpoint
            socket.connect(endpoint)
    except zmq.ZMQError as error:
        problem = error.strerror
    if problem:
        socket.close(linger=0)
        raise SourceError(
            f"cannot subscribe to {endpoint}: {problem}; a service is at tcp://HOST:PORT or ipc://PATH"
        )


def _port_problem(endpoint: str, *others: str) -> str | None:
    """What is wrong with the port of a tcp address: of 22x ZeroMQ takes 22, of 70000 another one."""
    _, colon, port = endpoint.removeprefix("tcp://").rpartition(":")
    if not endpoint.startswith("tcp://") or port in others:
        return None
    if not colon:
        return "the port is missing"
    if not (port.isascii() and port.isdigit()):
        return f"the port must be a number from 1 to 65535, got {port!r}"
    return f"the port must be a number from 1 to 65535, got {port}" if not 0 < int(port) < 65536 else None


def last_endpoint(socket: zmq.Socket[bytes]) -> str:
    """Where `socket` was bound or connected last."""
    endpoint = socket.get(zmq.LAST_ENDPOINT)
    assert isinstance(endpoint, bytes)
    return endpoint.decode().rstrip("\0")
