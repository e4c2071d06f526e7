"""The classes that a BatchNorm is swapped to: frozen at its running statistics, or folded into its convolution."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_convbn.compat import read
from lightning_convbn.layers.marks import Marked, is_normalised, taken_off, unmarked
from lightning_convbn.layers.swap import Converted, Recompute, class_name, run_plain, swap_of
from lightning_convbn.ops.recomputable import follow, follow_function

EPSILON = 1e-5  # of a BatchNorm without the attribute: DETR's in transformers has it in its forward


class Affine(NamedTuple):
    """The tensors of a frozen BatchNorm, each ``(C,)``; ``weight`` and ``bias`` may be None."""

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor
    running_var: Tensor
    eps: float


def affine_of(bn: nn.Module) -> Affine:
    """Read the affine map of a BatchNorm with running statistics."""
    affine = read(bn, "weight"), read(bn, "bias")
    return Affine(*affine, read(bn, "running_mean"), read(bn, "running_var"), getattr(bn, "eps", EPSILON))


def frozen_batch_norm(bn: nn.Module, input: Tensor, *, followed: bool = False) -> Tensor:
    """Normalise with the running statistics, whatever the module's training flag says.

    Raises:
        ValueError: If the BatchNorm does not take inputs of so many dimensions.
    """
    dims = getattr(bn, "dims", None)
    if dims is not None and input.dim() not in dims:
        wanted = " or ".join(f"{dim}D" for dim in sorted(dims))
        raise ValueError(f"{class_name(bn)}: expected {wanted} input (got {input.dim()}D input)")
    weight, bias, mean, var, eps = affine_of(bn)
    arguments = input, mean, var, weight, bias, False, 0.0, eps
    return follow_function(F.batch_norm, *arguments) if followed else F.batch_norm(*arguments)


class FrozenNorm(Converted):
    """Base of the classes of a frozen BatchNorm: its running statistics are used, and they stay what they are."""

    _uses_running_statistics = True
    _recompute: Recompute = "none"  # what may be computed again of what is made of the output

    def reset_running_stats(self) -> None:
        """Refuse: no forward pass would fill the statistics again.

        Raises:
            RuntimeError: Always.
        """
        swap = swap_of(self)
        mode = "eval" if swap is None else swap.mode
        raise RuntimeError(
            f"reset_running_stats: this {class_name(self)} is frozen, because set_mode or ConvBNModeCallback has put "
            f"its model in {mode!r} mode. No forward pass would fill its statistics again, as update_bn of "
            'torch.optim.swa_utils expects. Call set_mode(model, "train") first, or use a copy.deepcopy: it is plain'
        )


class EvalNorm(FrozenNorm):
    """A BatchNorm frozen at its running statistics for good."""

    dims: frozenset[int]  # dimensions that an input may have

    def forward(self, input: Tensor) -> Tensor:
        """Normalise; the training flag is not read and no buffer is written."""
        return (
            frozen_batch_norm(self, input, followed=self._recompute != "none")
            if swap_of(self) is not None
            else run_plain(self, input)
        )


class UnknownNorm(FrozenNorm):
    """A BatchNorm of a class that is not in the table, frozen: it runs as in its own eval state."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run with the training flag at False. Afterwards the flag is as it was, for whoever set it."""
        training, self.training = self.training, False
        try:
            return super().__call__(*args, **kwargs)
        finally:
            self.training = training


@cache
def unknown_norm(plain: type[Any]) -> type[FrozenNorm]:
    """Return the class that freezes a BatchNorm of a class that is not in the table, or that is always frozen."""
    return type(f"Eval{plain.__name__}", (UnknownNorm, plain), {"__module__": __name__, "__doc__": UnknownNorm.__doc__})


class FoldedNorm(FrozenNorm):
    """A BatchNorm whose work is done by the convolution in front of it."""

    dims: frozenset[int]  # dimensions that an input may have

    def forward(self, input: Tensor) -> Tensor:
        """Return the folded output behind the mark of its convolution. Anything else is normalised."""
        check = vars(self).get("_check")  # while the pair is verified
        folded = taken_off(input, self) if isinstance(input, Marked) else None
        if folded is not None:
            output = folded if check is None else check.compare(self, folded, input)
            return output if self._recompute == "none" else follow(output, frozen=not input._call.is_trained())  # type: ignore[attr-defined]
        swap = swap_of(self)
        if swap is None:
            return run_plain(self, input)  # type: ignore[no-any-return]
        if swap.conv is not None and is_normalised(input, swap.conv[0], self):
            return input.contiguous() if swap.reshaped else input
        if check is not None:
            check.note_plain(self)
        return frozen_batch_norm(self, unmarked(input), followed=self._recompute != "none")


class Rows:
    """Mixin of the BatchNorms that take ``(N, C)`` or ``(N, C, L)``."""

    dims = frozenset({2, 3})


class Images:
    """Mixin of the BatchNorms that take ``(N, C, H, W)``."""

    dims = frozenset({4})


class Volumes:
    """Mixin of the BatchNorms that take ``(N, C, D, H, W)``."""

    dims = frozenset({5})


class AnyBatch:
    """Mixin of the BatchNorms that take any batch of channels."""

    dims = frozenset({2, 3, 4, 5})


class EvalBatchNorm1d(EvalNorm, Rows, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d`, frozen."""


class EvalBatchNorm2d(EvalNorm, Images, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d`, frozen."""


class EvalBatchNorm3d(EvalNorm, Volumes, nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d`, frozen."""


class EvalSyncBatchNorm(EvalNorm, AnyBatch, nn.SyncBatchNorm):
    """`torch.nn.SyncBatchNorm`, frozen: nothing is left to synchronise."""


class FoldedBatchNorm1d(FoldedNorm, Rows, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d`, folded into its convolution."""


class FoldedBatchNorm2d(FoldedNorm, Images, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d`, folded into its convolution."""


class FoldedBatchNorm3d(FoldedNorm, Volumes, nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d`, folded into its convolution."""


class FoldedSyncBatchNorm(FoldedNorm, AnyBatch, nn.SyncBatchNorm):
    """`torch.nn.SyncBatchNorm`, folded into its convolution."""
