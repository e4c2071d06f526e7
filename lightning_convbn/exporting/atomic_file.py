"""Writes a file completely or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory


def check_writable(where: str, path: Path) -> None:
    """Raise a ValueError if no file can be written to ``path``. The error text begins with ``where``.

    A temporary folder is made beside the file and removed again, so this really tries to write.
    """
    if path.is_dir():
        raise ValueError(f"{where} is a folder; name a file in it")
    if not path.resolve().parent.is_dir():
        raise ValueError(f"{where}: there is no folder {str(path.resolve().parent)!r}; make it first")
    try:
        _folder_beside(path).cleanup()
    except OSError as error:
        raise ValueError(f"{where}: nothing can be written to its folder ({error}); name another one") from error


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Give the block a path to write to, and move the file to ``path`` if the block succeeds.

    The file has the same name, but it lies in a temporary folder. If the block fails, an older file at ``path`` stays.
    """
    with _folder_beside(path) as folder:
        file = Path(folder, path.name)
        yield file
        with file.open("rb+") as whole:
            os.fsync(whole.fileno())
        os.replace(file, path.resolve())


def _folder_beside(path: Path) -> TemporaryDirectory[str]:
    """Make a temporary folder on the same file system. Only there can a file be moved in one step."""
    path = path.resolve()
    return TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent)
