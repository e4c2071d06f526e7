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
The paper's Tune mode lets autograd keep every ``w'``; here the backward pass recomputes it (one elementwise product) in
one of two ways. As a rule `_conv_bn_by_autograd` folds in plain operations and has the convolution's node forget
``w'``: the least Python. Where that would keep too much, go through a large weight too often, or be in the way of
others, `_ConvBN` is the convolution with a backward pass of its own: the fewest values to keep and to go through.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function, has_torch_function_unary
from torch.utils.checkpoint import checkpoint

from lightning_convbn.ops.recompute import Recomputed, Saved, others_hook, save_recipe, saving_recipes

# PyTorch 2.6 does not tell whether it compiles or exports, and what is exported can't be recomputed.
_is_exporting = getattr(torch.compiler, "is_exporting", lambda: True)
_PROXY = torch._C._TorchDispatchModeKey.PROXY
_CONV_BACKWARD = torch.ops.aten.convolution_backward.default
LARGE = 2**16  # values from which on a temporary of a weight's size costs more than a few calls
BEYOND_CACHE = 2**18  # values from which on going through a weight once more costs more than Python does
MANY = 32  # so many values of the input may be kept together with one of the scale


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
    mean, rstd = running_mean.to(fold_dtype(weight)), _rstd(running_var, eps, fold_dtype(weight))
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
    constants: Constants | None = None,
) -> Tensor:
    """Compute ``bn(conv(input))`` with frozen statistics as ONE convolution: Tune mode.

    Kept for the backward pass: the input (only if a parameter wants a gradient), the constants and, where it is next to
    nothing beside the input, the scale. Neither the convolution's output nor the folded weight is kept. The statistics
    may be written before the backward pass, which goes by what they were (``DistributedDataParallel`` writes them in
    every forward). Under autocast the convolution runs in the autocast dtype and the cast input is what is kept;
    parameters get gradients of their own dtype.

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
        constants: Those of these statistics, with ``gamma`` if it wants no gradient, if somebody keeps them; None while
            anything traces, transforms, or differentiates forwards.

    Returns:
        The normalised output, ``(N, C_out, *spatial)`` or ``(N, C_out)``.
    """
    if isinstance(input, Recomputed) and not torch.compiler.is_compiling() and has_torch_function_unary(input):
        operands = (weight, bias, gamma, beta, running_mean, running_var, eps, spec, constants)
        if has_torch_function(operands):  # another subclass of Tensor has its say
            handled: Tensor = handle_torch_function(conv_bn, (input, *operands[:6]), input, *operands)
            return handled
        with torch._C.DisableTorchFunctionSubclass():
            return conv_bn(input, *operands)
    if constants is None and is_watched():
        dtype = compute_dtype(input, weight)
        folded = _fold_in_plain_sight((weight, bias, gamma, beta, running_mean, running_var, eps), spec, dtype)
        with saving_recipes(input):
            return _conv(_cast(input, dtype), *folded, spec)
    dtype = weight.dtype
    if torch._C._is_any_autocast_enabled():
        dtype = compute_dtype(input, weight)
        input = _cast(input, dtype)
    scale = None if gamma is None or gamma.requires_grad else gamma  # may be a buffer (FrozenBatchNorm2d)
    plain = constants is not None
    if constants is None:
        constants = constants_of(running_mean, running_var, scale, eps, fold_dtype(weight))
        plain = peek_interpreter_stack() is None and not (constants.mean.requires_grad or constants.rstd.requires_grad)
    if scale is not None:
        gamma = None
    large = weight.numel() >= BEYOND_CACHE and dtype is weight.dtype is constants.rstd.dtype
    smaller = large and _is_output_smaller(input, weight, spec)
    if plain and not smaller and _suits_autograd(input, weight, bias, gamma, spec):
        return _conv_bn_by_autograd(input, weight, gamma, beta, constants, spec, dtype)
    with saving_recipes(input):
        output: Tensor
        if plain:
            output = _ConvBN.apply(input, weight, bias, gamma, beta, constants, (spec, dtype, smaller))
        else:
            output = _TransformableConvBN.apply(input, weight, bias, gamma, beta, *constants, (spec, dtype))
        return output


def folded_conv(input: Tensor, weight: Tensor, bias: Tensor, spec: ConvSpec | None) -> Tensor:
    """Run the one convolution of a folded pair with ``weight`` and ``bias`` from `fold_conv_bn`, which are constant.

    The input is not kept for the backward pass.
    """
    input = _cast(input, weight.dtype)
    if not (input.requires_grad and torch.is_grad_enabled()):
        return _conv(input, weight, bias, spec)
    output: Tensor = _FoldedConv.apply(input, weight, bias, spec)
    return output


