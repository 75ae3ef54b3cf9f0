"""Engines behind inference servers, each a real Triton."""

from __future__ import annotations

import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emstream.errors import BatchRefused, EngineInvalid, EngineNotFound, EngineUnavailable, ServerFailed
from emstream.inference import Engine, default_engine, load_engine
from emstream.inference.engine import sha256_of
from emstream.inference.plan import Profile, write_plan
from emstream.inference.remote import RemoteModel, _pixels
from emstream.inference.supervised import SupervisedEngine
from emstream.intake import Overrun
from emstream.repository import write_repository
from emstream.serve import Settings, build
from tests.conftest import exact, message
from tests.doubles.tensorrt import record_of
from tests.triton import Triton

grpc = pytest.importorskip("tritonclient.grpc", reason="emstream[remote] is not installed")

MODEL = default_engine().with_name("unet32.onnx")
OTHER = default_engine().with_name("wide64.onnx")


@pytest.fixture(scope="module")
def triton(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Triton]:
    """A server with unet32, which nobody harms."""
    folder = tmp_path_factory.mktemp("triton")
    write_repository(MODEL, folder / "models")
    server = Triton(folder / "models", folder).start()
    yield server
    server.stop()


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Callable[..., Triton]]:
    """Servers of the test's own, by number, all with unet32."""
    started: list[Triton] = []

    def start(number: int = 0) -> Triton:
        folder = tmp_path / str(number)
        write_repository(MODEL, folder / "models")
        started.append(Triton(folder / "models", folder).start())
        return started[-1]

    yield start
    for each in started:
        each.stop(signal.SIGKILL)


@pytest.fixture
def engine_of() -> Iterator[Callable[[str], Engine]]:
    loaded: list[Engine] = []

    def load(url: str) -> Engine:
        loaded.append(load_engine(url))
        return loaded[-1]

    yield load
    for each in loaded:
        each.close()


def counts(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).poisson(0.45, shape).astype(np.uint8)


def exchange(repository: Path) -> None:
    """Another network under the same name and version."""
    shutil.rmtree(repository / "unet32")
    write_repository(OTHER, repository, name="unet32")


# -- addresses ------------------------------------------------------------------------


def test_address_names_servers_model_and_version() -> None:
    at = RemoteModel.of("grpc://one,two:9001,[::1]:7/unet128/3?timeout_s=0.5&card=n.onnx")
    assert at.hosts == ("one:8001", "two:9001", "[::1]:7")
    assert (at.model, at.version, at.timeout_s, at.card) == ("unet128", "3", 0.5, Path("n.onnx"))
    assert not at.encrypted
    assert RemoteModel.of("grpcs://one/m?ca=c.pem").encrypted


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("grpc://one", "grpc://HOST:8001/MODEL"),
        ("grpc://one/", "grpc://HOST:8001/MODEL"),
        ("grpc://one/m/x", "grpc://HOST:8001/MODEL"),
        ("grpc://one/m#x", "grpc://HOST:8001/MODEL"),
        ("GRPC://one/", "grpc://HOST:8001/MODEL"),
        ("grpc:/one/m", "HOST:8001"),
        ("grpc://one:0/m", "one:0"),
        ("grpc://one:99999/m", "one:99999"),
        ("grpc://one,,two/m", "got ''"),
        ("grpc://me@one/m", "me@one"),
        ("grpc://one,one:8001/m", "twice"),
        ("grpc://one/m?timeout_s=0", "0.01-3600 s, got '0'"),
        ("grpc://one/m?timeout_s=nan", "got 'nan'"),
        ("grpc://one/m?patience=3", "got patience"),
        ("grpc://one/m?ca=c.pem", "grpcs://"),
        ("grpcs://one/m?key=k.pem", "go together"),
    ],
)
def test_addresses_that_make_no_sense_are_refused(url: str, said: str) -> None:
    with pytest.raises(ValueError, match=r".") as refused:
        load_engine(url)
    assert said in str(refused.value)


