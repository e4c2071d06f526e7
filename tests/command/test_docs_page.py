"""Every command in the docs prints what the docs show."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest

from lightning_convbn.command.main import main

ROOT = Path(__file__).resolve().parents[2]


class TestDocs:
    PAGE = (ROOT / "docs" / "use" / "inspect-and-measure.md").read_text()
    BLOCKS = re.findall(r"```console\n\$ lightning-convbn (.*)\n((?:.*\n)*?)```", PAGE)

    @pytest.mark.parametrize(
        ("typed", "shown"),
        [
            pytest.param(typed, shown, id=typed, marks=[pytest.mark.slow] if "--budget" in typed else [])
            for typed, shown in BLOCKS
        ],
    )
    def test_every_command_of_the_page_says_what_the_page_shows(
        self, typed: str, shown: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delitem(sys.modules, "models", raising=False)
        (source,) = re.findall(r"```python\n(.*?)```", self.PAGE, re.DOTALL)
        Path("models.py").write_text(source)
        status = main(shlex.split(typed))
        out, err = capsys.readouterr()
        assert status == (1 if "lightning-convbn: " in shown else 0)
        assert (out + err).split() == shown.split()

    def test_there_are_blocks(self) -> None:
        assert {typed.split()[0] for typed, _ in self.BLOCKS} == {"inspect", "measure", "export"}

    def test_the_readme_has_the_batches_of_the_page(self) -> None:
        readme = " ".join((ROOT / "README.md").read_text().split())
        batches = re.search(r"batch (\d+) in Eval mode, (\d+) in Tune mode, and (\d+) where blocks run twice", readme)
        assert batches is not None
        found = re.findall(r"^(?:Eval|Tune|Tune \+ blocks)  .* (\d+)$", self.PAGE, re.MULTILINE)
        assert found == list(batches.groups())
