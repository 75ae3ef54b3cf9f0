"""karabo-bridge 2.2: pairs of parts, as European XFEL's clients read them.

For each source::

    {source, content: msgpack, metadata}, msgpack    {values, msgpack}
    {source, content: array, path, dtype, shape}     pixels, C order

The sources are ``emstream/denoised`` and ``emstream/raw``, their pixels ``image.data``. Every field of
the header is a value, ``header.dose``, those of maps with dots: ``header.engine.name``. The train's
number, ``timestamp.tid``, is the number of the frame.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from emstream.frame import now_ns
from emstream.outputs.sockets import Buffer
from emstream.wire import pack

_OF_PIXELS = {"htype", "shape", "type", "endianness", "encoding"}


def parts(pictures: Mapping[str, tuple[Mapping[str, Any], np.ndarray]]) -> list[Buffer]:
    """The message of one frame, with a source for each of `pictures`."""
    message: list[Buffer] = []
    sent_ns = now_ns()
    for stream, (header, pixels) in pictures.items():
        source, shape = f"emstream/{stream}", list(pixels.shape)
        values = {key: value for key, value in header.items() if key not in _OF_PIXELS}
        message += [
            pack({"source": source, "content": "msgpack", "metadata": _metadata(source, header, sent_ns)}),
            pack({"image.dimensions": shape, **dict(_flat("header", values))}),
            pack(
                {
                    "source": source,
                    "content": "array",
                    "path": "image.data",
                    "dtype": pixels.dtype.name,
                    "shape": shape,
                }
            ),
            pixels.data,
        ]
    return message


def _metadata(source: str, header: Mapping[str, Any], sent_ns: int) -> dict[str, Any]:
    """When the frame was taken, or, where the camera does not say, sent."""
    taken_ns: int = header.get("timestamp_ns", sent_ns)
    seconds, fraction_ns = divmod(taken_ns, 10**9)
    return {
        "source": source,
        "timestamp": taken_ns / 1e9,
        "timestamp.sec": str(seconds),
        "timestamp.frac": f"{fraction_ns:09d}{0:09d}",  # [1e-18 s]
        "timestamp.tid": header["frame"],
        "ignored_keys": [],
    }


def _flat(name: str, values: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(f"{name}.{key}", value)
        else:
            yield f"{name}.{key}", value