def _fold_in_plain_sight(operands: tuple[Any, ...], spec: ConvSpec | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Fold in operations that a compiler, a tracer or forward-mode differentiation can see."""
    transposed, groups = layout(spec)
    fold = partial(fold_conv_bn, transposed=transposed, groups=groups, dtype=dtype)
    if not torch.compiler.is_dynamo_compiling() or _is_exporting() or not torch.is_grad_enabled():
        return fold(*operands)
    # A compiler merges a product that the backward pass takes again with the forward's, and keeps it. It recomputes
    # what it is told to.
    folded: Tensor
    folded, shift = checkpoint(fold, *operands, use_reentrant=False, preserve_rng_state=False)
    if folded.device.type == "cpu" and folded.dim() == 4 and folded.shape[1] == 1 and folded.is_contiguous():
        # Inductor lays all else out as channels last. oneDNN goes by strides, and those of a depthwise weight fit both
        # layouts: taken for the other one, its backward pass takes half as long again.
        height, width = folded.shape[2:]
        folded = folded.as_strided(folded.shape, (height * width, 1, width, 1))
    return folded, shift


def is_watched() -> bool:
    """Whether operations must be seen: by a compiler, TorchScript, ``make_fx`` or forward-mode differentiation."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._get_dispatch_mode(_PROXY) is not None
        or forward_ad._current_level >= 0
    )


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


