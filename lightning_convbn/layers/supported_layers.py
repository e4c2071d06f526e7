"""The table of supported layers: what a convolution or a BatchNorm becomes in each mode.

To add a layer, write its classes (as in `third_party_classes.py`) and a row here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from lightning_convbn.layers import norms, third_party_classes, torch_convolutions
from lightning_convbn.layers.convolutions import Deploy, Tune
from lightning_convbn.layers.norms import EvalNorm, FoldedNorm
from lightning_convbn.layers.swap import plain_class

Row = TypeVar("Row")
(BatchNorm,) = nn.BatchNorm2d.__bases__  # what BatchNorms of all dimensions derive from, those of other packages too


@dataclass(frozen=True)
class ConvLayer:
    """A row: what a plain convolution becomes."""

    tune: type[Tune]
    deploy: type[Deploy]

    @property
    def dims(self) -> int:
        """Dimensions of a batched input."""
        return self.tune.dims


@dataclass(frozen=True)
class NormLayer:
    """A row: what a plain BatchNorm becomes.

    ``eval`` is None for a BatchNorm that is always frozen: it stays what it is. ``runs_after`` names those children of
    the BatchNorm that run on what is normalised, in their order.
    """

    eval: type[EvalNorm] | None
    folded: type[FoldedNorm]
    runs_after: tuple[str, ...] = ()

    @property
    def dims(self) -> frozenset[int]:
        """Dimensions that an input may have."""
        return self.folded.dims


# Keys are exact classes, or their qualified names where importing a package just to name its class would be too much.
_CONV3D = ConvLayer(torch_convolutions.TuneConv3d, torch_convolutions.DeployConv3d)
_SAME = ConvLayer(third_party_classes.TuneConv2dSame, third_party_classes.DeployConv2dSame)
_STATIC_SAME = ConvLayer(third_party_classes.TuneConv2dStaticSame, third_party_classes.DeployConv2dStaticSame)
CONV_LAYERS: dict[type[nn.Module] | str, ConvLayer] = {
    nn.Conv1d: ConvLayer(torch_convolutions.TuneConv1d, torch_convolutions.DeployConv1d),
    nn.Conv2d: ConvLayer(torch_convolutions.TuneConv2d, torch_convolutions.DeployConv2d),
    nn.Conv3d: _CONV3D,
    nn.ConvTranspose1d: ConvLayer(torch_convolutions.TuneConvTranspose1d, torch_convolutions.DeployConvTranspose1d),
    nn.ConvTranspose2d: ConvLayer(torch_convolutions.TuneConvTranspose2d, torch_convolutions.DeployConvTranspose2d),
    nn.ConvTranspose3d: ConvLayer(torch_convolutions.TuneConvTranspose3d, torch_convolutions.DeployConvTranspose3d),
    nn.Linear: ConvLayer(torch_convolutions.TuneLinear, torch_convolutions.DeployLinear),
    # These two choose the arguments of Conv3d and change nothing else.
    "torchvision.models.video.resnet.Conv3DSimple": _CONV3D,
    "torchvision.models.video.resnet.Conv3DNoTemporal": _CONV3D,
    "timm.layers.conv2d_same.Conv2dSame": _SAME,
    "efficientnet_pytorch.utils.Conv2dDynamicSamePadding": _SAME,
    "efficientnet_pytorch.utils.Conv2dStaticSamePadding": _STATIC_SAME,
    "efficientnet_lite_pytorch.utils.Conv2dDynamicSamePadding": _SAME,
    "efficientnet_lite_pytorch.utils.Conv2dStaticSamePadding": _STATIC_SAME,
    "segmentation_models_pytorch.encoders._efficientnet.Conv2dDynamicSamePadding": _SAME,
    "segmentation_models_pytorch.encoders._efficientnet.Conv2dStaticSamePadding": _STATIC_SAME,
}

FROZEN = "FrozenBatchNorm2d"  # the row of every class of this name, of whatever package
_DROP_AND_ACT = third_party_classes.DROP_AND_ACT
_LIGHTNING = NormLayer(third_party_classes.EvalBatchNormXd, third_party_classes.FoldedBatchNormXd)
NORM_LAYERS: dict[type[nn.Module] | str, NormLayer] = {
    nn.BatchNorm1d: NormLayer(norms.EvalBatchNorm1d, norms.FoldedBatchNorm1d),
    nn.BatchNorm2d: NormLayer(norms.EvalBatchNorm2d, norms.FoldedBatchNorm2d),
    nn.BatchNorm3d: NormLayer(norms.EvalBatchNorm3d, norms.FoldedBatchNorm3d),
    nn.SyncBatchNorm: NormLayer(norms.EvalSyncBatchNorm, norms.FoldedSyncBatchNorm),
    "timm.layers.norm_act.BatchNormAct2d": NormLayer(
        third_party_classes.EvalBatchNormAct2d, third_party_classes.FoldedBatchNormAct2d, _DROP_AND_ACT
    ),
    "timm.layers.norm_act.SyncBatchNormAct": NormLayer(
        third_party_classes.EvalSyncBatchNormAct, third_party_classes.FoldedSyncBatchNormAct, _DROP_AND_ACT
    ),
    "timm.layers.norm_act.FrozenBatchNormAct2d": NormLayer(
        None, third_party_classes.FoldedFrozenBatchNormAct2d, _DROP_AND_ACT
    ),
    "lightning.pytorch.plugins.layer_sync._BatchNormXd": _LIGHTNING,
    "pytorch_lightning.plugins.layer_sync._BatchNormXd": _LIGHTNING,
    FROZEN: NormLayer(None, third_party_classes.FoldedFrozenBatchNorm2d),
}


def row_of(table: Mapping[type[nn.Module] | str, Row], module: nn.Module) -> Row | None:
    """A table's row of the exact class of a module as it was found: a subclass may compute something else."""
    cls = plain_class(module)
    return table.get(cls) or table.get(f"{cls.__module__}.{cls.__qualname__}")


