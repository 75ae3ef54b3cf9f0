"""Our frames in others' formats: karabo-bridge by its own client, array-1.0 by a plain one."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import shlex
import threading
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from emstream.endpoint import reachable
from emstream.errors import OutputError
from emstream.frame import FrameHeader
from emstream.intake import Overrun
from emstream.outputs import Order, Output, array1, orders
from emstream.outputs.sockets import Push, Queue, Replies
from emstream.serve import Settings
from emstream.wire import DEFAULT_MAX_HEADER_BYTES, header_of, map_of, unpack
from tests.conftest import Rig, exact, message

SHAPE = (17, 23)
needs_karabo_bridge = pytest.mark.skipif(
    find_spec("karabo_bridge") is None, reason="karabo-bridge is missing: pip install 'emstream[test]'"
)
TAKEN_NS = 1_795_452_000_250_000_001


def until(condition: Callable[[], Any]) -> None:
    patience, end_s = threading.Event(), time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end_s
        patience.wait(0.002)


def picture(number: int) -> np.ndarray:
    return np.random.default_rng(number).poisson(3.0, SHAPE).astype(np.uint16)


@pytest.fixture
def service(rig: Any, tmp_path: Path) -> Callable[..., tuple[Rig, str]]:
    """Start a service with another output; `ready` is called with its endpoint before the first frame."""

    def make(query: str, ready: Callable[[str], None] = lambda endpoint: None, **settings: Any) -> Any:
        urls = [f"ipc://{tmp_path}/out", f"ipc://{tmp_path}/other?{query}"]
        run = rig({"output": urls, "overrun": Overrun.block, **settings})
        (output,) = run.service.publisher._outputs
        ready(output.endpoint)
        until(output._socket.sender.wants)
        run.start()
        return run, output.endpoint

    return make


def send(run: Rig, frames: range) -> None:
    for n in frames:
        run.camera.send_multipart(
            message(n, picture(n), timestamp_ns=TAKEN_NS, extra={"stage": {"tilt_deg": 1.5}})
        )
    run.wait(lambda ledger: ledger["published"] == frames.stop)
    sender = run.service.publisher._outputs[0]._socket.sender
    if isinstance(sender, Replies):  # the frame is counted before it is there for others
        until(lambda: sender._last == frames.stop)
    elif isinstance(sender, Push):
        until(lambda: sender.sent + sender.skipped >= frames.stop)


def counted(run: Rig) -> tuple[int, int]:
    (report,) = run.service.publisher.outputs
    return report["sent"], report["skipped"]


class Karabo:
    """karabo-bridge's own client, in a thread: what it got."""

    def __init__(self, endpoint: str, frames: int, sock: str = "REQ") -> None:
        import karabo_bridge

        self.got: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._client = karabo_bridge.Client(endpoint, sock=sock, timeout=20)
        self._thread = threading.Thread(target=self._run, args=(frames,))
        self._thread.start()

    def _run(self, frames: int) -> None:
        with self._client as client:
            self.got += [client.next() for _ in range(frames)]

    def wait(self) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        self._thread.join(timeout=30)
        assert not self._thread.is_alive()
        return self.got


@needs_karabo_bridge
def test_karabo_bridges_own_client_reads_every_frame_and_its_header(service: Any) -> None:
    clients: list[Karabo] = []
    run, _ = service("format=karabo-bridge&queue=100", lambda url: clients.append(Karabo(url, 30)))
    send(run, range(30))
    for n, (data, meta) in enumerate(clients[0].wait()):
        values, about = data["emstream/denoised"], meta["emstream/denoised"]
        np.testing.assert_array_equal(values["image.data"], picture(n))
        assert values["image.data"].dtype == np.float32
        assert values["image.dimensions"] == list(SHAPE)
        assert (values["header.frame"], values["header.source"]) == (n, "test")
        assert values["header.engine.name"] == "identity"
        assert values["header.stage.tilt_deg"] == 1.5
        assert values["header.ledger.published"] == n + 1
        assert about["timestamp.tid"] == n
        assert about["source"] == "emstream/denoised"
        seconds = int(about["timestamp.sec"]) * 10**18 + int(about["timestamp.frac"])
        assert seconds == TAKEN_NS * 10**9
        assert len(about["timestamp.frac"]) == 18
    until(lambda: counted(run) == (30, 0))


