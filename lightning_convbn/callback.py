"""`ConvBNModeCallback`, the one line that a project adds: ``Trainer(callbacks=[ConvBNModeCallback()])``."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from os import PathLike
from typing import Any, Literal

import torch
from typing_extensions import override

from lightning_convbn.layers.state import Mode, Recompute
from lightning_convbn.trainer import other_callbacks
from lightning_convbn.trainer.argument_checks import check_export_path, check_modes, check_recomputation
from lightning_convbn.trainer.converted_part import ConvertedPart
from lightning_convbn.trainer.find_converted_parts import checked_paths, find_parts
from lightning_convbn.trainer.lightning_api import Callback, LightningModule, Trainer, rank_zero_warn
from lightning_convbn.trainer.logged_metrics import log_peaks
from lightning_convbn.trainer.report import warn_if_never_reached
from lightning_convbn.trainer.run import Run

_CHECKPOINT_KEY = "lightning_convbn"


class ConvBNModeCallback(Callback):
    """Fine-tunes a pretrained convolutional network in Tune mode: with Eval's accuracy, in Deploy's memory.

    In Tune or Eval mode ``fit`` freezes every BatchNorm of the target at its running statistics, even if ``.train()``
    is called later. In Tune mode it is also folded into the convolution in front of it, at every forward. So the
    convolution's own output is not kept for the backward pass. Validation, test and predict run in ``eval_mode``. When
    a stage ends, also by an exception or Ctrl-C, the modules are plain again and have the training flags that they had.
    Parameters, optimizers and checkpoints are those of the plain model all the time.

    At the first training batch the callback compares Tune mode with Eval mode and counts the bytes that each keeps for
    the backward pass. It prints a table: what is folded, what is not, and why. It logs
    ``convbn/activations_eval_mib``, ``convbn/activations_tune_mib``, ``convbn/activations_saved_mib`` and
    ``convbn/activations_saved_percent`` to every logger, and if there is one target ``convbn/predicted_peak_eval_mib``
    and ``convbn/predicted_peak_tune_mib``; on CUDA also ``convbn/peak_allocated_mib`` and
    ``convbn/peak_reserved_mib`` at the end of every epoch.

    With the mode ``"train"`` BatchNorm stays as it is, and ``recompute`` or ``memory_budget`` take less memory for the
    same numbers. Then plain training (``train``) is compared with training so (``train_recomputed``), in the table and
    in the names of the metrics.

    It does not work together with ``StochasticWeightAveraging``, which needs BatchNorms in Train mode.

    Args:
        mode: What training runs in: ``"tune"``, ``"eval"``, or ``"train"`` for ordinary BatchNorm.
        eval_mode: What validation, test and predict run in: ``"deploy"`` (folded in every pass), ``"eval"`` or
            ``"tune"``.
        target: What to convert: a path as ``"backbone"``, or several as ``["model.encoder", "model.neck"]``. None is
            ``backbone`` if it has a BatchNorm, else every child that has one.
        start_epoch: The first epoch in ``mode``. Earlier epochs run in Train mode.
        freeze_untrained: Whether to freeze a BatchNorm that was never trained, as in a new head: one with mean 0 and
            variance 1. By default it stays in Train mode, and a warning says so.
        recompute: With ``"elementwise"``, what can be computed again, elementwise, from what is kept anyway is not kept
            for the backward pass: outputs of BatchNorms and activations, gates, concatenations. The numbers are the
            same, with less memory. With ``"blocks"``, repeated blocks also run their forward again in the backward
            pass: much less memory, longer steps. ``"none"`` recomputes nothing. It goes for the epochs before
            ``start_epoch``, too. In Train mode statistics are written once, whatever runs twice.
        memory_budget: What a step may take, as ``"8GiB"``, ``"8G"``, ``"8GB"`` or in bytes. Before the first batch
            runs, and before a larger one, the least recomputation is chosen whose step fits;
            ``convbn/predicted_peak_mib`` is logged. A warning says if nothing fits. ``"auto"`` is what the CUDA device
            has left, less a tenth.
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

    gives_way = False  # whether it does nothing beside another ConvBNModeCallback; else that is an error

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
        self.untrained: dict[str, list[str]] = {}  # path of a part -> its BatchNorms that stay in Train mode
        self._untrained_in: weakref.ref[LightningModule] | None = None
        self._run: Run | None = None
        self.steps_aside = False  # beside another ConvBNModeCallback, in this run

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle without the run that is going on."""
        return {**vars(self), "_run": None, "_untrained_in": None}

    def find_parts(self, pl_module: LightningModule) -> list[ConvertedPart]:
        """Find the parts that are converted. It raises a ValueError if there are none."""
        return [] if self.steps_aside else find_parts(pl_module, self.target, recompute=self.recompute)

    # ------------------------------------------------------------------------------------------- before and after

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called at the start of a stage, before checkpoints are loaded: begin a new run, with plain modules.

        An earlier run may have ended without a call of our hooks. We move behind the other callbacks, which may change
        the model, and the finders of batch size and learning rate behind us.
        """
        if self._run is not None and self._run.trainer is not trainer and self._run.is_going_on:
            raise ValueError(
                "callbacks: this ConvBNModeCallback is at work in another Trainer, whose run has not ended; give each "
                "Trainer a ConvBNModeCallback of its own"
            )
        self._close()
        self.steps_aside = other_callbacks.steps_aside(trainer, self, ConvBNModeCallback)
        if self._untrained_in is None or self._untrained_in() is not pl_module:
            self.untrained, self._untrained_in = {}, weakref.ref(pl_module)
        self._run = Run(self, trainer, pl_module)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Called if a stage fails, also by Ctrl-C: give back plain modules, and their training flags."""
        run = self._run
        if run is not None and run.trainer is trainer:
            self._close()
            run.restore_flags()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called at the end of a stage: give back plain modules, and keep no reference to them."""
        if self._run is not None and self._run.trainer is trainer:
            self._close()

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Called when a checkpoint is saved, maybe after the run: note which BatchNorms stay in Train mode.

        In a resumed run they don't look untrained any more. All else follows from the arguments and the epoch. We don't
        use ``state_dict``: Lightning would warn in each run that loads the checkpoint without this callback.
        """
        if self.untrained:
            checkpoint[_CHECKPOINT_KEY] = dict(self.untrained)

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Called when a checkpoint is loaded: read that note. Without the callback no note was written."""
        going_on = self._run is not None and self._run.parts is not None  # then what was named before counts, too
        noted = {} if self.freeze_untrained or self.steps_aside else checkpoint.get(_CHECKPOINT_KEY, {})
        self.untrained = {**(self.untrained if going_on else {}), **noted}

    # --------------------------------------------------------------------------------------------------- training

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when the strategy has set up the module: find the parts, after the checks that need the Trainer.

        They are converted at the first batch, because others may change the model until then; and for the trials that
        a finder runs now.
        """
        other_callbacks.check_no_weight_averaging(trainer)
        if self.mode != "train":
            warn_if_never_reached(self.start_epoch, trainer)
        run = self._run_of(trainer, pl_module)
        run.prepare_fit()
        other_callbacks.convert_for_trials(trainer, "on_fit_start", run.train, run.end_trials)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called at the start of each epoch: count the peak memory anew. A finder may run its trials at this time."""
        run = self._run_of(trainer, pl_module)
        other_callbacks.convert_for_trials(trainer, "on_train_epoch_start", run.train, run.end_trials)
        if self.log_memory and pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Called before each training step: switch to the mode of this epoch, and watch the first batch in ``mode``.

        If the user has changed modules, or has switched a part between train and eval state, pairs are found anew.
        """
        run = self._run_of(trainer, pl_module)
        run.train()
        run.begin_batch()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Called after each training step: report what the first batch has shown.

        Lightning also calls this if it skips a batch without a call of ``on_train_batch_start``.
        """
        self._run_of(trainer, pl_module).end_batch()

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called at the end of each epoch: log the peak memory, and give back plain modules until the next batch."""
        if self.log_memory and pl_module.device.type == "cuda":
            log_peaks(trainer, pl_module.device)
        self._run_of(trainer, pl_module).restore()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called after the last epoch, before the strategy undoes its own changes: give back plain modules."""
        self._run_of(trainer, pl_module).restore()

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when weights and checkpoints are final: export."""
        export = self._run_of(trainer, pl_module).export
        if export is not None:
            export.write_or_warn(trainer, pl_module)

    # ------------------------------------------------------------------------------------------------- evaluation

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called before each validation: switch to ``eval_mode``."""
        self._run_of(trainer, pl_module).evaluate()

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called after each validation: give back plain modules, within a fit until the next batch."""
        self._run_of(trainer, pl_module).restore()

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end

    # -------------------------------------------------------------------------------------------------- internals

    def _run_of(self, trainer: Trainer, pl_module: LightningModule) -> Run:
        """Return the run. If the callback was added to the Trainer too late for ``setup``, it begins now."""
        if self._run is None:
            self.setup(trainer, pl_module, "")
        assert self._run is not None
        return self._run

    def _close(self) -> None:
        """Give back plain modules at the end of a run. If that fails, warn: an error would hide what has ended it."""
        run, self._run = self._run, None
        try:
            if run is not None:
                run.close()
        except Exception as error:
            rank_zero_warn(
                "ConvBN: a module could not be made plain again; build the model anew and load its weights. "
                f"{type(error).__name__}: {error}"
            )
