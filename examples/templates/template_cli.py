"""The command line that the templates share: defaults from a YAML file, a test after the fit, errors in one line."""

from __future__ import annotations

import sys
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
    """A ConvBNCLI that tests what it has fitted, and writes the scores down if it is asked to."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the place of the scores; a template that overrides this calls it."""
        parser.add_argument("--results", type=Path | None, default=None, help="A JSON file for the scores, too.")

    def after_fit(self) -> None:
        """Test the weights that the fit has ended with; Lightning prints the scores."""
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
        cli: Its links between data and model.
        model: Its LightningModule.
        data: Its images.
        config: Name of the YAML file in `configs/` whose values are the defaults.
    """
    defaults = {"default_config_files": [str(CONFIGS / config)]}
    try:
        cli(
            model,
            data,
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},  # so that a command runs twice, with or without a logger
            parser_kwargs=dict.fromkeys(SUBCOMMANDS, defaults),
        )
    except (BackboneError, DataError, WeightsError) as error:
        sys.exit(f"error: {error}")
