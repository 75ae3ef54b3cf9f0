"""The live page in a real browser: headless Chromium, driven over its DevTools protocol."""

from __future__ import annotations

import base64
import http.client
import itertools
import json
import queue
import re
import shutil
import subprocess
import threading
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from websockets.sync.client import ClientConnection, connect

from emstream import restarts
from emstream.inference import IdentityEngine
from emstream.intake import Overrun
from emstream.record import RecordSettings
from emstream.record_process import RecorderProcess
from emstream.recording import Recording
from emstream.view import ViewProcess, ViewServer
from tests.conftest import Rig, message
from tests.test_view import CARD, assert_shows

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--remote-debugging-port=0", "about:blank",
)  # fmt: skip
DEADLINE_S = 30
SHAPE = (96, 128)
SCREEN = {"width": 1400, "height": 900, "deviceScaleFactor": 1, "mobile": False}
PIXEL_M = 10e-12
RED = "rgb(255, 97, 89)"

ABOUT = {"series": 4, "pixel_size_m": PIXEL_M, "timestamp_ns": 1}

# JavaScript
TEXT_OF = "document.getElementById('%s').textContent"
NUMBER_OF = "Number(document.getElementById('%s').dataset.value ?? NaN)"
STATE_IS = "document.body.dataset.state === '%s'"
# Both canvases as they stand at one moment: no frame is drawn while this runs. Of each pixel of the
# frame that is on them, the colour in its middle.
CANVASES = """["raw", "denoised"].map((name) => {
    const canvas = document.getElementById(name);
    const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    const [top, left, height, width] = JSON.parse(canvas.dataset.shown);
    const zoom = canvas.width / width;
    const rows = [Math.max(0, Math.ceil(top)), Math.min(%d, Math.floor(top + height))];
    const columns = [Math.max(0, Math.ceil(left)), Math.min(%d, Math.floor(left + width))];
    const rgb = [];
    for (let row = rows[0]; row < rows[1]; row++) {
        const y = Math.floor((row + 0.5 - top) * zoom);
        for (let column = columns[0]; column < columns[1]; column++) {
            const at = 4 * (y * canvas.width + Math.floor((column + 0.5 - left) * zoom));
            rgb.push(data[at], data[at + 1], data[at + 2]);
        }
    }
    return { ...canvas.dataset, rows, columns, zoom, rgb };
})"""
BOXES = "['raw', 'denoised'].map((name) => document.getElementById(name).getBoundingClientRect().toJSON())"
CUT_OFF = """[...document.querySelectorAll("section, .value, .note, dl, figcaption")]
    .filter((e) => e.scrollWidth > e.clientWidth).map((e) => e.outerHTML)"""

PRESS = "dispatchEvent(new KeyboardEvent('keydown', { key: '%s', shiftKey: %s }))"
HELD = "for (let i = 0; i < 9; i++) dispatchEvent(new KeyboardEvent('keydown', { key: '%s', repeat: true }))"
SETTLED = "document.body.hasAttribute('data-settled')"

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium"
)


def counts(number: int, dose: float = 2.0) -> np.ndarray:
    """The frame that the camera sends as `number`: a lattice that moves, with its noise [electrons]."""
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]]
    lattice = 1 + 0.8 * np.cos(2 * np.pi * (x + number) / 16) * np.cos(2 * np.pi * y / 12)
    noisy: np.ndarray = np.random.default_rng(number).poisson(dose * lattice).astype(np.uint8)
    return noisy


