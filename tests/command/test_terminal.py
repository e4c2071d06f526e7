"""Tables and the progress bar on a terminal, and without one."""

from __future__ import annotations

import io
import sys

import pytest

from lightning_convbn.command import terminal


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_table_on_a_terminal_takes_names_literally(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", screen := Terminal())
    terminal.print_table(("name", "bytes"), [("[red]a[/red]", "1"), ("b" * 200, "22")])
    assert "[red]a[/red]" in screen.getvalue()
    assert screen.getvalue().count("b") == 200 + len("bytes") - 4  # folded, not cut off


@pytest.mark.parametrize("has_rich", [True, False])
def test_the_bar_names_each_piece_of_work(has_rich: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    if not has_rich:
        monkeypatch.setattr(terminal, "find_spec", lambda name: None)
    done: list[int] = []
    terminal.run_jobs([("counting", lambda: done.append(1)), ("timing [red]", lambda: done.append(2))])
    assert done == [1, 2]
    assert ("timing [red]" in screen.getvalue()) == has_rich
    terminal.print_table(("name",), [("plain",)])