@needs_karabo_bridge
@pytest.mark.parametrize("sock", ["SUB", "PULL"])
def test_karabo_bridges_client_takes_other_sockets_too(service: Any, sock: str) -> None:
    clients: list[Karabo] = []
    query = f"format=karabo-bridge&stream=both&socket={ {'SUB': 'pub', 'PULL': 'push'}[sock] }"
    run, _ = service(query, lambda url: clients.append(Karabo(url, 10, sock)))
    send(run, range(10))
    for n, (data, meta) in enumerate(clients[0].wait()):
        assert list(data) == list(meta) == ["emstream/raw", "emstream/denoised"]
        raw, denoised = data["emstream/raw"]["image.data"], data["emstream/denoised"]["image.data"]
        np.testing.assert_array_equal(raw, picture(n))
        np.testing.assert_array_equal(denoised, picture(n))
        assert (raw.dtype, denoised.dtype) == (np.uint16, np.float32)
        assert "header.engine.name" not in data["emstream/raw"]


def ask(context: zmq.Context[Any], endpoint: str) -> zmq.Socket[bytes]:
    socket = context.socket(zmq.REQ)
    socket.linger = 0
    socket.rcvtimeo = 20_000
    socket.connect(endpoint)
    socket.send(b"next")
    return socket


def number_of(parts: list[bytes]) -> int:
    return int(unpack(parts[1])["header.frame"])


def test_slow_client_gets_the_newest_frame_and_holds_nobody_up(service: Any, context: Any) -> None:
    asked: list[Any] = []
    run, _ = service("format=karabo-bridge", lambda url: asked.append(ask(context, url)))
    send(run, range(1))
    assert number_of(asked[0].recv_multipart()) == 0
    send(run, range(1, 200))
    asked[0].send(b"next")
    assert number_of(asked[0].recv_multipart()) == 199
    until(lambda: counted(run) == (2, 198))
    assert exact(run.ledger)
    assert run.ledger["dropped"] == 0
    asked[0].close()


def test_client_that_lags_gets_what_its_queue_holds_in_order(service: Any, context: Any) -> None:
    asked: list[Any] = []
    run, _ = service("format=karabo-bridge&queue=5", lambda url: asked.append(ask(context, url)))
    send(run, range(20))
    numbers = [number_of(asked[0].recv_multipart())]
    for _ in range(5):
        asked[0].send(b"next")
        numbers.append(number_of(asked[0].recv_multipart()))
    assert numbers[1:] == [15, 16, 17, 18, 19]
    until(lambda: counted(run) == (len(numbers), 20 - len(numbers)))
    asked[0].close()


@needs_karabo_bridge
def test_client_that_dies_while_it_waits_costs_nothing(service: Any, context: Any) -> None:
    dead: list[Any] = []
    run, url = service("format=karabo-bridge&queue=50", lambda url: dead.append(ask(context, url)))
    dead[0].close()
    first, second = Karabo(url, 20), Karabo(url, 20)
    sender = run.service.publisher._outputs[0]._socket.sender
    until(lambda: len(sender._clients) == 3)
    send(run, range(20))
    for client in (first, second):  # what one takes the other gets, too
        assert [meta["emstream/denoised"]["timestamp.tid"] for _, meta in client.wait()] == list(range(20))
    assert exact(run.ledger)


def test_request_that_makes_no_sense_is_answered(service: Any, context: Any) -> None:
    asked: list[Any] = []
    _, url = service("format=karabo-bridge", lambda url: asked.append(ask(context, url)))
    socket = context.socket(zmq.REQ)
    socket.rcvtimeo = 20_000
    socket.connect(url)
    socket.send(b"previous")
    assert socket.recv() == b"error: the request must be next"
    socket.close(linger=0)
    asked[0].close()


