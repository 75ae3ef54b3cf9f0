"""The live page's server, fed by a real pipeline and read by real websocket clients."""

from __future__ import annotations

import http.client
import importlib
import json
import queue
import re
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import zmq
from websockets.exceptions import ConnectionClosed, InvalidMessage, InvalidStatus
from websockets.sync.client import ClientConnection, connect
from websockets.typing import Origin

from emstream import restarts
from emstream.errors import OutputError, SourceError
from emstream.inference import EngineCard, IdentityEngine
from emstream.intake import Overrun
from emstream.movies import open_movie
from emstream.view import ViewProcess, ViewServer, server
from emstream.view.door import public_name, token_for
from emstream.view.pair import Pair
from emstream.view.picture import Painter, Picture
from emstream.view.receiver import Receiver
from emstream.view.request import Request
from tests.conftest import Rig, message

DEADLINE_S = 20
SHAPE = (48, 64)
CARD = EngineCard(
    name="identity",
    architecture="none",
    parameters=0,
    field_of_view_px=1,
    multiple_px=1,
    bias_free=True,
    dose_range=(1.0, 3.0),
    sampling_pm=6.2,
    psnr_db=0.0,
    ssim=0.0,
    trained="not at all",
    commit="none",
)


def counts(number: int, shape: tuple[int, int] = SHAPE, dose: float = 2.0) -> np.ndarray:
    """The frame that the camera sends as `number` [electrons]."""
    return np.random.default_rng(number).poisson(dose, shape).astype(np.uint8)


class Camera:
    """A camera in front of a running service with the identity engine."""

    def __init__(self, run: Rig) -> None:
        self._run = run
        self.output = run.service.publisher.endpoint

    def send(self, number: int, pixels: np.ndarray | None = None, **fields: Any) -> None:
        pixels = counts(number) if pixels is None else pixels
        self._run.camera.send_multipart(message(number, pixels, **fields))


@pytest.fixture
def camera(rig: Callable[..., Rig]) -> Camera:
    engine = IdentityEngine()
    engine.card = CARD
    run = rig({"overrun": Overrun.block}, engine=engine)
    run.start()
    return Camera(run)


@pytest.fixture
def view(camera: Camera) -> Iterator[ViewServer]:
    with ViewServer(camera.output, port=0) as view:
        yield view


