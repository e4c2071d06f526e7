"""``ConvBNCLI``: LightningCLI with the callback as a flag, ``--convbn.mode=tune`` or ``--convbn=false``."""

from __future__ import annotations

from dataclasses import asdict, make_dataclass
from inspect import signature
from typing import TYPE_CHECKING, Any, Union, get_type_hints

from lightning_convbn.callback import ConvBNModeCallback
from lightning_convbn.environment import ConvBNFromEnvironment

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
else:
    try:
        from lightning.pytorch.cli import LightningCLI
    except ImportError:
        from pytorch_lightning.cli import LightningCLI

_HINTS = get_type_hints(ConvBNModeCallback.__init__)

# jsonargparse reads `mode: tune` straight into a dataclass; for a class that may have subclasses, as the callback may,
# it would want `class_path` and `init_args`.
ConvBNOptions = make_dataclass(
    "ConvBNOptions",
    [(name, _HINTS[name], argument.default) for name, argument in signature(ConvBNModeCallback).parameters.items()],
    namespace={"__doc__": ConvBNModeCallback.__doc__, "__module__": __name__},
)
"""The arguments of ConvBNModeCallback, with its defaults and docstring."""


class ConvBNCLI(LightningCLI):
    """LightningCLI whose Trainer has a ConvBNModeCallback, configured by ``--convbn``.

    Every sub-command, and a CLI with ``run=False``, takes

    - ``--convbn.mode=eval``, ``--convbn.start_epoch=2`` and so on: an argument of ConvBNModeCallback;
      ``--convbn.help`` explains them all,
    - ``--convbn=false``: no callback, and ``--convbn=true``: a callback with its defaults,

    and the same in YAML, as ``convbn: {mode: eval}`` or ``convbn: false``. As usual the last one wins. The flag decides
    alone: the environment variable ``LIGHTNING_CONVBN`` is ignored.

    A ConvBNModeCallback that comes another way (``trainer.callbacks``, ``trainer_defaults``, a callback of the CLI's
    own) replaces the one of this flag. Only if the flag was set to something else, too, that is an error.

    Raises:
        ModuleNotFoundError: If jsonargparse is missing.
        ValueError: If an argument of the callback can't be used, or if two callbacks are asked for.

    Example::

        # train.py
        ConvBNCLI(MyModule, MyDataModule)

        # python train.py fit --convbn.mode=eval --convbn.eval_mode=eval
    """

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Make a parser; where jsonargparse is missing, say which extra of ours brings it."""
        try:
            return super().init_parser(**kwargs)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"ConvBNCLI needs jsonargparse: pip install lightning-convbn[cli]. Lightning says: {error}"
            ) from error

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the flag here, since a project's own CLI overrides ``add_arguments_to_parser`` without calling it."""
        super().add_core_arguments_to_parser(parser)
        parser.add_argument(
            "--convbn",
            type=Union[bool, ConvBNOptions],  # noqa: UP007 - `|` needs types, and this one is made at run time
            default=asdict(ConvBNOptions()),
            help="Arguments of ConvBNModeCallback, as --convbn.mode=tune; false: leave it out; true: its defaults.",
        )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the Trainer and give it the callback, unless it has one."""
        trainer = super().instantiate_trainer(**kwargs)
        callbacks = [other for other in trainer.callbacks if not isinstance(other, ConvBNFromEnvironment)]  # type: ignore[attr-defined]
        options = self._get(self.config_init, "convbn")
        if options is True:
            options = ConvBNOptions()
        if not any(isinstance(other, ConvBNModeCallback) for other in callbacks):
            callbacks = [ConvBNModeCallback(**asdict(options)), *callbacks] if options else callbacks
        elif options not in (False, ConvBNOptions()):
            raise ValueError(
                "trainer.callbacks has a ConvBNModeCallback, and --convbn asks for another; set all arguments in one "
                "of the two places: give --convbn=false, or leave the callback out of trainer.callbacks"
            )
        trainer.callbacks = callbacks  # type: ignore[attr-defined]
        return trainer
