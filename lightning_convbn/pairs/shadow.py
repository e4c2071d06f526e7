"""A shadow of a model: what looks at the model runs the shadow, and the model notices nothing.

To find pairs and to count bytes we run the user's forward on tensors of our own. It may append to a list, call hooks,
write into its inputs, or step a counter. So it is not the model that runs, but its shadow: modules of the same classes
that share the parameters, and objects that can't be copied. Attributes, buffers and containers are their own. They have
no hooks but those that are methods of the model itself.
"""

from __future__ import annotations

import copy
import random
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_convbn.compat import COMPILED_CALL, HOOKS, outside_fake_mode
from lightning_convbn.layers.state import State, detach
from lightning_convbn.pairs.side_effects import is_trainer
from lightning_convbn.text import first_line

_SHARED = (type, ModuleType, FunctionType, BuiltinFunctionType, torch.dtype, torch.device, torch.Size, torch.fx.Proxy)
_OF_PASSES = ("fold", "check", "seen", "look")  # what a `State` remembers of passes
_CONTAINERS = (list, tuple, set, frozenset, dict, deque)


class LacksHooksError(ValueError):
    """The forward of a shadow has failed, and the shadow lacks hooks that the model has."""


class Shadow:
    """A shadow of a model.

    Args:
        model: Any module. It is not changed.

    Attributes:
        model: The shadow itself.
        originals: Module of the shadow -> the module that it is the shadow of.
    """

    def __init__(self, model: nn.Module) -> None:
        self._copies = _Copies()
        self._copies.copy_buffers(model)
        self.model: nn.Module = self._copies.of(model)
        self.originals = {self._copies.of(module): module for module in model.modules()}

    def restore(self) -> nn.Module:
        """Make the modules of the shadow plain ones, and return it."""
        for module in self.model.modules():
            detach(module)
        return self.model

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run the forward of the shadow within this.

        Raises:
            LacksHooksError: In the place of what the forward raises, if it may need a hook that the shadow lacks.
        """
        try:
            yield
        except Exception as error:
            if not self._copies.left_out_hooks:
                raise
            raise LacksHooksError(
                "model: its forward fails without its hooks, which run in real passes alone: "
                f"{type(error).__name__}: {first_line(error)}. Make a hook a method of the model"
            ) from error

    def inputs(self, inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Copy the arguments of a forward, with their tensors: the forward may write into them."""
        copied = _Copies(tensors=True)
        return tuple(copied.of(value) for value in inputs), {name: copied.of(value) for name, value in kwargs.items()}


