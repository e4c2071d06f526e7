"""Run a command in the project's own virtual environment, which is set up first if need be.

    python3 .ci/in_venv.py pytest
    python3 .ci/in_venv.py python examples/finetune.py
    python3.11 .ci/in_venv.py --lowest pytest

Needs Python 3.11 or later and pip, nothing else. The environment is `.venv` in the project's root. A script of
`examples/` gets the packages that it needs; the first other command adds those of the tests. The environment is brought
up to date when `pyproject.toml` or the Python version has changed, and reused as it is otherwise. With `--lowest` it is
`.venv-lowest`, with the oldest versions that the project supports.

Packages are installed by uv, which is several times as fast as pip. If uv is neither on the PATH nor importable, pip
installs it into the environment. If uv can't be had, or fails, pip does its work.
"""

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOWEST = ROOT / ".ci" / "lowest.txt"
EXTRAS = ("finetune", "examples", "test")  # of pyproject.toml; each holds the ones before it


def main(command: list[str]) -> int:
    """Set up the environment if need be and run the command in it; return its exit status."""
    lowest = command[:1] == ["--lowest"]
    command = command[1:] if lowest else command
    if not command:
        print(__doc__)
        return 2
    if sys.version_info < (3, 11):  # noqa: UP036 - whoever has an older one meets this line first
        print(f"Python 3.11 or later is needed; this is {sys.version.split()[0]}", file=sys.stderr)
        return 2
    venv = ROOT / (".venv-lowest" if lowest else ".venv")
    bin = venv / ("Scripts" if os.name == "nt" else "bin")
    stamp = venv / "up-to-date"
    wanted = (ROOT / "pyproject.toml").read_bytes() + (LOWEST.read_bytes() if lowest else b"")
    state = [sys.version, hashlib.sha256(wanted).hexdigest()]
    extra = extra_for(command)
    *found, installed = json.loads(stamp.read_text()) if stamp.exists() else [None, None, extra]
    if found != state or EXTRAS.index(installed) < EXTRAS.index(extra):
        stamp.unlink(missing_ok=True)
        constraints = ["--constraint", str(LOWEST)] * lowest
        set_up(venv, bin / "python", extra, anew=found[:1] != state[:1], constraints=constraints)
        stamp.write_text(json.dumps([*state, extra]))
    environment = {**os.environ, "VIRTUAL_ENV": str(venv), "PATH": f"{bin}{os.pathsep}{os.environ.get('PATH', '')}"}
    program = shutil.which(command[0], path=environment["PATH"])
    if program is None:
        print(f"{command[0]!r} is neither in {bin} nor on the PATH", file=sys.stderr)
        return 127
    return subprocess.call([program, *command[1:]], env=environment)


def extra_for(command: list[str]) -> str:
    """Name the extra that a command needs."""
    script = Path(*command[1:2]).as_posix() if command[0].startswith("python") else ""
    if script == "examples/finetune.py":
        return "finetune"
    return "examples" if script.startswith("examples/") else "test"


def set_up(venv: Path, python: Path, extra: str, *, anew: bool, constraints: list[str]) -> None:
    """Create the environment if need be, and install the project with one of its extras."""
    print(f"Setting up {venv} (a minute or more, once: PyTorch is several GB)", flush=True)
    if anew:
        # Debian's Python has pip but not always ensurepip, so the environment gets its pip from the one outside.
        subprocess.check_call([sys.executable, "-m", "venv", "--clear", "--without-pip", str(venv)])
    wanted = [*constraints, "--editable", f".[{extra}]"]
    uv = find_uv()
    if not uv:
        install_pip(python)
        if succeeds([str(python), "-m", "pip", "install", "--quiet", "uv"]):
            uv = [str(python), "-m", "uv"]
    # The tests of the built package use the environment's pip.
    if uv and succeeds([*uv, "pip", "install", "--quiet", "--python", str(python), "pip", *wanted]):
        return
    print("uv could not install the packages; now pip does, which takes some minutes", flush=True)
    install_pip(python)
    subprocess.check_call([str(python), "-m", "pip", "install", "--quiet", *wanted], cwd=ROOT)


def find_uv() -> list[str]:
    """Return a command that runs uv, or nothing if there is none."""
    commands = [["uv"]] if shutil.which("uv") else []
    if importlib.util.find_spec("uv"):
        commands.append([sys.executable, "-m", "uv"])
    # A program of that name need not work: pyenv's stand-ins fail unless the package is in the Python that is chosen.
    return next((command for command in commands if succeeds([*command, "--version"], stdout=subprocess.DEVNULL)), [])


def succeeds(command: list[str], **options: int) -> bool:
    """Run a command in the project's root; tell whether it could be run and reported success."""
    try:
        return subprocess.call(command, cwd=ROOT, **options) == 0
    except OSError:
        return False


def install_pip(python: Path) -> None:
    """Install pip into the environment by the pip of the Python that runs this."""
    subprocess.check_call([sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "pip"])


if __name__ == "__main__":
    os.environ.setdefault("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    sys.exit(main(sys.argv[1:]))