def _cast(input: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast ``input`` as autocast would; without autocast a dtype mismatch stays the caller's error."""
    if input.dtype is not torch.float64 and _autocasting(input):
        return input.to(dtype)
    return input


class Constants(NamedTuple):
    """What is constant in a fold as long as nobody writes the statistics of the BatchNorm.

    A pair keeps them from step to step, so that a backward pass finds them where the forward pass left them: copies for
    each pass would come to several percent of what small images keep.

    Attributes:
        mean: The running mean ``(C_out,)`` in the dtype of the fold.
        rstd: ``r`` of the equations ``(C_out,)``, times the scale if that is constant, too.
    """

    mean: Tensor
    rstd: Tensor


def constants_of(
    running_mean: Tensor, running_var: Tensor, scale: Tensor | None, eps: float, dtype: torch.dtype
) -> Constants:
    """Compute the constants of a BatchNorm in ``dtype``; ``scale`` ``(C_out,)`` is None where it is not constant."""
    rstd = _rstd(running_var, eps, dtype)
    # A mean of the dtype of the fold would be the buffer itself, which may be written.
    return Constants(running_mean.to(dtype, copy=True), rstd if scale is None else rstd * scale)


def _rstd(running_var: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    return (running_var.to(dtype) + eps).rsqrt()


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
    scale, shift = _scale_and_shift(bias, gamma, beta, mean, rstd)
    return _scaled(weight, scale, transposed, groups).to(dtype), shift.to(dtype)


def _scale_and_shift(
    bias: Tensor | None, gamma: Tensor | None, beta: Tensor | None, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """What a channel of the convolution without its bias is multiplied by, and what is added: ``s`` and ``b'``."""
    scale = rstd if gamma is None else gamma * rstd
    center = mean if bias is None else mean - bias
    if beta is None:
        return scale, -center * scale
    return scale, torch.addcmul(_as(scale.dtype, beta), center, scale, value=-1)


def _as(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    """Cast where there is something to cast: asking alone is quicker."""
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def _scaled(weight: Tensor, scale: Tensor, transposed: bool, groups: int, *, in_place: bool = False) -> Tensor:
    """``weight`` with every output channel multiplied by ``scale`` ``(C_out,)``, in the wider dtype of the two."""
    multiply = Tensor.mul_ if in_place else Tensor.mul
    if not transposed:
        return multiply(weight, scale.view(-1, *[1] * (weight.dim() - 1)))
    per_channel = scale.view(groups, 1, -1, *[1] * (weight.dim() - 2))
    return multiply(weight.reshape(groups, -1, *weight.shape[1:]), per_channel).reshape(weight.shape)


def _channel_dot(a: Tensor, b: Tensor, transposed: bool, groups: int, final: bool) -> Tensor:
    """Sum of ``a * b`` over all but the output channel of two weights: ``(C_out,)``."""
    if transposed:
        return (a * b).reshape(groups, a.shape[0] // groups, a.shape[1], -1).sum((1, 3)).reshape(-1)
    if final and a.numel() >= LARGE and a.device.type == "cpu" and a.dtype is b.dtype:
        # It is what a frozen BatchNorm of mean 0, variance 0 and epsilon 1 has for a gradient of its weight when `b`
        # goes in and `a` comes back. That kernel goes through both once and writes no product.
        zeros = a.new_zeros(a.shape[0])
        tensors = (a.flatten(1).unsqueeze(0), b.flatten(1).unsqueeze(0), None, zeros, zeros, None, None)
        return torch.ops.aten.native_batch_norm_backward.default(*tensors, False, 1.0, (False, True, False))[1]
    return (a * b).reshape(a.shape[0], -1).sum(1)


def _is_final() -> bool:
    """Whether this backward pass is neither differentiated nor batched in its turn."""
    return peek_interpreter_stack() is None and not torch.is_grad_enabled()


def _per_channel(vector: Tensor, like: Tensor) -> Tensor:
    """View ``(C_out,)`` so that it broadcasts over an output of a convolution or a linear layer."""
    return vector.view(-1, *[1] * (like.dim() - 2))


def _is_output_smaller(input: Tensor, weight: Tensor, spec: ConvSpec | None) -> bool:
    """Whether a convolution puts out, or about so, fewer values than it has weights."""
    if spec is None:
        return input.shape[0] < weight.shape[1]
    if spec.transposed:
        return False
    values = input.shape[0] * weight.shape[0]
    for size, stride in zip(input.shape[2:], spec.stride, strict=True):
        values *= size // stride
    return values < weight.numel()


def _conv(input: Tensor, weight: Tensor, bias: Tensor | None, spec: ConvSpec | None) -> Tensor:
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
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None] = _CONV_BACKWARD(
        grad, input, weight, [channels], *spec, mask
    )
    return gradients


def _suits_autograd(
    input: Tensor, weight: Tensor, bias: Tensor | None, gamma: Tensor | None, spec: ConvSpec | None
) -> bool:
    """Whether `_conv_bn_by_autograd` computes the pair, keeps next to nothing beside the input, and disturbs nobody."""
    if gamma is None or bias is not None or spec is None or spec.transposed:
        return False
    return input.numel() >= MANY * gamma.numel() and not (has_torch_function((input, weight, gamma)) or others_hook())


def _conv_bn_by_autograd(
    input: Tensor,
    weight: Tensor,
    gamma: Any,
    beta: Tensor | None,
    constants: Constants,
    spec: Any,
    dtype: torch.dtype,
) -> Tensor:
    """Fold in plain operations, and have the convolution's node keep how to fold in the place of the folded weight.

    Of autograd's own nodes only that one calls Python in the backward pass, once. Between two convolutions Python takes
    longer than the arithmetic. Beside the input they keep the scale.
    """
    scale, shift = _scale_and_shift(None, gamma, beta, *constants)
    scale = scale.view(-1, *[1] * (weight.dim() - 1))
    output = torch.convolution(input, _as(dtype, weight * scale), _as(dtype, shift), *spec)
    node: Any = output.grad_fn
    if node is not None:
        kept = Saved(weight.detach(), weight._version)
        # The values of the folded weight matter to the gradient of the input alone; the others go by its shape.
        by = scale.detach() if input.requires_grad else None
        # Of `id`: what packs a tensor must return something, and what unpacks it here has no need of that.
        node._raw_saved_weight.register_hooks(
            id, lambda _: _as(dtype, kept.value() if by is None else kept.value() * by)
        )
        if isinstance(input, Recomputed):
            save_recipe(node._raw_saved_input, input)
    return output


class _ConvBN(torch.autograd.Function):
    """The convolution whose backward pass recomputes the folded weight, and reads of its operands what it needs only.

    In the place of a large weight with a smaller output it scales the output, and in the place of any weight that is
    larger than the gradient of its output that gradient: as on small images, or deep in a network.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        input, weight, bias, gamma, beta, ctx.constants, (spec, dtype, smaller) = inputs
        _keep(ctx, input, weight, bias, gamma, beta, None, None, spec, dtype)
        mean, rstd = ctx.constants
        if smaller:
            scale, shift = _scale_and_shift(bias, gamma, beta, mean, rstd)
            output = _conv(input, weight, None, spec)
            return torch.addcmul(_per_channel(shift, output), output, _per_channel(scale, output), out=output)
        return _conv(input, *_fold(weight, bias, gamma, beta, mean, rstd, *layout(spec), dtype), spec)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _backward(ctx, grad, ctx.constants)


class _TransformableConvBN(torch.autograd.Function):
    """The same for ``torch.func``, which wants the two halves of the forward pass apart, and every tensor by itself.

    It takes as long to call as the arithmetic of a small layer: at every call torch inspects the signature.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        input, weight, bias, gamma, beta, mean, rstd, (spec, dtype) = inputs
        return _conv(input, *_fold(weight, bias, gamma, beta, mean, rstd, *layout(spec), dtype), spec)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _keep(ctx, *inputs[:7], *inputs[7])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _backward(ctx, grad, None)


def _keep(
    ctx: Any,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    spec: ConvSpec | None,
    dtype: torch.dtype,
) -> None:
    """Leave to `_backward` what it needs; of the constants those that come as tensors."""
    of_input, of_weight, of_bias, of_gamma, _, of_mean, of_rstd = ctx.needs_input_grad[:7]
    of_scale = of_gamma or of_rstd
    uses_scale = of_input or of_weight or of_bias or of_mean
    reads_rstd = uses_scale or of_scale
    ctx.spec, ctx.dtype, ctx.input_shape = spec, dtype, input.shape
    ctx.bias_dtype, ctx.beta_dtype = None if bias is None else bias.dtype, None if beta is None else beta.dtype
    ctx.save_for_backward(
        input if of_weight or of_scale else None,
        weight if of_input or of_weight or of_scale else None,
        bias if of_scale else None,
        gamma if reads_rstd else None,
        mean if of_scale else None,
        rstd if reads_rstd else None,
    )


def _backward(ctx: Any, grad: Tensor, constants: Constants | None) -> tuple[Tensor | None, ...]:
    """Gradients of an output, those that are wanted: in the order of the arguments of the forward pass."""
    input, weight, bias, gamma, mean, rstd = ctx.saved_tensors  # once: a checkpoint unpacks no tensor twice
    if constants is not None:
        mean, rstd = constants
    of_input, of_weight, of_bias, of_gamma, of_beta, of_mean, of_rstd = ctx.needs_input_grad[:7]
    spec: ConvSpec | None = ctx.spec
    transposed, groups = layout(spec)
    final = _is_final()
    of_scale = of_gamma or of_rstd
    scale = rstd if gamma is None else gamma * rstd
    if input is None:
        input = _only_a_shape(ctx.input_shape, grad)
    grad_input: Tensor | None = None
    grad_folded: Tensor | None = None
    grad_shift: Tensor | None
    of_folded, of_shift = of_weight or of_scale, of_bias or of_beta or of_mean or of_scale
    if weight is None:
        grad_shift = grad.sum([dim for dim in range(grad.dim()) if dim != 1])
    elif of_input and ctx.dtype is weight.dtype is scale.dtype and grad.numel() < weight.numel():
        scaled = grad * _per_channel(scale, grad)
        grad_input, _, _ = _conv_backward(scaled, input, weight, spec, (True, False, False))
        _, grad_folded, grad_shift = _conv_backward(grad, input, weight, spec, (False, of_folded, of_shift))
    else:
        # Its values matter to the gradient of the input alone; the others need no more than its shape.
        folded = (_scaled(weight, scale, transposed, groups) if of_input else weight).to(ctx.dtype)
        grad_input, grad_folded, grad_shift = _conv_backward(grad, input, folded, spec, (of_input, of_folded, of_shift))
        del folded

    grad_weight = grad_bias = grad_gamma = grad_beta = grad_mean = grad_rstd = None
    if grad_shift is not None:
        grad_shift = grad_shift.to(torch.promote_types(torch.float32, grad_shift.dtype))
        grad_bias = (grad_shift * scale).to(ctx.bias_dtype) if of_bias else None
        grad_beta = grad_shift.to(ctx.beta_dtype) if of_beta else None
        grad_mean = -grad_shift * scale if of_mean else None
    if grad_folded is not None:
        grad_folded = grad_folded.to(rstd.dtype)
        if of_scale and grad_shift is not None:
            dot = _channel_dot(grad_folded, weight, transposed, groups, final)
            grad_scale = torch.addcmul(dot, grad_shift, mean if bias is None else mean - bias, value=-1)
            grad_gamma = (grad_scale * rstd).to(gamma.dtype) if of_gamma else None
            grad_rstd = grad_scale * (1 if gamma is None else gamma) if of_rstd else None
        if of_weight:
            grad_weight = _scaled(grad_folded, scale, transposed, groups, in_place=final).to(weight.dtype)
    return grad_input, grad_weight, grad_bias, grad_gamma, grad_beta, grad_mean, grad_rstd, None


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
