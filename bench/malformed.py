"""Messages that are surely none, for the sockets of a running service.

`message` is for an input, `question` for a control socket. Each is malformed by how it is made, whatever
a decoder thinks of it. No part is so large that ZeroMQ itself ends the connection.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import msgpack

from emstream import wire
from emstream.control import LARGEST_QUESTION

SIDE = 32  # px
_PIXELS = bytes(SIDE * SIDE)
# The number comes last: another number would be another frame, and none that is malformed.
_FRAME: dict[str, Any] = {"htype": wire.FRAME, "shape": [SIDE, SIDE], "type": "uint8", "frame": 0}
_HEADER: bytes = msgpack.packb(_FRAME)
_BEFORE_NUMBER = len(_HEADER) - 1
_JSON = json.dumps({**_FRAME, "htype": wire.ARRAY}).encode()
_LARGEST = wire.DEFAULT_MAX_HEADER_BYTES
_ABSURD: tuple[dict[str, Any], ...] = (
    *({"shape": shape} for shape in (
        None, [], [SIDE], [0, SIDE], [-1, SIDE], [SIDE, 2**31], [2**52, 2**52], [2.5, 2.5], ["32", "32"], [[SIDE]] * 2,
        [2, SIDE, SIDE], [1] * 9, {"rows": SIDE}, True, "32x32", [SIDE + 1, SIDE], [SIDE - 1, SIDE],
    )),
    *({"type": kind} for kind in (None, "", "uint7", "object", "O", 8, ["uint8"], "x" * 60_000, "float64")),
    *({"frame": number} for number in (None, -1, 0.5, True, "0", 2**53, 2**64 - 1, [0], float("nan"))),
    *({"htype": htype} for htype in (None, "", 1, wire.FRAME.upper(), "emstream-frame-2.0", [wire.FRAME], {})),
    *({"series": series} for series in (-1, 1.5, True, "x" * 257, [1], {"a": 1}, 2**60)),
    *({"source": source} for source in (None, 1, b"camera", "x" * 1000, ["camera"])),
    *({"timestamp_ns": time} for time in (-1, 2**63, 0.5, "now", True, [0])),
    *({"pixel_size_m": size} for size in (0, -1e-10, float("nan"), float("inf"), "6 pm", [1e-10], True)),
    *({"exposure_s": time} for time in (0, -1, float("-inf"), "1 s", {})),
    {"endianness": "middle"}, {"endianness": 1}, {"encoding": "lz4"}, {"encoding": 7}, {"units": 5},
    {"engine": {"name": "mine"}}, {1: 2}, {b"key": 1},
)  # fmt: skip


def message(rng: random.Random) -> tuple[str, list[bytes]]:
    """What is wrong with it, and its parts."""
    kind = rng.choice(_KINDS)
    return kind, _MESSAGES[kind](rng)


def question(rng: random.Random) -> tuple[str, list[bytes]]:
    """What is wrong with it, and its parts: with an empty one before it is answered, and refused."""
    kind = rng.choice(_QUESTION_KINDS)
    return kind, _QUESTIONS[kind](rng)


def refusable(parts: list[bytes]) -> bool:
    """Whether this is a question by its parts, so that an answer is due."""
    return len(parts) == 2 and not parts[0]


# -- for an input ------------------------------------------------------------------------


def _truncated(rng: random.Random) -> list[bytes]:
    cut = rng.randrange(4)
    if cut == 0:
        return [b"raw", _HEADER[: rng.randrange(len(_HEADER))], _PIXELS]
    if cut == 1:
        return [b"raw", _HEADER, _PIXELS[: rng.randrange(len(_PIXELS))]]
    if cut == 2:
        return [_JSON[: rng.randrange(1, len(_JSON))], _PIXELS]
    return [b"raw", _HEADER]


def _flipped(rng: random.Random) -> list[bytes]:
    """One bit: of a header that says nothing it does not need, each one matters."""
    header = bytearray(_HEADER)
    header[rng.randrange(_BEFORE_NUMBER)] ^= 1 << rng.randrange(8)
    return [b"raw", bytes(header), _PIXELS]


def _absurd(rng: random.Random) -> list[bytes]:
    return [b"raw", msgpack.packb({**_FRAME, **rng.choice(_ABSURD)}), _PIXELS]


def _wrong_parts(rng: random.Random) -> list[bytes]:
    parts = rng.choice((1, 2, 4, 5, 50))
    if parts < 3:
        return [b"raw", _HEADER][:parts]
    return [b"raw", _HEADER, _PIXELS, *([b"more"] * (parts - 3))]


def _random(rng: random.Random) -> list[bytes]:
    return [rng.randbytes(rng.randrange(200)) for _ in range(rng.randrange(1, 5))]


def _bomb(rng: random.Random) -> list[bytes]:
    return [b"raw", bomb(rng), _PIXELS]


def _not_numbers(rng: random.Random) -> list[bytes]:
    header = {**_FRAME, "type": "float32"}
    return [b"raw", msgpack.packb(header), rng.choice((b"\0\0\xc0\x7f", b"\0\0\x80\xff")) * (SIDE * SIDE)]


def bomb(rng: random.Random) -> bytes:
    """A header that promises, or holds, far more than it should."""
    kind = rng.randrange(6)
    depth = rng.choice((100, 500, 600, 1000, 2000, _LARGEST // 2))
    if kind == 0:  # array, map, text, bytes or extension of four thousand million
        return bytes([rng.choice((0xDD, 0xDF, 0xDB, 0xC6, 0xC9))]) + b"\xff" * 4 + rng.randbytes(20)
    if kind == 1:
        return b"\x91" * depth + b"\xc0"
    if kind == 2:
        return b"\x81\xa1x" * depth + b"\xc0"
    if kind == 3:  # in a header that is in order otherwise
        return b"\x85" + _HEADER[1:] + b"\xa1x" + b"\x91" * min(depth, _LARGEST - 100) + b"\xc0"
    if kind == 4:
        return b'{"x":' + b"[" * min(depth, _LARGEST - 5)
    return (
        b"\x81\xa1x"
        + b"\xc6"
        + (2 * _LARGEST).to_bytes(4, "big")
        + bytes(rng.randrange(_LARGEST, 2 * _LARGEST))
    )


# -- for a control socket ----------------------------------------------------------------


def _absurd_order(rng: random.Random) -> list[bytes]:
    order = rng.choice(
        (
            {}, {"do": None}, {"do": "nothing"}, {"do": ["status"]}, {"do": {"status": 1}}, {"do": "x" * 60_000},
            {"do": "swap"}, {"do": "swap", "engine": 1}, {"do": "swap", "engine": ""}, {"do": "swap", "engine": "\0"},
            {"do": "swap", "engine": "/nowhere.onnx"}, {"do": "swap", "engine": "/" + "x" * 5000 + ".onnx"},
            {"do": "swap", "engine": "/dev/zero"}, {"do": "swap-back"}, [], 1, "status",
        )
    )  # fmt: skip
    return [b"", msgpack.packb(order)]


def _cut_order(rng: random.Random) -> list[bytes]:
    order = msgpack.packb({"do": "status"})
    return [b"", order[: rng.randrange(len(order))]]


def _not_asked(rng: random.Random) -> list[bytes]:
    """Parts that no question has."""
    order = msgpack.packb({"do": "status"})
    return rng.choice(([b""], [order], [b"x", order], [b"", order, order], [b""] * 50))


def _random_order(rng: random.Random) -> list[bytes]:
    return [b"", rng.randbytes(rng.randrange(200))]


def _order_bomb(rng: random.Random) -> list[bytes]:
    return [b"", bomb(rng)[:LARGEST_QUESTION]]


_MESSAGES: dict[str, Callable[[random.Random], list[bytes]]] = {
    "truncated": _truncated, "one bit flipped": _flipped, "absurd header": _absurd,
    "wrong number of parts": _wrong_parts, "random bytes": _random, "bomb": _bomb,
    "pixels that are no numbers": _not_numbers,
}  # fmt: skip
_QUESTIONS: dict[str, Callable[[random.Random], list[bytes]]] = {
    "truncated": _cut_order, "absurd order": _absurd_order, "wrong number of parts": _not_asked,
    "random bytes": _random_order, "bomb": _order_bomb,
}  # fmt: skip
_KINDS, _QUESTION_KINDS = list(_MESSAGES), list(_QUESTIONS)
