"""``lightning-convbn inspect``: lists which BatchNorms are folded, frozen and unfrozen, and why."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch
from torch import nn

from lightning_convbn.command.errors import CommandError, errors_in_one_line
from lightning_convbn.command.input_options import INPUT_HELP, add_input, read_inputs
from lightning_convbn.command.inputs import Inputs, example_inputs
from lightning_convbn.command.model_argument import load_model
from lightning_convbn.command.model_checks import check_has_batchnorm, check_takes, dtype_of
from lightning_convbn.command.notes_below_tables import folded_count, input_facts, notes_on_model
from lightning_convbn.command.output_files import STDOUT, check_output_files, write_json
from lightning_convbn.command.results import count_batchnorms
from lightning_convbn.command.shared_options import add_command, add_json
from lightning_convbn.command.terminal import print_notes, print_status, print_table
from lightning_convbn.pairs.find import find_conv_bn_pairs, find_recorded_pairs
from lightning_convbn.pairs.pair import ConvBNPairs

EXAMPLES = f"""\
examples:
  lightning-convbn inspect torchvision:resnet50
  lightning-convbn inspect timm:efficientnet_b0 --json pairs.json
  lightning-convbn inspect my_project.models:build --size 224
  lightning-convbn inspect my_project.models:two_inputs --input image=2x3x224x224 --input depth=2x1x224x224
With an input it also runs a forward pass, which proves pairs that can't be traced.

{INPUT_HELP}"""


CPU = torch.device("cpu")  # where the forward pass runs


def add_parser(commands: Any) -> None:
    """Add the sub-command and its options to the parser."""
    parser = add_command(
        commands, "inspect", "list which BatchNorms are folded, frozen and unfrozen, and why", EXAMPLES
    )
    add_input(parser, batch=2, with_default=False)
    add_json(parser)
    parser.set_defaults(run=inspect_model)


def inspect_model(options: Namespace) -> None:
    """Print a row for each BatchNorm, or JSON."""
    inputs = read_inputs(options)
    check_output_files(options)
    model = load_model(options.model, options.checkpoint_class, options.trust_checkpoint)
    check_has_batchnorm(model)
    inputs = inputs or example_inputs(model)
    try:
        pairs = _find_pairs(model, inputs)
    except CommandError as error:
        if inputs is None or not inputs.source:
            raise
        print_status(f"{error}; the model was looked at without it")
        inputs, pairs = None, find_conv_bn_pairs(model)
    unfrozen = {bn: reason for bn, reason in pairs.unpaired.items() if bn in pairs.unfrozen}
    if options.json != STDOUT:
        if inputs is not None:
            print(f"{options.model}: {input_facts(inputs, dtype_of(model), CPU)}\n")
        _print_pairs(pairs, unfrozen)
        print_notes(notes_on_model(model))
    write_json(
        options,
        inputs=None if inputs is None else inputs.as_dict(dtype_of(model)),
        batchnorms=count_batchnorms(pairs),
        folded=[pair._asdict() for pair in pairs],
        frozen=pairs.frozen,
        unfrozen=unfrozen,
    )


def _find_pairs(model: nn.Module, inputs: Inputs | None) -> ConvBNPairs:
    if inputs is None:
        return find_conv_bn_pairs(model)
    check_takes(model, inputs, dtype_of(model), CPU)
    with errors_in_one_line():
        return find_recorded_pairs(model, *inputs.make(dtype_of(model), CPU, dense=True))


def _print_pairs(pairs: ConvBNPairs, unfrozen: dict[str, str]) -> None:
    rows = [("folded", pair.bn, f"into {pair.conv}") for pair in pairs]
    rows += [("frozen", bn, reason) for bn, reason in pairs.frozen.items()]
    rows += [("unfrozen", bn, reason) for bn, reason in unfrozen.items()]
    print_table(("state", "BatchNorm", "how or why"), rows)
    print(f"\n{folded_count(pairs)}, {len(pairs.frozen)} frozen, {len(unfrozen)} unfrozen")
