"""The whole path in one process: a real socket in, the real publisher out."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
import time
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import zmq

from emstream import wire
from emstream.errors import BatchRefused, CudaError, EmstreamError, EngineError, EngineInvalid, Stalled
from emstream.inference import IdentityEngine, load_engine
from emstream.intake import Overrun
from emstream.serve import Settings, build
from tests.conftest import exact, message


def pixels(number: int, shape: tuple[int, int] = (32, 48), kind: str = "uint8") -> np.ndarray:
    return np.full(shape, number % 100, kind)


class GatedEngine(IdentityEngine):
    """An identity engine that holds every batch until the test lets it go."""

    best_batch = 2

    def __init__(self) -> None:
        self.gate = threading.Semaphore(0)
        self.entered = threading.Semaphore(0)

    def prepare(self, shape: Any, dtype: Any) -> None:
        """No frame passes before the test says so."""

    def collect(self, ticket: np.ndarray) -> np.ndarray:
        self.entered.release()
        assert self.gate.acquire(timeout=30)
        return ticket


class FailingEngine(IdentityEngine):
    """Raises on every third frame each time, half of the time while submitting."""

    best_batch = 1

    def prepare(self, shape: Any, dtype: Any) -> None:
        """It never would."""

    def submit(self, counts: np.ndarray, expected: np.ndarray) -> Any:
        if counts[0, 0, 0] % 6 == 5:
            raise RuntimeError("submit")
        return super().submit(counts, expected)

    def collect(self, ticket: np.ndarray) -> np.ndarray:
        if ticket[0, 0, 0] % 6 == 2:
            raise RuntimeError("collect")
        return super().collect(ticket)


def test_every_frame_comes_out_in_order_with_its_pixels(rig: Any) -> None:
    run = rig({"frames": 50, "overrun": Overrun.block})
    run.start()
    for n in range(50):
        run.camera.send_multipart(message(n, pixels(n, kind="uint16")))
    run.join()
    assert run.ledger == {"received": 50, "published": 50, "dropped": 0, "rejected": 0, "failed": 0,
                          "in_flight": 0, "missing": 0}  # fmt: skip
    published = run.published()
    assert [head["frame"] for head, _ in published] == list(range(50))
    assert all((data == head["frame"]).all() and data.dtype == np.float32 for head, data in published)


def test_header_tells_what_happened_to_the_frame(rig: Any) -> None:
    run = rig({"frames": 1})
    run.start()
    run.camera.send_multipart(
        message(7, pixels(7), timestamp_ns=1, pixel_size_m=6e-12, extra={"operator": "Ada"})
    )
    run.join()
    ((head, _),) = run.published()
    stages = head["stages_ns"]
    assert stages["received"] <= stages["batched"] <= stages["inferred"] <= stages["published"]
    assert head["engine"]["name"] == "identity"
    assert exact(head["ledger"])
    assert (head["operator"], head["pixel_size_m"], head["timestamp_ns"]) == ("Ada", 6e-12, 1)


def test_raw_frames_are_published_beside_the_denoised_ones(rig: Any) -> None:
    run = rig({"frames": 3})
    run.start()
    for n in range(3):
        run.camera.send_multipart(message(n, pixels(n)))
    run.join()
    by_topic: dict[bytes, list[int]] = {b"raw": [], b"denoised": []}
    while run.out.poll(100):
        parts = run.out.recv_multipart()
        if len(parts) == 3:
            by_topic[parts[0]].append(wire.unpack(parts[1])["frame"])
            if parts[0] == b"raw":
                assert parts[2] == pixels(by_topic[b"raw"][-1]).tobytes()
    assert by_topic[b"raw"] == by_topic[b"denoised"] == [0, 1, 2]


@pytest.mark.parametrize("policy", list(Overrun))
def test_overload_leaves_an_exact_ledger_under_every_policy(rig: Any, policy: Overrun) -> None:
    engine = GatedEngine()
    run = rig({"overrun": policy, "slots": 4, "frames": None}, engine=engine)
    run.start()
    for n in range(100):
        run.camera.send_multipart(message(n, pixels(n)))
    if policy is not Overrun.block:
        run.wait(lambda ledger: ledger["received"] == 100)
    assert engine.entered.acquire(timeout=20)
    assert exact(run.ledger)
    for _ in range(200):
        engine.gate.release()
    ledger = run.wait(lambda ledger: ledger["received"] == 100 and ledger["in_flight"] == 0)
    run.stop()
    numbers = [head["frame"] for head, _ in run.published()]
    assert numbers == sorted(numbers)
    assert len(numbers) == ledger["published"]
    assert ledger["published"] + ledger["dropped"] == 100
    if policy is Overrun.block:
        assert ledger["dropped"] == 0
    elif policy is Overrun.drop_newest:
        assert numbers[0] == 0
        assert 99 not in numbers
    else:
        assert numbers[-1] == 99


def test_stop_finishes_what_was_received(rig: Any) -> None:
    engine = GatedEngine()
    run = rig({"slots": 8, "overrun": Overrun.block}, engine=engine)
    run.start()
    for n in range(10):
        run.camera.send_multipart(message(n, pixels(n)))
    run.wait(lambda ledger: ledger["received"] == 10)
    run.service.pipeline.stop()
    for _ in range(10):
        engine.gate.release()
    run.join()
    assert run.ledger["published"] == 10
    assert run.ledger["in_flight"] == 0
    assert len(run.published()) == 10


def test_second_stop_drops_what_still_waits(rig: Any) -> None:
    engine = GatedEngine()
    run = rig({"slots": 8, "overrun": Overrun.block}, engine=engine)
    run.start()
    for n in range(10):
        run.camera.send_multipart(message(n, pixels(n)))
    run.wait(lambda ledger: ledger["received"] == 10)
    run.service.pipeline.stop()
    run.service.pipeline.stop()
    for _ in range(10):
        engine.gate.release()
    run.join()
    assert run.ledger["in_flight"] == 0
    assert run.ledger["dropped"] > 0
    assert exact(run.ledger)


def test_frames_stops_after_exactly_that_many(rig: Any) -> None:
    run = rig({"frames": 7})
    run.start()
    for n in range(7):
        run.camera.send_multipart(message(n, pixels(n)))
    with contextlib.suppress(zmq.Again):  # it may have gone by then
        for n in range(7, 50):
            run.camera.send_multipart(message(n, pixels(n)), zmq.NOBLOCK)
    run.join()
    assert run.ledger["published"] == 7
    assert run.ledger["in_flight"] == 0
    assert exact(run.ledger)


def test_engine_that_fails_costs_its_batch_and_nothing_else(rig: Any, caplog: Any) -> None:
    run = rig({"overrun": Overrun.block}, engine=FailingEngine())
    run.start()
    for n in range(60):
        run.camera.send_multipart(message(n, pixels(n)))
    ledger = run.wait(lambda ledger: ledger["received"] == 60 and ledger["in_flight"] == 0)
    assert (ledger["failed"], ledger["published"]) == (20, 40)
    assert "engine failed on 1 frames" in caplog.text
    assert [head["frame"] for head, _ in run.published()] == [n for n in range(60) if (n + 1) % 3]


def test_headers_say_when_the_fallback_took_over(rig: Any, caplog: Any) -> None:
    class Broken(IdentityEngine):
        def prepare(self, shape: Any, dtype: Any) -> None:
            """It would raise."""

        def collect(self, ticket: np.ndarray) -> np.ndarray:
            raise RuntimeError("broken")

    fallback = IdentityEngine()
    fallback.name = "spare"
    run = rig({"overrun": Overrun.block, "frames": 18}, engine=Broken(), fallback=fallback)
    run.start()
    for n in range(20):
        run.camera.send_multipart(message(n, pixels(n)))
    run.join()
    assert run.ledger["failed"] == 2
    published = run.published()
    assert [head["frame"] for head, _ in published] == list(range(2, 20))
    assert all(head["engine"]["name"] == "spare" for head, _ in published)
    assert all(head["engine"]["fallback_for"] == "identity" for head, _ in published)
    assert "identity is replaced by spare: broken" in caplog.text


def test_swap_under_load_loses_no_frame_and_keeps_the_order(rig: Any) -> None:
    run = rig({"overrun": Overrun.block})
    run.start()
    sent = threading.Event()

    def send() -> None:
        for n in range(3000):
            run.camera.send_multipart(message(n, pixels(n)))
        sent.set()

    thread = threading.Thread(target=send)
    thread.start()
    swaps = 0
    while not sent.is_set() or swaps < 10:
        run.service.swap("identity")
        swaps += 1
    thread.join()
    run.wait(lambda ledger: ledger["published"] == 3000)
    assert [head["frame"] for head, _ in run.published()] == list(range(3000))


def test_engine_for_frames_that_do_not_come_is_not_swapped_in(
    rig: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    class Wide(IdentityEngine):
        name = "wide"
        made_for = ((64, 64), np.dtype(np.uint16))
        prepared: ClassVar[list[Any]] = []
        closed = False

        def prepare(self, shape: tuple[int, int], dtype: np.dtype[Any]) -> None:
            self.prepared.append((shape, dtype))
            if dtype != self.made_for[1]:
                raise BatchRefused(f"wide is for uint16, the frames are {dtype}")

        def close(self) -> None:
            self.closed = True

    wide = Wide()
    monkeypatch.setattr("emstream.serve.load_engine", lambda *a, **k: wide)
    run = rig({"device": "cpu"})
    run.start()
    before = run.service.engine.current
    run.camera.send_multipart(message(0, pixels(0)))
    run.wait(lambda ledger: ledger["published"] == 1)
    with pytest.raises(BatchRefused, match="wide is for uint16, the frames are uint8"):
        run.service.swap("wide.plan")
    assert run.service.engine.current is before
    assert wide.closed
    assert wide.prepared[-1] == (pixels(0).shape, np.dtype(np.uint8))
    assert "wide.plan is not swapped in: wide is for uint16" in caplog.text


def test_engine_that_fails_its_self_test_is_not_swapped_in(
    rig: Any, engine_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    class Forgetful(IdentityEngine):
        name = "forgetful"
        card = load_engine(engine_path).card

        def collect(self, ticket: np.ndarray) -> np.ndarray:
            ticket[...] = 0.3
            return ticket

    run = rig({})
    run.start()
    before = run.service.engine.current
    with monkeypatch.context() as patch:
        patch.setattr("emstream.serve.load_engine", lambda *a, **k: Forgetful())
        with pytest.raises(EngineInvalid, match=r"forgetful fails its self-test: .* dB on simulated frames"):
            run.service.swap("forgetful.onnx")
    where = f"; looked for in {re.escape(str(Path.cwd()))} on {re.escape(socket.gethostname())}$"
    with pytest.raises(EngineError, match=rf"no engine at nowhere\.onnx; shipped: .*{where}"):
        run.service.swap("nowhere.onnx")
    assert "the CPU is used" not in caplog.text
    assert run.service.engine.current is before
    run.camera.send_multipart(message(0, pixels(0)))
    run.wait(lambda ledger: ledger["published"] == 1)


def test_engine_that_hangs_is_named_within_a_second_and_given_up_at_last(rig: Any, caplog: Any) -> None:
    engine = GatedEngine()
    engine.best_batch = 1
    run = rig({"overrun": Overrun.block, "stall_limit_s": 4.0}, engine=engine)
    fault: list[BaseException] = []

    def run_to_the_end() -> None:
        try:
            run.service.pipeline.run()
        except Stalled as error:
            fault.append(error)

    run._thread = threading.Thread(target=run_to_the_end)
    run.start()
    engine.gate.release()  # the first frame of a size may take long
    run.camera.send_multipart(message(0, pixels(0)))
    run.wait(lambda ledger: ledger["published"] == 1)
    begin = time.monotonic()
    run.camera.send_multipart(message(1, pixels(1)))
    while not run.service.pipeline.stalled:
        time.sleep(0.01)
    assert 0.9 < time.monotonic() - begin < 2.4
    assert run.service.pipeline.stalled.keys() == {"engine"}
    said, in_flight = [], 0
    while len(said) < 2 and run.out.poll(2000):  # with the thread that publishes stuck in the engine
        parts = run.out.recv_multipart()
        if parts[0] == b"stats" and (news := wire.unpack(parts[1]))["stalled"]:
            said.append(news["stalled"]["engine"])
            in_flight = news["ledger"]["in_flight"]
    assert said[0] < said[1]
    assert in_flight == 1
    run.join()
    assert "the engine has been stalled for" in str(fault[0])
    assert "1 frames are in flight" in str(fault[0])
    assert "the engine has stalled" in caplog.text
    engine.gate.release(10)


def test_statistics_come_while_the_very_first_batch_takes_long(rig: Any) -> None:
    engine = GatedEngine()
    run = rig({"overrun": Overrun.block}, engine=engine)
    run.camera.send_multipart(message(0, pixels(0)))
    time.sleep(0.2)  # it is there when the service begins
    run.start()
    said = []
    while len(said) < 3 and run.out.poll(3000):
        parts = run.out.recv_multipart()
        if parts[0] == b"stats" and (news := wire.unpack(parts[1]))["ledger"]["in_flight"]:
            said.append(news["ledger"]["published"])
    engine.gate.release(10)
    run.wait(lambda ledger: ledger["published"] == 1)
    assert said == [0, 0, 0]


def test_failure_that_goes_on_is_said_once_in_a_while(rig: Any, caplog: Any) -> None:
    class Broken(IdentityEngine):
        def submit(self, counts: np.ndarray, expected: np.ndarray) -> Any:
            raise EngineError("the plan is for other frames")

    engine = Broken()
    engine.prepare = lambda shape, dtype: None  # type: ignore[method-assign]
    run = rig({"overrun": Overrun.block}, engine=engine)
    run.start()
    for n in range(300):
        run.camera.send_multipart(message(n, pixels(n)))
    run.wait(lambda ledger: ledger["failed"] == 300)
    run.stop()
    lines = [record for record in caplog.records if "engine failed" in record.message]
    assert 1 <= len(lines) < 10
    assert "the plan is for other frames" in lines[0].message
    assert lines[0].exc_info is None


def test_gpu_that_is_lost_ends_the_service(rig: Any) -> None:
    class Lost(IdentityEngine):
        healthy = 30

        def collect(self, ticket: np.ndarray) -> np.ndarray:
            if self.healthy <= 0:
                raise CudaError("cuEventSynchronize: CUDA_ERROR_ILLEGAL_ADDRESS")
            self.healthy -= 1
            return ticket

    run = rig({"overrun": Overrun.block}, engine=Lost())
    fault: list[BaseException] = []

    def run_to_the_end() -> None:
        try:
            run.service.pipeline.run()
        except EmstreamError as error:
            fault.append(error)

    run._thread = threading.Thread(target=run_to_the_end)
    run.start()
    for n in range(200):
        run.camera.send_multipart(message(n, pixels(n)))
    run.join()
    assert "the GPU is lost" in str(fault[0])
    assert "CUDA_ERROR_ILLEGAL_ADDRESS" in str(fault[0])
    assert run.ledger["in_flight"] == 0
    assert exact(run.ledger)


def test_frame_for_which_the_engine_has_no_memory_is_rejected(rig: Any) -> None:
    class Tight(IdentityEngine):
        def allocate(self, nbytes: int) -> np.ndarray:
            if nbytes > 2_000_000:
                raise CudaError("cuMemHostAlloc: CUDA_ERROR_OUT_OF_MEMORY")
            return super().allocate(nbytes)

    run = rig({"overrun": Overrun.block}, engine=Tight())
    run.start()
    run.camera.send_multipart(message(0, np.zeros((2000, 2000), np.uint8)))
    run.camera.send_multipart(message(1, pixels(1)))
    ledger = run.wait(lambda ledger: ledger["published"] == 1)
    assert ledger["rejected"] == 1
    assert run.service.ledger.reasons() == {"no memory for a frame of 2000x2000 uint8": 1}


@pytest.mark.parametrize(
    "change",
    [
        {"output": "tcp://127.0.0.1:99999"},
        {"expect": "64x64:uint8", "roi": "65x64+0+0"},
        {"input": "ftp://x"},
    ],
)
def test_service_that_cannot_be_put_together_closes_its_engine(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    closed = threading.Event()
    engine = IdentityEngine()
    engine.close = closed.set  # type: ignore[method-assign]
    with pytest.raises((EmstreamError, ValueError)):
        build(Settings(**{"input": "sim://", "output": f"ipc://{tmp_path}/out", **change}), engine=engine)
    assert closed.is_set()


def test_frames_that_change_size_and_type_within_a_series_come_out_right(rig: Any) -> None:
    shapes = [((32, 48), "uint8"), ((31, 17), "uint16"), ((64, 64), "float32"), ((1, 1), "int32")]
    run = rig({"frames": 40, "overrun": Overrun.block})
    run.start()
    for n in range(40):
        run.camera.send_multipart(message(n, pixels(n, *shapes[n // 3 % 4])))
    run.join()
    published = run.published()
    assert [head["frame"] for head, _ in published] == list(range(40))
    for head, data in published:
        assert data.shape == shapes[head["frame"] // 3 % 4][0]
        assert (data == head["frame"]).all()


def test_series_are_bracketed_by_start_and_end(rig: Any) -> None:
    run = rig({"overrun": Overrun.block})
    run.start()
    for series in ("first", "second"):
        run.camera.send_multipart(
            [b"raw", wire.pack({"htype": wire.START, "source": "test", "series": series, "user": 1})]
        )
        for n in range(3):
            run.camera.send_multipart(message(n, pixels(n), series=series))
        if series == "first":
            run.camera.send_multipart(
                [b"raw", wire.pack({"htype": wire.END, "source": "test", "series": series})]
            )
    run.wait(lambda ledger: ledger["published"] == 6)
    run.stop()
    run.service.close()
    seen = []
    while run.out.poll(100):
        parts = run.out.recv_multipart()
        head = wire.unpack(parts[1])
        if parts[0] == b"denoised":
            seen.append((head["htype"].split("-")[1], head["series"]))
    expected = []
    for series in ("first", "second"):
        expected += [("start", series), *[("frame", series)] * 3, ("end", series)]
    assert seen == expected


def test_dose_outside_the_engines_range_is_flagged_in_the_header(rig: Any, engine_path: Any) -> None:
    run = rig({"engine": engine_path, "frames": 2, "overrun": Overrun.block})
    run.start()
    run.camera.send_multipart(message(0, np.ones((64, 64), np.uint8)))
    run.camera.send_multipart(message(1, np.full((64, 64), 3000, np.uint16)))
    run.join()
    (first, _), (second, _) = run.published()
    assert (first["dose"], first["in_domain"]) == (1.0, True)
    assert (second["dose"], second["in_domain"]) == (3000.0, False)


def test_thread_that_dies_ends_the_service_with_its_error(rig: Any) -> None:
    class Broken:
        lossless = False

        def run(self, intake: Any, stop: threading.Event) -> None:
            raise RuntimeError("sensor on fire")

    run = rig(source=Broken())
    with pytest.raises(EmstreamError, match="RuntimeError: sensor on fire"):
        run.service.pipeline.run()
