"""``ConvBNCLI``: LightningCLI with the callback as a flag, ``--convbn.mode=tune`` or ``--convbn=false``.

An argument of the callback becomes a flag by itself: add it in `callback.py`.
"""

from __future__ import annotations

from dataclasses import asdict, make_dataclass
from inspect import signature
from typing import TYPE_CHECKING, Any, Union, get_type_hints

from typing_extensions import override

from lightning_convbn.callback import ConvBNModeCallback
from lightning_convbn.environment import ConvBNFromEnvironment
from lightning_convbn.trainer.lightning_api import Trainer
from lightning_convbn.trainer.other_callbacks import callbacks_of, set_callbacks

if TYPE_CHECKING:
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
else:
    try:
        from lightning.pytorch.cli import LightningCLI
    except ImportError:
        from pytorch_lightning.cli import LightningCLI

_HINTS = get_type_hints(ConvBNModeCallback.__init__)

# jsonargparse reads `mode: tune` directly into a dataclass. Into the callback's own class it would not: that may have
# subclasses, so jsonargparse would ask for `class_path` and `init_args`.
ConvBNOptions = make_dataclass(
    "ConvBNOptions",
    [(name, _HINTS[name], argument.default) for name, argument in signature(ConvBNModeCallback).parameters.items()],
    namespace={"__doc__": ConvBNModeCallback.__doc__, "__module__": __name__},
)
"""The arguments of ConvBNModeCallback, with its defaults and docstring."""


class ConvBNCLI(LightningCLI):
    """A LightningCLI with a ConvBNModeCallback, which the flag ``--convbn`` configures.

    Every sub-command, and a CLI with ``run=False``, takes these flags:

    - ``--convbn.mode=eval``, ``--convbn.start_epoch=2`` and so on set an argument of ConvBNModeCallback.
      ``--convbn.help`` explains all of them.
    - ``--convbn=false`` leaves the callback out. ``--convbn=true`` adds it with its defaults.

    YAML takes the same, as ``convbn: {mode: eval}`` or ``convbn: false``. The last one wins, as in any LightningCLI.
    The environment variable ``LIGHTNING_CONVBN`` is ignored.

    A ConvBNModeCallback that was given in another way (``trainer.callbacks``, ``trainer_defaults``, a callback of the
    CLI's own) replaces the one of this flag. It is an error to give one and to set arguments by the flag, too.

    Raises:
        ModuleNotFoundError: If jsonargparse is missing.
        ValueError: If an argument of the callback can't be used, or if two callbacks are asked for.

    Example::

        # train.py
        ConvBNCLI(MyModule, MyDataModule)

        # python train.py fit --convbn.mode=eval --convbn.eval_mode=eval
    """

    @override
    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Make the parser. If jsonargparse is missing, say how to install it."""
        try:
            return super().init_parser(**kwargs)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"ConvBNCLI needs jsonargparse: pip install 'jsonargparse[signatures]>=4.43'. Lightning says: {error}"
            ) from error

    @override
    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the flag. It is not added in ``add_arguments_to_parser``: projects override that without a super call."""
        super().add_core_arguments_to_parser(parser)
        parser.add_argument(
            "--convbn",
            type=Union[bool, ConvBNOptions],  # noqa: UP007 - `|` needs types, and this one is made at run time
            default=asdict(ConvBNOptions()),
            help="Arguments of ConvBNModeCallback, as --convbn.mode=tune; false: leave it out; true: its defaults.",
        )

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the Trainer and give it the callback, unless it has one already."""
        trainer = super().instantiate_trainer(**kwargs)
        callbacks = [other for other in callbacks_of(trainer) if not isinstance(other, ConvBNFromEnvironment)]
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
        set_callbacks(trainer, callbacks)
        return trainer