class Tab:
    """A browser tab and what one may ask of it."""

    def __init__(self, devtools: ClientConnection) -> None:
        self._devtools = devtools
        self._ids = itertools.count()
        self._loaded = False
        self._file = ""
        self._downloaded: str | None = None
        self.complaints: list[Any] = []
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One DevTools command and its result."""
        number = next(self._ids)
        self._devtools.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while (answer := self._hear()).get("id") != number:
            pass
        assert "error" not in answer, answer["error"]
        result: dict[str, Any] = answer["result"]
        return result

    def open(self, url: str) -> None:
        self._loaded = False
        self.call("Page.navigate", url=url)
        while not self._loaded:
            self._hear()

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression; a promise is waited for."""
        answer = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, condition: str) -> None:
        """Wait until a JavaScript expression is true, looking once per drawn frame."""
        came = self.evaluate(f"""new Promise((resolve) => {{
            const deadline = performance.now() + {1000 * DEADLINE_S / 2};
            const look = () => {{
                if ({condition}) resolve(true);
                else if (performance.now() > deadline) resolve(false);
                else requestAnimationFrame(look);
            }};
            look();
        }})""")
        assert came, f"{condition} never came true; the page says {self.evaluate('document.body.innerText')}"

    def wait_for_frame_after(self, number: int) -> int:
        """Wait for a frame of a number above `number`; returns the number shown."""
        self.wait(f"({NUMBER_OF % 'frame'} > {number})")
        return self.number("frame")

    def text(self, name: str) -> str:
        return str(self.evaluate(TEXT_OF % name))

    def number(self, name: str) -> int:
        return int(self.evaluate(NUMBER_OF % name))

    def press(self, key: str) -> None:
        self.evaluate(PRESS % (key, "false"))

    def settle(self) -> None:
        """Wait until what is on the screen is what was asked for last."""
        self.wait(SETTLED)

    def middle_of(self, name: str) -> tuple[float, float]:
        box = self.evaluate(f"document.getElementById('{name}').getBoundingClientRect().toJSON()")
        return box["left"] + box["width"] / 2, box["top"] + box["height"] / 2

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Press the mouse's button at `start`, move to `end` in a few steps, let go."""
        steps = [tuple(a + (b - a) * i / 4 for a, b in zip(start, end, strict=True)) for i in range(5)]
        kinds = ["mousePressed", *["mouseMoved"] * 4, "mouseReleased"]
        for kind, (x, y) in zip(kinds, [*steps, steps[-1]], strict=True):
            buttons = 0 if kind == "mouseReleased" else 1
            self.call(
                "Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=buttons, clickCount=1
            )

    def download(self, folder: Path, click: Callable[[], None]) -> Path:
        """What `click` saves."""
        self.call(
            "Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder), eventsEnabled=True
        )
        self._downloaded = None
        click()
        while self._downloaded is None:
            self._hear()
        return folder / self._downloaded

    def style(self, name: str, attribute: str) -> str:
        return str(self.evaluate(f"getComputedStyle(document.getElementById('{name}')).{attribute}"))

    def _hear(self) -> dict[str, Any]:
        """The next answer or event."""
        heard: dict[str, Any] = json.loads(self._devtools.recv(timeout=DEADLINE_S))
        if heard.get("method") == "Runtime.exceptionThrown" or (
            heard.get("method") == "Log.entryAdded" and heard["params"]["entry"]["level"] == "error"
        ):
            self.complaints.append(heard["params"])
        if heard.get("method") == "Browser.downloadWillBegin":
            self._file = heard["params"]["suggestedFilename"]
        if heard.get("method") == "Browser.downloadProgress" and heard["params"]["state"] == "completed":
            self._downloaded = self._file
        self._loaded |= heard.get("method") == "Page.loadEventFired"
        return heard


def devtools_port(browser: subprocess.Popen[str]) -> int:
    """Read the port off the browser's standard error, and keep reading, so that it never blocks."""
    found: list[int] = []
    ready = threading.Event()

    def read() -> None:
        assert browser.stderr is not None
        with browser.stderr:
            for line in browser.stderr:
                if line.startswith("DevTools listening on ws://"):
                    found.append(int(line.split(":")[-1].split("/")[0]))
                    ready.set()
        ready.set()

    threading.Thread(target=read, daemon=True).start()
    assert ready.wait(DEADLINE_S), "Chromium did not start in time"
    assert found, f"Chromium ended with {browser.wait()}"
    return found[0]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """A headless Chromium; the port of its DevTools."""
    assert CHROMIUM is not None
    folder = tmp_path_factory.mktemp("chromium")
    with subprocess.Popen(
        [CHROMIUM, *FLAGS, f"--user-data-dir={folder}"],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    ) as process:
        try:
            yield devtools_port(process)
        finally:
            process.terminate()
            process.wait(DEADLINE_S)


@pytest.fixture
def tab(browser: int) -> Iterator[Tab]:
    """A new tab, in which no script may fail."""
    client = http.client.HTTPConnection("127.0.0.1", browser, timeout=DEADLINE_S)
    client.request("PUT", "/json/new?about:blank")
    target = json.loads(client.getresponse().read())
    with connect(target["webSocketDebuggerUrl"], max_size=None, compression=None) as devtools:
        tab = Tab(devtools)
        tab.call("Emulation.setDeviceMetricsOverride", **SCREEN)
        yield tab
    client.request("GET", f"/json/close/{target['id']}")
    client.getresponse().read()
    client.close()


class Camera:
    """Sends frame after frame, at a leisurely rate, until told to pause."""

    def __init__(self, run: Rig) -> None:
        self.output = run.service.publisher.endpoint
        self.dose = 2.0
        self.about = ABOUT
        self._run = run
        self._next = 0
        self._pause = threading.Event()
        self._thread: threading.Thread | None = None

    def go(self) -> None:
        self._pause.clear()
        self._thread = threading.Thread(target=self._send)
        self._thread.start()

    def pause(self) -> None:
        self._pause.set()
        if self._thread:
            self._thread.join()

    def skip(self, frames: int) -> None:
        """Lose frames: their numbers will be missing."""
        self._next += frames

    def _send(self) -> None:
        while not self._pause.wait(0.025):
            self._run.camera.send_multipart(message(self._next, counts(self._next, self.dose), **self.about))
            self._next += 1


@pytest.fixture
def camera(rig: Callable[..., Rig]) -> Iterator[Camera]:
    engine = IdentityEngine()
    engine.card = replace(CARD, dose_range=(0.5, 4.0))
    run = rig({"overrun": Overrun.block}, engine=engine)
    run.start()
    camera = Camera(run)
    yield camera
    camera.pause()


@pytest.fixture
def view(camera: Camera) -> Iterator[ViewServer]:
    with ViewServer(camera.output, port=0) as view:
        yield view


