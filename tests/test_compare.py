"""Films and sheets of raw beside denoised."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from emstream.compare import Comparison, binned, draw_scale_bar, grey, titles
from emstream.denoise import denoise_file
from emstream.errors import FileFormatError
from emstream.inference import IdentityEngine
from emstream.movies import save_movie

PIL = pytest.importorskip("PIL.Image", reason="comparisons need pillow: pip install 'emstream[files]'")
HEIGHT, WIDTH = 48, 60


def pair(n: int) -> tuple[np.ndarray, np.ndarray]:
    """A raw frame of noise, and a denoised one whose bright column is the frame's number."""
    raw = np.random.default_rng(n).poisson(2.0, (HEIGHT, WIDTH)).astype(np.uint8)
    denoised = np.full((HEIGHT, WIDTH), 2.0, np.float32)
    denoised[:, 2 * n : 2 * n + 2] = 4.0
    return raw, denoised


def write(path: Path, frames: int, **options: float) -> None:
    with Comparison(path, frames, **options) as comparison:  # type: ignore[arg-type]
        for n in range(frames):
            comparison.add(*pair(n))


def bright_columns(picture: np.ndarray) -> list[int]:
    """Of the right half."""
    right = picture[:, -WIDTH:].astype(float).mean(axis=0)
    return [int(column) for column in np.flatnonzero(right > right.min() + 0.6 * (right.max() - right.min()))]


@pytest.mark.parametrize("frames", [1, 5, 20])
def test_film_has_every_frame_in_order_raw_on_the_left(tmp_path: Path, frames: int) -> None:
    av = pytest.importorskip("av", reason="films need av: pip install 'emstream[files]'")
    write(tmp_path / "c.mp4", frames)
    with av.open(str(tmp_path / "c.mp4")) as container:
        pictures = [frame.to_ndarray(format="gray") for frame in container.decode(video=0)]
    assert len(pictures) == frames
    for n, picture in enumerate(pictures):
        assert picture.shape == (HEIGHT, 2 * WIDTH + 8)
        assert set(bright_columns(picture)) & {2 * n, 2 * n + 1}
        assert picture[:, :WIDTH].std() > 30
    assert [path.name for path in tmp_path.iterdir()] == ["c.mp4"]


def test_animation_lasts_as_long_as_its_rate_says(tmp_path: Path) -> None:
    write(tmp_path / "c.gif", 12, rate=20.0)
    with PIL.open(tmp_path / "c.gif") as image:
        assert image.n_frames == 12
        assert image.info["duration"] == 50
        image.seek(7)
        assert set(bright_columns(np.asarray(image.convert("L")))) >= {14, 15}


@pytest.mark.parametrize("rate", [0.3, 12.5, 29.97])
def test_film_lasts_as_long_as_its_rate_says(tmp_path: Path, rate: float) -> None:
    av = pytest.importorskip("av", reason="films need av: pip install 'emstream[files]'")
    write(tmp_path / "c.mp4", 3, rate=rate)
    with av.open(str(tmp_path / "c.mp4")) as container:
        assert float(container.streams.video[0].average_rate) == pytest.approx(rate, rel=1e-3)


def test_animation_keeps_a_rate_that_is_no_multiple_of_10_ms(tmp_path: Path) -> None:
    write(tmp_path / "c.gif", 30, rate=30.0)
    with PIL.open(tmp_path / "c.gif") as image:
        lasts_ms = [image.seek(n) or image.info["duration"] for n in range(image.n_frames)]
        assert image.info["loop"] == 0
    assert set(lasts_ms) == {30, 40}
    assert sum(lasts_ms) == 1000


@pytest.mark.parametrize(
    ("name", "rate"),
    [("c.gif", 51.0), ("c.mp4", 241.0), ("c.mp4", np.inf), ("c.gif", np.nan), ("c.mp4", 0.0)],
)
def test_rate_that_nothing_shows_is_refused_before_any_work(tmp_path: Path, name: str, rate: float) -> None:
    if name.endswith(".mp4"):
        pytest.importorskip("av", reason="films need av: pip install 'emstream[files]'")
    with pytest.raises(ValueError, match=rf"from 0\.01 to .* frames/s, got {rate:g} frames/s"):
        denoise_file(
            tmp_path / "in.npy", tmp_path / "out.npy", IdentityEngine(), compare=tmp_path / name, rate=rate
        )


