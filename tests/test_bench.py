"""The benches run and write what the README reads. Their numbers are nobody's business here."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("psutil")

ROOT = Path(__file__).parent.parent
STAMP = {"command", "commit", "date", "hardware"}
PERCENTILES = {"p50", "p99", "p99_9", "max"}
LEDGER = {"received", "published", "dropped", "rejected", "failed", "in_flight", "missing"}


@pytest.fixture
def bench(tmp_path: Path) -> Any:
    """Run ``python -m bench.NAME --quick`` and read its JSON."""

    def run(name: str, *arguments: str) -> dict[str, Any]:
        out = tmp_path / "out.json"
        command = [sys.executable, "-m", f"bench.{name}", "--quick", "--json", str(out)]
        done = subprocess.run(
            [*command, "--results", str(tmp_path), *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert done.returncode == 0, done.stderr
        results: dict[str, Any] = json.loads(out.read_text())
        assert results.keys() >= STAMP
        assert results["hardware"].keys() >= {"processor", "cores", "memory_gib", "libraries"}
        assert json.loads((tmp_path / f"{name}.json").read_text()) == results
        assert done.stdout.strip() in (tmp_path / f"{name}.md").read_text()
        return results

    return run


def test_throughput_compares_with_the_relay_and_loses_nothing(bench: Any) -> None:
    results = bench("throughput", "--types", "float32", "uint8", "--size", "64", "--proof", "200")
    assert results["types"].keys() == {"float32", "uint8"}
    for summary in results["types"].values():
        assert summary.keys() >= {"relay_frames_per_s", "emstream_frames_per_s", "emstream_mb_per_s", "ratio"}
    assert {r["middle"] for r in results["rounds"]} == {"relay", "emstream"}
    for played in [*results["rounds"], results["proof"]]:
        assert (played["lost"], played["wrong"]) == (0, 0)
        if played["middle"] == "emstream":
            assert played["ledger"].keys() == LEDGER
            assert played["ledger"]["published"] == played["ledger"]["received"] == played["frames"]


def test_viewers_are_compared_with_nobody_in_one_run(bench: Any) -> None:
    results = bench("viewers", "--engine", "identity", "--size", "64", "--rate", "20")
    assert results["latency_ms"].keys() == {"alone", "watched"}
    for kind, latency in results["latency_ms"].items():
        assert latency.keys() == {"frames", *PERCENTILES}
        assert latency["frames"]
        assert 0 < results["pipeline_ms"][kind]["p50"] <= latency["max"]
    assert results["ledger"].keys() == LEDGER
    assert results["ledger"]["received"] == results["ledger"]["published"]
    (shown,) = results["pictures"]
    assert min(shown.values()) > 0


def test_cameras_compare_with_the_library_and_lose_nothing(bench: Any) -> None:
    pytest.importorskip("dectris.compression", reason="needs: pip install 'emstream[cameras]' bitshuffle")
    from bench.cameras import _markdown

    results = bench("cameras", "--size", "64", "--doses", "0.45")
    assert [each["compression"] for each in results["decode"]] == ["bslz4", "lz4", "none"]
    for each in results["decode"]:
        assert each.keys() >= {"alone_per_s", "slot_per_s", "ratio", "quartiles", "message_bytes"}
        assert each["sustained"].keys() == {"frames", "frames_per_s", "mb_per_s", "lost"}
        assert each["sustained"]["lost"] == 0
    targets = [row.split("|")[-2].strip() for row in _markdown(results).splitlines()[2:5]]
    assert targets == ["hit" if results["decode"][0]["ratio"] >= results["target"] else "miss", "-", "-"]


def test_fuzz_says_what_came_of_the_damaged_messages(bench: Any) -> None:
    for package in ("dectris.compression", "p4p", "numcodecs"):
        pytest.importorskip(package, reason="needs: pip install 'emstream[cameras]'")
    results = bench("fuzz")
    assert set(results["decoders"]) == {"native", "array-1.0", "dectris", "dectris1", "pva", "merlin"}
    for each in results["decoders"].values():
        assert each.keys() == {"frames", "rejected", "reasons", "slowest_ms", "grown_mib"}
        assert each["frames"] > 0
        assert each["reasons"] > 1


def test_recorder_writes_an_hours_frames_and_survives_a_kill(bench: Any) -> None:
    pytest.importorskip("hdf5plugin")
    results = bench("record", "--size", "64", "--split", "1MiB")
    hour = results["hour"]
    assert hour["recorded"] == {"raw": 200, "denoised": 200}
    assert hour["ended"] == "frames counted"
    assert hour["files"] > 1
    assert (hour["wrong"], hour["missing"], sum(hour["lost"].values()), sum(hour["unheard"].values())) == (
        0,
        0,
        0,
        0,
    )
    assert hour.keys() >= {"frames_per_s", "mb_per_s", "compression", "of_camera"}
    (kill,) = results["kills"]
    assert kill["whole"]
    assert kill["frames"] > 0
    assert kill.keys() == {"frames", "lost_ms", "whole"}


def test_latency_has_every_stage_at_every_load(bench: Any, tmp_path: Path) -> None:
    results = bench("latency", "--engine", "identity", "--full-load", "100", "--size", "64", "--soak", "1")
    assert results["summary"].keys() == {
        "saturation_of_engine",
        "p99_at_half_load_of_engine_ms",
        "added_at_half_load_ms",
        "rss_growth",
        "ledgers_add_up",
    }
    assert results["engine"].keys() >= {"name", "sha256", "device", "ms", "frames_per_s"}
    assert [(run["load"], run["overrun"]) for run in results["runs"]] == [
        (0.5, "drop-oldest"),
        (1.2, "drop-oldest"),
        (1.2, "drop-newest"),
        (1.2, "block"),
    ]
    for run in [*results["runs"], results["soak"]]:
        assert run["latency_ms"].keys() == run["added_ms"].keys() == PERCENTILES
        assert list(run["stages_ms"]) == [
            "camera_to_received",
            "received_to_batched",
            "batched_to_inferred",
            "inferred_to_published",
            "published_to_subscriber",
        ]
        assert run["ledger"].keys() == LEDGER
        assert run["arrived"] + run["lost"] + run["lost_by_subscriber"] == run["frames"]
        assert run["rss_mib"].keys() == {"first_second", "end", "max", "growth"}
    assert (tmp_path / "latency.png").exists() == (find_spec("matplotlib") is not None)


def test_engines_has_a_row_or_a_reason_for_each(bench: Any) -> None:
    results = bench("engines", "--size", "64")
    assert list(results["engines"]) == ["openvino_bf16", "openvino_f32", "onnxruntime", "torch"]
    for row in results["engines"].values():
        assert row.keys() in (
            {"not_measured"},
            {"ms", "quartiles_ms", "frames", "frames_per_s", "times_as_fast_as", "difference"},
        )
    for library, row in {"openvino": "openvino_f32", "onnxruntime": "onnxruntime"}.items():
        assert ("not_measured" in results["engines"][row]) == (find_spec(library) is None)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("throughput", ["--window", "1"]), ("throughput", ["--frames", "10"]), ("latency", ["--loads", "0"])],
)
def test_an_argument_that_makes_no_sense_is_wrong_use(name: str, arguments: list[str]) -> None:
    command = [sys.executable, "-m", f"bench.{name}", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert arguments[0] in done.stderr


def test_simulator_of_others_is_received_whole_and_outlived(bench: Any) -> None:
    pytest.importorskip("p4p", reason="needs: pip install 'emstream[cameras]'")
    if not (Path(sys.executable).parent / "pvapy-ad-sim-server").exists():
        pytest.skip("needs: pip install pvapy")
    whole, killed = bench("interop", "--only", "pva")["cases"]
    assert whole["sent"] == whole["ledger"]["received"] > 100
    assert killed["lives"] == len(killed["series"]) == 3
    assert killed["compared"] >= 450
    for case in (whole, killed):
        assert case["exact"]
        assert case["wrong"] == case["ledger"]["missing"] == case["ledger"]["rejected"] == 0


def test_chaos_keeps_the_ledger_exact(bench: Any) -> None:
    results = bench("chaos", "--schedules", "2", "--seed", "3")
    assert results["exact"] == 2, [each["wrong"] for each in results["schedules"]]
    assert all(event["back_s"] >= 0 for each in results["schedules"] for event in each["events"])


def test_trust_is_held_against_the_truth(bench: Any) -> None:
    results = bench("trust")
    assert set(results["scenes"]) == {"still", "drifting and hopping"}
    assert all(each["streams"] == 2 for each in results["scenes"].values())


def test_soak_compares_the_last_minute_with_the_first_and_loses_nothing(bench: Any, tmp_path: Path) -> None:
    results = bench("soak", "--engine", "engines/unet32.onnx", "--minutes", "0.1", "--frames", "2000")
    assert list(results["parts"]) == ["engine", "identity64", "identity512"]
    for name, each in results["parts"].items():
        assert each["exact"], each["ledger"]
        assert (each["lost"], each["wrong"]) == (0, 0)
        assert each["latency_ms"]["first"].keys() == each["latency_ms"]["last"].keys() == PERCENTILES
        assert each["rss_mib"].keys() == {"first", "last", "growth", "slope_per_hour"}
        assert (
            each["fds"].keys() == each["threads"].keys() == each["others_cores"].keys() == {"first", "last"}
        )
        assert min(each["fds"]["first"], each["threads"]["first"], each["rss_mib"]["first"]) > 1
        rows = (tmp_path / f"soak.{name}.csv").read_text().splitlines()
        assert rows[0].startswith("seconds,rss_mib,fds,threads")
        assert sum(int(row.split(",")[6]) for row in rows[1:]) == each["arrived"]
    assert results["parts"]["identity64"]["arrived"] == 2000
    assert (tmp_path / "soak.png").exists() == (find_spec("matplotlib") is not None)
    again = bench("soak", "--parts", "identity64", "--frames", "1000")["parts"]
    assert again["identity64"]["arrived"] == 1000
    assert again["engine"] == results["parts"]["engine"]


def test_flood_is_rejected_to_the_last_message_and_survived(bench: Any) -> None:
    results = bench("flood", "--messages", "3000")
    assert results["lives"]
    assert results["input"]["exact"], results["input"]
    assert sum(results["input"]["malformed"].values()) == results["input"]["ledger"]["rejected"] == 3000
    assert len(results["input"]["malformed"]) == 7
    assert results["control"]["exact"], results["control"]
    assert 0 < results["control"]["refused"] < sum(results["control"]["malformed"].values()) == 3000
    for name in ("input", "control"):
        assert results[name]["rss_mib"].keys() == {"before", "after", "max", "second_half", "growth"}


def test_stranger_gets_nothing_and_the_admitted_everything(bench: Any) -> None:
    results = bench("knock", "--size", "64", "--connections", "30")
    assert list(results["kinds"]) == [
        "nobody knocks",
        "no key",
        "unknown key",
        "wrong server key",
        "says nothing",
    ]
    for kind, each in results["kinds"].items():
        if kind != "nobody knocks":
            assert each["tried"] == each["connected"] == 10
            assert (each["let_in"], each["messages"], each["in_the_dark"]) == (0, 0, 0)
    assert results["exact"], results["ledger"]
    assert (results["lost"], results["wrong"]) == (0, 0)
    assert results["fds"]["max"] >= results["fds"]["before"] > 1


def test_engines_are_swapped_between_two_frames(bench: Any) -> None:
    results = bench("swap", "--engines", "engines/unet32.onnx", "identity", "--size", "64", "--swaps", "2")
    assert results["exact"], results["ledger"]
    assert (results["lost"], results["skipped"], results["twice_or_late"]) == (0, 0, 0)
    assert [each["engine"] for each in results["made_by"]] == ["identity", "unet32", "identity"]
    assert sum(each["frames"] for each in results["made_by"]) == results["sent"]
    assert results["swaps_seen"] == 2
    assert results["longest_gap_of_each_swap_ms"]["max"] > 0
    assert len(results["rss_mib"]["after_each"]) == 3
