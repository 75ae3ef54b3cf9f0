"""Binding ZeroMQ sockets, with errors that say what to do."""

from __future__ import annotations

import zmq

from emstream.errors import OutputError


def bind(socket: zmq.Socket[bytes], endpoint: str) -> str:
    """Bind `socket` and return the endpoint with its real port, or close it and raise OutputError."""
    problem = None
    port = endpoint.rpartition(":")[2]
    if endpoint.startswith("tcp:") and port.isdigit() and int(port) > 65535:
        problem = "ports end at 65535"  # ZeroMQ would silently take another one
    else:
        try:
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


def last_endpoint(socket: zmq.Socket[bytes]) -> str:
    """Where `socket` was bound or connected last."""
    endpoint = socket.get(zmq.LAST_ENDPOINT)
    assert isinstance(endpoint, bytes)
    return endpoint.decode().rstrip("\0")
