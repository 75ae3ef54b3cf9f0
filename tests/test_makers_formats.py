"""Microscope makers' formats."""

from __future__ import annotations

import json
import struct
import tracemalloc
from pathlib import Path

import h5py
import numpy as np
import pytest

from emstream.errors import FileFormatError
from emstream.movies import open_movie, rosetta, save_movie
from tests.digital_micrograph import write_dm

NEEDS_ROSETTA = "these formats need rosettasciio: pip install 'emstream[files]'"


def frames(count: int = 5) -> np.ndarray:
    return np.random.default_rng(0).poisson(3.0, (count, 24, 32)).astype(np.uint16)


def write_ser(path: Path, movie: np.ndarray, version: int = 0x0220, kind: int = 0x4122) -> None:
    """TIA's series: header, dimension, offsets, elements."""
    count, height, width = movie.shape
    word = "<I" if version <= 0x0210 else "<Q"
    size = struct.calcsize(word)
    dimension = struct.pack("<IddII6sI", count, 0.0, 1.0, 0, 6, b"Number", 0)
    offsets_at = 22 + size + 4 + len(dimension)
    first, each = offsets_at + 2 * size * count, 50 + height * width * 2
    with path.open("wb") as file:
        file.write(struct.pack("<HHHIIII", 0x4949, 0x0197, version, kind, 0x4152, count, count))
        file.write(struct.pack(word, offsets_at) + struct.pack("<I", 1) + dimension)
        assert file.tell() == offsets_at
        file.write(b"".join(struct.pack(word, first + n * each) for n in range(count)))
        file.write(bytes(size * count))
        for frame in movie:
            file.write(struct.pack("<ddIddIHII", 0.0, 5e-11, 0, 0.0, 5e-11, 0, 2, width, height))
            file.write(frame[::-1].astype("<u2").tobytes())


def write_old_ser(path: Path, movie: np.ndarray) -> None:
    write_ser(path, movie, version=0x0210)


def write_velox(path: Path, movie: np.ndarray) -> None:
    text = json.dumps({"BinaryResult": {"PixelSize": {"width": "5e-11"}}}).encode()
    with h5py.File(path, "w") as file:
        group = file.create_group("Data/Image/0123456789abcdef")
        group["Data"] = movie.transpose(1, 2, 0)
        group["Metadata"] = np.frombuffer(text.ljust(2000, b"\0"), np.uint8)[:, None].repeat(
            len(movie), axis=1
        )


def write_berkeley(path: Path, movie: np.ndarray) -> None:
    with h5py.File(path, "w") as file:
        group = file.create_group("data/movie")
        group.attrs["emd_group_type"] = 1
        group["data"] = movie
        for n, length in enumerate(movie.shape, start=1):
            group[f"dim{n}"] = np.arange(length) * 0.05
            group[f"dim{n}"].attrs["units"] = "[n_m]"


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
        "package_info": {}, "tmp_parameters": {}, "learning_results": {}, "models": {},
    }  # fmt: skip
    file_writer(str(path), signal)


def write_dm3(path: Path, movie: np.ndarray) -> None:
    write_dm(path, movie, version=3)


WRITERS = {
    "new.ser": write_ser, "old.ser": write_old_ser, "velox.emd": write_velox, "berkeley.emd": write_berkeley,
    "m.hspy": write_hspy, "m.dm3": write_dm3, "m.dm4": write_dm,
}  # fmt: skip


