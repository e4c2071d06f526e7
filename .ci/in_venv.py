"""Run a command in the project's own virtual environment, which is set up first if need be.

    python3 .ci/in_venv.py pytest
    python3 .ci/in_venv.py python examples/finetune.py
    python3.10 .ci/in_venv.py --lowest pytest

Needs Python 3.10 or later and pip, nothing else. The environment is `.venv` in the project's root; it is brought up to
date when `pyproject.toml` or the Python version has changed, and reused as it is otherwise. With `--lowest` it is
`.venv-lowest`, with the oldest versions that the project supports.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOWEST = ROOT / ".ci" / "lowest.txt"
EXTRAS = "examples,test"


def main(command: list[str]) -> int:
    """Set up the environment if need be and run the command in it; return its exit status."""
    lowest = command[:1] == ["--lowest"]
    command = command[1:] if lowest else command
    if not command:
        print(__doc__)
        return 2
    if sys.version_info < (3, 10):  # noqa: UP036 - whoever has an older one meets this line first
        print(f"Python 3.10 or later is needed; this is {sys.version.split()[0]}", file=sys.stderr)
        return 2
    venv = ROOT / (".venv-lowest" if lowest else ".venv")
    bin = venv / ("Scripts" if os.name == "nt" else "bin")
    stamp = venv / "up-to-date"
    wanted = (ROOT / "pyproject.toml").read_bytes() + (LOWEST.read_bytes() if lowest else b"")
    state = [sys.version, hashlib.sha256(wanted).hexdigest()]
    found = json.loads(stamp.read_text()) if stamp.exists() else [None, None]
    if found != state:
        set_up(venv, bin / "python", anew=found[0] != state[0], constraints=["--constraint", str(LOWEST)] * lowest)
        stamp.write_text(json.dumps(state))
    environment = {**os.environ, "VIRTUAL_ENV": str(venv), "PATH": f"{bin}{os.pathsep}{os.environ.get('PATH', '')}"}
    program = shutil.which(command[0], path=environment["PATH"])
    if program is None:
        print(f"{command[0]!r} is neither in {bin} nor on the PATH", file=sys.stderr)
        return 127
    return subprocess.call([program, *command[1:]], env=environment)


def set_up(venv: Path, python: Path, *, anew: bool, constraints: list[str]) -> None:
    """Create the environment if need be, and install the project with what its examples and tests need."""
    print(f"Setting up {venv} (a few minutes, once: PyTorch is several GB)", flush=True)
    if anew:
        create(venv, python)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    subprocess.check_call([*pip, "install", "--quiet", *constraints, "--editable", f"{ROOT}[{EXTRAS}]"])


def create(venv: Path, python: Path) -> None:
    """Create an empty environment with pip."""
    # Debian's Python has pip but not always ensurepip, so the environment gets its pip from the one outside.
    subprocess.check_call([sys.executable, "-m", "venv", "--clear", "--without-pip", str(venv)])
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
    subprocess.check_call([*pip, "install", "--quiet", "pip"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