def test_flood_of_requests_keeps_nobody_waiting(service: Any, context: Any) -> None:
    asked: list[Any] = []
    run, url = service("format=karabo-bridge&queue=50", lambda url: asked.append(ask(context, url)))
    stop = threading.Event()

    def flood() -> None:
        with context.socket(zmq.DEALER) as socket:
            socket.linger = 0
            socket.connect(url)
            while not stop.is_set():
                for _ in range(100):
                    with contextlib.suppress(zmq.Again):
                        socket.send_multipart([b"", b"next"], zmq.DONTWAIT)
                while socket.poll(0):
                    socket.recv_multipart()

    thread = threading.Thread(target=flood)
    thread.start()
    send(run, range(20))
    assert number_of(asked[0].recv_multipart()) == 0
    stop.set()
    thread.join(timeout=20)
    run.stop()
    assert exact(run.ledger)
    asked[0].close()


def test_frames_kept_for_clients_are_given_out_before_the_end(context: Any, tmp_path: Path) -> None:
    replies = Replies(f"ipc://{tmp_path}/kept", Queue(10), 0, context)
    socket = ask(context, replies.endpoint)
    until(replies.wants)
    for n in range(10):
        replies.send([b"%d" % n])
    got: list[bytes] = []

    def take() -> None:
        got.append(socket.recv())
        while len(got) < 10:
            socket.send(b"next")
            got.append(socket.recv())

    thread = threading.Thread(target=take)
    thread.start()
    replies.close(linger_s=20)
    thread.join(timeout=20)
    assert got == [b"%d" % n for n in range(10)]
    socket.close()


def test_push_without_anybody_to_take_it_skips_and_counts(rig: Any, tmp_path: Path) -> None:
    urls = [f"ipc://{tmp_path}/out", f"ipc://{tmp_path}/other?format=array-1.0&socket=push&queue=3"]
    run = rig({"output": urls, "overrun": Overrun.block})
    run.start()
    send(run, range(30))
    assert counted(run) == (0, 30)
    assert run.service.pipeline.report()["outputs"] == run.service.publisher.outputs


@pytest.mark.parametrize(
    ("query", "kind"),
    [
        ("format=array-1.0", zmq.SUB),
        ("format=array-1.0&socket=push", zmq.PULL),
        ("format=karabo-bridge", zmq.REQ),
    ],
)
def test_client_that_never_reads_holds_nobody_up(context: Any, tmp_path: Path, query: str, kind: int) -> None:
    output = Output(Order.of(f"ipc://{tmp_path}/out?{query}&queue=2"), 64, context)
    lazy = context.socket(kind)
    lazy.linger, lazy.rcvhwm = 0, 1
    if kind == zmq.SUB:
        lazy.subscribe(b"")
    lazy.connect(output.endpoint)
    if kind == zmq.REQ:
        lazy.send(b"next")
    until(output._socket.sender.wants)
    pixels = np.zeros((512, 512), np.float32)
    header = map_of(FrameHeader(frame=0, shape=pixels.shape, type="float32"))
    start_s = time.monotonic()
    for _ in range(300):
        output.send({"denoised": (header, pixels)})
    assert time.monotonic() - start_s < 20
    output.close(linger_s=0)
    lazy.close()


def psi_client(context: zmq.Context[Any], endpoint: str, kind: int, frames: int) -> Iterator[tuple[Any, Any]]:
    """A reader of array-1.0, from the convention's description alone."""
    socket = context.socket(kind)
    socket.rcvtimeo = 20_000
    if kind == zmq.SUB:
        socket.subscribe(b"")
    socket.connect(endpoint)
    yield None, None  # connected
    for _ in range(frames):
        header = json.loads(socket.recv())
        assert header["htype"] == "array-1.0"
        order = {"little": "<", "big": ">"}[header.get("endianness", "little")]
        pixels = np.frombuffer(socket.recv(), np.dtype(header["type"]).newbyteorder(order))
        yield header, pixels.reshape(header["shape"])
    socket.close(linger=0)


