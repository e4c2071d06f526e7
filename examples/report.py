"""What every measurement in the docs says of itself: the command that made it and the versions it was made with."""

from __future__ import annotations

import importlib
import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "docs" / "benchmarks"


def write_json(path: Path, rows: Sequence[dict[str, Any]], packages: Sequence[str], **facts: Any) -> Path:
    """Write rows with the command line, the versions of Python and of packages, and whatever else is to be known.

    Args:
        path: The file; its folder is made.
        rows: The results.
        packages: Names of the modules whose versions matter.
        **facts: Further entries.

    Returns:
        The path.
    """
    versions = {name: importlib.import_module(name).__version__ for name in packages}
    report = {
        "command": " ".join(["python", f"examples/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "versions": {"python": platform.python_version(), **versions},
        **facts,
        "rows": list(rows),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    return path


def as_table(rows: Sequence[dict[str, Any]]) -> str:
    """Lay rows with the same keys out in columns; numbers stand to the right."""
    lines = [list(rows[0]), *([_shown(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    left = [isinstance(value, str) for value in rows[0].values()]
    return "\n".join(
        "  ".join(cell.ljust(w) if text else cell.rjust(w) for cell, w, text in zip(line, widths, left, strict=True))
        for line in lines
    )


def _shown(value: object) -> str:
    return (
        f"{value:.3g}"
        if isinstance(value, float) and abs(value) < 10
        else f"{value:.1f}"
        if isinstance(value, float)
        else str(value)
    )
