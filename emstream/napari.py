"""A running emstream as a live layer of napari: Plugins > emstream > Live frames, or `live_layer`.

::

    emstream serve ──▶ thread, keeps the newest frame ──▶ timer of napari's window ──▶ layer.data

The window takes the newest frame up to 30 times a second; if it is slower, frames are skipped, and
nobody waits. Importing this takes no napari; showing a layer does.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import zmq

from emstream import client, wire
from emstream.endpoint import connect
from emstream.errors import EmstreamError, MalformedFrame
from emstream.frame import Frame
from emstream.keys import Peer

if TYPE_CHECKING:
    import napari

DEFAULT_INPUT = "tcp://127.0.0.1:5556"
REFRESH_MS = 33
_POLL_MS = 100  # how soon a stop is noticed
_PERCENTILES = (0.5, 99.5)
_QUEUE_FRAMES = 4  # only the newest is shown


class LiveLayer:
    """One topic of a running emstream as an image layer. `refresh` and `stop` belong to the window's thread.

    The layer comes with the first frame. Its scale is the pixel size [nm], its metadata the newest
    frame's header; contrast and colours are the user's once it is there.
    """

    def __init__(
        self, viewer: Any, endpoint: str = DEFAULT_INPUT, topic: str = "denoised", peer: Peer | None = None
    ) -> None:
        if topic not in ("denoised", "raw"):
            raise ValueError(f"topic must be denoised or raw, got {topic!r}")
        self.layer: Any = None
        self._viewer, self._topic = viewer, topic
        self._newest: Frame | None = None
        self._stopping = threading.Event()
        subscriber: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.SUB)
        subscriber.linger = 0
        subscriber.rcvhwm = _QUEUE_FRAMES
        connect(subscriber, endpoint, peer)
        subscriber.subscribe(topic)
        self._thread = threading.Thread(
            target=self._receive, args=(subscriber,), name="napari-receiver", daemon=True
        )
        self._thread.start()

    def refresh(self) -> bool:
        """Show the newest frame; returns whether there was one that had not been shown."""
        frame, self._newest = self._newest, None
        if frame is None:
            return False
        if (
            self.layer is None
            or self.layer not in self._viewer.layers
            or self.layer.data.shape != frame.data.shape
        ):
            self._add(frame)
        else:
            self.layer.data = frame.data
        self.layer.metadata = {"emstream": wire.map_of(frame.header)}
        return True

    def stop(self) -> None:
        """Stop listening; the layer stays with its last frame."""
        self._stopping.set()
        self._thread.join()

    def _add(self, frame: Frame) -> None:
        """A new layer, in the old one's place if that has another shape."""
        if self.layer is not None and self.layer in self._viewer.layers:
            self._viewer.layers.remove(self.layer)
        low, high = (float(value) for value in np.nanpercentile(frame.data, _PERCENTILES))
        size_m = frame.header.pixel_size_m
        size_nm = size_m * 1e9 if size_m else 1.0
        self.layer = self._viewer.add_image(
            frame.data,
            name=f"emstream {self._topic}",
            scale=(size_nm, size_nm),
            contrast_limits=(low, high if high > low else low + 1),
        )
        if size_m:
            self.layer.units = ("nm", "nm")
            self._viewer.scale_bar.visible = True

    def _receive(self, subscriber: zmq.Socket[bytes]) -> None:
        try:
            while not self._stopping.is_set():
                if subscriber.poll(_POLL_MS):
                    with contextlib.suppress(MalformedFrame):
                        frame, _ = client.read(subscriber.recv_multipart(copy=False))
                        self._newest = frame or self._newest
        finally:
            subscriber.close()


def live_layer(
    viewer: napari.Viewer, endpoint: str = DEFAULT_INPUT, topic: str = "denoised"
) -> Callable[[], None]:
    """Show `topic` (denoised or raw) of a running emstream in `viewer` as it comes; call what it returns to stop."""
    timer_class = _timer_class()
    live = LiveLayer(viewer, endpoint, topic)
    timer = timer_class()
    timer.timeout.connect(live.refresh)
    timer.start(REFRESH_MS)

    def stop() -> None:
        timer.stop()
        live.stop()

    return stop


def live_widget(napari_viewer: Any) -> Any:
    """What napari shows in its plugin's dock: where to listen, and to what."""
    _timer_class()
    from magicgui.widgets import CheckBox, ComboBox, Container, LineEdit

    where = LineEdit(label="Input", value=DEFAULT_INPUT, tooltip="What emstream serve publishes on")
    topic = ComboBox(label="Frames", choices=["denoised", "raw"], value="denoised")
    running = CheckBox(label="Live", value=False)
    widget = Container(widgets=[where, topic, running])
    stops: list[Callable[[], None]] = []

    def change(is_on: bool) -> None:
        while stops:
            stops.pop()()
        if is_on:
            stops.append(live_layer(napari_viewer, where.value, topic.value))

    def restart() -> None:
        change(running.value)

    running.changed.connect(change)
    where.changed.connect(restart)
    topic.changed.connect(restart)
    widget.native.destroyed.connect(lambda: change(False))
    return widget


def _timer_class() -> Any:
    """Qt's timer, as napari has it."""
    try:
        import napari  # noqa: F401
        from qtpy.QtCore import QTimer
    except ImportError as error:
        missing = getattr(error, "name", None) or "napari"
        raise EmstreamError(
            f"a live layer needs {missing}: pip install 'emstream[napari]', or emstream in napari's own environment"
        ) from None
    return QTimer
