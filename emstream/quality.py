"""How good a denoised picture is: against a truth that is known, as of the simulated specimen."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from emstream.errors import EngineInvalid
from emstream.inference.engine import Engine
from emstream.sources.specimen import MovingSpecimen

_TEST_FRAMES = (0, 1000, 2222, 5555)
_TEST_DOSE = 0.45  # electrons per pixel, as on an engine's card
_BLOCK_PX = 8
_FAR_FROM_CARD_DB = 3.0  # pictures of another specimen differ by less


def psnr_db(estimate: np.ndarray, truth: np.ndarray) -> float:
    """Peak signal-to-noise ratio [dB], peak 1 electron, both clipped to 0-1 electrons."""
    error = np.clip(estimate, 0, 1) - np.clip(truth, 0, 1)
    return float(-10 * np.log10(np.mean(np.square(error, dtype=np.float64))))


@dataclass(frozen=True)
class SelfTest:
    """What an engine made of frames whose truth is known."""

    blurred_psnr_db: float
    """Of the same frames when blocks of 8x8 pixels are averaged."""
    psnr_db: float
    card_psnr_db: float | None
    """On the test images of its training."""

    @property
    def far_from_card(self) -> bool:
        """Whether it does much worse than its card says: another material, or not the network it should be."""
        return self.card_psnr_db is not None and self.psnr_db < self.card_psnr_db - _FAR_FROM_CARD_DB

    def report(self) -> dict[str, Any]:
        return {name: None if db is None else round(db, 2) for name, db in asdict(self).items()}


def self_test(engine: Engine) -> SelfTest:
    """Denoise four simulated frames of 0.45 electrons per pixel.

    Raises EngineInvalid when the result is not finite, or no better than the mean of 8x8 pixels: a
    network is, whatever specimen it was trained for. An engine without a card may do as it likes.
    """
    shape, dtype = engine.made_for or ((512, 512), np.dtype(np.uint8))
    specimen = MovingSpecimen(dose=_TEST_DOSE, height=shape[0], width=shape[1])
    blurred, denoised = [], []
    for number in _TEST_FRAMES:
        counts, truth = specimen.counts(number), specimen.intensity(number)
        estimate = engine.denoise(counts.astype(dtype))
        if not np.isfinite(estimate).all():
            raise EngineInvalid(f"{engine.name} fails its self-test: it makes NaN or infinite pixels")
        blurred.append(psnr_db(_blur(counts), truth))
        denoised.append(psnr_db(estimate, truth))
    card_db = engine.card.psnr_db if engine.card else None
    test = SelfTest(float(np.mean(blurred)), float(np.mean(denoised)), card_db)
    if engine.card and test.psnr_db <= test.blurred_psnr_db:
        raise EngineInvalid(
            f"{engine.name} fails its self-test: {test.psnr_db:.1f} dB on simulated frames that averaging 8x8 pixels "
            f"brings to {test.blurred_psnr_db:.1f} dB; its card says {engine.card.psnr_db:.1f} dB"
        )
    return test


def _blur(counts: np.ndarray) -> np.ndarray:
    """Blocks of 8x8 pixels (H, W), what is left over at the edges too, replaced by their mean."""
    rows, columns = (np.arange(0, side, _BLOCK_PX) for side in counts.shape)
    sums = np.add.reduceat(np.add.reduceat(counts, rows, axis=0, dtype=np.float32), columns, axis=1)
    sizes = [
        np.diff(np.append(starts, side)) for starts, side in zip((rows, columns), counts.shape, strict=True)
    ]
    means = sums / np.outer(*sizes)
    return means.repeat(sizes[0], axis=0).repeat(sizes[1], axis=1)