@dataclass(frozen=True)
class Canvas:
    """What is on one side's canvas: the part of the frame and its colours (h, w, 3)."""

    frame: int
    rows: slice
    columns: slice
    zoom: float
    scale: dict[str, float]
    rgb: np.ndarray

    def assert_shows(self, image: np.ndarray) -> None:
        """Grey, and the very pixels of this part of `image` [electrons]."""
        assert (self.rgb == self.rgb[..., :1]).all()
        assert_shows(self.rgb[..., 0], self.scale, image[self.rows, self.columns])


def canvases(tab: Tab) -> list[Canvas]:
    """Raw and denoised."""
    found = []
    for side in tab.evaluate(CANVASES % SHAPE):
        rows, columns = slice(*side["rows"]), slice(*side["columns"])
        shape = (rows.stop - rows.start, columns.stop - columns.start, 3)
        scale = {"low": float(side["low"]), "high": float(side["high"])}
        rgb = np.array(side["rgb"], np.uint8).reshape(shape)
        found.append(Canvas(int(side["frame"]), rows, columns, side["zoom"], scale, rgb))
    return found


@pytest.fixture
def page(tab: Tab, view: ViewServer, camera: Camera) -> Tab:
    """The page with frames coming in."""
    camera.go()
    tab.open(view.url)
    tab.wait_for_frame_after(2)
    return tab


def test_both_canvases_hold_the_pixels_of_one_frame(page: Tab) -> None:
    raw, denoised = canvases(page)
    assert raw.frame == denoised.frame
    for canvas in (raw, denoised):
        assert canvas.rgb.shape == (*SHAPE, 3)
        canvas.assert_shows(counts(raw.frame))
    assert not page.complaints


def test_frames_and_numbers_on_the_page_advance(tab: Tab, view: ViewServer, camera: Camera) -> None:
    camera.go()
    tab.open(view.url)
    first = tab.wait_for_frame_after(-1)
    before, published = canvases(tab), tab.number("published")
    tab.wait_for_frame_after(first + 40)
    for one, other in zip(before, canvases(tab), strict=True):
        assert (one.rgb != other.rgb).any()
    tab.wait(f"{NUMBER_OF % 'published'} > {published + 30}")
    tab.wait(f"Number({TEXT_OF % 'rate'}) > 5")
    assert float(tab.text("latency")) > 0
    assert float(tab.text("dose")) == pytest.approx(2, abs=0.2)
    assert (tab.text("series"), tab.text("source")) == ("4", " · test")
    assert (tab.text("engine-name"), tab.text("engine-device")) == ("identity", "none")
    assert tab.text("state") == "live"
    assert not tab.complaints


def test_dose_out_of_range_and_missing_frames_turn_red(tab: Tab, view: ViewServer, camera: Camera) -> None:
    camera.go()
    tab.open(view.url)
    tab.wait(f"""{TEXT_OF % "domain"} === "in range" """)
    assert tab.evaluate("document.querySelectorAll('.alarm').length") == 0
    camera.pause()
    camera.skip(3)
    camera.dose = 8.0
    camera.go()
    tab.wait(f"{NUMBER_OF % 'missing'} === 3")
    tab.wait(f"""{TEXT_OF % "domain"} === "out of range" """)
    assert tab.style("missing", "color") == tab.style("dose", "color") == RED
    assert tab.style("domain", "backgroundColor") == RED
    assert tab.style("dropped", "color") != RED
    assert tab.style("mark", "backgroundColor") == RED
    assert tab.text("mark").startswith("3 missing, dose outside the engine's range")
    assert tab.evaluate("Number(document.getElementById('track').dataset.faults)") > 0
    tab.evaluate("document.getElementById('mark').click()")
    assert tab.style("mark", "backgroundColor") != RED
    camera.pause()
    camera.skip(1)
    camera.go()
    tab.wait(f"{TEXT_OF % 'mark'}.startsWith('4 missing')")
    assert tab.style("mark", "backgroundColor") == RED
    tab.wait(f"{TEXT_OF % 'mark'}.endsWith(' s ago')")
    tab.open(view.url)  # again: how long ago it was is no longer known
    tab.wait_for_frame_after(0)
    tab.evaluate("new Promise((resolve) => setTimeout(resolve, 2500))")
    assert tab.text("mark") == "4 missing, dose outside the engine's range"


def test_estimate_of_the_quality_is_shown_and_what_contradicts_it_is_red(
    tab: Tab, view: ViewServer, camera: Camera
) -> None:
    observer = camera._run.service.pipeline._observer
    said = {"frames": 400, "psnr_db": {"value": 33.04, "low": 32.61, "high": 33.5}, "fano": 1.0}
    observer._known = observer._newest, said | {"likelihood": {"value": 0.02, "low": 0.01, "high": 0.03}}
    tab.open(view.url)
    tab.wait(f"""{TEXT_OF % "quality"} === "33.0" """)
    tab.wait(f"""{TEXT_OF % "quality-note"} === "32.6\u201333.5, estimated" """)
    assert "likelihood against an even grey 20.00 (10.00 to 30.00)" in str(
        tab.evaluate("document.getElementById('quality-section').title")
    )
    observer._known = observer._newest, said | {"likelihood": {"value": -0.02, "low": -0.03, "high": -0.01}}
    tab.wait("!document.getElementById('mark').hidden")
    assert tab.text("mark").startswith("the counts contradict the picture")


