"""What the callback remembers from hook to hook, during one run of the Trainer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from lightning_convbn.layers.state import Mode
from lightning_convbn.trainer.converted_part import ConvertedPart
from lightning_convbn.trainer.export_at_end import FitExport
from lightning_convbn.trainer.lightning_api import LightningModule, rank_zero_warn
from lightning_convbn.trainer.planned_recomputation import PlannedRecomputation


@dataclass
class Run:
    """What the callback remembers during one ``fit``, ``validate``, ``test`` or ``predict``.

    ``setup`` makes a new one.

    Attributes:
        export: The export at the end of the fit; None without ``export_path``.
        found_flags: Module -> its ``training`` flag at ``setup``. Empty after the run.
        parts: The parts that are converted while batches run. Empty outside of a run.
        training_mode: The mode that the parts train in at this moment. None while they are plain, or in an evaluation.
        untrained: Path of a part -> its untrained BatchNorms, which stay in Train mode. It outlives the run: a
            checkpoint may be saved later.
        checks_batch: Whether the current training batch is the one that is checked.
        reported: Whether the first batch was checked and reported.
        planned: What recomputes by a memory budget during a fit; None without one.
        watches: What to take back after a batch that is checked or recorded.
    """

    export: FitExport | None = None
    found_flags: dict[nn.Module, bool] = field(default_factory=dict)
    parts: list[ConvertedPart] = field(default_factory=list)
    training_mode: Mode | None = None
    untrained: dict[str, list[str]] = field(default_factory=dict)
    checks_batch: bool = False
    reported: bool = False
    planned: PlannedRecomputation | None = None
    watches: ExitStack = field(default_factory=ExitStack)

    def train_in(self, mode: Mode, *, freeze_untrained: bool) -> None:
        """Switch all parts to the mode that training runs in, and remember their untrained BatchNorms.

        Nothing is done if they are in it, unless the user has switched a part between train and eval state.
        """
        if self.planned is not None:
            self.planned.begin_batch()
        if self.training_mode == mode and not any(part.state_has_changed() for part in self.parts):
            return
        for part in self.parts:
            part.train_in(mode, freeze_untrained=freeze_untrained)
            if part.untrained is not None:
                self.untrained[part.path] = part.untrained
        if self.planned is not None and mode != "train":
            self.planned.watch(self.parts)
        self.training_mode = mode

    def evaluate_in(self, mode: Mode) -> None:
        """Switch all parts to the mode that evaluation runs in."""
        self.training_mode = None
        if self.planned is not None:
            self.planned.unwatch()
        for part in self.parts:
            part.evaluate_in(mode)

    def follow_changes(
        self,
        pl_module: LightningModule,
        find: Callable[[LightningModule], list[ConvertedPart]],
        *,
        freeze_untrained: bool,
    ) -> None:
        """If modules were replaced, added or removed, find parts and pairs anew. The next batch is checked anew, too.

        Args:
            pl_module: The LightningModule.
            find: Finds its parts.
            freeze_untrained: Whether untrained BatchNorms are frozen.
        """
        if any(part.has_changed(pl_module) for part in self.parts):
            self.give_back()
            former = {part.path: part for part in self.parts}
            self.parts = find(pl_module)
            self.reported = False
            if self.planned is not None:
                self.planned.forget()
            for part in self.parts:
                if part.path in former:
                    part.take_over(former[part.path], freeze_untrained=freeze_untrained)

    def give_back(self) -> None:
        """Give back plain modules until the next batch. What is known about the parts is kept."""
        self.training_mode = None
        with ExitStack() as stack:  # calls all, also if one raises
            stack.callback(self.watches.close)
            if self.planned is not None:
                stack.callback(self.planned.unwatch)
            for part in self.parts:
                stack.callback(part.restore)

    def plan_recomputation(self, planned: PlannedRecomputation) -> None:
        """Keep to a memory budget during this fit. It raises what `PlannedRecomputation.check` raises."""
        planned.check(self.parts)
        self.planned = planned

    def end_trials(self) -> None:
        """Give back plain modules after a finder's trials. It may not take the largest batch that it tried."""
        self.give_back()
        if self.planned is not None:
            self.planned.forget()

    def restore(self) -> None:
        """Give back plain modules at the end of a run."""
        self.give_back()
        self.parts = []
        self.planned = None
        if self.export is not None:
            self.export.unwatch()

    def restore_or_warn(self) -> None:
        """Give back plain modules. If that fails, warn: an error would hide the one that has ended the run."""
        try:
            self.restore()
        except Exception as error:
            rank_zero_warn(
                "ConvBN: a module could not be made plain again; build the model anew and load its weights. "
                f"{type(error).__name__}: {error}"
            )

    def restore_flags(self) -> None:
        """Give every module the ``training`` flag that it had at ``setup``."""
        for module, training in self.found_flags.items():
            module.training = training
        self.found_flags = {}

    def watch_batch(self, pl_module: LightningModule, *, check: bool, verify: bool, measure: bool) -> None:
        """Watch the batch that comes next, if it is to be checked or if it gives the inputs for the export.

        Hooks watch it. They can't be compiled, so this batch is trained on without ``torch.compile``.

        Args:
            pl_module: What is trained.
            check: Whether to check the parts on this batch.
            verify: Whether the check compares each folded pair with Eval mode.
            measure: Whether the check counts kept bytes.
        """
        self.checks_batch = check
        recorder = self.export if self.export is not None and self.export.inputs is None else None
        if check or recorder is not None:
            self.watches.enter_context(torch.compiler.set_stance("force_eager"))
        if recorder is not None:  # first, because a check runs the forward on inputs of its own
            self.watches.callback(recorder.unwatch)
            recorder.watch(pl_module)
        if check:
            for part in self.parts:
                self.watches.callback(part.unwatch)
                part.watch(partial(part.check_first_batch, measure=measure))
                if verify:
                    self.watches.callback(part.stop_verification)
                    part.verify()

    def merge_findings(self, processes: int) -> None:
        """Unfold what the check has found wrong in any process, also in the export. Every process must call this.

        Args:
            processes: How many processes the Trainer has.
        """
        for part in self.parts:
            part.merge_findings(processes)
            if self.planned is not None:
                self.planned.merge(part, processes)
            if self.export is not None:
                self.export.wrong.update({part.full_name(name): reason for name, reason in part.wrong.items()})
