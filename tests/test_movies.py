"""Movies on disk: what is written comes back, and what is no movie says why."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import mrcfile
import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from emstream.errors import FileFormatError
from emstream.frame import PIXEL_TYPES
from emstream.movies import open_movie, save_movie

SUFFIXES = [".npy", ".tif", ".tiff", ".h5", ".hdf5", ".mrc"]
REAL_MOVIE = Path(__file__).parents[2] / "shared/data/real_tem_movie.h5"
ENGINE = {"name": "unet32", "sha256": "ab" * 32, "device": "CPU, bf16, OpenVINO"}


def movie(shape: tuple[int, ...] = (5, 13, 17), dtype: Any = np.uint16) -> np.ndarray:
    """Distinct pixels, so that no two frames or places can be mistaken for each other."""
    return (np.arange(np.prod(shape)) % 251).reshape(shape).astype(dtype)


def save(path: Path, pixels: np.ndarray, **options: Any) -> Path:
    save_movie(path, pixels, shape=pixels.shape, dtype=pixels.dtype, **options)
    return path


def read(path: Path, dataset: str | None = None) -> np.ndarray:
    with open_movie(path, dataset) as opened:
        frames = np.stack(list(opened))
        assert frames.shape == opened.shape
        assert frames.dtype == opened.dtype
    return frames


def h5(path: Path, **datasets: Any) -> Path:
    with h5py.File(path, "w") as file:
        for name, values in datasets.items():
            file[name.replace("__", "/")] = values
    return path


def mrc(path: Path, values: np.ndarray, size_a: float = 0.0) -> Path:
    with mrcfile.new(path, values) as file:
        file.voxel_size = size_a
    return path


def refusal(path: Path, dataset: str | None = None) -> str:
    """The text of the error, which names the path."""
    with pytest.raises(FileFormatError) as caught:
        open_movie(path, dataset)
    assert str(path) in str(caught.value)
    return str(caught.value)


# -- round trips ----------------------------------------------------------------


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    suffix=st.sampled_from(SUFFIXES),
    shape=st.tuples(st.integers(1, 6), st.integers(1, 40), st.integers(1, 40)),
    kind=st.sampled_from(sorted(PIXEL_TYPES)),
    swapped=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_what_is_written_is_read_back_exactly(
    tmp_path: Path, suffix: str, shape: tuple[int, int, int], kind: str, swapped: bool, seed: int
) -> None:
    assume(shape[2] not in (3, 4))  # taken for colours
    assume(suffix != ".mrc" or kind in ("uint8", "int8", "int16", "uint16", "float32"))
    dtype = np.dtype(kind)
    pixels = np.random.default_rng(seed).integers(0, 256, np.prod(shape) * dtype.itemsize, np.uint8)
    frames = pixels.view(dtype).reshape(shape)
    frames = np.nan_to_num(frames, copy=True) if dtype.kind == "f" else frames
    path = tmp_path / f"movie{suffix}"
    given_frames = frames.astype(dtype.newbyteorder("S")) if swapped else frames
    save_movie(path, given_frames, shape=shape, dtype=dtype, overwrite=True)
    back = read(path)
    np.testing.assert_array_equal(back, frames)
    assert back.dtype == (np.uint16 if (suffix, kind) == (".mrc", "uint8") else dtype)
    assert [file.name for file in tmp_path.iterdir() if file.suffix == ".part"] == []


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_suffix_may_be_in_capitals(tmp_path: Path, suffix: str) -> None:
    path = save(tmp_path / f"RUN7{suffix.upper()}", movie())
    np.testing.assert_array_equal(read(path), movie())


@pytest.mark.parametrize("suffix", [".tif", ".h5", ".mrc"])
def test_pixel_size_and_units_come_back(tmp_path: Path, suffix: str) -> None:
    path = save(tmp_path / f"movie{suffix}", movie(dtype=np.float32), pixel_size_m=6.2e-12)
    with open_movie(path) as opened:
        assert opened.pixel_size_m == pytest.approx(6.2e-12, rel=1e-6)
        assert opened.units == "electrons"


def test_movie_without_a_pixel_size_has_none(tmp_path: Path) -> None:
    for suffix in SUFFIXES:
        with open_movie(save(tmp_path / f"movie{suffix}", movie())) as opened:
            assert opened.pixel_size_m is None


def test_provenance_is_in_the_image_description_of_a_tif(tmp_path: Path) -> None:
    path = save(tmp_path / "movie.tif", movie(), provenance={"engine": ENGINE, "gain": 32.2})
    with tifffile.TiffFile(path) as file:
        description = json.loads(file.pages.first.description)
    assert description["engine"] == ENGINE
    assert description["gain"] == 32.2


def test_provenance_is_in_the_attributes_of_a_h5(tmp_path: Path) -> None:
    path = save(tmp_path / "movie.h5", movie(), provenance={"engine": ENGINE, "gain": 32.2})
    with h5py.File(path) as file:
        assert json.loads(file["movie"].attrs["engine"]) == ENGINE
        assert file["movie"].attrs["gain"] == 32.2
        assert file["movie"].attrs["units"] == "electrons"


def test_labels_and_statistics_of_a_mrc_are_those_of_its_pixels(tmp_path: Path) -> None:
    pixels = movie(dtype=np.float32)
    path = save(tmp_path / "movie.mrc", pixels, provenance={"engine": ENGINE})
    assert mrcfile.validate(path, print_file=io.StringIO())
    with mrcfile.open(path) as file:
        assert file.is_image_stack()
        assert f"emstream sha256 {ENGINE['sha256']}" in file.get_labels()
        assert file.header.dmax == pixels.max()
        assert file.header.dmean == pytest.approx(pixels.mean())
        assert file.header.rms == pytest.approx(pixels.std())


# -- reading --------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".npy", ".tif", ".h5", ".mrc"])
def test_image_is_a_movie_of_one_frame(tmp_path: Path, suffix: str) -> None:
    path, image = tmp_path / f"image{suffix}", movie((13, 17))
    writers: dict[str, Callable[[Path, np.ndarray], Any]] = {
        ".npy": np.save,
        ".tif": tifffile.imwrite,
        ".h5": lambda path, values: h5(path, x=values),
        ".mrc": mrc,
    }
    writers[suffix](path, image)
    np.testing.assert_array_equal(read(path), image[None])


def test_frames_are_reached_by_number_from_either_end(tmp_path: Path) -> None:
    with open_movie(save(tmp_path / "movie.npy", movie())) as opened:
        assert len(opened) == 5
        np.testing.assert_array_equal(opened[2], movie()[2])
        np.testing.assert_array_equal(opened[-1], movie()[4])
        with pytest.raises(IndexError, match="0-4, got 5"):
            opened[5]


def test_frames_are_memory_of_the_callers_own(tmp_path: Path) -> None:
    for suffix in SUFFIXES:
        with open_movie(save(tmp_path / f"movie{suffix}", movie())) as opened:
            opened[0][:] = 0
            np.testing.assert_array_equal(opened[0], movie()[0])


def test_big_endian_files_are_read_in_this_machines_order(tmp_path: Path) -> None:
    swapped = movie().astype(">u2")
    np.save(tmp_path / "movie.npy", swapped)
    tifffile.imwrite(tmp_path / "movie.tif", movie(), byteorder=">")
    h5(tmp_path / "movie.h5", movie=swapped)
    mrc(tmp_path / "movie.mrc", swapped)
    for path in tmp_path.iterdir():
        back = read(path)
        assert back.dtype == np.dtype("uint16")
        np.testing.assert_array_equal(back, movie())


@pytest.mark.parametrize(
    ("stored", "read_as"),
    [
        ("bool", "uint8"),
        ("float16", "float32"),
        ("int64", "float32"),
        ("uint64", "float32"),
        ("g", "float64"),
    ],
)
def test_types_that_engines_do_not_take_are_converted(tmp_path: Path, stored: str, read_as: str) -> None:
    pixels = movie(dtype=stored)
    np.save(tmp_path / "movie.npy", pixels)
    back = read(tmp_path / "movie.npy")
    assert back.dtype == np.dtype(read_as)
    np.testing.assert_array_equal(back, pixels.astype(read_as))


def test_column_major_npy_is_read_frame_by_frame(tmp_path: Path) -> None:
    for name, shape in {"movie": (5, 13, 17), "image": (13, 17)}.items():
        np.save(tmp_path / f"{name}.npy", np.asfortranarray(movie(shape)))
        np.testing.assert_array_equal(read(tmp_path / f"{name}.npy").reshape(shape), movie(shape))


@pytest.mark.parametrize(
    "options",
    [
        {"compression": "zlib"},
        {"compression": "zlib", "predictor": True},
        {"tile": (16, 16)},
        {"metadata": None},
        {"truncate": True},
        {"bigtiff": True},
        {"imagej": True},
        {"ome": True, "metadata": {"axes": "TYX"}},
    ],
    ids=str,
)
def test_every_kind_of_tif_is_read(tmp_path: Path, options: dict[str, Any]) -> None:
    tifffile.imwrite(tmp_path / "movie.tif", movie(), **options)
    np.testing.assert_array_equal(read(tmp_path / "movie.tif"), movie())


def test_pages_appended_one_by_one_make_a_movie(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "movie.tif") as file:
        for frame in movie():
            file.write(frame, contiguous=False, metadata=None)
    np.testing.assert_array_equal(read(tmp_path / "movie.tif"), movie())


@pytest.mark.parametrize(
    ("unit", "size_m"), [("nm", 5e-11), ("\\u00B5m", 5e-8), ("micron", 5e-8), ("pixel", None)]
)
def test_pixel_size_of_imagej_is_understood(tmp_path: Path, unit: str, size_m: float | None) -> None:
    tifffile.imwrite(tmp_path / "m.tif", movie(), imagej=True, resolution=(20, 20), metadata={"unit": unit})
    with open_movie(tmp_path / "m.tif") as opened:
        assert opened.pixel_size_m == (None if size_m is None else pytest.approx(size_m))


def test_resolution_for_a_printer_is_no_pixel_size(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "m.tif", movie(), resolution=(72, 72), resolutionunit="INCH")
    with open_movie(tmp_path / "m.tif") as opened:
        assert opened.pixel_size_m is None


def test_series_of_a_tif_is_chosen_by_its_number(tmp_path: Path) -> None:
    path = tmp_path / "movie.tif"
    with tifffile.TiffWriter(path) as file:
        file.write(movie())
        file.write(movie((8, 8)))
    text = refusal(path)
    assert "2 series" in text
    assert "1: (8, 8) uint16" in text
    np.testing.assert_array_equal(read(path, "1"), movie((1, 8, 8)))
    assert "no series '2'" in refusal(path, "2")


def test_only_numeric_dataset_of_a_h5_is_the_movie(tmp_path: Path) -> None:
    path = h5(tmp_path / "m.h5", entry__counts=movie(), entry__times=np.arange(5.0), entry__title="run 7")
    np.testing.assert_array_equal(read(path), movie())


@pytest.mark.parametrize("name", ["movie", "frames", "data", "entry__images", "Frames"])
def test_dataset_with_a_usual_name_is_the_movie(tmp_path: Path, name: str) -> None:
    path = h5(tmp_path / "m.h5", dark=movie((13, 17)), **{name: movie()})
    np.testing.assert_array_equal(read(path), movie())


def test_ambiguous_h5_lists_what_there_is_to_choose(tmp_path: Path) -> None:
    path = h5(
        tmp_path / "m.h5", raw__frames=movie(), denoised__frames=movie(dtype=np.float32), times=np.zeros(5)
    )
    text = refusal(path)
    assert "/raw/frames (5, 13, 17) uint16" in text
    assert "/denoised/frames (5, 13, 17) float32" in text
    assert "times" not in text
    np.testing.assert_array_equal(read(path, "/raw/frames"), movie())
    np.testing.assert_array_equal(read(path, "raw/frames"), movie())


def test_unknown_dataset_lists_what_the_file_holds(tmp_path: Path) -> None:
    path = h5(tmp_path / "m.h5", raw__frames=movie())
    for wrong in ("vacuum", "raw"):
        assert f"no dataset {wrong!r}; it holds /raw/frames (5, 13, 17) uint16" in refusal(path, wrong)


def test_h5_without_images_says_what_it_holds(tmp_path: Path) -> None:
    assert "only /times (5,) float64" in refusal(h5(tmp_path / "m.h5", times=np.zeros(5)))
    assert "only nothing" in refusal(h5(tmp_path / "empty.h5"))


def test_long_lists_of_datasets_are_cut(tmp_path: Path) -> None:
    path = h5(tmp_path / "m.h5", **{f"stack{i}": movie() for i in range(30)})
    assert "18 more" in refusal(path)


def test_attributes_of_a_h5_give_units_and_pixel_size(tmp_path: Path) -> None:
    path = h5(tmp_path / "m.h5", movie=movie())
    with h5py.File(path, "r+") as file:
        file.attrs["pixel_size_m"] = 6.2e-12
        file["movie"].attrs["units"] = np.bytes_("ADU")
    with open_movie(path) as opened:
        assert opened.pixel_size_m == 6.2e-12
        assert opened.units == "ADU"


@pytest.mark.parametrize("chunks", [(1, 13, 17), (4, 13, 17), (3, 5, 7), (5, 1, 1)])
def test_h5_in_chunks_of_any_shape_is_read(tmp_path: Path, chunks: tuple[int, ...]) -> None:
    with h5py.File(tmp_path / "m.h5", "w") as file:
        file.create_dataset("movie", data=movie(), chunks=chunks, compression="gzip", shuffle=True)
    np.testing.assert_array_equal(read(tmp_path / "m.h5"), movie())


def test_dataset_is_refused_where_there_is_nothing_to_choose(tmp_path: Path) -> None:
    for suffix in (".npy", ".mrc"):
        assert "no dataset 'x' to choose" in refusal(save(tmp_path / f"m{suffix}", movie()), "x")


def test_mrc_longer_than_its_header_says_is_read_without_a_warning(tmp_path: Path) -> None:
    path = save(tmp_path / "m.mrc", movie())
    with path.open("ab") as file:
        file.write(b"more")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(read(path), movie())


@pytest.mark.skipif(not REAL_MOVIE.exists(), reason="the recorded movie is not here")
def test_real_movie_opens_with_each_of_its_datasets() -> None:
    assert "/movie (41, 245, 158) uint8" in refusal(REAL_MOVIE, "nothing")
    with open_movie(REAL_MOVIE, "movie") as opened:
        assert (opened.shape, opened.dtype) == ((41, 245, 158), np.dtype(np.uint8))
        assert opened.units == "electrons per pixel per frame"
        assert 0 < opened[40].mean() < 5
    with open_movie(REAL_MOVIE, "vacuum") as opened:
        assert opened.shape == (41, 585, 296)
    with open_movie(REAL_MOVIE) as opened:
        assert opened.shape == (41, 245, 158)


# -- what is no movie -----------------------------------------------------------


def test_missing_file_folder_and_unknown_suffix_are_refused(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "m.tif")
    (tmp_path / "folder.h5").mkdir()
    assert "not a file" in refusal(tmp_path / "folder.h5")
    text = refusal(tmp_path / "m.xyz")
    assert "one of .npy, .tif, .tiff, .h5, .hdf5, .mrc, .ser" in text
    assert "got '.xyz'" in text


def test_unreadable_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*arguments: Any, **options: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    path = save(tmp_path / "m.npy", movie())
    monkeypatch.setattr("emstream.movies.npy.flat", denied)
    assert "permission denied" in refusal(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("content", [b"", b"x", b"\x93NUMPY", b"II*\0", b"no movie at all " * 100])
def test_garbage_is_refused(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"m{suffix}"
    path.write_bytes(content)
    assert f"cannot be read as {suffix}" in refusal(path)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kept=st.floats(0, 1), kind=st.sampled_from([".npy", ".tif", "zlib.tif", "pages.tif", ".h5", ".mrc"]))
def test_file_cut_short_anywhere_never_loses_frames_in_silence(
    tmp_path: Path, kept: float, kind: str
) -> None:
    path = tmp_path / f"m{kind}"
    if kind == "zlib.tif":
        tifffile.imwrite(path, movie(), compression="zlib")
    elif kind == "pages.tif":
        tifffile.imwrite(path, movie(), metadata=None)
    else:
        save(path, movie(), overwrite=True)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    with contextlib.suppress(FileFormatError):
        np.testing.assert_array_equal(read(path), movie())


def test_file_that_shrinks_while_open_is_an_error_not_a_crash(tmp_path: Path) -> None:
    for suffix in (".npy", ".tif", ".mrc"):
        path = save(tmp_path / f"m{suffix}", movie())
        with open_movie(path) as opened:
            path.write_bytes(path.read_bytes()[:1200])
            with pytest.raises(FileFormatError, match=r"frame 4 cannot be read.*cut short"):
                opened[4]


def test_tifffile_does_not_write_to_the_log_of_the_program(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "m.tif"
    tifffile.imwrite(path, movie(), metadata=None)
    path.write_bytes(path.read_bytes()[:1500])
    refusal(path)
    assert caplog.records == []
    assert logging.getLogger("tifffile").filters == []


@pytest.mark.parametrize("shape", [(0, 8, 8), (3, 0, 8), (3, 8, 0), (0, 8), (1, 2, 0)])
def test_movie_without_frames_or_pixels_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    np.save(tmp_path / "m.npy", np.zeros(shape))
    np.save(tmp_path / "f.npy", np.zeros(shape, order="F"))
    for path in (tmp_path / "m.npy", tmp_path / "f.npy", h5(tmp_path / "m.h5", movie=np.zeros(shape))):
        assert "no " in refusal(path)


def test_empty_dataset_of_a_h5_is_refused(tmp_path: Path) -> None:
    path = h5(tmp_path / "m.h5", movie=h5py.Empty("f4"))
    assert "no numeric 2-D or 3-D dataset" in refusal(path)
    assert "is empty" in refusal(path, "movie")


@pytest.mark.parametrize(
    ("shape", "warned"),
    [
        ((64, 64, 10), True),
        ((10, 64, 64), False),
        ((63, 64, 10), False),
        ((96, 64, 7), True),
        ((64, 96, 1), False),
        ((20, 64, 7), False),
    ],
)
def test_stack_that_seems_to_have_its_frames_last_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, shape: tuple[int, ...], warned: bool
) -> None:
    with open_movie(save(tmp_path / "m.npy", movie(shape))) as opened:
        assert opened.shape == shape
    frames, height, width = shape
    said = (
        f"m.npy is read as {frames} frames of {height}x{width} px; if it is {width} frames of {frames}x{height}, "
        "put the frames first: numpy.moveaxis"
    )
    assert [said in text for text in caplog.messages] == ([True] if warned else [])


def test_stack_that_surely_has_its_frames_last_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "m.npy", movie((64, 64, 7)))
    assert refusal(tmp_path / "m.npy").endswith(
        "would be 64 frames of 64x7 px; it seems to be 7 frames of 64x64, "
        "put the frames first: numpy.moveaxis(movie, -1, 0)"
    )


def test_stack_of_three_frames_last_is_not_only_called_colour(tmp_path: Path) -> None:
    np.save(tmp_path / "m.npy", movie((3, 3, 3), np.uint8))
    assert "colour images (3, 3, 3), or a stack with frames last" in refusal(tmp_path / "m.npy")


@pytest.mark.parametrize("shape", [(20, 30, 3), (20, 30, 4), (5, 20, 30, 3)])
def test_colour_images_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    colours = movie(shape, np.uint8)
    np.save(tmp_path / "m.npy", colours)
    tifffile.imwrite(tmp_path / "m.tif", colours, photometric="rgb")
    for path in (tmp_path / "m.npy", tmp_path / "m.tif"):
        assert "colour" in refusal(path)
    assert "colour" in refusal(h5(tmp_path / "m.h5", movie=colours), "movie")


def test_colours_in_planes_or_a_palette_are_refused(tmp_path: Path) -> None:
    tifffile.imwrite(
        tmp_path / "a.tif", movie((3, 20, 30), np.uint8), photometric="rgb", planarconfig="separate"
    )
    palette = np.zeros((3, 256), np.uint16)
    tifffile.imwrite(tmp_path / "b.tif", movie((20, 30), np.uint8), photometric="palette", colormap=palette)
    for path in tmp_path.iterdir():
        assert "colour" in refusal(path)


@pytest.mark.parametrize("shape", [(7,), (2, 5, 20, 30), ()])
def test_data_of_other_dimensions_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    pixels = np.zeros(shape, np.float32)
    np.save(tmp_path / "m.npy", pixels)
    assert f"{len(shape)}-D" in refusal(tmp_path / "m.npy")
    assert f"{len(shape)}-D" in refusal(h5(tmp_path / "m.h5", movie=pixels), "movie")
    if len(shape) == 4:
        tifffile.imwrite(tmp_path / "m.tif", pixels)
        assert "4-D" in refusal(tmp_path / "m.tif")
        assert "4-D" in refusal(mrc(tmp_path / "m.mrc", pixels))


def test_complex_numbers_are_refused(tmp_path: Path) -> None:
    pixels = np.zeros((3, 8, 9), np.complex64)
    np.save(tmp_path / "m.npy", pixels)
    tifffile.imwrite(tmp_path / "m.tif", pixels, photometric="minisblack")
    for path in (tmp_path / "m.npy", tmp_path / "m.tif", mrc(tmp_path / "m.mrc", pixels)):
        assert "complex numbers (complex64)" in refusal(path)
    assert "complex" in refusal(h5(tmp_path / "m.h5", movie=pixels), "movie")


class _Trap:
    """Unpickling it would do harm."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (pytest.fail, ("the pickle was loaded",))


