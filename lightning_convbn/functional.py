r"""The arithmetic: folding a frozen BatchNorm into the convolution in front of it.

A BatchNorm whose statistics are frozen is an affine map per channel, so for every output channel :math:`c`

.. math::

    w'_c = s_c\, w_c, \qquad
    b'_c = (b_c - \mu_c)\, s_c + \beta_c, \qquad
    s_c = \gamma_c\, r_c, \qquad
    r_c = \frac{1}{\sqrt{\sigma^2_c + \varepsilon}}

give ``conv(x, w', b') == bn(conv(x, w, b))``. With :math:`G = \partial J / \partial w'` and
:math:`g = \partial J / \partial b'` the gradients of the original parameters are

.. math::

    \frac{\partial J}{\partial w_c} = s_c\, G_c, \quad
    \frac{\partial J}{\partial b_c} = s_c\, g_c, \quad
    \frac{\partial J}{\partial \gamma_c} = r_c \bigl(\langle G_c, w_c \rangle + g_c (b_c - \mu_c)\bigr), \quad
    \frac{\partial J}{\partial \beta_c} = g_c .

Shapes: ``b``, ``mu``, ``sigma^2``, ``gamma``, ``beta`` are ``(C_out,)``; ``w`` is ``(C_out, C_in / groups, *k)`` for a
convolution, ``(C_in, C_out / groups, *k)`` for a transposed one and ``(C_out, C_in)`` for a linear layer.

Source: You et al., "Efficient ConvBN Blocks for Transfer Learning and Beyond", ICLR 2024, arXiv 2305.11624, section 3.
The paper's Tune mode lets autograd keep every ``w'``; here the backward pass recomputes it (one elementwise product).
Weight-sized temporaries cost more than their arithmetic, so there is one in each direction, ``w'`` itself.
"""

from __future__ import annotations

from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor, peek_interpreter_stack
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function_unary
from torch.utils.checkpoint import checkpoint

from lightning_convbn.recompute import Recomputed


class ConvSpec(NamedTuple):
    """What a convolution needs beside its tensors, with one entry per spatial dimension in each tuple."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int


def fold_dtype(weight: Tensor) -> torch.dtype:
    """The dtype to fold in: at least float32, because folding in half precision adds 20 to 40 % to the error."""
    return torch.promote_types(torch.float32, weight.dtype)


def fold_conv_bn(
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    *,
    transposed: bool = False,
    groups: int = 1,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Fold frozen BatchNorm statistics and affine parameters into a convolution's weight and bias.

    Args:
        weight: Convolution or linear weight; shapes as in the module's docstring.
        bias: Convolution bias ``(C_out,)``, or None for zero.
        gamma: BatchNorm scale ``(C_out,)``, or None for one.
        beta: BatchNorm shift ``(C_out,)``, or None for zero.
        running_mean: Running mean ``(C_out,)``.
        running_var: Running (biased or not, as stored) variance ``(C_out,)``.
        eps: BatchNorm's epsilon.
        transposed: Whether ``weight`` has the layout of a transposed convolution.
        groups: The convolution's groups; matters for a transposed weight only.
        dtype: Dtype of the results; None for ``weight.dtype``. The product itself is taken in float32 or above.

    Returns:
        The folded weight, shaped as ``weight``, and the folded bias ``(C_out,)``. Autograd sees plain operations.
    """
    mean, rstd = _Statistics(running_mean, running_var, None, eps, fold_dtype(weight)).values()
    return _fold(weight, bias, gamma, beta, mean, rstd, transposed, groups, dtype or weight.dtype)


