"""What a network costs, counted and not timed."""

from __future__ import annotations

import copy

import torch
from torch.utils.flop_counter import FlopCounterMode

from train.models.network import Network


def parameters(network: Network) -> int:
    """Parameters of `network`, counted as in the paper: with the shifts of the norms, used or not."""
    return sum(parameter.numel() for parameter in network.parameters())


def macs_per_pixel(network: Network) -> int:
    """Multiplications of the convolutions per input pixel. Nothing is computed: the twin has no memory."""
    twin = copy.deepcopy(network).to("meta").eval()
    side = 4 * network.multiple_px
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        twin(torch.empty(1, 1, side, side, device="meta"))
    return counter.get_total_flops() // 2 // side**2
