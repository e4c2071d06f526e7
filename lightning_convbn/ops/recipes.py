"""Recipes: what can be computed again from what is kept anyway is not kept.

Autograd saves tensors for the backward pass. Some of them can be computed again, cheaply and with the same bits: a
folded weight is a product of a parameter and a vector, a SiLU's output is a function of its input. Others are saved for
their shape alone. In the place of such a tensor the graph keeps a *recipe*: a function that returns the tensor. The
forward pass is plain operations and knows nothing of it. So double backward, `torch.func`, tracing and export need no
code of their own: where they are at work, autograd saves the tensors themselves.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_convbn.compat import (
    FakeTensor,
    has_tangent,
    inside_transform,
    is_jit_traced,
    replace_saved,
    storage_id,
    version_of,
)
from lightning_convbn.ops.fold import ConvSpec

Recipe = Callable[..., Tensor]  # autograd gives it one argument, of which it needs nothing


class Source:
    """A tensor that a recipe computes from. It must not be written before the backward pass, as autograd asks, too.

    Args:
        tensor: Any tensor. Only its values are kept, not its graph.
    """

    __slots__ = ("_tensor", "_version")

    def __init__(self, tensor: Tensor) -> None:
        self._version = version_of(tensor)
        # A leaf itself, so that its storage is free to go while the leaf is given another one, as sharding does.
        self._tensor = tensor if tensor.is_leaf else tensor.detach()

    @property
    def storage(self) -> tuple[int, int]:
        """What identifies the storage that is kept, and its bytes."""
        return storage_id(self._tensor), self._tensor.untyped_storage().nbytes()

    def value(self) -> Tensor:
        """Return the tensor, detached.

        Raises:
            RuntimeError: If it was written since the forward pass; in the words of autograd.
        """
        return unwritten(self._tensor, self._version).detach()


def unwritten(tensor: Tensor, version: int | None) -> Tensor:
    """Return the tensor if it is still at ``version``.

    Raises:
        RuntimeError: If it was written since the forward pass; in the words of autograd.
    """
    if version_of(tensor) != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: "
            f"a tensor of shape {list(tensor.shape)} is at version {version_of(tensor)}; expected version {version} "
            "instead"
        )
    return tensor


def itself(tensor: Tensor) -> Tensor:
    """Keep a tensor as it is: a saved-tensor hook that takes the place of others, and changes nothing."""
    return tensor


def shape_of(tensor: Tensor) -> Recipe:
    """Return the recipe of a tensor that is saved for its shape alone: one value, expanded."""
    shape, dtype, device = tensor.shape, tensor.dtype, tensor.device
    return lambda _=None: torch.empty(1, dtype=dtype, device=device).expand(shape)


def takes_recipes(output: Tensor) -> bool:
    """Whether recipes may replace what the graph of an output has saved.

    They may not inside a transform of ``torch.func``, nor where an output carries a tangent (forward-mode AD): a
    derivative of the recipe itself would be wanted there. Nor may they for other subclasses of Tensor, whose nodes may
    save something else. ``torch.jit.trace`` would record what a recipe is made of.
    """
    if not output.requires_grad or type(output) not in (Tensor, FakeTensor) or is_jit_traced():
        return False
    return not inside_transform() and not has_tangent(output)


def replace_saved_by_conv(
    output: Tensor, input_recipe: Recipe | None, weight_recipe: Recipe | None, spec: ConvSpec | None
) -> None:
    """Have the node of a convolution, or of a linear layer, keep recipes of its input and its weight."""
    node = output.grad_fn
    if weight_recipe is not None:
        if spec is not None:
            replace_saved(node, "weight", weight_recipe)
        else:
            replace_saved(node, "mat2", lambda _: weight_recipe(None).t())  # a linear layer saves it transposed
    if input_recipe is not None:
        replace_saved(node, "mat1" if spec is None else "input", input_recipe)