@pytest.mark.parametrize("stream", ["raw", "denoised"])
@pytest.mark.parametrize(("socket", "kind"), [("pub", zmq.SUB), ("push", zmq.PULL)])
def test_plain_array_1_0_client_reads_our_frames(
    service: Any, context: Any, stream: str, socket: str, kind: int
) -> None:
    clients: list[Iterator[Any]] = []

    def ready(url: str) -> None:
        clients.append(psi_client(context, url, kind, 20))
        next(clients[0])

    run, _ = service(f"format=array-1.0&stream={stream}&socket={socket}", ready)
    send(run, range(20))
    got = list(clients[0])
    assert len(got) == 20
    for n, (header, pixels) in enumerate(got):
        np.testing.assert_array_equal(pixels, picture(n))
        assert header["type"] == {"raw": "uint16", "denoised": "float32"}[stream]
        assert (header["frame"], header["source"], header["encoding"]) == (n, "test", "")
        assert header["timeStamp"] == pytest.approx(TAKEN_NS / 1e9 - 631_152_000)
        assert ("engine_name" in header["ndattr"]) == (stream == "denoised")
        assert header["ndattr"]["series"] == 1
        assert all(isinstance(value, (int, float, str)) for value in header["ndattr"].values())


def test_what_leaves_as_array_1_0_comes_in_as_the_same_frame(service: Any, context: Any) -> None:
    clients: list[Any] = []

    def ready(url: str) -> None:
        clients.append(context.socket(zmq.SUB))
        clients[0].rcvtimeo = 20_000
        clients[0].subscribe(b"")
        clients[0].connect(url)

    run, _ = service("format=array-1.0&stream=raw", ready)
    send(run, range(1))
    header, pixels = clients[0].recv_multipart()
    clients[0].close(linger=0)
    frame = header_of(unpack(header))
    assert (frame.frame, frame.shape, frame.type, frame.timestamp_ns) == (0, SHAPE, "uint16", TAKEN_NS)
    assert pixels == picture(0).tobytes()


texts = st.text(max_size=400) | st.sampled_from('\0"é\U0001f52c').map(lambda letter: 500 * letter)


@given(
    source=texts,
    units=texts,
    series=texts | st.integers(0, 2**53),
    number=st.integers(0, 2**53),
    dose=st.floats(),
    engine=st.dictionaries(st.sampled_from(["name", "sha256", "device"]), texts),
)
def test_array_1_0_header_fits_adzmqs_buffer_whatever_it_says(
    source: str, units: str, series: int | str, number: int, dose: float, engine: dict[str, str]
) -> None:
    frame = FrameHeader(
        frame=number, shape=(9000, 9000), type="float32", source=source, series=series, units=units,
        timestamp_ns=2**62, exposure_s=1 / 3, pixel_size_m=1e-11 / 3,
    )  # fmt: skip
    text = array1.header({**map_of(frame), "engine": engine, "dose": dose, "in_domain": True, "ledger": {}})
    assert len(text) < 1024 < DEFAULT_MAX_HEADER_BYTES
    read = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert (read["frame"], read["shape"], read["type"]) == (number, [9000, 9000], "float32")


def test_service_without_a_native_output_still_has_one_for_itself(rig: Any, tmp_path: Path) -> None:
    run = rig({"output": f"ipc://{tmp_path}/psi?format=array-1.0"})
    run.start()
    assert run.service.publisher.endpoint.startswith("tcp://127.0.0.1:")
    assert [each["endpoint"] for each in run.service.publisher.outputs] == [f"ipc://{tmp_path}/psi"]


