"""Short texts that all parts of the package write. It imports nothing, so every folder may import it."""


def first_line(error: BaseException) -> str:
    r"""Return the first line of an error's text. Return the name of its class if it has no text.

    Example:
        >>> first_line(ValueError("no such model\nand a long explanation"))
        'no such model'
        >>> first_line(KeyError())
        'KeyError'
    """
    return (str(error).strip() or type(error).__name__).splitlines()[0]
