"""The tables of docs/use/works-with-lightning.md: what works with which feature of Lightning, and what does not."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "use" / "works-with-lightning.md"


def section(heading: str) -> str:
    """Return the text below a heading."""
    return PAGE.read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def names_that_work() -> set[str]:
    """Return what the table of what works names as code."""
    return set(re.findall(r"`([^`]+)`", section("Works")))
