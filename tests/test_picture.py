"""What the live page paints: contrast, averages, spectra, and the past that it keeps."""

from __future__ import annotations

import gc
import json
import math
import weakref
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from emstream.frame import Frame, FrameHeader
from emstream.view.average import RunningAverage
from emstream.view.history import MOST_HELD, History, extent
from emstream.view.pair import Pair
from emstream.view.picture import Painter
from emstream.view.request import PERCENTILES, Request, parse
from emstream.view.scale import Scale, grey, histogram
from emstream.view.shrink import average_squares, cut
from emstream.view.snapshot import name_of, portable
from emstream.view.spectrum import spectrum
from tests.test_view import assert_shows

SHAPE = (48, 64)


def pair(key: int, image: np.ndarray | None = None, *, arrived_ns: int = 0, series: int = 1) -> Pair:
    """A pair whose two sides are the same `image`, by default counts of their own."""
    image = np.random.default_rng(key).poisson(2, SHAPE).astype(np.uint8) if image is None else image
    frame = Frame(FrameHeader(key, image.shape, image.dtype.name, series=series), image)
    return Pair(frame, frame, arrived_ns, key)


# -- contrast ---------------------------------------------------------------------

images = hnp.arrays(
    st.sampled_from([np.uint8, np.uint16, np.int32, np.float32, np.float64]),
    hnp.array_shapes(min_dims=2, max_dims=2),
)


@given(images)
def test_any_pixels_can_be_painted_and_keep_their_order(image: np.ndarray) -> None:
    picture = Painter().paint([pair(1, image)], Request())
    raw = picture.header["pictures"][0]
    low, high = raw["low"], raw["high"]
    assert -np.inf < low < high < np.inf
    shown = np.frombuffer(picture.pixels[: image.size], np.uint8).reshape(image.shape)
    ordered = np.isfinite(image.astype(np.float64)) & (np.abs(image.astype(np.float64)) < 1e30)
    order = np.argsort(image[ordered], kind="stable")
    assert (np.diff(shown[ordered][order].astype(int)) >= 0).all()
    json.dumps(picture.header, allow_nan=False)


def test_contrast_ends_at_the_percentiles() -> None:
    image = np.linspace(-5, 5, 10_001).reshape(73, 137)
    scale = Scale()
    scale.follow(image, 0)
    np.testing.assert_allclose([scale.low, scale.high], np.percentile(image, PERCENTILES), atol=1e-6)
    assert_shows(grey(image, scale.low, scale.high), {"low": scale.low, "high": scale.high}, image)


def test_contrast_follows_a_brighter_image_within_a_second_but_not_at_once() -> None:
    scale = Scale()
    dark, bright = np.array([0.0, 1.0]), np.array([0.0, 10.0])
    scale.follow(dark, 0)
    scale.follow(bright, 25_000_000)
    assert 1 < scale.high < 2.5
    for tick in range(2, 41):
        scale.follow(bright, tick * 25_000_000)
    assert scale.high == pytest.approx(10, abs=0.5)


def test_stepping_back_keeps_the_contrast() -> None:
    painter = Painter()
    past = [pair(1, np.full(SHAPE, 1, np.uint8), arrived_ns=1), pair(2, arrived_ns=2)]
    now = painter.paint(past, Request()).header["pictures"][0]
    before = painter.paint(past[:1], Request(at=1)).header["pictures"][0]
    assert (before["low"], before["high"]) == (now["low"], now["high"])


def test_new_series_gets_a_contrast_of_its_own() -> None:
    painter = Painter()
    dim, bright = pair(1), pair(2, np.full(SHAPE, 200, np.uint8), series=2)
    painter.paint([dim], Request())
    assert painter.paint([dim, bright], Request()).header["pictures"][0]["high"] > 100


@given(st.integers(0, 40), st.integers(1, 200), st.sampled_from([1.0, 0.5, 0.125]))
def test_histogram_of_counts_has_as_many_of_them_in_every_bin(low: int, span: int, step: float) -> None:
    values = low + np.arange(span) * step
    bins = histogram(values, values.min(), values.max(), step)
    assert sum(bins["counts"]) == span
    assert len(set(bins["counts"][:-1])) <= 1


