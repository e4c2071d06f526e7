"""What a BatchNorm does that is not folded.

A frozen one uses its running statistics, whoever calls ``train()``. One in Train mode uses the statistics of the batch;
what is made of its output can be computed again, and if it runs a second time, it writes no statistics.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_convbn.compat import in_graph, is_in_backward
from lightning_convbn.layers.state import Unfrozen, state_of
from lightning_convbn.layers.supported_layers import NormLayer, norm_layer
from lightning_convbn.ops.fold import Affine
from lightning_convbn.ops.recomputable import follow, follow_function

EPSILON = 1e-5  # of a BatchNorm without the attribute: DETR's in transformers has it in its forward


def affine_of(bn: nn.Module) -> Affine:
    """Read the affine map of a BatchNorm with running statistics."""
    tensors: list[Any] = [getattr(bn, name, None) for name in ("weight", "bias", "running_mean", "running_var")]
    return Affine._make([*tensors, getattr(bn, "eps", EPSILON)])


def normalised(bn: nn.Module, input: Tensor) -> Tensor:
    """Normalise with the running statistics, and do nothing else."""
    weight, bias, mean, var, eps = affine_of(bn)
    return F.batch_norm(input, mean, var, weight, bias, False, 0.0, eps)


def run_after(bn: nn.Module, row: NormLayer, normalised: Tensor) -> Tensor:
    """Run what a BatchNorm of another library runs after it normalises: drop and activation of timm's."""
    for name in row.runs_after:
        child = getattr(bn, name, None)
        if child is not None:
            normalised = child(normalised)
    return normalised


# ------------------------------------------------------------------ the methods that every frozen BatchNorm gets


def frozen_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Normalise with the running statistics. No buffer is written.

    The forward of the class runs, with a training flag that is False. If the flag was set directly, that was what is
    asked for last: it is noted, and cleared. With recomputation, what ``F.batch_norm`` puts out can be computed again.
    Where the class multiplies and adds in its place, so do we, on a recomputable tensor: the bits stay the same.
    """
    state: Any = state_of(self)
    if state is None:
        return type(self).forward(self, *args, **kwargs)
    if self.training:
        state.flag.ask(True)
        self.training = False
    if state.recompute == "none" or len(args) != 1 or kwargs:
        return type(self).forward(self, *args, **kwargs)
    row = norm_layer(self)
    weight, bias, mean, var, eps = affine_of(self)
    if row is None or mean is None or args[0].dim() not in row.dims:
        return type(self).forward(self, *args, **kwargs)
    if row.scales:
        return _forward_on_followed(self, *args)
    return run_after(self, row, follow_function(F.batch_norm, args[0], mean, var, weight, bias, False, 0.0, eps))


def train(self: nn.Module, mode: bool = True) -> nn.Module:
    """Note the training flag that is asked for, and stay at False: somebody may compute with the flag."""
    type(self).train(self, mode)
    state: Any = state_of(self)
    if state is not None:
        state.flag.ask(mode)
        self.training = False
    return self


def reset_running_stats(self: nn.Module) -> None:
    """Refuse: no forward pass would fill the statistics again.

    Raises:
        RuntimeError: While the BatchNorm is frozen.
    """
    state = state_of(self)
    if state is None:
        type(self).reset_running_stats(self)  # type: ignore[attr-defined]
        return
    raise RuntimeError(
        f"reset_running_stats: this {type(self).__name__} is frozen, because set_mode or ConvBNModeCallback has put "
        f"its model in {state.mode!r} mode. No forward pass would fill its statistics again, as update_bn of "
        'torch.optim.swa_utils expects. Call set_mode(model, "train") first, or use a copy.deepcopy: it is plain'
    )


# -------------------------------------------------------------- the method that every BatchNorm in Train mode gets


def unfrozen_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run the forward of the class, whose output can be computed again. The second run of a pass writes no statistics.

    A pass runs a second time in the backward pass: under a checkpoint of ours, or of anybody else. The statistics of
    the batch follow from the input; the running ones are written once.
    """
    forward = type(self).forward
    if state_of(self) is None or in_graph():
        return forward(self, *args, **kwargs)
    if is_in_backward():
        with buffers_unwritten([self]):
            return forward(self, *args, **kwargs)
    return _forward_on_followed(self, *args, **kwargs)


def _forward_on_followed(bn: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run the forward of the class on an input that is recomputable, if it comes from a graph."""
    input = next(iter((*args, *kwargs.values())), None)  # each class has a name of its own for it
    if isinstance(input, Tensor) and input.grad_fn is not None:
        follow(input, frozen=False)
    return type(bn).forward(bn, *args, **kwargs)


def trains_statistics(module: nn.Module) -> bool:
    """Whether a module is a BatchNorm in Train mode that writes no statistics if it runs again."""
    return module.training and isinstance(state_of(module), Unfrozen)


@contextmanager
def buffers_unwritten(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Let modules write to copies of their own buffers, and give back the buffers afterwards."""
    owned = [(module, *named) for module in modules for named in module.named_buffers(recurse=False)]
    for module, name, buffer in owned:
        setattr(module, name, buffer.clone())
    try:
        yield
    finally:
        for module, name, buffer in owned:
            setattr(module, name, buffer)
