"""What a converted module remembers, and how a module is converted and restored.

A converted module keeps its class. Its *instance* gets other methods: a ``forward``, an ``extra_repr`` that shows the
mode, and a few more. They are bound methods, so a compiler guards them by their function. What they need to know stands
in one `State`. All of it lies in the ``__dict__`` of the module. A restore takes it out again.

Copies and pickles are plain: the instance has a ``__getstate__`` that leaves out what is ours. ``copy.copy``,
``deepcopy`` and ``pickle`` all ask for it. Code that copies the ``__dict__`` by itself gets None in the place of the
state, and with None each method does what the class does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from types import FunctionType, MethodType
from typing import Any, Literal
from weakref import ref

import torch
from torch import nn

Mode = Literal["train", "eval", "tune", "deploy"]
Recompute = Literal["none", "elementwise", "blocks"]

STATE = "_convbn"  # the attribute that holds the state
_PACKAGE = __name__.partition(".")[0]
OVERRIDES = ("forward", "_conv_forward", "__call__")  # what a user may set on an instance to change what it computes


class State:
    """What a converted module remembers. A copy or a pickle of it is None.

    Args:
        mode: The mode of the module.
        recompute: What may be computed again in the backward pass of what is made of its output.
    """

    def __init__(self, mode: Mode, recompute: Recompute = "none") -> None:
        self.mode = mode
        self.recompute = recompute

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle as None."""
        return type(None), ()

    def __str__(self) -> str:
        """What ``print(model)`` shows."""
        return repr(self.mode) if self.recompute == "none" else f"{self.mode!r}, recompute={self.recompute!r}"


class TrainingFlag:
    """The training flag of a BatchNorm as it was asked for. The flag itself is False while the BatchNorm is frozen.

    So a flag that is assigned directly, to all modules of a model, can't be seen at the BatchNorm. It is seen at the
    module that holds the BatchNorm. Lightning assigns flags so: before a validation it reads those of all modules,
    calls ``eval()`` on the model, and afterwards assigns what it has read. For a frozen BatchNorm it has read False.

    Args:
        parent: The module that holds the BatchNorm; None if there is none.
        asked: The flag of the BatchNorm now.
    """

    def __init__(self, parent: nn.Module | None, asked: bool) -> None:
        self._parent = None if parent is None else ref(parent)
        self._asked = asked
        self._with_parent = False
        self._with_parent = self._trains_parent()  # the parent's flag when this was asked
        self._before_eval = asked  # what was asked for before the parent was put into its eval state, too

    def ask(self, mode: bool) -> None:
        """Note a call of ``train`` or ``eval``."""
        trains = self._trains_parent()
        if mode or trains:
            self._before_eval = mode
        self._asked, self._with_parent = mode, trains

    def value(self) -> bool:
        """The flag that was asked for last."""
        trains = self._trains_parent()
        if trains is self._with_parent:
            return self._asked
        return trains and self._before_eval

    def _trains_parent(self) -> bool:
        parent = None if self._parent is None else self._parent()
        return self._with_parent if parent is None else parent.training


class Unfrozen(State):
    """The state of a BatchNorm in Train mode whose model recomputes something. Its model may be in another mode."""

    def __str__(self) -> str:
        """What ``print(model)`` shows."""
        return f"'train', recompute={self.recompute!r}"


class Frozen(State):
    """The state of a BatchNorm that is frozen, and not folded.

    Args:
        mode: The mode of its model.
        recompute: As for `State`.
        reason: Why it is not folded.
        flag: Its training flag.
    """

    def __init__(self, mode: Mode, recompute: Recompute, reason: str, flag: TrainingFlag) -> None:
        super().__init__(mode, recompute)
        self.reason = reason
        self.flag = flag


class Pair(State):
    """The state of a pair, which its convolution and its BatchNorm share. It survives a switch to another mode.

    Args:
        conv: The convolution.
        bn: The BatchNorm.
        conv_row: The row of the convolution in the table of supported layers.
        norm_row: The row of the BatchNorm.
        flag: The training flag of the BatchNorm.

    Attributes:
        forwards: The forwards of both classes. Somebody may change a class, or the module's class.
        fold: What Deploy mode has folded.
        keeps_fold: Whether Deploy mode may keep a fold from one forward pass to the next.
        owns_weight: Whether the weight is the module's own between two calls, and not sharded or computed.
        check: Compares the pair with Eval mode while it runs, in the first training step of a Trainer; else None.
        watched: Whether the pair was watched, and ran plainly, in the last forward pass.
        guard: Gives a tensor an autograd node that raises an error (`marks.py`).
    """

    def __init__(self, conv: nn.Module, bn: nn.Module, conv_row: Any, norm_row: Any, flag: TrainingFlag) -> None:
        super().__init__("eval")
        self.conv, self.bn = conv, bn
        self.dims: int = conv_row.dims
        self.geometry = conv_row.geometry
        self.norm_row = norm_row
        self.forwards = type(conv).forward, type(bn).forward
        self.flag = flag
        self.fold: Any = None
        self.keeps_fold = True
        self.owns_weight = type(conv.weight) is nn.Parameter
        self.check: Any = None
        self.watched = False
        self.guard: Callable[[torch.Tensor], torch.Tensor] | None = None


