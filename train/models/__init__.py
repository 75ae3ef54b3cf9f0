"""The networks. Every one maps counts (B, 1, H, W) to expected counts (B, 1, H, W).

| name    | parameters, biased   | field of view | multiplications per pixel |                        |
|---------|----------------------|---------------|---------------------------|------------------------|
| DnCNN   | 668,225              | 41 px         | 664,704                   |                        |
| DURR    | 233,440              | 45 px         | 87,104                    |                        |
| UNet    | 352,737              | 221 px        | 54,176                    | base 32, four scales   |
|         | 5,613,441            | 221 px        | 862,976                   | base 128, four scales  |
|         | 70,514,817           | 893 px        | 936,704                   | base 128, six scales   |

A new network is a `Network` in a module of its own and a line in `NETWORKS`; it is done
when tests/train/test_models.py passes.
"""

from __future__ import annotations

import inspect
from typing import Any

from train.models.cost import macs_per_pixel, parameters
from train.models.dncnn import DnCNN
from train.models.durr import DURR
from train.models.network import BiasFreeBatchNorm, Network
from train.models.unet import UNet

NETWORKS: dict[str, type[Network]] = {"UNet": UNet, "DnCNN": DnCNN, "DURR": DURR}

__all__ = [
    "DURR",
    "NETWORKS",
    "BiasFreeBatchNorm",
    "DnCNN",
    "Network",
    "UNet",
    "build",
    "macs_per_pixel",
    "parameters",
]


def build(name: str, **arguments: Any) -> Network:
    """The network `name`, untrained: ``build("UNet", base=64, scales=4, bias=True)``."""
    if name not in NETWORKS:
        raise ValueError(f"no network {name!r}; there are {', '.join(NETWORKS)}")
    known = inspect.signature(NETWORKS[name]).parameters
    if unknown := sorted(set(arguments) - set(known)):
        raise ValueError(f"{name} has no {', '.join(unknown)}; it takes {', '.join(known)}")
    return NETWORKS[name](**arguments)