def test_pickled_objects_are_refused_unopened(tmp_path: Path) -> None:
    np.save(tmp_path / "m.npy", np.full((3, 8, 9), _Trap(), object), allow_pickle=True)
    assert "Python objects" in refusal(tmp_path / "m.npy")


def test_records_and_texts_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((3, 8, 9), [("counts", "u2")]))
    np.save(tmp_path / "b.npy", np.zeros((3, 8, 9), [("Zählung", "u2")]))
    np.save(tmp_path / "c.npy", np.full((3, 8, 9), "x"))
    for path in tmp_path.iterdir():
        refusal(path)


def test_h5_compressed_with_a_missing_filter_names_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("movie", data=movie(), compression="lzf")
    monkeypatch.setattr(h5py.h5z, "filter_avail", lambda number: False)
    assert "lzf; pip install hdf5plugin" in refusal(path)


def test_mrc_without_mrcfile_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "m.mrc", movie())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'emstream[files]'" in refusal(path)
    with pytest.raises(FileFormatError, match="files"):
        save(tmp_path / "n.mrc", movie())


# -- writing --------------------------------------------------------------------


def only(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_failed_run_leaves_nothing_behind(tmp_path: Path, suffix: str) -> None:
    def breaking() -> Iterator[np.ndarray]:
        yield from movie()[:2]
        raise RuntimeError("the engine broke")

    with pytest.raises(RuntimeError, match="the engine broke"):
        save_movie(tmp_path / f"m{suffix}", breaking(), shape=(5, 13, 17), dtype=np.uint16)
    assert only(tmp_path) == []


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_file_appears_under_its_name_only_when_it_is_whole(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"m{suffix}"
    seen = []

    def watching() -> Iterator[np.ndarray]:
        for frame in movie():
            seen.append(path.exists())
            yield frame

    save_movie(path, watching(), shape=(5, 13, 17), dtype=np.uint16)
    assert seen == [False] * 5
    assert only(tmp_path) == [path.name]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("frames", [0, 4, 6])
def test_wrong_number_of_frames_is_refused(tmp_path: Path, suffix: str, frames: int) -> None:
    given_frames = (movie()[0] for _ in range(frames))
    with pytest.raises(ValueError, match="announced"):
        save_movie(tmp_path / f"m{suffix}", given_frames, shape=(5, 13, 17), dtype=np.uint16)
    assert only(tmp_path) == []


def test_frames_other_than_announced_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.npy"
    with pytest.raises(ValueError, match=r"frame 0 must be 13x16, got shape \(13, 17\)"):
        save_movie(path, movie(), shape=(5, 13, 16), dtype=np.uint16)
    with pytest.raises(ValueError, match="frame 0 must be uint16, got float32"):
        save_movie(path, movie(dtype=np.float32), shape=(5, 13, 17), dtype=np.uint16)
    with pytest.raises(ValueError, match="shape must be"):
        save_movie(path, movie(), shape=(0, 13, 17))
    with pytest.raises(ValueError, match="dtype must be one of uint8"):
        save_movie(path, movie(), shape=(5, 13, 17), dtype=np.complex64)
    assert only(tmp_path) == []


def test_existing_file_is_kept_unless_overwriting_is_allowed(tmp_path: Path) -> None:
    path = save(tmp_path / "m.tif", movie())
    with pytest.raises(FileFormatError, match="exists already"):
        save(path, movie((2, 8, 9)))
    assert read(path).shape == (5, 13, 17)
    save(path, movie((2, 8, 9)), overwrite=True)
    assert read(path).shape == (2, 8, 9)


def test_places_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="there is no folder"):
        save(tmp_path / "nowhere" / "m.tif", movie())
    with pytest.raises(FileFormatError, match="suffix must be one of"):
        save(tmp_path / "m.png", movie())
    (tmp_path / "m.h5").mkdir()
    with pytest.raises(FileFormatError, match="is a folder"):
        save(tmp_path / "m.h5", movie(), overwrite=True)


def test_full_disk_is_named(tmp_path: Path) -> None:
    def full() -> Iterator[np.ndarray]:
        yield movie()[0]
        raise OSError(28, "No space left on device")

    with pytest.raises(FileFormatError, match=r"m\.npy cannot be written: No space left on device"):
        save_movie(tmp_path / "m.npy", full(), shape=(5, 13, 17), dtype=np.uint16)
    assert only(tmp_path) == []


def test_mrc_refuses_types_it_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match=r"cannot hold int32; save it as \.tif or \.h5"):
        save(tmp_path / "m.mrc", movie(dtype=np.int32))
    assert only(tmp_path) == []


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_memory_does_not_grow_with_the_length_of_the_movie(tmp_path: Path, suffix: str) -> None:
    frame = movie((256, 256), np.float32)
    path = tmp_path / f"m{suffix}"
    save(path, frame[None])  # imports are paid for
    read(path)
    tracemalloc.start()
    try:
        save_movie(path, (frame for _ in range(200)), shape=(200, 256, 256), overwrite=True)
        with open_movie(path) as opened:
            total = sum(float(each[0, 1]) for each in opened)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total == 200
    assert peak < 12 * frame.nbytes
