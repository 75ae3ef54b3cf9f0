from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq

import emstream
from emstream import wire
from emstream.errors import OutputError, SourceError
from emstream.frame import now_ns
from emstream.intake import Overrun
from emstream.ledger import Ledger
from emstream.observe import Observer
from emstream.publish import Publisher
from emstream.ring import Maker, Ring, Slot
from tests.conftest import exact, header, message

MAKER = Maker({"name": "test", "sha256": "0" * 64, "device": "none"}, None)


def batch(count: int, shape: tuple[int, int] = (64, 64)) -> Slot:
    ring = Ring(2, count)
    for n in range(count):
        row = ring.reserve(shape, np.dtype(np.uint8))
        assert row is not None
        row.fill(n)
        ring.commit(header(n, shape), now_ns())
    slot = ring.claim()
    assert isinstance(slot, Slot)
    slot.result, slot.maker = slot.expected, MAKER
    slot.result[:] = slot.counts
    return slot


def test_port_in_use_is_explained(context: Any) -> None:
    first = Publisher("tcp://127.0.0.1:*", Ledger(), context=context)
    with pytest.raises(OutputError, match=r"the address is in use.*--output takes"):
        Publisher(first.endpoint, Ledger(), context=context)
    first.close(linger_s=0)


@pytest.mark.parametrize(
    "endpoint", ["nonsense", "tcp://nowhere.invalid:1", "tcp://127.0.0.1:99999", "tcp://127.0.0.1:22x"]
)
def test_endpoint_that_makes_no_sense_is_explained(context: Any, endpoint: str) -> None:
    with pytest.raises(OutputError, match="--output takes"):
        Publisher(endpoint, Ledger(), context=context)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_picture_that_is_no_number_has_failed_and_is_not_sent(
    context: Any, caplog: pytest.LogCaptureFixture, value: float
) -> None:
    ledger = Ledger()
    publisher = Publisher("tcp://127.0.0.1:*", ledger, context=context)
    slot = batch(3)
    for _ in range(3):
        ledger.receive()
    slot.result[1, 20:40, 20:40] = value
    publisher.publish(slot)
    publisher.close(linger_s=0)
    assert (ledger.snapshot()["published"], ledger.snapshot()["failed"]) == (2, 1)
    assert "a frame could not be sent" in caplog.text
    assert "the engine made values of it that are no numbers" in caplog.text


def test_subscriber_that_never_reads_holds_nobody_up(context: Any, tmp_path: Any) -> None:
    ledger = Ledger()
    publisher = Publisher(f"ipc://{tmp_path}/out", ledger, queue=4, context=context)
    lazy = context.socket(zmq.SUB)
    lazy.linger = 0
    lazy.rcvhwm = 1
    lazy.connect(publisher.endpoint)
    lazy.subscribe(b"")
    assert publisher.wait_for(b"", 20)
    slot = batch(4, (512, 512))
    for _ in range(100):
        publisher.publish(slot)
    assert ledger.published == 400
    publisher.close(linger_s=0)
    lazy.close()


def test_one_subscriber_can_be_waited_for_among_others_who_want_everything(
    context: Any, tmp_path: Any
) -> None:
    publisher = Publisher(f"ipc://{tmp_path}/out", Ledger(), context=context)
    other, awaited = context.socket(zmq.SUB), context.socket(zmq.SUB)
    other.connect(publisher.endpoint)
    other.subscribe(b"")
    assert publisher.wait_for(b"", timeout_s=20)
    assert not publisher.wait_for(b"hello", timeout_s=0.05)
    awaited.connect(publisher.endpoint)
    awaited.subscribe(b"hello")
    assert publisher.wait_for(b"hello", timeout_s=20)
    publisher.close(linger_s=0)
    other.close(linger=0)
    awaited.close(linger=0)


def test_published_frame_does_not_change_when_its_slot_is_filled_again(context: Any, tmp_path: Any) -> None:
    publisher = Publisher(f"ipc://{tmp_path}/out", Ledger(), context=context)
    frames = emstream.subscribe(publisher.endpoint, timeout_s=20)
    received: list[Any] = []
    thread = threading.Thread(target=lambda: received.append(next(frames)))
    thread.start()
    assert publisher.wait_for(b"denoised", 20)
    slot = batch(1)
    slot.expected[:] = 5
    publisher.publish(slot)
    slot.expected[:] = 9
    thread.join(timeout=20)
    frames.close()
    publisher.close(linger_s=0)
    assert (received[0].data == 5).all()