class Viewer:
    """What the page does: take a message, acknowledge it, take the next."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection

    def take(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """The next message: its header, each picture under its name, too; and the pictures' pixels (h, w)."""
        message = self._connection.recv(timeout=DEADLINE_S)
        assert isinstance(message, bytes)
        length = int.from_bytes(message[:4], "little")
        header, pixels = json.loads(message[4 : 4 + length]), message[4 + length :]
        found = {}
        for picture in header.get("pictures", []):
            size = picture["shape"][0] * picture["shape"][1]
            found[picture["name"]] = np.frombuffer(pixels[:size], np.uint8).reshape(picture["shape"])
            header[picture["name"]] = picture
            pixels = pixels[size:]
        assert not pixels
        return header, found

    def ask(self, **request: Any) -> None:
        self._connection.send(json.dumps(request))

    def acknowledge(self) -> None:
        self._connection.send("shown")

    def until(self, **wanted: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Acknowledge messages up to one whose header says `wanted`; that one is not acknowledged yet."""
        deadline = time.monotonic() + DEADLINE_S
        while True:
            header, pixels = self.take()
            if all(header.get(key) == value for key, value in wanted.items()):
                return header, pixels
            assert time.monotonic() < deadline, f"never saw {wanted}; last was {header}"
            self.acknowledge()

    def next_picture(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Acknowledge, and again, up to the next message that has pictures."""
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            self.acknowledge()
            header, pixels = self.take()
            if pixels:
                return header, pixels
        raise AssertionError("no picture came")


def live(view: ViewServer) -> ClientConnection:
    """The websocket that the page opens."""
    address = f"{view.host}:{view.port}"
    return connect(f"ws://{address}/live", origin=Origin(f"http://{address}"), max_size=None)


@contextmanager
def watching(view: ViewServer) -> Iterator[Viewer]:
    """A viewer whose server has found its emstream."""
    with live(view) as connection:
        viewer = Viewer(connection)
        # The statistics come last of the topics, so from here on no frame is missed.
        viewer.until(serving=True)
        viewer.acknowledge()
        yield viewer


def status_of(view: ViewServer, path: str = "/", host: str | None = None) -> tuple[int, str, bytes]:
    """Status, content type and body of a page asked for under the name `host`."""
    client = http.client.HTTPConnection(view.host, view.port, timeout=DEADLINE_S)
    try:
        client.request("GET", path, headers={"Host": host or f"{view.host}:{view.port}"})
        response = client.getresponse()
        return response.status, response.headers.get("Content-Type", ""), response.read()
    finally:
        client.close()


def refused(view: ViewServer, *, host: str | None = None, origin: str | None) -> int:
    """With which status /live turns a websocket away."""
    name = host or f"{view.host}:{view.port}"
    with (
        socket.create_connection((view.host, view.port), timeout=DEADLINE_S) as to_view,
        pytest.raises(InvalidStatus) as refusal,
        connect(f"ws://{name}/live", sock=to_view, origin=Origin(origin) if origin else None),
    ):
        pass
    return refusal.value.response.status_code


def undone(pixels: np.ndarray, scale: dict[str, float]) -> np.ndarray:
    """Grey values turned back into electrons."""
    return scale["low"] + pixels.astype(np.float64) * (scale["high"] - scale["low"]) / 255


def assert_shows(pixels: np.ndarray, scale: dict[str, float], source: np.ndarray) -> None:
    """`pixels` are `source`, cut at the scale's ends and rounded to one of 256 greys."""
    half_a_grey = (scale["high"] - scale["low"]) / 510
    np.testing.assert_allclose(
        undone(pixels, scale), np.clip(source, scale["low"], scale["high"]), atol=half_a_grey * 1.001
    )


# -- frames ---------------------------------------------------------------------


def test_viewer_gets_the_very_pixels_of_a_pair(camera: Camera, view: ViewServer) -> None:
    with watching(view) as viewer:
        camera.send(3)
        header, pixels = viewer.until(frame=3)
    assert header["raw"]["shape"] == header["denoised"]["shape"] == header["frame_shape"] == list(SHAPE)
    assert_shows(pixels["raw"], header["raw"], counts(3))
    assert_shows(pixels["denoised"], header["denoised"], counts(3))


def test_header_tells_where_a_frame_comes_from_and_how_long_it_took(camera: Camera, view: ViewServer) -> None:
    with watching(view) as viewer:
        camera.send(0, source="microscope", series=7)
        header, _ = viewer.until(frame=0)
    assert (header["state"], header["source"], header["series"]) == ("live", "microscope", 7)
    assert header["engine"] == {"name": "identity", "device": "none"}
    assert header["ledger"]["received"] == header["ledger"]["published"] == 1
    assert header["dose"] == pytest.approx(counts(0)[::8].mean(), abs=1e-3)
    assert header["in_domain"] is True
    stages = dict(header["latency_ms"])
    assert stages.pop("total") == pytest.approx(sum(stages.values()), abs=0.01)
    assert min(stages.values()) >= 0


def test_dose_outside_the_engines_range_is_flagged(camera: Camera, view: ViewServer) -> None:
    with watching(view) as viewer:
        camera.send(0, counts(0, dose=9.0))
        header, _ = viewer.until(frame=0)
    assert header["in_domain"] is False
    assert header["dose"] > 3


def test_slow_viewer_is_sent_the_newest_frame_and_no_backlog(camera: Camera, view: ViewServer) -> None:
    with watching(view) as slow, watching(view) as fast:
        camera.send(0)
        slow.until(frame=0)
        for number in range(1, 21):
            camera.send(number)
        fast.until(frame=20)
        slow.acknowledge()
        header, pixels = slow.take()
    assert header["frame"] == 20
    assert_shows(pixels["raw"], header["raw"], counts(20))


def test_report_counts_viewers_and_what_they_were_sent(camera: Camera, view: ViewServer) -> None:
    with watching(view) as viewer, watching(view):
        camera.send(3)
        viewer.until(frame=3)
        viewer.acknowledge()
        viewer.take()  # the one before is counted by now
    report = view.report()
    assert (report["address"], report["input"]) == (view.url, camera.output)
    assert report["viewers"] == 2
    assert 1 <= report["pictures"] <= 2


def test_two_viewers_see_the_same_picture_painted_once(
    camera: Camera, view: ViewServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    painted: list[int] = []
    paint = Painter._paint

    def counted(painter: Painter, pairs: Sequence[Pair], request: Request) -> Picture:
        painted.append(pairs[-1].raw.number)
        return paint(painter, pairs, request)

    monkeypatch.setattr(Painter, "_paint", counted)
    with watching(view) as one, watching(view) as other:
        for number in range(5):
            camera.send(number)
            (_, first), (_, second) = one.until(frame=number), other.until(frame=number)
            np.testing.assert_array_equal(first["raw"], second["raw"])
            one.acknowledge()
            other.acknowledge()
    assert painted == list(range(5))


def test_viewer_that_leaves_does_not_disturb_the_others(camera: Camera, view: ViewServer) -> None:
    with watching(view) as staying:
        with watching(view):
            camera.send(0)
        staying.until(frame=0)
        staying.acknowledge()
        camera.send(1)
        staying.until(frame=1)


def test_viewer_hears_that_no_frame_has_come_and_from_where(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/nobody"
    with ViewServer(endpoint, port=0) as view, live(view) as connection:
        header, pixels = Viewer(connection).take()
    assert not pixels
    assert (header["state"], header["serving"], header["input"]) == ("waiting", False, endpoint)


def test_viewer_hears_when_frames_stop_and_when_they_go_on(camera: Camera, view: ViewServer) -> None:
    with watching(view) as viewer:
        camera.send(0)
        viewer.until(frame=0)
        viewer.acknowledge()
        header, _ = viewer.until(state="quiet")
        assert header["serving"]
        assert header["quiet_s"] >= 2
        assert header["frames_per_s"] == 0
        viewer.acknowledge()
        camera.send(1)
        header, _ = viewer.until(frame=1)
        assert header["state"] == "live"


def test_frames_larger_than_the_screen_are_averaged_down(camera: Camera, view: ViewServer) -> None:
    pixels = counts(1, shape=(1030, 2060))
    with watching(view) as viewer:
        camera.send(1, pixels)
        header, shown = viewer.until(frame=1)
    assert (header["frame_shape"], header["raw"]["shape"]) == ([1030, 2060], [515, 1030])
    assert header["raw"]["region"] == [0, 0, 1030, 2060]
    averaged = pixels.reshape(515, 2, 1030, 2).mean(axis=(1, 3))
    assert_shows(shown["raw"], header["raw"], averaged)


# -- what a viewer asks for ---------------------------------------------------------


def test_viewer_who_zooms_in_is_sent_that_part_at_full_resolution(camera: Camera, view: ViewServer) -> None:
    pixels = counts(1, shape=(1030, 2060))
    with watching(view) as viewer:
        camera.send(1, pixels)
        viewer.until(frame=1)
        viewer.ask(region=[100, 200, 300, 400], screen=[300, 400])
        header, shown = viewer.next_picture()
    assert (header["frame"], header["raw"]["region"]) == (1, [100, 200, 300, 400])
    for side in ("raw", "denoised"):
        assert_shows(shown[side], header[side], pixels[100:400, 200:600])


def test_one_viewers_zoom_is_not_the_others(camera: Camera, view: ViewServer) -> None:
    with watching(view) as one, watching(view) as other:
        camera.send(0)
        one.until(frame=0)
        one.ask(region=[0, 0, 8, 8])
        assert one.next_picture()[1]["raw"].shape == (8, 8)
        other.until(frame=0)
        other.acknowledge()
        camera.send(1)
        assert other.until(frame=1)[1]["raw"].shape == SHAPE


def test_contrast_by_hand_is_what_was_asked_for(camera: Camera, view: ViewServer) -> None:
    with watching(view) as viewer:
        camera.send(0)
        viewer.until(frame=0)
        viewer.ask(raw=["values", 1, 2.5], denoised=["percentiles", 10, 90])
        header, pixels = viewer.next_picture()
    assert (header["raw"]["low"], header["raw"]["high"]) == (1, 2.5)
    assert_shows(pixels["raw"], header["raw"], counts(0))
    low, high = np.percentile(counts(0), [10, 90])
    assert (header["denoised"]["low"], header["denoised"]["high"]) == pytest.approx((low, high))


def test_averages_go_with_those_who_look_at_them_and_one_thread_paints_for_all(
    camera: Camera, view: ViewServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: set[str] = set()
    kept: queue.Queue[set[int]] = queue.Queue()
    paint, keep = Painter._paint, Painter.keep_averages

    def noted(painter: Painter, pairs: Sequence[Pair], request: Request) -> Picture:
        threads.add(threading.current_thread().name)
        return paint(painter, pairs, request)

    def forgotten(painter: Painter, widths: set[int]) -> None:
        keep(painter, widths)
        threads.add(threading.current_thread().name)
        kept.put(set(painter._averages))

    monkeypatch.setattr(Painter, "_paint", noted)
    monkeypatch.setattr(Painter, "keep_averages", forgotten)
    with watching(view) as one, watching(view) as other:
        one.ask(average=4)
        other.ask(average=8)
        for number in range(3):
            camera.send(number)
            for viewer in (one, other):
                viewer.until(frame=number, averaged=number + 1)
                viewer.acknowledge()
        while not kept.empty():
            kept.get()
        one.ask(average=1)
        assert kept.get(timeout=DEADLINE_S) == {8}
    # Both are gone, in whatever order.
    assert set() in (kept.get(timeout=DEADLINE_S), kept.get(timeout=DEADLINE_S))
    assert threads == {"view-painter_0"}


def test_average_is_that_of_the_last_raw_frames(camera: Camera, view: ViewServer) -> None:
    with watching(view) as viewer:
        viewer.ask(average=4, raw=["values", 0, 10])
        for number in range(6):
            camera.send(number)
            header, pixels = viewer.until(frame=number)
            assert header["averaged"] == min(number + 1, 4)
            viewer.acknowledge()
    mean = np.mean([counts(number) for number in range(2, 6)], axis=0)
    assert_shows(pixels["raw"], header["raw"], mean)
    assert_shows(pixels["denoised"], header["denoised"], counts(5))


def test_spectrum_of_a_lattice_has_its_peak_where_the_lattice_says(camera: Camera, view: ViewServer) -> None:
    wave = np.cos(2 * np.pi * np.arange(64) / 8)
    lattice = np.tile(10 + 8 * wave, (64, 1)).astype(np.uint8)
    with watching(view) as viewer:
        camera.send(0, lattice)
        viewer.until(frame=0)
        viewer.ask(spectra=["denoised"])
        header, pixels = viewer.next_picture()
    assert "raw-spectrum" not in header
    power = pixels["denoised-spectrum"].copy()
    power[:, 30:35] = 0  # what the window leaves of the mean
    assert power[32, 40] == power[32, 24] == power.max()
    beside = np.r_[0:23, 26:39, 42:64]  # a window is three wide
    assert power[:, beside].max() < power.max()


def test_paused_viewer_keeps_its_frame_and_steps_back_through_the_others(
    camera: Camera, view: ViewServer
) -> None:
    with watching(view) as viewer, watching(view) as other:
        keys = {}
        for number in range(4):
            camera.send(number)
            header, _ = viewer.until(frame=number)
            keys[number] = header["key"]
            viewer.acknowledge()
        viewer.ask(at=keys[2])
        viewer.until(frame=2)  # it is paused
        viewer.acknowledge()
        for number in range(4, 8):
            camera.send(number)
        other.until(frame=7)
        for number in (1, 0, 3):
            viewer.ask(at=keys[number])
            header, pixels = viewer.until(frame=number)
            assert_shows(pixels["raw"], header["raw"], counts(number))
            assert (header["history"]["first"], header["history"]["last"]) == (keys[0], keys[3])
            viewer.acknowledge()
        viewer.ask(at=None)
        viewer.until(frame=7)


def test_frames_that_tell_of_a_loss_are_marked_in_the_history(camera: Camera, view: ViewServer) -> None:
    with watching(view) as viewer:
        for number in (0, 1, 5, 6):
            camera.send(number)
            header, _ = viewer.until(frame=number)
            if number == 5:
                key = header["key"]
            viewer.acknowledge()
    assert header["ledger"]["missing"] == 3
    assert header["history"]["faults"] == [key]


@pytest.mark.parametrize(
    "nonsense", ["", "[]", '{"region": [1]}', '{"average": 1e9}', '{"at": true}', '{"zoom": 3}', "[" * 10_000]
)
def test_viewer_that_asks_for_nonsense_is_told_and_the_others_stay(
    camera: Camera, view: ViewServer, nonsense: str
) -> None:
    with watching(view) as other:
        with live(view) as connection:
            connection.send(nonsense)
            with pytest.raises(ConnectionClosed) as closing:
                deque(iter(lambda: connection.recv(timeout=DEADLINE_S), None))
        assert closing.value.rcvd is not None
        assert closing.value.rcvd.code == 1008
        assert closing.value.rcvd.reason
        camera.send(0)
        other.until(frame=0)


# -- files ---------------------------------------------------------------------------


def test_tiff_holds_every_pixel_of_both_sides_and_every_header_field(
    camera: Camera, view: ViewServer, tmp_path: Path
) -> None:
    with watching(view) as viewer:
        camera.send(5, pixel_size_m=6.2e-12, extra={"stage": {"tilt": 3}})
        header, _ = viewer.until(frame=5)
        status, kind, content = status_of(view, f"/snapshot.tif?key={header['key']}")
    assert (status, kind) == (200, "image/tiff")
    with tifffile.TiffFile(BytesIO(content)) as file:
        raw, denoised = file.series
        np.testing.assert_array_equal(raw.asarray(), counts(5))
        np.testing.assert_array_equal(denoised.asarray(), counts(5).astype(np.float32))
        about = [json.loads(series.keyframe.description) for series in (raw, denoised)]
        assert raw.dtype == np.uint8
        assert raw.keyframe.get_resolution("CENTIMETER")[0] == pytest.approx(1e-2 / 6.2e-12, rel=1e-6)
    assert about[0]["stage"] == about[1]["stage"] == {"tilt": 3}
    assert about[1]["engine"]["name"] == "identity"
    assert about[1]["ledger"]["published"] == 1
    assert about[1].keys() >= {"stages_ns", "dose", "in_domain", "frame", "series", "source", "pixel_size_m"}
    path = tmp_path / "snapshot.tif"
    path.write_bytes(content)
    with open_movie(path, dataset="0") as movie:
        np.testing.assert_array_equal(movie[0], counts(5))


def test_header_without_a_word_in_json_is_saved_all_the_same(camera: Camera, view: ViewServer) -> None:
    with watching(view) as viewer:
        camera.send(5, extra={"drift": float("nan"), "tilt": [float("inf")], "key": {b"\xff": b"\x00"}})
        header, _ = viewer.until(frame=5)
        status, _, content = status_of(view, f"/header.json?key={header['key']}")
        saved, _, tiff = status_of(view, f"/snapshot.tif?key={header['key']}")
    assert (status, saved) == (200, 200)
    assert {"drift": "nan", "tilt": ["inf"], "key": {"ff": "00"}}.items() <= json.loads(content)[
        "raw"
    ].items()
    with tifffile.TiffFile(BytesIO(tiff)) as file:
        assert json.loads(file.series[0].keyframe.description)["drift"] == "nan"


def test_header_of_a_frame_that_is_gone_is_not_found(camera: Camera, view: ViewServer) -> None:
    paths = ("/snapshot.tif?key=99", "/header.json?key=99", "/header.json", "/header.json?key=-1")
    for path in (*paths, "/header.json?key=" + 5000 * "9"):
        status, _, body = status_of(view, path)
        assert status == 404
        assert b"no longer kept" in body


# -- the page and who may see it -------------------------------------------------


@pytest.mark.parametrize(
    ("path", "kind", "words"),
    [
        ("/", "text/html", b"<canvas"),
        ("/page.css", "text/css", b"canvas"),
        ("/page.js", "text/javascript", b"/"),
    ],
)
def test_page_and_its_files_are_served(view: ViewServer, path: str, kind: str, words: bytes) -> None:
    status, content_type, body = status_of(view, path)
    assert status == 200
    assert content_type.startswith(kind)
    assert words in body


def test_page_asks_nobody_else_for_anything(view: ViewServer) -> None:
    _, _, html = status_of(view)
    _, _, css = status_of(view, "/page.css")
    _, _, script = status_of(view, "/page.js")
    addresses = re.findall(r"""\w+://[^\s"']*|url\([^)]*|@import""", (html + css + script).decode())
    assert set(addresses) <= {"http://www.w3.org/2000/svg"}


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]"])
def test_loopback_names_are_answered(view: ViewServer, host: str) -> None:
    assert status_of(view, host=f"{host}:{view.port}")[0] == 200


def test_localhost_may_be_the_address_to_serve_on(tmp_path: Path) -> None:
    with ViewServer(f"ipc://{tmp_path}/nobody", host="localhost", port=0) as view:
        assert view.url == f"http://localhost:{view.port}/"
        assert status_of(view)[0] == 200


@pytest.mark.parametrize("path", ["/", "/page.js"])
def test_other_host_names_are_refused(view: ViewServer, path: str) -> None:
    assert status_of(view, path, host="evil.example")[0] == 400


def test_websocket_under_another_host_name_is_refused(view: ViewServer) -> None:
    name = f"evil.example:{view.port}"
    assert refused(view, host=name, origin=f"http://{name}") == 400


@pytest.mark.parametrize("origin", ["http://evil.example", "http://127.0.0.1:1", "null", None])
def test_websocket_from_another_page_is_refused(view: ViewServer, origin: str | None) -> None:
    assert refused(view, origin=origin) == 403


def test_page_for_other_machines_asks_for_a_token(tmp_path: Path) -> None:
    with ViewServer(f"ipc://{tmp_path}/nobody", host="0.0.0.0", port=0) as view:
        assert view.token
        assert view.url.endswith(f":{view.port}/?token={view.token}")
        for path in ("/", "/page.js", "/header.json?key=1", "/?token=guessed", "/?token="):
            status, kind, body = status_of(view, path)
            assert (status, kind) == (401, "text/html; charset=utf-8")
            assert b"This page asks for a token" in body
            assert b'name="viewport" content="width=device-width' in body
        assert refused(view, origin=f"http://{view.host}:{view.port}") == 403
        client = http.client.HTTPConnection("127.0.0.1", view.port, timeout=DEADLINE_S)
        client.request("GET", f"/?token={view.token}", headers={"Host": "microscope.example"})
        answer = client.getresponse()
        cookie = answer.headers["Set-Cookie"]
        assert (answer.status, answer.headers["Location"]) == (303, "/")
        assert "HttpOnly" in cookie
        answer.read()
        client.request("GET", "/page.js", headers={"Cookie": cookie.split(";")[0]})
        assert client.getresponse().status == 200
        client.close()
        address = f"{view.host}:{view.port}"
        headers = {"Cookie": cookie.split(";")[0]}
        with connect(
            f"ws://{address}/live", origin=Origin(f"http://{address}"), additional_headers=headers
        ) as connection:
            Viewer(connection).take()


def test_printed_address_lets_in_whatever_the_token_holds(tmp_path: Path) -> None:
    with ViewServer(f"ipc://{tmp_path}/nobody", port=0, token="a&b=c d+e#f%21") as view:
        path = view.url.partition(f":{view.port}")[2]
        assert status_of(view, path)[0] == 303


def test_loopback_needs_no_token_unless_one_is_given() -> None:
    assert [token_for(host, None) for host in ("127.0.0.1", "::1", "localhost", "127.1.2.3")] == [None] * 4
    assert token_for("localhost", "long enough") == "long enough"
    assert token_for("0.0.0.0", None) != token_for("0.0.0.0", None)


def test_short_token_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="a token must have at least 8 characters, got 3"):
        ViewServer("tcp://127.0.0.1:5556", token="abc")


def test_any_address_is_named_as_this_machine() -> None:
    assert public_name("0.0.0.0") not in ("", "0.0.0.0")
    assert public_name("::1") == "[::1]"


# -- start and stop --------------------------------------------------------------


def test_port_in_use_is_said_before_anything_starts(tmp_path: Path) -> None:
    before = threading.active_count()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OutputError, match=f"127.0.0.1:{port}: the port is in use; .*--port"):
            ViewServer(f"ipc://{tmp_path}/nobody", port=port).start()
    assert threading.active_count() == before


def test_address_of_another_machine_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"192\.0\.2\.1:0: .*--host"):
        ViewServer(f"ipc://{tmp_path}/nobody", host="192.0.2.1", port=0).start()