@pytest.fixture(params=WRITERS)
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A movie of `frames()`."""
    if Path(request.param).suffix in rosetta.READERS:
        pytest.importorskip("rsciio", reason=NEEDS_ROSETTA)
    WRITERS[request.param](tmp_path / request.param, frames())
    return tmp_path / request.param


def test_movie_is_read_frame_by_frame_with_its_pixel_size(path: Path) -> None:
    movie = frames()
    with open_movie(path) as opened:
        assert opened.shape == movie.shape
        assert opened.dtype == np.uint16
        assert opened.pixel_size_m == pytest.approx(5e-11)
        assert not opened.is_image
        for n in (4, 0, 2):
            np.testing.assert_array_equal(opened[n], movie[n])


@pytest.mark.parametrize("name", ["old.ser", "velox.emd", "m.dm3", "m.dm4"])
def test_single_image_is_an_image(tmp_path: Path, name: str) -> None:
    if Path(name).suffix in rosetta.READERS:
        pytest.importorskip("rsciio", reason=NEEDS_ROSETTA)
    WRITERS[name](tmp_path / name, frames(1))
    with open_movie(tmp_path / name) as opened:
        assert opened.is_image
        np.testing.assert_array_equal(opened[0], frames(1)[0])


def test_pixels_of_a_micrograph_may_be_fractions(tmp_path: Path) -> None:
    pytest.importorskip("rsciio", reason=NEEDS_ROSETTA)
    image = np.random.default_rng(0).normal(size=(24, 32)).astype(np.float32)
    write_dm(tmp_path / "m.dm4", image)
    with open_movie(tmp_path / "m.dm4") as opened:
        assert (opened.is_image, opened.dtype) == (True, np.float32)
        np.testing.assert_array_equal(opened[0], image)


def test_file_cut_short_is_explained(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(FileFormatError, match=path.name), open_movie(path) as movie:
        list(movie)


@pytest.mark.parametrize("suffix", [".ser", ".emd"])
def test_rubbish_is_explained(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"m{suffix}"
    for rubbish in (b"", b"not a movie at all " * 50):
        path.write_bytes(rubbish)
        with pytest.raises(FileFormatError, match=rf"m\{suffix} cannot be read"):
            open_movie(path)


def test_ser_that_announces_more_than_it_has_takes_no_memory(tmp_path: Path) -> None:
    write_ser(tmp_path / "m.ser", frames())
    content = bytearray((tmp_path / "m.ser").read_bytes())
    content[14:22] = b"\xff" * 8
    (tmp_path / "m.ser").write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(FileFormatError, match="it is cut short"):
            open_movie(tmp_path / "m.ser")
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", [[1], [1, 1]])
def test_berkeleys_type_may_be_an_array(tmp_path: Path, kind: list[int]) -> None:
    write_berkeley(tmp_path / "m.emd", frames())
    with h5py.File(tmp_path / "m.emd", "a") as file:
        file["data/movie"].attrs["emd_group_type"] = kind
        file["data"].attrs["emd_group_type"] = [0, 1]
    with open_movie(tmp_path / "m.emd") as movie:
        assert len(movie) == 5


@pytest.mark.parametrize("suffix", [".dm3", ".dm4", ".hspy", ".tvips"])
def test_rubbish_is_explained_by_the_optional_readers_too(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("rsciio", reason=NEEDS_ROSETTA)
    path = tmp_path / f"m{suffix}"
    path.write_bytes(b"not a movie at all " * 50)
    with pytest.raises(FileFormatError, match=rf"m\{suffix} cannot be read"):
        open_movie(path)


def test_colour_micrograph_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("rsciio", reason=NEEDS_ROSETTA)
    write_dm(tmp_path / "m.dm4", np.zeros((24, 32), np.int32))
    with pytest.raises(FileFormatError, match=r"m\.dm4 holds colour images; emstream takes"):
        open_movie(tmp_path / "m.dm4")


def test_optional_reader_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rosetta, "find_spec", lambda name: None)
    (tmp_path / "m.dm4").touch()
    with pytest.raises(FileFormatError, match="needs the package rosettasciio: pip install"):
        open_movie(tmp_path / "m.dm4")


def test_spectra_and_files_of_several_movies_are_explained(tmp_path: Path) -> None:
    write_ser(tmp_path / "s.ser", frames(), kind=0x4120)
    with pytest.raises(FileFormatError, match="holds spectra"):
        open_movie(tmp_path / "s.ser")
    write_berkeley(tmp_path / "m.emd", frames())
    with h5py.File(tmp_path / "m.emd", "a") as file:
        file.copy("data/movie", "data/other")
    with pytest.raises(FileFormatError, match="holds several: data/movie, data/other; choose one"):
        open_movie(tmp_path / "m.emd")
    with open_movie(tmp_path / "m.emd", "data/other") as movie:
        assert len(movie) == 5
    with pytest.raises(FileFormatError, match="holds no 'third'; it holds data/movie, data/other"):
        open_movie(tmp_path / "m.emd", "third")


def test_these_formats_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match=r"the suffix must be one of \.npy.*got '\.ser'"):
        save_movie(tmp_path / "m.ser", frames(), shape=frames().shape)
