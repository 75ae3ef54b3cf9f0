"""`denoise_file`: the engine of the live service, on a movie that is already there."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import emstream
from emstream.compare import Comparison, check_comparison
from emstream.corrections import check_calibration
from emstream.errors import EmstreamError, EngineError, FileFormatError
from emstream.inference.engine import Engine
from emstream.movies import READABLE, Movie, check_output, open_movie, save_movie


def denoise_file(
    input: Path,
    output: Path,
    engine: Engine,
    *,
    gain: float = 1.0,
    offset: float = 0.0,
    dataset: str | None = None,
    overwrite: bool = False,
    compare: Path | None = None,
    rate: float = 10.0,
    on_frame: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Denoise a movie (N, H, W) or an image (H, W) into another file, float32 [electrons/pixel].

    Parameters
    ----------
    input, output
        Any formats of `emstream.movies`. `output` appears when it is whole, and `compare` right after it;
        after an error there is neither.
    engine
        Stays open. Its identity goes with the output, where the format has a place for it.
    gain, offset
        [ADU per electron] and [ADU]: turn a camera's ADU into electrons.
    dataset
        Which one, in a file of several.
    overwrite
        Replace an `output` (and a `compare`) that exists.
    compare, rate
        Raw beside denoised as a film (.mp4, .gif) of so many frames/s, or as a sheet of frames (.png).
    on_frame
        Called with (frames done, frames in all) after each frame.

    Returns
    -------
    Report: frames, shape [N, H, W], seconds, frames_per_s, dose (mean of the movie
    [electrons/pixel/frame]), in_domain (False when the engine was not trained for that dose),
    frames_out_of_domain, engine (its identity), output.

    Raises FileFormatError for files that cannot be read or written and pixels that cannot be
    electron counts (NaN, a negative mean), EngineError when the engine fails, ValueError for a
    gain, offset or rate that makes no sense.
    """
    check_calibration(gain, offset)
    input, output = Path(input), Path(output)
    if output.exists() and input.exists() and output.samefile(input):
        raise FileFormatError(f"{output} is the input itself; choose another name for the output")
    check_output(output, overwrite)
    if compare is not None:
        check_comparison(compare, overwrite, rate)
    start_s = time.perf_counter()
    with open_movie(input, dataset) as movie, contextlib.ExitStack() as stack:
        run = _Run(movie, engine, float(gain), float(offset), on_frame)
        if compare is not None:
            run.comparison = stack.enter_context(
                Comparison(
                    compare,
                    len(movie),
                    rate=rate,
                    pixel_size_m=movie.pixel_size_m,
                    overwrite=overwrite,
                )
            )
        with contextlib.closing(run.expected()) as expected:
            save_movie(
                output,
                expected,
                shape=movie.shape,
                pixel_size_m=movie.pixel_size_m,
                provenance={
                    "software": f"emstream {emstream.__version__}",
                    "engine": engine.identity,
                    "input": input.name,
                    "gain": float(gain),
                    "offset": float(offset),
                },
                as_image=movie.is_image,
                overwrite=overwrite,
            )
        seconds = time.perf_counter() - start_s
        dose = run.electrons / len(movie)
        return {
            "frames": len(movie),
            "shape": list(movie.shape),
            "seconds": round(seconds, 6),
            "frames_per_s": round(len(movie) / seconds, 3),
            "dose": round(dose, 6),
            "in_domain": run.in_domain(dose),
            "frames_out_of_domain": run.out_of_domain,
            "engine": engine.identity,
            "output": str(output),
            **({"compare": str(compare)} if compare else {}),
        }


def denoise_folder(
    input: Path,
    output: Path,
    engine: Engine,
    suffix: str = ".tif",
    *,
    overwrite: bool = False,
    **options: Any,
) -> Generator[tuple[Path, dict[str, Any] | EmstreamError | None]]:
    """Denoise every movie of a folder into the folder `output`, as `denoise_file` does each.

    Yields each input's path with its report, or with what went wrong with it; the others go on.
    One whose output exists is skipped, and comes with None, unless `overwrite` is set.
    Raises FileFormatError when there is nothing to do.
    """
    movies = [path for path in sorted(input.iterdir()) if path.suffix.lower() in READABLE and path.is_file()]
    if not movies:
        raise FileFormatError(f"{input} holds no movie; they end in {', '.join(READABLE)}")
    names = [path.stem for path in movies]
    output.mkdir(parents=True, exist_ok=True)
    for path in movies:
        # Two inputs of one name and different formats keep their suffix in the output's name.
        name = path.stem if names.count(path.stem) == 1 else path.name.replace(".", "-")
        into = output / f"{name}{suffix}"
        if into.is_file() and not overwrite and not into.samefile(path):
            yield path, None
            continue
        try:
            yield path, denoise_file(path, into, engine, overwrite=overwrite, **options)
        except EmstreamError as error:
            yield path, error


