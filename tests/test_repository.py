"""Model repositories: what Triton reads in them, with Triton's own definition of a configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from emstream.cli import app
from emstream.errors import EngineError, EngineInvalid, EngineNotFound, OutputError
from emstream.inference import default_engine, load_engine
from emstream.inference.engine import sha256_of
from emstream.inference.plan import Profile, write_plan
from emstream.inference.remote import PARAMETER, read_parameter
from emstream.repository import write_repository
from tests.doubles.tensorrt import CARD, record_of

MODEL = default_engine().with_name("unet32.onnx")
OTHER = default_engine().with_name("wide64.onnx")


def config(folder: Path) -> Any:
    service = pytest.importorskip("tritonclient.grpc", reason="emstream[remote] is not installed")
    from google.protobuf import text_format

    return text_format.Parse((folder / "config.pbtxt").read_text(), service.model_config_pb2.ModelConfig())


def test_model_lies_where_servers_look_and_says_what_it_is(tmp_path: Path) -> None:
    report = write_repository(MODEL, tmp_path / "models", instances=2)
    assert report == {
        "model": "unet32",
        "version": 1,
        "path": str(tmp_path / "models/unet32/1/model.onnx"),
        "config": str(tmp_path / "models/unet32/config.pbtxt"),
        "url": "grpc://HOST:8001/unet32",
    }
    assert Path(report["path"]).read_bytes() == MODEL.read_bytes()
    found = config(tmp_path / "models/unet32")
    assert (found.name, found.backend, found.max_batch_size) == ("unet32", "onnxruntime", 8)
    assert [(each.name, list(each.dims)) for each in (*found.input, *found.output)] == [
        ("counts", [-1, -1]),
        ("expected_counts", [-1, -1]),
    ]
    assert found.instance_group[0].count == 2
    told = read_parameter(found.parameters[PARAMETER].string_value, where="here")
    assert told == (sha256_of(MODEL), load_engine(MODEL, device="cpu").card)


def test_openvino_of_triton_gets_what_it_takes(tmp_path: Path) -> None:
    """Its README: model.onnx has to be named; it runs on CPUs only, and with a max_batch_size full batches only."""
    report = write_repository(MODEL, tmp_path, backend="openvino", instances=2)
    found = config(tmp_path / "unet32")
    assert (found.backend, found.default_model_filename) == ("openvino", Path(report["path"]).name)
    assert (found.max_batch_size, found.HasField("dynamic_batching")) == (0, False)
    assert [list(each.dims) for each in (*found.input, *found.output)] == [[-1, -1, -1]] * 2
    (group,) = found.instance_group
    assert (group.count, group.kind) == (2, group.KIND_CPU)
    with pytest.raises(ValueError, match="max_batch is 4"):
        write_repository(MODEL, tmp_path, backend="openvino", max_batch=4)


def test_next_network_is_the_next_version(tmp_path: Path) -> None:
    versions = [
        write_repository(each, tmp_path, name="m")["version"] for each in (MODEL, MODEL, OTHER, OTHER)
    ]
    assert versions == [1, 1, 2, 2]
    told = config(tmp_path / "m").parameters[PARAMETER].string_value
    assert told.count(sha256_of(OTHER)) == 1
    assert read_parameter(told, "here", "1") is None
    assert read_parameter(told, "here", "2") == read_parameter(told, "here")
    assert sorted(each.name for each in (tmp_path / "m").iterdir()) == ["1", "2", "config.pbtxt"]


def test_plan_keeps_its_frame_size_and_batch(tmp_path: Path) -> None:
    plan = tmp_path / "p.plan"
    profile = Profile(height=512, width=256, type="uint16", max_batch=4)
    write_plan(plan, record_of(profile, flavour="tensorrt"), b"compiled")
    report = write_repository(plan, tmp_path / "models")
    assert Path(report["path"]).name == "model.plan"
    assert Path(report["path"]).read_bytes() == b"compiled"
    found = config(tmp_path / "models" / CARD.name)
    assert (found.platform, found.max_batch_size) == ("tensorrt_plan", 4)
    assert (found.input[0].name, list(found.input[0].dims)) == ("raw", [512, 256, 2])
    with pytest.raises(ValueError, match="batches of up to 4 frames, max_batch is 5"):
        write_repository(plan, tmp_path / "models", max_batch=5)


def test_plan_for_rtx_is_refused(tmp_path: Path) -> None:
    plan = tmp_path / "p.plan"
    write_plan(plan, record_of(Profile(height=8, width=8, type="uint8", max_batch=1)), b"compiled")
    with pytest.raises(EngineInvalid, match="tensorrt-rtx, which no inference server runs"):
        write_repository(plan, tmp_path)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"name": "a/b"}, "got 'a/b'"),
        ({"name": "../up"}, "got '../up'"),
        ({"name": ""}, "got ''"),
        ({"max_batch": 0}, "max_batch must be at least 1, got 0"),
        ({"instances": -1}, "instances must be at least 1, got -1"),
        ({"backend": "torch"}, "onnxruntime, openvino, got 'torch'"),
    ],
)
def test_options_that_make_no_sense_are_refused(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=r".") as refused:
        write_repository(MODEL, tmp_path, **options)
    assert said in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_what_is_no_engine_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineNotFound):
        write_repository(tmp_path / "none.onnx", tmp_path)
    (tmp_path / "text.onnx").write_text("no network")
    with pytest.raises(EngineError, match=r"text\.onnx"):
        write_repository(tmp_path / "text.onnx", tmp_path)
    (tmp_path / "m.pt2").write_text("")
    with pytest.raises(EngineInvalid, match=r"takes an \.onnx or a \.plan"):
        write_repository(tmp_path / "m.pt2", tmp_path)


def test_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=rf"{tmp_path / 'file'}"):
        write_repository(MODEL, tmp_path / "file")


def test_command_exports_the_shipped_engine(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["export", "--triton", str(tmp_path), "--json"])
    assert result.exit_code == 0
    assert json.loads(result.stdout)["url"] == "grpc://HOST:8001/wide64"
    assert CliRunner().invoke(app, ["export"]).exit_code == 2
