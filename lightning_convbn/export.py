"""Deploy mode for good: a standalone copy of a model with every paired BatchNorm folded away."""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import nn

from lightning_convbn import reasons
from lightning_convbn.functional import fold_conv_bn
from lightning_convbn.layers import affine_of, norm_layer
from lightning_convbn.modes import set_mode
from lightning_convbn.pairs import ConvBNPair, ConvBNPairs, find_conv_bn_pairs, pairs_in_force


def fuse_for_deploy(model: nn.Module, *, pairs: ConvBNPairs | None = None) -> nn.Module:
    """Return a copy of a model, in eval state, whose paired BatchNorms are folded into their convolutions for good.

    The copy consists of plain layers: convolutions with a bias, and ``nn.Identity`` where a BatchNorm was folded; it
    needs torch alone to load and run. A parameter of the copy wants a gradient if one of those it was made of does. The
    original is not touched, whatever mode it is in.

    Args:
        model: Any module, plain or converted by `set_mode`.
        pairs: What to fold; None for what `find_conv_bn_pairs` finds in the eval state, in a converted model without
            what is not in force there.

    Raises:
        ValueError: If ``pairs`` does not fit the model, or if a convolution has no weight of its own (weight_norm).

    Source: "Deploy mode" of arXiv 2305.11624, section 2.

    Example:
        >>> from torch import nn
        >>> fuse_for_deploy(nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)))
        Sequential(
          (0): Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
          (1): Identity()
        )
    """
    in_force = pairs_in_force(model)
    fused = copy.deepcopy(model)
    set_mode(fused, "train")
    fused.eval()
    if pairs is None:
        pairs = find_conv_bn_pairs(fused)
        if in_force is not None:  # proven for the state that the model was converted in, which need not be eval
            pairs = pairs.unfold({pair.bn: reasons.NOT_GIVEN for pair in pairs if pair not in in_force})
    if len(pairs):
        with torch.no_grad():
            set_mode(fused, "eval", pairs=pairs)  # checks the pairs
            set_mode(fused, "train")
            for pair in pairs:
                _fold_for_good(fused, pair)
    return fused


def _fold_for_good(model: nn.Module, pair: ConvBNPair) -> None:
    conv, bn = cast(nn.Conv2d, model.get_submodule(pair.conv)), model.get_submodule(pair.bn)
    if "weight" not in conv._parameters:
        raise ValueError(
            f"model: `{pair.conv}` computes its weight anew in every forward (weight_norm, spectral_norm, pruning); "
            "make it permanent first, by torch.nn.utils.remove_weight_norm, remove_spectral_norm or prune.remove"
        )
    affine = affine_of(bn)
    weight, bias = fold_conv_bn(
        conv.weight,
        conv.bias,
        *affine,
        transposed=bool(getattr(conv, "transposed", False)),
        groups=int(getattr(conv, "groups", 1)),
    )
    gamma, beta = affine.weight, affine.bias
    of_weight = any(tensor is not None and tensor.requires_grad for tensor in (conv.weight, gamma))
    of_bias = any(tensor is not None and tensor.requires_grad for tensor in (conv.bias, gamma, beta))
    conv.weight = nn.Parameter(weight, requires_grad=of_weight)
    conv.bias = nn.Parameter(bias, requires_grad=of_bias or of_weight)
    row = norm_layer(bn)
    assert row is not None
    kept = [child for name in row.runs_after if isinstance(child := getattr(bn, name, None), nn.Module)]
    kept = [child for child in kept if not isinstance(child, nn.Identity)]
    rest: nn.Module = nn.Identity() if not kept else kept[0] if len(kept) == 1 else nn.Sequential(*kept)
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module is bn:
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, rest.eval())
