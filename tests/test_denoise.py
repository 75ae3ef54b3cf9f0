"""Denoising a file: the same engine, frame by frame, and a report."""

from __future__ import annotations

import json
from collections import deque
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from emstream.cli import app
from emstream.denoise import denoise_file, denoise_folder
from emstream.errors import EngineError, EngineUnavailable, FileFormatError
from emstream.inference import EngineCard, IdentityEngine, load_engine
from emstream.movies import open_movie, save_movie

CARD = EngineCard(
    name="careful", architecture="none", parameters=0, field_of_view_px=1, multiple_px=1, bias_free=True,
    dose_range=(0.3, 0.7), sampling_pm=6.2, psnr_db=0, ssim=0, trained="not at all", commit="",
)  # fmt: skip


class CarefulEngine(IdentityEngine):
    """Doubles, works only when collected, and checks that its caller keeps the protocol."""

    name = "careful"
    sha256 = "cd" * 32
    card = CARD

    def __init__(self, depth: int = 3) -> None:
        self.depth = depth
        self.most = 0
        self._out: deque[tuple[np.ndarray, np.ndarray, np.ndarray]] = deque()

    def submit(self, counts: np.ndarray, expected: np.ndarray) -> Any:
        assert counts.ndim == 3
        assert counts.shape == expected.shape
        assert counts.flags.c_contiguous
        assert counts.dtype.isnative
        self._out.append((counts, expected, counts.copy()))
        self.most = max(self.most, len(self._out))
        assert len(self._out) <= self.depth
        expected.fill(np.nan)
        return self._out[-1]

    def collect(self, ticket: Any) -> np.ndarray:
        counts, expected, before = self._out.popleft()
        assert ticket[0] is counts, "collected out of order"
        np.testing.assert_array_equal(counts, before, "counts changed in flight")
        np.multiply(counts, 2, out=expected, casting="unsafe")
        return expected

    @property
    def in_flight(self) -> int:
        return len(self._out)


def movie(frames: int = 7, shape: tuple[int, int] = (13, 17), dtype: Any = np.uint8) -> np.ndarray:
    rng = np.random.default_rng(1)
    return rng.poisson(0.45, (frames, *shape)).astype(dtype)


def saved(folder: Path, pixels: np.ndarray | None = None, name: str = "in.npy", **options: Any) -> Path:
    pixels = movie() if pixels is None else pixels
    save_movie(folder / name, pixels, shape=pixels.shape, dtype=pixels.dtype, **options)
    return folder / name


def read(path: Path) -> np.ndarray:
    with open_movie(path) as opened:
        return np.stack(list(opened))


@pytest.mark.parametrize("suffix", [".npy", ".tif", ".h5", ".mrc"])
def test_output_holds_every_frame_in_order_as_float32(tmp_path: Path, suffix: str) -> None:
    output = tmp_path / f"out{suffix}"
    denoise_file(saved(tmp_path), output, CarefulEngine())
    back = read(output)
    assert back.dtype == np.float32
    np.testing.assert_array_equal(back, 2.0 * movie())


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(frames=st.integers(1, 9), depth=st.integers(1, 5))
def test_engine_is_kept_as_busy_as_it_likes_and_no_busier(tmp_path: Path, frames: int, depth: int) -> None:
    engine = CarefulEngine(depth)
    source = tmp_path / "in.npy"
    np.save(source, movie(frames))
    done: list[tuple[int, int]] = []
    denoise_file(
        source, tmp_path / "out.npy", engine, overwrite=True, on_frame=lambda *counts: done.append(counts)
    )
    assert engine.most == min(depth, frames)
    assert engine.in_flight == 0
    assert done == [(n, frames) for n in range(1, frames + 1)]
    np.testing.assert_array_equal(read(tmp_path / "out.npy"), 2.0 * movie(frames))


def test_report_says_what_was_done(tmp_path: Path) -> None:
    engine = CarefulEngine()
    report = denoise_file(saved(tmp_path), tmp_path / "out.tif", engine)
    assert report["frames"] == 7
    assert report["shape"] == [7, 13, 17]
    assert report["seconds"] > 0
    assert report["frames_per_s"] > 0
    assert report["dose"] == pytest.approx(movie().mean(), abs=1e-6)
    assert report["in_domain"] is True
    assert report["engine"] == engine.identity == {"name": "careful", "sha256": "cd" * 32, "device": "none"}
    assert report["output"] == str(tmp_path / "out.tif")
    assert json.loads(json.dumps(report)) == report


