"""The files in emstream/deploy name what there is."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest
from typer.main import get_command
from typer.testing import CliRunner

from emstream.cli import app
from emstream.ledger import Ledger
from emstream.metrics import Watched, _Collector

DEPLOY = Path(__file__).parents[1] / "emstream/deploy"


def test_dashboard_asks_for_metrics_that_there_are() -> None:
    ledger = Ledger()
    registry = CollectorRegistry()
    registry.register(
        _Collector(Watched(ledger, lambda: 0, lambda: {"name": "x"}, lambda: {"engine": 2.0}, lambda: 1))
    )
    text = generate_latest(registry).decode()
    there = set(re.findall(r"^(emstream_\w+)", text, re.M))
    dashboard = json.loads((DEPLOY / "grafana.json").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert len(asked) > 8
    for expression in asked:
        names = re.findall(r"emstream_\w+", expression)
        assert names
        assert set(names) <= there, expression
    # A range shorter than two scrapes has no rate, and how often Prometheus scrapes only Grafana knows.
    assert {"$__rate_interval"} == set(re.findall(r"\[(.*?)\]", " ".join(asked)))
    stages = set(re.findall(r'stage="(\w+)"', text))
    assert set(re.findall(r'stage="(\w+)"', " ".join(asked))) <= stages
    outcomes = set(re.findall(r'outcome="(\w+)"', text))
    assert set(re.findall(r'outcome="(\w+)"', " ".join(asked))) <= outcomes


@pytest.mark.parametrize("name", ["emstream.service", "Containerfile"])
def test_commands_are_ours(name: str) -> None:
    text = (DEPLOY / name).read_text()
    commands = get_command(app).commands  # type: ignore[attr-defined]
    assert "serve" in text
    assert "serve" in commands
    options = {option for each in get_command(app).params for option in each.opts}
    assert "--config" in options


def test_check_that_the_unit_names_runs_as_it_is_written(tmp_path: Path) -> None:
    file = tmp_path / "emstream.toml"
    file.write_text('[serve]\ninput = "sim://"\n')
    named = re.search(r"emstream (--config \S+ config check)", (DEPLOY / "emstream.service").read_text())
    assert named
    done = CliRunner().invoke(app, named[1].replace("/etc/emstream.toml", str(file)).split())
    assert done.exit_code == 0, done.output


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
def test_unit_is_one_that_systemd_understands(tmp_path: Path) -> None:
    text = (DEPLOY / "emstream.service").read_text().replace("/opt/emstream/bin/emstream", "/bin/true")
    unit = tmp_path / "emstream.service"
    unit.write_text(text.replace("User=emstream", "User=root"))
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    assert "Unknown" not in done.stderr
    assert done.returncode == 0, done.stderr