def test_page_says_that_it_waits_and_that_frames_have_stopped(
    tab: Tab, view: ViewServer, camera: Camera
) -> None:
    tab.open(view.url)
    tab.wait(STATE_IS % "waiting")
    assert tab.text("notice-title") == f"Waiting for frames from {camera.output}"
    tab.wait(f"{TEXT_OF % 'notice-text'}.startsWith('emstream serve is running')")
    camera.go()
    tab.wait(STATE_IS % "live")
    assert tab.style("notice", "display") == "none"
    camera.pause()
    tab.wait(STATE_IS % "quiet")
    assert tab.text("when") == "no frames"
    assert tab.text("notice-title").startswith("No frame for ")
    assert tab.style("notice", "display") == "grid"
    camera.go()
    tab.wait(STATE_IS % "live")
    assert not tab.complaints


def test_page_names_an_engine_that_hangs(
    tab: Tab, view: ViewServer, camera: Camera, monkeypatch: pytest.MonkeyPatch
) -> None:
    tab.open(view.url)
    camera.go()
    tab.wait(STATE_IS % "live")
    engine, hung, goes_on = camera._run.service.engine.current, threading.Event(), threading.Event()
    collect = engine.collect

    def hang(ticket: Any) -> Any:
        hung.set()
        assert goes_on.wait(60)
        return collect(ticket)

    monkeypatch.setattr(engine, "collect", hang)
    assert hung.wait(10)
    tab.wait(f"{TEXT_OF % 'mark'}.startsWith('the engine has stalled for')")
    tab.wait(STATE_IS % "quiet")
    tab.wait(f"{TEXT_OF % 'notice-text'}.endsWith('in its engine and do not come out.')")
    goes_on.set()
    tab.wait(STATE_IS % "live")
    assert not tab.complaints


def test_page_says_that_the_first_frames_are_in_the_engine(
    tab: Tab, view: ViewServer, camera: Camera, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, goes_on = camera._run.service.engine.current, threading.Event()
    collect = engine.collect

    def hang(ticket: Any) -> Any:
        assert goes_on.wait(60)
        return collect(ticket)

    monkeypatch.setattr(engine, "collect", hang)
    tab.open(view.url)
    camera.go()
    tab.wait(f"{TEXT_OF % 'notice-text'}.endsWith('in its engine and do not come out.')")
    assert tab.evaluate(STATE_IS % "waiting")
    goes_on.set()
    tab.wait(STATE_IS % "live")
    assert not tab.complaints


def test_page_reconnects_by_itself(tab: Tab, view: ViewServer, camera: Camera) -> None:
    camera.go()
    tab.open(view.url)
    tab.wait_for_frame_after(0)
    view.stop()
    tab.wait(STATE_IS % "offline")
    shown = tab.number("frame")
    with ViewServer(camera.output, port=view.port):
        tab.wait_for_frame_after(shown)
        tab.wait(STATE_IS % "live")


@pytest.mark.parametrize(
    ("width", "height", "stacked"),
    [
        (1440, 900, False),
        (1180, 820, False),
        (1024, 768, False),
        (820, 1180, False),
        (768, 1024, False),
        (800, 1280, True),
        (390, 844, True),
    ],
)
def test_page_fits_screens_of_all_sizes(
    tab: Tab, view: ViewServer, camera: Camera, width: int, height: int, stacked: bool
) -> None:
    screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 800}
    tab.call("Emulation.setDeviceMetricsOverride", **screen)
    camera.go()
    tab.open(view.url)
    tab.wait_for_frame_after(0)
    raw, denoised = tab.evaluate(BOXES)
    assert (denoised["top"] >= raw["bottom"]) is stacked
    assert (raw["width"], raw["height"]) == pytest.approx((denoised["width"], denoised["height"]), abs=0.1)
    assert min(raw["width"], raw["height"]) > 200
    shown = canvases(tab)
    assert [canvas.rgb.shape for canvas in shown] == [(*SHAPE, 3)] * 2
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    if width > 640:
        assert tab.evaluate("document.documentElement.scrollHeight <= innerHeight")
    assert tab.evaluate(CUT_OFF) == []


SERIES_END_IS_SEEN = """(() => {
    const [end, note] = ["series-end", "series-note"].map((id) => document.getElementById(id).getBoundingClientRect());
    return end.width > 0 && end.right <= note.right;
})()"""


@pytest.mark.parametrize("width", [390, 700, 820, 1024, 1180, 1400])
def test_end_of_a_long_series_is_seen_on_screens_of_all_sizes(
    tab: Tab, view: ViewServer, camera: Camera, width: int
) -> None:
    tab.call("Emulation.setDeviceMetricsOverride", **SCREEN | {"width": width})
    camera.about = ABOUT | {"series": 1763940012345}
    camera.go()
    tab.open(view.url)
    tab.wait_for_frame_after(0)
    assert tab.text("series") == "1763940012345"
    assert tab.text("series-end") == "12345"
    assert tab.evaluate(SERIES_END_IS_SEEN)
    assert "1763940012345" in tab.evaluate("document.getElementById('series-note').title")


