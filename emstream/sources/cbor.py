"""CBOR (RFC 8949) as cameras speak it, with byte strings left where they are.

Made for messages that are nearly all pixels: these are not copied, and what surrounds them may
have so many bytes, items and levels and no more, so that a message takes no more memory than a
few times its size, whatever it holds. Tags come as `Tag`, uninterpreted; keys are texts.
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

from emstream.errors import MalformedFrame
from emstream.wire import DEFAULT_MAX_FRAME_BYTES, DEFAULT_MAX_HEADER_BYTES

MAX_ITEMS = 50_000
COMPRESSED = 56500
"""The tag around [algorithm, element, bytes]."""
_TYPED = range(64, 88)  # tags around the bytes of an array: RFC 8746
_MAX_DEPTH = 16
_UINT, _NEGATIVE, _BYTES, _TEXT, _ARRAY, _MAP, _TAG, _OTHER = range(8)
_INDEFINITE, _BREAK, _SHORT_TEXT = 31, 0xFF, 0x60
_NUMBERS = {
    24: struct.Struct(">B"),
    25: struct.Struct(">H"),
    26: struct.Struct(">I"),
    27: struct.Struct(">Q"),
}
_FLOATS = {25: struct.Struct(">e"), 26: struct.Struct(">f"), 27: struct.Struct(">d")}
_SIMPLE = {20: False, 21: True, 22: None, 23: None}


class Tag(NamedTuple):
    number: int
    value: Any


def loads(
    data: bytes | memoryview,
    max_header_bytes: int = DEFAULT_MAX_HEADER_BYTES,
    max_array_bytes: int = DEFAULT_MAX_FRAME_BYTES,
) -> Any:
    """The one item that `data` holds, byte strings as views of it. Raises MalformedFrame and nothing else.

    An array may have `max_array_bytes`, and all that is none `max_header_bytes` together.
    """
    reader = _Reader(memoryview(data), max_header_bytes, max_array_bytes)
    try:
        value, end = reader.item(0, 0)
        reader.check(end)
    except (IndexError, struct.error):
        raise MalformedFrame("CBOR ends in mid-item") from None
    except UnicodeDecodeError:
        raise MalformedFrame("CBOR has a text that is not UTF-8") from None
    if end != len(data):
        raise MalformedFrame("CBOR has bytes behind its end")
    return value


class _Reader:
    """Reads items of `data`; every method is told where one begins, and returns where it ends, too."""

    __slots__ = ("data", "left", "length", "limit", "max_array_bytes", "max_header_bytes")

    def __init__(self, data: memoryview, max_header_bytes: int, max_array_bytes: int) -> None:
        self.data = data
        self.length = len(data)
        self.left = MAX_ITEMS
        self.max_header_bytes, self.max_array_bytes = max_header_bytes, max_array_bytes
        self.limit = max_header_bytes  # where the message must end, as far as its arrays are known

    def item(self, at: int, depth: int) -> tuple[Any, int]:
        first = self.data[at]
        at += 1
        major, number = first >> 5, first & 31
        if number > 23:
            if major == _OTHER:
                return self.other(number, at)
            if number == _INDEFINITE:
                return self.indefinite(major, at, depth)
            if number not in _NUMBERS:
                raise MalformedFrame("CBOR has a length that means nothing")
            layout = _NUMBERS[number]
            (number,) = layout.unpack_from(self.data, at)
            at += layout.size
        if major == _UINT:
            return number, at
        if major == _TEXT:
            end = at + number
            if end > self.length:
                raise IndexError
            if end > self.limit:
                self.check(end)
            return str(self.data[at:end], "utf-8"), end
        if major == _BYTES:
            end = at + number
            if end > self.length:
                raise IndexError
            return self.data[at:end], end
        if major == _NEGATIVE:
            return -1 - number, at
        if major == _OTHER:
            return self.other(number, at)
        self.spend(1 if major == _TAG else number, depth)
        if major == _TAG:
            value, at = self.item(at, depth + 1)
            if number in _TYPED or number == COMPRESSED:
                self.count(value)
            return Tag(number, value), at
        if major == _ARRAY:
            items = []
            for _ in range(number):
                value, at = self.item(at, depth + 1)
                items.append(value)
            return items, at
        found = {}
        for _ in range(number):
            first = self.data[at]
            if _SHORT_TEXT <= first < _SHORT_TEXT + 24:  # nearly every key is
                end = at + 1 + first - _SHORT_TEXT
                key, at = str(self.data[at + 1 : end], "utf-8"), end
            else:
                key, at = self.item(at, depth + 1)
            if not isinstance(key, str):
                raise MalformedFrame("CBOR has a map with a key that is no text")
            found[key], at = self.item(at, depth + 1)
        return found, at

    def check(self, at: int) -> None:
        """Refuse a message whose header is too large already."""
        if at > self.limit:
            raise MalformedFrame(
                f"header, all but the arrays, exceeds the limit of {self.max_header_bytes} bytes"
            )

    def count(self, array: Any) -> None:
        """Compressed, noise takes more room than its pixels: how many these are is checked where they are unpacked."""
        if isinstance(array, memoryview):
            self.limit += len(array)
            if len(array) > self.max_array_bytes:
                raise MalformedFrame(f"array is larger than the limit of {self.max_array_bytes} bytes")
        elif isinstance(array, list) and array and isinstance(array[-1], memoryview):
            self.limit += len(array[-1])

    def spend(self, items: int, depth: int) -> None:
        self.left -= items
        if self.left < 0 or depth > _MAX_DEPTH:
            raise MalformedFrame("CBOR has too many items or levels")

    def other(self, info: int, at: int) -> tuple[Any, int]:
        if info in _FLOATS:
            (value,) = _FLOATS[info].unpack_from(self.data, at)
            return value, at + _FLOATS[info].size
        if info not in _SIMPLE:
            raise MalformedFrame("CBOR has a simple value that means nothing, or a break out of place")
        return _SIMPLE[info], at

    def indefinite(self, major: int, at: int, depth: int) -> tuple[Any, int]:
        """Items up to a break."""
        items: list[Any] = []
        while self.data[at] != _BREAK:
            self.spend(1, depth)
            value, at = self.item(at, depth + 1)
            items.append(value)
        at += 1
        if major == _ARRAY:
            return items, at
        if major == _MAP:
            keys, values = items[::2], items[1::2]
            if len(keys) != len(values) or not all(isinstance(key, str) for key in keys):
                raise MalformedFrame("CBOR has a map with a key that is no text")
            return dict(zip(keys, values, strict=True)), at
        if major == _TEXT and all(isinstance(each, str) for each in items):
            return "".join(items), at
        if major == _BYTES and all(isinstance(each, memoryview) for each in items):
            return memoryview(b"".join(items)), at
        raise MalformedFrame("CBOR has a length that means nothing")
