"""What the commands say when something is wrong: one line, status 1, no traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the laboratory needs: pip install 'emstream[train]'")
pytest.importorskip("abtem", reason="the laboratory needs: pip install 'emstream[train]'")

import train
from emstream.errors import EngineError
from train import (
    baselines,
    camera_stack,
    evaluate,
    explain,
    export,
    fit,
    photographs,
    shards,
    simulate,
    tables,
)
from train.command import alone_in, explained, writable_file, writable_folder
from train.shards import Shard

ROOT = Path(__file__).parents[2]
RECIPE = """
network = "UNet"
base = 4
scales = 2
train = "images"
validate = "images"
steps = 1
batch = 1
crop_px = 32
learning_rate = 1e-3
compile = false
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a recipe, one shard of images and a file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "recipe.toml").write_text(RECIPE)
    (tmp_path / "images").mkdir()
    shard = Shard(
        images=np.ones((2, 64, 64), np.float16), parameters=['{"seed": 3, "defocus_nm": 1}'] * 2, sampling_a=0.1,
        settings={"seeds": [3]},
    )  # fmt: skip
    shards.write(Path("images/shard-000003.h5"), shard)
    return tmp_path


def call(
    main: Callable[[], None], monkeypatch: pytest.MonkeyPatch, *arguments: str
) -> pytest.ExceptionInfo[SystemExit]:
    monkeypatch.setattr(sys, "argv", ["command", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    return stopped


def spoil() -> None:
    with h5py.File("images/shard-000003.h5", "r+") as file:
        file["images"][0, 0, 0] = 2


def cut() -> None:
    path = Path("images/shard-000003.h5")
    path.write_bytes(path.read_bytes()[:3000])


@pytest.mark.parametrize("harm", [spoil, cut])
@pytest.mark.parametrize(
    ("main", "arguments"),
    [
        (fit.main, ["recipe.toml", "out"]),
        (evaluate.main, ["engine.onnx", "images"]),
        (tables.main, ["--test", "images", "--out", "out"]),
        (explain.main, ["best.pt", "images", "--out", "out"]),
        (baselines.main, ["images", "--out", "tuned.json"]),
    ],
    ids=["fit", "evaluate", "tables", "explain", "baselines"],
)
def test_a_damaged_shard_is_one_line(
    monkeypatch: pytest.MonkeyPatch, main: Callable[[], None], arguments: list[str], harm: Callable[[], None]
) -> None:
    harm()
    message = call(main, monkeypatch, *arguments).value.code
    assert isinstance(message, str)
    assert message.startswith("error: images/shard-000003.h5 ")
    assert "delete it and run" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("main", "arguments", "text"),
    [
        (fit.main, ["recipe.toml", "file"], "file cannot be a folder, since a file is in its place"),
        (fit.main, ["recipe.toml", "file/out"], "file/out cannot be a folder"),
        (fit.main, ["none.toml", "out"], "none.toml"),
        (evaluate.main, ["engine.onnx", "none"], "no shard-*.h5 in none; make some with"),
        (evaluate.main, ["none.pt", "images"], "none.pt"),
        (evaluate.main, ["none.onnx", "images"], "none.onnx"),
        (evaluate.main, ["none.pt", "images", "--baselines", "none.json"], "none.json"),
        (tables.main, ["--test", "none", "--out", "out"], "no shard-*.h5 in none"),
        (tables.main, ["--test", "images", "--out", "file"], "file cannot be a folder"),
        (explain.main, ["none.pt", "images", "--out", "out"], "none.pt"),
        (explain.main, ["none.pt", "none", "--out", "out"], "no shard-*.h5 in none"),
        (baselines.main, ["none", "--out", "tuned.json"], "no shard-*.h5 in none"),
        (simulate.main, ["file"], "file cannot be a folder"),
        (simulate.main, ["images", "--preview", "file/sheet.png"], "file cannot be a folder"),
        (export.main, ["none.pt", "out.onnx", "--test", "images"], "none.pt"),
        (photographs.main, ["none.pt"], "none.pt"),
        (camera_stack.main, ["file/out.npz"], "file cannot be a folder"),
    ],
)  # fmt: skip
def test_what_is_missing_or_in_the_way_is_one_line(
    monkeypatch: pytest.MonkeyPatch, main: Callable[[], None], arguments: list[str], text: str
) -> None:
    message = call(main, monkeypatch, *arguments).value.code
    assert isinstance(message, str)
    assert message.startswith("error: ")
    assert text in message
    assert "\n" not in message


def test_errors_of_every_kind_are_one_line() -> None:
    for kind in (EngineError, OSError, ValueError, RuntimeError, ModuleNotFoundError):

        @explained
        def main(kind: type[Exception] = kind) -> None:
            raise kind("this\n   and that")

        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code == "error: this and that"


def test_a_mistake_of_ours_keeps_its_traceback() -> None:
    @explained
    def main() -> None:
        raise KeyError("ours")

    with pytest.raises(KeyError):
        main()


def test_where_one_can_write_is_found_out_beforehand(place: Path) -> None:
    assert writable_folder(place / "a/b").is_dir()
    assert writable_file(place / "c/d.json").parent.is_dir()
    with pytest.raises(ValueError, match="is a folder; name a file in it"):
        writable_file(place / "images")
    with pytest.raises(ValueError, match="file cannot be a folder"):
        writable_file(place / "file/d.json")


def test_the_tour_names_every_module() -> None:
    named = train.__doc__ or ""
    modules = [path.name for path in (ROOT / "train").glob("*.py") if path.name != "__init__.py"]
    assert not [name for name in modules if name not in named]


@pytest.mark.parametrize(
    ("main", "arguments"), [(fit.main, ["recipe.toml", "out"]), (simulate.main, ["out"])]
)
def test_two_processes_do_not_write_to_one_folder(
    main: Callable[[], None], arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["command", *arguments])
    with (
        alone_in(Path("out")),
        pytest.raises(SystemExit, match="error: another process is writing to out: wait"),
    ):
        main()
    with alone_in(Path("out")):  # it is free again
        pass
