"""The live page in a real browser: headless Chromium, driven over its DevTools protocol."""

from __future__ import annotations

import http.client
import itertools
import json
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from websockets.sync.client import ClientConnection, connect

from emstream.inference import IdentityEngine
from emstream.intake import Overrun
from emstream.view import ViewServer
from tests.conftest import Rig, message
from tests.test_view import CARD, assert_shows

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--remote-debugging-port=0", "about:blank",
)  # fmt: skip
DEADLINE_S = 30
SHAPE = (96, 128)
RED = "rgb(255, 97, 89)"

# JavaScript
TEXT_OF = "document.getElementById('%s').textContent"
NUMBER_OF = "Number(document.getElementById('%s').dataset.value ?? NaN)"
STATE_IS = "document.body.dataset.state === '%s'"
# Both canvases as they stand at one moment: no frame is drawn while this runs.
CANVASES = """["raw", "denoised"].map((name) => {
    const canvas = document.getElementById(name);
    const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    return { ...canvas.dataset, shape: [canvas.height, canvas.width], rgba: Array.from(data) };
})"""
BOXES = "['raw', 'denoised'].map((name) => document.getElementById(name).getBoundingClientRect().toJSON())"
CUT_OFF = """[...document.querySelectorAll("section, .value, .note, dl, figcaption")]
    .filter((e) => e.scrollWidth > e.clientWidth).map((e) => e.outerHTML)"""

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

    def style(self, name: str, attribute: str) -> str:
        return str(self.evaluate(f"getComputedStyle(document.getElementById('{name}')).{attribute}"))

    def _hear(self) -> dict[str, Any]:
        """The next answer or event."""
        heard: dict[str, Any] = json.loads(self._devtools.recv(timeout=DEADLINE_S))
        if heard.get("method") == "Runtime.exceptionThrown" or (
            heard.get("method") == "Log.entryAdded" and heard["params"]["entry"]["level"] == "error"
        ):
            self.complaints.append(heard["params"])
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
        yield tab
    client.request("GET", f"/json/close/{target['id']}")
    client.getresponse().read()
    client.close()


class Camera:
    """Sends frame after frame, at a leisurely rate, until told to pause."""

    def __init__(self, run: Rig) -> None:
        self.output = run.service.publisher.endpoint
        self.dose = 2.0
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
            self._run.camera.send_multipart(message(self._next, counts(self._next, self.dose), series=4))
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


def test_both_canvases_hold_the_pixels_of_one_frame(tab: Tab, view: ViewServer, camera: Camera) -> None:
    camera.go()
    tab.open(view.url)
    tab.wait_for_frame_after(5)
    raw, denoised = tab.evaluate(CANVASES)
    assert raw["frame"] == denoised["frame"]
    source = counts(int(raw["frame"]))
    for canvas in (raw, denoised):
        assert canvas["shape"] == list(SHAPE)
        rgba = np.array(canvas["rgba"], np.uint8).reshape(*SHAPE, 4)
        assert (rgba[..., 3] == 255).all()
        assert (rgba[..., 0] == rgba[..., 1]).all()
        assert (rgba[..., 0] == rgba[..., 2]).all()
        assert_shows(rgba[..., 0], {"low": float(canvas["low"]), "high": float(canvas["high"])}, source)
    assert not tab.complaints


def test_frames_and_numbers_on_the_page_advance(tab: Tab, view: ViewServer, camera: Camera) -> None:
    camera.go()
    tab.open(view.url)
    first = tab.wait_for_frame_after(-1)
    before, published = tab.evaluate(CANVASES), tab.number("published")
    tab.wait_for_frame_after(first + 40)
    for one, other in zip(before, tab.evaluate(CANVASES), strict=True):
        assert one["rgba"] != other["rgba"]
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
    tab.wait(f"""{TEXT_OF % "domain"} === "in the engine's range" """)
    assert tab.evaluate("document.querySelectorAll('.alarm').length") == 0
    camera.pause()
    camera.skip(3)
    camera.dose = 8.0
    camera.go()
    tab.wait(f"{NUMBER_OF % 'missing'} === 3")
    tab.wait(f"""{TEXT_OF % "domain"} === "outside engine's range" """)
    assert tab.style("missing", "color") == tab.style("dose", "color") == RED
    assert tab.style("domain", "backgroundColor") == RED
    assert tab.style("dropped", "color") != RED


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
    assert tab.text("notice-title").startswith("No frame for ")
    assert tab.style("notice", "display") == "grid"
    camera.go()
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
    [(1440, 900, False), (1180, 820, False), (1024, 768, False), (820, 1180, True), (390, 844, True)],
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
    assert raw["width"] / raw["height"] == pytest.approx(SHAPE[1] / SHAPE[0], rel=0.01)
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    if width > 640:
        assert tab.evaluate("document.documentElement.scrollHeight <= innerHeight")
    assert tab.evaluate(CUT_OFF) == []
