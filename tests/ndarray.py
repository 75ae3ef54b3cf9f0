"""NTNDArrays, and a channel that serves them, made with p4p and nothing of ours."""

from __future__ import annotations

from typing import Any

import numpy as np
from p4p import Value
from p4p.nt import NTNDArray
from p4p.server import Server
from p4p.server.raw import SharedPV

TYPE = NTNDArray().type
FIELDS = {
    "int8": "byteValue", "int16": "shortValue", "int32": "intValue", "int64": "longValue",
    "uint8": "ubyteValue", "uint16": "ushortValue", "uint32": "uintValue", "uint64": "ulongValue",
    "float32": "floatValue", "float64": "doubleValue", "bool": "booleanValue",
}  # fmt: skip
SCALAR_TYPES = {"int8": 1, "int16": 2, "int32": 3, "int64": 4, "uint8": 5, "uint16": 6, "uint32": 7, "uint64": 8,
                "float32": 9, "float64": 10}  # fmt: skip


def frame(number: int, pixels: np.ndarray, colour: int = 0, **fields: Any) -> Value:
    known = {
        "value": (FIELDS[pixels.dtype.name], pixels.reshape(-1)),
        "codec": {"parameters": SCALAR_TYPES.get(pixels.dtype.name, 0)},
        "compressedSize": pixels.nbytes,
        "uncompressedSize": pixels.nbytes,
        "uniqueId": number,
        "dataTimeStamp": {"secondsPastEpoch": 1_772_366_400 + number, "nanoseconds": 5},
        "dimension": [{"size": n, "offset": 0, "fullSize": n, "binning": 1} for n in reversed(pixels.shape)],
        "attribute": [{"name": "ColorMode", "value": colour}, {"name": "Temperature", "value": -30.5}],
    }
    return Value(TYPE, known | fields)


def compressed(number: int, pixels: np.ndarray, codec: str, data: bytes, **fields: Any) -> Value:
    return frame(
        number,
        pixels,
        value=("ubyteValue", np.frombuffer(data, np.uint8)),
        codec={"name": codec, "parameters": SCALAR_TYPES[pixels.dtype.name]},
        compressedSize=len(data),
        **fields,
    )


class Channel:
    """A server with one channel, on this machine only. It opens with its first value."""

    def __init__(self, name: str, port: int) -> None:
        self._pv = SharedPV()
        self.is_open = False
        self._server = Server(
            providers=[{name: self._pv}],
            useenv=False,
            conf={
                "EPICS_PVAS_INTF_ADDR_LIST": "127.0.0.1",
                "EPICS_PVAS_SERVER_PORT": str(port),
                "EPICS_PVAS_BROADCAST_PORT": "0",
                "EPICS_PVAS_AUTO_BEACON_ADDR_LIST": "NO",
            },
        )

    def post(self, value: Value) -> None:
        if self.is_open:
            self._pv.post(value)
        else:
            self._pv.open(value)
            self.is_open = True

    def close(self) -> None:
        self._server.stop()
