"""The table of supported layers. To add one, write a row here, and for another padding a function in `geometry.py`.

A layer counts as that of a row if its class has the row's forward, its own or an inherited one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from lightning_convbn.compat import has_statistics
from lightning_convbn.layers import geometry
from lightning_convbn.layers.geometry import Geometry

Row = TypeVar("Row", "ConvLayer", "NormLayer")
(BatchNorm,) = nn.BatchNorm2d.__bases__  # what BatchNorms of all dimensions derive from, those of other packages too


@dataclass(frozen=True)
class ConvLayer:
    """A row of a convolution.

    Attributes:
        dims: Dimensions of a batched input. Any other input runs unfolded.
        geometry: Its geometry in a call.
    """

    dims: int
    geometry: Geometry = geometry.of_conv


@dataclass(frozen=True)
class NormLayer:
    """A row of a BatchNorm.

    Attributes:
        dims: Dimensions that an input may have.
        runs_after: The children of the BatchNorm that run on what is normalised, in their order.
        scales: Whether its forward multiplies and adds. ``F.batch_norm`` gives other bits.
    """

    dims: frozenset[int]
    runs_after: tuple[str, ...] = ()
    scales: bool = False


_IMAGES, _ANY = frozenset({4}), frozenset({2, 3, 4, 5})
_SAME, _STATIC_SAME = ConvLayer(4, geometry.of_same), ConvLayer(4, geometry.of_static_same)
_DROP_AND_ACT = ("drop", "act")
FROZEN = NormLayer(_IMAGES, scales=True)
"""The row of ``FrozenBatchNorm2d``, of whatever package: there are as many of them as detectors."""

# Keys are classes, or their qualified names where importing a package just to name its class would be too much.
CONV_LAYERS: dict[type[nn.Module] | str, ConvLayer] = {
    nn.Conv1d: ConvLayer(3),
    nn.Conv2d: ConvLayer(4),
    nn.Conv3d: ConvLayer(5),
    nn.ConvTranspose1d: ConvLayer(3, geometry.of_transposed),
    nn.ConvTranspose2d: ConvLayer(4, geometry.of_transposed),
    nn.ConvTranspose3d: ConvLayer(5, geometry.of_transposed),
    nn.Linear: ConvLayer(2, geometry.of_linear),
    "timm.layers.conv2d_same.Conv2dSame": _SAME,
    "efficientnet_pytorch.utils.Conv2dDynamicSamePadding": _SAME,
    "efficientnet_pytorch.utils.Conv2dStaticSamePadding": _STATIC_SAME,
    "efficientnet_lite_pytorch.utils.Conv2dDynamicSamePadding": _SAME,
    "efficientnet_lite_pytorch.utils.Conv2dStaticSamePadding": _STATIC_SAME,
    "segmentation_models_pytorch.encoders._efficientnet.Conv2dDynamicSamePadding": _SAME,
    "segmentation_models_pytorch.encoders._efficientnet.Conv2dStaticSamePadding": _STATIC_SAME,
}
NORM_LAYERS: dict[type[nn.Module] | str, NormLayer] = {
    nn.BatchNorm1d: NormLayer(frozenset({2, 3})),
    nn.BatchNorm2d: NormLayer(_IMAGES),
    nn.BatchNorm3d: NormLayer(frozenset({5})),
    nn.SyncBatchNorm: NormLayer(_ANY),
    BatchNorm: NormLayer(_ANY),  # such as Lightning's, which `sync_batchnorm=True` leaves behind
    "timm.layers.norm_act.BatchNormAct2d": NormLayer(_IMAGES, _DROP_AND_ACT),
    "timm.layers.norm_act.SyncBatchNormAct": NormLayer(_IMAGES, _DROP_AND_ACT),
    "timm.layers.norm_act.FrozenBatchNormAct2d": NormLayer(_IMAGES, _DROP_AND_ACT, scales=True),
}

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)
_LAYERS = (*CONVOLUTIONS, BatchNorm)
_COMPUTES = ("forward", "_conv_forward", "_output_padding", "__call__")  # the methods that say what a layer computes


def conv_layer(module: nn.Module) -> ConvLayer | None:
    """The table's row of a convolution; None for any other module."""
    return _row_of(CONV_LAYERS, module)


def norm_layer(module: nn.Module) -> NormLayer | None:
    """The table's row of a BatchNorm; None for any other module.

    A ``FrozenBatchNorm2d`` of any package is recognised by its buffers.
    """
    row = _row_of(NORM_LAYERS, module)
    if row is None and type(module).__name__.endswith("FrozenBatchNorm2d"):
        buffers = {name for name, _ in module.named_buffers(recurse=False)}
        if buffers >= {"weight", "bias", "running_mean", "running_var"}:
            return FROZEN
    return row


def _row_of(table: Mapping[Any, Row], module: nn.Module) -> Row | None:
    """The row of the first class, from a module's own to its base classes, that is in the table; None if it differs."""
    cls = type(module)
    for base in cls.__mro__:
        row = table.get(base) or table.get(f"{base.__module__}.{base.__qualname__}")
        if row is not None:
            same = all(getattr(cls, name, None) is getattr(base, name, None) for name in _COMPUTES)
            return row if same else None
    return None


def takes_other_dimensions(conv: nn.Module, bn: nn.Module) -> bool:
    """Whether the BatchNorm of a pair takes inputs of dimensions for which a fold of the pair is wrong, too.

    ``BatchNorm1d`` takes two or three, and normalises the second. A linear layer has its channels in the last.
    """
    conv_row, norm_row = conv_layer(conv), norm_layer(bn)
    return conv_row is None or norm_row is None or norm_row.dims != {conv_row.dims}


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a BatchNorm, supported or not: by its class, or by the running statistics that it has.

    A network with statistics of its own, which holds layers, is none.
    """
    if isinstance(module, BatchNorm):
        return True
    return has_statistics(module) and not holds_layers(module)


def holds_layers(module: nn.Module) -> bool:
    """Whether there are convolutions, linear layers or BatchNorms inside of a module."""
    return any(inside is not module and isinstance(inside, _LAYERS) for inside in module.modules())


def is_scripted_norm(module: nn.Module) -> bool:
    """Whether a module is a BatchNorm in TorchScript, except one that is always frozen. It has lost its own class."""
    if not isinstance(module, torch.jit.ScriptModule):
        return False
    name = str(getattr(module, "original_name", ""))
    buffers = {name for name, _ in module.named_buffers(recurse=False)}
    return buffers >= {"running_mean", "running_var"} and "InstanceNorm" not in name and "Frozen" not in name