def test_histogram_finds_the_values() -> None:
    found = histogram(np.array([1.0, 1.0, 9.0]), 0, 10)
    width = (found["to"] - found["from"]) / len(found["counts"])
    assert {round(found["from"] + (i + 0.5) * width): n for i, n in enumerate(found["counts"]) if n} == {
        1: 2,
        9: 1,
    }


# -- cutting and averaging ------------------------------------------------------------


@given(st.integers(1, 3000), st.integers(1, 60))
def test_shrinking_keeps_the_mean_and_never_yields_an_empty_image(rows: int, columns: int) -> None:
    image = np.full((rows, columns), 3, np.uint16)
    small, region = cut(image, Request(screen=(300, 300)))
    assert small.size
    assert (small == 3).all()
    assert max(small.shape) <= 450 or min(small.shape) == 1
    assert region[:2] == (0, 0)


sides = st.integers(0, 100)


@given(st.tuples(sides, sides, sides, sides), st.tuples(st.integers(1, 64), st.integers(1, 64)))
def test_any_region_is_a_part_of_the_frame_and_what_is_sent_stands_for_it(
    region: tuple[int, int, int, int], screen: tuple[int, int]
) -> None:
    image = np.random.default_rng(0).poisson(2, (50, 70)).astype(np.float32)
    small, (top, left, height, width) = cut(image, Request(region=region, screen=screen))
    assert small.size
    part = image[top : top + height, left : left + width]
    assert part.shape == (height, width)
    factor = height // small.shape[0]
    np.testing.assert_allclose(average_squares(part, factor), small)


def test_average_is_exact_however_the_viewer_jumps() -> None:
    past = [pair(key) for key in range(1, 30)]
    average = RunningAverage()
    for last in (5, 6, 9, 29, 12, 3, 1, 28):
        mean, frames = average.of(past[:last], 8)
        used = past[max(0, last - 8) : last]
        assert frames == len(used)
        total = np.sum([each.raw.data for each in used], axis=0)
        np.testing.assert_array_equal(mean, (total / frames).astype(np.float32))


def test_average_begins_again_with_a_series_and_a_frame_size() -> None:
    past = [pair(1), pair(2, series=2), pair(3, series=2)]
    mean, frames = RunningAverage().of(past, 8)
    assert frames == 2
    np.testing.assert_array_equal(mean, (past[1].raw.data.astype(float) + past[2].raw.data) / 2)
    smaller = pair(4, np.ones((8, 8), np.uint8), series=2)
    assert RunningAverage().of([*past, smaller], 8)[1] == 1


def test_average_that_nobody_wants_keeps_no_frames() -> None:
    painter, past = Painter(), [pair(key) for key in range(1, 6)]
    painter.paint(past, Request(average=4))
    raw = weakref.ref(past[2].raw.data)
    del past[:4]
    gc.collect()
    assert raw() is not None
    painter.keep_averages({1, 8})
    gc.collect()
    assert raw() is None


@pytest.mark.parametrize("frames", [3, 63, 65, 128])
def test_averages_are_of_a_few_widths_only(frames: int) -> None:
    with pytest.raises(ValueError, match="average must be"):
        parse(json.dumps({"average": frames}))


# -- spectra -----------------------------------------------------------------------


@pytest.mark.parametrize(("halvings", "peak"), [(0, 8), (1, 8), (2, 8)])
def test_peak_of_a_lattice_stays_at_its_frequency_whatever_the_reach(halvings: int, peak: int) -> None:
    rows = np.cos(2 * np.pi * np.arange(128) * peak / 128)
    power = spectrum(np.tile(rows[:, None], (1, 128)), halvings)
    assert power.shape == (128 >> halvings,) * 2
    middle = power.shape[0] // 2
    assert {middle - peak, middle + peak} >= {int(i) for i in np.argwhere(power > power.max() - 0.01)[:, 0]}


