"""Tables on a terminal."""

from __future__ import annotations

import io
import sys

import pytest

from lightning_convbn.command import terminal


def test_a_table_on_a_terminal_takes_names_literally(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdout", screen := Terminal())
    terminal.print_table(("name", "bytes"), [("[red]a[/red]", "1"), ("b" * 200, "22")], numbers=["bytes"])
    assert "[red]a[/red]" in screen.getvalue()
    assert screen.getvalue().count("b") == 200 + len("bytes") - 4  # folded, not cut off
