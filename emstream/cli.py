"""The commands. Each imports what it needs when it runs, so that ``--help`` is instant.

Exit codes: 0 done, 1 failed at run time, 2 wrong use.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from emstream.errors import ConfigError, EmstreamError, OutputError, SourceError, Stalled
from emstream.intake import Overrun
from emstream.printable import log_to_stderr, logs_json, printable, printable_lines
from emstream.signals import begin_on_signal, end_on_signals, stop_on_signals

if TYPE_CHECKING:
    from emstream.record_process import RecorderProcess
    from emstream.serve import Settings


class _Command(TyperCommand):
    """Says with an error where the values come from that it speaks of."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        with _says_what_is_refused():
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        with _says_where_from(ctx):
            return super().invoke(ctx)


class _Group(TyperGroup):
    """Turns our errors into a line of text and an exit code."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        with _says_what_is_refused():
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except EmstreamError as error:
            _say_error(error)
            if isinstance(error, Stalled):
                sys.stdout.flush()
                os._exit(1)  # a thread hangs: nothing could wait for its end
            raise typer.Exit(1) from None
        except ValueError as error:
            _say_error(error)
            if not logs_json():
                typer.echo(f"Try '{ctx.command_path} {ctx.invoked_subcommand} --help'.", err=True)
            raise typer.Exit(2) from None


@contextmanager
def _says_what_is_refused() -> Iterator[None]:
    """Add to an error about a value of the wrong type what it is, and where it was given."""
    try:
        yield
    except typer.BadParameter as error:
        from emstream.config import refused

        error.message = refused(error)
        raise


@contextmanager
def _says_where_from(context: Any) -> Iterator[None]:
    """Add to an error about options of `context` where their values were given."""
    try:
        yield
    except (EmstreamError, ValueError) as error:
        from emstream.config import origins

        if not hasattr(error, "__notes__") and (found := origins(context, str(error))):
            error.add_note(f"({found})")
        raise


def _say_error(error: Exception) -> None:
    """The line that a command ends with: for people, or like every other of --log-json."""
    text = " ".join([str(error), *getattr(error, "__notes__", ())])
    if logs_json():
        logging.getLogger("emstream").error("%s", text)
    else:
        typer.echo(printable_lines(f"error: {text}"), err=True)


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    context_settings={"auto_envvar_prefix": "EMSTREAM"},
    help="Denoise electron-microscope frames while the specimen is in the beam.",
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, for scripts.")]
EnginePath = Annotated[
    str | None,
    typer.Option(
        "--engine",
        metavar="PATH",
        help="Model file, or grpc://HOST:8001/MODEL on an inference server. [default: the one that ships]",
    ),
]
Rate = Annotated[float, typer.Option(help="Frames per second.")]
Dose = Annotated[float, typer.Option(help="Electrons per pixel and frame in vacuum.")]
Height = Annotated[int, typer.Option(help="Frame height [px].")]
Width = Annotated[int, typer.Option(help="Frame width [px].")]
Seed = Annotated[int, typer.Option(help="Same seed, same frames.")]
Frames = Annotated[int | None, typer.Option(help="Stop after this many published frames.")]
Gain = Annotated[float, typer.Option(help="ADU per electron, for cameras that do not count.")]
Offset = Annotated[float, typer.Option(help="ADU without any electron.")]
Precision = Annotated[str | None, typer.Option(help="bf16 or f32. [default: the fastest this CPU has]")]
Threads = Annotated[int | None, typer.Option(help="Cores for the engine. [default: all]")]
Device = Annotated[
    str, typer.Option(help="cpu, GPU numbers such as 0 or 0,1, or auto: a GPU where there is one.")
]
LookBack = Annotated[
    float, typer.Option(help="Record when told to, with what came this long before [s]. [default: at once]")
]
Split = Annotated[str | None, typer.Option(help="Begin another file at this size, e.g. 10GiB.")]
ViewHost = Annotated[str, typer.Option(help="Address the live page listens on.")]
ViewToken = Annotated[
    str | None,
    typer.Option(
        envvar="EMSTREAM_VIEW_TOKEN",
        help="What the page asks for. [default: nothing on loopback, else a new one each time]",
    ),
]
ViewPort = Annotated[int, typer.Option(help="Port of the live page; 0 picks a free one.")]


@app.callback()
def _setup(
    context: typer.Context,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.toml", help="Options of the commands: a table for each, a key for each option."
        ),
    ] = None,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log every rejected frame.")] = False,
    log_json: Annotated[bool, typer.Option("--log-json", help="Log one JSON object a line.")] = False,
) -> None:
    log_to_stderr(logging.DEBUG if verbose else logging.INFO, as_json=log_json)
    if version:
        import emstream

        typer.echo(emstream.__version__)
        raise typer.Exit
    from emstream.config import misspelt, read

    for problem in misspelt(os.environ, context.command):
        logging.getLogger(__name__).warning("%s", problem)
    if config is not None:
        with _says_where_from(context):
            context.default_map = dict(read(config, context.command.commands))  # type: ignore[attr-defined]


config_app = typer.Typer(cls=_Group, no_args_is_help=True, help="The configuration.")
app.add_typer(config_app, name="config")


@config_app.command(cls=_Command)
def check(
    context: typer.Context,
    command: Annotated[str, typer.Argument(metavar="[COMMAND]", help="Whose options.")] = "serve",
    as_json: Json = False,
) -> None:
    """Every option of a command that is in force, and where it comes from: file, environment or default.

    Example: **emstream --config /etc/emstream.toml config check**
    """
    from emstream.config import in_force, misspelt
    from emstream.serve import look_over

    root = context.find_root()
    if problems := misspelt(os.environ, root.command):
        raise ConfigError("; ".join(problems))
    commands = root.command.commands  # type: ignore[attr-defined]
    commands = {name: each for name, each in commands.items() if not hasattr(each, "commands")}
    if command not in commands:
        hint = f"; a file goes before: --config {command} config check" if command.endswith(".toml") else ""
        raise ValueError(f"there is no command {command!r}; there are {', '.join(commands)}{hint}")
    made = commands[command].make_context(command, [], parent=root)
    options = in_force(made, root.params.get("config"))
    if command == "serve":
        with _says_where_from(made):
            settings = _settings_of(**made.params)
            _check_recording_options(made.params["record"], made.params["look_back"], made.params["split"])
            look_over(settings)
    report = {each.option: {"value": each.value, "from": each.source} for each in options}
    if as_json:
        typer.echo(json.dumps(report, default=str))
        return
    _print_report({each.option: f"{_text(each.value)}   ({each.source})" for each in options}, False)


@app.command(cls=_Command)
def demo(
    frames: Frames = None,
    rate: Rate = 10.0,
    dose: Dose = 0.45,
    height: Height = 512,
    width: Width = 512,
    seed: Seed = 0,
    engine: EnginePath = None,
    device: Device = "auto",
    output: Annotated[str, typer.Option(help="Publish here, too.")] = "tcp://127.0.0.1:*",
    headless: Annotated[bool, typer.Option("--headless", help="No live page.")] = False,
    view_port: ViewPort = 8080,
    as_json: Json = False,
) -> None:
    """Simulated camera, service and live page in one go.

    Example: **emstream demo --frames 100 --rate 5 --headless --json**
    """
    from emstream.demo import DemoSettings, run_demo

    if not headless and find_spec("uvicorn") is None:
        typer.echo("no live page without: pip install 'emstream[view]'", err=True)
        headless = True
    settings = DemoSettings(
        rate=rate, dose=dose, height=height, width=width, seed=seed, frames=frames, engine=engine,
        device=device, output=output, view=None if headless else ("127.0.0.1", view_port),
    )  # fmt: skip

    def ready(url: str | None) -> None:
        if url:
            typer.echo(f"live page: {url}   (Ctrl-C ends the demo)", err=True)

    _print_report(run_demo(settings, on_ready=ready), as_json)


@app.command(cls=_Command)
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
        list[str] | None,
        typer.Option(
            metavar="URL",
            help="Endpoint to publish on; again for other formats: tcp://HOST:PORT?format=array-1.0 or "
            "karabo-bridge. [default: tcp://127.0.0.1:5556]",
        ),
    ] = None,
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
        float | None, typer.Option(help="Frames beyond so many a second are rejected. [default: none are]")
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

    settings = _settings_of(
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
    _check_recording_options(record, look_back, split)
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
                        split_bytes=_size(split, "split"), peer=service.peer,
                    ),
                    on_status=service.pipeline.note_recording,
                )  # fmt: skip
                recorder.wait_until_it_listens(service.publisher)
                stack.callback(
                    lambda: recordings.append(_finished(recorder, service.ledger.snapshot()["published"]))
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
                _print_report({**error.report, "error": str(error)}, as_json)
            raise
    if recordings:
        report["recording"] = recordings[0]
    _print_report(report, as_json)
    _check_recording(*recordings)


def _check_recording_options(record: Path | None, look_back: float, split: str | None) -> None:
    if record is None and (look_back or split):
        raise ValueError("--look-back and --split are for recordings; give --record, too")
    _size(split, "split")


def _settings_of(
    output: Sequence[str] | None,
    max_frame_mib: int,
    max_header_kib: int,
    queue_mib: int,
    control: str,
    **options: Any,
) -> Settings:
    """What `serve` runs, of its options; others are left out. Raises ValueError for those that make no sense."""
    from dataclasses import fields

    from emstream.serve import DEFAULT_OUTPUT, Settings
    from emstream.wire import MOST_HEADER_BYTES

    known = {field.name for field in fields(Settings)}
    return Settings(
        output=output or DEFAULT_OUTPUT,
        max_frame_bytes=1024**2 * _within("max_frame_mib", max_frame_mib, _MOST_MIB, "MiB"),
        max_header_bytes=1024 * _within("max_header_kib", max_header_kib, MOST_HEADER_BYTES // 1024, "KiB"),
        queue_bytes=1024**2 * _within("queue_mib", queue_mib, _MOST_MIB, "MiB"),
        control=None if control == "none" else control,
        **{name: value for name, value in options.items() if name in known},
    )


_MOST_MIB = 1024**2


def _within(name: str, value: int, most: int, unit: str) -> int:
    if not 1 <= value <= most:
        raise ValueError(f"{name} must lie in 1-{most} {unit}, got {value} {unit}")
    return value


engine_app = typer.Typer(cls=_Group, no_args_is_help=True, help="The engine of a running service.")
app.add_typer(engine_app, name="engine")
Key = Annotated[
    Path | None, typer.Option(metavar="FILE.key_secret", help="Your keys, for a service that takes keys.")
]
ServiceKey = Annotated[Path | None, typer.Option(metavar="FILE.key", help="That service's public key.")]
ServiceAddress = Annotated[
    str,
    typer.Option(metavar="URL", help="What the service publishes on; it says there where it takes orders."),
]


@engine_app.command(cls=_Command)
def swap(
    engine: Annotated[str, typer.Argument(metavar="NEW", help="Model file, where the service runs.")],
    service: ServiceAddress = "tcp://127.0.0.1:5556",
    timeout_s: Annotated[float, typer.Option(help="Longest to wait for the answer.")] = 300.0,
    key: Key = None,
    service_key: ServiceKey = None,
    as_json: Json = False,
) -> None:
    """Another engine: loaded and tested beside the running one, then it takes the next batch. No frame is lost.

    Example: **emstream engine swap engines/unet32.onnx**
    """
    from emstream.control import ask, control_of
    from emstream.keys import Peer

    path = engine
    with suppress(OSError):  # a name that is too long: the service says so
        if Path(engine).is_file():
            path = str(Path(engine).absolute())
    peer = Peer.of(key, service_key)
    answer = ask(control_of(service, peer=peer), {"do": "swap", "engine": path}, timeout_s, peer)
    _print_report(answer, as_json)


@engine_app.command(cls=_Command)
def back(
    service: ServiceAddress = "tcp://127.0.0.1:5556",
    timeout_s: Annotated[float, typer.Option(help="Longest to wait for the answer.")] = 30.0,
    key: Key = None,
    service_key: ServiceKey = None,
    as_json: Json = False,
) -> None:
    """The engine of before the last swap, which stayed ready.

    Example: **emstream engine back**
    """
    from emstream.control import ask, control_of
    from emstream.keys import Peer

    peer = Peer.of(key, service_key)
    _print_report(ask(control_of(service, peer=peer), {"do": "swap-back"}, timeout_s, peer), as_json)


@app.command(cls=_Command)
def keygen(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Whose keys: service, display3, ...")],
    folder: Annotated[Path, typer.Option("-d", "--folder", help="Where to put them.")] = Path(),
    as_json: Json = False,
) -> None:
    """A pair of keys for an encrypted connection: NAME.key to give away, NAME.key_secret to keep.

    Example: **emstream keygen service**
    """
    from emstream.keys import make

    public, secret = make(name, folder)
    _print_report({"public": str(public), "secret": str(secret)}, as_json)


@app.command(cls=_Command)
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

    size, room = _size(split, "split"), _size(buffer, "buffer")
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
    _print_report(report, as_json)
    if not report["files"] and not look_back:
        raise SourceError(f"no frame came from {input}; is emstream serve running?")
    _check_recording(report)


def _size(text: str | None, what: str) -> int | None:
    from emstream.recording.disk import bytes_of

    return None if text is None else bytes_of(text, what)


def _check_recording(report: dict[str, Any] | None = None) -> None:
    """A recording that did not end as it was meant to is a failure, however well it ended."""
    from emstream.record import FAILURES

    if report and "error" in report:
        raise OutputError(report["error"])
    if report and report["ended"] in FAILURES:
        raise OutputError(f"the recording ended early: {report['ended']}; what came before is whole")


def _finished(recorder: RecorderProcess, published: int) -> dict[str, Any]:
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


@app.command(cls=_Command)
def camera(
    output: Annotated[
        str | None,
        typer.Option(help="Endpoint to send on. [default: tcp://127.0.0.1:5555; dectris: port 31001]"),
    ] = None,
    protocol: Annotated[
        str, typer.Option(help="native, or dectris: a DECTRIS detector's Stream V2.")
    ] = "native",
    rate: Rate = 40.0,
    dose: Dose = 0.45,
    height: Height = 512,
    width: Width = 512,
    seed: Seed = 0,
    frames: Annotated[int | None, typer.Option(help="Stop after this many frames. [default: Ctrl-C]")] = None,
    push: Annotated[bool, typer.Option("--push", help="Lossless (PUSH), for pull+tcp:// inputs.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Start with the first subscriber.")] = False,
    gap: Annotated[float, typer.Option(help="Fault: probability that a frame is never sent.")] = 0.0,
    reorder: Annotated[float, typer.Option(help="Fault: probability that a frame is sent late.")] = 0.0,
    corrupt: Annotated[float, typer.Option(help="Fault: probability that a message is damaged.")] = 0.0,
    resize_every: Annotated[int, typer.Option(help="Fault: frames between changes of size.")] = 0,
    stall_every: Annotated[int, typer.Option(help="Fault: frames between pauses.")] = 0,
    stall_s: Annotated[float, typer.Option(help="Length of a pause [s].")] = 2.0,
    type: Annotated[
        str | None, typer.Option(help="dectris: uint8, uint16 or uint32. [default: uint16]")
    ] = None,
    compression: Annotated[
        str | None, typer.Option(help="dectris: bslz4, lz4 or none. [default: bslz4]")
    ] = None,
    thresholds: Annotated[
        int | None, typer.Option(help="dectris: channels of an image. [default: 1]")
    ] = None,
    dead: Annotated[int | None, typer.Option(help="dectris: bad pixels. [default: 0]")] = None,
    series_frames: Annotated[
        int | None, typer.Option(help="dectris: images of a series. [default: all]")
    ] = None,
    patterns: Annotated[
        int | None, typer.Option(help="dectris: images made beforehand and sent in turn, for high rates.")
    ] = None,
    no_end: Annotated[bool, typer.Option("--no-end", help="Fault, dectris: series never end.")] = False,
    as_json: Json = False,
) -> None:
    """A simulated camera: a moving specimen, fresh Poisson noise, exact pacing.

    Example: **emstream camera --output tcp://127.0.0.1:5555 --rate 40 --dose 0.45 --frames 400**
    """
    import threading

    from emstream.camera import CameraSettings, Faults, run_camera
    from emstream.camera.dectris import DectrisSettings, run_dectris

    common: dict[str, Any] = {
        "output": output, "rate": rate, "dose": dose, "height": height, "width": width, "seed": seed,
        "frames": frames, "push": push, "wait": wait,
        "faults": Faults(
            gap=gap, reorder=reorder, corrupt=corrupt, resize_every=resize_every,
            stall_every=stall_every, stall_s=stall_s,
        ),
    }  # fmt: skip
    detector: dict[str, Any] = {
        "type": type, "compression": compression, "thresholds": thresholds, "dead": dead,
        "series_frames": series_frames, "patterns": patterns, "end": False if no_end else None,
    }  # fmt: skip
    common, detector = (
        {name: value for name, value in each.items() if value is not None} for each in (common, detector)
    )
    if protocol not in ("native", "dectris"):
        raise ValueError(f"protocol must be native or dectris, got {protocol!r}")
    if protocol == "native" and detector:
        words = ", ".join("--no-end" if name == "end" else f"--{name.replace('_', '-')}" for name in detector)
        raise ValueError(f"{words}: only with --protocol dectris")
    stop = threading.Event()
    log = logging.getLogger("emstream.camera")

    def ready(endpoint: str) -> None:
        log.info("camera on %s", endpoint)

    with stop_on_signals(stop.set):
        if protocol == "dectris":
            report = run_dectris(DectrisSettings(**common, **detector), stop, on_ready=ready)
        else:
            report = run_camera(CameraSettings(**common), stop, on_ready=ready)
    _print_report(report, as_json)


@app.command(cls=_Command)
def view(
    input: Annotated[str, typer.Option(help="What emstream serve publishes on.")] = "tcp://127.0.0.1:5556",
    host: ViewHost = "127.0.0.1",
    port: ViewPort = 8080,
    token: ViewToken = None,
    key: Key = None,
    service_key: ServiceKey = None,
) -> None:
    """The live page of a running service: raw beside denoised.

    Example: **emstream view --input tcp://127.0.0.1:5556 --port 8080**
    """
    import threading

    from emstream.keys import Peer
    from emstream.view import ViewServer

    page = ViewServer(input, host, port, token, peer=Peer.of(key, service_key))
    page.start()
    typer.echo(f"live page: {page.url}   (Ctrl-C ends it)", err=True)
    stop = threading.Event()
    try:
        with stop_on_signals(stop.set):
            while not stop.wait(0.5):
                pass
    finally:
        page.stop()


@app.command(cls=_Command)
def status(
    input: Annotated[str, typer.Option(help="What emstream serve publishes on.")] = "tcp://127.0.0.1:5556",
    key: Key = None,
    service_key: ServiceKey = None,
    as_json: Json = False,
) -> None:
    """The figures of a running service in a terminal, until Ctrl-C; with --json once.

    Example: **emstream status --input tcp://127.0.0.1:5556**
    """
    from rich.live import Live

    from emstream.keys import Peer
    from emstream.status import panel, status_once, statuses

    peer = Peer.of(key, service_key)
    if as_json:
        typer.echo(json.dumps(status_once(input, peer=peer)))
        return
    with suppress(KeyboardInterrupt), Live(auto_refresh=False) as display:
        for each in statuses(input, peer=peer):
            display.update(panel(each), refresh=True)


@app.command(cls=_Command)
def denoise(
    input: Annotated[
        Path,
        typer.Argument(
            metavar="IN", help="A frame, a movie (.npy .tif .h5 .mrc .dm4 .emd .ser ...) or a folder of them."
        ),
    ],
    output: Annotated[Path, typer.Argument(metavar="OUT", help=".npy .tif .h5 .mrc; a folder for a folder.")],
    engine: EnginePath = None,
    dataset: Annotated[str | None, typer.Option(help="Which dataset of a file that holds several.")] = None,
    suffix: Annotated[str, typer.Option(help="Of the files written into a folder.")] = ".tif",
    compare: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Raw beside denoised: a film (.mp4 .gif) or a sheet of frames (.png)."
        ),
    ] = None,
    rate: Annotated[float, typer.Option(help="Of that film [frames/s].")] = 10.0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what exists.")] = False,
    gain: Gain = 1.0,
    offset: Offset = 0.0,
    device: Device = "auto",
    precision: Precision = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Denoise a file, or a folder of files: electron counts in, expected electrons out.

    Example: **emstream denoise noisy.tif clean.tif --compare talk.mp4**
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from emstream.denoise import denoise_file, denoise_folder
    from emstream.inference import load_engine

    columns = (
        *Progress.get_default_columns()[:2],
        MofNCompleteColumn(),
        TextColumn("frames"),
        TimeRemainingColumn(),
    )
    with (
        closing(load_engine(engine, precision=precision, threads=threads, device=device)) as loaded,
        Progress(*columns, console=Console(stderr=True), transient=True) as progress,
    ):
        task = progress.add_task(escape(printable(input.name)), total=None)
        failed: dict[str, str] = {}
        options: dict[str, Any] = {
            "gain": gain,
            "offset": offset,
            "dataset": dataset,
            "overwrite": overwrite,
            "on_frame": lambda done, total: progress.update(task, completed=done, total=total),
        }
        if not input.is_dir():
            report = denoise_file(input, output, loaded, compare=compare, rate=rate, **options)
            _warn_of_the_dose(input, report)
        elif compare is not None:
            raise ValueError(f"--compare {compare} is of one movie, and {input} is a folder; leave it out")
        else:
            reports: dict[str, Any] = {}
            skipped: list[str] = []
            for path, result in denoise_folder(input, output, loaded, suffix, **options):
                if isinstance(result, EmstreamError):
                    failed[path.name] = str(result)
                    typer.echo(printable_lines(f"error: {result}"), err=True)
                elif result is None:
                    skipped.append(path.name)
                else:
                    reports[path.name] = result
                    _warn_of_the_dose(path, result)
            report = {"files": reports, "skipped": skipped, "failed": failed}
            if skipped:
                total = len(reports) + len(skipped) + len(failed)
                typer.echo(
                    f"{len(skipped)} of {total} exist in {output} already and were skipped; "
                    "--overwrite makes them again",
                    err=True,
                )
    _print_report(report, as_json)
    if failed:
        raise typer.Exit(1)


def _warn_of_the_dose(path: Path, report: dict[str, Any]) -> None:
    if not report["in_domain"]:
        typer.echo(
            f"warning: {path}: {report['dose']:.3g} electrons/pixel is outside the engine's dose range; "
            "if these are ADU, give --gain and --offset",
            err=True,
        )


@app.command(cls=_Command)
def build(
    model: Annotated[
        Path | None, typer.Argument(metavar="MODEL.onnx", help="An engine as train.export writes it.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="MODEL.plan, or a folder with --all.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every plan in engines/plans.toml.")] = False,
    size: Annotated[
        str | None, typer.Option(help="Frame size, rows x columns [px]. [default: 512x512]")
    ] = None,
    type: Annotated[
        str | None, typer.Option(help="Pixel type: uint8, uint16, uint32 or float32. [default: uint8]")
    ] = None,
    max_batch: Annotated[int | None, typer.Option(help="Most frames in a batch. [default: 8]")] = None,
    flavour: Annotated[
        str | None,
        typer.Option(help="tensorrt or tensorrt-rtx. [default: what is installed and can build here]"),
    ] = None,
    device: Annotated[int, typer.Option(help="The GPU to build for.")] = 0,
    as_json: Json = False,
) -> None:
    """Compile a model for TensorRT: one frame size and type, batches up to the largest.

    Example: **emstream build engines/unet32.onnx -o unet32.plan --size 512x512 --type uint8**
    """
    from emstream.plans import PlanOrder, build_all, build_one, builder

    if everything == (model is not None):
        raise ValueError("give either MODEL.onnx or --all")
    options: dict[str, Any] = {"size": size, "type": type, "max_batch": max_batch}
    given = {name: value for name, value in options.items() if value is not None}
    if model is None:
        if given:
            words = ", ".join("--" + name.replace("_", "-") for name in given)
            raise ValueError(f"with --all, engines/plans.toml says what each plan is for; leave out {words}")
        if output is None or output.suffix == ".plan":
            raise ValueError(f"--all needs a folder for the plans: -o FOLDER, got {output or 'none'}")
    chosen, gpu = builder(flavour, device)
    if model is not None:
        order = PlanOrder(model, output or Path(model.stem + ".plan"), **given)
        with _phases() as progress:
            report = build_one(order, chosen, gpu, progress)
        _print_report(report, as_json)
        return
    assert output is not None
    with _phases() as progress:
        reports = build_all(output, chosen, gpu, progress)
    brief = {name: next(iter(each.values())) for name, each in reports.items()}
    _print_report(reports if as_json else brief, as_json)
    failed = [each for each in reports.values() if "error" in each]
    if failed or all("missing" in each for each in reports.values()):
        raise typer.Exit(1)


@contextmanager
def _phases() -> Iterator[Callable[[str, int, int], None] | None]:
    """A progress bar for each of TensorRT's phases that is under way; none where nobody sees it."""
    from rich.console import Console
    from rich.progress import Progress, TaskID

    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    tasks: dict[str, TaskID] = {}
    with Progress(console=console, transient=True) as progress:

        def step(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = progress.add_task(phase, total=total)
            progress.update(tasks[phase], completed=done, total=total)
            if done == total:
                progress.remove_task(tasks.pop(phase))

        yield step


@app.command(cls=_Command)
def export(
    engine: Annotated[
        Path | None, typer.Argument(metavar="ENGINE", help=".onnx or .plan. [default: the one that ships]")
    ] = None,
    triton: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Model repository of an inference server; made if need be."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="What clients call it. [default: the network's name]")
    ] = None,
    backend: Annotated[
        str, typer.Option(help="Triton's backend for an .onnx: onnxruntime or openvino.")
    ] = "onnxruntime",
    max_batch: Annotated[
        int | None, typer.Option(help="Frames computed together at most. [default: 8, or the plan's own]")
    ] = None,
    instances: Annotated[int | None, typer.Option(help="Batches at a time on each GPU. [default: 1]")] = None,
    as_json: Json = False,
) -> None:
    """An engine for an inference server (Triton, OpenVINO Model Server), then reached as --engine grpc://...

    Example: **emstream export engines/unet32.onnx --triton models**
    """
    from emstream.inference import default_engine
    from emstream.repository import write_repository

    if triton is None:
        raise ValueError("--triton DIR says which model repository to write to")
    report = write_repository(
        default_engine() if engine is None else engine, triton,
        name=name, backend=backend, max_batch=max_batch, instances=instances,
    )  # fmt: skip
    _print_report(report, as_json)


@app.command(cls=_Command)
def info(
    engine: Annotated[
        str | None, typer.Argument(metavar="ENGINE", help="[default: the one that ships]")
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """What an engine is: network, training domain, precision, device; where a plan comes from.

    Example: **emstream info engines/unet32.onnx**
    """
    from dataclasses import asdict

    from emstream.inference import load_engine

    if engine is not None and engine.endswith(".plan"):
        from emstream.plans import describe

        _print_report(describe(Path(engine), device), as_json)
        return
    loaded = load_engine(engine, device=device)
    card = asdict(loaded.card) if loaded.card else {}
    card.pop("spectra", None)
    _print_report({**card, **loaded.identity}, as_json)
    loaded.close()


def _print_report(report: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(report, default=str))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    table = Table(show_header=False, box=None)
    table.add_column()
    table.add_column(overflow="fold")  # paths and commands are there to be copied
    for name, value in report.items():
        if isinstance(value, dict):
            value = "  ".join(
                f"{key} {_text(each)}" for key, each in value.items() if not isinstance(each, dict)
            )
        if isinstance(value, list) and value and all(isinstance(each, dict) for each in value):
            value = "\n".join(
                "  ".join(f"{key} {_text(item)}" for key, item in each.items()) for each in value
            )
        table.add_row(Text(printable(name)), Text(printable_lines(_text(value))))
    console.print(table)


def _text(value: Any) -> str:
    return "-" if value is None or value == () else f"{value:.5g}" if isinstance(value, float) else str(value)


def main() -> None:
    """The ``emstream`` command."""
    app()
