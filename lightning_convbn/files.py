"""Writing a file whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning_convbn.errors import CommandError


def check_writable(option: str, path: Path) -> None:
    """Raise a `CommandError` that names the option, unless a file can be written there."""
    if path.is_dir():
        raise CommandError(f"{option} {path} is a folder; name a file")
    try:
        # Tried and not asked for: permissions tell nothing of a read-only or full disk.
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise CommandError(f"{option} {path} can't be written: {error.strerror} ({path.parent})") from error


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path`` to write to, and move it there if the block ends without an exception."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)  # as any new file, where mkstemp gives it to its owner alone
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
