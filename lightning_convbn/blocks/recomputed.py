"""The classes of blocks whose forward runs again in the backward pass."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_convbn.blocks import reasons
from lightning_convbn.blocks.look import Look, look_at
from lightning_convbn.compat import inside_transform, other_saved_tensor_hooks, tree_flatten, tree_unflatten
from lightning_convbn.layers.marks import Marked, seen_through
from lightning_convbn.layers.swap import Converted, class_name, run_plain, swap_of

_CONSTANTS = (int, float, complex, str, bytes, torch.dtype, torch.device, type(None))


class State(NamedTuple):
    """All that a look at a block depends on: its modules, and what is given to it beside tensors."""

    modules: tuple[tuple[type[nn.Module], bool], ...]  # class and training flag
    structure: Any
    constants: tuple[Any, ...]


class RecomputedBlock(Converted):
    """Base of the classes of a block whose forward runs again in the backward pass.

    What lies inside of the block is not kept then; what is given to it is. Its own hooks run once, those of the modules
    in it once more for each run. In these cases it runs plainly:

    - if it can't run twice (`look.py`),
    - while none of its weights wants a gradient: then it keeps little,
    - without gradients, in graphs of a compiler or of a trace, and in transforms of ``torch.func``,
    - under other saved-tensor hooks, such as those of a checkpoint around it: what they save is theirs to decide.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block; note only what is given to it."""
        if seen_through() or not torch.is_grad_enabled() or inside_transform() or other_saved_tensor_hooks():
            return run_plain(self, *args, **kwargs)
        if swap_of(self) is None or not _trains_weights(self):
            return run_plain(self, *args, **kwargs)
        leaves, structure = tree_flatten((args, kwargs))
        state = State(_modules_of(self), structure, tuple(leaf for leaf in leaves if not isinstance(leaf, Tensor)))
        look = _current_look(self, state, args, kwargs)
        if look.reason is not None or any(isinstance(leaf, Marked) for leaf in leaves):
            return run_plain(self, *args, **kwargs)
        first_run = [(args, kwargs)]  # with the very containers that are given: a forward may change them

        def run(*leaves: Any) -> Any:
            if not first_run:
                _check_modules(self, state)
            args, kwargs = first_run.pop() if first_run else tree_unflatten(leaves, structure)
            return run_plain(self, *args, **kwargs)

        del args, kwargs
        return checkpoint(run, *leaves, use_reentrant=False, preserve_rng_state=look.draws)


@cache
def recomputed_class(plain: type[Any]) -> type[RecomputedBlock]:
    """Return the class that a block of a plain class is swapped to."""
    name = f"Recomputed{plain.__name__}"
    return type(name, (RecomputedBlock, plain), {"__module__": __name__, "__doc__": RecomputedBlock.__doc__})


def reason_of(block: nn.Module) -> str | None:
    """Return the reason why a block ran plainly when it was last looked at; None if it ran again."""
    _, look = vars(block).get("_look", (None, Look()))
    reason: str | None = look.reason
    return reason


def _current_look(block: nn.Module, state: State, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Look:
    """Return what is known about a block in a state, or look at it now."""
    foreign = next((constant for constant in state.constants if not isinstance(constant, _CONSTANTS)), None)
    known, look = vars(block).get("_look", (None, Look()))
    if foreign is not None:
        known, look = None, Look(reason=reasons.TAKES.format(cls=type(foreign).__name__))
    elif known != state:
        known, look = state, look_at(block, args, kwargs)
    vars(block)["_look"] = known, look
    return look  # type: ignore[no-any-return]


def _modules_of(block: nn.Module) -> tuple[tuple[type[nn.Module], bool], ...]:
    return tuple((type(module), module.training) for module in block.modules())


def _check_modules(block: nn.Module, state: State) -> None:
    """Check that a block is what it was in the forward pass.

    Raises:
        RuntimeError: If a module was switched, replaced, or put in another train or eval state.
    """
    if _modules_of(block) != state.modules:
        raise RuntimeError(
            f"recompute='blocks': a {class_name(block)} is to run again in the backward pass, but since its forward "
            "pass it was switched to another mode, or to another train or eval state. Call backward() before the "
            "switch, or set_mode(model, mode, recompute='none')"
        )


def _trains_weights(block: nn.Module) -> bool:
    """Whether a parameter that is no bias wants a gradient. The gradients of biases need no activations."""
    named = block.named_parameters()
    return any(parameter.requires_grad and not name.endswith("bias") for name, parameter in named)
