"""Tables, notes and a progress bar. On a terminal they use rich, if it is installed. Elsewhere they are plain text."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from textwrap import fill


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Sequence[str] = ()) -> None:
    """Print a table. The columns named in ``numbers`` are aligned to the right."""
    if _rich_for(sys.stdout):
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        for column in columns:
            table.add_column(Text(column), justify="right" if column in numbers else "left", overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))  # as Text, so that a name with brackets is not taken for markup
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
    """Print sentences as a list, in lines of at most 100 characters."""
    for note in notes:
        print(fill(note, 100, initial_indent="- ", subsequent_indent="  "))


def print_status(text: str) -> None:
    """Print a line on stderr, so that a table or JSON on stdout stays alone."""
    print(text, file=sys.stderr)


@contextmanager
def progress_bar(steps: int) -> Iterator[Callable[[str], None]]:
    """Show on stderr how far the work is. The block gets a function to call with the name of each step that begins."""
    if not _rich_for(sys.stderr):
        yield lambda step: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False)
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=steps)
        begun = 0

        def advance(step: str) -> None:
            nonlocal begun
            bar.update(task, completed=begun, description=step)
            begun += 1

        yield advance


def _rich_for(stream: object) -> bool:
    """Whether to use rich. A pipe or a file gets plain text, because rich would wrap lines at the terminal's width."""
    return bool(getattr(stream, "isatty", bool)()) and find_spec("rich") is not None