def state_of(module: nn.Module) -> State | None:
    """What a converted module remembers; None for a plain one."""
    state: State | None = module.__dict__.get(STATE)
    return state


def pair_of(module: nn.Module) -> Pair | None:
    """The pair that a convolution or a BatchNorm belongs to; None if it is in none."""
    state = module.__dict__.get(STATE)
    return state if isinstance(state, Pair) else None


def attach(module: nn.Module, state: State, methods: Mapping[str, Callable[..., Any]]) -> None:
    """Convert a module: give it a state and the methods of its mode, and take away those of the mode before.

    Args:
        module: A plain or a converted module.
        state: What it remembers from now on. The two layers of a pair share one.
        methods: Name of a method -> a function whose first argument is the module. What the user has set on the
            instance under one of these names stays.
    """
    detach(module)
    attributes = vars(module)
    for name, method in {**methods, **_OF_EVERY_MODULE}.items():
        attributes.setdefault(name, MethodType(method, module))
    attributes[STATE] = state


def detach(module: nn.Module) -> None:
    """Undo `attach`. Does nothing to a plain module, nor to what somebody else has set on the instance since."""
    attributes = vars(module)
    if STATE in attributes:  # None in a copy of the ``__dict__``, which has our methods, too
        del attributes[STATE]
        for name in [name for name, value in attributes.items() if is_ours(value)]:
            del attributes[name]


def is_ours(method: object) -> bool:
    """Whether an attribute of an instance is a method that `attach` has put there."""
    function = getattr(method, "__func__", None)
    return isinstance(function, FunctionType) and function.__module__.partition(".")[0] == _PACKAGE


def own_override(module: nn.Module) -> str | None:
    """The name of what a user has set on an instance to change what it computes (`OVERRIDES`); None if there is none.

    The method of the class itself, bound to the instance, is none: a pickle may leave it there.
    """
    for name in OVERRIDES:
        method = vars(module).get(name)
        of_class = getattr(type(module), name, None)
        if method is not None and not is_ours(method) and getattr(method, "__func__", None) is not of_class:
            return name
    return None


# ------------------------------------------------------------------ the methods that every converted module gets


def _getstate(self: nn.Module) -> dict[str, Any]:
    """Return the attributes for a copy or a pickle: those of a plain module."""
    state = type(self).__getstate__(self)
    return {name: value for name, value in state.items() if name != STATE and not is_ours(value)}


def _extra_repr(self: nn.Module) -> str:
    """Show the mode in ``print(model)``."""
    state, text = state_of(self), type(self).extra_repr(self)
    if state is None:
        return text
    return f"{text}{', ' if text else ''}convbn={state}"


def _replicate_for_data_parallel(self: nn.Module) -> nn.Module:
    """Refuse: a replica would share the state, and so compute with the layers of the original.

    Raises:
        RuntimeError: While the module is converted.
    """
    if state_of(self) is None:
        return type(self)._replicate_for_data_parallel(self)  # type: ignore[operator, no-any-return]
    raise RuntimeError(
        f"DataParallel: this {type(self).__name__} is converted by set_mode or ConvBNModeCallback, and its replicas "
        "would compute with the layers of the original. Use DistributedDataParallel, or call "
        'set_mode(model, "train") without recompute first'
    )


_OF_EVERY_MODULE = {
    "__getstate__": _getstate,
    "extra_repr": _extra_repr,
    "_replicate_for_data_parallel": _replicate_for_data_parallel,
}


# ---------------------------------------------------------------------------------------------------------- hooks


class UncopiedHook:
    """A hook of ours on a module of the user. A copy or a pickle of the module does not have it.

    In the copy there is a function in its place that does nothing.
    """

    def __init__(self, hook: Callable[..., Any]) -> None:
        self._hook = hook

    def __call__(self, *args: Any) -> Any:
        """Call the hook."""
        return self._hook(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy as the end of a ``nullcontext``, which takes any three arguments."""
        return getattr, (nullcontext(), "__exit__")
