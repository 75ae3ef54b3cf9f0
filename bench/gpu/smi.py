"""What nvidia-smi and other commands say. Nothing here changes a setting."""

from __future__ import annotations

import subprocess

from bench.gpu.stage import last_line


def said(command: list[str], within_s: float = 45) -> tuple[str | None, str]:
    """First line of what a command printed; without one, why."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=within_s)
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, last_line(str(error))
    if done.returncode:
        return None, last_line(done.stderr or done.stdout)
    lines = done.stdout.strip().splitlines()
    return (lines[0].strip() if lines else None), "it said nothing"


def card() -> str | None:
    """Name of the first GPU."""
    return said(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"])[0]


def clocks() -> str:
    """The GPU's clocks at this moment."""
    wanted = "clocks.sm,clocks.mem,power.draw,temperature.gpu"
    value, why = said(["nvidia-smi", f"--query-gpu={wanted}", "--format=csv,noheader"], within_s=10)
    return f"{wanted}: {value}" if value else why