# -- what the operator does -----------------------------------------------------------


def stand_still(page: Tab) -> int:
    """Pause; the number of the frame that stays."""
    page.press(" ")
    page.wait("document.body.classList.contains('paused')")
    page.settle()
    return page.number("frame")


def test_wheel_zooms_both_sides_at_the_pointer_and_every_pixel_stays_right(page: Tab) -> None:
    (before, _) = canvases(page)
    x, y = page.middle_of("denoised")
    for _ in range(12):
        page.call("Input.dispatchMouseEvent", type="mouseWheel", x=x, y=y, deltaX=0, deltaY=-100)
    page.settle()
    raw, denoised = canvases(page)
    assert raw.zoom > 4 * before.zoom
    assert (raw.rows, raw.columns) == (denoised.rows, denoised.columns)
    assert raw.rows.start > 0
    assert raw.columns.stop < SHAPE[1]
    for canvas in (raw, denoised):
        canvas.assert_shows(counts(canvas.frame))
    page.press("0")
    page.settle()
    assert canvases(page)[0].rgb.shape == (*SHAPE, 3)


def test_drag_moves_both_sides_by_as_much(page: Tab) -> None:
    for _ in range(6):
        page.press("+")
    page.settle()
    before, _ = canvases(page)
    x, y = page.middle_of("raw")
    page.drag((x, y), (x + 40, y))
    page.settle()
    raw, denoised = canvases(page)
    assert before.columns.start - raw.columns.start == pytest.approx(40 / raw.zoom, abs=1.5)
    assert (raw.rows, raw.columns) == (denoised.rows, denoised.columns)
    raw.assert_shows(counts(raw.frame))


def test_two_fingers_zoom(page: Tab) -> None:
    (before, _) = canvases(page)
    x, y = page.middle_of("raw")
    for type, gap in [("touchStart", 20), ("touchMove", 40), ("touchMove", 80), ("touchEnd", None)]:
        points = [] if gap is None else [{"x": x - gap, "y": y, "id": 0}, {"x": x + gap, "y": y, "id": 1}]
        page.call("Input.dispatchTouchEvent", type=type, touchPoints=points)
    page.settle()
    assert canvases(page)[0].zoom == pytest.approx(4 * before.zoom, rel=0.05)


def test_one_key_shows_a_pixel_as_a_pixel(page: Tab) -> None:
    page.press("1")
    page.settle()
    raw, _ = canvases(page)
    assert raw.zoom == 1
    raw.assert_shows(counts(raw.frame))
    assert page.text("zoom") == "100 %"


def test_contrast_by_hand_and_back_to_percentiles(page: Tab) -> None:
    stand_still(page)
    (before, _) = canvases(page)
    box = page.evaluate("document.getElementById('raw-histogram').getBoundingClientRect().toJSON()")
    y = box["top"] + box["height"] / 2
    end = page.evaluate("""(() => {
        const { low, high } = document.getElementById("raw").dataset;
        return [Number(low), Number(high)];
    })()""")
    assert end == [before.scale["low"], before.scale["high"]]
    # The upper end is the right one of the two teal lines; drag it to the left.
    right = page.evaluate("""(() => {
        const canvas = document.getElementById("raw-histogram");
        const { data } = canvas.getContext("2d").getImageData(0, 1, canvas.width, 1);
        let last = 0;
        for (let x = 0; x < canvas.width; x++) {
            if (data[4 * x] === 0x46 && data[4 * x + 1] === 0xc7) last = x;
        }
        return last / devicePixelRatio;
    })()""")
    page.drag((box["left"] + right, y), (box["left"] + right - 30, y))
    page.settle()
    raw, denoised = canvases(page)
    assert raw.scale["high"] < before.scale["high"] - 0.3
    assert raw.scale["low"] == before.scale["low"]
    assert denoised.scale["high"] == before.scale["high"]
    raw.assert_shows(counts(raw.frame))
    assert page.evaluate("document.getElementById('contrast').value") == "hand"
    page.press("p")
    page.settle()
    assert page.evaluate("document.getElementById('contrast').value") != "hand"
    assert canvases(page)[0].scale["high"] > raw.scale["high"]


def test_colours_are_those_of_the_chosen_map(page: Tab) -> None:
    number = stand_still(page)
    (grey, _) = canvases(page)
    for name in ("inverted", "viridis", "magma", "inferno"):
        page.press("c")
        assert page.evaluate("document.getElementById('colours').value") == name
        table = np.array(page.evaluate(f"import('./colours.js').then((m) => m.colours('{name}'))"))
        (coloured, _) = canvases(page)
        np.testing.assert_array_equal(coloured.rgb, table[grey.rgb[..., 0]])
    assert page.number("frame") == number


def test_colour_maps_grow_steadily_lighter(page: Tab) -> None:
    for name in page.evaluate("import('./colours.js').then((m) => m.NAMES)"):
        table = np.array(page.evaluate(f"import('./colours.js').then((m) => m.colours('{name}'))"))
        assert table.shape == (256, 3)
        luminance = table @ (0.2126, 0.7152, 0.0722)
        steps = np.diff(luminance) * (-1 if name == "inverted" else 1)
        assert (steps > -0.5).all(), name
        assert np.ptp(luminance) > 180