@pytest.mark.parametrize("port", ["22x", "70000", "0"])
def test_port_that_is_none_is_refused_by_a_subscriber(port: str) -> None:
    with pytest.raises(SourceError, match=f"the port must be a number from 1 to 65535, got '?{port}"):
        next(iter(emstream.subscribe(f"tcp://127.0.0.1:{port}")))


def test_port_that_is_missing_is_named(context: Any) -> None:
    with pytest.raises(
        SourceError, match="tcp://camera: the port is missing; a service is at tcp://HOST:PORT"
    ):
        next(iter(emstream.subscribe("tcp://camera")))
    with pytest.raises(OutputError, match="tcp://localhost: the port is missing; --output takes"):
        Publisher("tcp://localhost", Ledger(), context=context)


def test_silence_is_explained_to_a_subscriber(tmp_path: Any) -> None:
    with pytest.raises(
        SourceError, match=r"no frame from ipc://.* within 0\.05 s; is emstream serve running"
    ):
        next(emstream.subscribe(f"ipc://{tmp_path}/nobody", timeout_s=0.05))


def test_subscriber_stops_at_the_end_of_the_series(rig: Any) -> None:
    run = rig({"input": "sim://?rate=200&height=16&width=16&frames=5"})
    numbers: list[int] = []

    def listen() -> None:
        for frame in emstream.subscribe(run.service.publisher.endpoint, until_end=True, timeout_s=20):
            numbers.append(frame.number)

    thread = threading.Thread(target=listen)
    thread.start()
    assert run.service.publisher.wait_for(b"denoised", 20)
    run.start()
    run.join()
    run.service.close()
    thread.join(timeout=20)
    assert not thread.is_alive()
    assert numbers == sorted(numbers)
    assert numbers[-1] == 4


# -- faults ------------------------------------------------------------------------


def published_numbers(listener: Any, until: int) -> list[int]:
    """Of denoised frames, up to number `until`."""
    numbers: list[int] = []
    while until not in numbers:
        assert listener.poll(20_000), f"{numbers} came, and no {until}"
        parts = listener.recv_multipart()
        head = wire.unpack(parts[1])
        if parts[0] == b"denoised" and head["htype"] == wire.FRAME:
            assert exact(head["ledger"])
            assert (np.frombuffer(parts[2], np.float32) == head["frame"] % 256).all()
            numbers.append(head["frame"])
    return numbers


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:*", "ipc://{}/out"])
def test_socket_that_breaks_is_opened_again_where_it_was_and_the_ledger_stays_exact(
    rig: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, address: str
) -> None:
    urls = [address.format(tmp_path), f"ipc://{tmp_path}/other?format=array-1.0&socket=push"]
    run = rig({"output": urls, "overrun": Overrun.block})
    other = run.camera.context.socket(zmq.PULL)
    other.linger = 0
    other.connect(f"ipc://{tmp_path}/other")
    publisher = run.service.publisher
    run.start()
    endpoint = publisher.endpoint
    for n in range(5):
        run.camera.send_multipart(message(n, np.full((32, 48), n, np.uint8)))
    assert published_numbers(run.out, until=4) == list(range(5))
    run.wait(lambda ledger: ledger["published"] == 5)
    publisher._socket.sender._socket.close(linger=0)  # under the publisher's feet
    sent = 5

    def one_more() -> None:
        nonlocal sent
        run.camera.send_multipart(message(sent, np.full((32, 48), sent % 256, np.uint8)))
        sent += 1
        run.wait(lambda ledger: ledger["received"] == sent and not ledger["in_flight"])

    while run.ledger["published"] == 5:
        one_more()
    while not run.out.poll(0):  # the display comes back by itself
        one_more()
    for n in range(sent, sent + 5):
        run.camera.send_multipart(message(n, np.full((32, 48), n % 256, np.uint8)))
    ledger = run.wait(lambda ledger: ledger["received"] == sent + 5 and not ledger["in_flight"])
    assert exact(ledger)
    assert ledger["failed"] > 0
    numbers = published_numbers(run.out, until=sent + 4)
    assert numbers == list(range(numbers[0], sent + 5))
    assert ledger["published"] + ledger["failed"] == sent + 5
    assert publisher.endpoint == endpoint
    assert f"{endpoint} is open again" in caplog.text
    assert 1 <= caplog.text.count("a frame could not be sent") < 5
    got = []
    while other.poll(100):
        got.append(json.loads(other.recv_multipart()[0])["frame"])
    other.close()
    assert got == list(range(sent + 5))  # the other output went on all the while


