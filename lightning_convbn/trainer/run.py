"""One ``fit``, ``validate``, ``test`` or ``predict`` of one Trainer: which mode its parts are in."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING
from weakref import WeakSet

from torch import nn

from lightning_convbn.layers.state import Mode
from lightning_convbn.pairs.find import find_untrained
from lightning_convbn.trainer.converted_part import ConvertedPart
from lightning_convbn.trainer.export_at_end import FitExport
from lightning_convbn.trainer.first_batch import FirstBatch
from lightning_convbn.trainer.lightning_api import LightningModule, Trainer
from lightning_convbn.trainer.other_callbacks import put_behind_others
from lightning_convbn.trainer.planned_recomputation import PlannedRecomputation

if TYPE_CHECKING:
    from lightning_convbn.callback import ConvBNModeCallback

_RUNS: WeakSet[Run] = WeakSet()  # those that have begun, and were not closed


class Run:
    """What the callback does during one run. `restore` gives back plain modules until the next batch, `close` for good.

    Another Trainer may run inside of a hook of this one, with its own callback over the same modules. While it has
    them, this run is suspended: its modules are plain, and it has no hooks. Then it goes on as it was.

    Args:
        callback: The callback, with its arguments.
        trainer: The Trainer.
        pl_module: What it runs.

    Attributes:
        export: The export at the end of a fit; None without ``export_path``.
        parts: What is converted while batches run; None until it is found.
    """

    def __init__(self, callback: ConvBNModeCallback, trainer: Trainer, pl_module: LightningModule) -> None:
        self.trainer = trainer
        self.export = None if callback.export_path is None else FitExport(callback.export_path)
        self._callback = callback
        self._pl_module = pl_module
        self._flags = {module: module.training for module in pl_module.modules()}
        self.parts: list[ConvertedPart] | None = None
        self._now: tuple[Mode, bool] | None = None  # the mode in force and whether it is training's; None while plain
        self._budget: PlannedRecomputation | None = None
        self._first: FirstBatch | None = None  # while it runs
        self._reported = False
        self._undo = ExitStack()  # what else `close` does
        if not callback.steps_aside:
            self._undo.callback(put_behind_others(trainer, callback))
        _RUNS.add(self)

    @property
    def is_going_on(self) -> bool:
        """Whether the Trainer has not ended the run, nor an exception: Lightning may not have told us."""
        return bool(self.trainer.state.status == "running")

    def prepare_fit(self) -> None:
        """Find the parts, and check what a budget and an export need. It raises what they raise."""
        parts = self._find_parts()
        if self._callback.memory_budget is not None:
            budget = PlannedRecomputation(self._callback.memory_budget, self.trainer, self._pl_module)
            budget.check(parts)
            self._budget = budget
        if self.export is not None:
            self.export.prepare(self.trainer, self._pl_module, [part.path for part in parts])

    def train(self) -> None:
        """Switch to the mode of this epoch for a training batch.

        Nothing is done if it is in force, unless the user has put a part into another state, train or eval.
        """
        mode = self._callback.mode if self.trainer.current_epoch >= self._callback.start_epoch else "train"
        parts = self._find_parts()
        for part in parts:
            part.begin_batch()
        if self._budget is not None:
            self._budget.begin_batch()
        if self._now != (mode, True) or any(part.state_has_changed() for part in parts):
            self._switch(mode, training=True)

    def evaluate(self) -> None:
        """Switch to the mode of evaluation. In it every BatchNorm uses its running statistics."""
        self._close_hooks()
        self._find_parts()
        self._switch(self._callback.eval_mode, training=False)

    def begin_batch(self) -> None:
        """Watch the batch, if it is the first one in the callback's mode, or if the export needs example inputs."""
        records = self.export is not None and self.export.inputs is None
        if self.parts and (self._is_new or records):
            parts = self.parts if self._is_new else ()
            self._first = FirstBatch(self._callback, self.trainer, parts, budget=self._budget, export=self.export)
            self._first.open()

    def end_batch(self) -> None:
        """Report what the first batch has shown."""
        first, self._first = self._first, None
        if first is None:
            return
        first.close()
        if self.export is not None:
            self.export.check_recorded(self._pl_module)
        first.report()
        self._reported = self._reported or self._is_new
        self._open_budget()

    def end_trials(self) -> None:
        """Give back plain modules after a finder's trials. It may not take the largest batch that it tried."""
        self.restore()
        if self._budget is not None:
            self._budget.forget()

    def restore(self) -> None:
        """Give back plain modules until the next batch. What is known about the parts is kept."""
        self._now = None
        with ExitStack() as stack:  # calls all, also if one raises
            for part in self.parts or ():
                stack.callback(part.restore)
            self._close_hooks()

    def close(self) -> None:
        """End the run. Modules and the Trainer's callbacks are as they were, and suspended runs go on."""
        _RUNS.discard(self)
        with self._undo:
            self.restore()

    def restore_flags(self) -> None:
        """Give every module the ``training`` flag that it had when the run began."""
        for module, training in self._flags.items():
            module.training = training

    # ---------------------------------------------------------------------------------------------------- internals

    @property
    def _is_new(self) -> bool:
        """Whether training is in the callback's mode, and no batch in it was reported."""
        return not self._reported and self._now == (self._callback.mode, True)

    def _find_parts(self) -> list[ConvertedPart]:
        """Return the parts. If the user has changed modules, parts and pairs are found anew, and checked anew."""
        if self.parts is None:
            self.parts = self._callback.find_parts(self._pl_module)
            self._suspend_others(self.parts)
        elif any(part.has_changed(self._pl_module) for part in self.parts):
            known = {module for part in self.parts for module in part.tree.values()}
            self.restore()
            self.parts, self._reported = self._callback.find_parts(self._pl_module), False
            if self._budget is not None:
                self._budget.forget()
            for part in self.parts:
                self._note_untrained(part, known)
        return self.parts

    def _note_untrained(self, part: ConvertedPart, known: set[nn.Module]) -> None:
        """Name as untrained what was named before, and what is new here and untrained."""
        former = self._callback.untrained.get(part.path)
        if former is not None and not self._callback.freeze_untrained:
            new = [name for name in find_untrained(part.module) if part.tree[name] not in known]
            self._callback.untrained[part.path] = [name for name in dict.fromkeys([*former, *new]) if name in part.tree]

    def _switch(self, mode: Mode, *, training: bool) -> None:
        """Switch all parts. The first time that training freezes a part, name its untrained BatchNorms."""
        untrained = self._callback.untrained
        for part in self.parts or ():
            if training and mode != "train" and part.path not in untrained:
                untrained[part.path] = [] if self._callback.freeze_untrained else find_untrained(part.module)
            part.switch(mode, untrained=untrained.get(part.path, ()) if training else ())
        self._now = mode, training
        self._open_budget()

    def _open_budget(self) -> None:
        if self._budget is not None and self._now is not None and self._now[1]:
            self._budget.open(self.parts or ())

    def _close_hooks(self) -> None:
        if self._first is not None:
            self._first.close()
            self._first = None
        if self._budget is not None:
            self._budget.close()

    def _suspend_others(self, parts: list[ConvertedPart]) -> None:
        modules = {module for part in parts for module in part.tree.values()}
        for run in [*_RUNS]:
            shared = any(not modules.isdisjoint(part.tree.values()) for part in run.parts or ())
            if run is not self and run._now is not None and run.is_going_on and shared:
                self._undo.callback(run._resume, run._now, run._first)
                run.restore()

    def _resume(self, now: tuple[Mode, bool], first: FirstBatch | None) -> None:
        mode, training = now
        self._switch(mode, training=training)
        if first is not None:
            self._first = first
            first.open()
