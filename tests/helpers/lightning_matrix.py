"""The table of docs/use/works-with-lightning.md: what works with which feature of Lightning, and the test that says so.

Each test that runs over many features checks that the table has a row for each of them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Row(NamedTuple):
    """One feature.

    Attributes:
        feature: What a user looks for.
        state: Whether it works.
        test: ``file.py``, ``file.py::function`` or ``file.py::function[parameter]``, or why there is none.
    """

    feature: str
    state: str
    test: str

    @property
    def file(self) -> str:
        """The file of the test."""
        return self.test.partition("::")[0]

    @property
    def function(self) -> str:
        """The name of the test."""
        return self.test.partition("::")[2].partition("[")[0]

    @property
    def parameter(self) -> str:
        """The parameter of the test."""
        return self.test.partition("[")[2].removesuffix("]")


def read_rows() -> list[Row]:
    """Read the tables of the page, without their heads."""
    (page,) = (ROOT / "docs").rglob("works-with-lightning.md")
    cells = [line.strip("| ").split(" | ") for line in re.findall(r"^\| .* \|$", page.read_text(), re.MULTILINE)]
    return [Row(feature, state, test.strip("`")) for feature, state, test in cells if state != "state"]


def documented_parameters(function: str) -> set[str]:
    """Return the parameters of a test that have a row."""
    return {row.parameter for row in read_rows() if row.function == function}
