"""Averaging pixels down: no viewer is sent more of them than its screen shows."""

from __future__ import annotations

import numpy as np

from emstream.view.request import Request

_MOST_SENT_PX = 2048  # of a side


def cut(image: np.ndarray, request: Request) -> tuple[np.ndarray, tuple[int, int, int, int]]:
    """The region of `image` (H, W) that `request` shows, averaged down to its screen.

    Returns the pixels (h, w) and the region they stand for: (top, left, height, width) [px of the image].
    """
    top, left, height, width = region_of(image.shape, request)
    factor = max(1, round(max(height / request.screen[0], width / request.screen[1])))
    factor = min(max(factor, -(-max(height, width) // _MOST_SENT_PX)), height, width)
    small = average_squares(image[top : top + height, left : left + width], factor)
    return small, (top, left, small.shape[0] * factor, small.shape[1] * factor)


def region_of(shape: tuple[int, ...], request: Request) -> tuple[int, int, int, int]:
    """The part of an image of `shape` that `request` asks for; all of it when there is no such part."""
    if request.region is None:
        return 0, 0, shape[0], shape[1]
    top, left, height, width = request.region
    height, width = min(height, shape[0] - top), min(width, shape[1] - left)
    return (top, left, height, width) if height > 0 and width > 0 else (0, 0, shape[0], shape[1])


@np.errstate(over="ignore", invalid="ignore")
def average_squares(image: np.ndarray, factor: int) -> np.ndarray:
    """Average squares of `factor` x `factor` pixels into one.

    Rows and columns at the end that fill no square are left out.
    """
    factor = min(factor, *image.shape)
    if factor == 1:
        return image
    rows, columns = (length // factor * factor for length in image.shape)
    total = np.zeros((rows // factor, columns // factor), np.float32)
    for row in range(factor):  # strided sums: four times faster than mean() over a reshaped view
        for column in range(factor):
            total += image[row:rows:factor, column:columns:factor]
    total /= factor**2
    return total