def test_frame_that_cannot_be_sent_is_failed_and_leaves_no_half_message(
    rig: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = rig({"overrun": Overrun.block})
    trust: dict[str, object] | None = None
    monkeypatch.setattr(Observer, "report_on", lambda self, slot: trust)
    run.start()
    for n in range(3):
        run.camera.send_multipart(message(n, np.full((32, 48), n, np.uint8)))
    run.wait(lambda ledger: ledger["published"] == 3)
    trust = {"what": object()}  # which no header can carry
    run.camera.send_multipart(message(3, np.full((32, 48), 3, np.uint8)))
    run.wait(lambda ledger: ledger["failed"] == 1)
    trust = None
    for n in range(4, 6):
        run.camera.send_multipart(message(n, np.full((32, 48), n, np.uint8)))
    ledger = run.wait(lambda ledger: ledger["published"] == 5)
    assert exact(ledger)
    assert published_numbers(run.out, until=5) == [0, 1, 2, 4, 5]
    assert "a frame could not be sent, 1 times by now: TypeError" in caplog.text


# -- what a subscriber may pile up ---------------------------------------------------

LAZY = """
import sys, zmq
socket = zmq.Context().socket(zmq.SUB)
socket.rcvhwm = 1
socket.connect(sys.argv[1])
socket.subscribe(b"")
sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_subscriber_that_does_not_read_piles_up_no_more_bytes_than_allowed(
    context: Any, tmp_path: Path
) -> None:
    def resident_mib() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

    publisher = Publisher(
        f"ipc://{tmp_path}/out",
        Ledger(),
        queue=64,
        context=context,
        queue_bytes=20 * 1024**2,
        largest=4 * 1024**2,
    )
    slot = batch(2, (1024, 1024))  # 4 MiB each, denoised
    command = [sys.executable, "-c", LAZY, publisher.endpoint]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as lazy:
        assert publisher.wait_for(b"", 20)
        before = resident_mib()
        for _ in range(50):
            publisher.publish(slot)
        assert resident_mib() - before < 60  # 64 messages would be 160 MiB
        lazy.kill()
    publisher.close(linger_s=0)


def test_queue_is_made_shorter_when_frames_grow_and_subscribers_come_back(
    context: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ledger = Ledger()
    publisher = Publisher(
        f"ipc://{tmp_path}/out", ledger, queue=64, context=context, queue_bytes=32 * 64 * 64 * 4, largest=1000
    )
    display = context.socket(zmq.SUB)
    display.linger = 0
    display.connect(publisher.endpoint)
    display.subscribe(b"denoised")
    assert publisher.wait_for(b"denoised", 10)
    lengths = []
    for side in (16, 64, 128, 2000, 16):
        publisher.publish(batch(1, (side, side)))
        lengths.append(publisher._socket.sender._socket.get(zmq.SNDHWM))
    assert lengths == [64, 32, 8, 1, 1]
    assert caplog.text.count("is open again") == 3
    assert display.poll(10_000)  # what was sent before is not lost
    while display.poll(0):
        display.recv_multipart()
    while not display.poll(0):
        publisher.publish(batch(1))
    assert ledger.snapshot()["failed"] == 0
    publisher.close(linger_s=0)
    display.close()


@pytest.mark.parametrize(
    ("change", "text"), [({"queue": 0}, "at least 1 message"), ({"queue_bytes": 0}, "at least 1 byte")]
)
def test_queue_that_holds_nothing_is_refused(context: Any, change: dict[str, int], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Publisher("tcp://127.0.0.1:*", Ledger(), context=context, **change)
