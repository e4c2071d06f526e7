"""`ConvBNModeCallback`, the one line that a project adds: ``Trainer(callbacks=[ConvBNModeCallback()])``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from os import PathLike
from typing import Any, Literal

import torch
from typing_extensions import override

from lightning_convbn.layers.state import Mode, Recompute
from lightning_convbn.trainer import other_callbacks
from lightning_convbn.trainer.argument_checks import check_export_path, check_modes, check_recomputation
from lightning_convbn.trainer.converted_part import ConvertedPart
from lightning_convbn.trainer.export_at_end import FitExport
from lightning_convbn.trainer.find_converted_parts import checked_paths, find_parts
from lightning_convbn.trainer.lightning_api import Callback, LightningModule, Trainer
from lightning_convbn.trainer.logged_metrics import log_kept_bytes, log_peaks
from lightning_convbn.trainer.planned_recomputation import PlannedRecomputation
from lightning_convbn.trainer.report import print_table, warn_about
from lightning_convbn.trainer.run_state import Run

_CHECKPOINT_KEY = "lightning_convbn"


class ConvBNModeCallback(Callback):
    """Fine-tunes a pretrained convolutional network in Tune mode: with Eval's accuracy, in Deploy's memory.

    ``fit`` freezes every BatchNorm of the target at its running statistics, even if ``.train()`` is called later. In
    Tune mode it is also folded into the convolution in front of it, at every forward. So the convolution's own output
    is not kept for the backward pass. Validation, test and predict run in ``eval_mode``. When a stage ends, also by an
    exception or Ctrl-C, the modules are plain again and have the training flags that they had. Parameters, optimizers
    and checkpoints are those of the plain model all the time.

    At the first training batch the callback compares Tune mode with Eval mode and counts the bytes that each keeps for
    the backward pass. It prints a table: what is folded, what is not, and why. It logs
    ``convbn/activations_eval_mib``, ``convbn/activations_tune_mib``, ``convbn/activations_saved_mib`` and
    ``convbn/activations_saved_percent`` to every logger, and if there is one target ``convbn/predicted_peak_eval_mib``
    and ``convbn/predicted_peak_tune_mib``; on CUDA also ``convbn/peak_allocated_mib`` and
    ``convbn/peak_reserved_mib`` at the end of every epoch.

    It does not work together with ``StochasticWeightAveraging``, which needs BatchNorms in Train mode.

    Args:
        mode: What training runs in: ``"tune"``, ``"eval"``, or ``"train"`` for ordinary BatchNorm.
        eval_mode: What validation, test and predict run in: ``"deploy"`` (folded once per run), ``"eval"`` or
            ``"tune"``.
        target: What to convert: a path as ``"backbone"``, or several as ``["model.encoder", "model.neck"]``. None is
            ``backbone`` if the LightningModule has one, else every child that holds a BatchNorm.
        start_epoch: The first epoch in ``mode``. Earlier epochs run in Train mode.
        freeze_untrained: Whether to freeze a BatchNorm that was never trained, as in a new head: one with mean 0 and
            variance 1. By default it stays in Train mode, and a warning says so.
        recompute: With ``"elementwise"``, what can be computed again, elementwise, from what is kept anyway is not kept
            for the backward pass: outputs of activations, gates, concatenations. The numbers are the same, with less
            memory. With ``"blocks"``, repeated blocks also run their forward again in the backward pass: much less
            memory, longer steps. Both need the mode ``"eval"`` or ``"tune"``. ``"none"`` recomputes nothing.
        memory_budget: What a step may take, as ``"8GiB"`` or in bytes. Before the first batch runs, and before a larger
            one, the least recomputation is chosen whose step fits; ``convbn/predicted_peak_mib`` is logged. A warning
            says if nothing fits. ``"auto"`` is what the CUDA device has left, less a tenth.
        verify: Whether to compare each pair with Eval mode at the first batch, on the spot, in the one real pass. Pairs
            that differ, or whose fold is of no use, go back to Eval mode, with a warning.
        log_memory: Whether to count, print and log memory.
        export_path: The file to write at the end of fit: ``.onnx``, ``.pt2``, ``.pt`` or ``.safetensors``. It holds, as
            `export` writes it, what the LightningModule's ``forward`` computes, or the single target if it has no
            forward. The weights are those of the best checkpoint if a ModelCheckpoint monitors something, else the last
            ones. Example inputs are ``example_input_array``, else they are taken from the first training batch. What
            can't be exported is refused before training if it can be known then. A failure at the end is a warning.

    Raises:
        ValueError: If an argument can't be used. At the start of a stage: if a ``target`` does not exist or has no
            BatchNorm.

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
        recompute: Recompute = "none",
        memory_budget: int | str | None = None,
        verify: bool = True,
        log_memory: bool = True,
        export_path: str | PathLike[str] | None = None,
    ) -> None:
        check_modes(mode, eval_mode, start_epoch)
        check_recomputation(mode, recompute, memory_budget)
        check_export_path(export_path)
        self.mode: Mode = mode
        self.eval_mode: Mode = eval_mode
        self.target = checked_paths(target)
        self.start_epoch = start_epoch
        self.freeze_untrained = freeze_untrained
        self.recompute: Recompute = recompute
        self.memory_budget = memory_budget
        self.verify = verify
        self.log_memory = log_memory
        self.export_path = export_path
        self._run = Run()

    # ------------------------------------------------------------------------------------------- before and after

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called at the start of a stage, before checkpoints are loaded: begin a new run, with plain modules.

        An earlier run may have ended without a call of our hooks. We move behind the other callbacks, which may change
        the model, and the finders of batch size and learning rate behind us.
        """
        self._run.restore()
        self._run = Run(
            export=None if self.export_path is None else FitExport(self.export_path),
            found_flags={module: module.training for module in pl_module.modules()},
        )
        other_callbacks.check_only_one(trainer, ConvBNModeCallback)
        other_callbacks.put_behind_others(trainer, self)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Called if a stage fails, also by Ctrl-C: give back plain modules, and their training flags."""
        self._run.restore_or_warn()
        self._run.restore_flags()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called at the end of a stage: give back plain modules, and keep no reference to them."""
        self._run.restore_or_warn()
        self._run.found_flags = {}

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Called when a checkpoint is saved: note which BatchNorms stay in Train mode.

        In a resumed run they don't look untrained any more. All else follows from the arguments and the epoch. We don't
        use ``state_dict``: Lightning would warn in each run that loads the checkpoint without this callback.
        """
        checkpoint[_CHECKPOINT_KEY] = dict(self._run.untrained)

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Called when a checkpoint is loaded: read that note. Without the callback no note was written."""
        if not self.freeze_untrained:
            self._run.untrained = dict(checkpoint.get(_CHECKPOINT_KEY, {}))

    # --------------------------------------------------------------------------------------------------- training

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when the strategy has set up the module: find the parts, after the checks that need the Trainer.

        They are converted at the first batch, because others may change the model until then; and for the trials that
        a finder runs now.
        """
        other_callbacks.check_no_weight_averaging(trainer)
        self._run.parts = self._find_parts(pl_module)
        if self.memory_budget is not None:
            self._run.plan_recomputation(PlannedRecomputation(self.memory_budget, trainer, pl_module))
        if self._run.export is not None:
            self._run.export.prepare(trainer, pl_module, [part.path for part in self._run.parts])
        self._convert_for_trials(trainer, pl_module, "on_fit_start")

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called at the start of each epoch: count the peak memory anew. A finder may run its trials at this time."""
        self._convert_for_trials(trainer, pl_module, "on_train_epoch_start")
        if self.log_memory and pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Called before each training step: switch to the mode of this epoch, and watch the first batch in ``mode``.

        If the user has changed modules, or has switched a part between train and eval state, pairs are found anew.
        """
        self._enter_training(trainer, pl_module)
        check = not self._run.reported and self._training_mode(trainer) == self.mode
        self._run.watch_batch(pl_module, check=check, verify=self._verifies(), measure=self.log_memory)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Called after each training step: report what the first batch has shown.

        Lightning also calls this, with None for the batch, if it skips a batch without a call of
        ``on_train_batch_start``.
        """
        self._run.watches.close()
        if batch is None:
            return
        if self._run.export is not None:
            self._run.export.check_recorded(pl_module)
        if self._run.checks_batch:
            self._run.checks_batch = False
            self._report(trainer)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called at the end of each epoch: log the peak memory, and give back plain modules until the next batch."""
        if self.log_memory and pl_module.device.type == "cuda":
            log_peaks(trainer, pl_module.device)
        self._run.give_back()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called after the last epoch, before the strategy undoes its own changes: give back plain modules."""
        self._run.restore()

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when weights and checkpoints are final: export."""
        if self._run.export is not None:
            self._run.export.write_or_warn(trainer, pl_module)

    # ------------------------------------------------------------------------------------------------- evaluation

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called before each validation: switch to ``eval_mode``.

        A hook may have ended the epoch between start and end of the first batch, so nothing is watched any more.
        """
        self._run.watches.close()
        self._enter_evaluation(pl_module)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called after each validation: give back plain modules, within a fit until the next batch."""
        if trainer.state.fn == "fit":
            self._run.give_back()
        else:
            self._run.restore()

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called before a test: switch to ``eval_mode``."""
        self._enter_evaluation(pl_module)

    @override
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called after a test: give back plain modules."""
        self._run.restore()

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called before predictions: switch to ``eval_mode``."""
        self._enter_evaluation(pl_module)

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called after predictions: give back plain modules."""
        self._run.restore()

    # -------------------------------------------------------------------------------------------------- internals

    def _training_mode(self, trainer: Trainer) -> Mode:
        return self.mode if trainer.current_epoch >= self.start_epoch else "train"

    def _verifies(self) -> bool:
        return self.verify and self.mode == "tune"

    def _find_parts(self, pl_module: LightningModule) -> list[ConvertedPart]:
        return find_parts(pl_module, self.target, self._run.untrained, recompute=self.recompute)

    def _follow_changes(self, pl_module: LightningModule) -> None:
        self._run.follow_changes(pl_module, self._find_parts, freeze_untrained=self.freeze_untrained)

    def _enter_training(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._follow_changes(pl_module)
        self._run.train_in(self._training_mode(trainer), freeze_untrained=self.freeze_untrained)

    def _convert_for_trials(self, trainer: Trainer, pl_module: LightningModule, hook: str) -> None:
        enter = partial(self._enter_training, trainer, pl_module)
        other_callbacks.convert_for_trials(trainer, hook, enter, self._run.end_trials)

    def _enter_evaluation(self, pl_module: LightningModule) -> None:
        if not self._run.parts:
            self._run.parts = self._find_parts(pl_module)
        self._follow_changes(pl_module)
        self._run.evaluate_in(self.eval_mode)

    def _report(self, trainer: Trainer) -> None:
        self._run.reported = True
        self._run.merge_findings(trainer.world_size)
        for part in self._run.parts:
            warn_about(part, verify=self._verifies())
        print_table(trainer, self._run.parts, self.mode, self.eval_mode)
        log_kept_bytes(trainer, self._run.parts)