def test_dose_outside_the_engines_domain_is_flagged(tmp_path: Path) -> None:
    pixels = movie()
    pixels[4:] *= 10
    report = denoise_file(saved(tmp_path, pixels), tmp_path / "out.tif", CarefulEngine())
    assert report["in_domain"] is False
    assert report["frames_out_of_domain"] == 3


def test_engine_without_a_card_takes_any_dose(tmp_path: Path) -> None:
    report = denoise_file(saved(tmp_path), tmp_path / "out.tif", IdentityEngine())
    assert report["in_domain"] is True
    assert report["frames_out_of_domain"] == 0


def test_output_carries_the_engines_identity_and_the_pixel_size(tmp_path: Path) -> None:
    engine = CarefulEngine()
    source = saved(tmp_path, name="in.h5", pixel_size_m=6.2e-12)
    denoise_file(source, tmp_path / "out.tif", engine, gain=2.0)
    denoise_file(source, tmp_path / "out.h5", engine)
    with tifffile.TiffFile(tmp_path / "out.tif") as file:
        description = json.loads(file.pages.first.description)
    assert description["engine"] == engine.identity
    assert description["input"] == "in.h5"
    assert description["gain"] == 2.0
    with h5py.File(tmp_path / "out.h5") as file:
        assert json.loads(file["movie"].attrs["engine"]) == engine.identity
    with open_movie(tmp_path / "out.tif") as opened:
        assert opened.pixel_size_m == 6.2e-12


def test_gain_and_offset_turn_adu_into_electrons(tmp_path: Path) -> None:
    source = saved(tmp_path, movie(dtype=np.uint16) * 32 + 100)
    report = denoise_file(source, tmp_path / "out.npy", CarefulEngine(), gain=32.0, offset=100.0)
    np.testing.assert_allclose(read(tmp_path / "out.npy"), 2.0 * movie())
    assert report["dose"] == pytest.approx(movie().mean(), abs=1e-6)
    assert report["in_domain"] is True


@pytest.mark.parametrize("dtype", ["bool", "float16", "int64", "uint64", ">u2", ">f8", "float64"])
def test_every_stored_type_is_denoised(tmp_path: Path, dtype: str) -> None:
    pixels = movie().clip(0, 1).astype(dtype)
    np.save(tmp_path / "in.npy", pixels)
    denoise_file(tmp_path / "in.npy", tmp_path / "out.npy", CarefulEngine())
    np.testing.assert_array_equal(read(tmp_path / "out.npy"), 2 * pixels.astype(np.float32))


@pytest.mark.parametrize("shape", [(1, 1), (1, 31), (245, 158)])
def test_image_of_any_size_is_denoised(tmp_path: Path, shape: tuple[int, int]) -> None:
    tifffile.imwrite(tmp_path / "in.tif", np.ones(shape, np.uint8))
    report = denoise_file(tmp_path / "in.tif", tmp_path / "out.tif", IdentityEngine())
    assert report["shape"] == [1, *shape]
    np.testing.assert_array_equal(read(tmp_path / "out.tif")[0], np.ones(shape))


def test_dataset_is_chosen(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "in.h5", "w") as file:
        file["a"], file["b"] = movie(), movie(2)
    with pytest.raises(FileFormatError, match="choose one as dataset"):
        denoise_file(tmp_path / "in.h5", tmp_path / "out.npy", IdentityEngine())
    assert (
        denoise_file(tmp_path / "in.h5", tmp_path / "out.npy", IdentityEngine(), dataset="b")["frames"] == 2
    )


# -- what is refused ------------------------------------------------------------


