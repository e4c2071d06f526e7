"""The classes for convolutions and BatchNorms of other packages, which the table names without importing them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_convbn.compat import load_as
from lightning_convbn.layers.convolutions import ConvGeometry, Deploy, Tune
from lightning_convbn.layers.norms import AnyBatch, EvalNorm, FoldedNorm, Images
from lightning_convbn.layers.swap import plain_class
from lightning_convbn.ops.fold import ConvSpec


class SameGeometry(ConvGeometry):
    """TensorFlow's SAME padding, by the size of the input: ``Conv2dSame``, ``Conv2dDynamicSamePadding``."""

    def geometry(self, input: Tensor, output_size: Sequence[int] | None) -> tuple[Tensor, ConvSpec | None]:
        """Pad so that an output has ``ceil(size / stride)`` elements; what is uneven goes to the end."""
        conv = cast(nn.Conv2d, self)
        padding: list[int] = []
        sizes = zip(input.shape[2:], conv.kernel_size, conv.stride, conv.dilation, strict=True)
        for size, kernel, stride, dilation in reversed(list(sizes)):
            total = max((-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
            padding += [total // 2, total - total // 2]
        if any(padding):
            input = F.pad(input, padding)
        zeros = (0,) * len(conv.stride)
        return input, ConvSpec(conv.stride, zeros, conv.dilation, False, zeros, conv.groups)


class StaticSameGeometry(ConvGeometry):
    """SAME padding for a size known beforehand, by a module: ``Conv2dStaticSamePadding``."""

    def geometry(self, input: Tensor, output_size: Sequence[int] | None) -> tuple[Tensor, ConvSpec | None]:
        """Pad by ``static_padding``, then as an ordinary convolution does."""
        pad = cast(nn.Module, cast(Any, self).static_padding)
        return super().geometry(pad(input), output_size)


class TuneConv2dSame(Tune, SameGeometry, nn.Conv2d):
    """A convolution with SAME padding, with its BatchNorm folded on the fly."""

    dims = 4


class DeployConv2dSame(Deploy, SameGeometry, nn.Conv2d):
    """A convolution with SAME padding, with its BatchNorm folded once."""

    dims = 4


class TuneConv2dStaticSame(Tune, StaticSameGeometry, nn.Conv2d):
    """A convolution with static SAME padding, with its BatchNorm folded on the fly."""

    dims = 4


class DeployConv2dStaticSame(Deploy, StaticSameGeometry, nn.Conv2d):
    """A convolution with static SAME padding, with its BatchNorm folded once."""

    dims = 4


DROP_AND_ACT = ("drop", "act")


def activated(bn: nn.Module, input: Tensor) -> Tensor:
    """Run what timm's BatchNorms hold beside the normalisation: drop and activation."""
    for name in DROP_AND_ACT:
        module = getattr(bn, name, None)
        if module is not None:
            input = module(input)
    return input


class EvalNormAct(EvalNorm):
    """A frozen BatchNorm with an activation."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise, drop, activate."""
        return activated(self, super().forward(input))


class FoldedNormAct(FoldedNorm):
    """A folded BatchNorm with an activation."""

    def forward(self, input: Tensor) -> Tensor:
        """Drop and activate what the folded convolution has normalised."""
        return activated(self, super().forward(input))


class EvalBatchNormAct2d(EvalNormAct, Images, nn.BatchNorm2d):
    """timm's ``BatchNormAct2d``, frozen."""


class FoldedBatchNormAct2d(FoldedNormAct, Images, nn.BatchNorm2d):
    """timm's ``BatchNormAct2d``, folded into its convolution but for its drop and activation."""


class EvalSyncBatchNormAct(EvalNormAct, Images, nn.SyncBatchNorm):
    """timm's ``SyncBatchNormAct``, frozen."""


class FoldedSyncBatchNormAct(FoldedNormAct, Images, nn.SyncBatchNorm):
    """timm's ``SyncBatchNormAct``, folded into its convolution but for its drop and activation."""


class FoldedFrozenBatchNorm2d(FoldedNorm, Images):
    """A ``FrozenBatchNorm2d``, folded into its convolution. Its affine map, in buffers, stays untrained."""

    def _load_from_state_dict(self, *args: Any) -> None:
        # These classes load checkpoints of BatchNorm2d, which have a key too many, by a method of their own.
        load_as(plain_class(self), self, *args)


class FoldedFrozenBatchNormAct2d(FoldedNormAct, FoldedFrozenBatchNorm2d):
    """timm's ``FrozenBatchNormAct2d``, folded into its convolution but for its drop and activation."""


class EvalBatchNormXd(EvalNorm, AnyBatch, nn.SyncBatchNorm):
    """Lightning's ``_BatchNormXd``, which ``sync_batchnorm=True`` leaves behind, frozen."""


class FoldedBatchNormXd(FoldedNorm, AnyBatch, nn.SyncBatchNorm):
    """Lightning's ``_BatchNormXd``, folded into its convolution."""
