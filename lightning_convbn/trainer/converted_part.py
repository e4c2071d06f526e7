"""One converted part of a LightningModule: its path, its module, its pairs, and what it recomputes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any
from weakref import WeakSet

from torch import nn

from lightning_convbn.blocks.find import why_not
from lightning_convbn.compat import has_statistics
from lightning_convbn.conversion import keep_no_fold, restore_modules
from lightning_convbn.layers.state import Frozen, Mode, Pair, TrainingFlag, state_of
from lightning_convbn.layers.supported_layers import is_norm
from lightning_convbn.memory.plan import Choice
from lightning_convbn.modes import RECOMPUTING_MODES, set_mode
from lightning_convbn.pairs.find import find_conv_bn_pairs, find_recorded_pairs
from lightning_convbn.pairs.pair import ConvBNPairs
from lightning_convbn.pairs.reasons import UNTRAINED
from lightning_convbn.pairs.units import is_wrapped_by_compile
from lightning_convbn.text import first_line
from lightning_convbn.trainer.verification import Verification


class ConvertedPart:
    """A part of a LightningModule. `switch` puts it in a mode, `restore` makes it plain.

    Its pairs are found twice, once for its train and once for its eval state: its forward may differ between the two.

    Args:
        path: Qualified name of the part, for messages; empty for the whole LightningModule.
        module: The part. Of a compiled module, what was compiled is converted.
        recompute: What training recomputes; as for `set_mode`.

    Attributes:
        called: The part as it is called.
        module: What is converted.
        tree: Its modules by qualified name, as they were when the part was found.
        norms: Its BatchNorms -> their qualified names.
        recompute: The same. A memory budget changes it.
        mode: The mode of the last switch.
        pairs: The pairs in force.
        wrong: BatchNorms that are not folded any more, by what the first batch has shown -> why.
        verification: What compares the pairs with Eval mode during the first batch; else None.
    """

    def __init__(self, path: str, module: nn.Module, *, recompute: Choice = "none") -> None:
        self.path = path
        self.called = module
        self.module = next(module.children()) if is_wrapped_by_compile(module) else module
        self.recompute = recompute
        self.mode: Mode = "train"
        self.pairs = ConvBNPairs([])
        self.wrong: dict[str, str] = {}
        self.verification: Verification | None = None
        self._state = self.module.training  # the train (True) or eval state (False) that it was last switched in
        self._found: dict[bool, ConvBNPairs] = {}  # the pairs in each state
        self._recorded: dict[bool, str] = {}  # why recording has failed in each state; empty if it has not
        self._unfrozen: dict[str, str] = {}
        self.tree = dict(self.module.named_modules())
        self.norms = {module: name for name, module in self.tree.items() if is_norm(module)}
        self._without_statistics = self._norms_without_statistics()
        self._flags: dict[nn.Module, TrainingFlag] = {}  # of BatchNorms, as asked for since the last training batch
        self._converted: WeakSet[nn.Module] = WeakSet()  # also those that were moved elsewhere since

    def full_name(self, name: str) -> str:
        """Return the qualified name, within the LightningModule, of a module of this part."""
        return f"{self.path}.{name}" if self.path else name

    def switch(self, mode: Mode, *, untrained: Iterable[str] = ()) -> None:
        """Put the part in a mode, by the pairs of the state that it is in now. A comparison with Eval mode goes on.

        Args:
            mode: Any mode.
            untrained: BatchNorms that stay in Train mode.
        """
        self.mode, self._state = mode, self.module.training
        if self._state not in self._found:
            self._found[self._state] = find_conv_bn_pairs(self.module)
        found = self._found[self._state]
        self._unfrozen = {name: UNTRAINED for name in untrained if name not in found.unfrozen}
        self.pairs = found.unfold(self.wrong).unfreeze(self._unfrozen)
        recompute = self.recompute if mode in RECOMPUTING_MODES else "none"
        if not isinstance(recompute, str):  # a plan was made with other pairs, maybe
            recompute = tuple(name for name in recompute if why_not(self.module, name, self.pairs) is None)
        set_mode(self.module, mode, pairs=self.pairs, recompute=recompute)
        keep_no_fold(self.module)
        self._converted.update(self.module.modules())
        if self.verification is not None:
            self.verification.start()

    def change(self, *, recompute: Choice | None = None, wrong: Mapping[str, str] | None = None) -> None:
        """Recompute something else, or unfold wrong pairs: at once and in later switches."""
        self.recompute = self.recompute if recompute is None else recompute
        self.wrong.update(wrong or {})
        self.switch(self.mode, untrained=self._unfrozen)

    def record(self, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """If something could not be traced, find the pairs anew, by recording the data flow of real inputs.

        It is tried once in each state, train and eval.

        Returns:
            Why it has failed; empty if it has not: memory does not suffice, or the shadow of the module can't run.
        """
        state = self.module.training
        if self.pairs.untraced and state not in self._recorded:
            try:
                self._found[state], self._recorded[state] = find_recorded_pairs(self.module, inputs, kwargs), ""
            except Exception as error:
                self._recorded[state] = f"{type(error).__name__}: {first_line(error)}"
            else:
                self.change()
        return self._recorded.get(state, "")

    def close(self) -> None:
        """Compare the pairs with Eval mode no more."""
        if self.verification is not None:
            self.verification.stop()
            self.verification = None

    def restore(self) -> None:
        """Give back plain modules, wherever they are now. What is known about the part is kept."""
        self.restore_flags()
        states = {bn: state_of(bn) for bn in self.norms}
        flags = {bn: state.flag for bn, state in states.items() if isinstance(state, (Frozen, Pair))}
        self._flags = {**flags, **self._flags}
        restore_modules([*self.module.modules(), *self._converted])

    def begin_batch(self) -> None:
        """Note that a training batch begins: a validation before it has put flags back by now."""
        if self._flags:
            self.restore_flags()
            self._flags = {}

    def restore_flags(self) -> None:
        """Give back the training flags that were asked for while the part was converted.

        Lightning assigns flags after a validation: those that it saw before, of frozen BatchNorms.
        """
        for bn, flag in self._flags.items():
            bn.training = bn.training or flag.value()

    def state_has_changed(self) -> bool:
        """Whether the module is in another state, train or eval, than at the last switch."""
        return self.module.training != self._state

    def has_changed(self, pl_module: nn.Module) -> bool:
        """Whether modules or running statistics were replaced, added or removed since the part was found."""
        try:
            found = pl_module.get_submodule(self.path)
        except AttributeError:
            return True
        same = found is self.called and [*self.module.named_modules()] == [*self.tree.items()]
        return not same or self._norms_without_statistics() != self._without_statistics

    def _norms_without_statistics(self) -> list[nn.Module]:
        """List the BatchNorms that have no running statistics. Somebody may take them away, or give new ones."""
        return [bn for bn in self.norms if not has_statistics(bn)]
