"""Makes the Deploy copy of a model: a standalone copy with each pair folded into one convolution for good."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import nn

from lightning_convbn.exporting.dimension_check import dimension_check
from lightning_convbn.exporting.plain_copy import plain_copy
from lightning_convbn.layers.norms import affine_of
from lightning_convbn.layers.supported_layers import conv_layer, norm_layer, takes_other_dimensions
from lightning_convbn.modes import set_mode
from lightning_convbn.ops.fold import ConvSpec, Operands, fold_conv_bn
from lightning_convbn.pairs.data_flow import WHOLE_MODEL, is_inside
from lightning_convbn.pairs.pair import ConvBNPair, ConvBNPairs


def fuse_for_deploy(
    model: nn.Module, *, pairs: ConvBNPairs | None = None, example_inputs: Sequence[Any] | None = None
) -> nn.Module:
    """Return the Deploy copy of a model: a copy in eval state with each pair folded into one convolution for good.

    The copy has plain layers: convolutions with a bias, and ``nn.Identity`` in the place of each folded BatchNorm. It
    loads and runs with torch and the library of the model, without this package. A folded parameter wants a gradient if
    one of the parameters that it was computed from does. Wrappers (``torch.compile``, DDP, ``DataParallel``, Fabric)
    are not copied. The original is not changed. It may be in any mode.

    Some pairs need care. A pair stays unfolded if the forward also reads a parameter of it elsewhere, as a tied decoder
    does, or if its convolution is parametrized. In the place of a BatchNorm that takes inputs of several dimensions,
    such as ``BatchNorm1d``, there is a module that refuses those for which the fold is wrong.

    Args:
        model: Any module, plain or converted by `set_mode`. BatchNorms in TorchScript and sharded modules are refused.
        pairs: The pairs to fold. None takes the pairs that `find_conv_bn_pairs` finds in the eval state. If the model
            is converted, it takes only those that the model was converted with.
        example_inputs: Positional arguments of its forward, to find the pairs with. A model that can't be traced needs
            them, here or for ``pairs``.

    Raises:
        ValueError: If the model can't be copied, if ``pairs`` does not fit it, if a hook of a convolution computes
            its weight anew in every forward (``torch.nn.utils.weight_norm``), or if the model can't be traced and there
            are no example inputs.

    Source: "Deploy mode" of arXiv 2305.11624, section 2.

    Example:
        >>> from torch import nn
        >>> fuse_for_deploy(nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)))
        Sequential(
          (0): Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
          (1): Identity()
        )
    """
    copied = plain_copy(model)
    fused = copied.model
    found = copied.find_pairs(example_inputs)
    pairs = found if pairs is None else copied.renamed(pairs)
    pairs = pairs.unfold({**pairs.unfused, **found.unfused})
    if pairs.untraced:  # of a model in a wrapper they name the wrapper, which the copy does not have
        _check_seen(model, pairs, found.untraced)
    if len(pairs):
        with torch.no_grad():
            set_mode(fused, "eval", pairs=pairs)  # checks the pairs
            set_mode(fused, "train", pairs=pairs)
            for pair in copied.without_hooked(pairs):
                _fold_for_good(fused, pair)
    return fused


def _check_seen(model: nn.Module, pairs: ConvBNPairs, untraced: Iterable[str]) -> None:
    """Raise a ValueError if code that was not seen holds a pair: it may read the weight that a copy replaces."""
    for name in sorted(untraced):
        if any(is_inside(pair.conv, name) for pair in pairs):
            raise ValueError(
                f"model: {type(model).__name__} can't be folded for good by its code alone, because "
                f"{name if name == WHOLE_MODEL else f'`{name}`'} can't be traced; give example_inputs=(images,), the "
                "positional arguments of forward"
            )


def _fold_for_good(model: nn.Module, pair: ConvBNPair) -> None:
    """Give the convolution the folded weight and bias, and replace the BatchNorm under each of its names.

    Args:
        model: The copy.
        pair: The pair.
    """
    conv, bn = cast(nn.Conv2d, model.get_submodule(pair.conv)), model.get_submodule(pair.bn)
    if "weight" not in dict(conv.named_parameters(recurse=False)):
        raise ValueError(
            f"model: `{pair.conv}` computes its weight anew in every forward (weight_norm, spectral_norm, pruning); "
            "make it permanent first, by torch.nn.utils.remove_weight_norm, remove_spectral_norm or prune.remove"
        )
    affine = affine_of(bn)
    transposed, groups = bool(getattr(conv, "transposed", False)), int(getattr(conv, "groups", 1))
    spec = ConvSpec((), (), (), transposed, (), groups)
    weight, bias = fold_conv_bn(Operands(conv.weight, conv.bias, *affine), spec)
    gamma, beta = affine.weight, affine.bias
    of_weight = any(tensor is not None and tensor.requires_grad for tensor in (conv.weight, gamma))
    of_bias = any(tensor is not None and tensor.requires_grad for tensor in (conv.bias, gamma, beta))
    conv.weight = nn.Parameter(weight, requires_grad=of_weight)
    conv.bias = nn.Parameter(bias, requires_grad=of_bias or of_weight)
    conv_row, row = conv_layer(conv), norm_layer(bn)
    assert conv_row is not None
    assert row is not None
    layers = _layers_after(bn, row.runs_after)
    if takes_other_dimensions(conv, bn):
        layers.insert(0, dimension_check(conv_row.dims, pair.bn))
    rest = nn.Sequential(*layers) if len(layers) > 1 else layers[0] if layers else nn.Identity()
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module is bn:
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, rest.eval())


def _layers_after(bn: nn.Module, names: Iterable[str]) -> list[nn.Module]:
    """List the layers that a BatchNorm of another library runs after it normalises."""
    layers = [child for name in names if isinstance(child := getattr(bn, name, None), nn.Module)]
    return [layer for layer in layers if not isinstance(layer, nn.Identity)]
