"""The second prover: the data flow of one real forward pass, for models that can't be traced.

Convolutions and BatchNorms are watched by hooks, everything between them by a torch function mode. A tensor that a
convolution has put out is followed by identity: whichever torch function takes it as an argument uses it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_convbn.layers.swap import class_name
from lightning_convbn.layers.table import is_norm
from lightning_convbn.pairs.data_flow import DataFlow, is_leaf
from lightning_convbn.pairs.side_effects import leaves_of, stashed, state_kept
from lightning_convbn.pairs.tracing import METADATA


def record_data_flow(model: nn.Module, inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> DataFlow:
    """Run one forward pass without gradients and take down its data flow.

    Args:
        model: Any module, plain or converted; what it computes does not matter, only what goes where.
        inputs: Positional arguments of its forward.
        kwargs: Keyword arguments of its forward.
    """
    flow = DataFlow({module: name for name, module in model.named_modules()})
    recorder = _Recorder(flow)
    with torch.no_grad(), state_kept(model, inputs, kwargs):
        with recorder.watching(model), recorder, _BelowTorchFunctions(recorder):
            output = model.forward(*inputs, **kwargs)
        for leaf in leaves_of(output):
            recorder.note_use(leaf, "the caller, as it is returned")
        for name, leaf in stashed(model):
            recorder.note_use(leaf, f"whoever reads the attribute `{name}`")
    return flow


class _Recorder(TorchFunctionMode):
    def __init__(self, flow: DataFlow) -> None:
        super().__init__()
        self._flow = flow
        self._origin: dict[int, tuple[Tensor, nn.Module]] = {}  # holds the tensors, so that no id is used twice
        self._made: dict[int, tuple[weakref.ref[Tensor], str]] = {}  # what made a tensor
        self._rows: set[int] = set()  # ids of flattened outputs of linear layers
        self._inside = 0  # how many watched modules are running

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Hook every convolution and BatchNorm of a model."""
        with ExitStack() as stack:
            for module in model.modules():
                if is_leaf(module):
                    before = module.register_forward_pre_hook(self._enter, prepend=True, with_kwargs=True)
                    after = module.register_forward_hook(self._leave, always_call=True)
                    stack.callback(before.remove)
                    stack.callback(after.remove)
            yield

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._inside == 0:
            self._flow.calls[module] += 1
            given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            for tensor in given:
                if not is_norm(module):
                    self.note_use(tensor, f"`{self._flow.names[module]}`")
                elif (conv := self._origin_of(tensor)) is not None:
                    self._flow.norms[conv].append(module)
            if is_norm(module):
                source = self._origin_of(given[0]) if given else None
                if given and id(given[0]) in self._rows:
                    self._flow.flattened.add(module)
                self._flow.sources[module].append(self._described(given) if source is None else source)
        self._inside += 1

    def _leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, Tensor) and self._inside == 1:
            if not is_norm(module):
                self._origin[id(output)] = output, module
            elif self._origin_of(output) is not None:
                output = output.detach()  # a folded BatchNorm returns what it was given: tell the two apart
            if is_norm(module):
                self._note_maker(output, f"`{self._flow.names[module]}` ({class_name(module)})")
        self._inside -= 1
        return output

    def _described(self, given: list[Tensor]) -> str:
        made, name = self._made.get(id(given[0]), (None, "")) if given else (None, "")
        return name if made is not None and made() is given[0] else "an argument of forward"

    def _note_maker(self, output: Tensor, description: str) -> None:
        self._made[id(output)] = weakref.ref(output), description

    def _origin_of(self, tensor: Tensor) -> nn.Module | None:
        return self._origin[id(tensor)][1] if id(tensor) in self._origin else None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._inside == 0:
            name = _name(func)
            linear = self._origin_of(args[0]) if args and isinstance(args[0], Tensor) else None
            if name == "flatten" and args[1:] == (0, 1) and isinstance(linear, nn.Linear):
                self._inside += 1  # what flattening does is no use of the output
                rows: Tensor = func(*args, **kwargs)
                self._inside -= 1
                self._origin[id(rows)] = rows, linear
                self._rows.add(id(rows))
                return rows
            shape_only = 1 if name in ("reshape_as", "view_as", "expand_as") else None
            if name not in _READS_METADATA:
                for position, argument in enumerate((*args, *kwargs.values())):
                    if position == shape_only:
                        continue
                    for leaf in tree_leaves(argument):
                        self.note_use(leaf, f"`{name}`")
        output = func(*args, **kwargs)
        if self._inside == 0 and isinstance(output, Tensor):
            self._note_maker(output, f"`{_name(func)}`")
        return output

    def note_use(self, value: Any, user: str) -> None:
        """Note that an output of a convolution, if ``value`` is one, is used outside of all watched modules."""
        conv = self._origin_of(value) if isinstance(value, Tensor) and self._inside == 0 else None
        if conv is not None:
            self._flow.users[conv].append(user)


class _BelowTorchFunctions(TorchDispatchMode):
    """Sees what a torch function mode can't: operators that a scripted function calls."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for leaf in tree_leaves((args, kwargs)):
            self._recorder.note_use(leaf, f"`{func}`")
        return func(*args, **kwargs)


_READS_METADATA = {*METADATA, "size", "dim", "ndimension", "is_floating_point", "is_cuda", "requires_grad", "is_nested"}


def _name(func: Callable[..., Any]) -> str:
    """The name of a function, or of the attribute that a getter reads."""
    name = getattr(func, "__name__", "")
    if name in ("__get__", "__set__"):
        return str(getattr(getattr(func, "__self__", None), "__name__", name))
    return name or str(resolve_name(func))
