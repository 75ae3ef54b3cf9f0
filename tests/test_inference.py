"""Finding, checking and tiling engines."""

from __future__ import annotations

import shutil
import subprocess
import sys
import textwrap
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emstream.errors import EngineError, EngineInvalid, EngineNotFound
from emstream.inference import IdentityEngine, default_engine, load_engine
from emstream.inference.card import EngineCard
from emstream.inference.openvino import OpenVINOEngine
from emstream.inference.tiling import TiledEngine, ramp, tile_spans
from emstream.sources.specimen import MovingSpecimen


def test_wrong_path_names_the_engines_that_ship(tmp_path: Path) -> None:
    with pytest.raises(EngineNotFound, match=r"no engine at .*nowhere\.onnx; shipped: .*wide64\.onnx"):
        load_engine(tmp_path / "nowhere.onnx")


def test_corrupt_model_is_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(default_engine().read_bytes()[:5000])
    with pytest.raises(EngineInvalid, match=r"broken\.onnx is not a readable ONNX model"):
        load_engine(path)


def test_signal_is_heard_after_engines_came_and_went() -> None:
    """As when one was loaded again or swapped for another; in a process of its own, which it may end."""
    program = f"""
        import signal, threading
        from pathlib import Path
        from emstream.inference.openvino import OpenVINOEngine
        signal.signal(signal.SIGTERM, lambda number, frame: print("heard"))
        path = Path({str(default_engine())!r})
        one, two = OpenVINOEngine(path), OpenVINOEngine(path)
        del one, two
        engine = OpenVINOEngine(path)
        def forget():
            global engine
            del engine
        thread = threading.Thread(target=forget)
        thread.start()
        thread.join()
        signal.raise_signal(signal.SIGTERM)
    """
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "heard\n"), done.stderr


def test_empty_model_is_named(tmp_path: Path) -> None:
    path = tmp_path / "empty.onnx"
    path.touch()
    with pytest.raises(EngineInvalid, match=r"empty\.onnx"):
        load_engine(path)