def conv_layer(module: nn.Module) -> ConvLayer | None:
    """The table's row of a convolution; None for any other module."""
    return row_of(CONV_LAYERS, module)


def norm_layer(module: nn.Module) -> NormLayer | None:
    """The table's row of a BatchNorm; None for any other module.

    A ``FrozenBatchNorm2d`` of any package is recognised by its buffers: there are as many of them as detectors.
    """
    row = row_of(NORM_LAYERS, module)
    if row is None and plain_class(module).__name__.endswith("FrozenBatchNorm2d"):
        buffers = {name for name, _ in module.named_buffers(recurse=False)}
        if buffers >= {"weight", "bias", "running_mean", "running_var"}:
            return NORM_LAYERS[FROZEN]
    return row


def takes_other_dimensions(conv: nn.Module, bn: nn.Module) -> bool:
    """Whether the BatchNorm of a pair takes inputs of dimensions for which a fold of the pair is wrong, too.

    ``BatchNorm1d`` takes two or three, and normalises the second. A linear layer has its channels in the last.
    """
    conv_row, norm_row = conv_layer(conv), norm_layer(bn)
    return conv_row is None or norm_row is None or norm_row.dims != {conv_row.dims}


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a BatchNorm, supported or not."""
    return isinstance(module, BatchNorm) or norm_layer(module) is not None


def is_scripted_norm(module: nn.Module) -> bool:
    """Whether a module is a BatchNorm in TorchScript, except one that is always frozen. It has lost its own class."""
    if not isinstance(module, torch.jit.ScriptModule):
        return False
    name = str(getattr(module, "original_name", ""))
    buffers = {name for name, _ in module.named_buffers(recurse=False)}
    return buffers >= {"running_mean", "running_var"} and "InstanceNorm" not in name and "Frozen" not in name