@given(images)
def test_spectrum_takes_any_image(image: np.ndarray) -> None:
    assert spectrum(image).size


# -- the past ---------------------------------------------------------------------


def kept(pairs: Sequence[Pair]) -> list[int]:
    return [each.key for each in pairs]


def test_history_ends_at_its_span_and_at_its_bytes() -> None:
    history = History(span_ns=100, limit_bytes=10**9)
    for key in range(1, 21):
        history.add(pair(key, arrived_ns=10 * key))
    assert kept(history.of("anybody")) == list(range(10, 21))
    size = pair(1).nbytes
    history = History(limit_bytes=5 * size)
    for key in range(1, 21):
        history.add(pair(key))
        assert history.nbytes <= 5 * size
    assert kept(history.of("anybody")) == [16, 17, 18, 19, 20]


def test_held_past_stands_still_until_it_is_released() -> None:
    history = History(span_ns=30)
    for key in range(1, 4):
        history.add(pair(key, arrived_ns=10 * key))
    history.hold("viewer")
    for key in range(4, 10):
        history.add(pair(key, arrived_ns=10 * key))
    assert kept(history.of("viewer")) == [1, 2, 3]
    assert kept(history.find(2)) == [1, 2]
    assert kept(history.of("another")) == [6, 7, 8, 9]
    history.release("viewer")
    assert history.find(2) == ()
    assert kept(history.of("viewer")) == [6, 7, 8, 9]


def test_only_so_many_pasts_are_held() -> None:
    history = History(span_ns=0)
    for key in range(1, MOST_HELD + 2):
        history.add(pair(key, arrived_ns=key))
        history.add(pair(key, arrived_ns=key))
        history.hold(key)
    assert len(history._held) == MOST_HELD
    assert 1 not in history._held


def test_extent_says_where_something_went_wrong() -> None:
    past = [pair(3, arrived_ns=0), replace(pair(4, arrived_ns=2_000_000_000), fault=True)]
    assert extent(past) == {"first": 3, "last": 4, "seconds": 2.0, "faults": [4]}


# -- requests and names --------------------------------------------------------------


def test_request_is_read_as_it_was_written() -> None:
    text = json.dumps(
        {
            "region": [1, 2, 3, 4], "screen": [512, 640], "raw": ["values", -1.5, 2], "average": 8,
            "denoised": ["percentiles", 0.12, 99], "spectra": ["denoised", "raw"], "halvings": 2, "at": 7,
        }
    )  # fmt: skip
    assert parse(text) == Request(
        region=(1, 2, 3, 4), screen=(512, 640), raw=("values", -1.5, 2), average=8,
        denoised=("percentiles", 0.1, 99), spectra=("raw", "denoised"), halvings=2, at=7,
    )  # fmt: skip
    assert parse("{}") == parse('{"region": null, "at": null}') == Request()


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(), lambda x: st.lists(x, max_size=5)))
def test_nonsense_of_any_kind_is_a_value_error(value: object) -> None:
    for key in ("region", "screen", "raw", "average", "spectra", "at"):
        if value is None or (key == "spectra" and value == []):
            continue
        with pytest.raises(ValueError, match=key if key != "raw" else "contrast"):
            parse(json.dumps({key: value}))


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.binary() | st.integers(), inner),
    )
)
def test_any_header_is_strict_json(value: object) -> None:
    json.dumps(portable({"extra": value}), allow_nan=False, ensure_ascii=False).encode()


def test_header_keeps_what_json_has_no_word_for() -> None:
    extra = {b"\x01": math.nan, "limits": (-math.inf, 2), 7: b"\xff", "\ud800": True}
    assert portable(extra) == {"01": "nan", "limits": ["-inf", 2], "7": "ff", "?": True}


def test_name_of_a_snapshot_is_safe_for_a_file() -> None:
    nasty = pair(7)
    nasty.raw.header.source = "../../etc/pass wd;"
    assert name_of(nasty) == "emstream-etc-pass-wd-1-000007"