def only(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("options", [{}, {"gain": 32.0}], ids=["electrons", "adu"])
def test_pixels_that_are_not_numbers_are_refused(tmp_path: Path, bad: float, options: dict[str, Any]) -> None:
    pixels = movie(dtype=np.float32)
    pixels[5, 3, 4] = bad
    engine = CarefulEngine()
    with pytest.raises(FileFormatError, match=r"in\.npy: frame 5 has pixels that are not numbers"):
        denoise_file(saved(tmp_path, pixels), tmp_path / "out.tif", engine, **options)
    assert only(tmp_path) == ["in.npy"]
    assert engine.in_flight == 0


def test_picture_that_is_no_number_is_not_written(tmp_path: Path) -> None:
    pixels = np.full((2, 64, 64), 3e38, np.float32)
    engine = load_engine(device="cpu")
    with pytest.raises(EngineError, match=r"frame 0 of .*mean is 3e\+38 electrons/pixel"):
        denoise_file(saved(tmp_path, pixels), tmp_path / "out.tif", engine)
    engine.close()
    assert only(tmp_path) == ["in.npy"]


def test_infinities_that_cancel_are_refused_without_a_warning(tmp_path: Path) -> None:
    pixels = movie(dtype=np.float32)
    pixels[0, 0, :2] = np.inf, -np.inf
    with pytest.raises(FileFormatError, match="frame 0 has pixels that are not numbers"):
        denoise_file(saved(tmp_path, pixels), tmp_path / "out.tif", CarefulEngine())


def test_negative_mean_is_refused_and_the_offset_suspected(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match=r"frame 0 has a mean of -0\.5.*check the offset \(1 ADU\)"):
        denoise_file(saved(tmp_path), tmp_path / "out.tif", CarefulEngine(), offset=1.0)
    assert only(tmp_path) == ["in.npy"]


def test_single_negative_pixels_are_noise_and_pass(tmp_path: Path) -> None:
    pixels = movie(dtype=np.float32)
    pixels[0, 0, 0] = -0.3
    denoise_file(saved(tmp_path, pixels), tmp_path / "out.npy", CarefulEngine())
    assert read(tmp_path / "out.npy")[0, 0, 0] == pytest.approx(-0.6)


def test_input_is_never_its_own_output(tmp_path: Path) -> None:
    source = saved(tmp_path)
    (tmp_path / "link.npy").symlink_to(source)
    for same in (source, tmp_path / "link.npy", tmp_path / "." / "in.npy"):
        with pytest.raises(FileFormatError, match="is the input itself"):
            denoise_file(source, same, IdentityEngine(), overwrite=True)
    np.testing.assert_array_equal(read(source), movie())


def test_existing_output_is_kept_unless_overwriting_is_allowed(tmp_path: Path) -> None:
    source, output = saved(tmp_path), saved(tmp_path, movie(2), "out.npy")
    with pytest.raises(FileFormatError, match="exists already"):
        denoise_file(source, output, IdentityEngine())
    assert len(read(output)) == 2
    denoise_file(source, output, IdentityEngine(), overwrite=True)
    assert len(read(output)) == 7


def test_output_that_cannot_be_written_is_refused_before_any_work(tmp_path: Path) -> None:
    source = saved(tmp_path)
    for output, complaint in {
        "nowhere/out.tif": "there is no folder",
        "out.png": "suffix must be one of",
    }.items():
        with pytest.raises(FileFormatError, match=complaint):
            denoise_file(source, tmp_path / output, IdentityEngine())


def test_missing_or_broken_input_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in.tif").write_bytes(b"no movie")
    for name in ("in.tif", "missing.tif"):
        with pytest.raises(FileFormatError, match=name):
            denoise_file(tmp_path / name, tmp_path / "out.tif", IdentityEngine())
    assert only(tmp_path) == ["in.tif"]


@pytest.mark.parametrize(
    ("gain", "offset"), [(0, 0), (-1, 0), (np.nan, 0), (np.inf, 0), (1, np.nan), (1, np.inf)]
)
def test_gain_and_offset_that_make_no_sense_are_refused(tmp_path: Path, gain: float, offset: float) -> None:
    with pytest.raises(ValueError, match="must be"):
        denoise_file(saved(tmp_path), tmp_path / "out.tif", IdentityEngine(), gain=gain, offset=offset)


class BrokenEngine(CarefulEngine):
    """Raises `error` at its fifth frame, when it is submitted or when it is collected."""

    def __init__(self, step: str, error: Exception) -> None:
        super().__init__()
        self._step, self._error, self._calls = step, error, 0

    def submit(self, counts: np.ndarray, expected: np.ndarray) -> Any:
        self._fail("submit")
        return super().submit(counts, expected)

    def collect(self, ticket: Any) -> np.ndarray:
        done = super().collect(ticket)
        self._fail("collect")
        return done

    def _fail(self, step: str) -> None:
        self._calls += step == self._step
        if step == self._step and self._calls == 5:
            raise self._error


@pytest.mark.parametrize("step", ["submit", "collect"])
def test_engine_that_fails_leaves_no_output_and_nothing_in_flight(tmp_path: Path, step: str) -> None:
    engine = BrokenEngine(step, RuntimeError("out of memory"))
    with pytest.raises(EngineError, match=r"careful failed on frame 4 of .*in\.npy: out of memory"):
        denoise_file(saved(tmp_path), tmp_path / "out.tif", engine)
    assert only(tmp_path) == ["in.npy"]
    assert engine.in_flight == 0


def test_engines_own_errors_pass_unchanged(tmp_path: Path) -> None:
    with pytest.raises(EngineUnavailable, match=r"^no driver$"):
        denoise_file(
            saved(tmp_path), tmp_path / "out.tif", BrokenEngine("collect", EngineUnavailable("no driver"))
        )


def test_caller_that_gives_up_on_the_way_leaves_nothing_behind(tmp_path: Path) -> None:
    def interrupted(done: int, frames: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    engine = CarefulEngine()
    with pytest.raises(KeyboardInterrupt):
        denoise_file(saved(tmp_path), tmp_path / "out.h5", engine, on_frame=interrupted)
    assert only(tmp_path) == ["in.npy"]
    assert engine.in_flight == 0


def test_folder_is_denoised_file_by_file_and_a_bad_one_stops_none(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    counts = np.random.default_rng(0).poisson(1.0, (3, 16, 20)).astype(np.uint8)
    np.save(folder / "a.npy", counts)
    np.save(folder / "c.npy", counts[0])
    save_movie(folder / "c.tif", counts, shape=counts.shape, dtype=np.uint8)
    (folder / "b.npy").write_bytes(b"rubbish")
    (folder / "notes.txt").write_text("not a movie")
    done = dict(denoise_folder(folder, tmp_path / "out", IdentityEngine(), suffix=".npy"))
    assert [path.name for path in done] == ["a.npy", "b.npy", "c.npy", "c.tif"]
    assert isinstance(done[folder / "b.npy"], FileFormatError)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.npy", "c-npy.npy", "c-tif.npy"]
    np.testing.assert_array_equal(np.load(tmp_path / "out/a.npy"), counts)


def test_report_on_a_folder_is_a_line_for_each_file(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    np.save(tmp_path / "in/a.npy", np.ones((3, 16, 20), np.uint8))
    (tmp_path / "in/b.npy").write_bytes(b"rubbish")
    np.save(tmp_path / "in/c.npy", np.ones((16, 20), np.uint8))
    (tmp_path / "out/c.npy").touch()
    order = [
        "denoise",
        str(tmp_path / "in"),
        str(tmp_path / "out"),
        "--suffix",
        ".npy",
        "--engine",
        "identity",
    ]
    done = CliRunner().invoke(app, order)
    assert done.exit_code == 1  # of b.npy
    lines = dict(line.strip().split(maxsplit=1) for line in done.stdout.splitlines())
    assert lines["a.npy"].startswith("3 frames, ")
    assert lines["a.npy"].endswith(f" frames/s, 1 electrons/px, to {tmp_path / 'out/a.npy'}")
    assert (lines["b.npy"], lines["c.npy"], len(lines)) == ("failed", "skipped", 3)


def test_folder_without_movies_is_explained(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match=r"holds no movie; they end in \.npy, \.tif"):
        list(denoise_folder(tmp_path, tmp_path / "out", IdentityEngine()))


def test_second_run_over_a_folder_makes_what_is_missing(tmp_path: Path) -> None:
    folder, output = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for name in ("a", "b"):
        np.save(folder / f"{name}.npy", movie())
    list(denoise_folder(folder, output, IdentityEngine(), suffix=".npy"))
    (output / "a.npy").unlink()
    (output / "b.npy").write_bytes(b"mine")
    done = dict(denoise_folder(folder, output, IdentityEngine(), suffix=".npy"))
    assert done[folder / "b.npy"] is None
    assert (output / "b.npy").read_bytes() == b"mine"
    np.testing.assert_array_equal(read(output / "a.npy"), movie())
    done = dict(denoise_folder(folder, output, IdentityEngine(), suffix=".npy", overwrite=True))
    assert None not in done.values()
    np.testing.assert_array_equal(read(output / "b.npy"), movie())


def test_folder_into_itself_is_an_error_and_nothing_to_skip(tmp_path: Path) -> None:
    source = saved(tmp_path)
    done = dict(denoise_folder(tmp_path, tmp_path, IdentityEngine(), suffix=".npy"))
    assert "is the input itself" in str(done[source])


def test_skipped_files_are_counted(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    saved(folder)
    command = ["denoise", str(folder), str(tmp_path / "out"), "--engine", "identity", "--json"]
    first, second = (CliRunner().invoke(app, command) for _ in range(2))
    assert (first.exit_code, second.exit_code) == (0, 0)
    report = json.loads(second.stdout)
    assert (report["files"], report["skipped"], report["failed"]) == ({}, ["in.npy"], {})
    assert "1 of 1 exist in" in second.stderr
    assert "--overwrite makes them again" in second.stderr


def test_brackets_in_a_name_are_no_markup(tmp_path: Path) -> None:
    source = saved(tmp_path, name="[bold]run[7].npy")
    done = CliRunner().invoke(
        app, ["denoise", str(source), str(tmp_path / "[x].npy"), "--engine", "identity"]
    )
    assert done.exit_code == 0, done.output
    assert "[x].npy" in done.stdout.replace("\n", "")
