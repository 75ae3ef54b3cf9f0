"""What a recorder that died left on the disk: every frame published up to there is accounted for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from emstream.recording.salvage import Account, salvage
from tests.recordings import pairs, raw, record

pytest.importorskip("hdf5plugin")


def left(path: Path, entries: list[Any], **counters: int) -> Path:
    """A recording whose recorder was killed after a commit."""
    file = record(path, entries, close=False)
    file.commit(counters)
    file._file.close()
    return path


def test_everything_on_disk_is_everything_published(tmp_path: Path) -> None:
    report, account = salvage([left(tmp_path / "r.h5", pairs(range(5)))], Account(0, 0))
    assert report["frames"] == {"raw": 5, "denoised": 5}
    assert sum((*report["lost"].values(), *report["unheard"].values())) == 0
    assert account == Account(5, 0)
    assert report["ended"] == "died"
    assert report["files"] == [str(tmp_path / "r.h5")]


def test_what_is_not_there_was_lost_as_far_as_the_recorder_said_so_and_else_unheard(tmp_path: Path) -> None:
    entries = [*pairs(range(3)), *pairs(range(7, 9)), raw(9), raw(10)]  # numbered as published, from 1 on
    path = left(tmp_path / "r.h5", entries, raw_lost=1, denoised_lost=100)
    report, account = salvage([path], Account(0, 0))
    assert report["frames"] == {"raw": 7, "denoised": 5}
    assert report["lost"] == {"raw": 1, "denoised": 4}
    assert report["unheard"] == {"raw": 3, "denoised": 0}
    assert account == Account(9, 2)
    report, account = salvage([path], Account(0, 1))  # one raw frame was in the file before
    assert report["unheard"]["raw"] == 2


def test_split_recording_is_accounted_for_as_one(tmp_path: Path) -> None:
    first = left(tmp_path / "r.h5", pairs(range(4)))
    second = left(tmp_path / "r-0002.h5", pairs(range(6, 8)))
    third = left(tmp_path / "r-0003.h5", [raw(8)])
    report, account = salvage([first, second, third, tmp_path / "never-made.h5"], Account(0, 0))
    assert report["frames"] == {"raw": 7, "denoised": 6}
    assert report["unheard"] == {"raw": 2, "denoised": 2}
    assert account == Account(8, 1)
    assert len(report["files"]) == 3


def test_recording_that_looked_back_begins_with_its_first_frame(tmp_path: Path) -> None:
    entries = [raw(20), *pairs(range(21, 25)), *pairs(range(30, 32))]
    report, account = salvage([left(tmp_path / "r.h5", entries)], None)
    assert report["unheard"] == {"raw": 5, "denoised": 6}  # frame 20 was never heard denoised
    assert account == Account(32, 0)


def test_file_without_a_frame_or_without_sense_accounts_for_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "r.h5").write_bytes(b"\x89HDF not quite")
    report, account = salvage([tmp_path / "r.h5"], Account(7, 0))
    assert account == Account(7, 0)
    assert sum(report["frames"].values()) == 0
    assert "cannot be read" in caplog.text
    assert salvage([tmp_path / "r.h5"], None)[1] is None
    only_raw = left(tmp_path / "s.h5", [raw(0), raw(1)])
    assert salvage([only_raw], None)[1] is None
    assert salvage([only_raw], Account(0, 0))[1] == Account(0, 2)
