"""The command line that the templates share: defaults from a YAML file, a test after the fit, errors in one line."""

from __future__ import annotations

import sys
from inspect import signature
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningArgumentParser

from examples.data.data_module import SplitData
from examples.data.pretrained_weights import WeightsError
from examples.data.sources import DataError
from examples.results_file import write_json
from examples.templates.networks.classifiers import BackboneError
from lightning_convbn.cli import ConvBNCLI

CONFIGS = Path(__file__).parent / "configs"
SUBCOMMANDS = ("fit", "validate", "test", "predict")


class TemplateCLI(ConvBNCLI):
    """A ConvBNCLI that tests after a fit, and writes the scores to the file of `--results`.

    If the model takes `num_classes` and `class_weights`, it gets those of the data.
    """

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add `--results`, and link the arguments. A template that overrides this method calls it."""
        parser.add_argument("--results", type=Path | None, default=None, help="A JSON file to write the scores to.")
        if "num_classes" in signature(self._model_class).parameters:
            parser.link_arguments("data.classes", "model.num_classes", compute_fn=len, apply_on="instantiate")
            parser.link_arguments("data.class_weights", "model.class_weights", apply_on="instantiate")

    def before_fit(self) -> None:
        """Say how many images there are: with few of them, a fit has few steps."""
        if self.trainer.is_global_zero:
            data = self.datamodule
            train, val, test = (len(images) for images in (data.train, data.val, data.test))
            print(f"{train} training images in batches of {data.batch_size}, {val} to validate, {test} to test")

    def after_fit(self) -> None:
        """Test the weights at the end of the fit. Lightning prints the scores."""
        (scores,) = self.trainer.test(self.model, self.datamodule)
        self.write_results([dict(scores)])

    def write_results(self, rows: list[dict[str, Any]]) -> None:
        """Write the file of `--results`."""
        path = self.config[self.subcommand].results
        if path is not None and self.trainer.is_global_zero:
            print(write_json(Path(path), rows, ("torch", "lightning"), device=self.trainer.strategy.root_device.type))


def run(cli: type[ConvBNCLI], model: type[LightningModule], data: type[SplitData[Any]], config: str) -> None:
    """Run a template's command line.

    Args:
        cli: Links the data to the model.
        model: The LightningModule of the template.
        data: The data module of the template.
        config: Name of a YAML file in `configs/`; it holds the defaults.
    """
    defaults = {"default_config_files": [str(CONFIGS / config)]}
    try:
        cli(
            model,
            data,
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},  # a command may run twice, with or without a logger
            parser_kwargs=dict.fromkeys(SUBCOMMANDS, defaults),
        )
    except (BackboneError, DataError, WeightsError) as error:
        sys.exit(f"error: {error}")
