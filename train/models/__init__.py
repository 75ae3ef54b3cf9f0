"""The networks. Every one maps counts (B, 1, H, W) to expected counts (B, 1, H, W)."""

from train.models.unet import UNet

__all__ = ["UNet"]