def test_fourier_transforms_of_both_sides_show_the_lattice(page: Tab) -> None:
    page.press("f")
    page.wait("document.getElementById('denoised-spectrum').dataset.halvings !== undefined")
    for side in ("raw", "denoised"):
        assert page.style(f"{side}-spectrum-box", "display") == "block"
        shape, power = page.evaluate(f"""(() => {{
            const canvas = document.getElementById("{side}-spectrum");
            const {{ data }} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
            return [[canvas.height, canvas.width], Array.from(data.filter((_, i) => i % 4 === 0))];
        }})()""")
        bright = np.array(power).reshape(shape)
        assert shape == [24, 32]  # a quarter of Nyquist: 0.08 nm of pixels of 10 pm
        # A lattice of 16 x 12 pixels: 8 waves across and 8 down.
        assert bright[12 - 8, 16 + 8] > 200
        assert bright[12 + 8, 16 + 8] > 200
        assert np.median(bright) < 120
    edge = "document.querySelector('#raw-spectrum-box figcaption').textContent"
    assert page.evaluate(edge) == "edge 80 pm"
    # Its spacing is read off at the peak: 1 / hypot(1/16, 1/12) pixels of 10 pm.
    box = page.evaluate("document.getElementById('raw-spectrum').getBoundingClientRect().toJSON()")
    x = box["left"] + (16 + 8 + 0.5) / 32 * box["width"]
    y = box["top"] + (12 + 8 + 0.5) / 24 * box["height"]
    page.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    said = page.evaluate("document.querySelector('#raw-spectrum-box figcaption').textContent")
    assert float(said.split()[0]) == pytest.approx(96, rel=0.05)
    assert said.split()[1] == "pm"
    page.press("f")
    assert page.style("raw-spectrum-box", "display") == "none"


def test_wipe_shows_raw_left_and_denoised_right_of_the_line(page: Tab) -> None:
    page.press("w")
    page.settle()
    raw, denoised = page.evaluate(BOXES)
    assert raw == denoised
    clip = page.style("denoised-stage", "clipPath")
    assert clip == "inset(0px 0px 0px 50%)"
    x, y = page.middle_of("divider")
    assert x == pytest.approx(raw["left"] + raw["width"] / 2, abs=2)
    page.drag((x, y), (raw["left"] + raw["width"] / 4, y))
    place = float(page.style("denoised-stage", "clipPath").split()[-1].rstrip("%)"))
    assert place == pytest.approx(25, abs=1)
    for canvas in canvases(page):
        canvas.assert_shows(counts(canvas.frame))
    page.press("w")
    page.settle()
    raw, denoised = page.evaluate(BOXES)
    assert denoised["left"] > raw["right"]


def test_average_is_that_of_the_frames_before(page: Tab, camera: Camera) -> None:
    page.wait_for_frame_after(10)
    for _ in range(2):
        page.press("a")
    page.wait(f"{TEXT_OF % 'raw-title'} === 'Average of 4 raw frames'")
    stand_still(page)
    raw, denoised = canvases(page)
    frames = range(raw.frame - 3, raw.frame + 1)
    raw.assert_shows(np.mean([counts(number) for number in frames], axis=0))
    denoised.assert_shows(counts(raw.frame))


def test_pause_stays_at_its_frame_while_the_numbers_go_on_and_steps_go_back(page: Tab) -> None:
    page.wait_for_frame_after(10)
    number, published = stand_still(page), page.number("published")
    page.wait(f"{NUMBER_OF % 'published'} > {published + 20}")
    assert page.number("frame") == number
    for canvas in canvases(page):
        canvas.assert_shows(counts(number))
    for key, step in (("ArrowLeft", -1), ("ArrowLeft", -1), ("ArrowRight", 1)):
        page.press(key)
        number += step
        page.wait(f"{NUMBER_OF % 'frame'} === {number}")
        for canvas in canvases(page):
            assert canvas.frame == number
            canvas.assert_shows(counts(number))
    assert page.text("when").startswith("paused, \N{MINUS SIGN}")
    page.press("End")
    page.wait_for_frame_after(number + 20)
    assert page.text("when") == "live"


def test_scale_bar_is_as_long_as_it_says(page: Tab) -> None:
    (canvas, _) = canvases(page)
    bar = "document.querySelector('.scalebar')"
    width, unit = page.evaluate(f"{bar}.dataset.text").split()
    metres = float(width) * {"pm": 1e-12, "nm": 1e-9}[unit]
    drawn = page.evaluate(f"parseFloat({bar}.style.width) * devicePixelRatio")
    assert drawn == pytest.approx(metres / PIXEL_M * canvas.zoom, rel=0.01)


def test_histogram_counts_the_pixels(page: Tab) -> None:
    for side in ("raw", "denoised"):
        counted = page.evaluate(f"Number(document.getElementById('{side}-histogram').dataset.counts)")
        assert 0.99 * np.prod(SHAPE) <= counted <= np.prod(SHAPE)