@pytest.mark.parametrize("options", [{"precision": "f32"}, {"threads": 1}, {"device": "0"}])
def test_what_is_for_engines_of_this_machine_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="engines on this machine"):
        load_engine("grpc://localhost/m", **options)


# -- what a server says of a model ----------------------------------------------------


def test_server_says_what_the_network_is(triton: Triton, engine_of: Callable[[str], Engine]) -> None:
    engine = engine_of(triton.url("unet32"))
    mine = load_engine(MODEL, device="cpu")
    assert (engine.sha256, engine.card) == (sha256_of(MODEL), mine.card)
    assert engine.identity["name"] == "unet32"
    assert engine.device.startswith("triton 2.")
    assert engine.device.endswith(f"at {triton.host}")
    assert engine.max_batch == 8


def test_large_frames_are_tiled(triton: Triton, engine_of: Callable[[str], Engine]) -> None:
    y = counts(1100, 64)
    mine = load_engine(MODEL, precision="f32").denoise(y)
    np.testing.assert_allclose(engine_of(triton.url("unet32")).denoise(y), mine, atol=1e-3)


def test_nobody_there_is_said_with_the_port() -> None:
    with pytest.raises(
        EngineUnavailable, match=r"no inference server answers at 127.0.0.1:1 .*8001, not 8000"
    ):
        load_engine("grpc://127.0.0.1:1/unet32?timeout_s=1")


@pytest.mark.parametrize("model", ["unet128", "unet32/7"])
def test_model_that_a_server_has_not_is_named(triton: Triton, model: str) -> None:
    with pytest.raises(EngineUnavailable, match=rf"{triton.host}.*{model[:6]}"):
        load_engine(triton.url(model))


def test_model_without_a_card_takes_one_from_a_file(own: Callable[..., Triton], tmp_path: Path) -> None:
    server = own()
    server.stop()
    config = tmp_path / "0/models/unet32/config.pbtxt"
    lines = config.read_text().splitlines(keepends=True)
    config.write_text("".join(line for line in lines if not line.startswith("parameters")))
    server.start()
    with pytest.raises(EngineInvalid, match=r"does not say what version 1 is for.*\?card="):
        load_engine(server.url("unet32"))
    engine = load_engine(f"{server.url('unet32')}?card={MODEL}")
    assert engine.sha256 == sha256_of(MODEL)
    engine.close()
    with pytest.raises(EngineNotFound, match=r"no-such\.onnx"):
        load_engine(f"{server.url('unet32')}?card=no-such.onnx")


def test_configuration_of_another_version_is_not_believed(own: Callable[..., Triton], tmp_path: Path) -> None:
    """As in the moment between the two files of an export, or of a version that is asked for by its number."""
    server = own()
    server.stop()
    config = tmp_path / "0/models/unet32/config.pbtxt"
    config.write_text(config.read_text().replace(r"\"version\": 1", r"\"version\": 2"))
    server.start()
    with pytest.raises(EngineInvalid, match=r"does not say what version 1 is for.*\?card="):
        load_engine(server.url("unet32"))
    engine = load_engine(f"{server.url('unet32')}?card={MODEL}")
    assert engine.sha256 == sha256_of(MODEL)
    engine.close()


def test_card_of_another_network_is_refused(triton: Triton) -> None:
    with pytest.raises(EngineInvalid, match=rf"another network than {OTHER}"):
        load_engine(f"{triton.url('unet32')}?card={OTHER}")


