"""Swapping the class of a module, and restoring it exactly.

A swap assigns ``module.__class__``. It touches nothing else: parameters, buffers, training flags, ``state_dict`` keys
and hooks stay. A converted module carries a `Swap`, which says how it was found. A folded convolution also carries its
BatchNorm, in a plain tuple, so that it does not become a submodule.

A swap belongs to one module alone. A copy or a pickle of a converted module is of its plain class.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any, Literal, NamedTuple

from torch import nn
from torch.nn.utils import parametrize

Mode = Literal["train", "eval", "tune", "deploy"]
Recompute = Literal["none", "elementwise", "blocks"]

LINKS = ("_bn", "_reshaped", "_owns_weight", "_fold", "_check", "_recompute")  # of ours beside the Swap, on a layer


class UncopiedHook:
    """A hook of ours that copies and pickles of its module don't have. In them it is a method that does nothing."""

    def __init__(self, hook: Callable[..., Any]) -> None:
        self._hook = hook

    def __call__(self, *args: Any) -> Any:
        """Call the hook."""
        return self._hook(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy as the end of a ``nullcontext``, which takes any three arguments."""
        return getattr, (nullcontext(), "__exit__")


class Swap(NamedTuple):
    """How a converted module was found, and what it is now."""

    plain: type[nn.Module]
    swapped: type[Any]  # what `swap_class` has put in the place of `plain`
    mode: Mode
    conv: tuple[nn.Module] | None = None  # of a BatchNorm: the convolution that it is paired with
    reshaped: int = 0  # of a pair: the dimensions of the BatchNorm's input, if it is a view of a linear layer's output
    reason: str = ""  # of a BatchNorm without a pair: why


class Converted(nn.Module):
    """Base of the classes that a module is swapped to.

    ``copy`` and ``pickle`` make a module of the plain class. A BatchNorm gets ``training=False`` there, so that the
    copy computes what the converted model computes.
    """

    _uses_running_statistics = False  # whether the class uses the running statistics of a BatchNorm
    _links: tuple[str, ...] = LINKS  # the attributes that are ours; all others are the user's

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        """Copy to the plain class. ``memo`` knows the copy before the attributes are copied: they may lead back."""
        twin = _plain_twin(self)
        if hasattr(twin, "__deepcopy__"):  # a class that was parametrized, or one with a method of its own
            copied: nn.Module = copy.deepcopy(twin, memo)
            return copied
        make, arguments, state = tuple(twin.__reduce_ex__(4))[:3]
        copied = memo[id(self)] = make(*copy.deepcopy(arguments, memo))
        copied.__setstate__(copy.deepcopy(state, memo))
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as the plain class. From protocol 2 on, pickle refuses to write another class than the object's."""
        return _plain_twin(self).__reduce_ex__(0)


def swap_of(module: nn.Module) -> Swap | None:
    """What a converted module remembers; None for a plain one, and for one whose class somebody else has replaced."""
    swap: Swap | None = module.__dict__.get("_swap")
    return swap if swap is not None and isinstance(module, swap.swapped) else None


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module as it was found, converted or not."""
    swap = swap_of(module)
    return type(module) if swap is None else swap.plain


def run_plain(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run the forward of a module's plain class.

    A module may be plain while a forward of ours runs on it: if somebody has kept that method (``module.forward``) to
    wrap it, and the module was restored since.
    """
    return plain_class(module).forward(module, *args, **kwargs)


def class_name(module: nn.Module) -> str:
    """The name of the class of a module as it was found."""
    return plain_class(module).__name__


def swap_class(
    module: nn.Module,
    cls: type[nn.Module],
    mode: Mode,
    *,
    bn: nn.Module | None = None,
    conv: nn.Module | None = None,
    reshaped: int = 0,
    recompute: Recompute = "none",
    reason: str = "",
) -> None:
    """Give a module the class ``cls`` and remember how it was found.

    Args:
        module: A plain or a converted module.
        cls: Its new class, derived from `Converted`.
        mode: The mode it is in from now on.
        bn: Of a convolution to be folded, its BatchNorm.
        conv: Of a BatchNorm in a pair, its convolution.
        reshaped: Of both, the dimensions of the BatchNorm's input, if it is a view of a linear layer's output; else 0.
        recompute: Of a BatchNorm, what may be computed again in the backward pass of what is made of its output.
        reason: Of a BatchNorm without a pair, why.
    """
    found = swap_of(module) or Swap(type(module), type(module), mode)
    _drop_links(module, found.swapped)
    _assign_class(module, found.swapped, cls)
    if bn is not None:
        module.__dict__["_bn"] = (bn,)
        module.__dict__["_reshaped"] = bool(reshaped)
        module.__dict__["_owns_weight"] = type(module.weight) is nn.Parameter
    if recompute != "none":
        module.__dict__["_recompute"] = recompute
    partner = None if conv is None else (conv,)
    module.__dict__["_swap"] = Swap(found.plain, cls, mode, partner, reshaped, reason)


def restore_class(module: nn.Module) -> None:
    """Undo `swap_class`: the class as it was found. Does nothing to a plain module."""
    swap = module.__dict__.pop("_swap", None)
    if swap is not None:
        _drop_links(module, swap.swapped)
        _assign_class(module, swap.swapped, swap.plain)


def partners_of(module: nn.Module) -> tuple[nn.Module, ...]:
    """Return what a module is paired with: the BatchNorm of a convolution, or the convolution of a BatchNorm."""
    swap = swap_of(module)
    is_layer = swap is not None and "_bn" in swap.swapped._links  # the attribute of a block is the user's
    bn: tuple[nn.Module, ...] = module.__dict__.get("_bn", ()) if is_layer else ()
    return (*bn, *((swap and swap.conv) or ()))


def _drop_links(module: nn.Module, swapped: type[nn.Module]) -> None:
    for name in swapped._links if issubclass(swapped, Converted) else ():
        module.__dict__.pop(name, None)


def _plain_twin(module: Converted) -> nn.Module:
    """Return a module of the plain class that has the attributes of a converted one, without those of the swap."""
    swap: Swap = module.__dict__["_swap"]
    twin: nn.Module = object.__new__(_rebased(type(module), swap.swapped, swap.plain))
    twin.__dict__.update({name: value for name, value in vars(module).items() if name not in ("_swap", *module._links)})
    if type(module)._uses_running_statistics:
        twin.__dict__["training"] = False
    return twin


def _assign_class(module: nn.Module, old: type[nn.Module], new: type[nn.Module]) -> None:
    cls = _rebased(type(module), old, new)
    if cls is not type(module):
        module.__class__ = cls


def _rebased(cls: type[nn.Module], old: type[nn.Module], new: type[nn.Module]) -> type[nn.Module]:
    """Return ``cls`` with ``new`` in the place of ``old``.

    If somebody has derived a class for the module after the swap, as ``register_parametrization`` and ``fully_shard``
    do, the result is a class of its own, derived in the same way. Other modules, copies of this one, may have ``cls``,
    so ``cls`` is never changed.
    """
    if cls is old:
        return new
    if not issubclass(cls, old):
        return cls
    attributes = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    bases = tuple(_rebased(base, old, new) for base in cls.__bases__)
    if cls.__name__.startswith("Parametrized") and not hasattr(new, "__deepcopy__"):
        attributes.setdefault("__deepcopy__", _deepcopy_of_parametrized())
    derived: type[nn.Module] = type(cls)(cls.__name__.replace(old.__name__, new.__name__), bases, attributes)  # type: ignore[misc]
    return derived


@cache
def _deepcopy_of_parametrized() -> Callable[..., Any]:
    """Return the ``__deepcopy__`` that PyTorch gives a parametrized class, if the class has none. Ours have one."""
    norm = parametrize.register_parametrization(nn.BatchNorm1d(1), "weight", nn.Identity())
    method: Callable[..., Any] = vars(type(norm))["__deepcopy__"]
    return method
