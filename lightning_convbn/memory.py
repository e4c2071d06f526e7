"""Counting the bytes that a forward pass keeps for the backward pass."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_convbn.layers.layers import ConvBNLayer, Mode
from lightning_convbn.modes import conv_bn_mode
from lightning_convbn.pairs.pair import ConvBNPairs
from lightning_convbn.pairs.side_effects import side_effects_undone

MIB = 2**20
INPUT = "(input)"


def as_mib(size: int) -> str:
    """Write a number of bytes in MiB, with more digits where there is little.

    Example:
        >>> as_mib(3 * 2**20), as_mib(2**10)
        ('3.0 MiB', '0.001 MiB')
    """
    return f"{size / MIB:.1f} MiB" if size >= MIB else f"{size / MIB:.3f} MiB"


@dataclass(frozen=True)
class MemoryUse:
    """What `measure_memory` has counted.

    Attributes:
        saved_bytes: Bytes that one forward pass keeps for the backward pass.
        peak_allocated_bytes: On CUDA, the most bytes allocated at once in forward and backward, beyond those that were
            allocated before; None elsewhere.
        saved_by_module: Qualified name of a module -> those of ``saved_bytes`` that were allocated while it was the
            innermost module that ran; ``""`` for the model's own forward, ``"(input)"`` for the inputs.
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
    recompute_activations: bool = False,
    **kwargs: Any,
) -> MemoryUse:
    """Count the bytes that one forward pass of a model in a mode keeps for the backward pass.

    Every storage that the forward allocates and that is still alive when nothing but the autograd graph is left counts
    once; parameters and buffers don't count, nor what pairs keep from step to step (see `set_mode`); an input does if
    the graph keeps it. This goes by the life of the storages and not by ``torch.autograd.graph.saved_tensors_hooks``,
    which miss whatever is saved under other such hooks or held by a closure. Random state, buffers, gradients and mode
    are as before afterwards.

    With inputs from a ``torch._subclasses.FakeTensorMode`` the count is the same and nothing is computed or allocated.

    Args:
        model: Any module.
        *inputs: Positional arguments of its forward.
        mode: The mode to measure in. ``"deploy"`` runs as Tune does where parameters want gradients.
        pairs: As for `set_mode`.
        recompute_activations: As for `set_mode`.
        **kwargs: Keyword arguments of its forward.

    Returns:
        The bytes kept and, on CUDA, the peak of forward and backward.

    Raises:
        ValueError: If ``mode`` is unknown or ``pairs`` does not fit the model.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8))
        >>> images = torch.zeros(4, 3, 16, 16)
        >>> measure_memory(model, images, mode="eval").saved_bytes  # input 12288, convolution's output 32768
        45056
        >>> measure_memory(model, images, mode="tune").saved_bytes  # input
        12288
    """
    switched = conv_bn_mode(model, mode, pairs=pairs, recompute_activations=recompute_activations)
    with switched, side_effects_undone(model, inputs, kwargs):
        frozen = not all(parameter.requires_grad for parameter in model.parameters())
        if mode == "deploy" or (mode == "tune" and frozen):
            with torch.no_grad():  # the folds that stay are not kept for a backward pass
                model(*inputs, **kwargs)
        saved = saved_bytes_by_module(model, *inputs, **kwargs)
        return MemoryUse(sum(saved.values()), _peak_allocated_bytes(model, inputs, kwargs), saved)