class _Copies:
    """Copies objects, each one once.

    Args:
        tensors: Whether tensors are copied, too. Else they are shared.
    """

    def __init__(self, *, tensors: bool = False) -> None:
        self._tensors = tensors
        self.left_out_hooks = False
        self._made: dict[int, tuple[Any, Any]] = {}  # id -> the original, which keeps its id, and its copy

    def of(self, value: Any) -> Any:
        """Return the copy of an object: the object itself if it is shared."""
        if id(value) in self._made:
            return self._made[id(value)][1]
        if isinstance(value, Tensor):
            # A tensor without its storage is one of FSDP's, between two forwards.
            shared = type(value) is not Tensor or value.untyped_storage().nbytes() == 0
            return self._remember(value, value if shared and not self._tensors else _copied_tensor(value))
        if isinstance(value, _SHARED) or value is None or is_trainer(value):
            return value
        if isinstance(value, State):
            return self._state(value)
        if isinstance(value, nn.Module):
            return value if isinstance(value, torch.jit.ScriptModule) or self._tensors else self._module(value)
        if isinstance(value, _CONTAINERS):
            return self._container(value)
        if isinstance(value, MethodType):
            return MethodType(value.__func__, self.of(value.__self__))
        if isinstance(value, partial):
            return partial(self.of(value.func), *self.of(value.args), **self.of(value.keywords))
        return self._object(value)

    def copy_buffers(self, model: nn.Module) -> None:
        """Copy all buffers of a model first: an attribute or a container may hold one of them, too."""
        for buffer in model.buffers():
            self._remember(buffer, _copied_tensor(buffer))

    def _remember(self, value: Any, copied: Any) -> Any:
        self._made[id(value)] = value, copied
        return copied

    def _module(self, module: nn.Module) -> nn.Module:
        made = self._remember(module, object.__new__(type(module)))
        attributes = vars(made)
        for name, value in vars(module).items():
            if name in HOOKS:
                attributes[name] = OrderedDict((key, self.of(hook)) for key, hook in value.items() if _is_own(hook))
                self.left_out_hooks |= len(attributes[name]) < len(value)
            else:
                attributes[name] = None if name == COMPILED_CALL else self.of(value)
        if type(module).__name__ == "OptimizedModule":  # its forward is the compiled one of the model inside
            del attributes["forward"]
            made.__class__ = _Uncompiled
        return made  # type: ignore[no-any-return]

    def _state(self, state: State) -> State:
        """Copy the state of a converted module, without what it remembers of passes. Nobody checks a shadow."""
        made: State = self._remember(state, object.__new__(type(state)))
        vars(made).update({name: self.of(value) for name, value in vars(state).items() if name not in _OF_PASSES})
        vars(made).update({name: None for name in _OF_PASSES if name in vars(state)})
        return made

    def _container(self, value: Any) -> Any:
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return self._remember(value, type(value)(*map(self.of, value)))
        if type(value) in (tuple, set, frozenset):
            return self._remember(value, type(value)(map(self.of, value)))
        try:
            made = copy.copy(value)
            if made is value:  # a class of which there is one object only
                return self._remember(value, value)
            self._remember(value, made)
            if isinstance(value, dict):
                for key in dict.keys(value):
                    dict.__setitem__(made, key, self.of(dict.__getitem__(value, key)))
            else:
                for index in range(len(value)):
                    made[index] = self.of(value[index])
        except Exception:  # a class of the user's own, that can't be copied in this way
            return self._remember(value, value)
        return made

    def _object(self, value: Any) -> Any:
        """Copy an object of any other class with its attributes, if it can be copied; else share it."""
        if isinstance(value, torch.Generator):
            return self._remember(value, value.clone_state())
        if type(value).__module__.partition(".")[0] == "numpy":  # arrays, and generators of random numbers
            return self._remember(value, copy.deepcopy(value))
        if not hasattr(value, "__dict__") and not isinstance(value, random.Random):
            return value
        is_operator = callable(value) and type(value).__module__.startswith(
            "torch."
        )  # those of `torch.ops` have no end
        if is_operator or hasattr(value, "__del__"):  # a copy of a handle would close it when it goes
            return self._remember(value, value)
        try:
            made = copy.copy(value)
            if made is value:  # there is one such object only: a logger, say
                return self._remember(value, value)
            self._remember(value, made)
            for name, attribute in vars(value).items():
                vars(made)[name] = self.of(attribute)
        except Exception:  # locks, files, process groups, ...
            return self._remember(value, value)
        return made


class _Uncompiled(nn.Module):
    """What ``torch.compile`` has put around a model, without the compiler."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model inside."""
        return next(self.children())(*args, **kwargs)


def _is_own(hook: Any) -> bool:
    """Whether a hook is a method of a module, and so part of the model: its forward may need what the hook does.

    An entry that is a flag of a hook counts, too.
    """
    method = hook.func if isinstance(hook, partial) else hook
    return isinstance(hook, bool) or isinstance(getattr(method, "__self__", None), nn.Module)


def _copied_tensor(tensor: Tensor) -> Tensor:
    if tensor.is_meta or is_lazy(tensor):
        return tensor
    with torch.no_grad(), outside_fake_mode():  # it is real, and its copy must be so, too
        copied = tensor.clone()
    return copied.requires_grad_(tensor.requires_grad) if copied.is_floating_point() else copied
