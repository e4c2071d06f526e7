"""The options that several sub-commands of ``lightning-convbn`` have."""

from __future__ import annotations

import argparse
from typing import Any

MODEL_HELP = """\
MODEL is one of
  torchvision:resnet50      its name in torchvision; random weights
  timm:efficientnet_b0      its name in timm; random weights
  package.module:factory    a callable without required arguments that returns a model, a model class, or a model;
                            the current directory is importable
  path/to/last.ckpt         a Lightning checkpoint, with --class package.module:LightningModuleClass;
                            only weights and plain values are loaded from it
No weights are downloaded. The model is used in its eval state: dropout is off, and auxiliary heads do not run.
"""


def add_command(commands: Any, name: str, purpose: str, epilog: str) -> argparse.ArgumentParser:
    """Add a sub-command that takes a model, and return its parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=purpose,
        description=f"{purpose[0].upper()}{purpose[1:]}.\n\n{MODEL_HELP}",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=f"%(prog)s MODEL {'PATH ' if name == 'export' else ''}[options]",
    )
    parser.add_argument("model", metavar="MODEL", help="the model, see above")
    parser.add_argument(
        "--class", dest="checkpoint_class", metavar="MODULE:CLASS", help="the LightningModule class of a checkpoint"
    )
    parser.add_argument(
        "--trust-checkpoint",
        action="store_true",
        help="unpickle all that the checkpoint holds, not only weights; only for a file of your own: it can run any "
        "code",
    )
    return parser


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add ``--json``."""
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="write JSON to FILE; without FILE, print it, and no tables"
    )


def positive(text: str) -> int:
    """Read a number of 1 or more; argparse reports the ValueError."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def not_negative(text: str) -> int:
    """Read a number of 0 or more; argparse reports the ValueError."""
    if int(text) < 0:
        raise ValueError
    return int(text)


# argparse puts the name of the type into its message: "invalid int, 0 or more, value".
positive.__name__, not_negative.__name__ = "int, 1 or more,", "int, 0 or more,"