def conv_bn(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    spec: ConvSpec | None,
) -> Tensor:
    """Compute ``bn(conv(input))`` with frozen statistics as ONE convolution: Tune mode.

    Kept for the backward pass: the input (only if a parameter wants a gradient) and a checksum of the statistics.
    Neither the convolution's output nor the folded weight is kept. The statistics may be written in place before the
    backward pass as long as their values stay the same (``DistributedDataParallel`` does so). Under autocast the
    convolution runs in the autocast dtype and the cast input is what is kept; parameters get gradients of their own
    dtype.

    Args:
        input: ``(N, C_in, *spatial)``, or ``(N, C_in)`` for a linear layer.
        weight: Convolution or linear weight; shapes as in the module's docstring.
        bias: Convolution bias ``(C_out,)``, or None.
        gamma: BatchNorm scale ``(C_out,)``, or None.
        beta: BatchNorm shift ``(C_out,)``, or None.
        running_mean: Running mean ``(C_out,)``.
        running_var: Running variance ``(C_out,)``.
        eps: BatchNorm's epsilon.
        spec: Geometry of the convolution; None for a linear layer.

    Returns:
        The normalised output, ``(N, C_out, *spatial)`` or ``(N, C_out)``.

    Raises:
        RuntimeError: In the backward pass, if the values of the statistics have changed since the forward pass.
    """
    if isinstance(input, Recomputed) and not torch.compiler.is_compiling() and has_torch_function_unary(input):
        # It calls us back, with hooks for what is saved.
        operands = (weight, bias, gamma, beta, running_mean, running_var, eps, spec)
        called_back: Tensor = handle_torch_function(conv_bn, (input,), input, *operands)
        return called_back
    dtype = compute_dtype(input, weight)
    input = _cast(input, weight, dtype)
    if torch.compiler.is_compiling() or forward_ad._current_level >= 0:
        operands = (weight, bias, gamma, beta, running_mean, running_var, eps)
        return _conv(input, *_fold_in_plain_sight(operands, spec, dtype), spec)
    constant = None
    if gamma is not None and not gamma.requires_grad:
        # A constant scale needs no tensor of its own; it may be a buffer (FrozenBatchNorm2d) that DDP writes in place.
        constant, gamma = gamma, None
    statistics = _Statistics(running_mean, running_var, constant, eps, fold_dtype(weight))
    mean, rstd = statistics.values()
    checksum = statistics.lend(mean, rstd) if torch.is_grad_enabled() else None
    borrowed = None if checksum is None else statistics
    function = _ConvBN if peek_interpreter_stack() is None else _TransformableConvBN
    output: Tensor = function.apply(input, weight, bias, gamma, beta, mean, rstd, checksum, spec, dtype, borrowed)
    return output


def folded_conv(input: Tensor, weight: Tensor, bias: Tensor, spec: ConvSpec | None) -> Tensor:
    """Run the one convolution of a folded pair with ``weight`` and ``bias`` from `fold_conv_bn`, which are constant.

    The input is not kept for the backward pass.
    """
    input = _cast(input, weight, weight.dtype)
    if not (input.requires_grad and torch.is_grad_enabled()):
        return _conv(input, weight, bias, spec)
    output: Tensor = _FoldedConv.apply(input, weight, bias, spec)
    return output


def _fold_in_plain_sight(operands: tuple[Any, ...], spec: ConvSpec | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Fold in operations that a compiler, or forward-mode differentiation, can see."""
    transposed, groups = layout(spec)
    fold = partial(fold_conv_bn, transposed=transposed, groups=groups, dtype=dtype)
    if not torch.compiler.is_dynamo_compiling() or not torch.is_grad_enabled():
        return fold(*operands)
    # A compiler merges a product that the backward pass takes again with the forward's, and keeps it. It recomputes
    # what it is told to.
    folded: tuple[Tensor, Tensor] = checkpoint(fold, *operands, use_reentrant=False, preserve_rng_state=False)
    return folded


def compute_dtype(input: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype that the convolution of ``input`` with ``weight`` runs in: autocast's where it applies."""
    if weight.dtype is not torch.float64 and _autocasting(input):
        return torch.get_autocast_dtype(input.device.type)
    return weight.dtype


def _autocasting(input: Tensor) -> bool:
    device = input.device.type
    # Asking whether there is autocast breaks a compiled graph in PyTorch 2.6; devices that compile have it.
    known = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device)
    return known and torch.is_autocast_enabled(device)


