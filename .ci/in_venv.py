"""Run a command in the project's own virtual environment, which is set up first if need be.

    python3 .ci/in_venv.py pytest
    python3 .ci/in_venv.py python examples/finetune.py

Needs Python 3.10 or later and pip, nothing else. The environment is `.venv` in the project's root; it is brought up to
date when `pyproject.toml` or the Python version has changed, and reused as it is otherwise.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
BIN = VENV / ("Scripts" if os.name == "nt" else "bin")
STAMP = VENV / "up-to-date"
EXTRAS = "examples,test"


def main(command: list[str]) -> int:
    """Set up the environment if need be and run the command in it; return its exit status."""
    if not command:
        print(__doc__)
        return 2
    if sys.version_info < (3, 10):  # noqa: UP036 - whoever has an older one meets this line first
        print(f"Python 3.10 or later is needed; this is {sys.version.split()[0]}", file=sys.stderr)
        return 2
    state = [sys.version, hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest()]
    found = json.loads(STAMP.read_text()) if STAMP.exists() else [None, None]
    if found != state:
        set_up(anew=found[0] != state[0])
        STAMP.write_text(json.dumps(state))
    environment = {**os.environ, "VIRTUAL_ENV": str(VENV), "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}"}
    program = shutil.which(command[0], path=environment["PATH"])
    if program is None:
        print(f"{command[0]!r} is neither in {BIN} nor on the PATH", file=sys.stderr)
        return 127
    return subprocess.call([program, *command[1:]], env=environment)


def set_up(*, anew: bool) -> None:
    """Create the environment if need be, and install the project with what its examples and tests need."""
    print(f"Setting up {VENV} (a few minutes, once: PyTorch is several GB)", flush=True)
    if anew:
        create()
    pip = [str(BIN / "python"), "-m", "pip", "--disable-pip-version-check"]
    subprocess.check_call([*pip, "install", "--quiet", "--editable", f"{ROOT}[{EXTRAS}]"])


def create() -> None:
    """Create an empty environment with pip."""
    # Debian's Python has pip but not always ensurepip, so the environment gets its pip from the one outside.
    subprocess.check_call([sys.executable, "-m", "venv", "--clear", "--without-pip", str(VENV)])
    pip = [sys.executable, "-m", "pip", "--python", str(BIN / "python"), "--disable-pip-version-check"]
    subprocess.check_call([*pip, "install", "--quiet", "pip"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