def test_memory_does_not_grow_with_the_length_of_an_animation(tmp_path: Path) -> None:
    frame = np.random.default_rng(0).poisson(2.0, (128, 128)).astype(np.float32)
    write(tmp_path / "before.gif", 9)  # imports are paid for
    tracemalloc.start()
    try:
        with Comparison(tmp_path / "c.gif", 150) as comparison:
            for _ in range(10):
                comparison.add(frame, frame)
            tracemalloc.reset_peak()  # the grey levels are fixed
            for _ in range(140):
                comparison.add(frame, frame)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    with PIL.open(tmp_path / "c.gif") as image:
        assert image.n_frames == 150
    assert peak < 40 * 128 * 264


@pytest.mark.parametrize(("frames", "shown"), [(1, [0]), (2, [0, 1]), (30, [0, 10, 19, 29])])
def test_sheet_shows_frames_from_the_first_to_the_last(tmp_path: Path, frames: int, shown: list[int]) -> None:
    write(tmp_path / "c.png", frames)
    sheet = np.asarray(PIL.open(tmp_path / "c.png"))
    assert sheet.shape[0] == len(shown) * (HEIGHT + 8) - 8
    for row, n in enumerate(shown):
        picture = sheet[row * (HEIGHT + 8) :][:HEIGHT]
        if 2 * n < WIDTH:
            assert bright_columns(picture) == [2 * n, 2 * n + 1]


def test_strip_above_names_both_sides_and_the_frame(tmp_path: Path) -> None:
    flat = np.random.default_rng(0).poisson(2.0, (256, 300)).astype(np.float32)
    for name in ("c.png", "c.gif"):
        with Comparison(tmp_path / name, 12) as comparison:
            for _ in range(12):
                comparison.add(flat, flat)
    sheet = np.asarray(PIL.open(tmp_path / "c.png"))
    assert sheet.shape == (4 * (18 + 256 + 8) - 8, 608)
    strips = [sheet[row : row + 18] for row in range(0, len(sheet), 18 + 256 + 8)]
    with PIL.open(tmp_path / "c.gif") as image:
        for strip, number in zip(strips, (0, 4, 7, 11), strict=True):
            wanted = titles((256, 300), number, 11)
            np.testing.assert_array_equal(strip, wanted)
            image.seek(number)
            np.testing.assert_array_equal(np.asarray(image.convert("L"))[:18], wanted)
    names = [strips[0][:, :300], strips[0][:, 308:]]
    assert all((name > 200).sum() > 50 for name in names)
    assert (names[0] != names[1]).any(), "they say the same"
    assert len({strip.tobytes() for strip in strips}) == 4


def test_frames_too_small_for_a_title_have_none() -> None:
    assert titles((512, 60), 3, 9) is None
    assert titles((32, 512), 3, 9) is None
    assert titles((128, 128), 3, 9) is not None


def test_scale_bar_is_as_long_as_it_says() -> None:
    picture = np.zeros((400, 500), np.uint8)
    draw_scale_bar(picture, 1e-10)
    assert (picture[400 - 14] == 255).sum() == 101  # 10 nm, both ends drawn


def test_frames_with_a_pixel_size_get_a_scale_bar(tmp_path: Path) -> None:
    flat = np.zeros((400, 500), np.float32)
    for size, name in ((None, "without"), (1e-10, "with")):
        with Comparison(tmp_path / f"{name}.png", 1, pixel_size_m=size) as comparison:
            comparison.add(flat, flat)
    with_bar, without = (np.asarray(PIL.open(tmp_path / f"{name}.png")) for name in ("with", "without"))
    assert (with_bar[:, :500] == without[:, :500]).all()
    assert (with_bar[:, 508:] > without[:, 508:]).sum() > 100


def test_large_frames_are_binned_and_grey_levels_kept(tmp_path: Path) -> None:
    frame = np.repeat(np.arange(2048, dtype=np.float32)[None], 2048, axis=0)
    with Comparison(tmp_path / "c.png", 1) as comparison:
        comparison.add(frame, frame)
    sheet = np.asarray(PIL.open(tmp_path / "c.png"))
    assert sheet.shape == (48 + 1024, 2056)
    assert np.abs(sheet[48, 1032:].astype(int) - np.linspace(0, 255, 1024)).max() < 4
    assert (binned(np.ones((3, 5, 7)), 2) == 1).all()
    assert grey(np.array([[0.0, 1.0, 9.0]]), 1, 2).tolist() == [[0, 0, 255]]


