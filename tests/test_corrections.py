"""Mask, maps, binning and region of interest: what the engine gets, and what the header says of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emstream.badpixels import FARTHEST_PX, BadPixels
from emstream.corrections import Corrections, Region
from emstream.errors import SourceError
from emstream.intake import Intake, Overrun
from emstream.ledger import Ledger
from emstream.ring import Ring, Slot
from emstream.serve import Settings
from tests.conftest import header, message

SHAPE = (12, 16)
COUNTS = np.random.default_rng(0).poisson(5, SHAPE).astype(np.uint16)


def take(corrections: Corrections, pixels: np.ndarray = COUNTS, **fields: Any) -> tuple[Any, np.ndarray]:
    """What comes of one frame: its header and pixels."""
    ring = Ring(2, 1)
    intake = Intake(ring, Ledger(), corrections=corrections)
    row = intake.offer(header(0, pixels.shape, pixels.dtype.name, **fields))
    assert row is not None
    row[:] = pixels
    intake.accept()
    slot = ring.claim(block=False)
    assert isinstance(slot, Slot)
    return slot.headers[0], slot.counts[0]


def test_frame_without_corrections_is_written_once_into_the_ring() -> None:
    ring = Ring(2, 1)
    row = Intake(ring, Ledger()).offer(header(0, SHAPE))
    assert row is not None
    assert np.shares_memory(row, ring._filling._rows)  # type: ignore[union-attr]


def test_bad_pixel_takes_the_count_of_a_good_neighbour() -> None:
    mask = np.zeros(SHAPE, np.uint8)
    mask[3:5, 4] = mask[0, 0] = mask[-1, -1] = 1
    spoilt = np.where(mask, 65535, COUNTS).astype(np.uint16)
    head, pixels = take(Corrections(mask=mask), spoilt)
    assert pixels.dtype == np.uint16
    assert (pixels[mask == 0] == COUNTS[mask == 0]).all()
    for y, x in np.argwhere(mask):
        near = COUNTS[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2]
        assert pixels[y, x] in near[mask[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2] == 0]
    assert head.extra["corrections"][0]["bad_pixels"] == 4
    assert len(head.extra["corrections"][0]["mask"]) == 32


@given(st.integers(0, 2**32), st.integers(1, 30), st.integers(1, 30), st.floats(0, 0.95))
def test_every_bad_pixel_takes_the_nearest_good_one(seed: int, height: int, width: int, share: float) -> None:
    bad = np.random.default_rng(seed).random((height, width)) < share
    bad.flat[seed % bad.size] = False
    filled = np.where(bad, -1, np.arange(bad.size).reshape(bad.shape))
    BadPixels(bad).fill(filled)
    good = np.argwhere(~bad)
    for y, x in np.argwhere(bad):
        source = np.array(divmod(filled[y, x], width))
        assert not bad[tuple(source)]
        assert abs(source - (y, x)).sum() == abs(good - (y, x)).sum(axis=1).min()


def test_pixel_far_from_every_good_one_is_zero_and_costs_no_search() -> None:
    bad = np.ones((4, 3 * FARTHEST_PX), np.uint8)
    bad[:, 0] = 0
    frame = np.full(bad.shape, 7, np.uint16)
    BadPixels(bad).fill(frame)
    assert (frame[:, : FARTHEST_PX + 1] == 7).all()
    assert (frame[:, FARTHEST_PX + 1 :] == 0).all()


def test_offset_gain_and_maps_give_electrons() -> None:
    rng = np.random.default_rng(1)
    flat, gains = rng.uniform(0.5, 1.5, SHAPE), rng.uniform(10, 20, SHAPE)
    electrons = rng.poisson(4, SHAPE)
    adu = electrons * 2.0 * gains * (flat / flat.mean()) + 100
    corrections = Corrections(gain=2.0, offset=100.0, gain_map=gains, flat_field=flat)
    head, pixels = take(corrections, adu.astype(np.float32), units="ADU")
    np.testing.assert_allclose(pixels, electrons, atol=1e-3)
    assert (head.type, head.units) == ("float32", "electrons")
    assert {"gain", "offset", "gain_map", "flat_field"} == set(head.extra["corrections"][0])


def test_dark_frame_is_subtracted_and_gives_electrons() -> None:
    dark = np.random.default_rng(3).uniform(90, 110, SHAPE)
    dark[2, 3] = np.nan
    head, pixels = take(Corrections(offset_map=dark), (COUNTS + np.nan_to_num(dark)), units="ADU")
    good = np.isfinite(dark)
    np.testing.assert_allclose(pixels[good], COUNTS[good], atol=1e-4)
    assert pixels[2, 3] in (pixels[1, 3], pixels[3, 3], pixels[2, 2], pixels[2, 4])
    assert (head.units, head.type) == ("electrons", "float32")
    assert set(head.extra["corrections"][0]) == {"offset_map", "bad_pixels"}


def test_bad_pixels_may_be_no_numbers() -> None:
    mask = np.zeros(SHAPE)
    mask[5, 6] = 1
    frame = COUNTS.astype(np.float32)
    frame[5, 6] = np.nan
    for corrections in (Corrections(mask=mask), Corrections(mask=mask, gain=2.0)):
        _, pixels = take(corrections, frame.copy())
        assert np.isfinite(pixels).all()


def test_frame_that_corrections_make_infinite_is_rejected() -> None:
    ledger = Ledger()
    intake = Intake(Ring(2, 1), ledger, corrections=Corrections(gain=1e-9))
    row = intake.offer(header(0, SHAPE, "float32"))
    assert row is not None
    row[:] = 3e38
    intake.accept()
    assert ledger.reasons() == {"pixels are not numbers (NaN or infinite)": 1}


def test_flat_field_alone_keeps_the_mean_and_the_unit() -> None:
    flat = np.full(SHAPE, 300.0)
    flat[:, 8:] = 100.0
    head, pixels = take(Corrections(flat_field=flat), np.full(SHAPE, 6, np.uint8), units="ADU")
    assert pixels[0, 0] == pytest.approx(4)
    assert pixels[0, -1] == pytest.approx(12)
    assert head.units == "ADU"


def test_pixel_where_the_flat_field_is_dark_is_bad() -> None:
    flat = np.ones(SHAPE)
    flat[5, 5], flat[6, 6] = 0, np.nan
    head, pixels = take(Corrections(flat_field=flat))
    assert np.isfinite(pixels).all()
    assert head.extra["corrections"][0]["bad_pixels"] == 2


@pytest.mark.parametrize("size", [2, 3, 5])
def test_binning_adds_up_squares(size: int) -> None:
    head, pixels = take(Corrections(binning=size), pixel_size_m=1e-11)
    height, width = (length // size * size for length in SHAPE)
    squares = COUNTS[:height, :width].reshape(height // size, size, width // size, size)
    np.testing.assert_array_equal(pixels, squares.sum(axis=(1, 3)))
    assert head.shape == pixels.shape
    assert head.pixel_size_m == pytest.approx(size * 1e-11)


def test_region_of_interest_keeps_type_and_place() -> None:
    head, pixels = take(Corrections(roi=Region.of("4x6+2+3")))
    np.testing.assert_array_equal(pixels, COUNTS[2:6, 3:9])
    assert (head.shape, head.type) == ((4, 6), "uint16")
    assert head.extra["corrections"] == [{"roi": "4x6+2+3"}]


def test_everything_at_once_is_what_it_is_one_by_one() -> None:
    rng = np.random.default_rng(2)
    flat, mask = rng.uniform(0.5, 1.5, SHAPE), rng.random(SHAPE) < 0.1
    dark = rng.normal(0, 3, SHAPE)
    every = Corrections(
        gain=2.0, offset=1.0, offset_map=dark, flat_field=flat, mask=mask, binning=2, roi=Region(8, 10, 1, 2)
    )
    head, got = take(every)
    expected, divisor = COUNTS.copy(), 2.0 * flat / flat[~mask].mean()
    for values in (expected, divisor, dark):
        BadPixels(mask).fill(values)
    electrons = ((expected - 1.0 - dark) / divisor)[1:9, 2:12]
    assert {"gain", "offset", "offset_map", "flat_field", "mask", "binning", "roi", "bad_pixels"} == set(
        head.extra["corrections"][0]
    )
    np.testing.assert_allclose(got, electrons.reshape(4, 2, 5, 2).sum(axis=(1, 3)), rtol=1e-4, atol=1e-4)


def test_what_was_done_before_stays_in_the_header() -> None:
    head, _ = take(Corrections(binning=2), extra={"corrections": [{"gain": 2.0}]})
    assert head.extra["corrections"] == [{"gain": 2.0}, {"binning": 2}]


@pytest.mark.parametrize(
    ("corrections", "reason"),
    [
        (
            Corrections(mask=np.eye(5)),
            "frame of 12x16 pixels does not fit the mask or the maps, which are 5x5",
        ),
        (Corrections(roi=Region(12, 16, 1, 0)), "region 12x16.1.0 reaches beyond a frame of 12x16 pixels"),
        (Corrections(binning=13), "frame of 12x16 pixels is too small for bins of 13"),
    ],
)
def test_frame_that_does_not_fit_is_rejected(corrections: Corrections, reason: str) -> None:
    ledger = Ledger()
    intake = Intake(Ring(2, 1), ledger, corrections=corrections)
    assert intake.offer(header(0, SHAPE)) is None
    (found,) = ledger.reasons()
    assert found.replace("+", ".") == reason
    assert ledger.snapshot()["rejected"] == 1


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"gain": 0.0}, "gain must be positive, got 0.0 ADU per electron"),
        ({"gain": float("nan")}, "gain must be positive"),
        ({"gain": 1e-50}, "gain must lie in 1e-09-1e.12 ADU per electron, got 1e-50"),
        ({"offset": -1e30}, "offset must lie within 1e.12 ADU of 0, got -1e.30"),
        ({"offset_map": np.full((3, 4), np.nan)}, "offset map must be a number somewhere"),
        ({"offset": float("inf")}, "offset must be a number, got inf ADU"),
        ({"binning": 0}, "binning must be at least 1 pixel, got 0"),
        ({"mask": np.ones((3, 3))}, "all 9 pixels of the mask are bad"),
        ({"mask": np.zeros((3, 3)), "flat_field": np.ones((3, 4))}, "got flat_field 3x4, mask 3x3"),
        ({"flat_field": np.zeros((3, 4))}, "flat field must be positive somewhere"),
    ],
)
def test_impossible_corrections_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Corrections(**options)


@pytest.mark.parametrize("text", ["512x512", "0x5+0+0", "5x5+-1+0", "all"])
def test_senseless_region_is_explained(text: str) -> None:
    with pytest.raises(ValueError, match="roi must look like 512x512"):
        Settings(input="sim://", roi=text)


def test_map_that_cannot_be_read_names_its_file(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"flat\.npy"):
        Settings(input="sim://", flat_field=tmp_path / "flat.npy").corrections()


def test_service_corrects_what_every_source_sends(rig: Any, tmp_path: Path) -> None:
    mask = np.zeros(SHAPE, np.uint8)
    mask[4, 4] = 1
    np.save(tmp_path / "mask.npy", mask)
    options = {"mask": tmp_path / "mask.npy", "binning": 2, "roi": "8x8+0+0", "expect": "12x16:uint16"}
    run = rig({"frames": 1, "overrun": Overrun.block, **options})
    run.start()
    run.camera.send_multipart(message(0, COUNTS))
    run.join()
    (head, pixels), *_ = run.published(b"raw")
    good = COUNTS.copy()
    BadPixels(mask).fill(good)
    np.testing.assert_array_equal(pixels, good[:8, :8].reshape(4, 2, 4, 2).sum(axis=(1, 3)))
    assert head["corrections"][0]["roi"] == "8x8+0+0"


def test_map_of_many_frames_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "dark.npy", np.zeros((3, 12, 16)))
    with pytest.raises(ValueError, match=r"dark\.npy has 3 frames; a mask or map is one"):
        Settings(input="sim://", offset_map=tmp_path / "dark.npy").corrections()
