"""Writing a file whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory


def check_writable(where: str, path: Path) -> None:
    """Raise a ValueError that begins with ``where`` unless a file can be written to ``path``; it is tried."""
    if path.is_dir():
        raise ValueError(f"{where} is a folder; name a file in it")
    if not path.resolve().parent.is_dir():
        raise ValueError(f"{where}: there is no folder {str(path.resolve().parent)!r}; make it first")
    try:
        _folder_beside(path).cleanup()
    except OSError as error:
        raise ValueError(f"{where}: nothing can be written to its folder ({error}); name another one") from error


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give a path to write to, of the same name in a folder of its own, and move the file if the block succeeds."""
    with _folder_beside(path) as folder:
        file = Path(folder, path.name)
        yield file
        with file.open("rb+") as whole:
            os.fsync(whole.fileno())
        os.replace(file, path.resolve())


def _folder_beside(path: Path) -> TemporaryDirectory[str]:
    """A folder on the same file system, so that a file can be moved in one step and its traces go with the folder."""
    path = path.resolve()
    return TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent)
