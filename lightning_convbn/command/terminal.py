"""Tables and a progress bar: by rich on a terminal where it is installed, in plain text elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from textwrap import fill


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Sequence[str] = ()) -> None:
    """Print a table; the columns named in ``numbers`` are aligned to the right."""
    if _rich_for(sys.stdout):
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        for column in columns:
            table.add_column(Text(column), justify="right" if column in numbers else "left", overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))  # Text: a name is not markup
        Console().print(table)
        return
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    for row in (columns, *rows):
        cells = (
            cell.rjust(width) if column in numbers else cell.ljust(width)
            for column, cell, width in zip(columns, row, widths, strict=True)
        )
        print("  ".join(cells).rstrip())


def print_notes(notes: Sequence[str]) -> None:
    """Print sentences as a list, in lines that are short enough to read."""
    for note in notes:
        print(fill(note, 100, initial_indent="- ", subsequent_indent="  "))


@contextmanager
def progress_bar(stages: int) -> Iterator[Callable[[str], None]]:
    """Show how far the work is, on stderr; the block receives a function to call with each stage that begins."""
    if not _rich_for(sys.stderr):
        yield lambda stage: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False)
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=stages)
        begun = 0

        def advance(stage: str) -> None:
            nonlocal begun
            bar.update(task, completed=begun, description=stage)
            begun += 1

        yield advance


def _rich_for(stream: object) -> bool:
    """Plain text goes into pipes and files, so that nothing there is folded to the width of a terminal."""
    return bool(getattr(stream, "isatty", bool)()) and find_spec("rich") is not None
