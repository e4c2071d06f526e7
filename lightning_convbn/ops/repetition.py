"""A call of a function of the table, once more: what the backward pass computes again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_convbn.compat import saved_by
from lightning_convbn.ops.autocast import dtype_of_autocast, in_autocast
from lightning_convbn.ops.elementwise import Row
from lightning_convbn.ops.recipes import Source

_HOLE = object()
IMMUTABLE = (bool, int, float, complex, str, torch.dtype, torch.device, torch.layout, torch.memory_format, type(...))
Constants = tuple[list[Any], dict[str, Any]]


class Repetition:
    """A call as a function of its tensors, in the autocast state that it was made in. It holds the fixed tensors alone.

    Args:
        row: The row of the function.
        constants: The arguments, with holes for the tensors.
        parts: How many of the arguments are the parts of a concatenation.
        fixed: What fills each hole; None for what is given later.
        index: Which of several outputs is wanted.
        device: The type of device.
    """

    __slots__ = ("_autocast", "_constants", "_device", "_fixed", "_index", "_parts", "_row")

    def __init__(
        self,
        row: Row,
        constants: Constants,
        parts: int,
        fixed: Sequence[Source | None],
        index: int | None,
        device: str,
    ) -> None:
        self._row, self._constants, self._parts = row, constants, parts
        self._fixed, self._index = fixed, index
        self._device, self._autocast = device, dtype_of_autocast(device)

    @property
    def works_in_place(self) -> bool:
        """Whether it can write over its first tensor."""
        return self._row.in_place is not None

    def __call__(self, *tensors: Tensor, in_place: bool = False) -> Tensor:
        """Call the function again, on these tensors. The first one is written if ``in_place``."""
        function: Any = self._row.in_place if in_place else self._row.compute
        args, kwargs = self._constants
        rest, parts = iter(tensors), self._parts
        holes = iter([next(rest) if source is None else source.value() for source in self._fixed])
        filled = [next(holes) if leaf is _HOLE else leaf for leaf in args]
        named = {name: next(holes) if leaf is _HOLE else leaf for name, leaf in kwargs.items()}
        with in_autocast(self._device, self._autocast):
            given = (filled[:parts], *filled[parts:]) if parts else filled
            output = function(*given, **named)
        return output if self._index is None else output[self._index]  # type: ignore[no-any-return]


def constants_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Constants | None:
    """Return arguments that nobody can change any more, with holes for tensors; None if there is something else."""
    try:
        return [_constant(leaf) for leaf in args], {name: _constant(leaf) for name, leaf in kwargs.items()}
    except TypeError:
        return None


def _constant(argument: Any) -> Any:
    return _HOLE if isinstance(argument, Tensor) else _copied(argument)


def _copied(argument: Any) -> Any:
    """Copy an argument.

    Raises:
        TypeError: If it may be changed later: a tensor in an index, an array.
    """
    if argument is None or isinstance(argument, IMMUTABLE):
        return argument
    if isinstance(argument, (tuple, list)):
        copied = map(_copied, argument)
        return list(copied) if isinstance(argument, list) else tuple(copied)
    if isinstance(argument, slice):
        return slice(_copied(argument.start), _copied(argument.stop), _copied(argument.step))
    raise TypeError(f"{type(argument).__name__} may be changed")


def batch_norm_again(
    output: Tensor,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Callable[[Tensor], Tensor] | None:
    """Return a call of ``F.batch_norm`` with the statistics of the batch as a function of its input.

    It gives the same bits, and writes no running statistics. Autograd has saved the mean and the reciprocal deviation
    of the batch. On a CPU the call for frozen statistics takes these, and goes over the data once in place of twice.
    Its kernel multiplies and adds as the one of Train mode does, if the input is dense and the statistics are not
    rounded to the dtype of the parameters. In all other cases the call itself is made again.

    Args:
        output: ``(N, C, *)``, what the call has returned.
        input: ``(N, C, *)``. This and the following are the arguments of ``F.batch_norm``.
        running_mean: ``(C,)``.
        running_var: ``(C,)``.
        weight: ``(C,)``.
        bias: ``(C,)``.
        training: True.
        momentum: Not used: nothing is written.
        eps: BatchNorm's epsilon.

    Returns:
        None if autograd has not saved the statistics.
    """
    saved = saved_by(output.grad_fn, "result1"), saved_by(output.grad_fn, "result2")
    if saved[0] is None or saved[1] is None:
        return None
    mean, rstd = saved[0].detach(), saved[1].detach()
    gamma, beta = (None if parameter is None else Source(parameter) for parameter in (weight, bias))
    tracks = running_mean is not None

    def again(x: Tensor) -> Tensor:
        scale, shift = (None if source is None else source.value() for source in (gamma, beta))
        if x.device.type == "cpu" and mean.dtype in (torch.float32, torch.float64) and _is_dense(x):
            scale = rstd if scale is None else rstd * scale
            return F.batch_norm(x, mean, torch.ones_like(rstd), scale, shift, False, 0.0, 0.0)
        written = (mean.clone(), rstd.clone()) if tracks else (None, None)  # their dtype counts, not their values
        return F.batch_norm(x, written[0], written[1], scale, shift, True, 0.0, eps)

    return again


def _is_dense(tensor: Tensor) -> bool:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return tensor.is_contiguous() or (
        tensor.dim() in formats and tensor.is_contiguous(memory_format=formats[tensor.dim()])
    )