def test_png_is_what_is_seen_with_the_whole_header_inside(page: Tab, tmp_path: Path) -> None:
    number = stand_still(page)
    (raw, denoised) = canvases(page)
    path = page.download(tmp_path, lambda: page.press("s"))
    assert path.name == f"emstream-test-4-{number:06d}.png"
    content = path.read_bytes()
    at = content.index(b"iTXtemstream\0")
    length = int.from_bytes(content[at - 4 : at], "big")
    text = content[at + 4 : at + 4 + length]
    assert zlib.crc32(content[at : at + 4 + length]) == int.from_bytes(content[at + 4 + length :][:4], "big")
    header = json.loads(text.partition(b"\0\0\0\0\0")[2])
    assert header["raw"]["frame"] == header["denoised"]["frame"] == number
    assert header["denoised"]["engine"]["name"] == "identity"
    assert header["denoised"].keys() >= {"ledger", "stages_ns", "dose", "pixel_size_m", "timestamp_ns"}
    assert header["view"]["contrast"]["denoised"] == [denoised.scale["low"], denoised.scale["high"]]
    # The picture itself, as the browser reads it back: its two halves are the two canvases.
    size, same = page.evaluate(f"""(async () => {{
        const bytes = Uint8Array.from(atob("{base64.b64encode(content).decode()}"), (c) => c.charCodeAt(0));
        const image = await createImageBitmap(new Blob([bytes], {{ type: "image/png" }}));
        const screen = document.getElementById("denoised");
        const copy = new OffscreenCanvas(image.width, image.height);
        copy.getContext("2d").drawImage(image, 0, 0);
        const unit = Math.max(1, Math.round(Math.min(screen.width, screen.height) / 340));
        const part = copy.getContext("2d")
            .getImageData(image.width - screen.width, 20 * unit, screen.width, screen.height / 2).data;
        const seen = screen.getContext("2d").getImageData(0, 0, screen.width, screen.height / 2).data;
        return [[image.height, image.width], part.every((value, i) => value === seen[i])];
    }})()""")
    assert size[1] > 2 * raw.zoom * SHAPE[1]
    assert same
    assert not page.complaints


def test_tiff_holds_every_pixel_of_the_frame_on_the_screen(page: Tab, tmp_path: Path) -> None:
    number = stand_still(page)
    path = page.download(tmp_path, lambda: page.press("t"))
    with tifffile.TiffFile(path) as file:
        for series in file.series:
            np.testing.assert_array_equal(series.asarray(), counts(number))
            assert json.loads(series.keyframe.description)["frame"] == number


def test_help_lists_the_keys_and_closes(page: Tab) -> None:
    page.press("?")
    assert page.evaluate("document.getElementById('keys').open")
    listed = page.text("key-list")
    assert "pause, go on" in listed
    number = page.number("frame")
    page.press(" ")  # the list is open: the keys rest
    page.wait_for_frame_after(number + 5)
    page.press("?")
    assert not page.evaluate("document.getElementById('keys').open")


def test_page_for_other_machines_opens_with_its_token_and_not_without(tab: Tab, camera: Camera) -> None:
    camera.go()
    with ViewServer(camera.output, host="0.0.0.0", port=0) as view:
        tab.open(f"http://127.0.0.1:{view.port}/")
        assert "asks for a token" in tab.evaluate("document.body.innerText")
        tab.open(f"http://127.0.0.1:{view.port}/?token={view.token}")
        tab.wait_for_frame_after(2)
        assert tab.evaluate("location.search") == ""


def test_open_page_goes_on_by_itself_after_the_pages_process_died(tab: Tab, camera: Camera) -> None:
    camera.go()
    with ViewProcess(camera.output, port=0) as page:
        tab.open(page.url)
        tab.wait_for_frame_after(0)
        page._process.kill()
        tab.wait("document.getElementById('state').textContent === 'disconnected'")
        tab.wait_for_frame_after(tab.number("frame"))
        tab.wait("document.getElementById('state').textContent === 'live'")


# -- recording --------------------------------------------------------------------------

RECORD_IS = "document.getElementById('record').dataset.state === '%s'"
RECORDED = "(Number(document.getElementById('recording').dataset.frames) > %d)"


@pytest.fixture
def recorder(rig: Callable[..., Rig], tmp_path: Path) -> Iterator[tuple[Camera, RecorderProcess]]:
    """A camera, and behind its service a recorder that looks back."""
    pytest.importorskip("hdf5plugin")
    run = rig({"overrun": Overrun.block})
    output = run.service.publisher.endpoint
    process = RecorderProcess(
        RecordSettings(input=output, output=tmp_path, look_back_s=1000.0),
        on_status=run.service.pipeline.note_recording,
    )
    process.wait_until_it_listens(run.service.publisher)
    run.start()
    camera = Camera(run)
    yield camera, process
    camera.pause()
    if process._process.is_alive():
        process.finish()
    else:
        process._asked.set()
        process._end()


