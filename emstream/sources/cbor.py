"""CBOR (RFC 8949) as cameras speak it, with byte strings left where they are.

Made for messages that are nearly all pixels: these are not copied, and what surrounds them may
have so many items and so many levels and no more, so that a message takes no more memory than a
few times its size, whatever it holds. Tags come as `Tag`, uninterpreted; keys are texts.
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

from emstream.errors import MalformedFrame

MAX_ITEMS = 50_000
_MAX_DEPTH = 16
_UINT, _NEGATIVE, _BYTES, _TEXT, _ARRAY, _MAP, _TAG, _OTHER = range(8)
_INDEFINITE = 31
_BREAK = object()
_FLOATS = {25: struct.Struct(">e"), 26: struct.Struct(">f"), 27: struct.Struct(">d")}
_SIMPLE = {20: False, 21: True, 22: None, 23: None}


class Tag(NamedTuple):
    number: int
    value: Any


def loads(data: bytes | memoryview) -> Any:
    """The one item that `data` holds, byte strings as views of it. Raises MalformedFrame and nothing else."""
    reader = _Reader(memoryview(data))
    try:
        value = reader.item(0)
    except (IndexError, struct.error):
        raise MalformedFrame("CBOR ends in mid-item") from None
    except UnicodeDecodeError:
        raise MalformedFrame("CBOR has a text that is not UTF-8") from None
    if value is _BREAK or reader.at != len(data):
        raise MalformedFrame("CBOR has bytes behind its end")
    return value


class _Reader:
    """Walks over `data`, of which the first `at` bytes are read."""

    __slots__ = ("at", "data", "left")

    def __init__(self, data: memoryview) -> None:
        self.data = data
        self.at = 0
        self.left = MAX_ITEMS

    def item(self, depth: int) -> Any:
        self.left -= 1
        if self.left < 0 or depth > _MAX_DEPTH:
            raise MalformedFrame("CBOR has too many items or levels")
        first = self.data[self.at]
        self.at += 1
        major, info = first >> 5, first & 31
        if info < 24:
            number = info
        elif info < 28 and major != _OTHER:
            number = int.from_bytes(self.take(1 << (info - 24)), "big")
        elif info == _INDEFINITE and major in (_BYTES, _TEXT, _ARRAY, _MAP, _OTHER):
            return _BREAK if major == _OTHER else self.indefinite(major, depth)
        elif major != _OTHER:
            raise MalformedFrame("CBOR has a length that means nothing")
        if major == _UINT:
            return number
        if major == _TEXT:
            return str(self.take(number), "utf-8")
        if major == _BYTES:
            return self.take(number)
        if major == _ARRAY:
            return [self.inner(depth) for _ in range(min(number, MAX_ITEMS + 1))]
        if major == _MAP:
            return {self.key(depth): self.inner(depth) for _ in range(min(number, MAX_ITEMS + 1))}
        if major == _TAG:
            return Tag(number, self.inner(depth))
        return -1 - number if major == _NEGATIVE else self.other(info)

    def take(self, nbytes: int) -> memoryview:
        start, self.at = self.at, self.at + nbytes
        if self.at > len(self.data):
            raise IndexError
        return self.data[start : self.at]

    def inner(self, depth: int) -> Any:
        value = self.item(depth + 1)
        if value is _BREAK:
            raise MalformedFrame("CBOR has a break out of place")
        return value

    def key(self, depth: int) -> str:
        value = self.item(depth + 1)
        if not isinstance(value, str):
            raise MalformedFrame("CBOR has a map with a key that is no text")
        return value

    def other(self, info: int) -> Any:
        if info in _FLOATS:
            return _FLOATS[info].unpack(self.take(_FLOATS[info].size))[0]
        if info not in _SIMPLE:
            raise MalformedFrame("CBOR has a simple value that means nothing")
        return _SIMPLE[info]

    def indefinite(self, major: int, depth: int) -> Any:
        """Items up to a break."""
        items: list[Any] = []
        while (value := self.item(depth + 1)) is not _BREAK:
            items.append(value)
        if major == _ARRAY:
            return items
        if major == _MAP:
            keys, values = items[::2], items[1::2]
            if len(keys) != len(values) or not all(isinstance(key, str) for key in keys):
                raise MalformedFrame("CBOR has a map with a key that is no text")
            return dict(zip(keys, values, strict=True))
        kind = str if major == _TEXT else memoryview
        if not all(isinstance(each, kind) for each in items):
            raise MalformedFrame("CBOR has a string of pieces that are none")
        return "".join(items) if major == _TEXT else memoryview(b"".join(items))
