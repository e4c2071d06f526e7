"""``lightning-convbn inspect``: lists which BatchNorms are folded, frozen and unfrozen, and why."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch
from torch import nn

from lightning_convbn.command.errors import CommandError, errors_in_one_line
from lightning_convbn.command.inputs import EXAMPLE, Inputs, dtype_name
from lightning_convbn.command.model_argument import load_model
from lightning_convbn.command.model_checks import check_has_batchnorm, check_takes, dtype_of
from lightning_convbn.command.options import add_command, add_json, given_inputs
from lightning_convbn.command.output_files import STDOUT, check_output_files, write_json
from lightning_convbn.command.results import count_batchnorms
from lightning_convbn.command.terminal import print_status
from lightning_convbn.pairs.find import find_conv_bn_pairs, find_recorded_pairs
from lightning_convbn.pairs.pair import ConvBNPairs

EXAMPLES = """\
  lightning-convbn inspect torchvision:resnet50
  lightning-convbn inspect timm:efficientnet_b0 --json pairs.json
  lightning-convbn inspect my_project.models:build --size 224
With an input it also runs a forward pass, which proves pairs that can't be traced.
"""
CPU = torch.device("cpu")  # where the forward pass runs


def add_parser(commands: Any) -> None:
    """Add the sub-command and its options to the parser."""
    purpose = "list which BatchNorms are folded, frozen and unfrozen, and why"
    parser = add_command(commands, "inspect", purpose, EXAMPLES)
    add_json(parser)
    parser.set_defaults(run=inspect_model)


def inspect_model(options: Namespace) -> None:
    """Print a row for each BatchNorm, or JSON."""
    check_output_files(options)
    model = load_model(options.model, options.checkpoint_class, options.trust_checkpoint)
    check_has_batchnorm(model)
    inputs = given_inputs(model, options)
    inputs = None if inputs is None else inputs.to(dtype_of(model), CPU)
    try:
        pairs = _find_pairs(model, inputs)
    except CommandError as error:
        if inputs is None or inputs.source != EXAMPLE:
            raise
        print_status(f"{error}; the model was looked at without it")
        inputs, pairs = None, find_conv_bn_pairs(model)
    unfrozen = {bn: reason for bn, reason in pairs.unpaired.items() if bn in pairs.unfrozen}
    if options.json != STDOUT:
        if inputs is not None:
            print(f"{options.model}: {input_facts(inputs, dtype_of(model), CPU)}\n")
        print(f"{pairs}\n\n{folded_count(pairs)}, {len(pairs.frozen)} frozen, {len(unfrozen)} unfrozen")
    write_json(
        options,
        inputs=None if inputs is None else inputs.as_dict(),
        batchnorms=count_batchnorms(pairs),
        folded=[pair._asdict() for pair in pairs],
        frozen=pairs.frozen,
        unfrozen=unfrozen,
    )


def input_facts(inputs: Inputs, dtype: torch.dtype, device: torch.device) -> str:
    """Return the inputs, dtype and device in one line."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return f"input {inputs}, {dtype_name(dtype)}, {name}"


def folded_count(pairs: ConvBNPairs) -> str:
    """Return how many BatchNorms are folded, for example ``2 of 3 BatchNorms folded``."""
    return f"{len(pairs)} of {len(pairs) + len(pairs.unpaired)} BatchNorms folded"


def _find_pairs(model: nn.Module, inputs: Inputs | None) -> ConvBNPairs:
    if inputs is None:
        return find_conv_bn_pairs(model)
    with errors_in_one_line():
        check_takes(model, inputs)
        return find_recorded_pairs(model, *inputs.call(writable=True))
