"""Counts the bytes that a forward pass keeps for the backward pass.

`measure_memory` runs the model. `measure_memory_abstractly` runs it on tensors without data, if the model allows it.
Both count in the same way, with `saved_bytes_by_module`.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from lightning_convbn.compat import TorchDispatchMode, fake_tensor_mode, tree_leaves, tree_map_only
from lightning_convbn.layers.swap import Mode, Recompute
from lightning_convbn.modes import set_mode
from lightning_convbn.pairs.pair import ConvBNPairs
from lightning_convbn.pairs.shadow import Shadow
from lightning_convbn.pairs.side_effects import side_effects_undone

MIB = 2**20
INPUT = "(input)"


def as_mib(size: int) -> str:
    """Write a number of bytes in MiB. Sizes below one MiB get more digits.

    Example:
        >>> as_mib(3 * 2**20), as_mib(2**10)
        ('3.0 MiB', '0.001 MiB')
    """
    return f"{size / MIB:.1f} MiB" if size >= MIB else f"{size / MIB:.3f} MiB"


@dataclass(frozen=True)
class MemoryUse:
    """The result of `measure_memory`.

    Attributes:
        saved_bytes: Bytes that one forward pass keeps for the backward pass.
        peak_allocated_bytes: On CUDA, the most bytes that are allocated at once in forward and backward pass. Bytes
            that were allocated before do not count. None on other devices.
        saved_by_module: Qualified name of a module -> the bytes of ``saved_bytes`` that were allocated while it was the
            innermost running module. The name is ``""`` for the model's own forward and ``"(input)"`` for the inputs.
    """

    saved_bytes: int
    peak_allocated_bytes: int | None = None
    saved_by_module: Mapping[str, int] = field(default_factory=dict, repr=False, hash=False)

    @property
    def saved_mib(self) -> float:
        """``saved_bytes`` in MiB."""
        return self.saved_bytes / MIB


def measure_memory(
    model: nn.Module,
    *inputs: Any,
    mode: Mode,
    pairs: ConvBNPairs | None = None,
    recompute: Recompute = "none",
    **kwargs: Any,
) -> MemoryUse:
    """Count the bytes that one forward pass of a model in a mode keeps for the backward pass.

    A storage counts if the forward pass allocates it and the autograd graph alone keeps it alive. It counts once. An
    input counts if the graph keeps it. Parameters, buffers and the folds of Deploy mode do not
    count. The model itself does not run: its shadow does, which shares the parameters (`pairs/shadow.py`). So neither
    the model nor the inputs are changed, and random states are restored.

    This looks at the life of storages. ``torch.autograd.graph.saved_tensors_hooks`` would miss tensors that other such
    hooks have packed, and tensors that a closure holds.

    Inputs from a PyTorch's ``FakeTensorMode`` give the same count, and nothing is computed or allocated.

    Args:
        model: Any module.
        *inputs: Positional arguments of its forward.
        mode: The mode to measure in. ``"deploy"`` computes as ``"tune"`` if a parameter wants a gradient.
        pairs: As for `set_mode`.
        recompute: As for `set_mode`.
        **kwargs: Keyword arguments of its forward.

    Returns:
        The kept bytes and, on CUDA, the peak of forward and backward pass.

    Raises:
        ValueError: If ``mode`` or ``recompute`` is unknown, or ``pairs`` does not fit the model.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8))
        >>> images = torch.zeros(4, 3, 16, 16)
        >>> measure_memory(model, images, mode="eval").saved_bytes  # input 12288, convolution's output 32768
        45056
        >>> measure_memory(model, images, mode="tune").saved_bytes  # input, and two values for each of 8 channels
        12352
    """
    shadow = Shadow(model)
    inputs, kwargs = shadow.inputs(inputs, kwargs)
    set_mode(shadow.model, mode, pairs=pairs, recompute=recompute)
    with side_effects_undone(shadow.model, inputs, kwargs):
        if mode == "deploy":
            with torch.no_grad():  # the folds that stay are not kept for a backward pass
                shadow.model(*inputs, **kwargs)
        saved = saved_bytes_by_module(shadow.model, *inputs, **kwargs)
        return MemoryUse(sum(saved.values()), _peak_allocated_bytes(shadow.model, inputs, kwargs), saved)


def measure_memory_abstractly(
    model: nn.Module,
    inputs: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    mode: Mode,
    pairs: ConvBNPairs | None = None,
    recompute: Recompute = "none",
    allow_real_run: bool = True,
) -> MemoryUse:
    """Count as `measure_memory` does, but on tensors without data if the model allows it.

    So a model can be counted in Eval mode even if it only fits into memory in Tune mode. Some models read values, for
    example in the non-maximum suppression of a detector. They can't run without data.

    Args:
        model: Any module.
        inputs: Positional arguments of its forward.
        kwargs: Keyword arguments of its forward.
        mode: As for `measure_memory`.
        pairs: As for `set_mode`.
        recompute: As for `set_mode`.
        allow_real_run: Run a model on the real inputs if it can't run without data. With False, its error is raised.
    """
    asked: dict[str, Any] = {"pairs": pairs, "recompute": recompute}
    try:
        shadow = Shadow(model)
        set_mode(shadow.model, mode, **asked)
        with fake_tensor_mode() as fake:
            args, named = tree_map_only(Tensor, fake.from_tensor, (tuple(inputs), dict(kwargs)))
            with side_effects_undone(shadow.model, args, named):
                saved = saved_bytes_by_module(shadow.model, *args, **named)
                return MemoryUse(sum(saved.values()), saved_by_module=saved)
    except Exception:  # a user's forward may raise anything if a tensor has no data
        if not allow_real_run:
            raise
        return measure_memory(model, *inputs, mode=mode, **asked, **kwargs)


def count_saved_bytes(function: Callable[..., Any], *inputs: Any, **kwargs: Any) -> int:
    """Count the bytes that one call of a function keeps for the backward pass; see `measure_memory`."""
    return sum(saved_bytes_by_module(function, *inputs, **kwargs).values())


def saved_bytes_by_module(function: Callable[..., Any], *inputs: Any, **kwargs: Any) -> dict[str, int]:
    """Count the bytes that one call of a function keeps, by the module that allocated them; see `MemoryUse`.

    If the function is a module, its submodules are told apart. Modules that keep nothing are left out.
    """
    ledger = _StorageLedger(function)
    with torch.enable_grad(), ledger:
        # The caller holds the inputs, so they would always be alive. Copies are only alive if the graph keeps them.
        args, named = tree_map_only(Tensor, _copied, (inputs, kwargs))
        output = function(*args, **named)
        leaves = [leaf for leaf in _tensors_in(output) if leaf.requires_grad]
        # In PyTorch 2.9 the Python node of an autograd.Function does not keep alive what it has saved. A node after it
        # does, so each output gets a view. PyTorch 2.14 does not need this.
        graph = [leaf.view_as(leaf).grad_fn for leaf in leaves]
        del args, named, output, leaves
    gc.collect(1)  # the forward pass may have left reference cycles behind
    kept = ledger.bytes_alive()
    del graph
    return kept


def _copied(tensor: Tensor) -> Tensor:
    """Return a copy that is no leaf of the graph. The graph holds each leaf that wants a gradient, saved or not."""
    return tensor * 1 if tensor.requires_grad else tensor.clone()


class _StorageLedger(TorchDispatchMode):
    """Lists the storages that are allocated while it is active, each with the running module. It keeps none alive."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        modules = function.named_modules() if isinstance(function, nn.Module) else ()
        self._names = {module: name for name, module in modules}
        self._running = [INPUT]
        self._hooks = ExitStack()
        self._allocated: dict[int, tuple[StorageWeakRef, int, str]] = {}

    def __enter__(self) -> _StorageLedger:
        # These hooks are global. A hook in a module would change the attributes of the module.
        self._hooks.callback(register_module_forward_pre_hook(self._enter_module).remove)
        self._hooks.callback(register_module_forward_hook(self._leave_module, always_call=True).remove)
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._hooks.close()
        super().__exit__(*exception)

    def _enter_module(self, module: nn.Module, args: Any) -> None:
        if module in self._names:
            self._running.append(self._names[module])

    def _leave_module(self, module: nn.Module, args: Any, output: Any) -> None:
        if module in self._names:
            self._running.pop()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if func.is_view:  # nothing is allocated; the view of a real tensor among tensors without data has a new storage
            return output
        given = {StorageWeakRef(tensor.untyped_storage()).cdata for tensor in _tensors_in((args, kwargs))}
        for tensor in _tensors_in(output):
            storage = tensor.untyped_storage()
            reference = StorageWeakRef(storage)
            if reference.cdata not in given and reference.cdata not in self._allocated:
                self._allocated[reference.cdata] = reference, storage.nbytes(), self._running[-1]
        return output

    def bytes_alive(self) -> dict[str, int]:
        """Return the bytes that are still alive, by the module that allocated them."""
        alive: Counter[str] = Counter()
        for reference, size, module in self._allocated.values():
            if not reference.expired():
                alive[module] += size
        return dict(alive)


def _tensors_in(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _peak_allocated_bytes(model: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    if device.type != "cuda" or not any(parameter.requires_grad for parameter in model.parameters()):
        return None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    forward_and_backward(model, inputs, kwargs)
    return torch.cuda.max_memory_allocated(device) - before


def forward_and_backward(model: nn.Module, inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Run a forward pass and the backward pass of the sum of its outputs. The gradients are not kept."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.enable_grad():
        outputs = _tensors_in(model(*inputs, **kwargs))
        loss = sum(output.float().sum() for output in outputs if output.requires_grad)
        del outputs
        if isinstance(loss, Tensor):
            torch.autograd.grad(loss, parameters, allow_unused=True)
