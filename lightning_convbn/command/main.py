"""The command ``lightning-convbn``. Each sub-command has a file: `inspect.py`, `measure.py`, `export.py`."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import traceback
from collections.abc import Sequence

from lightning_convbn.command import export, inspect, measure
from lightning_convbn.command.errors import CommandError
from lightning_convbn.command.options import MODEL_HELP
from lightning_convbn.command.output_files import installed_version


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0, or 1 after an error, or 130 after Ctrl-C.

    Example:
        >>> main(["inspect", "torchvision:resnet81"])  # says on stderr that there is no such model
        1
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        options = build_parser().parse_args(arguments)
        options.typed = shlex.join(["lightning-convbn", *arguments])
        options.run(options)
        sys.stdout.flush()
    except CommandError as error:
        if "--traceback" in arguments and error.__cause__ is not None:
            traceback.print_exception(error.__cause__)
        print(f"lightning-convbn: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of the pipe has stopped, for example `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would fail again at exit
        return 1
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command and its sub-commands."""
    parser = argparse.ArgumentParser(
        prog="lightning-convbn",
        description="See what Tune mode would fold and save in a model, and export the folded model.",
        epilog=f"{MODEL_HELP}\nFor the options, type `lightning-convbn inspect --help`, and so on.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {installed_version('lightning-convbn')}")
    commands = parser.add_subparsers(required=True, metavar="inspect|measure|export")
    for command in (inspect, measure, export):
        command.add_parser(commands)
    return parser