def test_port_that_cannot_be_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="port must lie in 0-65535, got 70000"):
        ViewServer("tcp://127.0.0.1:5556", port=70000)


def test_endpoint_that_makes_no_sense_is_a_source_error_and_frees_the_port() -> None:
    view = ViewServer("nonsense", port=0)
    with pytest.raises(SourceError, match="cannot subscribe to nonsense"):
        view.start()


def test_port_is_free_again_after_stop_even_with_a_viewer_watching(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/nobody"
    with ViewServer(endpoint, port=0) as view, live(view) as connection:
        Viewer(connection).take()
        view.stop()
        with ViewServer(endpoint, port=view.port) as again:
            assert status_of(again)[0] == 200


def test_page_in_a_process_of_its_own_is_served_and_ends(camera: Camera) -> None:
    with ViewProcess(camera.output, port=0) as page:
        port = int(page.url.rstrip("/").rpartition(":")[2])
        with connect(f"ws://127.0.0.1:{port}/live", origin=Origin(f"http://127.0.0.1:{port}")) as connection:
            Viewer(connection).take()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=DEADLINE_S)


def test_viewers_words_for_the_recorder_reach_the_service_from_the_pages_own_origin_only(
    camera: Camera,
) -> None:
    told: queue.SimpleQueue[str] = queue.SimpleQueue()
    with ViewProcess(camera.output, port=0, on_record=told.put) as page:
        port = int(page.url.rstrip("/").rpartition(":")[2])
        with pytest.raises(InvalidStatus):
            connect(f"ws://127.0.0.1:{port}/live", origin=Origin("http://other.example"))
        with connect(f"ws://127.0.0.1:{port}/live", origin=Origin(f"http://127.0.0.1:{port}")) as connection:
            viewer = Viewer(connection)
            assert viewer.take()[0]["can_record"] is True
            for word in ("begin recording", "end recording"):
                connection.send(word)
            assert [told.get(timeout=DEADLINE_S) for _ in range(2)] == ["begin", "end"]
    assert told.empty()


