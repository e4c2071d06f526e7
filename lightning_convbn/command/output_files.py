"""Writes the files that the options ``--json``, ``--html`` and ``--plot`` name."""

from __future__ import annotations

import json
import platform
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lightning_convbn.command.errors import CommandError, errors_in_one_line
from lightning_convbn.command.terminal import print_status
from lightning_convbn.exporting.atomic_file import atomic_write, check_writable

STDOUT = "-"  # the value of --json without a file


def check_output_files(options: Namespace) -> None:
    """Raise a `CommandError` if one of the files can't be written."""
    for name in ("json", "plot", "html"):
        path = getattr(options, name, None)
        if path is not None and path != STDOUT:
            with errors_in_one_line():
                check_writable(f"--{name} {path}", Path(path))


def write_json(options: Namespace, **content: Any) -> None:
    """Print or write JSON, if ``--json`` was given. The model, the command and the versions are added."""
    if options.json is None:
        return
    libraries = [package for package in ("torch", "torchvision", "timm") if package in sys.modules]
    versions = {name: installed_version(name) for name in ("lightning-convbn", *libraries)}
    versions["python"] = platform.python_version()
    facts = {"model": options.model, "command": options.typed, "versions": versions}
    text = json.dumps({**facts, **content}, indent=1)
    if options.json == STDOUT:
        print(text)
        return
    with output_file(Path(options.json)) as path:
        path.write_text(f"{text}\n", encoding="utf-8")


@contextmanager
def output_file(path: Path) -> Iterator[Path]:
    """Give the block a path to write to. If it succeeds, move the file to ``path`` and say so on stderr."""
    try:
        with atomic_write(path) as temporary:
            yield temporary
    except OSError as error:
        raise CommandError(f"{path} was not written: {error.strerror or error}") from error
    print_status(f"wrote {path}")


def installed_version(package: str) -> str:
    """Return the version of an installed package."""
    try:
        return version(package)
    except PackageNotFoundError:  # the command runs from a source tree
        return "(not installed)"