@pytest.mark.parametrize(
    ("urls", "text"),
    [
        ("tcp://*:1?format=hdf5", "format must be emstream or array-1.0 or karabo-bridge, got 'hdf5'"),
        ("tcp://*:1?format=array-1.0&stream=both", "stream must be denoised or raw, got 'both'"),
        ("tcp://*:1?format=array-1.0&socket=rep", "socket must be pub or push, got 'rep'"),
        ("tcp://*:1?format=karabo-bridge&queue=0", "queue must be 1-100000 frames, got '0'"),
        (
            "tcp://*:1?format=karabo-bridge&rate=4",
            "unknown option rate; known: format, stream, socket, queue",
        ),
        ("tcp://*:1?stream=raw", "the native format has every stream and takes no stream"),
        (["tcp://*:1", "tcp://*:2"], "may be native once, got tcp://.*:1 and tcp://.*:2"),
    ],
)
def test_senseless_output_is_explained(urls: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Settings(input="sim://", output=urls)


def test_order_is_what_the_url_says() -> None:
    native, (other,) = orders(["ipc:///tmp/a", "tcp://*:5600?format=karabo-bridge&stream=both&queue=7"])
    assert native == Order("ipc:///tmp/a", "ipc:///tmp/a")
    assert (other.endpoint, other.stream, other.socket, other.queue) == ("tcp://*:5600", "both", "rep", 7)


def test_other_output_whose_port_is_taken_is_explained(context: Any) -> None:
    taken = context.socket(zmq.PUB)
    port = taken.bind_to_random_port("tcp://127.0.0.1")
    for name in ("array-1.0", "karabo-bridge"):
        with pytest.raises(OutputError, match="the address is in use"):
            Output(Order.of(f"tcp://127.0.0.1:{port}?format={name}"), 64, context)
    taken.close()


def test_commands_of_the_readme_say_who_may_connect_to_what_they_bind() -> None:
    text = (Path(__file__).parents[1] / "README.md").read_text().replace("\\\n", " ")
    commands = [shlex.split(line, comments=True) for line in re.findall(r"^emstream serve .*", text, re.M)]
    outputs = [
        (Order.of(url).endpoint, command)
        for command in commands
        for name, url in itertools.pairwise(command)
        if name == "--output"
    ]
    assert any(reachable(endpoint) for endpoint, _ in outputs)
    for endpoint, command in outputs:
        assert not reachable(endpoint) or {"--insecure", "--key"} & set(command), command


# -- faults ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "query", ["format=array-1.0", "format=array-1.0&socket=push", "format=karabo-bridge&queue=1000"]
)
def test_output_that_breaks_is_opened_again_and_costs_the_service_nothing(
    service: Any, query: str, caplog: pytest.LogCaptureFixture
) -> None:
    context: zmq.Context[Any] = zmq.Context()
    kind = zmq.REQ if "karabo" in query else zmq.PULL if "push" in query else zmq.SUB
    client = context.socket(kind)
    client.linger = 0

    def ready(endpoint: str) -> None:
        client.connect(endpoint)
        if kind == zmq.SUB:
            client.subscribe(b"")
        if kind == zmq.REQ:
            client.send(b"next")

    run, endpoint = service(query, ready)
    send(run, range(3))
    (output,) = run.service.publisher._outputs
    if kind == zmq.REQ:
        client.recv_multipart()
        output._socket.sender.close(0.0)  # its thread is gone
        client.close()
        client = context.socket(kind)
        client.linger = 0
    else:
        output._socket.sender._socket.close(linger=0)
    sent = 3

    def one_more() -> None:
        nonlocal sent
        run.camera.send_multipart(message(sent, picture(sent)))
        sent += 1
        run.wait(lambda ledger: ledger["published"] == sent)

    until(lambda: one_more() or (output._socket._open_again_s is None and output._socket.failed > 0))
    if kind == zmq.REQ:
        client.connect(endpoint)
        client.send(b"next")
    else:
        while client.poll(0):
            client.recv_multipart()
    until(lambda: one_more() or client.poll(0))
    report = run.service.publisher.outputs[0]
    assert report["failed"] > 0
    assert report["sent"] >= 1
    assert report["endpoint"] == endpoint
    assert run.ledger["failed"] == 0
    assert exact(run.ledger)
    assert f"{endpoint} is open again" in caplog.text
    assert 1 <= caplog.text.count("a frame could not be sent") <= 3
    context.destroy(linger=0)