def test_viewer_that_never_stops_telling_the_recorder_is_heard_now_and_then(
    camera: Camera, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "_TELL_EVERY_S", 1000.0)
    told: queue.SimpleQueue[str] = queue.SimpleQueue()
    with ViewServer(camera.output, port=0, on_record=told.put) as view, live(view) as loud:
        loud.send("begin recording")
        assert told.get(timeout=DEADLINE_S) == "begin"
        loud.send("end recording")
        with watching(view) as other:
            camera.send(0)
            other.until(frame=0)
        assert told.empty()


def test_viewer_of_a_page_without_a_recorder_is_refused_to_record(camera: Camera, view: ViewServer) -> None:
    with live(view) as connection:
        assert Viewer(connection).take()[0]["can_record"] is False
        connection.send("begin recording")
        with suppress(ConnectionClosed):
            for _ in connection:
                pass
        assert connection.close_reason == "this page has no recorder to tell"


def patiently_connected(port: int, token: str) -> ClientConnection:
    """To a page that may not be there yet."""
    url, origin = f"ws://127.0.0.1:{port}/live?token={token}", Origin(f"http://127.0.0.1:{port}")
    until_s = time.monotonic() + DEADLINE_S
    while True:
        try:
            return connect(url, origin=origin)
        except (OSError, EOFError, InvalidMessage, ConnectionClosed):
            assert time.monotonic() < until_s


