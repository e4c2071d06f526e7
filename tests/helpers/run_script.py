"""Run a script as a person does, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]


def type_in(folder: Path, script: str, *args: str, timeout: float = 300, **environment: str) -> str:
    """Run a script in a folder, which Python also imports from; return what it prints."""
    (folder / "train.py").write_text(script)
    plain = {name: value for name, value in os.environ.items() if name != "LIGHTNING_CONVBN"}
    path = os.pathsep.join(map(str, (folder, TESTS.parent, TESTS)))
    done = subprocess.run(
        [sys.executable, "train.py", *args],
        cwd=folder,
        env={**plain, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr
