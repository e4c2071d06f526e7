"""Blocks whose forward runs again in the backward pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from lightning_convbn.blocks import reasons
from lightning_convbn.blocks.look import Look, look_at
from lightning_convbn.compat import (
    changes_input,
    hooks_of,
    in_graph,
    inside_transform,
    other_saved_tensor_hooks,
    tree_flatten,
    tree_unflatten,
    versions_of,
    with_hooks,
)
from lightning_convbn.layers.marks import Mark
from lightning_convbn.layers.norms import buffers_unwritten, trains_statistics
from lightning_convbn.layers.state import Mode, Recompute, State, state_of
from lightning_convbn.ops.convolution import is_distributed
from lightning_convbn.ops.recipes import itself

_CONSTANTS = (int, float, complex, str, bytes, torch.dtype, torch.device, type(None))


class Seen(NamedTuple):
    """All that a look at a block depends on: its modules, and what is given to it beside tensors."""

    modules: tuple[tuple[type[nn.Module], bool, bool], ...]  # class, training flag, and whether it has pre-hooks
    structure: Any
    constants: tuple[Any, ...]


class Block(State):
    """The state of a block whose forward runs again in the backward pass.

    Attributes:
        seen: What the block was when it was last looked at.
        look: What that look has shown.
    """

    def __init__(self, mode: Mode, recompute: Recompute) -> None:
        super().__init__(mode, recompute)
        self.seen: Seen | None = None
        self.look = Look()


class FirstRun(NamedTuple):
    """What a block was in its first run. The second run must see the same."""

    modules: tuple[nn.Module, ...]
    modes: tuple[Any, ...]  # of each module: what `set_mode` has made of it
    flags: tuple[bool, ...]  # of each module: its training flag
    hooks: Any  # of all modules
    tensors: tuple[Tensor, ...]  # parameters and buffers
    versions: tuple[int, ...] | None

    @classmethod
    def of(cls, block: nn.Module) -> FirstRun:
        """Describe a block now.

        The statistics of a BatchNorm in Train mode don't count: no run depends on them. Nor does any buffer with DDP,
        which writes buffers into themselves before each forward pass.
        """
        modules = tuple(block.modules())
        flags = tuple(module.training for module in modules)
        read = () if is_distributed() else (module for module in modules if not trains_statistics(module))
        tensors = (*block.parameters(), *(buffer for module in read for buffer in module.buffers(recurse=False)))
        return cls(modules, _modes_of(modules), flags, hooks_of(modules), tensors, versions_of(tensors))

    @contextmanager
    def again(self, block: nn.Module) -> Iterator[None]:
        """Put back, for a second run, what does not change what the block is: training flags, and hooks.

        BatchNorms in Train mode write no statistics meanwhile, also if somebody looks at what a node has saved, outside
        of a backward pass.

        Raises:
            RuntimeError: If a module was switched or replaced, or if a parameter or a buffer was written or replaced.
        """
        flags = [module.training for module in self.modules]
        with with_hooks(self.hooks):
            for module, flag in zip(self.modules, self.flags, strict=True):
                module.training = flag
            try:
                self._check_same(block, FirstRun.of(block))
                with buffers_unwritten(filter(trains_statistics, self.modules)):
                    yield
            finally:
                for module, flag in zip(self.modules, flags, strict=True):
                    module.training = flag

    def _check_same(self, block: nn.Module, now: FirstRun) -> None:
        same = len(now.tensors) == len(self.tensors) and all(map(is_, now.tensors, self.tensors))
        if now.modules != self.modules or now.modes != self.modes:
            changed = "it was switched to another mode, or has another module. Call backward() before that"
        elif not same or now.versions != self.versions:
            changed = "one of its parameters or buffers was written or replaced. Call backward() before that"
        else:
            return
        raise RuntimeError(
            f"recompute='blocks': a {type(block).__name__} is to run again in the backward pass, but since its forward "
            f"pass {changed}, or set_mode(model, mode, recompute='none')"
        )


def block_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run the forward of a block so that it runs again in the backward pass; note only what is given to it.

    What lies inside of the block is not kept then; what is given to it is. Its own hooks run once, those of the modules
    in it once more for each run. The second run starts with the random numbers of the first. It must see the same
    weights and buffers, so a write in between is an error, as it is for autograd. In these cases it runs plainly:

    - if it can't run twice (`look.py`),
    - while none of its weights wants a gradient: then it keeps little,
    - without gradients, in graphs of a compiler or of a trace, and in transforms of ``torch.func``,
    - under other saved-tensor hooks, such as those of a checkpoint around it: what they save is theirs to decide; and
      where no such hooks are allowed,
    - while a CUDA graph captures a block that draws: the state of the random numbers can't be read then.
    """
    state, forward = state_of(self), type(self).forward
    if not isinstance(state, Block) or in_graph() or not torch.is_grad_enabled():
        return forward(self, *args, **kwargs)
    if inside_transform() or not _may_save_otherwise() or not _trains_weights(self):
        return forward(self, *args, **kwargs)
    leaves, structure = tree_flatten((args, kwargs))
    seen = Seen(_modules_of(self), structure, tuple(leaf for leaf in leaves if not isinstance(leaf, Tensor)))
    look, captured = _current_look(self, state, seen, args, kwargs), _is_captured()
    if look.reason is not None or (captured and look.draws) or any(isinstance(leaf, Mark) for leaf in leaves):
        return forward(self, *args, **kwargs)
    waiting = [(args, kwargs)]  # for the first run, with the very containers: it may change them
    first = FirstRun.of(self)

    def run(*leaves: Any) -> Any:
        if waiting:
            args, kwargs = waiting.pop()
            return forward(self, *args, **kwargs)
        args, kwargs = tree_unflatten(leaves, structure)
        with first.again(self):
            return forward(self, *args, **kwargs)

    del args, kwargs  # the graph holds this frame's variables, and must not hold the containers
    return checkpoint(run, *leaves, use_reentrant=False, preserve_rng_state=not captured)


def _current_look(block: nn.Module, state: Block, seen: Seen, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Look:
    """Return what is known about a block, or look at it now."""
    foreign = next((constant for constant in seen.constants if not isinstance(constant, _CONSTANTS)), None)
    if foreign is not None:
        state.seen, state.look = None, Look(reason=reasons.TAKES.format(cls=type(foreign).__name__))
    elif state.seen != seen:
        state.seen, state.look = seen, look_at(block, args, kwargs)
    return state.look


def _modules_of(block: nn.Module) -> tuple[tuple[type[nn.Module], bool, bool], ...]:
    inside = ((module, module is not block and changes_input(module)) for module in block.modules())
    return tuple((type(module), module.training, hooked) for module, hooked in inside)


def _modes_of(modules: Iterable[nn.Module]) -> tuple[Any, ...]:
    states = map(state_of, modules)
    return tuple(None if state is None else (id(state), state.mode, state.recompute) for state in states)


def _may_save_otherwise() -> bool:
    """Whether a checkpoint may decide here what is saved."""
    if other_saved_tensor_hooks():
        return False
    try:
        with saved_tensors_hooks(itself, itself):
            return True
    except RuntimeError:  # within torch.autograd.graph.disable_saved_tensors_hooks
        return False


def _is_captured() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _trains_weights(block: nn.Module) -> bool:
    """Whether a parameter that is no bias wants a gradient. The gradients of biases need no activations."""
    named = block.named_parameters()
    return any(parameter.requires_grad and not name.endswith("bias") for name, parameter in named)
