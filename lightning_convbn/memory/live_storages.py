"""The ledger: which storages are alive, who allocated them, and the most bytes that were alive at once."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import is_dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from lightning_convbn.compat import RUNS_ENGINE, TorchDispatchMode, is_of_compiler, tree_leaves
from lightning_convbn.pairs.side_effects import tensors_of

INPUT = "(input)"


class StorageLedger(TorchDispatchMode):
    """Notes each storage that is allocated while it is active, with the running module. It keeps none alive.

    It sees what a forward and a backward pass allocate, operation by operation: also in hooks, in closures, and in a
    forward that runs a second time. It does not see what a kernel allocates for itself and frees before it returns:
    copies in another layout (oneDNN), workspaces (cuDNN).

    Args:
        function: What runs. If it is a module, its submodules are told apart.

    Attributes:
        peak: The most bytes that were alive at once until now.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.peak = 0
        modules = function.named_modules() if isinstance(function, nn.Module) else ()
        self._names = {module: name for name, module in modules}
        self._running = [INPUT]
        self._hooks = ExitStack()
        self._allocated: dict[int, tuple[StorageWeakRef, int, str]] = {}
        self._live = 0  # bytes; some may be gone until `_forget_dead`
        self._unsettled: tuple[StorageWeakRef, int] | None = None

    def __enter__(self) -> StorageLedger:
        # These hooks are global. A hook in a module would change the attributes of the module.
        self._hooks.callback(register_module_forward_pre_hook(self._enter_module).remove)
        self._hooks.callback(register_module_forward_hook(self._leave_module, always_call=True).remove)
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._hooks.close()
        super().__exit__(*exception)
        self._settle()

    def _enter_module(self, module: nn.Module, args: Any) -> None:
        if module in self._names:
            self._running.append(self._names[module])

    def _leave_module(self, module: nn.Module, args: Any, output: Any) -> None:
        if module in self._names:
            self._running.pop()

    _enter_module.sees_no_tensors = _leave_module.sees_no_tensors = True  # type: ignore[attr-defined]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self._settle()
        output = func(*args, **(kwargs or {}))
        if func.is_view:  # nothing is allocated; the view of a real tensor among tensors without data has a new storage
            return output
        given: set[int] | None = None
        grown = False
        for tensor in tensors_in(output):
            storage = tensor.untyped_storage()
            reference = StorageWeakRef(storage)
            if given is None:
                given = {StorageWeakRef(leaf.untyped_storage()).cdata for leaf in tensors_in((args, kwargs))}
            if reference.cdata not in given and reference.cdata not in self._allocated:
                self._allocated[reference.cdata] = reference, storage.nbytes(), self._running[-1]
                self._live += storage.nbytes()
                grown = True
        if grown and self._live > self.peak:
            self._note_peak(args[0] if func is torch.ops.aten.add.Tensor and _is_accumulation(args) else None)
        return output

    def _note_peak(self, summed: Tensor | None) -> None:
        """Note how much is alive. The sum of two gradients is noted later: see `_settle`."""
        self._forget_dead()
        if summed is not None:
            self._unsettled = StorageWeakRef(summed.untyped_storage()), self._live
        else:
            self.peak = max(self.peak, self._live)

    def _settle(self) -> None:
        """Note a sum of two gradients if it did not take the place of the first one.

        Autograd adds gradients in place, if nobody else holds the first one. While a dispatch mode is active it does
        not. So the sum does not count as a new storage if the first one is gone before the next operation.
        """
        if self._unsettled is not None:
            (summed, live), self._unsettled = self._unsettled, None
            if not summed.expired():
                self.peak = max(self.peak, live)

    def _forget_dead(self) -> None:
        dead = [key for key, (reference, _, _) in self._allocated.items() if reference.expired()]
        for key in dead:
            self._live -= self._allocated.pop(key)[1]

    def bytes_alive(self) -> dict[str, int]:
        """Return the bytes that are alive, by the module that allocated them."""
        self._forget_dead()
        alive: Counter[str] = Counter()
        for _, size, module in self._allocated.values():
            alive[module] += size
        return dict(alive)

    def hold_inputs(self, size: int) -> None:
        """Count the inputs as alive from now on: the caller of a training step holds them.

        Args:
            size: Their bytes, whether they are alive here or not.
        """
        self._live += size - self.bytes_alive().get(INPUT, 0)
        for key in [key for key, (_, _, module) in self._allocated.items() if module == INPUT]:
            del self._allocated[key]


def _is_accumulation(args: tuple[Any, ...]) -> bool:
    """Whether autograd itself is about to add one gradient to another, and could do so in place."""
    if torch.is_grad_enabled() or not isinstance(args[0], Tensor) or not _called_by_engine():
        return False
    # `empty_like` keeps the strides of a tensor that is dense and does not overlap itself; autograd asks for one.
    return torch.empty_like(args[0], device="meta").stride() == args[0].stride()


def _called_by_engine() -> bool:
    """Whether autograd's engine calls an operation, from C++.

    Then the next Python frame outside of this class is the one that has called the engine, or there is none, as on a
    thread of the engine. In between are those that PyTorch puts around ``__torch_dispatch__`` for its compiler.
    """
    frame: FrameType | None = sys._getframe(2).f_back
    while frame is not None and is_of_compiler(frame.f_globals.get("__name__", "")):
        frame = frame.f_back
    return frame is None or frame.f_code.co_name == RUNS_ENGINE


def tensors_in(tree: Any) -> list[Tensor]:
    """List the tensors of nested containers. Dataclasses and mappings that PyTorch does not look into are some, too."""
    tensors: list[Tensor] = []
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor):
            tensors.append(leaf)
        elif isinstance(leaf, Mapping) or is_dataclass(leaf):
            tensors += tensors_of(leaf)
    return tensors
