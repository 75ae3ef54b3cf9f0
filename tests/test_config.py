"""Flags over environment over file over defaults; what is in force is shown, what is wrong is named."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from emstream.cli import app
from emstream.config import origins
from emstream.keys import make
from emstream.printable import JsonFormatter


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "emstream.toml"
    path.write_text(
        '[serve]\ninput = "tcp://camera:5555"\nmax-batch = 4\nmax_wait_ms = 3\noverrun = "block"\nview = true\n'
        '[record]\nsplit = "1GiB"\n'
    )
    return path


def run(*arguments: Any, **environment: str) -> Any:
    return CliRunner().invoke(app, [*map(str, arguments)], env=environment)


def checked(*arguments: Any, **environment: str) -> dict[str, Any]:
    done = run(*arguments, "config", "check", "--json", **environment)
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_each_value_says_where_it_comes_from(file: Path) -> None:
    found = checked("--config", file, EMSTREAM_SERVE_MAX_BATCH="7", EMSTREAM_SERVE_ENGINE="identity")
    assert found["input"] == {"value": "tcp://camera:5555", "from": str(file)}
    assert found["max_batch"] == {"value": 7, "from": "environment: EMSTREAM_SERVE_MAX_BATCH"}
    assert found["engine"] == {"value": "identity", "from": "environment: EMSTREAM_SERVE_ENGINE"}
    assert found["max_wait_ms"] == {"value": 3.0, "from": str(file)}
    assert found["overrun"] == {"value": "block", "from": str(file)}
    assert found["view"] == {"value": True, "from": str(file)}
    assert found["queue"] == {"value": 64, "from": "default"}


def test_option_that_may_be_given_again_takes_a_list_or_one(file: Path) -> None:
    outputs = ["tcp://127.0.0.1:7000", "tcp://127.0.0.1:7001?format=array-1.0"]
    for text, value in ((json.dumps(outputs), outputs), (json.dumps(outputs[0]), outputs[:1])):
        file.write_text(f'[serve]\ninput = "sim://"\noutput = {text}\n')
        assert checked("--config", file)["output"] == {"value": value, "from": str(file)}


def test_file_may_be_named_by_the_environment(file: Path) -> None:
    assert checked(EMSTREAM_CONFIG=str(file))["input"]["value"] == "tcp://camera:5555"


def test_other_commands_are_checked_too(file: Path) -> None:
    done = run("--config", file, "config", "check", "record", "--json")
    # OUT.h5 is missing: what must be given is asked for
    assert done.exit_code == 2
    done = run("--config", file, "config", "check", "status", "--json")
    assert done.exit_code == 0, done.output
    done = run("config", "check", "nothing")
    assert done.exit_code == 2
    assert "there is no command 'nothing'; there are" in done.output


def test_people_get_a_table(file: Path) -> None:
    done = run("--config", file, "config", "check")
    assert done.exit_code == 0
    assert "tcp://camera:5555" in done.output


def test_what_is_in_force_where_nothing_is_given_is_said() -> None:
    assert checked(EMSTREAM_SERVE_INPUT="sim://")["output"] == {
        "value": ["tcp://127.0.0.1:5556"],
        "from": "default",
    }
    shown = run("config", "check", EMSTREAM_SERVE_INPUT="sim://").stdout
    assert re.search(r"output +tcp://127.0.0.1:5556 +\(default\)", shown)
    assert re.search(r"engine +the one that ships +\(default\)", shown)


@pytest.mark.parametrize(
    ("text", "environment", "errors", "code"),
    [
        ("slots = 1", {}, ["slots must be at least 2 batches, got 1 (--slots is from {path}, [serve])"], 2),
        ("max_bacth = 4", {}, ["[serve] has no option 'max_bacth'; did you mean max_batch?"], 1),
        ("", {"EMSTREAM_SERVE_FRAMES": "many"}, ["'many'"], 2),
        ("", {"EMSTREAM_SERVE_ENGIN": "x"}, ["EMSTREAM_SERVE_ENGIN belongs to no option"], 1),
        (
            "slots = 1\nmax_bacth = 4\nview = 1",
            {},
            ["slots must be at least 2", "no option 'max_bacth'", "view = 1: true or false is needed"],
            1,
        ),
    ],
)
def test_options_are_shown_with_what_is_wrong_with_them(
    tmp_path: Path, text: str, environment: dict[str, str], errors: list[str], code: int
) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(f'[serve]\ninput = "sim://"\nqueue = 7\n{text}\n')
    done = run("--config", path, "config", "check", **environment)
    assert done.exit_code == code
    assert re.search(rf"queue +7 +\({path}\)", done.stdout)
    done = run("--config", path, "config", "check", "--json", **environment)
    assert done.exit_code == code
    found = json.loads(done.stdout)
    assert found["queue"] == {"value": 7, "from": str(path)}
    for error in errors:
        assert error.format(path=path) in found["error"]
        assert error.split(" (")[0].format(path=path) in re.sub(r"[\s│]+", " ", done.stderr)


def test_other_commands_do_not_run_with_a_file_that_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text("[serve]\nmax_bacth = 4\n")
    done = run("--config", path, "info", "identity")
    assert done.exit_code == 1
    assert "[serve] has no option 'max_bacth'" in done.stderr
    assert not done.stdout


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("[serve]\nmax_bacth = 4\n", r"[serve] has no option 'max_bacth'; did you mean max_batch?"),
        ("[server]\n", r"[server] is no command with options; did you mean serve?"),
        ("serve = 4\n", r"serve = 4 is in no table; options go below the [command] they belong to"),
        ("[engine]\ntimeout_s = 3\n", r"[engine] is no command with options"),
        ("[serve]\nmax-batch = 2\nmax_batch = 3\n", r"[serve] has max_batch twice, with - and with _"),
        ('[serve]\nmax_batch = "many"\n', r"[serve] max_batch = 'many': "),
        ("[serve]\nmax_batch = [1]\n", r"[serve] max_batch = [1]: one value"),
        ("[serve]\nmax_batch = true\n", r"[serve] max_batch = True: one value"),
        ("[serve]\nview = 1\n", r"[serve] view = 1: true or false is needed"),
        ('[serve]\noverrun = "never"\n', r"[serve] overrun = 'never': 'never' is not one of"),
        ("[serve\n", "is not TOML: "),
        ("\xff", "is not TOML: "),
    ],
)
def test_mistakes_in_the_file_are_named(tmp_path: Path, text: str, error: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(text.encode("latin-1"))
    done = run("--config", path, "config", "check")
    assert done.exit_code == 1
    assert f"{path}" in done.output.replace("\n", "")
    assert error in done.output


def test_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    done = run("--config", tmp_path / "none.toml", "config", "check")
    assert done.exit_code == 1
    assert "none.toml: No such file or directory" in done.output


def test_token_is_not_shown_by_the_check(file: Path) -> None:
    file.write_text('[serve]\ninput = "sim://"\nview_token = "nobody-else-knows"\n')
    done = run("--config", file, "config", "check")
    assert done.exit_code == 0, done.output
    assert "nobody-else-knows" not in done.output
    assert "(not shown)" in done.output


def test_values_that_make_no_sense_are_found_by_the_check(file: Path) -> None:
    done = run("--config", file, "config", "check", EMSTREAM_SERVE_FRAMES="-1")
    assert done.exit_code == 2
    assert "frames must be at least 1, got -1" in done.output


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("max_batch = 0", "max_batch must be at least 1 frame, got 0"),
        ("slots = 1", "slots must be at least 2 batches, got 1"),
        ('expect = "512x512:int64"', "with a type of uint8, uint16"),
        (
            'expect = "100000x100000:float32"',
            "is a frame of 38,147 MiB, and frames above 256 MiB are rejected",
        ),
        ("queue = 0", "queue must be at least 1 message, got 0"),
        ("threads = 0", "threads must be at least 1, got 0"),
        ('precision = "f16"', "precision must be one of bf16, f32, got 'f16'"),
        ('device = "gpu"', "device must be auto, cpu or GPU numbers"),
        ("look_back = 10", "--look-back and --split are for recordings; give --record, too"),
        ('record = "x.h5"\nsplit = "10 bananas"', "split"),
        ('metrics = "0.0.0.0:9095"', "cannot serve metrics on 0.0.0.0:9095: other machines can reach it"),
        ('output = "tcp://*:5556"', "cannot publish on tcp://*:5556: other machines can reach it"),
        ('control = "tcp://*:5557"', "cannot publish on tcp://*:5557: other machines can reach it"),
        ('engine = "/nowhere.onnx"', "no engine at /nowhere.onnx"),
        ('fallback = "/nowhere.onnx"', "no engine at /nowhere.onnx"),
        ('mask = "/nowhere.tif"', "/nowhere.tif"),
        ('key = "/nowhere"\nadmit = "/"', "cannot read /nowhere"),
    ],
)
def test_what_serve_would_refuse_is_found_by_the_check(tmp_path: Path, line: str, error: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(f'[serve]\ninput = "sim://"\n{line}\n')
    done = run("--config", path, "config", "check")
    assert done.exit_code in (1, 2)
    assert error in done.output


def test_input_that_no_source_takes_is_found_by_the_check() -> None:
    done = run("config", "check", EMSTREAM_SERVE_INPUT="foo://x")
    assert done.exit_code == 2
    assert "scheme must be one of tcp, " in done.output


def test_keys_and_who_may_connect_are_looked_at_by_the_check(tmp_path: Path) -> None:
    keys = tmp_path / "displays"
    _, secret = make("service", tmp_path)
    environment = {"EMSTREAM_SERVE_KEY": str(secret), "EMSTREAM_SERVE_ADMIT": str(keys)}
    done = run("config", "check", EMSTREAM_SERVE_INPUT="sim://", **environment)
    assert done.exit_code == 1
    assert f"there is no folder {keys}" in done.output
    keys.mkdir()
    done = run(
        "config", "check", EMSTREAM_SERVE_INPUT="sim://", EMSTREAM_SERVE_OUTPUT="tcp://*:5556", **environment
    )
    assert done.exit_code == 0, done.output


def test_file_given_in_the_place_of_a_command_is_explained(file: Path) -> None:
    done = run("config", "check", file)
    assert done.exit_code == 2
    assert f"a file goes before: --config {file} config check" in done.output.replace("\n", "")


def test_log_lines_are_json_on_request() -> None:
    record = logging.LogRecord("emstream.x", logging.WARNING, "f", 1, 'a "quote"\nand %d', (5,), None)
    line = JsonFormatter().format(record)
    assert "\n" not in line
    assert json.loads(line) | {"time": ""} == {
        "time": "",
        "level": "WARNING",
        "logger": "emstream.x",
        "message": 'a "quote"\nand 5',
    }


def test_limits_are_options_like_the_others(file: Path) -> None:
    file.write_text('[serve]\ninput = "sim://"\nmax-rate = 500\nqueue_mib = 64\n')
    found = checked("--config", file, EMSTREAM_SERVE_MAX_HEADER_KIB="128")
    assert found["max_rate"] == {"value": 500.0, "from": str(file)}
    assert found["queue_mib"] == {"value": 64, "from": str(file)}
    assert found["max_header_kib"] == {"value": 128, "from": "environment: EMSTREAM_SERVE_MAX_HEADER_KIB"}


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("max_rate = 0", "max_rate must lie in 0-1000000 frames/s, got 0.0"),
        ("max_header_kib = 0", "max_header_kib must lie in 1-16384 KiB, got 0 KiB"),
        ("max_header_kib = 100000", "max_header_kib must lie in 1-16384 KiB, got 100000 KiB"),
        ("queue_mib = 0", "queue_mib must lie in 1-1048576 MiB, got 0 MiB"),
        ("max_frame_mib = -1", "max_frame_mib must lie in 1-1048576 MiB, got -1 MiB"),
        ("drain_s = -1", "drain_s must lie in 0-1000000 s, got -1.0 s"),
        ("max_wait_ms = nan", "max_wait_ms must lie in 0-1000000 ms, got nan ms"),
    ],
)
def test_limits_that_make_no_sense_are_refused(file: Path, line: str, text: str) -> None:
    file.write_text(f'[serve]\ninput = "sim://"\n{line}\n')
    done = run("--config", file, "config", "check")
    assert done.exit_code == 2
    assert text in done.output


def test_variable_that_is_misspelt_is_named(caplog: pytest.LogCaptureFixture) -> None:
    done = run("config", "check", EMSTREAM_SERVE_INPUT="sim://", EMSTREAM_SERVE_ENGIN="identity")
    assert done.exit_code == 1
    assert "EMSTREAM_SERVE_ENGIN belongs to no option; did you mean EMSTREAM_SERVE_ENGINE?" in done.stderr
    done = run(
        "info",
        "identity",
        EMSTREAM_OTHERS_THING="1",
        EMSTREAM_VIEW_TOKEN="t",
        EMSTREAM_ENGINE_SWAP_TIMEOUT_S="3",
    )
    assert done.exit_code == 0
    assert "EMSTREAM_OTHERS_THING belongs to no option" in caplog.text + done.stderr
    assert "VIEW_TOKEN" not in caplog.text + done.stderr
    assert "TIMEOUT_S" not in caplog.text + done.stderr


def said(done: Any) -> str:
    """The output in one line, without the frame that is drawn around wrong use."""
    return re.sub(r"[\s│]+", " ", done.output)


# Command, what it needs besides, option, a value of it that is refused, and what the error says of that.
REFUSED = [
    ("serve", "--input sim://", "max_batch", 0, "max_batch must be at least 1 frame, got 0"),
    ("serve", "--input sim://", "slots", 1, "slots must be at least 2 batches, got 1"),
    ("serve", "--input sim://", "queue_mib", 0, "queue_mib must lie in 1-1048576 MiB, got 0 MiB"),
    ("serve", "--input sim://", "max_frame_mib", 0, "max_frame_mib must lie in 1-1048576 MiB, got 0 MiB"),
    ("serve", "--input sim://", "max_header_kib", 99999, "max_header_kib must lie in 1-16384 KiB, got 99999"),
    ("serve", "--input sim://", "max_rate", -2.5, "max_rate must lie in 0-1000000 frames/s, got -2.5"),
    ("serve", "--input sim://", "stall_limit_s", -3.0, "stall_limit_s must lie in 0-1000000 s, got -3.0 s"),
    ("serve", "--input sim://", "gain", 0.0, "gain must be positive, got 0.0 ADU per electron"),
    ("serve", "--input sim://", "offset", 1e13, "offset must lie within 1e+12 ADU of 0, got 1"),
    ("serve", "--input sim://", "binning", 0, "binning must be at least 1 pixel, got 0"),
    ("serve", "--input sim://", "roi", "8x8", "roi must look like 512x512+64+128"),
    ("serve", "--input sim://", "expect", "big", "expect must look like 512x512:uint8"),
    ("serve", "--input sim://", "metrics", "here", "metrics must be HOST:PORT"),
    ("serve", "--input sim://", "engine", "/nowhere.onnx", "no engine at /nowhere.onnx"),
    ("serve", "--input sim://", "precision", "f16", "precision must be one of bf16, f32, got 'f16'"),
    ("serve", "--input sim://", "threads", 0, "threads must be at least 1, got 0"),
    ("serve", "--input sim://", "look_back", 5.0, "--look-back and --split are for recordings"),
    ("serve", "--input sim:// --record {folder}", "look_back", -5.0, "look-back must lie in 0-1000000 s, got -5.0"),
    ("serve", "--input sim://", "view_port", -5, "view-port must lie in 0-65535, got -5"),
    ("serve", "--input sim:// --engine identity", "output", "tcp://*:5556", "cannot publish on tcp://*:5556"),
    ("serve", "--input sim://", "output", "x?queue=0", "--output 'x?queue=0'"),
    ("serve", "--input sim://", "key", "mine.key_secret", "--key takes --admit"),
    ("camera", "", "rate", -3.0, "rate must be positive, got -3.0 frames/s"),
    ("camera", "", "gap", 2.0, "gap must be a probability from 0 to 1, got 2.0"),
    ("camera", "", "stall_every", -1, "stall-every must not be negative, got -1 frames"),
    ("camera", "", "dose", -0.5, "dose must be positive, got -0.5 electrons/pixel"),
    ("camera", "--protocol dectris", "thresholds", 9, "thresholds must lie in 1-8, got 9"),
    ("camera", "", "dead", 4, "--dead: only with --protocol dectris"),
    ("demo", "--headless", "height", 0, "height must lie in 16-16384, got 0 pixels"),
    ("record", "{folder}/r.h5", "split", "10 apples", "split must be a size such as 10GiB, got '10 apples'"),
    ("record", "{folder}/r.h5", "look_back", -5.0, "look-back must lie in 0-1000000 s, got -5.0 s"),
    ("record", "{folder}/r.h5 --look-back 1", "frames", 7, "--frames and --look-back exclude each other"),
    ("view", "", "port", 70000, "port must lie in 0-65535, got 70000"),
    ("view", "", "token", "short", "a token must have at least 8 characters, got 5; give a longer --token"),
    ("denoise", "{folder}/in.npy {folder}/out.npy", "device", "gpu", "device must be auto, cpu or GPU numbers"),
    ("export", "--triton {folder}", "backend", "tea", "backend must be one of onnxruntime, openvino, got 'tea'"),
    ("build", "x.onnx -o x.plan", "size", "big", "size must look like 512x512 (rows x columns), got 'big'"),
    ("build", "x.onnx -o x.plan", "max_batch", 0, "largest batch must be at least 1 frame, got 0"),
]  # fmt: skip
REFUSED_IDS = [f"{command}-{option}-{value}" for command, _, option, value, _ in REFUSED]


@pytest.mark.parametrize(("command", "others", "option", "value", "error"), REFUSED, ids=REFUSED_IDS)
@pytest.mark.parametrize("way", ["flag", "variable", "file"])
def test_value_that_makes_no_sense_is_refused_with_where_it_came_from(
    tmp_path: Path, way: str, command: str, others: str, option: str, value: Any, error: str
) -> None:
    flag = f"--{option.replace('_', '-')}"
    arguments = [command, *others.format(folder=tmp_path).split()]
    if way == "flag":
        done, where = run(*arguments, flag, value), "the command line"
    elif way == "variable":
        where = f"EMSTREAM_{command}_{option}".upper().replace("VIEW_TOKEN_TOKEN", "VIEW_TOKEN")
        done = run(*arguments, **{where: str(value)})
    else:
        path = tmp_path / "emstream.toml"
        path.write_text(f"[{command}]\n{option} = {json.dumps(value)}\n")
        done, where = run("--config", path, *arguments), f"{path}, [{command}]"
    assert done.exit_code in (1, 2)
    assert error in said(done)
    assert f"{flag} is from {where}" in said(done)


@pytest.mark.parametrize(
    ("option", "value", "error"),
    [
        ("max_batch", "many", "'many'"),
        ("gain", "high", "'high'"),
        ("overrun", "never", "'never' is not one of 'drop-oldest', 'drop-newest', 'block'"),
        ("view", "maybe", "'maybe'"),
    ],
)
def test_value_of_another_type_is_refused_with_where_it_came_from(
    tmp_path: Path, option: str, value: str, error: str
) -> None:
    flag, variable = f"--{option.replace('_', '-')}", f"EMSTREAM_SERVE_{option.upper()}"
    path = tmp_path / "emstream.toml"
    path.write_text(f'[serve]\n{option} = "{value}"\n')
    if option != "view":  # a flag alone
        done = run("serve", "--input", "sim://", flag, value)
        assert done.exit_code == 2
        assert f"{flag} is from the command line" in said(done)
        assert error in said(done)
    done = run("serve", "--input", "sim://", **{variable: value})
    assert done.exit_code == 2
    assert f"{flag} is from {variable}" in said(done)
    assert error in said(done)
    done = run("--config", path, "serve", "--input", "sim://")
    assert done.exit_code == 1
    assert f"{path}: [serve] {option} = {value!r}: " in said(done)


def test_options_of_all_commands_and_of_commands_of_groups_say_where_they_came_from() -> None:
    done = run("info", EMSTREAM_LOG_JSON="perhaps")
    assert done.exit_code == 2
    assert "'perhaps'" in said(done)
    assert "--log-json is from EMSTREAM_LOG_JSON" in said(done)
    done = run("info", EMSTREAM_CONFIG="/nowhere.toml")
    assert done.exit_code == 1
    assert "/nowhere.toml: No such file or directory (--config is from EMSTREAM_CONFIG)" in said(done)
    done = run("engine", "back", EMSTREAM_ENGINE_BACK_TIMEOUT_S="soon")
    assert done.exit_code == 2
    assert "--timeout-s is from EMSTREAM_ENGINE_BACK_TIMEOUT_S" in said(done)
    done = run("info", "/nowhere.onnx")
    assert done.exit_code == 1
    assert "(ENGINE is from the command line)" in said(done)


def test_check_says_where_a_value_that_serve_would_refuse_came_from(file: Path) -> None:
    done = run("--config", file, "config", "check", EMSTREAM_SERVE_QUEUE_MIB="0")
    assert done.exit_code == 2
    assert "got 0 MiB (--queue-mib is from EMSTREAM_SERVE_QUEUE_MIB) Try" in said(done)
    done = run("--config", file, "config", "check", EMSTREAM_SERVE_QUEUE_MIB="lots")
    assert done.exit_code == 2
    assert "'lots'" in said(done)
    assert said(done).count("--queue-mib is from EMSTREAM_SERVE_QUEUE_MIB") == 1
    file.write_text('[serve]\ninput = "sim://"\nqueue_mib = 0\n')
    done = run("--config", file, "config", "check")
    assert done.exit_code == 2
    assert f"got 0 MiB (--queue-mib is from {file}, [serve])" in said(done)


def test_only_values_that_the_error_speaks_of_are_named(file: Path) -> None:
    done = run(
        "--config", file, "serve", "--frames", 0, EMSTREAM_SERVE_QUEUE="10", EMSTREAM_SERVE_DRAIN_S="0"
    )
    assert done.exit_code == 2
    assert "frames must be at least 1, got 0 (--frames is from the command line) Try" in said(done)
    done = run("serve", "--input", "sim://", "--key", "mine", EMSTREAM_SERVE_CAMERA_KEY="")
    assert "too (--key is from the command line) Try" in said(done)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("the engine has been stalled for 120 s, 1 frames are in flight; start the service again", ""),
        ("frames must be at least 2, got 1", "--frames is from the command line"),
    ],
)
def test_number_that_comes_before_a_word_is_no_option(text: str, found: str) -> None:
    root = get_command(app)
    arguments = ["--input", "sim://", "--frames", "1"]
    parent = root.make_context("emstream", ["serve", *arguments])
    context = root.commands["serve"].make_context("serve", arguments, parent=parent)  # type: ignore[attr-defined]
    assert origins(context, text) == found


def test_several_values_that_do_not_go_together_are_all_named(file: Path) -> None:
    done = run("--config", file, "record", "r.h5", "--frames", 7, EMSTREAM_RECORD_LOOK_BACK="3")
    assert done.exit_code == 2
    assert "--look-back is from EMSTREAM_RECORD_LOOK_BACK; --frames is from the command line" in said(done)
