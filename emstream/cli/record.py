"""Recordings of a running service."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from emstream.cli.options import Json, Key, LookBack, ServiceKey, Split
from emstream.cli.report import print_report
from emstream.errors import EmstreamError, OutputError, SourceError
from emstream.signals import begin_on_signal, stop_on_signals

if TYPE_CHECKING:
    from emstream.record_process import RecorderProcess


def record(
    output: Annotated[Path, typer.Argument(metavar="OUT.h5", help="The file, or a folder to name it in.")],
    input: Annotated[str, typer.Option(help="What emstream serve publishes on.")] = "tcp://127.0.0.1:5556",
    look_back: LookBack = 0.0,
    split: Split = None,
    buffer: Annotated[str, typer.Option(help="Memory between receiving and the disk.")] = "1GiB",
    frames: Annotated[int | None, typer.Option(help="Stop after this many raw frames.")] = None,
    until_end: Annotated[bool, typer.Option("--until-end", help="Stop at the end of a series.")] = False,
    compress: Annotated[bool, typer.Option(help="Bitshuffle and LZ4; takes emstream[files].")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.h5 if it exists.")] = False,
    key: Key = None,
    service_key: ServiceKey = None,
    as_json: Json = False,
) -> None:
    """Raw and denoised frames of a running service to HDF5, until Ctrl-C.

    Example: **emstream record --input tcp://127.0.0.1:5556 run7.h5**
    """
    from emstream.keys import Peer
    from emstream.record import Recorder, RecordSettings

    size, room = size_of(split, "split"), size_of(buffer, "buffer")
    assert room is not None
    recorder = Recorder(
        RecordSettings(
            input=input, output=output, look_back_s=look_back, split_bytes=size, buffer_bytes=room,
            frames=frames, until_end=until_end, compress=compress, overwrite=overwrite, peer=Peer.of(key, service_key),
        )
    )  # fmt: skip
    log = logging.getLogger("emstream.record")
    with stop_on_signals(recorder.stop), begin_on_signal(recorder.begin), _recording_line() as show:
        log.info("listening to %s", input)
        if look_back:
            log.info(
                "kill -USR1 %d, or Enter, begins with the past %g s; Ctrl-C ends", os.getpid(), look_back
            )
            _begin_on_enter(recorder.begin)
        report = recorder.run(on_status=show)
    print_report(report, as_json)
    if not report["files"] and not look_back:
        raise SourceError(f"no frame came from {input}; is emstream serve running?")
    check_recording(report)


def size_of(text: str | None, what: str) -> int | None:
    """[bytes] Of a text such as 10GiB. Raises ValueError that calls it `what`."""
    from emstream.recording.disk import bytes_of

    return None if text is None else bytes_of(text, what)


def check_recording(report: dict[str, Any] | None = None) -> None:
    """A recording that did not end as it was meant to is a failure, however well it ended."""
    from emstream.record import FAILURES

    if report and "error" in report:
        raise OutputError(report["error"])
    if report and report["ended"] in FAILURES:
        raise OutputError(f"the recording ended early: {report['ended']}; what came before is whole")


def finished(recorder: RecorderProcess, published: int) -> dict[str, Any]:
    """Its report. That a recording failed is no reason for the service to withhold its own."""
    try:
        return recorder.finish(published)
    except EmstreamError as error:
        return {"files": [], "ended": "failed", "error": str(error)}


def _begin_on_enter(begin: Callable[[], None]) -> None:
    import threading

    def wait() -> None:
        if sys.stdin.readline():  # and not its end
            begin()

    if sys.stdin is not None and sys.stdin.isatty():
        threading.Thread(target=wait, daemon=True).start()


@contextmanager
def _recording_line() -> Iterator[Callable[[dict[str, Any]], None]]:
    """On a terminal, a line that says what is recorded and lost."""
    from rich.console import Console

    from emstream.recording.disk import text_of

    console = Console(stderr=True)
    with console.status("waiting for frames") as line:

        def show(status: dict[str, Any]) -> None:
            lost = sum(status["lost"].values()) + sum(status["unheard"].values())
            counted = "[red]" if lost else ""
            line.update(
                f"{status['state']}: {status['frames']['raw']} raw, {status['frames']['denoised']} denoised; "
                f"{counted}{lost} lost{'[/red]' if lost else ''}, {status['missing']} missing; "
                f"buffer {text_of(status['buffer_bytes'])}, {text_of(status['free_bytes'])} free"
            )

        yield show
