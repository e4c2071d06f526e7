"""``lightning-convbn export``: writes the Deploy copy of a model to a file."""

from __future__ import annotations

from argparse import Namespace

import torch

from lightning_convbn.command.errors import errors_in_one_line
from lightning_convbn.command.model_argument import has_random_weights, load_model
from lightning_convbn.command.model_checks import check_has_batchnorm, check_takes
from lightning_convbn.command.option_values import sample_shape
from lightning_convbn.command.terminal import print_status
from lightning_convbn.exporting.argument_checks import check_path
from lightning_convbn.exporting.export import export


def export_model(options: Namespace) -> None:
    """Write the Deploy copy, and compare the file with the model in Eval mode."""
    example = torch.randn(options.batch_size, *sample_shape(options.size))
    with errors_in_one_line():
        check_path("PATH", options.path)
    model = load_model(options.model, options.checkpoint_class)
    check_has_batchnorm(model)
    check_takes(model, example)
    if has_random_weights(options.model):
        print_status(f"{options.model} has random weights; for trained weights, give your own factory or a checkpoint")
    with errors_in_one_line():
        export(model, options.path, (example,), dynamic_batch=not options.static_batch)
    print(f"wrote {options.path}: it was read back, and it computes what {options.model} computes in Eval mode")