def test_page_that_dies_comes_back_at_the_same_address_with_the_same_token(
    camera: Camera, caplog: pytest.LogCaptureFixture
) -> None:
    told: queue.SimpleQueue[str] = queue.SimpleQueue()
    with ViewProcess(camera.output, "0.0.0.0", 0, on_record=told.put) as page:
        port, token = int(page.url.rpartition(":")[2].partition("/")[0]), page.url.rpartition("=")[2]
        for _ in range(2):
            page._process.kill()
            with patiently_connected(port, token) as connection:
                Viewer(connection).take()
                connection.send("begin recording")
                assert told.get(timeout=DEADLINE_S) == "begin"
        page._process.kill()
    assert caplog.text.count("the live page died (exit code -9); another one is started") >= 2
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=DEADLINE_S)


def test_page_that_keeps_dying_is_given_up_with_what_replaces_it(
    camera: Camera, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restarts, "MOST_DEATHS", 1)
    with ViewProcess(camera.output, port=0) as page:
        assert page._listening
        before = page._process
        before.kill()
        while page._process is before or page._process.pid is None:
            assert page._listening.is_alive()
        page._process.kill()
        page._listening.join(timeout=DEADLINE_S)
        assert not page._listening.is_alive()
        assert f"the service goes on; another one: emstream view --input {camera.output}" in caplog.text
    caplog.clear()
    with ViewProcess(camera.output, port=0):
        pass
    assert not caplog.text