def test_service_does_not_look_for_a_cpu_to_run_it_on(
    triton: Triton, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(EngineInvalid, match="another network"):
        build(Settings(input="tcp://127.0.0.1:1", engine=f"{triton.url('unet32')}?card={OTHER}"))
    assert "CPU" not in caplog.text


def test_numbers_are_read_where_a_server_sends_no_bytes() -> None:
    response = grpc.service_pb2.ModelInferResponse()
    output = response.outputs.add(name="out", datatype="FP32", shape=[1, 1, 2])
    output.contents.fp32_contents.extend([1.5, 2.5])
    np.testing.assert_array_equal(_pixels(response, "out"), [[[1.5, 2.5]]])
    with pytest.raises(KeyError, match="other"):
        _pixels(response, "other")


# -- plans, which take one frame size, and pixels as bytes ----------------------------


@pytest.mark.parametrize("kind", ["uint8", "uint16", "uint32"])
def test_plan_gets_its_pixels_as_bytes(kind: str, tmp_path: Path, engine_of: Callable[[str], Engine]) -> None:
    profile = Profile(height=32, width=48, type=kind, max_batch=4)
    plan = tmp_path / "p.plan"
    write_plan(plan, record_of(profile, flavour="tensorrt"), b"compiled")
    write_repository(plan, tmp_path / "models", name="plan")
    server = Triton(tmp_path / "models", tmp_path).start()
    try:
        engine = engine_of(server.url("plan"))
        assert engine.made_for == ((32, 48), np.dtype(kind))
        assert engine.max_batch == 4
        y = np.random.default_rng(0).integers(0, np.iinfo(kind).max, (2, 32, 48)).astype(kind)
        y[0, 0, 0] = 0
        expected = np.empty(y.shape, np.float32)
        np.testing.assert_allclose(engine.collect(engine.submit(y, expected)), y.astype(np.float32) / 2)
        with pytest.raises(BatchRefused, match="32x48, got 16x16"):
            engine.denoise(counts(16, 16))
        with pytest.raises(BatchRefused, match=f"takes {kind}"):
            engine.denoise(np.full((32, 48), 0.5, np.float32))
    finally:
        server.stop()


# -- servers that fail ----------------------------------------------------------------


def test_failure_of_the_network_is_told(triton: Triton, engine_of: Callable[[str], Engine]) -> None:
    with pytest.raises(ServerFailed, match="the network cannot"):
        engine_of(triton.url("unet32")).denoise(np.full((16, 16), 99, np.uint8))


def test_batch_that_the_server_refuses_is_refused(triton: Triton, engine_of: Callable[[str], Engine]) -> None:
    engine, y = engine_of(triton.url("unet32")), np.zeros((9, 16, 16), np.uint8)
    with pytest.raises(BatchRefused, match="8"):
        engine.collect(engine.submit(y, np.empty(y.shape, np.float32)))


def test_server_that_was_away_is_used_again(
    own: Callable[..., Triton], engine_of: Callable[[str], Engine]
) -> None:
    server = own()
    engine, y = engine_of(server.url("unet32")), counts(32, 32)
    before = engine.denoise(y)
    server.stop(signal.SIGKILL)
    start_s = time.monotonic()
    with pytest.raises(ServerFailed, match=server.host):
        engine.denoise(y)
    assert time.monotonic() - start_s < 5
    server.start()
    back_s = time.monotonic()
    while True:
        try:
            np.testing.assert_array_equal(engine.denoise(y), before)
            break
        except ServerFailed:
            assert time.monotonic() - back_s < 5
            time.sleep(0.1)


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="no signal stops a process here")
def test_server_that_hangs_keeps_nobody(
    own: Callable[..., Triton], engine_of: Callable[[str], Engine]
) -> None:
    server = own()
    engine = engine_of(f"{server.url('unet32')}?timeout_s=0.5")
    assert server._process
    server._process.send_signal(signal.SIGSTOP)
    start_s = time.monotonic()
    with pytest.raises(ServerFailed, match=r"did not answer within|no inference server answers"):
        engine.denoise(counts(32, 32))
    assert time.monotonic() - start_s < 5
    server._process.send_signal(signal.SIGCONT)


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="no signal stops a process here")
def test_server_that_hangs_does_not_keep_who_submits(
    own: Callable[..., Triton], engine_of: Callable[[str], Engine]
) -> None:
    server = own()
    engine, y = engine_of(server.url("unet32")), counts(1, 32, 32)
    engine.denoise(y)
    time.sleep(1)  # what it said of its network is to be asked again
    assert server._process
    server._process.send_signal(signal.SIGSTOP)
    start_s = time.monotonic()
    tickets = [engine.submit(y, np.empty(y.shape, np.float32)) for _ in range(3)]
    assert time.monotonic() - start_s < 0.5
    with pytest.raises(ServerFailed, match="no inference server answers"):
        engine.collect(tickets[0])
    assert time.monotonic() - start_s < 4  # not the five seconds that an answer may take
    server._process.send_signal(signal.SIGCONT)
    for ticket in tickets[1:]:  # these it still does
        engine.collect(ticket)


