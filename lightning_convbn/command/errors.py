"""Errors that the command shows in one line."""

from collections.abc import Iterator
from contextlib import contextmanager

from lightning_convbn.text import first_line


class CommandError(Exception):
    """An error that the person who typed the command can correct. The text says what is wrong and what to do."""


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Turn errors of the package into a `CommandError` with the first line of their text."""
    try:
        yield
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        raise CommandError(first_line(error)) from error


def summary(error: BaseException) -> str:
    """Return the class and the first line of an error that a user's code raised, and how to see the rest."""
    return f"{type(error).__name__}: {first_line(error)} (--traceback shows where)"
