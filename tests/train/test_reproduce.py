"""The whole chain: what it runs, what it leaves out, what it runs again."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the laboratory needs: pip install 'emstream[train]'")

from train import reproduce
from train.recipe import Recipe
from train.reproduce import FULL, GROUPS, SMALL, TEM_ROWS, Step, steps


def chain(out: Path, scale: reproduce.Scale = SMALL) -> dict[str, Step]:
    return {step.name: step for step in steps(out, scale)}


def option(step: Step, name: str) -> str:
    return step.command[step.command.index(name) + 1]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Commands do nothing but leave their output; the names of those that were run."""
    names: list[str] = []

    def instead(command: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        step = next(step for step in known if step.command == command)
        names.append(step.name)
        step.output.parent.mkdir(parents=True, exist_ok=True)
        step.output.write_text(" ".join(command))
        return subprocess.CompletedProcess(command, 0)

    known: list[Step] = []
    every = reproduce.steps

    def remembered(out: Path, scale: reproduce.Scale) -> list[Step]:
        known[:] = every(out, scale)
        return known

    monkeypatch.setattr(reproduce, "steps", remembered)
    monkeypatch.setattr(reproduce.subprocess, "run", instead)
    return names


def call(monkeypatch: pytest.MonkeyPatch, out: Path, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", ["reproduce", "--small", "--out", str(out), *options])
    reproduce.main()


def test_one_data_set_serves_both_matrices_and_everything_else(tmp_path: Path) -> None:
    every = chain(tmp_path)
    assert [name for name in every if name.startswith("simulate")] == [
        "simulate-train", "simulate-val", "simulate-test",
    ]  # fmt: skip
    tables = every["tables"].command
    assert tables.count("--generalisation") == 2
    assert {"shape", "contrast"} < set(tables)
    evaluated = every["evaluate"].command
    assert "contrast" in evaluated
    assert {str(tmp_path / "runs" / row / "best.pt") for row in TEM_ROWS} < set(evaluated)


@pytest.mark.parametrize(("scale", "device"), [(SMALL, "cpu"), (FULL, "cuda")])
@pytest.mark.parametrize("name", ["tables", "evaluate", "doses"])
def test_networks_are_scored_where_they_are_trained(
    tmp_path: Path, scale: reproduce.Scale, device: str, name: str
) -> None:
    command = chain(tmp_path, scale)[name].command
    assert command[command.index("--device") + 1] == device


@pytest.mark.parametrize("scale", [SMALL, FULL])
def test_every_recipe_of_the_chain_can_be_read(tmp_path: Path, scale: reproduce.Scale) -> None:
    for step in chain(tmp_path, scale).values():
        if step.recipe is not None:
            recipe = Recipe.read(step.recipe)
            if scale is SMALL:
                assert (recipe.crop_px, recipe.batch) == (128, 2)
            assert recipe.train in (None, (tmp_path / "data/train").as_posix())


@pytest.mark.parametrize("scale", [SMALL, FULL])
def test_networks_of_a_matrix_train_for_the_same_number_of_steps(
    tmp_path: Path, scale: reproduce.Scale
) -> None:
    every = chain(tmp_path, replace(scale, minutes_each=3))
    members = [every[f"fit-{group}"] for groups in GROUPS.values() for group in groups]
    assert {option(member, "--steps") for member in members} == {str(scale.steps_matrix)}
    assert not any("--hours" in member.command for member in members)
    assert option(every["fit-unet32"], "--hours") == "0.05"


def test_one_specimen_stays_one(tmp_path: Path) -> None:
    every = chain(tmp_path, replace(SMALL, specimens=1))
    counts = [option(s, "--specimens") for s in every.values() if "--specimens" in s.command]
    assert counts == ["1", "16", "16"]


@pytest.mark.usefixtures("ran")
@pytest.mark.parametrize("option", ["--minutes", "--steps", "--specimens"])
def test_nothing_and_less_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, tmp_path, option, "0")
    assert stopped.value.code == 2
    assert f"{option} must be positive, got 0" in capsys.readouterr().err


def test_crops_that_a_network_cannot_take_are_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ran: list[str]
) -> None:
    with pytest.raises(SystemExit, match=r"unet32-six\.toml: crop_px must be a multiple of 64, got 160"):
        call(monkeypatch, tmp_path, "--crop-px", "160")
    assert ran == []


def test_the_chain_scores_other_doses_than_the_papers(tmp_path: Path) -> None:
    command = chain(tmp_path)["doses"].command
    assert command[command.index("--doses") + 1 : command.index("--out")] == [
        "0.1",
        "0.2",
        "0.45",
        "1",
        "3",
        "10",
    ]


def test_what_is_done_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ran: list[str]) -> None:
    call(monkeypatch, tmp_path)
    assert ran == list(chain(tmp_path))
    ran.clear()
    call(monkeypatch, tmp_path)
    assert ran == []


def test_other_minutes_train_again_in_fresh_folders_and_score_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ran: list[str]
) -> None:
    call(monkeypatch, tmp_path)
    ran.clear()
    call(monkeypatch, tmp_path, "--minutes", "2")
    rows = [f"fit-{row}" for row in (*TEM_ROWS, *reproduce.PHOTOGRAPH_ROWS)]
    assert ran == [*rows, "tables", "evaluate", "doses", "explain"]
    assert (tmp_path / "earlier/wide64-1/best.pt").exists()
    assert not (tmp_path / "earlier/PtNp1-1").exists()


def test_a_changed_recipe_trains_that_row_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ran: list[str]
) -> None:
    call(monkeypatch, tmp_path)
    ran.clear()
    written = reproduce.recipe

    def changed(row: str, *others: object) -> Path:
        path = written(row, *others)
        if row == "durr":
            path.write_text(path.read_text().replace("seed = 1", "seed = 2"))
        return path

    monkeypatch.setattr(reproduce, "recipe", changed)
    call(monkeypatch, tmp_path)
    assert ran == ["fit-durr", "tables", "evaluate", "doses"]


def test_a_missing_output_is_made_again_and_what_needs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ran: list[str]
) -> None:
    call(monkeypatch, tmp_path)
    ran.clear()
    (tmp_path / "tuned.json").unlink()
    call(monkeypatch, tmp_path)
    assert ran == ["baselines", "tables", "evaluate"]


def test_a_killed_training_goes_on_in_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ran: list[str]
) -> None:
    done = reproduce.subprocess.run

    def killed(command: list[str], **more: object) -> subprocess.CompletedProcess[bytes]:
        if "train.fit" in command:
            (tmp_path / "runs/durr").mkdir(parents=True)
            raise KeyboardInterrupt
        return done(command, **more)

    with monkeypatch.context() as patch:
        patch.setattr(reproduce.subprocess, "run", killed)
        with pytest.raises(KeyboardInterrupt):
            call(monkeypatch, tmp_path)
    ran.clear()
    call(monkeypatch, tmp_path)
    assert ran[0] == "fit-durr"
    assert not (tmp_path / "earlier").exists()
