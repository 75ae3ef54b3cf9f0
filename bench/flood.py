"""Does a running service live through a million malformed messages on its input, and as many on its control socket?

    mad camera ──PUSH──▶ [emstream serve] ──XPUB──▶ subscriber
    mad client ──DEALER──▶ control

Messages are made from a seed by `bench.malformed`: cut short, one bit flipped, absurd headers, the wrong number
of parts, random bytes, bombs (nested thousands deep, lengths of gigabytes that are only declared), pixels that
are no numbers. Between --every of them the camera sends a good frame, which has to come out, in order and with
its own pixels; every other message has to be counted as rejected. What is a question by its parts has to be
refused, what is none must have no answer, and after --every of them the service is asked for its status.

Memory is that of the service after the first tenth of each flood, when the allocator has about what it needs for
the largest of them, against that at its end; what is lost with each message would show in the second half, too. A
flood must not fill the disk with its log either, so its growth is in the table.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import zmq

from bench import malformed, report, rig
from bench.program import MIB, Program, Watch, adds_up, verdict
from emstream import wire
from emstream.control import ask, control_of

GROWTH = 0.05  # of the memory
_WINDOW = 200  # questions under way: ZeroMQ's own queues, of a thousand, never fill
_ANSWER_S = 10.0
_STUCK_S = 300.0
_SAY_EVERY = 2000  # messages
_STATUS = wire.pack({"do": "status"})


def main(argv: list[str] | None = None) -> dict[str, Any]:
    argv = sys.argv[1:] if argv is None else argv
    parser = report.parser("flood", __doc__)
    parser.add_argument(
        "--messages", type=int, default=1_000_000, help="on each socket (default: %(default)s)"
    )
    parser.add_argument("--every", type=int, default=500, help="between good ones (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    arguments = parser.parse_args(argv)
    if arguments.messages < 1 or arguments.every < 1:
        parser.error("--messages and --every must be at least 1")
    if arguments.quick:
        arguments.messages, arguments.every = min(arguments.messages, 5000), min(arguments.every, 100)
    results: dict[str, Any] = {
        **report.stamp("flood", argv),
        "messages": arguments.messages,
        "every": arguments.every,
        "seed": arguments.seed,
        **flood(arguments),
    }
    report.write("flood", "Floods", results, _markdown(results), arguments)
    return results


def flood(arguments: argparse.Namespace) -> dict[str, Any]:
    with (
        tempfile.TemporaryDirectory() as name,
        rig.Children() as children,
        report.progress("flood", 2 * arguments.messages) as show,
    ):
        camera = children.start(_camera, arguments)
        endpoint, receipts_endpoint = camera.answer()
        options = (
            "--engine", "identity", "--expect", f"{malformed.SIDE}x{malformed.SIDE}:uint8",
            "--input", f"pull+{endpoint}", "--output", rig.ANYWHERE,
        )  # fmt: skip
        with Program(Path(name), *options) as service:
            subscriber = children.start(_subscriber, service.output, receipts_endpoint)
            on_input = _follow(camera, service, lambda done: show(done, "its input"))
            on_input |= subscriber.answer()
            control = control_of(service.output)
            client = children.start(_client, control, arguments)
            on_control = _follow(client, service, lambda done: show(arguments.messages + done, "its control"))
            begin_s = time.monotonic()
            status = ask(control, {"do": "status"}, _ANSWER_S)
            answers_ms = round((time.monotonic() - begin_s) * 1e3, 1)
            lives = service.lives and status["ok"]
            said = service.end()
    ledger = said["ledger"]
    return {
        "lives": lives,
        "input": {
            **on_input,
            "ledger": ledger,
            "reasons": len(said["rejected_because"]),
            "exact": adds_up(ledger)
            and ledger["rejected"] == sum(on_input["malformed"].values())
            and ledger["published"] == on_input["good"] == on_input["arrived"]
            and not ledger["missing"]
            and not on_input["wrong"],
        },
        "control": {
            **on_control,
            "answers_afterwards_ms": answers_ms,
            "exact": on_control["refused"] == on_control["refusable"]
            and on_control["answered"] == on_control["good"]
            and not on_control["wrong"],
        },
    }


def _follow(flooder: rig.Child, service: Program, show: Callable[[int], None]) -> dict[str, Any]:
    """What a flood came to and cost; `flooder` says how many messages it has sent, from when all is warm."""
    flooder.answer()
    begin_s, log_bytes, before = time.monotonic(), service.log_bytes, service.sample()
    with Watch(service, 0.2) as watch:
        while isinstance(told := flooder.answer(within_s=_STUCK_S), int):
            show(told)
    after, half = service.sample(), watch.samples[len(watch.samples) // 2]
    return {
        **told,
        "seconds": round(time.monotonic() - begin_s, 1),
        "rss_mib": {
            "before": round(before.rss_bytes / MIB, 1),
            "after": round(after.rss_bytes / MIB, 1),
            "max": round(max(sample.rss_bytes for sample in (*watch.samples, after)) / MIB, 1),
            "second_half": round((after.rss_bytes - half.rss_bytes) / MIB, 2),
            "growth": round(after.rss_bytes / before.rss_bytes - 1, 4),
        },
        "fds": {"before": before.fds, "after": after.fds},
        "log_kb": round((service.log_bytes - log_bytes) / 1e3, 1),
    }


# -- the processes -----------------------------------------------------------------------


def _camera(pipe: Connection, arguments: argparse.Namespace) -> None:
    camera = rig.Camera(malformed.SIDE, "uint8")
    pipe.send((camera.endpoint, camera.receipts_endpoint))
    camera.greet()
    rng, kinds, good = random.Random(arguments.seed), Counter[str](), 0
    for n in range(arguments.messages):
        kind, parts = malformed.message(rng)
        camera.send_parts(parts)
        kinds[kind] += 1
        if n % arguments.every == arguments.every - 1:
            camera.send(good, receipt=True)
            good += 1
        if n == arguments.messages // 10 or n % _SAY_EVERY == 0:
            camera.send(good, receipt=True)
            good += 1
            camera.wait_arrived(good - 1)
            if n >= arguments.messages // 10:
                pipe.send(n)
    camera.end()
    camera.close()
    pipe.send({"malformed": dict(kinds), "good": good})


def _subscriber(pipe: Connection, endpoint: str, receipts_endpoint: str) -> None:
    subscriber = rig.Subscriber(endpoint, receipts_endpoint)
    patterns = rig.patterns(malformed.SIDE, "uint8").astype(np.float32)
    wrong = 0
    for _, header, pixels in subscriber.frames():
        number = subscriber.arrived - 1
        whole = bytes(pixels) == patterns[number % rig.PATTERNS].tobytes()
        wrong += header["frame"] != number or not whole
    subscriber.close()
    pipe.send({"arrived": subscriber.arrived, "wrong": wrong})


def _client(pipe: Connection, control: str, arguments: argparse.Namespace) -> None:
    """Asks what makes no sense, and in between what does, without waiting for the answers one by one."""
    socket: zmq.Socket[bytes]
    with zmq.Context.instance().socket(zmq.DEALER) as socket:
        socket.linger = 0
        socket.rcvtimeo = round(1000 * _ANSWER_S)
        socket.connect(control)
        rng, kinds = random.Random(arguments.seed), Counter[str]()
        due: list[bool] = []  # of each answer to come, whether it is one to a question that makes sense
        answered: Counter[str] = Counter(
            dict.fromkeys(("refusable", "refused", "good", "answered", "wrong"), 0)
        )

        def hear(left: int) -> None:
            while len(due) > left:
                sense, answer = due.pop(0), wire.unpack(socket.recv_multipart()[-1])
                answered["answered" if sense else "refused"] += answer["ok"] is sense
                answered["wrong"] += answer["ok"] is not sense

        for n in range(arguments.messages):
            kind, parts = malformed.question(rng)
            socket.send_multipart(parts)
            kinds[kind] += 1
            if malformed.refusable(parts):
                due.append(False)
                answered["refusable"] += 1
            if n % arguments.every == arguments.every - 1:
                socket.send_multipart([b"", _STATUS])
                due.append(True)
                answered["good"] += 1
            hear(_WINDOW)
            if n == arguments.messages // 10 or n % _SAY_EVERY == 0:
                hear(0)
                if n >= arguments.messages // 10:
                    pipe.send(n)
        hear(0)
        # What needed no answer had none, if this is the next thing that is heard.
        socket.send_multipart([b"", _STATUS])
        answered["wrong"] += wire.unpack(socket.recv_multipart()[-1])["ok"] is not True
    pipe.send({"malformed": dict(kinds), **answered})


# -- on paper ----------------------------------------------------------------------------


def _markdown(results: dict[str, Any]) -> str:
    sockets = {"input": results["input"], "control": results["control"]}
    columns = ["socket", "malformed", "refused", "good ones sent", "came through", "wrong", "seconds",
               "memory before [MiB]", "after", "at most", "in the second half",
               "files open before", "after", "log grown [kB]"]  # fmt: skip
    rows = []
    for name, each in sockets.items():
        on_input = name == "input"
        rows.append(
            [
                name,
                sum(each["malformed"].values()),
                each["ledger"]["rejected"] if on_input else each["refused"],
                each["good"],
                each["arrived"] if on_input else each["answered"],
                each["wrong"],
                each["seconds"],
                each["rss_mib"]["before"],
                each["rss_mib"]["after"],
                each["rss_mib"]["max"],
                f"{each['rss_mib']['second_half']:+.1f}",
                each["fds"]["before"],
                each["fds"]["after"],
                each["log_kb"],
            ]
        )
    targets = [
        ["every malformed message is counted as rejected, every good frame comes out", "",
         verdict(sockets["input"]["exact"])],
        ["every malformed question is refused or ignored, every good one answered", "",
         verdict(sockets["control"]["exact"])],
        ["the service lives and answers afterwards", f"{sockets['control']['answers_afterwards_ms']:g} ms",
         verdict(results["lives"])],
        *(
            [f"memory flat within {GROWTH:.0%}, {name}", f"{each['rss_mib']['growth']:+.1%}",
             verdict(abs(each["rss_mib"]["growth"]) <= GROWTH)]
            for name, each in sockets.items()
        ),
    ]  # fmt: skip
    kinds = ", ".join(f"{number:,} {kind}" for kind, number in sorted(sockets["input"]["malformed"].items()))
    ignored = sum(sockets["control"]["malformed"].values()) - sockets["control"]["refusable"]
    return "\n\n".join(
        [
            report.table(columns, rows),
            report.table(["target", "measured", ""], targets),
            f"On the input: {kinds}; {sockets['input']['reasons']} different reasons kept. On the control socket "
            f"{ignored:,} had no question's parts and were ignored, as they should be.",
        ]
    )


if __name__ == "__main__":
    main()
