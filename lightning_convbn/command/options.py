"""The options that all sub-commands have, and the types of options."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lightning_convbn.command.errors import CommandError
from lightning_convbn.command.inputs import Inputs, example_inputs, images, merged, parse_input, sample_shape
from lightning_convbn.memory.budget import size_in_bytes
from lightning_convbn.text import first_line

MODEL_HELP = """\
MODEL is one of
  torchvision:resnet50      its name in torchvision; random weights
  timm:efficientnet_b0      its name in timm; random weights
  package.module:factory    a callable without required arguments that returns a model, a model class, or a model;
                            the current directory is importable
  path/to/last.ckpt         a Lightning checkpoint, with --class package.module:LightningModuleClass;
                            only weights and plain values are loaded from it
No weights are downloaded. The model is used in its eval state: dropout is off, and auxiliary heads do not run.
Only the Train variants of measure use its train state.
"""

INPUT_HELP = """\
what the model is called with:
  --size 224                       a batch of images of 3 x 224 x 224; other samples in full, as 1x28x28
  --input 8x3                      any tensor, with its batch; repeat the option for several arguments
  --input tokens=8x16:int64        by name, and of another dtype: zeros, which are a valid index
  --input package.module:function  all else: a function that returns a tensor, a tuple of arguments, or a dict of them
Without these options, the example_input_array of a LightningModule is taken."""


def add_command(commands: Any, name: str, purpose: str, examples: str, *, batch: int = 2) -> argparse.ArgumentParser:
    """Add a sub-command that takes a model and its input, and return its parser.

    Args:
        commands: What argparse collects the sub-commands in.
        name: Its name.
        purpose: What it does, as a part of a sentence.
        examples: Lines that can be typed.
        batch: The batch of images, if no option gives one.
    """
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=purpose,
        description=f"{purpose[0].upper()}{purpose[1:]}.\n\n{MODEL_HELP}",
        epilog=f"examples:\n{examples}\n{INPUT_HELP}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=f"%(prog)s MODEL {'PATH ' if name == 'export' else ''}[options]",
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="the model, see above")
    add("--class", dest="checkpoint_class", metavar="MODULE:CLASS", help="the LightningModule class of a checkpoint")
    trust = "unpickle all that the checkpoint holds; only for a file of your own: it can run any code"
    add("--trust-checkpoint", action="store_true", help=trust)
    add("--traceback", action="store_true", help="show where the code of the model has failed")
    add("--batch-size", type=whole_number(at_least=1), metavar="N", help=f"the batch of all inputs; default: {batch}")
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--input", type=parse_input, action="append", metavar="[NAME=]SHAPE", help="see below")
    shape.add_argument(
        "--size", type=sample_shape, help="the size of one image, see below; default: 224, and for inspect no input"
    )
    parser.set_defaults(default_batch=batch)
    return parser


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add ``--json``."""
    text = "write JSON to FILE; without FILE, print it, and no tables"
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help=text)


def inputs_for(model: nn.Module, options: argparse.Namespace) -> Inputs:
    """Return what the options give to a model, or its own example, or images."""
    return given_inputs(model, options) or images(options.batch_size or options.default_batch, (3, 224, 224))


def given_inputs(model: nn.Module, options: argparse.Namespace) -> Inputs | None:
    """Return what the options give to a model, or its own example, or None."""
    if options.size:
        return images(options.batch_size or options.default_batch, options.size)
    inputs = merged(options.input) if options.input else example_inputs(model)
    if inputs is None or options.batch_size is None:
        return inputs
    inputs.check_batch(f"--batch-size {options.batch_size}")
    return inputs.with_batch(options.batch_size)


def whole_number(*, at_least: int) -> Callable[[str], int]:
    """Return the type of an option that is a number."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < at_least:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number of {at_least} or more")
        return int(text)

    return read


def budget(text: str) -> int:
    """Return the number of bytes from ``--budget``.

    Example:
        >>> budget("8GiB")
        8589934592
    """
    try:
        return size_in_bytes(text)
    except ValueError as error:
        raise CommandError(f"--budget {error}") from None


def device(name: str) -> torch.device:
    """Return the device from ``--device``."""
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except Exception as error:  # PyTorch raises different classes for unknown, missing and unsupported devices
        raise CommandError(f"--device {name!r} can't be used: {first_line(error)}") from error
