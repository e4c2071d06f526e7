"""The one line: ``Trainer(callbacks=[ConvBNModeCallback()])``."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from itertools import permutations
from os import PathLike
from typing import Any, Literal

import torch
from torch import nn

from lightning_convbn.layers.swap import Mode
from lightning_convbn.layers.table import is_norm
from lightning_convbn.memory import MIB
from lightning_convbn.modes import check_mode, check_recompute
from lightning_convbn.pairs.reasons import UNTRAINED
from lightning_convbn.trainer.export_at_end import FitExport
from lightning_convbn.trainer.lightning_api import Callback, LightningModule, Trainer, rank_zero_info, rank_zero_warn
from lightning_convbn.trainer.part import Target

_CHECKPOINT_KEY = "lightning_convbn"


class ConvBNModeCallback(Callback):
    """Fine-tunes a pretrained convolutional network in Tune mode: Eval's accuracy at Deploy's memory.

    At the start of ``fit`` every BatchNorm of the target is frozen at its running statistics, whatever ``.train()`` is
    called, and folded on the fly into the convolution in front of it, so that the convolution's own output need not be
    kept for the backward pass. Validation, test and predict run in ``eval_mode``. When a stage ends, also by an
    exception or Ctrl-C, the model has its plain modules and flags again. Parameters, optimizers and checkpoints are
    those of the plain model throughout.

    At the first training batch the callback compares Tune mode with Eval mode on that batch, counts what each keeps for
    the backward pass, prints a table of what was folded, what not and why, and logs ``convbn/activations_eval_mib``,
    ``convbn/activations_tune_mib``, ``convbn/activations_saved_mib`` and ``convbn/activations_saved_percent`` to every
    logger; on CUDA also ``convbn/peak_allocated_mib`` and ``convbn/peak_reserved_mib`` at the end of every epoch.

    Not compatible with ``StochasticWeightAveraging``, which needs BatchNorms in Train mode.

    Args:
        mode: What training runs in: ``"tune"``, ``"eval"``, or ``"train"`` for ordinary BatchNorm.
        eval_mode: What validation, test and predict run in: ``"deploy"`` (folded once per run), ``"eval"`` or
            ``"tune"``.
        target: Path or paths of the attributes to convert, as ``"backbone"`` or ``["model.encoder", "model.neck"]``;
            None for ``backbone`` if the LightningModule has one, else for every child that holds a BatchNorm.
        start_epoch: Train in Train mode until this epoch, then freeze and switch.
        freeze_untrained: A BatchNorm still at mean 0 and variance 1 was never trained, a fresh head's for instance. It
            stays in Train mode, with a warning, unless this is True.
        recompute_activations: Keep of SiLU, Hardswish, GELU and their kin only the input for the backward pass, which
            computes their output again, and of ReLU6 and its kin only the output: the same numbers, less memory. Needs
            the mode ``"eval"`` or ``"tune"``.
        verify: Compare Tune with Eval at the first batch; pairs that differ go back to Eval mode, with a warning.
        log_memory: Count the memory at the first batch, print and log it.
        export_path: At the end of fit, write what the LightningModule's ``forward`` computes (or, if it has none, the
            single target) as a Deploy model to this file, as `export` does: ``.onnx``, ``.pt2``, ``.pt`` or
            ``.safetensors``, with the weights of the best checkpoint if a ModelCheckpoint monitors something, else the
            last. Example inputs are ``example_input_array``, else taken from the first training batch. What can't be
            exported is refused before training where that can be known; a failure at the end is a warning.

    Raises:
        ValueError: If an argument can't be used; from the Trainer, if a ``target`` does not exist or has no BatchNorm.

    Source: arXiv 2305.11624.

    Example:
        >>> callback = ConvBNModeCallback(eval_mode="eval", target="backbone")
        >>> ConvBNModeCallback("deploy")
        Traceback (most recent call last):
        ValueError: mode must be one of 'train', 'eval', 'tune'; got 'deploy'. Training folded weights is unstable ...
    """

    def __init__(
        self,
        mode: Literal["train", "eval", "tune"] = "tune",
        *,
        eval_mode: Literal["eval", "tune", "deploy"] = "deploy",
        target: str | Sequence[str] | None = None,
        start_epoch: int = 0,
        freeze_untrained: bool = False,
        recompute_activations: bool = False,
        verify: bool = True,
        log_memory: bool = True,
        export_path: str | PathLike[str] | None = None,
    ) -> None:
        why_not = {"deploy": "Training folded weights is unstable (arXiv 2305.11624): use 'tune'"}
        check_mode("mode", mode, ("train", "eval", "tune"), why_not.get(str(mode), ""))
        check_mode("eval_mode", eval_mode, ("eval", "tune", "deploy"))
        if isinstance(start_epoch, bool) or not isinstance(start_epoch, int) or start_epoch < 0:
            raise ValueError(f"start_epoch must be an epoch, 0 or later; got {start_epoch!r}")
        check_recompute(mode, recompute_activations)
        paths = [target] if isinstance(target, str) else target
        if paths is not None and not (
            isinstance(paths, Sequence) and paths and all(isinstance(path, str) and path for path in paths)
        ):
            raise ValueError(f"target must be one or more attribute paths such as 'backbone'; got {target!r}")
        self.mode: Mode = mode
        self.eval_mode: Mode = eval_mode
        self.target = None if paths is None else list(paths)
        self.start_epoch = start_epoch
        self.freeze_untrained = freeze_untrained
        self.recompute_activations = recompute_activations
        self.verify = verify
        self.log_memory = log_memory
        self.export_path = export_path
        self._export = None if export_path is None else FitExport(export_path)
        self._targets: list[Target] = []
        self._untrained: dict[str, list[str]] = {}  # by the path of the target, once it is decided
        self._found_flags: dict[nn.Module, bool] = {}
        self._reported = False
        self._looking = False
        self._watching = ExitStack()

    # ------------------------------------------------------------------------------------------- before and after

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start from a plain module, also after a run that ended without telling us, and come first among callbacks.

        The finders of batch size and learning rate take other callbacks away while they try; what they try must be
        what training runs in.
        """
        self._restore()
        self._untrained = {}
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        count = sum(isinstance(callback, ConvBNModeCallback) for callback in callbacks)
        if count > 1:
            raise ValueError(
                f"callbacks: ConvBNModeCallback is given {count} times; give one, with target=[...] for several parts"
            )
        others = [callback for callback in callbacks if callback is not self]
        trainer.callbacks = [self, *others]  # type: ignore[attr-defined]
        self._found_flags = {module: module.training for module in pl_module.modules()}
        self._reported = False

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give back plain modules with the flags they had: an exception in validation leaves them in eval state."""
        self._restore()
        for module, training in self._found_flags.items():
            module.training = training
        self._found_flags = {}

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give back plain modules, and hold on to none of them."""
        self._restore()
        self._found_flags = {}

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note which BatchNorms stay in Train mode: in a resumed run they no longer look untrained.

        All else that a resumed run has to know is in the arguments and in the epoch. This is no ``state_dict``:
        Lightning would ask for the callback in every run that loads the checkpoint.
        """
        checkpoint[_CHECKPOINT_KEY] = dict(self._untrained)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Read that note; a checkpoint from a run without the callback has none."""
        if not self.freeze_untrained:
            self._untrained = dict(checkpoint.get(_CHECKPOINT_KEY, {}))

    # --------------------------------------------------------------------------------------------------- training

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Convert, now that the strategy is done with the module; nothing is folded before the first forward."""
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if any(cls.__name__ == "StochasticWeightAveraging" for cls in type(callback).__mro__):
                raise ValueError(
                    "callbacks: StochasticWeightAveraging resets the BatchNorm statistics that ConvBNModeCallback "
                    "freezes; use WeightAveraging, or leave one of the two out"
                )
        self._find_targets(pl_module)
        if self._export is not None:
            self._export.prepare(trainer, pl_module, [target.path for target in self._targets])
        self._enter_training(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go by the epoch again: it is known only now if the run is resumed from a checkpoint."""
        self._enter_training(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Switch at ``start_epoch``."""
        self._enter_training(trainer)
        if self.log_memory and pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Fold by the state that the module trains in, and watch the first batch pass through the targets."""
        if any(target.state_has_changed() for target in self._targets):
            self._enter_training(trainer)
        looks = not self._reported and self._training_mode(trainer) == self.mode
        records = self._export is not None and self._export.inputs is None
        if looks or records:  # by hooks, which can't be compiled
            self._watching.enter_context(torch.compiler.set_stance("force_eager"))
        if self._export is not None and records:  # before the targets' looks, which run the forward on other inputs
            self._watching.callback(self._export.unwatch)
            self._export.watch(pl_module)
        if looks:
            verify = self.verify and (self.mode == "tune" or self.eval_mode != "eval")
            for target in self._targets:
                self._watching.callback(target.unwatch)
                target.watch(partial(target.inspect, verify=verify, measure=self.log_memory))
        self._looking = looks

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Report what the first batch has shown, if only that it did not pass through every target."""
        self._watching.close()
        if batch is None:  # Lightning has skipped it, and not said that it starts
            return
        if self._export is not None:
            self._export.check_recorded(pl_module)
        if self._looking:
            self._looking = False
            self._report(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the peak of the epoch."""
        if self.log_memory and pl_module.device.type == "cuda":
            peaks = {
                "peak_allocated_mib": torch.cuda.max_memory_allocated(pl_module.device) / MIB,
                "peak_reserved_mib": torch.cuda.max_memory_reserved(pl_module.device) / MIB,
            }
            _log(trainer, peaks)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give back plain modules before the strategy takes its own changes back."""
        self._restore()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export, now that weights and checkpoints are final; what was trained is worth more than this file."""
        if self._export is None or not trainer.is_global_zero:
            return
        try:
            rank_zero_info(f"ConvBN: {self._export.write(trainer, pl_module)}")
        except Exception as error:
            rank_zero_warn(
                f"ConvBN: export_path={str(self._export.path)!r}: nothing was exported. Weights and checkpoints are as "
                f"trained: repair the cause and call lightning_convbn.export. {type(error).__name__}: {error}"
            )

    # ------------------------------------------------------------------------------------------------- evaluation

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate in ``eval_mode``."""
        self._watching.close()  # a hook may have ended the epoch at the start of its first batch
        self._enter_evaluation(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go back to training, or to plain modules."""
        if trainer.state.fn == "fit":
            for target in self._targets:
                target.back_to_training(self._training_mode(trainer))
        else:
            self._restore()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Test in ``eval_mode``."""
        self._enter_evaluation(pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give back plain modules."""
        self._restore()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Predict in ``eval_mode``."""
        self._enter_evaluation(pl_module)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give back plain modules."""
        self._restore()

    # -------------------------------------------------------------------------------------------------- internals

    def _training_mode(self, trainer: Trainer) -> Mode:
        return self.mode if trainer.current_epoch >= self.start_epoch else "train"

    def _enter_training(self, trainer: Trainer) -> None:
        mode = self._training_mode(trainer)
        for target in self._targets:
            target.train_in(mode, freeze_untrained=self.freeze_untrained)
            if target.decided:
                self._untrained[target.path] = target.untrained

    def _enter_evaluation(self, pl_module: LightningModule) -> None:
        if not self._targets:
            self._find_targets(pl_module)
        for target in self._targets:
            target.evaluate_in(self.eval_mode)

    def _restore(self) -> None:
        self._watching.close()
        for target in self._targets:
            target.restore()
        self._targets = []
        if self._export is not None:
            self._export.unwatch()

    def _find_targets(self, pl_module: LightningModule) -> None:
        paths = self.target or _default_targets(pl_module)
        targets = []
        for path in paths:
            try:
                module = pl_module.get_submodule(path)
            except AttributeError:
                children = ", ".join(repr(name) for name, _ in pl_module.named_children())
                raise ValueError(
                    f"target={path!r}: {type(pl_module).__name__} has no such module; its attributes are {children}"
                ) from None
            if not any(is_norm(child) for child in module.modules()):
                raise ValueError(
                    f"target={path or None!r}: {type(module).__name__} has no BatchNorm; name the part that has, or "
                    "leave ConvBNModeCallback out"
                )
            untrained = self._untrained.get(path)
            targets.append(Target(path, module, untrained, recompute_activations=self.recompute_activations))
        for outer, inner in permutations(paths, 2):
            if f"{inner}.".startswith(f"{outer}."):
                raise ValueError(f"target={self.target!r}: {inner!r} lies within {outer!r}; name one of them")
        self._targets = targets

    def _report(self, trainer: Trainer) -> None:
        self._reported = True
        for target in self._targets:
            target.conclude(trainer.world_size)
            for name, reason in target.wrong.items():
                rank_zero_warn(f"ConvBN: `{target.full_name(name)}` goes back to Eval mode: {reason}")
                if self._export is not None:
                    self._export.wrong[target.full_name(name)] = reason
            if target.untrained:
                rank_zero_warn(
                    f"ConvBN: {len(target.untrained)} BatchNorm(s) of `{target.path or 'the module'}` stay in Train "
                    f"mode: `{target.untrained[0]}` {UNTRAINED}. Load pretrained weights, or say freeze_untrained=True"
                )
            if self.mode == "tune" and (hooked := target.hooked()):
                rank_zero_warn(
                    f"ConvBN: the hooks on `{'`, `'.join(hooked)}` see values that are normalised already: a folded "
                    "convolution puts out what its BatchNorm would, and the BatchNorm passes it on"
                )
        lines = [line for target in self._targets for line in target.describe(self.mode, self.eval_mode)]
        bar = trainer.progress_bar_callback
        if trainer.is_global_zero:
            (bar.print if bar is not None else rank_zero_info)("\n".join(lines))
        measured = [target.kept for target in self._targets if target.kept is not None]
        if measured:
            before, after = (sum(kept[mode] for kept in measured) / MIB for mode in ("eval", "tune"))
            _log(
                trainer,
                {
                    "activations_eval_mib": before,
                    "activations_tune_mib": after,
                    "activations_saved_mib": before - after,
                    "activations_saved_percent": 100 * (before - after) / before if before else 0.0,
                },
            )


def _default_targets(pl_module: LightningModule) -> list[str]:
    """`backbone`, or every child with a BatchNorm, or the module itself where a BatchNorm is its own attribute.

    A child is watched and verified whether training calls it directly or through the LightningModule's forward.
    """
    children = dict(pl_module.named_children())
    if isinstance(children.get("backbone"), nn.Module):
        return ["backbone"]
    if any(is_norm(child) for child in children.values()):
        return [""]
    return [name for name, child in children.items() if any(is_norm(module) for module in child.modules())] or [""]


def _log(trainer: Trainer, metrics: dict[str, float]) -> None:
    """Log to every logger; ``LightningModule.log`` can't be used in all hooks and knows one separator only."""
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    for logger in trainer.loggers:
        named = {f"convbn{logger.group_separator}{name}": value for name, value in metrics.items()}
        logger.log_metrics(named, step=trainer.global_step)
