"""The options that say what a model is called with: ``--input``, and its shorthands ``--size`` and others."""

from __future__ import annotations

import argparse
import re
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lightning_convbn.command.errors import CommandError
from lightning_convbn.command.inputs import Inputs, TensorInput, example_inputs
from lightning_convbn.command.option_values import dtype_name
from lightning_convbn.command.shared_options import positive

INPUT_HELP = """\
--input gives one argument of forward. Repeat it for several:
  --input 8x3x224x224              by position; the batch is in the shape
  --input image=8x3x224x224        by name
  --input tokens=8x16:int64        of another dtype; what is no float is 0, which is a valid index
  --input batch.image=8x3x64x64    an entry of a dict: batch={"image": ...}
  --input '[3x480x640,3x400x600]'  a list with an entry for each sample, as detectors take it; (...) is a tuple
Without an option, the example_input_array of a LightningModule is taken."""

DEFAULT_SIZE = "224"
_DTYPES = {
    dtype_name(dtype): dtype
    for dtype in (
        *(torch.float32, torch.float64, torch.bfloat16, torch.float16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}


def add_input(parser: argparse.ArgumentParser, *, batch: int, with_default: bool = True) -> None:
    """Add ``--input`` and its shorthands. Without ``with_default`` there is no input if no option gives one."""
    parser.set_defaults(default_batch=batch, batch_size=None)
    parser.add_argument(
        "--input", action="append", metavar="[NAME=]SHAPE", help="an argument of forward, see below; can be repeated"
    )
    if with_default:
        parser.add_argument("--batch-size", type=positive, metavar="N", help=f"default: {batch}")
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument(
        "--size",
        help="size of one sample: 224 is an image of 3 × 224 × 224, other shapes are written out, as 1x28x28; "
        f"default: {DEFAULT_SIZE if with_default else 'no input'}",
    )
    shape.add_argument("--input-shape", metavar="SHAPE", help="the only argument of forward, as 8x3; short for --input")


def read_inputs(options: Namespace) -> Inputs | None:
    """Return the inputs that the options give. None if they give no shape."""
    if options.input:
        for name in ("size", "batch_size", "input_shape"):
            if (value := getattr(options, name)) is not None:
                option = f"--{name.replace('_', '-')} {value}"
                raise CommandError(f"--input {options.input[0]} has the batch and all sizes: leave out {option}")
        return _parsed(options.input)
    if options.input_shape is not None:
        if options.batch_size is not None:
            raise CommandError(f"--input-shape {options.input_shape} has the batch in it: leave out --batch-size")
        return Inputs((_tensor(f"--input-shape {options.input_shape!r}", options.input_shape),))
    return None if options.size is None else _images(options, options.size)


def default_inputs(options: Namespace, model: nn.Module) -> Inputs:
    """Return the inputs of a model for which the options give no shape: its own example, or images."""
    example = example_inputs(model)
    if example is None:
        return _images(options, DEFAULT_SIZE)
    if options.batch_size is None:
        return example
    example.check_batch(f"--batch-size {options.batch_size}")
    return example.with_batch(options.batch_size)


def sample_shape(size: str) -> tuple[int, ...]:
    """Return the shape of one sample, without the batch, from ``--size``.

    Example:
        >>> sample_shape("224"), sample_shape("1x28x28")
        ((3, 224, 224), (1, 28, 28))
    """
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", size):
        raise CommandError(
            f"--size {size!r} is neither a number of pixels, as 224, nor a shape without batch, as 1x28x28"
        )
    sizes = tuple(map(int, size.split("x")))
    return (3, *sizes, *sizes) if len(sizes) == 1 else sizes


def _images(options: Namespace, size: str) -> Inputs:
    return Inputs((TensorInput((options.batch_size or options.default_batch, *sample_shape(size))),))


def _parsed(texts: Sequence[str]) -> Inputs:
    """Parse the values of ``--input``."""
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.rpartition("=")
        node = _node(text, value)
        if equals:
            _put(kwargs, name, node, text)
        else:
            args.append(node)
    return Inputs(tuple(args), kwargs)


def _put(kwargs: dict[str, Any], name: str, node: Any, text: str) -> None:
    """Put an argument, or an entry of a dict, where its dotted name says."""
    *outer, last = name.split(".")
    if not name.split(".")[0].isidentifier() or "" in (*outer, last):
        raise CommandError(f"--input {text!r}: {name!r} is no name; give it as image=8x3 or batch.image=8x3")
    place = kwargs
    for key in outer:
        place = place.setdefault(key, {})
        if not isinstance(place, dict):
            raise CommandError(f"--input {text!r}: {key} was given as a whole before; give {key} or its entries")
    if last in place:
        raise CommandError(f"--input {text!r}: {name} was given before; give each name once")
    place[last] = node


def _node(text: str, value: str) -> Any:
    """Parse a shape, a list of shapes or a tuple of shapes."""
    for opening, closing, kind in (("[", "]", list), ("(", ")", tuple)):
        if value.startswith(opening) and value.endswith(closing):
            return kind(_tensor(f"--input {text!r}: {entry!r}", entry) for entry in value[1:-1].split(","))
    return _tensor(f"--input {text!r}" + (f": {value!r}" if value != text else ""), value)


def _tensor(given: str, value: str) -> TensorInput:
    """Parse a shape with or without a dtype.

    Args:
        given: What an error shows: the option, and the part of it that is wrong.
        value: The text, such as ``8x16:int64``.
    """
    shape, colon, dtype = value.strip().partition(":")
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
        raise CommandError(f"{given} is no shape, as 8x3 or 8x3x224x224")
    if colon and dtype not in _DTYPES:
        raise CommandError(f"{given}: there is no dtype {dtype!r}; give one of {', '.join(_DTYPES)}")
    return TensorInput(tuple(map(int, shape.split("x"))), _DTYPES[dtype] if colon else None)