def test_frames_kept_for_a_client_that_lags_are_bounded_in_bytes(context: Any, tmp_path: Path) -> None:
    output = Output(
        Order.of(f"ipc://{tmp_path}/out?format=karabo-bridge&queue=50"), 64, context, queue_bytes=40_000
    )
    sender = output._socket.sender
    assert isinstance(sender, Replies)
    for _ in range(20):
        sender.send([bytes(10_000)])
    assert len(sender._frames) == 4
    sender.send([bytes(100_000)])
    assert len(sender._frames) == 1  # the newest one is kept, whatever its size
    output.close(0.0)


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:*", "ipc://{}/out"])
@pytest.mark.parametrize(("socket", "kind"), [("pub", zmq.SUB), ("push", zmq.PULL)])
def test_frames_that_grow_open_the_output_again_and_none_fails(
    context: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, address: str, socket: str, kind: int
) -> None:
    url = f"{address.format(tmp_path)}?format=array-1.0&socket={socket}"
    output = Output(Order.of(url), 64, context, queue_bytes=40 * 64 * 64 * 4, largest=1000)
    client = context.socket(kind)
    client.linger = 0
    if address.startswith("tcp"):  # over ipc libzmq reads no further once the other side has closed
        client.rcvhwm = 1  # what it has not read waits in the queue of a socket that is given up
    if kind == zmq.SUB:
        client.subscribe(b"")
    client.connect(output.endpoint)
    got: list[int] = []

    def read() -> None:
        while client.poll(0):
            header, data = client.recv_multipart()
            got.append(json.loads(header)["frame"])
            assert (np.frombuffer(data, np.float32) == got[-1]).all()

    lengths = []
    for n, side in enumerate([16, 16, 64, 64, 128, 2000, 16]):
        if n not in (1, 2):
            until(lambda: read() or output._socket.sender.wants())
        pixels = np.full((side, side), n, np.float32)
        output.send({"denoised": (map_of(FrameHeader(frame=n, shape=pixels.shape, type="float32")), pixels)})
        lengths.append(output._socket.sender._socket.get(zmq.SNDHWM))
    assert lengths == [64, 64, 39, 39, 9, 1, 1]
    assert caplog.text.count("is open again") == 3
    until(lambda: read() or len(got) == 7)
    assert got == list(range(7))
    assert output.report()["failed"] == 0
    output.close(0.0)
    client.close()


def test_many_frames_kept_for_clients_cost_no_more_than_few(context: Any, tmp_path: Path) -> None:
    replies = Replies(f"ipc://{tmp_path}/kept", Queue(6000), 0, context)
    start_s = time.monotonic()
    for n in range(8000):
        replies.send([b"x" * (n % 7), b"pixels"])
    assert time.monotonic() - start_s < 3  # a tenth of a second
    assert len(replies._frames) == 6000
    assert replies._nbytes == sum(len(part) for _, message in replies._frames for part in message)
    replies.close(0.0)


@pytest.mark.parametrize(
    ("endpoint", "from_elsewhere"),
    [
        ("ipc:///run/x", False),
        ("inproc://x", False),
        ("nonsense", False),  # nobody can, and binding it says why
        ("tcp://localhost:5", False),
        ("tcp://127.0.0.2:5", False),
        ("tcp://[::1]:5", False),
        ("tcp://*:5", True),
        ("tcp://0.0.0.0:5", True),
        ("tcp://[::]:5", True),
        ("tcp://eth0:5", True),
        ("tipc://{5560,0,0}", True),
        ("ws://*:80", True),
    ],
)
def test_what_other_machines_can_reach_is_known(endpoint: str, from_elsewhere: bool) -> None:
    assert reachable(endpoint) == from_elsewhere
