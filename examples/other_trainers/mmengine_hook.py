"""Tune mode on an MMEngine Runner: `dict(type="ConvBNModeHook", target="backbone")` in `custom_hooks`."""

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import nn

from lightning_convbn import Mode, set_mode


@HOOKS.register_module()
class ConvBNModeHook(Hook):
    """Trains a part of the model in one mode. After the training, the model has its plain modules again.

    Args:
        mode: `tune`, or `eval` for a comparison.
        target: Attribute path of the part, for example `backbone`; empty for the whole model.
    """

    def __init__(self, mode: Mode = "tune", target: str = "") -> None:
        self.mode = mode
        self.target = target

    def before_train(self, runner: Runner) -> None:
        """Convert, now that the model is wrapped and its weights are loaded."""
        pairs = set_mode(self._part(runner), self.mode)
        runner.logger.info(f"ConvBN: `{self.target or 'model'}` trains in {self.mode} mode\n{pairs}")

    def after_train(self, runner: Runner) -> None:
        """Restore the plain modules."""
        set_mode(self._part(runner), "train")

    def _part(self, runner: Runner) -> nn.Module:
        model: nn.Module = runner.model.module if is_model_wrapper(runner.model) else runner.model
        return model.get_submodule(self.target)
