"""What all tests of the command share."""

import sys
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _own_folder_and_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])  # the command adds the current directory
