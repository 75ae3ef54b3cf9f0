"""PSNR and SSIM on specimens the network has not seen: ``python -m train.evaluate ENGINE data/test``.

Peak 1 electron, as in the paper: estimate and truth are clipped to [0, 1], times 255,
scored by scikit-image with a data range of 255, per image, then mean and standard
deviation. At doses other than 0.45 electrons/pixel estimates are first brought to 0.45,
so that the figures compare.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from tqdm import tqdm

from emstream import load_engine
from train.dataset import Images
from train.noise import PAPER_DOSE, expose

VIEW_PX = 512
Denoiser = Callable[[np.ndarray], np.ndarray]


def psnr_ssim(estimate: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """PSNR [dB] and SSIM of one image (H, W) in electrons, peak 1 electron."""
    a, b = (255.0 * np.clip(image, 0, 1) for image in (truth, estimate))
    return peak_signal_noise_ratio(a, b, data_range=255), structural_similarity(a, b, data_range=255)


def evaluate(denoisers: dict[str, Denoiser], views: Iterable[np.ndarray], dose: float) -> dict[str, Any]:
    """Score `denoisers` on noisy `views` (H, W; 1 in vacuum): {name: {psnr_db, psnr_sd, ssim, ssim_sd}}."""
    generator = torch.Generator().manual_seed(11)
    scores: dict[str, list[tuple[float, float]]] = {name: [] for name in denoisers}
    for view in views:
        truth = torch.from_numpy(view)[None, None]
        counts = expose(truth, torch.tensor([dose]), generator)[0, 0].numpy()
        for name, denoise in denoisers.items():
            estimate = denoise(counts) * (PAPER_DOSE / dose)
            scores[name].append(psnr_ssim(estimate, PAPER_DOSE * view))
    report = {}
    for name, values in scores.items():
        psnr, ssim = np.array(values).T
        report[name] = {
            "psnr_db": round(float(psnr.mean()), 2), "psnr_sd": round(float(psnr.std()), 2),
            "ssim": round(float(ssim.mean()), 3), "ssim_sd": round(float(ssim.std()), 3),
            "images": len(values),
        }  # fmt: skip
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", type=Path)
    parser.add_argument("test", type=Path, help="a directory made by train.simulate, of unseen seeds")
    parser.add_argument("--doses", type=float, nargs="+", default=[PAPER_DOSE])
    parser.add_argument("--every", type=int, default=1, help="use every n-th image")
    arguments = parser.parse_args()
    engine = load_engine(arguments.engine)
    images = Images(arguments.test)
    for dose in arguments.doses:
        indices = range(0, len(images), arguments.every)
        views = (images.central_views(VIEW_PX, [index])[0, 0].numpy() for index in indices)
        views = tqdm(views, total=len(indices), unit="image", desc=f"{dose} e/px", mininterval=5)
        scores = evaluate({"noisy": lambda counts: counts, engine.name: engine.denoise}, views, dose)
        print(json.dumps({"dose": dose, "engine": engine.identity, **scores}))


if __name__ == "__main__":
    main()
