"""The arithmetic against plain ``batch_norm(convolution(x))``, derivatives of every kind included."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from helpers.comparing import assert_close, gradients, relative
from helpers.networks import images
from torch import Tensor

from lightning_convbn.memory import count_saved_bytes
from lightning_convbn.ops import convolution, fold
from lightning_convbn.ops.autocast import autocast_dtype
from lightning_convbn.ops.fold import ConvSpec

EPS = 1e-3


def conv_bn(input: Tensor, *operands: Any) -> Tensor:
    *tensors, eps, spec = operands
    return convolution.conv_bn(input, fold.Operands(*tensors, eps), spec, autocast_dtype(input))


class Operands(NamedTuple):
    input: Tensor
    weight: Tensor
    bias: Tensor | None
    gamma: Tensor | None
    beta: Tensor | None
    mean: Tensor
    var: Tensor

    def of(self, output: Callable[..., Tensor], spec: ConvSpec | None) -> Tensor:
        return output(*self, EPS, spec)


# name -> geometry, shape of the input, shape of the weight, output channels
CASES: dict[str, tuple[ConvSpec | None, tuple[int, ...], tuple[int, ...], int]] = {
    "linear": (None, (3, 4), (5, 4), 5),
    "conv1d": (ConvSpec((2,), (1,), (1,), False, (0,), 1), (2, 3, 6), (4, 3, 3), 4),
    "grouped conv2d": (ConvSpec((2, 1), (1, 0), (1, 2), False, (0, 0), 2), (2, 4, 5, 5), (6, 2, 3, 2), 6),
    "grouped transposed": (ConvSpec((2, 1), (1, 0), (1, 1), True, (1, 0), 2), (2, 4, 3, 3), (4, 3, 3, 2), 6),
    "conv3d": (ConvSpec((1, 1, 1), (0, 1, 0), (1, 1, 1), False, (0, 0, 0), 1), (1, 2, 3, 3, 3), (2, 2, 2, 2, 2), 2),
}


def plain(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    spec: ConvSpec | None,
) -> Tensor:
    output = F.linear(input, weight, bias) if spec is None else torch.convolution(input, weight, bias, *spec)
    return F.batch_norm(output, mean, var, gamma, beta, False, 0.0, eps)


def draw(case: str, *, bias: bool = True, affine: bool = True) -> tuple[Operands, ConvSpec | None]:
    spec, input, weight, channels = CASES[case]
    vectors = [images(channels, seed=seed, dtype=torch.float64) for seed in range(3, 7)]
    return (
        Operands(
            images(*input, dtype=torch.float64),
            images(*weight, seed=2, dtype=torch.float64),
            vectors[0] if bias else None,
            vectors[1] if affine else None,
            vectors[2] if affine else None,
            vectors[3],
            torch.linspace(0.5, 2, channels, dtype=torch.float64),
        ),
        spec,
    )


@pytest.mark.parametrize(("bias", "affine"), [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize("case", CASES)
def test_first_and_second_derivatives_are_those_of_finite_differences(case: str, bias: bool, affine: bool) -> None:
    operands, spec = draw(case, bias=bias, affine=affine)
    named = dict(zip(Operands._fields[:5], operands, strict=False))
    wanted = {name: tensor.requires_grad_() for name, tensor in named.items() if tensor is not None}

    def function(*tensors: Tensor) -> Tensor:
        return operands._replace(**dict(zip(wanted, tensors, strict=True))).of(conv_bn, spec)

    assert torch.autograd.gradcheck(function, tuple(wanted.values()), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, tuple(wanted.values()), fast_mode=True)


def large_and_small() -> list[tuple[Operands, ConvSpec]]:
    """A pair whose input is large beside a vector of channels, and one whose output is smaller than its weight."""
    found = []
    for size in (16, 3):
        operands, spec = draw("grouped conv2d", bias=False)
        operands = operands._replace(input=images(2, 4, size, size, dtype=torch.float64))
        found.append((operands, spec))
    return found


def trained(operands: Operands, *names: str) -> list[Tensor]:
    return [getattr(operands, name).requires_grad_() for name in names]


def test_first_and_second_derivatives_are_those_of_plain_layers() -> None:
    for operands, spec in large_and_small():
        wanted = trained(operands, "input", "weight", "gamma", "beta")
        output, expected = operands.of(conv_bn, spec), operands.of(plain, spec)
        first = [torch.autograd.grad(one.tanh().sum(), wanted, create_graph=True) for one in (output, expected)]
        second = [torch.autograd.grad(sum(one.square().sum() for one in ones), wanted) for ones in first]
        assert_close([output], [expected], 1e-12)
        assert_close(*first, 1e-10)
        assert_close(*second, 1e-10)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_every_pattern_of_wanted_gradients_is_right_and_keeps_the_input_and_two_vectors_at_most(
    case: str, bias: bool, affine: bool
) -> None:
    """Parameters and buffers are no cost. The vectors, `r` and `s`, have a value for each output channel."""
    for mask in product((False, True), repeat=5):
        operands, spec = draw(case, bias=bias, affine=affine)
        for tensor, trained in zip(operands, mask, strict=False):
            if tensor is not None:
                tensor.requires_grad_(trained)
        output, expected = operands.of(conv_bn, spec), operands.of(plain, spec)
        assert_close([output], [expected], 1e-12)
        wanted = [tensor for tensor in operands if tensor is not None and tensor.requires_grad]
        assert output.requires_grad == bool(wanted)
        if wanted:
            assert_close(gradients(output, *wanted), gradients(expected, *wanted), 1e-10)
        _, of_weight, _, of_gamma, _ = mask
        vectors = [count * operands.mean.nbytes for count in range(3)]
        kept = count_saved_bytes(lambda: operands.of(conv_bn, spec))  # noqa: B023 - it is called at once
        assert kept in vectors, mask
        kept = count_saved_bytes(lambda input: operands._replace(input=input).of(conv_bn, spec), operands.input)  # noqa: B023
        # A pair whose weight and scale are frozen needs its input for no gradient.
        assert kept - (operands.input.nbytes if of_weight or (of_gamma and affine) else 0) in vectors, mask


@pytest.mark.parametrize("name", ["weight", "gamma", "mean", "var"])
def test_a_write_before_the_backward_pass_is_no_silent_error(name: str) -> None:
    """As in Eval mode, autograd refuses to go on; or the gradients are those of what the forward pass saw."""
    for operands, spec in large_and_small():
        wanted = trained(operands, "input", "weight", "gamma", "beta")
        expected = gradients(operands.of(conv_bn, spec), *wanted)
        output = operands.of(conv_bn, spec)
        with torch.no_grad():
            getattr(operands, name).add_(1)
        if name in ("gamma", "var"):  # autograd has kept what it needs of them
            assert_close(gradients(output, *wanted), expected, 1e-12)
        else:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                gradients(output, *wanted)


def test_a_write_to_the_weight_is_refused_where_only_the_input_wants_a_gradient() -> None:
    """Then no node but the recipe knows the weight."""
    for operands, spec in large_and_small():
        output = operands._replace(input=operands.input.requires_grad_()).of(conv_bn, spec)
        operands.weight.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            gradients(output, operands.input)


class Labelled(Tensor):
    """A subclass of Tensor as that of a library of images."""


@pytest.mark.parametrize("name", ["input", "weight", "gamma"])
def test_another_subclass_of_tensor_goes_through(name: str) -> None:
    (operands, spec), _ = large_and_small()
    labelled = operands._replace(**{name: getattr(operands, name).as_subclass(Labelled)})
    wanted, expected = (trained(one, "input", "weight", "gamma", "beta") for one in (labelled, operands))
    outputs = labelled.of(conv_bn, spec), operands.of(plain, spec)
    assert type(outputs[0]) is Labelled
    assert_close([outputs[0].as_subclass(Tensor)], outputs[1:], 1e-12)
    assert_close(
        [gradient.as_subclass(Tensor) for gradient in gradients(outputs[0], *wanted)],
        gradients(outputs[1], *expected),
        1e-10,
    )


def test_a_graph_that_is_kept_gives_the_same_gradients_again() -> None:
    for operands, spec in large_and_small():
        wanted = trained(operands, "input", "weight", "gamma", "beta")
        loss = operands.of(conv_bn, spec).square().sum()
        once, again = (torch.autograd.grad(loss, wanted, retain_graph=True) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def test_a_batch_of_gradients_at_once() -> None:
    for operands, spec in [*large_and_small(), *map(draw, CASES)]:
        wanted = [tensor.requires_grad_() for tensor in operands[:5] if tensor is not None]
        output, expected = operands.of(conv_bn, spec), operands.of(plain, spec)
        probes = images(3, *output.shape, seed=9, dtype=output.dtype)
        batches = [torch.autograd.grad(one, wanted, probes, is_grads_batched=True) for one in (output, expected)]
        assert_close(*batches, 1e-10)


def test_other_hooks_get_all_that_is_saved() -> None:
    """Activation checkpointing and `save_on_cpu` take tensors as they are saved, and no recipes beside theirs."""
    (operands, spec), _ = large_and_small()
    wanted = trained(operands, "input", "weight", "gamma", "beta")
    expected = gradients(operands.of(plain, spec), *wanted)
    with torch.autograd.graph.save_on_cpu():
        output = operands.of(conv_bn, spec)
    assert_close(gradients(output, *wanted), expected, 1e-10)
    output = torch.utils.checkpoint.checkpoint(operands.of, conv_bn, spec, use_reentrant=False)
    assert_close(gradients(output, *wanted), expected, 1e-10)
    image = operands.input.detach()
    recompute = partial(torch.utils.checkpoint.checkpoint, use_reentrant=False, preserve_rng_state=False)
    kept = count_saved_bytes(lambda x: recompute(operands._replace(input=x).of, conv_bn, spec), image)
    assert kept == image.nbytes


def test_gradients_of_trainable_statistics_are_right() -> None:
    """Nobody trains them through ``nn.BatchNorm2d``, whose buffers they are; a caller of the function may."""
    operands, spec = draw("grouped conv2d")
    mean, var = operands.mean.requires_grad_(), operands.var.requires_grad_()
    output = torch.convolution(*operands[:3], *spec)
    shape = (1, -1, 1, 1)
    output = (output - mean.view(shape)) / (var.view(shape) + EPS).sqrt()
    expected = output * operands.gamma.view(shape) + operands.beta.view(shape)
    assert_close(gradients(operands.of(conv_bn, spec), mean, var), gradients(expected, mean, var), 1e-10)


@pytest.mark.parametrize("changed", ["mean", "var"])
@pytest.mark.parametrize("bias", [False, True])
def test_in_a_distributed_run_the_backward_pass_goes_by_what_the_forward_pass_saw(
    changed: str, bias: bool, tmp_path: Path
) -> None:
    """DistributedDataParallel broadcasts buffers in place before every forward pass."""
    operands, spec = draw("grouped conv2d", bias=bias)
    wanted = trained(operands, "input", "weight", "gamma")
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        expected = gradients(operands.of(conv_bn, spec), *wanted)
        output = operands.of(conv_bn, spec)
        getattr(operands, changed).add_(1)
        assert all(map(torch.equal, gradients(output, *wanted), expected))
        after = gradients(operands.of(conv_bn, spec), *wanted)
        assert not torch.equal(after[2], expected[2])
    finally:
        torch.distributed.destroy_process_group()


def test_a_write_past_autograd_is_seen_by_the_next_forward_pass() -> None:
    """A teacher that follows through `.data`, an average of weights: nothing is cached between two forward passes."""
    operands, spec = draw("grouped conv2d")
    for tensor in operands[1:]:
        assert tensor is not None
        before = operands.of(conv_bn, spec)
        tensor.data.add_(0.5)
        assert not torch.equal(operands.of(conv_bn, spec), before)
        assert_close([operands.of(conv_bn, spec)], [operands.of(plain, spec)], 1e-12)


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")  # torch's own, in its jvp
class TestTransforms:
    """torch.func of the function against torch.func of plain operations."""

    @pytest.mark.parametrize("case", CASES)
    def test_forward_mode(self, case: str) -> None:
        operands, spec = draw(case)
        tangents = tuple(torch.ones_like(tensor) for tensor in operands[:5] if tensor is not None)

        def jvp(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
            return torch.func.jvp(lambda *primals: function(*primals, *operands[5:], EPS, spec), operands[:5], tangents)

        assert_close(jvp(conv_bn), jvp(plain), 1e-12)

    def test_hessian_forward_over_reverse(self) -> None:
        operands, spec = draw("conv1d")

        def hessian(function: Callable[..., Tensor]) -> Tensor:
            def loss(gamma: Tensor) -> Tensor:
                return operands._replace(gamma=gamma).of(function, spec).tanh().sum()

            return torch.func.hessian(loss)(operands.gamma)

        assert_close([hessian(conv_bn)], [hessian(plain)], 1e-10)


def test_a_float64_input_or_weight_is_not_cast_by_autocast() -> None:
    operands, spec = draw("grouped conv2d")
    with torch.autocast("cpu", torch.bfloat16):
        output = operands.of(conv_bn, spec)
    assert output.dtype is torch.float64
    assert relative(output, operands.of(plain, spec)) < 1e-12


def test_a_dtype_mismatch_stays_the_callers_error() -> None:
    operands, spec = draw("grouped conv2d")
    with pytest.raises(RuntimeError, match="type"):
        operands._replace(input=operands.input.float()).of(conv_bn, spec)
