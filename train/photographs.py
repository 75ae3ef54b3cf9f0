"""Photographs for the paper's table (b): ``python -m train.photographs RUN/best.pt``.

They come with scikit-image, scikit-learn, PyWavelets and matplotlib; nothing is downloaded. Which is for
what is fixed below, by name. No scene is on two sides: PyWavelets' camera is scikit-image's and left out,
and the two views of one motorcycle are both for training. Twelve are few beside the thousands that denoisers of
photographs learn from; they show what a field of view is worth, not the best PSNR.

Noise is Gaussian, its standard deviation drawn from the recipe's noise_sigma, [0, 100] grey levels of 255 as in
Mohan et al. (ICLR 2020), and scores are at 30 and 70. Neither noisy nor denoised images are rounded.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from train.command import explained

TRAINING = (
    "PyWavelets/aero", "PyWavelets/ascent", "scikit-image/brick.png", "scikit-image/coins.png",
    "scikit-image/grass.png", "scikit-image/gravel.png", "scikit-image/ihc.png", "scikit-image/moon.png",
    "scikit-image/motorcycle_left.png", "scikit-image/motorcycle_right.png", "scikit-image/retina.jpg",
    "scikit-image/rocket.jpg",
)  # fmt: skip
VALIDATION = ("matplotlib/grace_hopper.jpg", "scikit-learn/flower.jpg")
TEST = (
    "scikit-image/astronaut.png", "scikit-image/camera.png", "scikit-image/chelsea.png", "scikit-image/coffee.png",
    "scikit-learn/china.jpg",
)  # fmt: skip
TEST_SIGMAS = (30.0, 70.0)  # grey levels of 255
SIZES = (1.0, 0.8, 0.65, 0.5)  # training photographs are shrunk to these, too
FOLDERS = {
    "PyWavelets": ("pywt", "data"),
    "matplotlib": ("matplotlib", "mpl-data/sample_data"),
    "scikit-image": ("skimage", "data"),
    "scikit-learn": ("sklearn", "datasets/images"),
}


def read(name: str) -> Tensor:
    """The photograph `name` (H, W), float32, grey levels in [0, 255]."""
    package, file = name.split("/")
    module, folder = FOLDERS[package]
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"photographs come with {package}: pip install {' '.join(FOLDERS)}")
    path = Path(spec.origin).parent / folder / file
    if package == "PyWavelets":
        return torch.from_numpy(np.load(path.with_suffix(".npz"))["data"]).float()
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image.convert("L"))).float()


class Photographs:
    """Photographs at several sizes in memory, and random crops of them."""

    def __init__(self, names: tuple[str, ...] = TRAINING, device: torch.device | str = "cpu") -> None:
        self.images = []
        for image in map(read, names):
            for size in SIZES:
                shape = [round(size * side) for side in image.shape]
                small = F.interpolate(image[None, None], shape, mode="bicubic", antialias=True)[0, 0]
                self.images.append((small if size < 1 else image).clamp(0, 255).to(device))

    def random_views(self, count: int, size_px: int, generator: torch.Generator) -> Tensor:
        """Crops (count, 1, size_px, size_px), turned and mirrored; larger photographs are cropped more often."""
        images = [image for image in self.images if min(image.shape) >= size_px]
        if not images:
            raise ValueError(f"no photograph has {size_px} x {size_px} pixels")
        device = generator.device
        pixels = torch.tensor([float(image.numel()) for image in images], device=device)
        chosen = torch.multinomial(pixels, count, replacement=True, generator=generator).tolist()
        places = torch.rand(count, 3, device=device, generator=generator).tolist()
        crops = []
        for index, (down, right, turn) in zip(chosen, places, strict=True):
            height, width = images[index].shape
            top, left = int(down * (height - size_px + 1)), int(right * (width - size_px + 1))
            crop = images[index][top : top + size_px, left : left + size_px]
            quarters, mirrored = divmod(int(8 * turn), 2)
            crops.append(torch.rot90(crop.flip(1) if mirrored else crop, quarters))
        return torch.stack(crops)[:, None]


def held_out(generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    """Noisy and clean validation photographs (1, 1, 384, 384), white is 1, at each test sigma."""
    pairs = []
    for name in VALIDATION:
        image = read(name)
        top, left = ((side - 384) // 2 for side in image.shape)
        clean = image[None, None, top : top + 384, left : left + 384] / 255
        for sigma in TEST_SIGMAS:
            pairs.append((clean + sigma / 255 * torch.randn(clean.shape, generator=generator), clean))
    return pairs


def evaluate(denoise: Callable[[np.ndarray], np.ndarray]) -> dict[str, dict[str, float]]:
    """PSNR [dB] and SSIM of `denoise` on the test photographs, whole: {sigma: {psnr_db, psnr_sd, ssim, ssim_sd}}."""
    generator = torch.Generator().manual_seed(11)
    report = {}
    for sigma in TEST_SIGMAS:
        scores: list[tuple[float, float]] = []
        for clean in map(read, TEST):
            noisy = clean + sigma * torch.randn(clean.shape, generator=generator)
            pair = clean.numpy(), np.clip(denoise(noisy.numpy()), 0, 255)
            scores.append(
                (
                    peak_signal_noise_ratio(*pair, data_range=255),
                    structural_similarity(*pair, data_range=255),
                )
            )
        mean, sd = np.mean(scores, axis=0), np.std(scores, axis=0)
        report[f"{sigma:.0f}"] = {
            "psnr_db": round(float(mean[0]), 2), "psnr_sd": round(float(sd[0]), 2),
            "ssim": round(float(mean[1]), 3), "ssim_sd": round(float(sd[1]), 3), "images": len(scores),
        }  # fmt: skip
    return report


@explained
def main() -> None:
    from train.recipe import load

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    arguments = parser.parse_args()
    recipe, network, _ = load(arguments.checkpoint)
    if recipe.task != "photographs":
        raise ValueError(
            f"{arguments.checkpoint} was not trained on photographs; see python -m train.evaluate"
        )
    network.eval()
    multiple = network.multiple_px

    @torch.no_grad()
    def denoise(noisy: np.ndarray) -> np.ndarray:
        height, width = noisy.shape
        x = torch.from_numpy(noisy / 255)[None, None]
        x = F.pad(x, (0, -width % multiple, 0, -height % multiple), mode="replicate")
        return 255 * network(x)[0, 0, :height, :width].numpy()

    print(json.dumps({"noisy": evaluate(lambda noisy: noisy), "network": evaluate(denoise)}))


if __name__ == "__main__":
    main()
