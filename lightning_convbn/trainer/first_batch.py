"""The first training batch, from top to bottom: find, record, plan, verify, count, report."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from lightning_convbn.blocks.find import recomputed_blocks
from lightning_convbn.memory.measure import measure_memory_abstractly
from lightning_convbn.pairs.side_effects import tensors_of
from lightning_convbn.pairs.units import is_fsdp_unit
from lightning_convbn.text import first_line
from lightning_convbn.trainer.converted_part import ConvertedPart
from lightning_convbn.trainer.export_at_end import FitExport
from lightning_convbn.trainer.lightning_api import Trainer
from lightning_convbn.trainer.logged_metrics import log_kept_bytes
from lightning_convbn.trainer.own_forward import before_forwards
from lightning_convbn.trainer.planned_recomputation import PlannedRecomputation
from lightning_convbn.trainer.processes import merged_over_processes
from lightning_convbn.trainer.report import Findings, describe, print_lines, sides_of, warn_about
from lightning_convbn.trainer.verification import Verification

if TYPE_CHECKING:
    from lightning_convbn.callback import ConvBNModeCallback


class FirstBatch:
    """Looks at the first batch that is trained on in a mode. Its methods run in the order in which they stand here.

    The pairs were found when the parts were switched. While the batch runs, hooks watch it. They can't be compiled, so
    this batch is trained on without ``torch.compile``. `close` takes all of them back.

    Args:
        asked: The callback, whose arguments say what to do.
        trainer: The Trainer.
        parts: The parts to look at. There are none if the batch only gives the example inputs of the export.
        budget: What plans for a memory budget; None without one.
        export: The export at the end of the fit; None without one.
    """

    def __init__(
        self,
        asked: ConvBNModeCallback,
        trainer: Trainer,
        parts: Sequence[ConvertedPart],
        *,
        budget: PlannedRecomputation | None,
        export: FitExport | None,
    ) -> None:
        looks = {"verified": asked.verify and asked.mode == "tune", "counted": asked.log_memory}
        self._findings = {part: Findings([what for what, wanted in looks.items() if wanted]) for part in parts}
        self._asked, self._trainer, self._budget, self._export = asked, trainer, budget, export
        self._hooks = ExitStack()

    def open(self) -> None:
        """Watch the batch from now on, until `close`."""
        self._hooks.enter_context(torch.compiler.set_stance("force_eager"))
        if self._export is not None:
            self._hooks.callback(self._export.open(self._trainer.lightning_module))
        if self._budget is not None:
            self._budget.close()  # in this batch we call it
        for part, found in self._findings.items():
            if "verified" in found.asked:
                self._verify(part, found)
            self._hooks.callback(before_forwards(part.called, partial(self._look, part, found)))

    def _look(self, part: ConvertedPart, found: Findings, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Called before each forward of a part: record, plan, and count. While it runs, its pairs are verified."""
        failed = part.record(args, kwargs)
        if self._budget is not None:
            self._budget.follow(part, args, kwargs)
        if failed and not found.ran:
            found.notes.append(f"not counted: {failed}")
        elif "counted" in found.asked and not found.ran:
            self._count(part, found, args, kwargs)
        found.ran = True

    def _verify(self, part: ConvertedPart, found: Findings) -> None:
        """Compare each folded pair with Eval mode, on the spot, whenever it runs in this batch."""
        found.verification = found.verification or Verification(part.norms)
        part.verification = found.verification
        part.verification.start()
        self._hooks.callback(part.close)

    def _count(self, part: ConvertedPart, found: Findings, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Count what a step keeps without this package, and with it; and their peaks. If that fails, note it.

        Tune's count is compared with Eval mode; that of Train mode with recomputation with plain Train mode.
        """
        if any(is_fsdp_unit(module) for module in part.module.modules()):
            found.notes.append("not counted: FSDP gathers parameters in its forward")
            return
        try:
            uses = [
                measure_memory_abstractly(
                    part.module, args, kwargs, mode=side.mode, pairs=part.pairs, recompute=side.recompute
                )
                for side in sides_of(part)
            ]
        except Exception as error:
            found.notes.append(f"not counted: {type(error).__name__}: {first_line(error)}")
            return
        found.sides = sides_of(part)
        found.kept_bytes = [use.saved_bytes for use in uses]
        peaks = [use.peak_bytes for use in uses if use.peak_bytes is not None]
        found.peak_bytes = peaks if len(peaks) == len(uses) else None
        shape = next((tensor.shape for tensor in tensors_of((args, kwargs))), ())
        found.notes.append(f"counted on an input of {' × '.join(map(str, shape))}")

    def close(self) -> None:
        """Watch no more. The second call does nothing."""
        self._hooks.close()

    def report(self) -> None:
        """Unfold what is wrong in any process, also in the export. Then warn, print the table, and log.

        Every process must call this, after `close`.
        """
        processes = self._trainer.world_size
        for part, found in self._findings.items():
            found.blocks = recomputed_blocks(part.module)  # a switch forgets what they have shown
            shown = found.verification
            wrong = merged_over_processes({} if shown is None else {**shown.unused, **shown.wrong}, processes)
            if wrong:
                part.change(wrong=wrong)
            if self._budget is not None:
                self._budget.merge(part, processes)
            if self._export is not None:
                self._export.wrong.update({part.full_name(name): reason for name, reason in part.wrong.items()})
        table: list[str] = []
        for part, found in self._findings.items():
            warn_about(part, found)
            table += describe(part, found, self._asked.mode, self._asked.eval_mode)
        if self._findings:
            print_lines(self._trainer, table)
        log_kept_bytes(self._trainer, [*self._findings.values()])
