"""A table and a progress bar: of rich on a terminal, if it is installed. Elsewhere the table is plain text."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Sequence
from importlib.util import find_spec

Job = tuple[str, Callable[[], None]]
"""A piece of work, with what the progress bar calls it."""


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table of numbers, with names in the first column."""
    if _rich_for(sys.stdout):
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
        for index, (column, *cells) in enumerate(zip(columns, *rows, strict=True)):
            title = textwrap.fill(column, max(map(len, cells), default=1), break_long_words=False)
            table.add_column(Text(title), justify="right" if index else "left", overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))  # as Text, so that nothing is taken for markup
        Console().print(table)
        return
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    for row in (columns, *rows):
        _, *numbers = (f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True))
        print("  ".join([f"{row[0]:<{widths[0]}}", *numbers]))


def print_status(text: str) -> None:
    """Print a line on stderr, so that a table or JSON on stdout stays alone."""
    print(text, file=sys.stderr)


def run_jobs(jobs: Sequence[Job]) -> None:
    """Do pieces of work one after the other, with a progress bar on stderr."""
    if not _rich_for(sys.stderr):
        for _, work in jobs:
            work()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False)
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=len(jobs))
        for name, work in jobs:
            bar.update(task, description=name)
            work()
            bar.advance(task)


def _rich_for(stream: object) -> bool:
    """Whether to use rich. A pipe or a file gets plain text, because rich would wrap lines at the terminal's width."""
    return bool(getattr(stream, "isatty", bool)()) and find_spec("rich") is not None
