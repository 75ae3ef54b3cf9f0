"""Batch norms folded into the convolutions before them, as engines ship, and read back for training to go on."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from train.models.network import BiasFreeBatchNorm


@torch.no_grad()
def fold_norms(network: nn.Module) -> None:
    """Multiply each batch norm's gain into the convolution before it, add its shift to the bias, and drop the norm."""
    for block in [module for module in network.modules() if isinstance(module, nn.Sequential)]:
        for place, norm in enumerate(block):
            if isinstance(norm, nn.BatchNorm2d):
                convolution = block[place - 1]
                gain = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
                convolution.weight.mul_(gain[:, None, None, None])
                if not isinstance(norm, BiasFreeBatchNorm):
                    convolution.bias.sub_(norm.running_mean).mul_(gain).add_(norm.bias)
                block[place] = nn.Identity()


@torch.no_grad()
def load_folded(network: nn.Module, folded: Mapping[str, Tensor]) -> None:
    """Give `network`, norms and all, the weights of its like without: the norms then change nothing.

    Raises RuntimeError when `folded` are another network's.
    """
    state = network.state_dict()
    for name, module in network.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
            module.running_var.fill_(1 - module.eps)
            for key in module.state_dict():
                state.pop(f"{name}.{key}")
    if state.keys() != folded.keys():
        raise RuntimeError(f"weights that differ: {', '.join(sorted(state.keys() ^ folded.keys()))}")
    network.load_state_dict(folded, strict=False)