def test_record_button_records_what_came_before_it_and_ends_when_pressed_twice(
    tab: Tab, recorder: tuple[Camera, RecorderProcess], tmp_path: Path
) -> None:
    camera, process = recorder
    camera.go()
    with ViewServer(camera.output, port=0, on_record=process.tell) as view:
        tab.open(view.url)
        tab.wait_for_frame_after(20)
        tab.wait(RECORD_IS % "looking back")
        assert tab.text("record-label") == "Record"
        tab.wait(r"/last [1-9]\d* s kept/.test(document.getElementById('recording').textContent)")
        tab.press("r")
        tab.wait(RECORD_IS % "recording")
        past = re.fullmatch(r"Recording, with the last (\d+) s", tab.text("message"))
        assert past
        assert int(past[1]) > 0
        assert tab.evaluate("document.getElementById('record').getAttribute('aria-pressed')") == "true"
        tab.wait(RECORDED % 40)
        tab.wait("document.getElementById('recording').textContent.includes('disk for')")
        for width, height in ((390, 844), (820, 1180), (SCREEN["width"], SCREEN["height"])):
            tab.call("Emulation.setDeviceMetricsOverride", **SCREEN | {"width": width, "height": height})
            assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
            assert tab.evaluate(CUT_OFF) == []
        tab.evaluate(HELD % "r")  # a key that is held down is pressed once
        assert tab.text("record-label") == "Recording"
        tab.press("r")  # once is not enough
        tab.evaluate(HELD % "r")
        assert tab.text("record-label") == "End?"
        tab.wait("document.getElementById('record-label').textContent === 'Recording'")
        assert tab.evaluate(RECORD_IS % "recording")
        for _ in range(2):
            tab.evaluate("document.getElementById('record').click()")
        tab.wait(RECORD_IS % "looking back")
        assert tab.text("record-label") == "Record"
        assert tab.evaluate("document.getElementById('mark').hidden")
        tab.press("R")
        tab.wait(RECORD_IS % "recording")
    camera.pause()
    process.finish()
    first, second = sorted(tmp_path.glob("emstream-*.h5"))
    with Recording(first) as recording:
        assert recording.ended == "stopped"
        assert recording.raw.numbers[0] == 0  # though the button was pressed at frame 20 or later
        assert len(recording.raw) > 40
        np.testing.assert_array_equal(recording.raw[5], counts(5))
        last = int(recording.raw.numbers[-1])
    with Recording(second) as recording:
        assert recording.raw.numbers[0] > last
    assert not tab.complaints


def test_recorder_that_keeps_dying_is_marked_in_red_and_the_button_says_why_it_does_nothing(
    tab: Tab, recorder: tuple[Camera, RecorderProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restarts, "MOST_DEATHS", 0)
    camera, process = recorder
    camera.go()
    with ViewServer(camera.output, port=0, on_record=process.tell) as view:
        tab.open(view.url)
        tab.wait(RECORD_IS % "looking back")
        process._process.kill()
        tab.wait("!document.getElementById('mark').hidden")
        assert tab.text("mark").startswith("the recorder failed")
        assert tab.evaluate("document.querySelector('header').offsetHeight") < 100
        assert tab.style("mark", "backgroundColor") == RED
        tab.evaluate("document.getElementById('record').click()")
        assert "start emstream serve again" in tab.text("message")
        assert tab.evaluate("document.getElementById('record').getAttribute('aria-disabled')") == "true"
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert not tab.complaints


def test_recording_that_ended_by_itself_is_marked_in_red_and_the_button_begins_again(
    tab: Tab, rig: Callable[..., Rig]
) -> None:
    run = rig()
    run.start()
    told: queue.SimpleQueue[str] = queue.SimpleQueue()
    run.service.pipeline.note_recording({"state": "ended", "why": "disk low"})
    with ViewServer(run.service.publisher.endpoint, port=0, on_record=told.put) as view:
        tab.open(view.url)
        tab.wait("!document.getElementById('mark').hidden")
        assert tab.text("mark").startswith("recording ended: disk low")
        tab.press("r")
        assert told.get(timeout=DEADLINE_S) == "begin"
        button = "document.getElementById('record')"
        assert tab.evaluate(f"{button}.title") == "recording ended: disk low; press to record again (R)"
        run.service.pipeline.note_recording({"state": "recording", "lost": {"raw": 0, "denoised": 7}})
        tab.wait(RECORD_IS % "recording")
        tab.wait("document.getElementById('mark').textContent.startsWith('7 denoised not recorded')")
    assert not tab.complaints


def test_record_button_without_a_recorder_says_how_to_have_one(page: Tab) -> None:
    page.wait("document.getElementById('record').title.startsWith('No recorder')")
    page.press("r")
    assert "--record FOLDER" in page.text("message")
    number = page.number("frame")
    page.wait_for_frame_after(number)  # the page goes on
    assert page.evaluate("document.getElementById('mark').hidden")


def test_page_of_another_program_cannot_tell_the_recorder_and_says_so(
    tab: Tab, recorder: tuple[Camera, RecorderProcess]
) -> None:
    camera, _ = recorder
    camera.go()
    with ViewServer(camera.output, port=0) as view:
        tab.open(view.url)
        tab.wait(RECORD_IS % "looking back")
        tab.press("r")
        assert "emstream serve --view" in tab.text("message")
        assert tab.text("record-label") == "Record"
