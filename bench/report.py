"""How every bench writes down what it measured: hardware, tables, files in results/."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
LIBRARIES = (
    "numpy",
    "pyzmq",
    "msgpack",
    "openvino",
    "onnxruntime",
    "torch",
    "h5py",
    "hdf5plugin",
    "dectris-compression",
    "p4p",
    "numcodecs",
)
_FEATURES = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_bf16",
    "asimd",
    "bf16",
)  # as /proc/cpuinfo has them
PERCENTILES = {"p50": 50.0, "p99": 99.0, "p99_9": 99.9, "max": 100.0}


def parser(theme: str, question: str | None) -> argparse.ArgumentParser:
    """Arguments that every bench has; `question` is its docstring."""
    made = argparse.ArgumentParser(
        prog=f"python -m bench.{theme}",
        description=question,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--json", type=Path, metavar="OUT.json", help="write the results here, too")
    made.add_argument(
        "--quick", action="store_true", help="a smoke run: seconds, and numbers that mean nothing"
    )
    made.add_argument(
        "--results",
        type=Path,
        metavar="FOLDER",
        help="where the results go; by default bench/results, and nowhere with --quick",
    )
    return made


def stamp(theme: str, argv: Sequence[str]) -> dict[str, Any]:
    """Which command, of which commit, when, on what."""
    return {
        "command": shlex.join(["python", "-m", f"bench.{theme}", *argv]),
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": hardware(),
    }


def hardware() -> dict[str, Any]:
    name, flags = _processor()
    return {
        "processor": name,
        "features": [feature for feature in _FEATURES if feature in flags],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "load_average": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "libraries": {name: version for name in LIBRARIES if (version := _version(name))},
    }


def percentiles(values: Sequence[float] | np.ndarray, digits: int = 3) -> dict[str, float | None]:
    """p50, p99, p99.9 and max: each a value that was measured, nothing interpolated."""
    if not len(values):
        return dict.fromkeys(PERCENTILES)
    return {
        name: round(float(np.percentile(values, percent, method="inverted_cdf")), digits)
        for name, percent in PERCENTILES.items()
    }


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; numbers to the right, None as a dash."""
    cells = [list(columns), *([_cell(value) for value in row] for row in rows)]
    widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(columns))]
    right = [
        bool(rows) and all(isinstance(row[i], (int, float, type(None))) for row in rows)
        for i in range(len(columns))
    ]
    rule = ["-" * (width - 1) + ":" if r else "-" * width for width, r in zip(widths, right, strict=True)]
    lines = [cells[0], rule, *cells[1:]]
    return "\n".join(
        "| "
        + " | ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True))
        + " |"
        for line in lines
    )


def write(
    theme: str, title: str, results: Mapping[str, Any], body: str, arguments: argparse.Namespace
) -> Path | None:
    """Print `body` (Markdown) and write it with `results`; returns the folder of the results, if any."""
    print(body)
    if arguments.json:
        arguments.json.write_text(_json(results))
    folder: Path | None = arguments.results or (None if arguments.quick else RESULTS)
    if folder:
        save(theme, title, results, body, folder)
    return folder


def save(theme: str, title: str, results: Mapping[str, Any], body: str, folder: Path) -> None:
    """Write THEME.json and THEME.md; each is the old one or the whole new one, also when interrupted."""
    folder.mkdir(parents=True, exist_ok=True)
    markdown = f"# {title}\n\n{_provenance(results)}\n\n{body}\n"
    for name, text in {f"{theme}.json": _json(results), f"{theme}.md": markdown}.items():
        partial = folder / f"{name}.partial"
        partial.write_text(text)
        partial.replace(folder / name)


def _json(results: Mapping[str, Any]) -> str:
    return json.dumps(results, indent=2, allow_nan=False) + "\n"


@contextmanager
def progress(title: str, total: float) -> Iterator[Callable[[float, str], None]]:
    """A bar on stderr, in a log a line for every twentieth; what this yields takes how much is done, and of what."""
    console, said = Console(stderr=True), -1
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, refresh_per_second=2) as bar:
        task = bar.add_task(title, total=total)

        def show(done: float, what: str) -> None:
            nonlocal said
            bar.update(task, completed=done, description=f"{title}: {what}")
            if not console.is_terminal and (part := int(20 * done / total)) > said:
                said = part
                print(
                    f"{datetime.now(UTC):%H:%M:%S} {5 * part} % {title}: {what}", file=sys.stderr, flush=True
                )

        yield show


def _provenance(results: Mapping[str, Any]) -> str:
    machine = results["hardware"]
    libraries = ", ".join(f"{name} {version}" for name, version in machine["libraries"].items())
    return (
        f"`{results['command']}`\n\n"
        f"commit {results['commit']}, {results['date']}; {machine['processor']} "
        f"({', '.join(machine['features']) or 'no vector units known'}), {machine['cores']} cores, "
        f"{machine['memory_gib']} GiB, load average {machine['load_average']} at the start; "
        f"{machine['system']}, Python {machine['python']}, {libraries}"
    )


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value)


def _commit() -> str | None:
    """The commit, with -dirty when tracked files differ from it; None outside a repository."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=ROOT,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()


def _processor() -> tuple[str, set[str]]:
    """Name and instruction sets."""
    facts: dict[str, str] = {}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            facts.setdefault(key.strip(), value.strip())
    name = facts.get("model name") or platform.processor() or platform.machine()
    return name, set((facts.get("flags") or facts.get("Features") or "").split())


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
