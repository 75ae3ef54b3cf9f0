"""What a training run writes down while it goes on."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

COLUMNS = ("step", "seconds", "learning_rate", "loss", "validation_psnr_db")


class Log:
    """OUTDIR/log.csv, and TensorBoard's files beside it if that is installed."""

    def __init__(self, out: Path, step: int) -> None:
        """Go on after `step`: what a kill has undone is taken out."""
        path = out / "log.csv"
        rows: list[list[str]] = []
        if path.exists():
            with path.open(newline="") as file:
                rows = [row for row in csv.reader(file) if row and row[0].isdigit() and int(row[0]) <= step]
        self._path = path
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *rows])
        self._board = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        self._board = SummaryWriter(str(out), purge_step=step + 1)

    def write(self, *row: Any) -> None:
        """One value for each of `COLUMNS`; None where there is none."""
        with self._path.open("a", newline="") as file:
            csv.writer(file).writerow(row)
        if self._board is not None:
            for name, value in zip(COLUMNS[1:], row[1:], strict=True):
                if value is not None:
                    self._board.add_scalar(name, float(value), row[0])

    def close(self) -> None:
        if self._board is not None:
            self._board.close()
