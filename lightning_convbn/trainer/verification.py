"""Checks folded pairs in the one real pass: does each give what Eval mode gives, and is each of use?"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from lightning_convbn.compat import inside_transform, is_watched
from lightning_convbn.layers.marks import Mark, plain_output
from lightning_convbn.layers.norms import normalised
from lightning_convbn.layers.state import Pair, pair_of
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
        for pair in filter(None, map(pair_of, self._names)):
            pair.check = self

    def stop(self) -> None:
        """Compare no more."""
        self.running = False
        for pair in filter(None, map(pair_of, self._names)):
            pair.check = None

    def compare(self, pair: Pair, marked: Mark, folded: Tensor) -> Tensor:
        """Return a folded output if it equals Eval mode's, else Eval mode's.

        Args:
            pair: The pair that puts it out.
            marked: The mark: the plain output can be computed from it.
            folded: The folded output.
        """
        if inside_transform():  # no number can be read there
            return folded
        expected = normalised(pair.bn, plain_output(marked, noted=False))
        deviation = deviation_of([folded.detach()], [expected.detach()])
        name = self._names[pair.bn]
        self.compared.add(name)
        self.deviation = deviation if self.deviation is None else max(self.deviation, deviation)
        if deviation <= tolerance_of(pair.bn, [folded]):
            return folded
        self.wrong[name] = reasons.CHANGED_OUTPUT.format(deviation=deviation)
        return expected

    def note_plain(self, pair: Pair) -> None:
        """Note that a BatchNorm has not got the output of its convolution, or that others have got it, too."""
        hooked = is_watched(pair.conv, pair.bn)
        self.unused[self._names[pair.bn]] = reasons.HOOKED if hooked else reasons.OTHER_AT_RUN_TIME
