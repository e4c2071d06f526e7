"""One converted part of a LightningModule: its pairs, its modes, and what the first batch shows about it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

from torch import nn

from lightning_convbn.blocks.find import Blocks, recomputed_blocks, why_not
from lightning_convbn.compat import inside_transform
from lightning_convbn.conversion import restore_modules
from lightning_convbn.layers.state import Mode, UncopiedHook, state_of
from lightning_convbn.memory.measure import measure_memory_abstractly
from lightning_convbn.memory.plan import Choice
from lightning_convbn.memory.use import MemoryUse
from lightning_convbn.modes import RECOMPUTING_MODES, get_mode, set_mode
from lightning_convbn.pairs.find import (
    find_conv_bn_pairs,
    find_recorded_pairs,
    find_untrained,
)
from lightning_convbn.pairs.pair import ConvBNPairs
from lightning_convbn.pairs.reasons import UNTRAINED
from lightning_convbn.pairs.side_effects import tensors_of
from lightning_convbn.pairs.units import is_fsdp_unit, is_wrapped_by_compile
from lightning_convbn.text import first_line
from lightning_convbn.trainer.own_forward import runs_its_forward
from lightning_convbn.trainer.processes import merged_over_processes
from lightning_convbn.trainer.verification import Verification


class ConvertedPart:
    """A part of a LightningModule that is switched between modes.

    Its pairs are found twice, once for its train and once for its eval state: its forward may differ between the two.

    Args:
        path: Qualified name of the part, for messages; empty for the whole LightningModule.
        module: The part. Of a compiled module, what was compiled is converted.
        untrained: The untrained BatchNorms, if an earlier part of this run has named them; else None.
        recompute: What training in Eval or Tune mode recomputes; as for `set_mode`.

    Attributes:
        module: What is converted.
        recompute: The same. A memory budget changes it: see `recompute_from_now_on`.
        pairs: The pairs in force.
        blocks: The blocks that run again in the backward pass, as the first batch has shown them.
        checked: Whether `check_first_batch` has run.
        verification: The comparison of the pairs with Eval mode in the first batch; None before it.
        notes: What else the first batch has shown, for the table.
        untrained: Untrained BatchNorms, which stay in Train mode. None until they are named, at the first freeze.
        wrong: BatchNorms that are not folded any more, by what the first batch has shown -> why.
        kept_bytes: Bytes kept for the backward pass in Eval and in Tune mode; None if they were not counted.
        peak_bytes: The most bytes alive at once in a step of the part alone, in the same modes; None as above, and if
            a backward pass of the sum of its outputs fails.
    """

    def __init__(
        self,
        path: str,
        module: nn.Module,
        untrained: list[str] | None = None,
        *,
        recompute: Choice = "none",
    ) -> None:
        self.path = path
        self.module = _without_compile(module)
        self.recompute = recompute
        self.pairs = ConvBNPairs([])
        self.blocks = Blocks()
        self.checked = False
        self.verification: Verification | None = None
        self.notes: list[str] = []
        self.untrained = untrained
        self.wrong: dict[str, str] = {}
        self.kept_bytes: dict[Mode, int] | None = None
        self.peak_bytes: dict[Mode, int] | None = None
        self._called = module
        self._recorded: dict[bool, bool] = {}  # whether in train state -> whether recording the data flow has worked
        self._found: dict[bool, ConvBNPairs] = {}  # whether in train state -> the pairs found in that state
        self._training_state = self.module.training
        self._tree = [*self.module.named_modules()]
        self._converted: WeakSet[nn.Module] = WeakSet()  # also those that were moved elsewhere since
        self._remove_hook: Callable[[], None] = _nothing

    def full_name(self, name: str) -> str:
        """Return the qualified name, within the LightningModule, of a module of this part."""
        return f"{self.path}.{name}" if self.path else name

    @property
    def mode(self) -> Mode:
        """The mode that it is in."""
        return get_mode(self.module)

    # -------------------------------------------------------------------------------------------------------- modes

    def take_over(self, former: ConvertedPart, *, freeze_untrained: bool) -> None:
        """Name as untrained what the former part of this path has named, and what is new here and untrained.

        Args:
            former: The part before modules were changed.
            freeze_untrained: Whether untrained BatchNorms are frozen, and so not named.
        """
        if former.untrained is None or freeze_untrained:
            return
        known = {module for _, module in former._tree}
        new = [name for name in find_untrained(self.module) if self.module.get_submodule(name) not in known]
        names = {name for name, _ in self._tree}
        self.untrained = list(dict.fromkeys([*(name for name in former.untrained if name in names), *new]))

    def train_in(self, mode: Mode, *, freeze_untrained: bool) -> None:
        """Switch to the mode that training runs in. The first time it freezes, name the untrained BatchNorms."""
        if mode != "train" and self.untrained is None:
            self.untrained = [] if freeze_untrained else find_untrained(self.module)
        self._training_state = self.module.training
        self._switch(mode, self._pairs_to_train())

    def recompute_from_now_on(self, recompute: Choice) -> None:
        """Recompute something else, at once and in later switches. The comparison with Eval mode goes on."""
        self.recompute = recompute
        self._switch(self.mode, self.pairs)
        if self.verification is not None and self.verification.running:
            self.verification.start()

    def state_has_changed(self) -> bool:
        """Whether the module is in another state, train or eval, than when training was prepared."""
        return self.module.training != self._training_state

    def has_changed(self, pl_module: nn.Module) -> bool:
        """Whether modules were replaced, added or removed since the part was found."""
        try:
            found = pl_module.get_submodule(self.path)
        except AttributeError:
            return True
        return found is not self._called or [*self.module.named_modules()] != self._tree

    def evaluate_in(self, mode: Mode) -> None:
        """Switch to the mode that evaluation runs in. There every BatchNorm uses its running statistics."""
        self._switch(mode, self._pairs_in(self.module.training))

    def restore(self) -> None:
        """Give back plain modules, wherever they are now. What is known about the part is kept."""
        self.unwatch()
        restore_modules([*self.module.modules(), *self._converted])

    def _pairs_in(self, state: bool) -> ConvBNPairs:
        """Return the pairs for the train state (True) or the eval state (False), without those found wrong."""
        if state not in self._found:
            self._found[state] = find_conv_bn_pairs(self.module)
        return self._found[state].unfold(self.wrong)

    def _pairs_to_train(self) -> ConvBNPairs:
        return self._pairs_in(self._training_state).unfreeze(dict.fromkeys(self.untrained or (), UNTRAINED))

    def _switch(self, mode: Mode, pairs: ConvBNPairs) -> None:
        recompute = self.recompute if mode in RECOMPUTING_MODES else "none"
        if not isinstance(recompute, str):  # a plan was made with other pairs, maybe
            recompute = tuple(name for name in recompute if why_not(self.module, name, pairs) is None)
        set_mode(self.module, mode, pairs=pairs, recompute=recompute)
        self._converted.update(module for module in self.module.modules() if state_of(module) is not None)
        self.pairs = pairs

    # -------------------------------------------------------------------------------------------------- first batch

    def watch(self, check: Callable[[tuple[Any, ...], dict[str, Any]], None]) -> None:
        """Call ``check`` with the arguments of the part's next forward, just before that forward."""

        def once(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.unwatch()
            check(args, kwargs)

        self.unwatch()
        self._remove_hook = self.call_before_forwards(once)

    def call_before_forwards(self, call: Callable[[tuple[Any, ...], dict[str, Any]], None]) -> Callable[[], None]:
        """Call a function with the arguments of each forward of the part, just before it.

        Returns:
            What ends that.
        """

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if runs_its_forward(module) and not inside_transform():  # no tensor can be looked at in a transform
                call(args, kwargs)

        return self._called.register_forward_pre_hook(UncopiedHook(before), with_kwargs=True).remove

    def unwatch(self) -> None:
        """Take back what `watch` does."""
        self._remove_hook()
        self._remove_hook = _nothing

    def verify(self) -> None:
        """Compare the folded pairs with Eval mode from now on, until `stop_verification`."""
        names = {self.module.get_submodule(pair.bn): pair.bn for pair in self.pairs}
        self.verification = Verification(names)
        self.verification.start()

    def stop_verification(self) -> None:
        """Compare no more."""
        if self.verification is not None:
            self.verification.stop()

    def check_first_batch(self, inputs: tuple[Any, ...], kwargs: dict[str, Any], *, measure: bool) -> None:
        """Look at the pairs in force with real inputs, and count what Eval and Tune mode keep, and their peaks.

        If something could not be traced, the data flow of these inputs is recorded first. If the shadow of the part
        can't run, or memory does not suffice, that is noted for the table, and nothing is raised: it is only a look.

        Args:
            inputs: Positional arguments of the part's forward.
            kwargs: Keyword arguments of the part's forward.
            measure: Whether to count the kept bytes and the peaks.
        """
        self.checked = True
        if self.record_pairs(inputs, kwargs) and measure:
            with self._noted_if_it_fails():
                self._measure(self.pairs, inputs, kwargs)

    def record_pairs(self, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """If something could not be traced, find the pairs anew, by recording the data flow of real inputs.

        It is tried once in each state, train and eval. If it fails, that is noted for the table.

        Returns:
            Whether it has not failed.
        """
        state = self.module.training
        if self.pairs.untraced and state not in self._recorded:
            self._recorded[state] = False
            with self._noted_if_it_fails():
                self._found[state] = find_recorded_pairs(self.module, inputs, kwargs)
                self._switch(self.mode, self._pairs_to_train())
                if self.verification is not None and self.verification.running:  # the pairs are others now
                    self.verify()
                self._recorded[state] = True
        return self._recorded.get(state, True)

    @contextmanager
    def _noted_if_it_fails(self) -> Iterator[None]:
        """Note an error for the table: memory does not suffice, or the shadow of the user's module can't run."""
        try:
            yield
        except Exception as error:
            self.notes.append(f"not counted: {type(error).__name__}: {first_line(error)}")

    def _measure(self, pairs: ConvBNPairs, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(is_fsdp_unit(module) for module in self.module.modules()):
            self.notes.append("not counted: FSDP gathers parameters in its forward")
            return
        uses = {mode: self._count(mode, pairs, inputs, kwargs) for mode in RECOMPUTING_MODES}
        self.kept_bytes = {mode: use.saved_bytes for mode, use in uses.items()}
        peaks = {mode: use.peak_bytes for mode, use in uses.items() if use.peak_bytes is not None}
        self.peak_bytes = peaks if len(peaks) == len(uses) else None
        shape = next((tensor.shape for tensor in tensors_of((inputs, kwargs))), ())
        self.notes.append(f"counted on an input of {' × '.join(map(str, shape))}")

    def _count(self, mode: Mode, pairs: ConvBNPairs, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> MemoryUse:
        """Count for a mode. Tune's count is compared with Eval mode without this package, so without recomputation."""
        recompute = self.recompute if mode in ("tune", self.mode) else "none"
        return measure_memory_abstractly(self.module, inputs, kwargs, mode=mode, pairs=pairs, recompute=recompute)

    def merge_findings(self, processes: int) -> None:
        """Unfold what any of the processes has found wrong. Every process must call this.

        Args:
            processes: How many processes the Trainer has.
        """
        self.blocks = recomputed_blocks(self.module)  # a switch forgets what they have shown
        found = self.verification
        mine = {} if found is None else {**found.unused, **found.wrong}
        wrong = merged_over_processes(mine, processes)
        if wrong:
            self.wrong.update(wrong)
            self._switch(self.mode, self.pairs.unfold(self.wrong))

    @property
    def unverified(self) -> bool:
        """Whether pairs are folded, and not one of them was compared with Eval mode."""
        compared = self.verification is not None and self.verification.compared
        return not compared and len(self.pairs) > 0


def _without_compile(module: nn.Module) -> nn.Module:
    """Return what ``torch.compile`` has wrapped, its one child; any other module as it is."""
    return next(module.children()) if is_wrapped_by_compile(module) else module


def _nothing() -> None:
    pass