@pytest.mark.parametrize(
    ("name", "text"),
    [("c.avi", r"one of \.mp4, \.gif, \.png, got '\.avi'"), ("no/c.gif", "there is no folder")],
)
def test_comparison_that_cannot_be_written_is_refused_before_any_work(
    tmp_path: Path, name: str, text: str
) -> None:
    with pytest.raises(FileFormatError, match=text):
        Comparison(tmp_path / name, 3)


def test_existing_comparison_is_kept_unless_overwriting_is_allowed(tmp_path: Path) -> None:
    (tmp_path / "c.gif").write_text("mine")
    with pytest.raises(FileFormatError, match="exists already"):
        write(tmp_path / "c.gif", 2)
    assert (tmp_path / "c.gif").read_text() == "mine"


def test_failure_on_the_way_leaves_no_comparison(tmp_path: Path) -> None:
    for name in ("c.gif", "c.png", "c.mp4"):
        if name == "c.mp4":
            pytest.importorskip("av")

        def fail(name: str = name) -> None:
            with Comparison(tmp_path / name, 20) as comparison:
                for n in range(10):
                    comparison.add(*pair(n))
                raise RuntimeError("the engine")

        with pytest.raises(RuntimeError, match="the engine"):
            fail()
        assert not list(tmp_path.iterdir())


def test_denoise_writes_the_comparison_beside_its_output(tmp_path: Path) -> None:
    frames = [pair(n)[0] for n in range(9)]
    save_movie(tmp_path / "in.npy", frames, shape=(9, HEIGHT, WIDTH), dtype=np.uint8)
    report = denoise_file(
        tmp_path / "in.npy", tmp_path / "out.npy", IdentityEngine(), compare=tmp_path / "c.gif"
    )
    assert report["compare"] == str(tmp_path / "c.gif")
    with PIL.open(tmp_path / "c.gif") as image:
        assert image.n_frames == 9


@pytest.mark.parametrize("step", ["_finish", "_draw"])
@pytest.mark.parametrize("name", ["c.gif", "c.png", "c.mp4"])
def test_comparison_that_fails_leaves_no_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, step: str
) -> None:
    if name == "c.mp4":
        pytest.importorskip("av", reason="films need av: pip install 'emstream[files]'")

    def fail(*arguments: object) -> None:
        raise RuntimeError("no such encoder")

    monkeypatch.setattr(Comparison, step, fail)
    source = tmp_path / "in.npy"
    save_movie(source, [pair(n)[0] for n in range(9)], shape=(9, HEIGHT, WIDTH), dtype=np.uint8)
    with pytest.raises(FileFormatError, match=rf"{name} cannot be written: no such encoder"):
        denoise_file(source, tmp_path / "out.tif", IdentityEngine(), compare=tmp_path / name)
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("shape", [(1, 9), (9, 1)])
def test_film_of_frames_without_two_pixels_is_refused(tmp_path: Path, shape: tuple[int, int]) -> None:
    pytest.importorskip("av", reason="films need av: pip install 'emstream[files]'")
    source = tmp_path / "in.npy"
    np.save(source, np.ones((3, *shape), np.uint8))
    for name in ("c.mp4", "c.gif"):
        with pytest.raises(
            FileFormatError, match=rf"at least 2x2 px, got {shape[0]}x{shape[1]}; a \.png takes"
        ):
            denoise_file(source, tmp_path / "out.npy", IdentityEngine(), compare=tmp_path / name)
    denoise_file(source, tmp_path / "out.npy", IdentityEngine(), compare=tmp_path / "c.png")
    assert len(list(tmp_path.iterdir())) == 3


def test_folder_is_no_comparison(tmp_path: Path) -> None:
    (tmp_path / "c.png").mkdir()
    with pytest.raises(FileFormatError, match="is a folder; name a file"):
        Comparison(tmp_path / "c.png", 3, overwrite=True)
