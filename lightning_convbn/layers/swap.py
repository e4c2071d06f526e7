"""Swapping the class of a module, and restoring it exactly.

A swap assigns ``module.__class__`` and touches nothing else: parameters, buffers, ``state_dict`` keys and hooks stay.
Each class stands at module level, so that a converted model can be pickled and copied. A converted module carries a
`Swap`, which says how it was found. A folded convolution also carries its BatchNorm, in a plain tuple: a deepcopy
follows it, and it does not become a submodule.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from lightning_convbn.compat import forward_pre_hooks

Mode = Literal["train", "eval", "tune", "deploy"]

LINKS = ("_bn", "_rows", "_owns_weight", "_fold", "_check")  # attributes of a folded pair beside its Swap


class Swap(NamedTuple):
    """How a converted module was found, and what it is now."""

    plain: type[nn.Module]
    training: bool
    mode: Mode
    conv: tuple[nn.Module] | None = None  # of a BatchNorm: the convolution that it is paired with
    flattened: bool = False  # of a pair: whether BatchNorm gets the flattened rows of a linear layer's output
    reason: str = ""  # of a BatchNorm without a pair: why


def swap_of(module: nn.Module) -> Swap | None:
    """What a converted module remembers; None for a plain one."""
    swap: Swap | None = module.__dict__.get("_swap")
    return swap


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module as it was found, converted or not."""
    swap = swap_of(module)
    return type(module) if swap is None else swap.plain


def run_plain(module: nn.Module, *args: Any) -> Any:
    """Run the forward of a module's plain class.

    A module may be plain while a forward of ours runs on it: if somebody has kept that method (``module.forward``) to
    wrap it, and the module was restored since.
    """
    return plain_class(module).forward(module, *args)


def class_name(module: nn.Module) -> str:
    """The name of the class of a module as it was found."""
    return plain_class(module).__name__


def swap_class(
    module: nn.Module,
    cls: type[nn.Module] | None,
    mode: Mode,
    *,
    bn: nn.Module | None = None,
    conv: nn.Module | None = None,
    flattened: bool = False,
    reason: str = "",
) -> None:
    """Give a module the class ``cls`` and remember how it was found.

    With ``cls`` None, for a BatchNorm that is not in the table, the class stays. A pre-hook then holds its ``training``
    flag at False whenever it is called.

    Args:
        module: A plain or a converted module.
        cls: Its new class, or None.
        mode: The mode it is in from now on.
        bn: Of a convolution to be folded, its BatchNorm.
        conv: Of a BatchNorm in a pair, its convolution.
        flattened: Of both, whether the BatchNorm gets the flattened rows of a linear layer's output.
        reason: Of a BatchNorm without a pair, why.
    """
    found = swap_of(module) or Swap(type(module), module.training, mode)
    _drop_links(module)
    if cls is not None and "forward" not in vars(module):
        _assign_class(module, cls)
    elif stay_frozen not in forward_pre_hooks(module).values():
        module.register_forward_pre_hook(stay_frozen)
    if bn is not None:
        module.__dict__["_bn"] = (bn,)
        module.__dict__["_rows"] = flattened
        module.__dict__["_owns_weight"] = type(module.weight) is nn.Parameter
    module.__dict__["_swap"] = found._replace(
        mode=mode, conv=None if conv is None else (conv,), flattened=flattened, reason=reason
    )


def restore_class(module: nn.Module) -> None:
    """Undo `swap_class`: the class and the training flag as they were found. Does nothing to a plain module."""
    swap = module.__dict__.pop("_swap", None)
    if swap is None:
        return
    _drop_links(module)
    hooks = forward_pre_hooks(module)
    for key in [key for key, hook in hooks.items() if hook is stay_frozen]:
        del hooks[key]
    _assign_class(module, swap.plain)
    module.training = swap.training


def stay_frozen(module: nn.Module, args: Any) -> None:
    """Forward pre-hook of a BatchNorm that is not in the table."""
    module.training = False


def _drop_links(module: nn.Module) -> None:
    for name in LINKS:
        module.__dict__.pop(name, None)


def _assign_class(module: nn.Module, cls: type[nn.Module]) -> None:
    if is_parametrized(module):
        # Parametrized after the swap: torch has given this one module a subclass of ours, which holds its properties.
        type(module).__bases__ = (cls,)
    elif type(module) is not cls:
        module.__class__ = cls
