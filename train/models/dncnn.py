"""DnCNN (Zhang et al., arXiv 1608.03981) as the paper compares with it: depth 20, not residual."""

from __future__ import annotations

from torch import Tensor, nn

from train.models.network import Network, at_least, norm


class DnCNN(Network):
    """3x3 convolutions at full resolution, zero padding, norms on all but the first and the last."""

    multiple_px = 1

    def __init__(self, base: int = 64, bias: bool = False, depth: int = 20) -> None:
        super().__init__()
        at_least(1, base=base)
        at_least(3, depth=depth)
        self.depth, self.bias_free = depth, not bias
        self.description = f"DnCNN, {depth} layers of {base} channels"
        layers: list[nn.Module] = [nn.Conv2d(1, base, 3, padding=1, bias=bias), nn.ReLU()]
        for _ in range(depth - 2):
            layers.append(nn.Conv2d(base, base, 3, padding=1, bias=bias))
            layers.append(norm(base, bias))
            layers.append(nn.ReLU())
        layers.append(nn.Conv2d(base, 1, 3, padding=1, bias=bias))
        self.layers = nn.Sequential(*layers)

    def narrow(self) -> DnCNN:
        return DnCNN(1, not self.bias_free, self.depth)

    def forward(self, counts: Tensor) -> Tensor:
        return self.layers(counts)
