"""A running emstream as a layer of napari: with a stand-in for its window, and with napari where it is installed."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import emstream
from emstream.errors import EmstreamError, SourceError
from emstream.napari import LiveLayer, live_layer
from tests.conftest import Rig, message

DEADLINE_S = 20
SHAPE = (32, 48)


class Window:
    """As much of napari's viewer as a live layer uses."""

    def __init__(self) -> None:
        self.layers: list[Any] = []
        self.scale_bar = SimpleNamespace(visible=False)

    def add_image(self, data: np.ndarray, **about: Any) -> Any:
        self.layers.append(SimpleNamespace(data=data, **about))
        return self.layers[-1]


def counts(number: int, shape: tuple[int, int] = SHAPE) -> np.ndarray:
    return np.random.default_rng(number).poisson(2, shape).astype(np.uint8)


@pytest.fixture
def run(rig: Callable[..., Rig]) -> Rig:
    run = rig()
    run.start()
    return run


def show(run: Rig, live: LiveLayer, number: int, pixels: np.ndarray | None = None) -> None:
    """Send frames of one `number` until one has come through: the layer subscribes when it likes."""
    pixels = counts(number) if pixels is None else pixels
    tick = threading.Event()
    for _ in range(200 * DEADLINE_S):
        run.camera.send_multipart(message(number, pixels, pixel_size_m=6.2e-12))
        tick.wait(0.005)
        if live.refresh() and live.layer.metadata["emstream"]["frame"] == number:
            return
    raise AssertionError(f"frame {number} never came")


@pytest.mark.parametrize("topic", ["denoised", "raw"])
def test_layer_shows_the_newest_frame_with_its_scale_and_header(run: Rig, topic: str) -> None:
    window = Window()
    live = LiveLayer(window, run.service.publisher.endpoint, topic)
    for number in (0, 1):
        show(run, live, number)
        np.testing.assert_array_equal(live.layer.data, counts(number))
    assert window.layers == [live.layer]
    assert live.layer.scale == pytest.approx((0.0062, 0.0062))
    assert live.layer.contrast_limits == tuple(np.percentile(counts(0), (0.5, 99.5)))
    assert window.scale_bar.visible
    assert ("engine" in live.layer.metadata["emstream"]) is (topic == "denoised")
    live.stop()


def test_frames_of_another_shape_and_a_layer_taken_away_get_a_new_layer(run: Rig) -> None:
    window = Window()
    live = LiveLayer(window, run.service.publisher.endpoint)
    show(run, live, 0)
    show(run, live, 1, counts(1, (16, 16)))
    assert [layer.data.shape for layer in window.layers] == [(16, 16)]
    window.layers.clear()
    show(run, live, 2)
    assert [layer.data.shape for layer in window.layers] == [SHAPE]
    live.stop()


def test_nonsense_is_said_before_anything_starts() -> None:
    before = threading.active_count()
    with pytest.raises(SourceError, match="cannot subscribe to nonsense"):
        LiveLayer(Window(), "nonsense")
    with pytest.raises(ValueError, match="topic must be denoised or raw, got 'stats'"):
        LiveLayer(Window(), topic="stats")
    assert threading.active_count() == before


def test_missing_napari_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "napari", None)
    with pytest.raises(EmstreamError, match=r"needs napari: pip install 'emstream\[napari\]'"):
        live_layer(Window())  # type: ignore[arg-type]


def test_napari_finds_the_manifest_and_the_manifest_the_widget() -> None:
    (entry,) = importlib.metadata.entry_points(group="napari.manifest", name="emstream")
    package, name = entry.value.split(":")
    assert package == "emstream"
    manifest = Path(emstream.__file__).with_name(name)
    assert "emstream.napari:live_widget" in manifest.read_text()


@pytest.mark.skipif(
    find_spec("npe2") is None, reason="npe2 comes with napari: pip install 'emstream[napari]'"
)
@pytest.mark.filterwarnings("default")  # theirs
def test_manifest_is_one_that_napari_reads() -> None:
    import npe2

    manifest = Path(emstream.__file__).with_name("napari.yaml")
    read = npe2.PluginManifest.from_file(manifest)
    assert [widget.command for widget in read.contributions.widgets] == [read.contributions.commands[0].id]


WITH_NAPARI = """
import sys, threading
from napari.components import ViewerModel  # all of a viewer but its window, which needs OpenGL
from qtpy.QtWidgets import QApplication
from emstream.napari import live_widget

application = QApplication([])
viewer = ViewerModel()
widget = live_widget(viewer)
widget[0].value = sys.argv[1]
widget[2].value = True
waited, tick = 0, threading.Event()
while not len(viewer.layers) and waited < 4000:
    QApplication.processEvents()
    tick.wait(0.005)
    waited += 1
layer = viewer.layers[0]
engine = layer.metadata["emstream"]["engine"]["name"]
print(layer.name, layer.data.shape, engine, [float(length) for length in layer.scale], layer.units)
widget[2].value = False
"""


@pytest.mark.skipif(find_spec("napari") is None, reason="no napari: pip install 'emstream[napari]'")
def test_live_layer_in_napari_itself(run: Rig) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WITH_NAPARI, run.service.publisher.endpoint],
        env={**os.environ, "QT_QPA_PLATFORM": "offscreen"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        tick, number = threading.Event(), 0
        while child.poll() is None and not tick.wait(0.05):
            run.camera.send_multipart(message(number, counts(number), pixel_size_m=6.2e-12))
            number += 1
        said, complaint = child.communicate()
    assert child.returncode == 0, complaint
    assert said.startswith("emstream denoised (32, 48) identity [0.0062"), said
    assert "nanometer" in said
