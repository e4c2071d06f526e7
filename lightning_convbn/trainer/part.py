"""One part of a model that the callback converts, and what is known about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.utils._pytree import tree_leaves

from lightning_convbn.layers.layers import Mode
from lightning_convbn.memory import as_mib, measure_memory_abstractly
from lightning_convbn.modes import RECOMPUTING_MODES, get_mode, set_mode
from lightning_convbn.pairs.find import (
    find_conv_bn_pairs,
    find_hooked,
    find_recorded_pairs,
    find_untrained,
)
from lightning_convbn.pairs.fsdp import is_fsdp_unit
from lightning_convbn.pairs.pair import ConvBNPairs
from lightning_convbn.pairs.reasons import UNTRAINED
from lightning_convbn.trainer.processes import merged_over_processes
from lightning_convbn.trainer.verification import Verification, verify_pairs


class Target:
    """A module that is switched between modes, with its pairs proven anew for its train and its eval state.

    Args:
        path: Qualified name of the module, for messages; empty for the whole.
        module: The module; of a compiled one, what is compiled.
        untrained: What an earlier part of this run has decided about untrained BatchNorms; None if it has not.
        recompute_activations: Whether training in Eval or Tune mode recomputes activations; as for `set_mode`.

    Attributes:
        decided: Whether it is decided which BatchNorms are untrained.
        untrained: BatchNorms that stay in Train mode because nothing has trained them.
        wrong: BatchNorms whose pairs `inspect` has found to differ from Eval mode, and why.
        verification: What `inspect` found, or None.
        kept: Bytes kept for the backward pass in Eval and in Tune mode, or None if they were not counted.
        inspected: Whether `inspect` has run.
    """

    def __init__(
        self,
        path: str,
        module: nn.Module,
        untrained: list[str] | None = None,
        *,
        recompute_activations: bool = False,
    ) -> None:
        self.path = path
        self._called = module
        self._recompute_activations = recompute_activations
        self.module = module._orig_mod if isinstance(module, OptimizedModule) else module
        self.decided = untrained is not None
        self.untrained = untrained or []
        self.wrong: dict[str, str] = {}
        self.verification: Verification | None = None
        self.kept: dict[Mode, int] | None = None
        self.inspected = False
        self._found: dict[bool, ConvBNPairs] = {}  # by the state, train or eval, that they were found in
        self._in_force = ConvBNPairs([])
        self._training_state = self.module.training
        self._notes: list[str] = []
        self._remove_hook: Callable[[], None] = _nothing

    def full_name(self, name: str) -> str:
        """Return a name within the target as seen from the whole."""
        return f"{self.path}.{name}" if self.path else name

    def train_in(self, mode: Mode, *, freeze_untrained: bool) -> None:
        """Switch to the mode that training runs in; what is untrained is decided at the first freeze."""
        if mode != "train" and not self.decided:
            self.decided = True
            self.untrained = [] if freeze_untrained else find_untrained(self.module)
        self._training_state = self.module.training
        self.back_to_training(mode)

    def back_to_training(self, mode: Mode) -> None:
        """Switch to the mode that training runs in, before the module is back in the state that it trained in."""
        self._switch(mode, self._pairs_to_train())

    def state_has_changed(self) -> bool:
        """Whether the module is in another state, train or eval, than the pairs in force were proven for."""
        return self.module.training != self._training_state

    def evaluate_in(self, mode: Mode) -> None:
        """Switch to the mode that evaluation runs in, where every BatchNorm uses its running statistics."""
        self._switch(mode, self._pairs_in(self.module.training))

    def restore(self) -> None:
        """Give back the plain module."""
        self.unwatch()
        set_mode(self.module, "train", pairs=self._in_force)

    def _pairs_in(self, state: bool) -> ConvBNPairs:
        """Return the pairs that are proven for a state, train or eval, without those found wrong."""
        if state not in self._found:
            self._found[state] = find_conv_bn_pairs(self.module)
        return self._found[state].unfold(self.wrong)

    def _pairs_to_train(self) -> ConvBNPairs:
        return self._pairs_in(self._training_state).unfreeze(dict.fromkeys(self.untrained, UNTRAINED))

    def _switch(self, mode: Mode, pairs: ConvBNPairs) -> None:
        recomputes = self._recompute_activations and mode in RECOMPUTING_MODES
        set_mode(self.module, mode, pairs=pairs, recompute_activations=recomputes)
        self._in_force = pairs

    def watch(self, inspect: Callable[[tuple[Any, ...], dict[str, Any]], None]) -> None:
        """Call ``inspect`` with the arguments of the module's next forward, just before it."""

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if runs_its_forward(module):
                self.unwatch()
                inspect(args, kwargs)

        self.unwatch()
        self._remove_hook = self._called.register_forward_pre_hook(before, with_kwargs=True).remove

    def unwatch(self) -> None:
        """Take the watch back."""
        self._remove_hook()
        self._remove_hook = _nothing

    def inspect(self, inputs: tuple[Any, ...], kwargs: dict[str, Any], *, verify: bool, measure: bool) -> None:
        """Verify the pairs in force on real inputs and count what Eval and Tune mode keep for the backward pass.

        What could not be traced is proven first, by recording the data flow of these inputs. Pairs that differ from
        Eval mode are unfolded. Running out of memory here is noted and not raised.
        """
        self.inspected = True
        try:
            if self._in_force.untraced:
                self._found[self.module.training] = find_recorded_pairs(self.module, inputs, kwargs)
                self._switch(get_mode(self.module), self._pairs_to_train())
            pairs = self._in_force
            if verify and len(pairs):
                recomputes = self._recompute_activations
                self.verification = verify_pairs(self.module, pairs, inputs, kwargs, recompute_activations=recomputes)
                if self.verification is None:
                    self._notes.append("not verified: its output holds no tensor to compare")
                else:
                    pairs = self._unfold(self.verification.wrong)
            if measure and any(is_fsdp_unit(module) for module in self.module.modules()):
                self._notes.append("not counted: FSDP gathers parameters in its forward")
            elif measure:
                self.kept = {mode: self._kept_in(mode, pairs, inputs, kwargs) for mode in RECOMPUTING_MODES}
                shape = next((leaf.shape for leaf in tree_leaves((inputs, kwargs)) if isinstance(leaf, Tensor)), ())
                self._notes.append(f"counted on an input of {' × '.join(map(str, shape))}")
        except torch.OutOfMemoryError as error:
            self._notes.append(f"not inspected to the end: {str(error).splitlines()[0]}")

    def _kept_in(self, mode: Mode, pairs: ConvBNPairs, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """Count for a mode; Eval mode, where training does not run in it, as it would be without this package."""
        recomputes = self._recompute_activations and mode in ("tune", get_mode(self.module))
        use = measure_memory_abstractly(
            self.module, inputs, kwargs, mode=mode, pairs=pairs, recompute_activations=recomputes
        )
        return use.saved_bytes

    def conclude(self, processes: int) -> None:
        """Unfold what any of the processes has found wrong. Every one of them has to call this."""
        self._unfold(merged_over_processes(self.wrong, processes))

    def _unfold(self, wrong: Mapping[str, str]) -> ConvBNPairs:
        if wrong.keys() - self.wrong.keys():
            self.wrong.update(wrong)
            self._switch(get_mode(self.module), self._in_force.unfold(self.wrong))
        return self._in_force

    def hooked(self) -> list[str]:
        """Name, as seen from the whole, the modules whose hooks see something else because they are folded."""
        return [self.full_name(name) for name in find_hooked(self.module, self._in_force)]

    def describe(self, mode: Mode, eval_mode: Mode) -> list[str]:
        """Return the lines of the callback's table."""
        name = f"`{self.path}`" if self.path else "the whole module"
        lines = [f"ConvBN: {name} trains in {mode.title()} mode and is evaluated in {eval_mode.title()} mode"]
        body = self._in_force.summary()
        if self.kept is not None:
            before, after = self.kept["eval"], self.kept["tune"]
            saved = f"{100 * (before - after) / before:.1f} % saved" if before else "no parameter wants a gradient"
            tune = "Tune" if mode == "tune" else "Tune would keep"
            recomputing = " (activations recomputed)" if self._recompute_activations else ""
            body.append(f"kept for backward: Eval {as_mib(before)}, {tune} {as_mib(after)}{recomputing}, {saved}")
        if self.verification is not None:
            word = "differs from" if self.verification.wrong else "equals"
            body.append(f"verified: Tune {word} Eval, relative deviation {self.verification.deviation:.1e}")
        elif not self.inspected:
            body.append("neither verified nor counted: the first batch did not pass through its forward")
        return [*lines, *(f"  {line}" for line in (*body, *self._notes))]


def runs_its_forward(module: nn.Module) -> bool:
    """Whether a call of a module runs its forward: DDP and its like run a step in a LightningModule's place."""
    compiled: dict[str, Any] = getattr(module, "_compiler_ctx", None) or {}
    forward = compiled.get("original_forward", module.forward)
    return not hasattr(module, "training_step") or getattr(forward, "__func__", None) is type(module).forward


def _nothing() -> None:
    pass