def test_server_that_comes_back_with_another_network_is_noticed(
    own: Callable[..., Triton], engine_of: Callable[[str], Engine], tmp_path: Path
) -> None:
    server = own()
    engine = engine_of(server.url("unet32"))
    server.stop()
    with pytest.raises(ServerFailed):
        engine.denoise(counts(32, 32))
    exchange(tmp_path / "0/models")
    server.start()
    deadline_s = time.monotonic() + 10
    while True:
        with pytest.raises(ServerFailed) as raised:
            engine.denoise(counts(32, 32))
        if "came back with another network, wide64" in str(raised.value):
            break
        assert time.monotonic() < deadline_s


def test_network_that_was_exchanged_while_nobody_asked_is_noticed(
    own: Callable[..., Triton], engine_of: Callable[[str], Engine], tmp_path: Path
) -> None:
    """A camera pauses, its server restarts: no call fails."""
    server = own()
    engine = engine_of(server.url("unet32"))
    engine.denoise(counts(32, 32))
    server.stop()
    exchange(tmp_path / "0/models")
    server.start()
    time.sleep(1)
    with pytest.raises(ServerFailed, match="came back with another network, wide64"):
        engine.denoise(counts(32, 32))


def test_next_version_is_loaded_by_the_service(own: Callable[..., Triton], tmp_path: Path) -> None:
    """As after ``emstream export`` of a new network beside running services."""
    server = own()
    load = lambda: load_engine(server.url("unet32"))  # noqa: E731
    engine = SupervisedEngine(load(), reload=load)
    write_repository(OTHER, tmp_path / "0/models", name="unet32")
    y, made_by = counts(1, 32, 32), set()
    deadline_s = time.monotonic() + 30
    while made_by != {"unet32", "wide64"}:
        ticket = engine.submit(y, np.empty(y.shape, np.float32))
        try:
            engine.collect(ticket)
            made_by.add(engine.maker_of(ticket).identity["name"])
        except ServerFailed:
            pass
        assert time.monotonic() < deadline_s
    engine.close()


# -- several --------------------------------------------------------------------------


def test_servers_with_different_networks_are_not_mixed(own: Callable[..., Triton], tmp_path: Path) -> None:
    one, two = own(0), own(1)
    two.stop()
    (tmp_path / "1/models/unet32/1/model.onnx").write_bytes(OTHER.read_bytes())
    (tmp_path / "1/models/unet32/config.pbtxt").unlink()
    write_repository(OTHER, tmp_path / "1/models", name="unet32")
    two.start()
    with pytest.raises(EngineInvalid, match=rf"{two.host}.*{one.host} are not the same: wide64.*unet32"):
        load_engine(f"grpc://{one.host},{two.host}/unet32")


def test_servers_that_are_away_are_left_out(
    triton: Triton, engine_of: Callable[[str], Engine], caplog: pytest.LogCaptureFixture
) -> None:
    engine = engine_of(f"grpc://127.0.0.1:1,{triton.host}/unet32?timeout_s=2")
    assert engine.device.endswith(f"at {triton.host}")
    assert engine.denoise(counts(16, 16)).shape == (16, 16)
    assert "no inference server answers at 127.0.0.1:1" in caplog.text
    with pytest.raises(EngineUnavailable, match=r"at 127\.0\.0\.1:1 "):
        load_engine("grpc://127.0.0.1:1,127.0.0.1:2/unet32?timeout_s=1")


def test_server_with_another_network_leaves_the_frames_to_the_others(
    own: Callable[..., Triton], engine_of: Callable[[str], Engine], tmp_path: Path
) -> None:
    servers = [own(0), own(1)]
    inner = engine_of(f"grpc://{servers[0].host},{servers[1].host}/unet32")
    engine, y = SupervisedEngine(inner), counts(1, 32, 32)
    before = inner.denoise(y)
    servers[0].stop()
    exchange(tmp_path / "0/models")
    servers[0].start()
    time.sleep(1)
    for _ in range(300):
        flying = [engine.submit(y, np.empty(y.shape, np.float32)) for _ in range(3)]
        for ticket in flying:
            np.testing.assert_array_equal(engine.collect(ticket), before)


