"""The service."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from emstream.cli.options import (
    Device,
    EnginePath,
    Frames,
    Gain,
    Json,
    LookBack,
    Offset,
    Precision,
    Split,
    Threads,
    ViewHost,
    ViewPort,
    ViewToken,
)
from emstream.cli.record import check_recording, finished, size_of
from emstream.cli.report import print_report
from emstream.errors import EmstreamError
from emstream.overrun import Overrun
from emstream.signals import begin_on_signal, end_on_signals

if TYPE_CHECKING:
    from emstream.record_process import RecorderProcess
    from emstream.serve import Settings

_MOST_MIB = 1024**2
_OUTPUT = ["tcp://127.0.0.1:5556"]


def serve(
    input: Annotated[
        str,
        typer.Option(
            metavar="URL",
            help="The camera: tcp://, pull+tcp://, dectris://, dectris1://, pva://, merlin://, file://, sim://",
        ),
    ],
    engine: EnginePath = None,
    output: Annotated[
        list[str],
        typer.Option(
            metavar="URL",
            help="Endpoint to publish on; again for other formats: tcp://HOST:PORT?format=array-1.0 or "
            "karabo-bridge.",
        ),
    ] = _OUTPUT,
    max_batch: Annotated[
        int | None, typer.Option(help="Frames per batch. [default: the engine's best]")
    ] = None,
    max_wait_ms: Annotated[
        float, typer.Option(help="Longest a batch's first frame waits for company.")
    ] = 0.0,
    overrun: Annotated[
        Overrun | None,
        typer.Option(
            help="What gives way under overload. [default: block for inputs that can wait, else drop-oldest]"
        ),
    ] = None,
    slots: Annotated[
        int | None, typer.Option(help="Batches the ring holds. [default: what the engine holds, and two]")
    ] = None,
    queue: Annotated[int, typer.Option(help="Messages a subscriber may lag by before it loses some.")] = 64,
    queue_mib: Annotated[int, typer.Option(help="What those may add up to [MiB].")] = 1024,
    drain_s: Annotated[
        float, typer.Option(help="Longest that frames may take to finish after a stop.")
    ] = 10.0,
    expect: Annotated[
        str | None,
        typer.Option(
            help="Frame size and type to be ready for. [default: the engine's own, or 512x512:uint8]"
        ),
    ] = None,
    stall_limit_s: Annotated[
        float,
        typer.Option(help="Give up, to be started again, once the engine or another part hangs this long."),
    ] = 120.0,
    fallback: Annotated[
        str | None,
        typer.Option(
            metavar="PATH", help="Model file that takes over, on the CPU, if the engine keeps failing."
        ),
    ] = None,
    key: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.key_secret", help="This service's keys: what it binds takes keys, with --admit."
        ),
    ] = None,
    admit: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Of the .key files of those who may connect.")
    ] = None,
    camera_key: Annotated[
        Path | None, typer.Option(metavar="FILE.key", help="Of a camera that takes keys.")
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Let other machines connect without keys.")
    ] = False,
    metrics: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT", help="Answer Prometheus, /healthz and /readyz here, e.g. 127.0.0.1:9095."
        ),
    ] = None,
    control: Annotated[
        str, typer.Option(help="Endpoint that takes orders such as emstream engine swap; none for none.")
    ] = "tcp://127.0.0.1:*",
    frames: Frames = None,
    gain: Gain = 1.0,
    offset: Offset = 0.0,
    offset_map: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A dark frame: ADU, pixel by pixel, on top of --offset."),
    ] = None,
    gain_map: Annotated[
        Path | None, typer.Option(metavar="FILE", help="ADU per electron, pixel by pixel, on top of --gain.")
    ] = None,
    flat_field: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The camera's answer to even light; divided by.")
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Pixels that are not 0 here are bad: a neighbour's value."),
    ] = None,
    binning: Annotated[int, typer.Option(help="Add up squares of this many by this many pixels.")] = 1,
    roi: Annotated[
        str | None, typer.Option(metavar="RxC+T+L", help="Keep this part: rows x columns + top + left [px].")
    ] = None,
    device: Device = "auto",
    precision: Precision = None,
    threads: Threads = None,
    max_frame_mib: Annotated[int, typer.Option(help="Larger frames are rejected [MiB].")] = 256,
    max_header_kib: Annotated[int, typer.Option(help="Larger headers are rejected [KiB].")] = 64,
    max_rate: Annotated[
        float | None, typer.Option(help="Frames beyond so many a second are rejected. [default: no limit]")
    ] = None,
    view: Annotated[bool, typer.Option("--view", help="Serve the live page, too.")] = False,
    view_host: ViewHost = "127.0.0.1",
    view_port: ViewPort = 8080,
    view_token: ViewToken = None,
    record: Annotated[
        Path | None, typer.Option(metavar="FILE.h5|FOLDER", help="Record what is published, too.")
    ] = None,
    look_back: LookBack = 0.0,
    split: Split = None,
    as_json: Json = False,
) -> None:
    """The service: frames in, denoised frames out, until the input ends or Ctrl-C.

    Example: **emstream serve --input tcp://camera:5555 --output tcp://127.0.0.1:5556**
    """
    from contextlib import ExitStack

    with end_on_signals():
        from emstream.serve import Service
        from emstream.serve import serve as run

    settings = settings_of(
        input=input, output=output, engine=engine, device=device, precision=precision, threads=threads,
        max_batch=max_batch, max_wait_ms=max_wait_ms, overrun=overrun, slots=slots, gain=gain,
        offset=offset, offset_map=offset_map, gain_map=gain_map, flat_field=flat_field, mask=mask,
        binning=binning, roi=roi,
        max_frame_mib=max_frame_mib, max_header_kib=max_header_kib, max_rate=max_rate,
        queue=queue, queue_mib=queue_mib, drain_s=drain_s, expect=expect, frames=frames,
        fallback=fallback, stall_limit_s=stall_limit_s, metrics=metrics, control=control,
        key=key, admit=admit, camera_key=camera_key, insecure=insecure,
    )  # fmt: skip
    log = logging.getLogger("emstream.serve")
    check_other_processes(record, look_back, split, view_port)
    recordings: list[dict[str, Any]] = []
    with ExitStack() as stack:
        # Without a handler this signal would end the service.
        stack.enter_context(begin_on_signal(lambda: log.warning("SIGUSR1: no recorder to begin")))

        def ready(service: Service) -> None:
            log.info(
                "%s -> %s -> %s", settings.input, service.engine.current.name, service.publisher.endpoint
            )
            log.info("engine %s on %s", service.engine.current.name, service.engine.current.device)
            for each in service.publisher.outputs:
                log.info("%(format)s, %(stream)s, %(socket)s: %(endpoint)s", each)
            recorder: RecorderProcess | None = None
            if record is not None:
                from emstream.record import RecordSettings
                from emstream.record_process import RecorderProcess

                recorder = RecorderProcess(
                    RecordSettings(
                        input=service.publisher.endpoint, output=record, look_back_s=look_back,
                        split_bytes=size_of(split, "split"), peer=service.peer,
                    ),
                    on_status=service.pipeline.note_recording,
                )  # fmt: skip
                recorder.wait_until_it_listens(service.publisher)
                stack.callback(
                    lambda: recordings.append(finished(recorder, service.ledger.snapshot()["published"]))
                )
                stack.enter_context(begin_on_signal(recorder.begin))
            if view and not service.pipeline.is_stopping:
                from emstream.view import ViewProcess

                page = ViewProcess(
                    service.publisher.endpoint, view_host, view_port, view_token,
                    on_record=recorder.tell if recorder else None, peer=service.peer,
                )  # fmt: skip
                page.start()
                stack.callback(page.stop)
                log.info("live page: %s", page.url)

        try:
            report = run(settings, on_ready=ready)
        except EmstreamError as error:
            if error.report is not None:
                print_report({**error.report, "error": str(error)}, as_json)
            raise
    if recordings:
        report["recording"] = recordings[0]
    print_report(report, as_json)
    check_recording(*recordings)


def check_other_processes(record: Path | None, look_back: float, split: str | None, view_port: int) -> None:
    """Raise ValueError for options of recorder and page that make no sense; `look_back` [s]."""
    if not 0 <= view_port <= 65535:
        raise ValueError(f"view-port must lie in 0-65535, got {view_port}")
    split_bytes = size_of(split, "split")
    if record is not None:
        from emstream.record import RecordSettings

        RecordSettings(input="", output=record, look_back_s=look_back, split_bytes=split_bytes)
    elif look_back or split:
        raise ValueError("--look-back and --split are for recordings; give --record, too")


def settings_of(
    output: Sequence[str],
    max_frame_mib: int,
    max_header_kib: int,
    queue_mib: int,
    control: str,
    **options: Any,
) -> Settings:
    """What `serve` runs, of its options; others are left out. Raises ValueError for those that make no sense."""
    from dataclasses import fields

    from emstream.serve import Settings
    from emstream.wire import MOST_HEADER_BYTES

    known = {field.name for field in fields(Settings)}
    return Settings(
        output=output or _OUTPUT,
        max_frame_bytes=1024**2 * _within("max_frame_mib", max_frame_mib, _MOST_MIB, "MiB"),
        max_header_bytes=1024 * _within("max_header_kib", max_header_kib, MOST_HEADER_BYTES // 1024, "KiB"),
        queue_bytes=1024**2 * _within("queue_mib", queue_mib, _MOST_MIB, "MiB"),
        control=None if control == "none" else control,
        **{name: value for name, value in options.items() if name in known},
    )


def _within(name: str, value: int, most: int, unit: str) -> int:
    if not 1 <= value <= most:
        raise ValueError(f"{name} must lie in 1-{most} {unit}, got {value} {unit}")
    return value
