"""The GPU's bench, rehearsed on the CPU: what it writes, and that nothing stops it. Never how fast."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("psutil")

from bench.gpu.schedule import Schedule, main
from bench.gpu.speed import timeline, union
from bench.gpu.stage import NO_TIME, Context, Job, NotMeasured, Setting
from bench.gpu.stages import STAGES, Stage

ROOT = Path(__file__).parent.parent
STAMP = {"command": "python -m bench.gpu", "commit": "abc", "date": "2026-01-01", "hardware": {}}
FOUND = {"status", "why", "seconds", "rows", "notes", "facts", "targets"}
pytestmark = pytest.mark.skipif(os.name != "posix", reason="it ends processes by their group")


def rehearse(out: Path, *arguments: str, within_s: float = 100) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.gpu", "--dry-run", "--out", str(out), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=within_s)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in (out / "gpu.md").read_text()
    results: dict[str, Any] = json.loads((out / "gpu.json").read_text())
    return results


# -- a schedule of stages made for these tests -------------------------------------------


def stage(name: str, work: str, **changes: Any) -> Stage:
    values: dict[str, Any] = {
        "question": "Is it?",
        "columns": {"what": "what", "value": "value [ms]"},
        "keys": 1,
        "needs_s": 0.0,
        "limit_s": 30,
        "dry_s": 30,
    }
    return Stage(name=name, work=f"{__name__}:{work}", **values | changes)


def run(out: Path, *stages: Stage, budget_s: float = 60, again: bool = False) -> dict[str, Any]:
    """What the stages found, by name."""
    hardware = {
        "processor": "x",
        "features": [],
        "cores": 1,
        "memory_gib": 1,
        "load_average": 0,
        "system": "y",
    }
    stamp = {**STAMP, "hardware": {**hardware, "python": "3", "libraries": {}}}
    schedule = Schedule(out, stamp, "pretended", dry=True, stages=stages)
    schedule.run(stages, budget_s, again)
    assert json.loads((out / "gpu.json").read_text()) == schedule.results
    found: dict[str, Any] = schedule.results["stages"]
    return found


def works(context: Context) -> None:
    context.row(what="one", value=len(context.known))
    context.note("It is.")
    context.target("one", "1", "1", True)
    context.fact("times", context.facts.get("times", 0) + 1)


def raises(context: Context) -> None:
    context.row(what="before", value=1)
    raise ValueError("no such luck")


def dies(context: Context) -> None:
    context.row(what="before", value=1)
    os.kill(os.getpid(), signal.SIGSEGV)


def hangs(context: Context) -> None:
    context.row(what="before", value=1)
    time.sleep(1000)


def has_nothing(context: Context) -> None:
    raise NotMeasured("there is no such thing here")


def sweeps(context: Context) -> None:
    jobs = [{"what": what} for what in ("good", "bad", "dead", "absent", "fine")]
    context.sweep(measure, jobs, limit_s=30)


def measure(setting: Setting, what: str) -> Job:
    if what == "bad":
        raise ValueError("this one is bad")
    if what == "dead":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "absent":
        raise NotMeasured("not installed")
    return {"value": os.getpid()}


def runs_out(context: Context) -> None:
    context.sweep(measure, [{"what": "good"}])
    context._deadline_s = time.monotonic()
    context.sweep(measure, [{"what": "fine"}])


# -- the tests ------------------------------------------------------------------------------


def test_a_stage_that_fails_is_recorded_and_the_next_ones_run(tmp_path: Path) -> None:
    stages = [stage(name, name) for name in ("raises", "dies", "has_nothing", "works")]
    found = run(tmp_path, *stages)
    assert {name: each["status"] for name, each in found.items()} == {
        "raises": "failed",
        "dies": "failed",
        "has_nothing": "not measured",
        "works": "done",
    }
    assert "ValueError: no such luck" in found["raises"]["why"]
    assert "SIGSEGV" in found["dies"]["why"]
    assert found["has_nothing"]["why"] == "there is no such thing here"
    for name in ("raises", "dies"):
        assert found[name]["rows"] == [{"what": "before", "value": 1}]
    for each in found.values():
        assert each.keys() == FOUND
    text = (tmp_path / "gpu.md").read_text()
    assert all(words in text for words in ("no such luck", "Is it?", "value [ms]", "It is.", "Dry run"))
    assert "ValueError: no such luck" in (tmp_path / "gpu.log").read_text()


def test_a_stage_that_hangs_is_stopped_and_keeps_its_rows(tmp_path: Path) -> None:
    found = run(tmp_path, stage("hangs", "hangs", dry_s=4), stage("works", "works"))
    assert found["hangs"]["status"] == "partial"
    assert found["hangs"]["rows"] == [{"what": "before", "value": 1}]
    assert found["works"]["status"] == "done"


def test_what_the_budget_leaves_no_time_for_is_marked_and_measured_another_time(tmp_path: Path) -> None:
    stages = [stage("works", "works"), stage("late", "works")]
    found = run(tmp_path, *stages, budget_s=1.0)
    assert {each["status"] for each in found.values()} == {"not measured"}
    assert "were left" in found["late"]["why"]
    found = run(tmp_path, *stages)
    assert {each["status"] for each in found.values()} == {"done"}
    assert found["late"]["rows"] == [{"what": "one", "value": 2}]  # it knew of both


def test_stages_that_are_done_are_skipped_unless_asked_for_again(tmp_path: Path) -> None:
    only = stage("works", "works")
    assert run(tmp_path, only)["works"]["facts"] == {"times": 1}
    assert run(tmp_path, only)["works"]["facts"] == {"times": 1}
    assert "is done already" in (tmp_path / "gpu.log").read_text()
    assert run(tmp_path, only, again=True)["works"]["facts"] == {"times": 1}
    assert (tmp_path / "gpu.log").read_text().count("done after") == 2


def test_a_row_that_fails_costs_no_other_row_and_is_tried_again(tmp_path: Path) -> None:
    sweep = stage("sweeps", "sweeps")
    found = run(tmp_path, sweep)["sweeps"]
    rows = {row["what"]: row for row in found["rows"]}
    assert list(rows) == ["good", "bad", "dead", "absent", "fine"]
    assert rows["bad"]["why"] == "ValueError: this one is bad"
    assert "exit code" in rows["dead"]["why"]
    assert rows["absent"]["why"] == "not installed"
    assert rows["good"]["value"] != rows["fine"]["value"]  # processes
    assert found["status"] == "done"


def test_rows_without_time_make_a_stage_partial_and_its_others_are_kept(tmp_path: Path) -> None:
    short = stage("runs_out", "runs_out")
    first = run(tmp_path, short)["runs_out"]
    assert (first["status"], first["why"]) == ("partial", NO_TIME)
    assert first["rows"][1] == {"what": "fine", "why": NO_TIME}
    again = run(tmp_path, short)["runs_out"]
    assert again["rows"][0] == first["rows"][0]


def test_results_of_another_gpu_are_not_mixed_in(tmp_path: Path) -> None:
    run(tmp_path, stage("works", "works"))
    with pytest.raises(ValueError, match="holds results of gpu pretended"):
        Schedule(tmp_path, STAMP, "another", dry=True)


def test_a_dry_run_writes_every_key_and_resumes(tmp_path: Path) -> None:
    results = rehearse(tmp_path, "--stages", "machine,cuda", "--minutes", "1")
    assert results.keys() == {*STAMP, "gpu", "dry_run", "earlier", "stages"}
    assert results["dry_run"] is True
    assert results["stages"].keys() == {"machine", "cuda"}
    for each in STAGES:
        if each.name in results["stages"]:
            found = results["stages"][each.name]
            assert (found["status"], found["why"]) == ("done", None)
            assert found.keys() == FOUND
            assert all(row.keys() <= {*each.columns, "why"} for row in found["rows"])
    what = [row["what"] for row in results["stages"]["machine"]["rows"]]
    assert {"processor", "GPU", "driver", "import tensorrt_rtx", "import torch"} <= set(what)
    lines = [(row["package"], row["what"]) for row in results["stages"]["cuda"]["rows"]]
    assert len(lines) == len(set(lines)) == 16
    assert "Dry run: these figures say nothing about a GPU." in (tmp_path / "gpu.md").read_text()
    again = rehearse(tmp_path, "--stages", "machine,cuda", "--minutes", "1")
    assert again["stages"] == results["stages"]
    assert len(again["earlier"]) == 1


@pytest.mark.skipif(find_spec("openvino") is None, reason="OpenVINO is not installed")
def test_a_service_is_rehearsed_and_accounts_for_its_frames(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "unet32.ready").touch()  # spares looking at its .pt2 with PyTorch
    found = rehearse(tmp_path, "--stages", "lossless", "--minutes", "1")["stages"]["lossless"]
    assert found["status"] == "done", found["why"]
    (row,) = found["rows"]
    assert (row["arrived"], row["lost"], row["wrong"], row["unaccounted"]) == (200, 0, 0, 0)
    assert [target["met"] for target in found["targets"]] == [True]


@pytest.mark.parametrize("arguments", [["--stages", "engine,nonsense"], ["--minutes", "0"]])
def test_arguments_that_make_no_sense_are_wrong_use(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--dry-run", "--out", str(tmp_path), *arguments])
    assert ended.value.code == 2
    assert arguments[0] in capsys.readouterr().err or "nonsense" in arguments[1]


def test_macs_are_counted_over_the_convolutions() -> None:
    pytest.importorskip("torch")
    from bench.gpu.networks import RANDOM, Shape, macs_per_pixel

    assert macs_per_pixel(Shape(32)) == 54_176
    counted = {name: macs_per_pixel(shape) for name, shape in RANDOM.items() if name != "unet8"}
    assert counted == {"unet64": 216_064, "unet128": 862_976, "unet128x6": 936_704}


def test_a_timeline_knows_when_the_compute_stream_was_idle() -> None:
    def event(start: float, length: float, stream: int, kind: str = "kernel") -> dict[str, Any]:
        return {"ph": "X", "cat": kind, "ts": start, "dur": length, "args": {"stream": stream}}

    events = [
        event(0, 40, 7),
        event(30, 10, 7),  # within the one before
        event(50, 50, 7),
        event(35, 10, 8, "gpu_memcpy"),
        event(90, 60, 8, "gpu_memcpy"),  # goes on after the last kernel
        {"ph": "X", "cat": "cuda_runtime", "ts": 0, "dur": 500, "tid": 1},
        {"ph": "M", "name": "process_name"},
    ]
    found = timeline(events)
    assert found["compute_busy"] == 0.9
    assert found["any_busy"] == 0.95
    assert found["largest_gap_us"] == 10
    assert "10-50 us: 1, 10.0%" in found["gaps"]
    with pytest.raises(NotMeasured):
        timeline(events[-2:])


def test_spans_are_united() -> None:
    assert union([(5, 6), (0, 2), (1, 3), (3, 4)]).tolist() == [[0, 4], [5, 6]]
