"""Microscope makers' formats."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from emstream.errors import FileFormatError
from emstream.movies import open_movie, save_movie

pytest.importorskip("rsciio", reason="these formats need rosettasciio: pip install 'emstream[files]'")


def frames(count: int = 5) -> np.ndarray:
    return np.random.default_rng(0).poisson(3.0, (count, 24, 32)).astype(np.uint16)


def write_ser(path: Path, movie: np.ndarray, pixel_size_m: float = 5e-11) -> None:
    """TIA's series of images, version 0x210: header, one element per frame, their offsets, no tags."""
    count, height, width = movie.shape
    header = struct.pack("<HHHIIIIIi", 0x4949, 0x0197, 0x0210, 0x4122, 0x4152, count, count, 0, 1)
    dimension = (
        struct.pack("<IddI", count, 0.0, 1.0, 0) + struct.pack("<I", 6) + b"Number" + struct.pack("<I", 0)
    )
    element_head = struct.calcsize("<ddIddIHII")
    nbytes = element_head + height * width * 2
    array_at = len(header) + 8 + len(dimension) - 4
    header = struct.pack("<HHHIIII", 0x4949, 0x0197, 0x0210, 0x4122, 0x4152, count, count)
    array_at = len(header) + 8 + 4 + len(dimension)
    header += struct.pack("<QI", array_at, 1)
    first = array_at + 16 * count
    offsets = [first + n * nbytes for n in range(count)]
    with path.open("wb") as file:
        file.write(header + dimension)
        assert file.tell() == array_at
        file.write(struct.pack(f"<{count}Q", *offsets) + struct.pack(f"<{count}Q", *[0] * count))
        for frame in movie:
            file.write(
                struct.pack("<ddIddIHII", 0.0, pixel_size_m, 0, 0.0, pixel_size_m, 0, 2, width, height)
            )
            file.write(frame[::-1].astype("<u2").tobytes())


def write_hspy(path: Path, movie: np.ndarray, pixel_size_nm: float = 0.05) -> None:
    from rsciio.hspy import file_writer

    shape = movie.shape
    names = ["time", "y", "x"][-movie.ndim :]
    axes = [
        {"name": name, "size": size, "offset": 0.0, "scale": pixel_size_nm if name != "time" else 1.0,
         "units": "nm" if name != "time" else "s", "navigate": name == "time", "_type": "UniformDataAxis",
         "index_in_array": n, "is_binned": False}
        for n, (name, size) in enumerate(zip(names, shape, strict=True))
    ]  # fmt: skip
    signal = {
        "data": movie, "axes": axes, "metadata": {"General": {"title": ""}, "Signal": {"signal_type": ""}},
        "original_metadata": {}, "attributes": {"_lazy": False}, "package": "test", "package_version": "0",
        "tmp_parameters": {}, "learning_results": {}, "models": {},
    }  # fmt: skip
    file_writer(str(path), signal)


WRITERS = {".ser": write_ser, ".hspy": write_hspy}


@pytest.mark.parametrize("suffix", WRITERS)
def test_movie_is_read_frame_by_frame_with_its_pixel_size(tmp_path: Path, suffix: str) -> None:
    movie = frames()
    WRITERS[suffix](tmp_path / f"m{suffix}", movie)
    with open_movie(tmp_path / f"m{suffix}") as opened:
        assert opened.shape == movie.shape
        assert opened.dtype == np.uint16
        assert opened.pixel_size_m == pytest.approx(5e-11)
        for n in (4, 0, 2):
            np.testing.assert_array_equal(opened[n], movie[n])


@pytest.mark.parametrize("suffix", WRITERS)
def test_file_cut_short_is_explained(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"m{suffix}"
    WRITERS[suffix](path, frames())
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(FileFormatError, match="m"), open_movie(path) as movie:
        list(movie)


@pytest.mark.parametrize("suffix", [".dm3", ".dm4", ".emd", ".ser", ".hspy", ".tvips"])
def test_rubbish_is_explained(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"m{suffix}"
    path.write_bytes(b"not a movie at all " * 50)
    with pytest.raises(FileFormatError, match=rf"m\{suffix} cannot be read"):
        open_movie(path)


def test_these_formats_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match=r"the suffix must be one of \.npy.*got '\.dm4'"):
        save_movie(tmp_path / "m.dm4", frames(), shape=frames().shape)
