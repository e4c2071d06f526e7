"""Results as files and tables: a JSON file holds the rows, the command that made them, and the versions it ran with."""

from __future__ import annotations

import importlib
import json
import os
import platform
import re
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lightning_convbn.exporting.atomic_file import atomic_write

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "docs" / "benchmarks"
MOVED = {
    "examples/benchmark.py": "examples/benchmarks/all_modes.py",
    "examples/compare_modes.py": "examples/experiment/compare_modes.py",
}
"""Scripts whose old path is in commands that a page shows: the results keep the command as it was typed."""


def write_json(path: Path, rows: Sequence[dict[str, Any]], packages: Sequence[str], **facts: Any) -> Path:
    """Write rows with the command line, the versions of Python and of packages, and further facts.

    Args:
        path: The file. It is written whole or not at all, and its folder is made.
        rows: The results.
        packages: Names of the modules whose versions are written down.
        **facts: Further entries.

    Returns:
        The path.
    """
    report = {"command": command(), "versions": versions(packages), **facts, "rows": list(rows)}
    text = re.sub(r"\[[\s\d.,e-]+\]", lambda numbers: " ".join(numbers[0].split()), json.dumps(report, indent=1))
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write_text(text + "\n")
    return path


def command() -> str:
    """Return the command line that a person would type at the root of the repository."""
    settings = [f"{name}={value}" for name, value in allocator_settings().items()]
    script = Path(sys.argv[0]).absolute()
    shown = script.relative_to(ROOT).as_posix() if script.is_relative_to(ROOT) else script.name
    return " ".join([*settings, "python", shown, *sys.argv[1:]])


def moved_scripts(commands: Sequence[str]) -> list[str]:
    """Return a sentence for each script that recorded commands call by a path where it was before."""
    return [
        f"`{before}` was moved: it is `{now}` now."
        for before, now in MOVED.items()
        if any(f"python {before}" in command for command in commands)
    ]


def allocator_settings() -> dict[str, str]:
    """Return the environment variables that set glibc's allocator. They change step times by several percent."""
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith("MALLOC_")}


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Return the versions of Python and of modules."""
    found = {name: importlib.import_module(name).__version__ for name in packages}
    return {"python": platform.python_version(), **{name: str(version) for name, version in found.items()}}


def machine(device: torch.device) -> dict[str, Any]:
    """Describe the machine of a measurement, and the settings that change how fast PyTorch runs there."""
    cpu = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.+)$", cpu.read_text(), re.MULTILINE) if cpu.exists() else []
    facts: dict[str, Any] = {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "allocator": allocator_settings(),
    }
    if device.type == "cuda":
        facts |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return facts


def as_table(rows: Sequence[dict[str, Any]]) -> str:
    """Lay out rows with the same keys in columns, numbers aligned to the right."""
    lines = [list(rows[0]), *([_shown(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    left = [isinstance(value, str) for value in rows[0].values()]
    return "\n".join(
        "  ".join(cell.ljust(w) if text else cell.rjust(w) for cell, w, text in zip(line, widths, left, strict=True))
        for line in lines
    )


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 10 else f"{value:.1f}"
    return str(value)


def with_table(page: str, mark: str, lines: Sequence[str]) -> str:
    """Replace what is between two marks in a page, ``<!-- mark -->`` and ``<!-- /mark -->``, by a table.

    Raises:
        ValueError: If the page has not both marks.
    """
    before, start, rest = page.partition(f"<!-- {mark} -->\n")
    _, end, after = rest.partition(f"<!-- /{mark} -->\n")
    if not start or not end:
        raise ValueError(f"the page has no place for a table: write <!-- {mark} --> and <!-- /{mark} --> into it")
    return "".join([before, start, "\n".join(lines), "\n", end, after])


def fill(page: Path, tables: Mapping[str, Sequence[str]]) -> Path:
    """Put tables between their marks in a file; return its path."""
    page.write_text(filled(page.read_text(), tables))
    return page


def filled(page: str, tables: Mapping[str, Sequence[str]]) -> str:
    """Replace what is between the marks of several tables in a page."""
    for mark, lines in tables.items():
        page = with_table(page, mark, lines)
    return page


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], words: Collection[int] = (0,)) -> list[str]:
    """Draw a table in Markdown.

    Args:
        header: The titles of the columns.
        rows: The cells.
        words: The columns of words. The others hold numbers, which are aligned to the right.
    """
    rule = ["---" if column in words else "---:" for column in range(len(header))]
    return [f"| {' | '.join(header)} |", "|".join(["", *rule, ""]), *(f"| {' | '.join(cells)} |" for cells in rows)]
