"""``lightning-convbn inspect``: lists which BatchNorms are folded, frozen and unfrozen, and why."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch

from lightning_convbn.command.model_argument import load_model
from lightning_convbn.command.model_checks import check_has_batchnorm, check_takes
from lightning_convbn.command.notes_below_tables import folded_count, notes_on_model
from lightning_convbn.command.option_values import input_shape
from lightning_convbn.command.output_files import STDOUT, check_output_files, write_json
from lightning_convbn.command.results import count_batchnorms
from lightning_convbn.command.shared_options import add_command, add_json, add_shape
from lightning_convbn.command.terminal import print_notes, print_table
from lightning_convbn.pairs.find import find_conv_bn_pairs
from lightning_convbn.pairs.pair import ConvBNPairs

EXAMPLES = """\
examples:
  lightning-convbn inspect torchvision:resnet50
  lightning-convbn inspect timm:efficientnet_b0 --json pairs.json
  lightning-convbn inspect my_project.models:build --size 224
  lightning-convbn inspect my_project.models:mlp --input-shape 8x3
With --size or --input-shape it also runs a forward pass, which proves pairs that can't be traced."""


def add_parser(commands: Any) -> None:
    """Add the sub-command and its options to the parser."""
    parser = add_command(
        commands, "inspect", "list which BatchNorms are folded, frozen and unfrozen, and why", EXAMPLES
    )
    add_shape(parser, batch=2, size=None)
    add_json(parser)
    parser.set_defaults(run=inspect_model, batch_size=None)


def inspect_model(options: Namespace) -> None:
    """Print a row for each BatchNorm, or JSON."""
    example = None
    if options.size is not None or options.input_shape is not None:
        example = torch.randn(input_shape(options))
    check_output_files(options)
    model = load_model(options.model, options.checkpoint_class, options.trust_checkpoint)
    check_has_batchnorm(model)
    if example is not None:
        check_takes(model, example)
    pairs = find_conv_bn_pairs(model, example_inputs=None if example is None else (example,))
    unfrozen = {bn: reason for bn, reason in pairs.unpaired.items() if bn in pairs.unfrozen}
    if options.json != STDOUT:
        _print_pairs(pairs, unfrozen)
        print_notes(notes_on_model(model))
    write_json(
        options,
        batchnorms=count_batchnorms(pairs),
        folded=[pair._asdict() for pair in pairs],
        frozen=pairs.frozen,
        unfrozen=unfrozen,
    )


def _print_pairs(pairs: ConvBNPairs, unfrozen: dict[str, str]) -> None:
    rows = [("folded", pair.bn, f"into {pair.conv}") for pair in pairs]
    rows += [("frozen", bn, reason) for bn, reason in pairs.frozen.items()]
    rows += [("unfrozen", bn, reason) for bn, reason in unfrozen.items()]
    print_table(("state", "BatchNorm", "how or why"), rows)
    print(f"\n{folded_count(pairs)}, {len(pairs.frozen)} frozen, {len(unfrozen)} unfrozen")