def _cast(input: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast ``input`` as autocast would; without autocast a dtype mismatch stays the caller's error."""
    if input.dtype is not torch.float64 and _autocasting(input):
        return input.to(dtype)
    return input


class _Statistics:
    """The statistics of a BatchNorm, times a scale that is constant, for a forward pass and its backward pass.

    They are not copied for the backward pass but read again from the buffers, because copies come to several percent
    of what small images keep. A checksum notices if they have changed by then. Autograd's own check would not do: it
    takes a write of equal values, which ``DistributedDataParallel`` makes in every forward, for a change.
    """

    def __init__(
        self, running_mean: Tensor, running_var: Tensor, scale: Tensor | None, eps: float, dtype: torch.dtype
    ) -> None:
        self._mean, self._var, self._scale, self._eps, self._dtype = running_mean, running_var, scale, eps, dtype

    def values(self) -> tuple[Tensor, Tensor]:
        """The mean, and ``r`` of the equations times the constant scale, in the dtype of the fold."""
        rstd = (self._var.to(self._dtype) + self._eps).rsqrt()
        return self._mean.to(self._dtype), rstd if self._scale is None else rstd * self._scale

    def lend(self, mean: Tensor, rstd: Tensor) -> Tensor | None:
        """Return the checksum of the `values` for `values_of_forward`; None where autograd itself must save them."""
        tensors = [tensor for tensor in (self._mean, self._var, self._scale) if tensor is not None]
        for tensor in tensors:
            if tensor.requires_grad or tensor.is_inference() or is_functorch_wrapped_tensor(tensor):
                return None
        self._tensors = tensors
        self._versions = self._current_versions()
        return self._sum(mean, rstd)

    def values_of_forward(self, checksum: Tensor) -> tuple[Tensor, Tensor]:
        """The same as `values` in the forward pass, which gave ``checksum``."""
        mean, rstd = self.values()
        if self._current_versions() != self._versions and not torch.equal(self._sum(mean, rstd), checksum):
            raise RuntimeError(
                "the running statistics of a folded BatchNorm have changed between a forward and its backward pass "
                "(by a pass in Train mode or by loading weights); run the backward pass first"
            )
        return mean, rstd

    def _current_versions(self) -> tuple[int, ...]:
        return tuple(map(attrgetter("_version"), self._tensors))

    @staticmethod
    def _sum(mean: Tensor, rstd: Tensor) -> Tensor:
        return (mean + rstd).sum()


def layout(spec: ConvSpec | None) -> tuple[bool, int]:
    """Where a weight keeps its output channels: whether it is transposed, and its groups."""
    return (spec.transposed, spec.groups) if spec else (False, 1)


def _fold(
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    transposed: bool,
    groups: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    scale = rstd if gamma is None else gamma * rstd
    center = mean if bias is None else mean - bias
    shift = -center * scale if beta is None else torch.addcmul(beta.to(scale.dtype), center, scale, value=-1)
    return _scaled(weight, scale, transposed, groups).to(dtype), shift.to(dtype)


def _scaled(weight: Tensor, scale: Tensor, transposed: bool, groups: int, *, in_place: bool = False) -> Tensor:
    """``weight`` with every output channel multiplied by ``scale`` ``(C_out,)``, in the wider dtype of the two."""
    multiply = Tensor.mul_ if in_place else Tensor.mul
    if not transposed:
        return multiply(weight, scale.view(-1, *[1] * (weight.dim() - 1)))
    per_channel = scale.view(groups, 1, -1, *[1] * (weight.dim() - 2))
    return multiply(weight.unflatten(0, (groups, -1)), per_channel).flatten(0, 1)


def _channel_dot(a: Tensor, b: Tensor, transposed: bool, groups: int, scratch: Tensor | None) -> Tensor:
    """Sum of ``a * b`` over all but the output channel of two weights: ``(C_out,)``; ``scratch`` is overwritten."""
    product = torch.mul(a, b, out=scratch)
    if not transposed:
        return product.flatten(1).sum(1)
    return product.unflatten(0, (groups, -1)).flatten(3).sum((1, 3)).flatten()


def _conv(input: Tensor, weight: Tensor, bias: Tensor, spec: ConvSpec | None) -> Tensor:
    if spec is None:
        return F.linear(input, weight, bias)
    return torch.convolution(input, weight, bias, *spec)


def _conv_backward(
    grad: Tensor, input: Tensor, weight: Tensor, spec: ConvSpec | None, mask: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of the folded convolution's input, weight and bias, those that ``mask`` asks for."""
    if spec is None:
        return (
            grad @ weight if mask[0] else None,
            grad.t() @ input if mask[1] else None,
            grad.sum(0) if mask[2] else None,
        )
    channels = grad.shape[1]
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None] = torch.ops.aten.convolution_backward.default(
        grad, input, weight, [channels], *spec, mask
    )
    return gradients


class _ConvBN(torch.autograd.Function):
    """The convolution whose backward pass recomputes the folded weight instead of keeping it."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = _forward(*inputs)
        _setup_context(ctx, inputs)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _backward(ctx, grad)


class _TransformableConvBN(torch.autograd.Function):
    """The same for ``torch.func``, which wants the two halves of the forward pass apart.

    It takes as long to call as the arithmetic of a small layer: at every call torch inspects the signature.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        return _forward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _setup_context(ctx, inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _backward(ctx, grad)


def _forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    checksum: Tensor | None,
    spec: ConvSpec | None,
    dtype: torch.dtype,
    borrowed: _Statistics | None,
) -> Tensor:
    return _conv(input, *_fold(weight, bias, gamma, beta, mean, rstd, *layout(spec), dtype), spec)


def _setup_context(ctx: Any, inputs: tuple[Any, ...]) -> None:
    input, weight, bias, gamma, beta, mean, rstd, checksum, spec, dtype, borrowed = inputs
    of_input, of_weight, of_bias, of_gamma, of_beta, of_mean, of_rstd = ctx.needs_input_grad[:7]
    of_scale = of_gamma or of_rstd
    uses_scale = of_input or of_weight or of_bias or of_mean
    ctx.spec, ctx.dtype, ctx.input_shape, ctx.borrowed = spec, dtype, input.shape, borrowed
    ctx.reads_statistics = uses_scale or of_scale
    ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (bias, gamma, beta)]
    ctx.save_for_backward(
        input if of_weight or of_scale else None,
        weight if of_input or of_weight or of_scale else None,
        bias if of_scale else None,
        gamma if uses_scale or of_scale else None,
        mean if of_scale and borrowed is None else None,
        rstd if ctx.reads_statistics and borrowed is None else None,
        checksum if ctx.reads_statistics else None,
    )


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, weight, bias, gamma, mean, rstd, checksum = ctx.saved_tensors
    of_input, of_weight, of_bias, of_gamma, of_beta, of_mean, of_rstd = ctx.needs_input_grad[:7]
    bias_dtype, gamma_dtype, beta_dtype = ctx.dtypes
    spec: ConvSpec | None = ctx.spec
    transposed, groups = layout(spec)
    of_scale = of_gamma or of_rstd
    if ctx.borrowed is not None and ctx.reads_statistics:
        mean, rstd = ctx.borrowed.values_of_forward(checksum)

    scale = rstd if gamma is None else gamma * rstd
    folded: Tensor | None = None
    if weight is not None:
        # Its values matter to the gradient of the input alone; the others need no more than its shape.
        folded = (_scaled(weight, scale, transposed, groups) if of_input else weight).to(ctx.dtype)
    if input is None:
        input = _only_a_shape(ctx.input_shape, grad)
    grad_input: Tensor | None = None
    grad_folded: Tensor | None = None
    grad_shift: Tensor | None
    mask = (of_input, of_weight or of_scale, of_bias or of_beta or of_mean or of_scale)
    if folded is None:
        grad_shift = grad.sum([dim for dim in range(grad.dim()) if dim != 1])
    else:
        grad_input, grad_folded, grad_shift = _conv_backward(grad, input, folded, spec, mask)

    grad_weight = grad_bias = grad_gamma = grad_beta = grad_mean = grad_rstd = None
    if grad_shift is not None:
        grad_shift = grad_shift.to(torch.promote_types(torch.float32, grad_shift.dtype))
        grad_bias = (grad_shift * scale).to(bias_dtype) if of_bias else None
        grad_beta = grad_shift.to(beta_dtype) if of_beta else None
        grad_mean = -grad_shift * scale if of_mean else None
    if grad_folded is not None:
        grad_folded = grad_folded.to(rstd.dtype)
        # What is ours alone may be overwritten, unless this pass is differentiated or batched in its turn.
        ours = peek_interpreter_stack() is None and not torch.is_grad_enabled()
        if of_scale and grad_shift is not None:
            alike = folded is not None and of_input and folded.dtype is grad_folded.dtype is weight.dtype
            dot = _channel_dot(grad_folded, weight, transposed, groups, folded if ours and alike else None)
            grad_scale = torch.addcmul(dot, grad_shift, mean if bias is None else mean - bias, value=-1)
            grad_gamma = (grad_scale * rstd).to(gamma_dtype) if of_gamma else None
            grad_rstd = grad_scale * (1 if gamma is None else gamma) if of_rstd else None
        if of_weight:
            grad_weight = _scaled(grad_folded, scale, transposed, groups, in_place=ours).to(weight.dtype)
    return grad_input, grad_weight, grad_bias, grad_gamma, grad_beta, grad_mean, grad_rstd, None, None, None, None


class _FoldedConv(torch.autograd.Function):
    """The convolution with a constant weight and bias, which keeps no input for its backward pass."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor, spec: ConvSpec | None) -> Tensor:
        ctx.spec, ctx.input_shape = spec, input.shape
        ctx.save_for_backward(weight)
        return _conv(input, weight, bias, spec)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None]:
        (weight,) = ctx.saved_tensors
        input = _only_a_shape(ctx.input_shape, grad)
        return _conv_backward(grad, input, weight, ctx.spec, (True, False, False))[0], None, None, None


def _only_a_shape(shape: torch.Size, like: Tensor) -> Tensor:
    """Stand in for the input of a convolution whose backward pass reads no more of it than its shape."""
    return like.new_empty(1).expand(shape)
