"""What the command tells in one line."""


class CommandError(Exception):
    """Something that whoever typed the command can mend; the text says what and how."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its class where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