def test_service_goes_on_when_one_of_two_servers_is_killed(own: Callable[..., Triton], rig: Any) -> None:
    servers = [own(0), own(1)]
    url = f"grpc://{servers[0].host},{servers[1].host}/unet32?timeout_s=2"
    run = rig({"engine": url, "overrun": Overrun.block, "expect": "32x48:uint8"})
    run.start()
    frames = [counts(32, 48, seed=n) for n in range(400)]
    threading.Timer(0.3, servers[0].stop, [signal.SIGKILL]).start()
    for n, frame in enumerate(frames):
        run.camera.send_multipart(message(n, frame))
        time.sleep(0.002)
    run.wait(lambda ledger: ledger["published"] + ledger["failed"] == 400)
    assert servers[0]._process is None
    run.stop()
    assert exact(run.ledger)
    assert run.ledger["failed"] == 0
    published = run.published()
    assert [head["frame"] for head, _ in published] == list(range(400))
    assert published[-1][0]["engine"]["sha256"] == sha256_of(MODEL)
    mine = load_engine(MODEL, precision="f32")
    for n in (0, 200, 399):
        np.testing.assert_allclose(published[n][1], mine.denoise(frames[n]), atol=1e-3)


def test_service_counts_what_no_server_denoised_and_goes_on(own: Callable[..., Triton], rig: Any) -> None:
    server = own()
    run = rig(
        {"engine": f"{server.url('unet32')}?timeout_s=1", "overrun": Overrun.block, "expect": "32x48:uint8"}
    )
    run.start()
    run.camera.send_multipart(message(0, counts(32, 48)))
    run.wait(lambda ledger: ledger["published"] == 1)
    server.stop(signal.SIGKILL)
    for n in range(1, 6):
        run.camera.send_multipart(message(n, counts(32, 48)))
    run.wait(lambda ledger: ledger["failed"] == 5)
    server.start()
    deadline_s = time.monotonic() + 10
    sent = 6
    while run.ledger["published"] == 1:
        run.camera.send_multipart(message(sent, counts(32, 48)))
        sent += 1
        time.sleep(0.1)
        assert time.monotonic() < deadline_s
    run.stop()
    assert exact(run.ledger)


# -- encryption -----------------------------------------------------------------------


def test_encrypted_server_is_known_by_its_certificate(tmp_path: Path) -> None:
    request = "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost"
    files = "-addext subjectAltName=DNS:localhost -keyout key.pem -out cert.pem"
    made = subprocess.run(f"{request} {files}".split(), cwd=tmp_path, capture_output=True, check=False)
    if made.returncode:
        pytest.skip("no openssl makes a certificate here")
    write_repository(MODEL, tmp_path / "models")
    server = Triton(tmp_path / "models", tmp_path)
    server.options = [
        "--grpc-use-ssl=true",
        f"--grpc-server-cert={tmp_path / 'cert.pem'}",
        f"--grpc-server-key={tmp_path / 'key.pem'}",
    ]
    server.certificate = tmp_path / "cert.pem"
    server.start()
    try:
        engine = load_engine(f"grpcs://localhost:{server.port}/unet32?ca={tmp_path / 'cert.pem'}")
        assert engine.denoise(counts(16, 16)).shape == (16, 16)
        engine.close()
        for url in (f"grpcs://localhost:{server.port}", f"grpc://localhost:{server.port}"):
            with pytest.raises(EngineUnavailable):
                load_engine(f"{url}/unet32?timeout_s=2")
    finally:
        server.stop()
    with pytest.raises(EngineUnavailable, match=r"cannot read .*none\.pem"):
        load_engine(f"grpcs://localhost:{server.port}/unet32?ca={tmp_path / 'none.pem'}")