def test_process_of_the_page_says_why_it_cannot_start(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        page = ViewProcess(f"ipc://{tmp_path}/nobody", port=taken.getsockname()[1])
        with pytest.raises(OutputError, match=r"the port is in use.* with --view-port \(0 picks"):
            page.start()


def test_missing_web_server_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    for name in ("emstream.view", "emstream.view.server"):
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(OutputError, match=r"needs uvicorn: pip install 'emstream\[view\]'"):
        importlib.import_module("emstream.view")


# -- pairs, scales, averages ------------------------------------------------------


def published(topic: str, number: int, **extra: Any) -> list[zmq.Frame]:
    """A message as the publisher sends it."""
    _, head, pixels = message(number, counts(number), extra=extra)
    return [zmq.Frame(part) for part in (topic.encode(), head, pixels.tobytes())]


def received(*messages: list[zmq.Frame]) -> Receiver:
    receiver = Receiver("ipc:///nobody")
    for parts in messages:
        receiver._receive(parts)
    return receiver


def test_frames_of_different_numbers_are_never_paired() -> None:
    receiver = received(
        published("raw", 1), published("denoised", 1), published("raw", 2), published("denoised", 3)
    )
    assert receiver.newest is not None
    assert receiver.newest.raw.number == receiver.newest.denoised.number == 1


def test_denoised_frame_whose_raw_one_was_lost_is_not_shown() -> None:
    assert received(published("denoised", 0)).newest is None


def test_nonsense_in_a_header_is_left_out() -> None:
    nonsense = {
        "dose": b"\xff",
        "in_domain": "yes",
        "stages_ns": {"received": None, "published": float("inf")},
        "ledger": {"published": "many", "dropped": 2, b"x": 3},
        "engine": {"name": "unet", "sha256": [1]},
    }
    receiver = received(published("raw", 0), published("denoised", 0, **nonsense))
    assert receiver.newest is not None
    header = Painter().paint([receiver.newest], Request()).header
    assert (header["dose"], header["in_domain"], header["latency_ms"]) == (None, None, {})
    status = receiver.status()
    assert (status["ledger"], status["engine"]) == ({"dropped": 2}, {"name": "unet"})
    json.dumps(status | header, allow_nan=False)


def test_rate_is_the_published_one_though_frames_are_lost_on_the_way() -> None:
    messages = []
    for number in (0, 10, 40, 80):
        header = {"ledger": {"published": number + 1}, "stages_ns": {"published": number * 25_000_000}}
        messages += [published("raw", number), published("denoised", number, **header)]
    assert received(*messages).status()["frames_per_s"] == pytest.approx(40)


def test_rate_begins_again_with_a_new_run_of_the_service() -> None:
    messages = [
        published("denoised", number, ledger={"published": count}, stages_ns={"published": at_ns})
        for number, count, at_ns in [(0, 500, 1), (1, 501, 2), (0, 1, 1_000_000_000), (1, 2, 1_100_000_000)]
    ]
    assert received(*messages).status()["frames_per_s"] == pytest.approx(10)