def measure_memory_abstractly(
    model: nn.Module,
    inputs: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    mode: Mode,
    pairs: ConvBNPairs | None = None,
    recompute_activations: bool = False,
    or_for_real: bool = True,
) -> MemoryUse:
    """Count as `measure_memory` does, on tensors without data where the model allows it.

    A model that only just fits in Tune mode can so be counted in Eval mode. A model that looks at values (a detector's
    non-maximum suppression, say) is run for real, or, without ``or_for_real``, raises what it raises.
    """
    asked: dict[str, Any] = {"pairs": pairs, "recompute_activations": recompute_activations}
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            args, named = tree_map_only(Tensor, fake.from_tensor, (tuple(inputs), dict(kwargs)))
            with conv_bn_mode(model, mode, **asked), side_effects_undone(model, args, named):
                saved = saved_bytes_by_module(model, *args, **named)
                return MemoryUse(sum(saved.values()), saved_by_module=saved)
    except Exception:  # whatever a user's forward raises when there are no values to read
        if not or_for_real:
            raise
        return measure_memory(model, *inputs, mode=mode, **asked, **kwargs)


def count_saved_bytes(function: Callable[..., Any], *inputs: Any, **kwargs: Any) -> int:
    """Count the bytes that one call of a function keeps for the backward pass; see `measure_memory`."""
    return sum(saved_bytes_by_module(function, *inputs, **kwargs).values())


def saved_bytes_by_module(function: Callable[..., Any], *inputs: Any, **kwargs: Any) -> dict[str, int]:
    """Count the bytes that one call of a function keeps, by the module that allocated them; see `MemoryUse`.

    The modules are those of the function, if it is one itself. Only what keeps something is named.
    """
    for module in function.modules() if isinstance(function, nn.Module) else ():
        if isinstance(module, ConvBNLayer):
            with unset_fake_temporarily():
                module.warm_up()
    ledger = _StorageLedger(function)
    with torch.enable_grad(), ledger:
        # Copies, so that an input counts if and only if the graph keeps it, and not because the caller holds it.
        args, named = tree_map_only(Tensor, _copied, (inputs, kwargs))
        output = function(*args, **named)
        leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
        # The node of a view, because up to PyTorch 2.6 a custom Function's own node does not hold what it has saved.
        graph = [leaf.view_as(leaf).grad_fn for leaf in leaves]
        del args, named, output, leaves
    gc.collect(1)  # cycles that the forward has just left behind
    kept = ledger.bytes_alive()
    del graph
    return kept


def _copied(tensor: Tensor) -> Tensor:
    """A copy that is no leaf: the graph itself holds the leaves that want a gradient, whether they are saved or not."""
    return tensor * 1 if tensor.requires_grad else tensor.clone()


class _StorageLedger(TorchDispatchMode):
    """Takes down every storage that is allocated while it is active, and by which module, without keeping it alive."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        modules = function.named_modules() if isinstance(function, nn.Module) else ()
        self._names = {module: name for name, module in modules}
        self._running = [INPUT]
        self._hooks = ExitStack()
        self._allocated: dict[int, tuple[StorageWeakRef, int, str]] = {}

    def __enter__(self) -> _StorageLedger:
        # Hooks for all modules at once, because hooks of their own would change what the modules look like.
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
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if any(result.alias_info is not None for result in func._schema.returns):  # a view, or done in place
            return output
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in given and storage._cdata not in self._allocated:
                    self._allocated[storage._cdata] = StorageWeakRef(storage), storage.nbytes(), self._running[-1]
        return output

    def bytes_alive(self) -> dict[str, int]:
        alive: Counter[str] = Counter()
        for reference, size, module in self._allocated.values():
            if not reference.expired():
                alive[module] += size
        return dict(alive)


def _peak_allocated_bytes(model: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    if device.type != "cuda" or not any(parameter.requires_grad for parameter in model.parameters()):
        return None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    forward_and_backward(model, inputs, kwargs)
    return torch.cuda.max_memory_allocated(device) - before


def forward_and_backward(model: nn.Module, inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Run a forward pass and the backward pass of the sum of its outputs; the gradients are thrown away."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.enable_grad():
        leaves = tree_leaves(model(*inputs, **kwargs))
        loss = sum(leaf.float().sum() for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad)
        del leaves
        if isinstance(loss, Tensor):
            torch.autograd.grad(loss, parameters, allow_unused=True)