@dataclass
class _Run:
    """One movie through one engine."""

    movie: Movie
    engine: Engine
    gain: float
    offset: float
    on_frame: Callable[[int, int], None] | None
    comparison: Comparison | None = None
    electrons: float = 0.0
    """Sum over the frames of the mean of each [electrons/pixel]."""
    out_of_domain: int = 0
    """Frames of a dose that the engine was not trained for."""

    def in_domain(self, dose: float) -> bool:
        """Whether the engine takes `dose` [electrons/pixel/frame]; one without a card takes any."""
        if self.engine.card is None:
            return True
        low, high = self.engine.card.dose_range
        return bool(low <= dose <= high)

    def expected(self) -> Generator[np.ndarray]:
        """Yield the expected electrons (H, W) of each frame in order, `engine.depth` frames in flight."""
        flying: deque[tuple[int, Any, np.ndarray, np.ndarray]] = deque()
        frames = len(self.movie)
        try:
            for number in range(frames):
                counts = self._counts(number)[None]
                expected = np.empty(counts.shape, np.float32)
                with self._engine_at(number):
                    ticket = self.engine.submit(counts, expected)
                flying.append((number, ticket, counts, expected))
                while flying and (len(flying) == self.engine.depth or number == frames - 1):
                    yield self._collect(flying)
                    if self.on_frame:
                        self.on_frame(number + 1 - len(flying), frames)
            if self.comparison is not None:  # before the output is put in its place
                self.comparison.finish()
        finally:
            # The engine may still write into frames in flight: wait before their memory goes.
            while flying:
                with contextlib.suppress(Exception):
                    self._collect(flying)

    def _collect(self, flying: deque[tuple[int, Any, np.ndarray, np.ndarray]]) -> np.ndarray:
        number, ticket, counts, _ = flying[0]
        try:
            with self._engine_at(number):
                frame: np.ndarray = self.engine.collect(ticket)[0]
        finally:
            flying.popleft()
        if not np.isfinite(frame).all():
            raise EngineError(
                f"{self.engine.name} makes pixels that are not numbers of frame {number} of {self.movie.path}; its "
                f"mean is {counts.mean(dtype=np.float64):.3g} electrons/pixel; are these ADU? See --gain and --offset"
            )
        if self.comparison is not None:
            self.comparison.add(counts[0], frame)
        return frame

    def _counts(self, number: int) -> np.ndarray:
        """Frame (H, W) in electrons, checked."""
        counts = self.movie[number]
        with np.errstate(invalid="ignore", over="ignore"):  # what is not a number shows in the mean
            if self.gain != 1.0 or self.offset != 0.0:
                counts = (counts.astype(np.float32) - np.float32(self.offset)) / np.float32(self.gain)
            dose = float(counts.mean(dtype=np.float64))
        if not np.isfinite(dose):
            raise FileFormatError(
                f"{self.movie.path}: frame {number} has pixels that are not numbers (NaN or infinite); "
                "replace them first"
            )
        if dose < 0:
            raise FileFormatError(
                f"{self.movie.path}: frame {number} has a mean of {dose:.4g} electrons/pixel, "
                f"but counts are not negative; check the offset ({self.offset:g} ADU)"
            )
        self.electrons += dose
        self.out_of_domain += not self.in_domain(dose)
        return counts

    @contextlib.contextmanager
    def _engine_at(self, number: int) -> Generator[None]:
        """What the engine raises, with the frame and the file it was at."""
        try:
            yield
        except EngineError:
            raise
        except Exception as error:
            raise EngineError(
                f"{self.engine.name} failed on frame {number} of {self.movie.path}: {error}"
            ) from error
