"""Whatever comes over the socket: counted, never fatal."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from zmq.utils.monitor import recv_monitor_message

from emstream import wire
from emstream.endpoint import bind
from emstream.errors import SourceError
from emstream.intake import Intake, Overrun
from emstream.ledger import Ledger
from emstream.ring import Ring
from emstream.sources import connection, open_source
from emstream.sources.connection import Connection
from emstream.sources.zmq import ZmqSource
from tests.conftest import exact, message
from tests.contract.test_sources import Receiver

GOOD = np.arange(6, dtype=np.uint8).reshape(2, 3)


def head(**change: Any) -> bytes:
    fields = {
        "htype": wire.FRAME,
        "frame": 0,
        "shape": [2, 3],
        "type": "uint8",
        "series": 1,
        "source": "test",
    }
    return wire.pack(fields | change)


BAD = {
    "one part of garbage": [b"\x00\xff garbage"],
    "an empty message": [b""],
    "garbage where the header should be": [b"raw", b"\xc1\xc1", b"123456"],
    "a header that is a list": [b"raw", wire.pack([1, 2]), b"123456"],  # type: ignore[arg-type]
    "a header that lies about its shape": [b"raw", head(shape=[200, 300]), b"123456"],
    "a claim of ten gigabytes": [b"raw", head(shape=[100_000, 100_000]), b"123456"],
    "a payload one byte short": [b"raw", head(), b"12345"],
    "a payload one byte long": [b"raw", head(), b"1234567"],
    "an empty payload": [b"raw", head(), b""],
    "no payload": [b"raw", head()],
    "a part too many": [b"raw", head(), b"123456", b"more"],
    "an unknown type": [b"raw", head(type="float128"), b"123456"],
    "a compressed payload": [b"raw", head(encoding="bslz4"), b"123456"],
    "a huge header": [b"raw", head(note="x" * 100_000), b"123456"],
    "pickle": [b"\x80\x04K\x01."],
    "JSON that is not array-1.0": [b'{"htype": "other"}', b"123456"],
    "broken JSON": [b'{"htype": ', b"123456"],
    "a denoised frame": [b"denoised", head(engine={"name": "x"}), b"123456"],
    "NaN pixels": [b"raw", head(type="float32"), np.full((2, 3), np.nan, np.float32).tobytes()],
}


def test_every_kind_of_bad_message_is_rejected_and_the_service_lives_on(rig: Any) -> None:
    run = rig({"overrun": Overrun.block})
    run.start()
    for n, parts in enumerate(BAD.values()):
        run.camera.send_multipart(parts)
        run.camera.send_multipart(message(n, GOOD))
    ledger = run.wait(lambda ledger: ledger["published"] == len(BAD))
    assert ledger["rejected"] == len(BAD)
    assert exact(ledger)
    run.stop()
    assert all((data == GOOD).all() for _, data in run.published())
    assert sum(run.service.ledger.reasons().values()) == len(BAD)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=st.lists(st.binary(max_size=80) | st.just(head()) | st.just(b"123456"), min_size=1, max_size=5))
def test_random_messages_never_upset_the_count(rig: Any, parts: list[bytes]) -> None:
    if not hasattr(rig, "shared"):
        rig.shared = rig({"overrun": Overrun.block})
        rig.shared.start()
        rig.sent = 0
    rig.shared.camera.send_multipart(parts)
    rig.sent += 1
    ledger = rig.shared.wait(lambda ledger: ledger["received"] == rig.sent and ledger["in_flight"] == 0)
    assert ledger["published"] + ledger["rejected"] == rig.sent


def test_frame_of_a_new_size_without_all_its_pixels_is_rejected_and_not_missing_too(rig: Any) -> None:
    run = rig({"overrun": Overrun.block})
    run.start()
    for parts in (message(0, GOOD), [b"raw", head(frame=1, shape=[9, 9]), b"short"], message(2, GOOD)):
        run.camera.send_multipart(parts)
    ledger = run.wait(lambda ledger: ledger["received"] == 3)
    assert (ledger["rejected"], ledger["missing"]) == (1, 0)


@pytest.mark.parametrize("scheme", ["pull+tcp", "tcp"])
def test_cameras_and_displays_may_have_an_address_of_ipv6(context: Any, scheme: str) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    camera = context.socket(zmq.PUSH if scheme == "pull+tcp" else zmq.XPUB)
    camera.linger = 0
    address = bind(camera, "tcp://[::1]:*")
    receiver = Receiver(f"{scheme}://{address.partition('//')[2]}")
    try:
        if scheme == "tcp":
            assert camera.poll(10_000)
        camera.send_multipart(message(0, GOOD))
        assert receiver.wait(1)["rejected"] == 0
    finally:
        receiver.end()
        camera.close()


@pytest.mark.parametrize("url", ["dectris://camera.invalid", "tcp://127.0.0.1:{port}"])
def test_camera_that_nobody_finds_is_said_once(
    url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(connection, "_PATIENCE_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    receiver = Receiver(url.format(port=port))
    while "nobody answers at tcp://" not in caplog.text:
        receiver.stop.wait(0.01)
    receiver.stop.wait(0.5)
    receiver.end()
    assert caplog.text.count("nobody answers") == 1


def test_camera_that_came_back_before_anybody_looked_is_not_left_again(context: Any, tmp_path: Any) -> None:
    """It might be in the middle of a message."""
    address = f"ipc://{tmp_path}/camera"
    cameras = [context.socket(zmq.PUSH) for _ in range(2)]
    cameras[0].bind(address)
    made, stop = (
        Connection(address, kind=zmq.PULL, max_message_bytes=1000, context=context),
        threading.Event(),
    )
    looks, came = threading.Event(), []

    def receive(intake: Any) -> None:
        came.append(made.socket.recv())
        looks.wait(20)  # as for a free slot

    def wait_for(condition: Callable[[], Any]) -> None:
        while not condition():
            stop.wait(0.005)

    intake = Intake(Ring(2, 1), Ledger())
    thread = threading.Thread(target=made.run, args=(receive, intake, stop))
    thread.start()
    try:
        cameras[0].send(b"before")
        wait_for(lambda: came)
        cameras[0].close(linger=0)
        news = cameras[1].get_monitor_socket(zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED)
        cameras[1].bind(address)
        cameras[1].send(b"after")
        assert recv_monitor_message(news)["event"] == zmq.EVENT_ACCEPTED
        looks.set()
        wait_for(lambda: len(came) == 2)
        stop.wait(0.5)  # longer than a source waits before it looks around
        assert not news.poll(0)
    finally:
        stop.set()
        thread.join(timeout=5)
        cameras[1].disable_monitor()
        news.close(linger=0)
        cameras[1].close(linger=0)


def test_array_1_0_frames_are_understood(rig: Any) -> None:
    run = rig({"frames": 2, "overrun": Overrun.block})
    run.start()
    for n, spelling in enumerate(("endianness", "endianess")):
        text = {"htype": "array-1.0", "shape": [2, 3], "type": "uint16", spelling: "big", "frame": n,
                "source": "areaDetector", "encoding": "", "timeStamp": 1.5, "ndattr": {"gain": 2}}  # fmt: skip
        run.camera.send_multipart([json.dumps(text).encode(), GOOD.astype(">u2").tobytes()])
    run.join()
    published = run.published()
    assert [pixels.tolist() for _, pixels in published] == [GOOD.tolist()] * 2
    assert published[0][0]["ndattr"] == {"gain": 2}


def array_1_0(frame: int, pixels: bytes = GOOD.tobytes(), **change: Any) -> list[bytes]:
    text = {"htype": "array-1.0", "shape": [2, 3], "type": "uint8", "frame": frame, "source": "x"} | change
    return [json.dumps(text).encode(), pixels]


def test_empty_array_1_0_part_says_that_the_frame_is_missing(rig: Any) -> None:
    run = rig({"overrun": Overrun.block})
    run.start()
    for frame, is_sent in enumerate((True, False, False, True, False, True)):
        run.camera.send_multipart(array_1_0(frame) if is_sent else array_1_0(frame, b""))
    run.camera.send_multipart(array_1_0(4))  # it comes after all
    run.camera.send_multipart(array_1_0(6, b""))
    run.camera.send_multipart(array_1_0(6, b""))
    run.camera.send_multipart(array_1_0(7))
    ledger = run.wait(lambda ledger: ledger["published"] == 5)
    assert (ledger["received"], ledger["rejected"], ledger["missing"]) == (5, 0, 3)
    assert [head["frame"] for head, _ in run.published()] == [0, 3, 5, 4, 7]


def test_array_1_0_of_the_wrong_size_is_rejected(rig: Any) -> None:
    run = rig({"overrun": Overrun.block})
    run.start()
    for frame, parts in enumerate(([b"12345"], [b"", b"more"], [b"1234567"], [])):
        run.camera.send_multipart([array_1_0(frame)[0], *parts])
    run.camera.send_multipart(array_1_0(4))
    assert run.wait(lambda ledger: ledger["published"] == 1)["rejected"] == 4


def test_what_adzmq_adds_is_understood(rig: Any) -> None:
    run = rig({"overrun": Overrun.block})
    run.start()
    adzmq = {"timeStamp": 1_164_300_000.25, "encoding": "", "ndattr": {"ColorMode": 0, "Gain": "high"}}
    run.camera.send_multipart(array_1_0(0, **adzmq))
    run.camera.send_multipart(array_1_0(1, htype=["array-1.0"], shape=[3, 2], **adzmq))
    run.camera.send_multipart(array_1_0(2, **adzmq | {"timeStamp": "soon"}))
    run.wait(lambda ledger: ledger["published"] == 3)
    (new, pixels), (old, same), (odd, _) = run.published()
    assert new["timestamp_ns"] == pytest.approx(
        1_795_452_000_250_000_000, abs=1000, rel=0
    )  # 2026-11-23 16:40:00.25
    assert old["timestamp_ns"] == new["timestamp_ns"]
    assert "timestamp_ns" not in odd
    assert new["ndattr"] == old["ndattr"] == adzmq["ndattr"]
    np.testing.assert_array_equal(pixels, GOOD)
    np.testing.assert_array_equal(same, GOOD)


def test_gaps_in_the_cameras_numbers_are_missing(rig: Any) -> None:
    run = rig()
    run.start()
    for n in (0, 1, 5, 6):
        run.camera.send_multipart(message(n, GOOD))
    assert run.wait(lambda ledger: ledger["published"] == 4)["missing"] == 3


def test_camera_that_dies_and_comes_back_is_received_again(rig: Any, context: Any, tmp_path: Any) -> None:
    run = rig({"overrun": Overrun.block})
    run.start()
    address = run.camera.last_endpoint.decode().rstrip("\0")
    for n in range(5):
        run.camera.send_multipart(message(n, GOOD, series="before"))
    run.wait(lambda ledger: ledger["published"] == 5)
    run.camera.close()
    run.camera = context.socket(zmq.PUSH)
    run.camera.linger = 0
    run.camera.bind(address)
    for n in range(5):
        run.camera.send_multipart(message(n, GOOD, series="after"))
    ledger = run.wait(lambda ledger: ledger["published"] == 10)
    assert ledger["missing"] == 0
    assert exact(ledger)


def test_live_source_subscribes(context: Any, tmp_path: Any, rig: Any) -> None:
    camera = context.socket(zmq.XPUB)
    camera.linger = 0
    camera.bind(f"ipc://{tmp_path}/live")
    run = rig({"input": f"ipc://{tmp_path}/live?topic=raw", "frames": 3})
    run.start()
    assert camera.recv() == b"\1raw"
    camera.send_multipart([b"stats", wire.pack({"htype": wire.STATS})])
    for n in range(3):
        camera.send_multipart(message(n, GOOD))
    run.join()
    camera.close()
    assert run.ledger["rejected"] == 0


def test_binding_source_takes_a_camera_that_connects(context: Any, tmp_path: Any, rig: Any) -> None:
    run = rig({"input": f"pull+ipc://{tmp_path}/bound?bind=true", "frames": 1})
    run.start()
    camera = context.socket(zmq.PUSH)
    camera.linger = 0
    camera.connect(f"ipc://{tmp_path}/bound")
    camera.send_multipart(message(0, GOOD))
    run.join()
    camera.close()
    assert run.ledger["published"] == 1


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("camera:5555", "scheme must be one of tcp"),
        ("http://localhost:80", "scheme must be one of tcp"),
        ("tcp://localhost", "expected tcp://HOST:PORT"),
        ("tcp://[::1:5555", r"--input 'tcp://\[::1:5555': Invalid IPv6"),
        ("tcp://localhost:99999", "expected tcp://HOST:PORT"),
        ("tcp://localhost:5555?rate=4", "unknown option rate; known: topic, bind"),
        ("tcp://localhost:5555?bind=maybe", "bind must be true or false"),
        ("sim://?rate=-1", "rate must be a positive number \\[frames/s\\], got -1"),
        ("sim://?dose=lots", "dose must be a number, got 'lots'"),
        ("sim://?height=-3", "height must not be negative"),
    ],
)
def test_senseless_input_is_explained(url: str, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        open_source(url)


def test_input_address_in_use_is_explained(context: Any, tmp_path: Any) -> None:
    taken = context.socket(zmq.PULL)
    port = taken.bind_to_random_port("tcp://127.0.0.1")
    with pytest.raises(SourceError, match="address is in use"):
        ZmqSource(f"tcp://127.0.0.1:{port}", lossless=True, bind=True, context=context)
    taken.close()


ARRAY = b'{"htype": "array-1.0", "shape": [2, 3], "type": "uint8", "frame": 0, '
POISON = {
    "a number that msgpack cannot hold": ARRAY + b'"x": ' + b"9" * 30 + b"}",
    "half a character": ARRAY + b'"x": "\\ud800"}',
    "half a character for a name": ARRAY + b'"source": "\\ud800"}',
    "a start with a number too large": b'{"htype": "emstream-start-1.0", "x": ' + b"9" * 30 + b"}",
    "a pixel size of 400 digits": ARRAY + b'"pixel_size_m": 1' + b"0" * 400 + b"}",
    "JSON nested without end": b'{"htype": ' + b"[" * 20_000 + b"]" * 20_000 + b"}",
}


@pytest.mark.parametrize("name", list(POISON))
def test_header_that_cannot_travel_on_is_rejected(rig: Any, name: str) -> None:
    run = rig({"overrun": Overrun.block})
    run.start()
    run.camera.send_multipart([POISON[name], b"123456"])
    run.camera.send_multipart(message(0, GOOD))
    ledger = run.wait(lambda ledger: ledger["published"] == 1)
    assert ledger["rejected"] == 1


def test_nested_msgpack_is_rejected(rig: Any) -> None:
    run = rig({"overrun": Overrun.block})
    run.start()
    run.camera.send_multipart([b"raw", b"\x81\xa5htype" + b"\x91" * 500 + b"\x00", b"123456"])
    run.camera.send_multipart(message(0, GOOD))
    assert run.wait(lambda ledger: ledger["published"] == 1)["rejected"] == 1


def test_header_that_lies_takes_no_memory_before_its_payload_is_seen(rig: Any) -> None:
    run = rig({"overrun": Overrun.block})

    def memory() -> int:
        return sum(slot._input.nbytes for slot in run.service.pipeline._ring._free)

    before = memory()
    run.start()
    for n in range(3):
        run.camera.send_multipart([b"raw", head(frame=n, shape=[16_000, 16_000]), b"123456"])
    run.camera.send_multipart(message(3, GOOD))
    assert run.wait(lambda ledger: ledger["published"] == 1)["rejected"] == 3
    run.stop()
    assert memory() == before


def test_message_far_above_the_limit_is_not_even_read(rig: Any) -> None:
    run = rig({"overrun": Overrun.block, "max_frame_bytes": 100_000, "expect": "16x16:uint8"})
    run.start()
    run.camera.send_multipart([b"raw", head(), bytes(150_000)])
    run.wait(lambda ledger: ledger["rejected"] == 1)
    run.camera.send_multipart([b"raw", head(), bytes(1_000_000)])
    for n in range(200):  # the connection is dropped and made again
        run.camera.send_multipart(message(n, GOOD))
        if run.out.poll(50):
            break
    ledger = run.wait(lambda ledger: ledger["published"] >= 1)
    assert ledger["rejected"] == 1


def test_header_above_the_limit_is_rejected_and_one_below_a_larger_limit_travels_on(rig: Any) -> None:
    notes = {"note": "x" * 70_000}
    run = rig({"overrun": Overrun.block, "max_header_bytes": 100_000})
    run.start()
    run.camera.send_multipart(message(0, GOOD, extra=notes))
    run.camera.send_multipart(message(1, GOOD, extra={"note": "x" * 100_000}))
    run.camera.send_multipart(message(2, GOOD))
    run.wait(lambda ledger: ledger["published"] == 2 and ledger["rejected"] == 1)
    (reason,) = run.service.ledger.reasons()
    assert reason.endswith("exceeds the limit of 100000")
    assert [head.get("note") for head, _ in run.published()] == [notes["note"], None]
