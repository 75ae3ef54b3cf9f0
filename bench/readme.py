"""Copy the measured tables into the README: ``python -m bench.readme``.

Each goes between ``<!-- bench: NAME -->`` and ``<!-- end -->``, as bench/results/NAME.md has it.
"""

from __future__ import annotations

import re

from bench.report import RESULTS, ROOT


def fill(readme: str) -> str:
    """The README with every marked table replaced by the newest one."""

    def table(match: re.Match[str]) -> str:
        path = RESULTS / f"{match[1]}.md"
        body = path.read_text().split("\n", 1)[1].strip() if path.exists() else "not measured"
        body = body.replace("\n## ", "\n#### ")
        return f"<!-- bench: {match[1]} -->\n{body}\n<!-- end -->"

    return re.sub(r"<!-- bench: ([\w/]+) -->.*?<!-- end -->", table, readme, flags=re.DOTALL)


def main() -> None:
    path = ROOT / "README.md"
    path.write_text(fill(path.read_text()))


if __name__ == "__main__":
    main()
