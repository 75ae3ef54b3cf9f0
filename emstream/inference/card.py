"""What a network is for: its card, which travels inside the model file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from emstream.errors import EngineInvalid
from emstream.trust import KnownSpectra


@dataclass(frozen=True, kw_only=True)
class EngineCard:
    """Facts about a trained network, written by ``train.export``."""

    name: str
    architecture: str
    parameters: int
    field_of_view_px: int
    """Side of the square of input pixels that can move one output pixel."""
    multiple_px: int
    """Height and width are padded to multiples of this inside."""
    bias_free: bool
    dose_range: tuple[float, float]
    """Doses it was trained for [electrons/pixel/frame]."""
    sampling_pm: float
    """Pixel size it was trained for [pm]."""
    psnr_db: float
    """On structures it has not seen, at 0.45 electrons/pixel, peak 1 electron."""
    ssim: float
    trained: str
    """Data, schedule and time, in a sentence."""
    commit: str
    training: dict[str, Any] | None = None
    """Specimens it was trained and validated on, commit and date, and the same of weights it began from."""
    spectra: KnownSpectra | None = None
    """Of its training images; None in the cards of earlier engines."""

    def to_metadata(self) -> dict[str, str]:
        """Text entries, one per field, as ONNX metadata wants them."""
        return {key: json.dumps(value) for key, value in asdict(self).items()}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], where: str) -> EngineCard:
        """Read a card back; raises EngineInvalid when `where` holds none or an incomplete one."""
        values: dict[str, Any] = {}
        for field in fields(cls):
            if field.name not in metadata:
                if field.default is None:
                    continue
                raise EngineInvalid(
                    f"{where} is not an emstream engine: its metadata lack {field.name!r}; "
                    "write engines with: python -m train.export"
                )
            try:
                values[field.name] = json.loads(metadata[field.name])
            except ValueError:
                raise EngineInvalid(f"{where}: metadata entry {field.name!r} is not JSON") from None
        try:
            low, high = (float(dose) for dose in values["dose_range"])
            values["dose_range"] = (low, high)
            values["field_of_view_px"] = int(values["field_of_view_px"])
            if values.get("spectra") is not None:
                values["spectra"] = KnownSpectra.read(values["spectra"])
        except (TypeError, ValueError, KeyError):
            raise EngineInvalid(
                f"{where}: the card's dose_range, field_of_view_px or spectra are not numbers"
            ) from None
        return cls(**values)
