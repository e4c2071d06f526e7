"""``lightning-convbn export``: writes the Deploy copy of a model to a file."""

from __future__ import annotations

import inspect
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_convbn.command.errors import CommandError, errors_in_one_line
from lightning_convbn.command.inputs import Call
from lightning_convbn.command.model_argument import load_model
from lightning_convbn.command.model_checks import check_has_batchnorm, check_takes, dtype_of
from lightning_convbn.command.options import add_command, inputs_for
from lightning_convbn.command.terminal import print_status
from lightning_convbn.exporting.argument_checks import check_path
from lightning_convbn.exporting.export import export

EXAMPLES = """\
  lightning-convbn export my_project.models:trained model.onnx --size 224
  lightning-convbn export last.ckpt model.pt2 --class my_project.models:Classifier
"""


def add_parser(commands: Any) -> None:
    """Add the sub-command and its options to the parser."""
    purpose = "write the Deploy copy to a file, and compare the file with Eval mode"
    parser = add_command(commands, "export", purpose, EXAMPLES)
    formats = ".onnx, .pt2 (torch.export), .pt or .safetensors (only weights)"
    parser.add_argument("path", type=Path, metavar="PATH", help=formats)
    parser.add_argument("--static-batch", action="store_true", help="fix the batch size to that of the example")
    parser.set_defaults(run=export_model)


def export_model(options: Namespace) -> None:
    """Write the Deploy copy, and compare the file with the model in Eval mode."""
    with errors_in_one_line():
        check_path("PATH", options.path)
    model = load_model(options.model, options.checkpoint_class, options.trust_checkpoint)
    check_has_batchnorm(model)
    inputs = inputs_for(model, options).to(dtype_of(model), torch.device("cpu"))
    if not options.static_batch and (inputs.batch is None or inputs.has_lists()):
        raise CommandError(
            f"the inputs {inputs} have no batch that is the first size of every tensor; add --static-batch, for a file "
            "that takes inputs of these sizes"
        )
    if options.model.startswith(("torchvision:", "timm:")):
        print_status(f"{options.model} has random weights; for trained weights, give your own factory or a checkpoint")
    with errors_in_one_line():
        check_takes(model, inputs)
        example = _by_position(model, inputs.call(writable=True))
        export(model, options.path, example, dynamic_batch=not options.static_batch)
    print(f"wrote {options.path}: it was read back, and it computes what {options.model} computes in Eval mode")


def _by_position(model: nn.Module, call: Call) -> tuple[Any, ...]:
    """Return all arguments as positional ones, which a file has."""
    args, kwargs = call
    bound = inspect.signature(model.forward).bind_partial(*args, **kwargs)
    if bound.kwargs:
        raise CommandError(
            f"the input {next(iter(bound.kwargs))}: a file has positional arguments, and this one can't be given by "
            "position: give all arguments before it, or export a module that calls this one"
        )
    return bound.args
