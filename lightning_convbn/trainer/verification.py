"""Checks folded pairs in the one real pass: does each give what Eval mode gives, and is each of use?"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from lightning_convbn.compat import inside_transform
from lightning_convbn.layers.marks import Marked, has_watching_hooks, plain_output
from lightning_convbn.layers.norms import FoldedNorm, frozen_batch_norm
from lightning_convbn.layers.swap import swap_of
from lightning_convbn.pairs import reasons
from lightning_convbn.pairs.output_deviation import deviation_of, tolerance_of


class Verification:
    """Compares each folded output with Eval mode, on the spot, while a training step runs.

    No forward of the user runs a second time. A comparison costs one plain convolution and one BatchNorm. Where the two
    differ, the step goes on with Eval mode's output.

    Args:
        names: The BatchNorms of the pairs -> their qualified names.

    Attributes:
        running: Whether it compares at this moment.
        deviation: The largest relative deviation from Eval mode; None if no pair has run yet.
        compared: The BatchNorms that were compared.
        wrong: The BatchNorms that must not be folded: qualified name -> why.
        unused: The BatchNorms whose fold was of no use in the step: qualified name -> why. Their output is Eval mode's.
    """

    def __init__(self, names: Mapping[nn.Module, str]) -> None:
        self.running = False
        self.deviation: float | None = None
        self.compared: set[str] = set()
        self.wrong: dict[str, str] = {}
        self.unused: dict[str, str] = {}
        self._names = names

    def start(self) -> None:
        """Compare from now on."""
        self.running = True
        for bn in self._names:
            if isinstance(bn, FoldedNorm):
                bn.__dict__["_check"] = self

    def stop(self) -> None:
        """Compare no more."""
        self.running = False
        for bn in self._names:
            bn.__dict__.pop("_check", None)

    def compare(self, bn: nn.Module, folded: Tensor, marked: Marked) -> Tensor:
        """Return a folded output if it equals Eval mode's, else Eval mode's.

        Args:
            bn: The BatchNorm that returns it.
            folded: The folded output.
            marked: The same, marked: the plain output can be computed from it.
        """
        if inside_transform():  # no number can be read there
            return folded
        expected = frozen_batch_norm(bn, plain_output(marked, noted=False))
        deviation = deviation_of([folded.detach()], [expected.detach()])
        name = self._names[bn]
        self.compared.add(name)
        self.deviation = deviation if self.deviation is None else max(self.deviation, deviation)
        if deviation <= tolerance_of(bn, [folded]):
            return folded
        self.wrong[name] = reasons.CHANGED_OUTPUT.format(deviation=deviation)
        return expected

    def note_plain(self, bn: nn.Module) -> None:
        """Note that a BatchNorm has not got the output of its convolution, or that others have got it, too."""
        swap = swap_of(bn)
        hooked = swap is not None and swap.conv is not None and has_watching_hooks(swap.conv[0], bn)
        self.unused[self._names[bn]] = reasons.HOOKED if hooked else reasons.OTHER_AT_RUN_TIME