def test_model_that_is_not_ours_is_refused(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    model = onnx.load(default_engine())
    del model.metadata_props[:]
    path = tmp_path / "foreign.onnx"
    onnx.save(model, path)
    with pytest.raises(EngineInvalid, match="is not an emstream engine: its metadata lack 'name'"):
        load_engine(path)


def test_corrupt_torch_program_is_named(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    path = tmp_path / "broken.pt2"
    path.write_bytes(b"not a zip file")
    with pytest.raises(EngineInvalid, match=r"broken\.pt2 is not a readable"):
        load_engine(path)


def test_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pkl"
    path.touch()
    with pytest.raises(EngineInvalid, match=r"expected \.onnx"):
        load_engine(path)


def test_file_that_is_no_plan_is_refused_and_the_onnx_beside_it_named(tmp_path: Path) -> None:
    (tmp_path / "unet32.plan").touch()
    shutil.copy(default_engine(), tmp_path / "unet32.onnx")
    with pytest.raises(
        EngineInvalid, match=r"does not say what it was built from.*unet32\.onnx runs on the CPU"
    ):
        load_engine(tmp_path / "unet32.plan")


@pytest.mark.parametrize(
    ("options", "text"),
    [({"precision": "int4"}, "precision must be one of bf16, f32, got 'int4'"), ({"threads": 0}, "got 0")],
)
def test_impossible_options_are_refused(options: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        load_engine(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "parameters", "field_of_view_px"), [("wide64", 1_406_336, 442), ("unet32", 352_000, 221)]
)
def test_shipped_engine_says_what_it_is_for(name: str, parameters: int, field_of_view_px: int) -> None:
    card = load_engine(default_engine().with_name(f"{name}.onnx")).card
    assert card is not None
    assert (card.parameters, card.field_of_view_px, card.bias_free) == (parameters, field_of_view_px, True)
    assert card.dose_range == (0.1, 10.0)
    assert card.sampling_pm == pytest.approx(6.2)


def test_card_survives_its_metadata() -> None:
    card = load_engine().card
    assert card is not None
    assert EngineCard.from_metadata(card.to_metadata(), "here") == card


@pytest.mark.parametrize("entry", ["not json", '"text"', "[1]", '["a", "b"]'])
def test_card_with_a_broken_entry_is_refused(entry: str) -> None:
    card = load_engine().card
    assert card is not None
    with pytest.raises(EngineInvalid, match="dose_range"):
        EngineCard.from_metadata(card.to_metadata() | {"dose_range": entry}, "here")


@given(length=st.integers(1, 5000), tile=st.sampled_from([256, 512, 1000, 1024]))
def test_tiles_cover_every_pixel_overlap_enough_and_keep_the_networks_grid(length: int, tile: int) -> None:
    spans = tile_spans(length, tile, overlap=111)
    assert spans[0][0] == 0
    assert spans[-1][1] == length
    assert len({stop - start for start, stop in spans[:-1]}) <= 1
    assert all(0 < stop - start <= tile and start % 16 == 0 for start, stop in spans)
    assert all(a[1] - b[0] >= 111 for a, b in pairwise(spans))


@given(length=st.integers(1, 5000), tile=st.sampled_from([256, 512, 1000, 1024]))
def test_weights_of_the_tiles_add_up_to_one(length: int, tile: int) -> None:
    spans = tile_spans(length, tile, overlap=111)
    total = np.zeros(length)
    for (start, stop), weight in zip(spans, ramp(spans), strict=True):
        assert (weight >= 0).all()
        total[start:stop] += weight
    np.testing.assert_allclose(total, 1, rtol=1e-5)


@pytest.mark.parametrize("shape", [(1500, 700), (1024, 1025), (3000, 20)])
def test_tiling_alone_changes_no_pixel(shape: tuple[int, int]) -> None:
    y = np.random.default_rng(0).poisson(3.0, shape).astype(np.uint16)
    np.testing.assert_allclose(TiledEngine(IdentityEngine(), tile_px=256).denoise(y), y, rtol=1e-5)


def test_tiles_cost_nothing_of_the_pictures_quality() -> None:
    specimen = MovingSpecimen(height=700, width=900)
    truth, y = specimen.intensity(0), specimen.counts(0)
    engine = OpenVINOEngine(default_engine(), precision="f32")
    whole, tiles = engine.denoise(y), TiledEngine(engine, tile_px=512).denoise(y)
    assert np.square(tiles - truth).mean() < 1.05 * np.square(whole - truth).mean()
    assert np.square(tiles - whole).mean() < 0.05 * np.square(whole - truth).mean()


def test_tiles_are_in_flight_together() -> None:
    class Deep(IdentityEngine):
        depth = 3
        under_way = most = 0

        def submit(self, counts: np.ndarray, expected: np.ndarray) -> np.ndarray:
            self.under_way += 1
            self.most = max(self.most, self.under_way)
            return super().submit(counts, expected)

        def collect(self, ticket: np.ndarray) -> np.ndarray:
            self.under_way -= 1
            return super().collect(ticket)

    engine = Deep()
    y = np.random.default_rng(0).poisson(3.0, (600, 700)).astype(np.uint16)
    np.testing.assert_allclose(TiledEngine(engine, tile_px=256).denoise(y), y, rtol=1e-5)
    assert (engine.most, engine.under_way) == (3, 0)


def test_tile_that_fails_leaves_none_in_flight() -> None:
    class Failing(IdentityEngine):
        depth = 3
        submitted = collected = 0

        def submit(self, counts: np.ndarray, expected: np.ndarray) -> np.ndarray:
            if self.submitted == 5:
                raise EngineError("no")
            self.submitted += 1
            return super().submit(counts, expected)

        def collect(self, ticket: np.ndarray) -> np.ndarray:
            self.collected += 1
            return super().collect(ticket)

    engine = Failing()
    with pytest.raises(EngineError, match="no"):
        TiledEngine(engine, tile_px=256).denoise(np.zeros((600, 700), np.uint8))
    assert engine.submitted == engine.collected == 5


def test_tiles_smaller_than_the_field_of_view_are_refused() -> None:
    with pytest.raises(ValueError, match="tiles of 128 px are too small"):
        TiledEngine(load_engine(), tile_px=128)
