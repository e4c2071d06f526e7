"""Converted layers against plain ``bn(conv(x))``: every configuration, precision and way of running them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers.comparing import assert_close, gradients, relative
from helpers.networks import Net, images, random_model, randomized, small_net
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_convbn import Mode, fuse_for_deploy, measure_memory, set_mode
from lightning_convbn.memory import count_saved_bytes

FOLDED_MODES: tuple[Mode, ...] = ("tune", "deploy")
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
SIZE = 6

Layers = tuple[nn.Module, nn.Module, tuple[int, ...]]


def same_size(dims: int) -> st.SearchStrategy[dict[str, Any]]:
    """``padding="same"``: stride 1; an even kernel pads unevenly."""
    return st.fixed_dictionaries(
        {
            "kernel_size": st.tuples(*[st.integers(1, 4)] * dims),
            "dilation": st.tuples(*[st.integers(1, 2)] * dims),
            "padding": st.just("same"),
            "padding_mode": st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
        }
    )


def strided(dims: int) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {
            "kernel_size": st.tuples(*[st.integers(1, 3)] * dims),
            "stride": st.tuples(*[st.integers(1, 3)] * dims),
            "dilation": st.tuples(*[st.integers(1, 2)] * dims),
            "padding": st.one_of(st.just("valid"), st.tuples(*[st.integers(0, 2)] * dims)),
            "padding_mode": st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
        }
    )


@st.composite
def convolutions(draw: st.DrawFn) -> Layers:
    dims, groups = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2]))
    options = draw(st.one_of(same_size(dims), strided(dims)))
    conv = CONVS[dims](2 * groups, 3 * groups, groups=groups, bias=draw(st.booleans()), **options)
    return conv, draw(norms(3 * groups, dims)), (2, 2 * groups, *[SIZE] * dims)


@st.composite
def transposed(draw: st.DrawFn) -> Layers:
    """A transposed convolution with output padding, its BatchNorm and the shape of an input."""
    dims, groups = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2]))
    stride, dilation = (draw(st.tuples(*[st.integers(1, 2)] * dims)) for _ in range(2))
    conv = TRANSPOSED[dims](
        2 * groups,
        3 * groups,
        draw(st.tuples(*[st.integers(1, 3)] * dims)),
        stride,
        draw(st.tuples(*[st.integers(0, 1)] * dims)),
        tuple(draw(st.integers(0, max(steps) - 1)) for steps in zip(stride, dilation, strict=True)),
        groups,
        draw(st.booleans()),
        dilation,
    )
    return conv, draw(norms(3 * groups, dims)), (2, 2 * groups, *[4] * dims)


@st.composite
def linears(draw: st.DrawFn) -> Layers:
    return nn.Linear(4, 3, bias=draw(st.booleans())), draw(norms(3, 1)), (5, 4)


@st.composite
def norms(draw: st.DrawFn, channels: int, dims: int) -> nn.Module:
    norm = draw(st.sampled_from([NORMS[dims], nn.SyncBatchNorm]))
    return norm(channels, eps=draw(st.sampled_from([1e-5, 1e-1])), affine=draw(st.booleans()))


def assert_equals_eval(model: nn.Module, mode: Mode, input: Tensor) -> None:
    """Compare output and every gradient in a mode with those of the plain model in its eval state, in float64."""
    randomized(model.double())
    plain = copy.deepcopy(model).eval()
    pairs = set_mode(model.train(), mode)
    assert len(pairs) == 1
    assert not pairs.unpaired
    ours, theirs = input.clone().requires_grad_(), input.clone().requires_grad_()
    output, expected = model(ours), plain(theirs)
    assert_close([output], [expected], 1e-12)
    assert_close(gradients(output, ours, *model.parameters()), gradients(expected, theirs, *plain.parameters()), 1e-10)
    model.requires_grad_(False)
    assert_close(gradients(model(ours), ours), gradients(plain(theirs), theirs), 1e-10)
    with torch.no_grad():
        assert_close([model(input)], [expected], 1e-12)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")  # of the plain layer
@pytest.mark.parametrize("mode", FOLDED_MODES)
@given(layers=st.one_of(convolutions(), transposed(), linears()))
@settings(max_examples=100, deadline=None, derandomize=True, database=None)
def test_any_configuration_equals_eval(mode: Mode, layers: Layers) -> None:
    conv, bn, shape = layers
    assert_equals_eval(nn.Sequential(conv, bn), mode, images(*shape, dtype=torch.float64))


@pytest.mark.parametrize("mode", FOLDED_MODES)
@pytest.mark.parametrize("dims", TRANSPOSED)
def test_output_size_of_a_transposed_convolution_is_honoured(dims: int, mode: Mode) -> None:
    conv = TRANSPOSED[dims](2, 3, 3, stride=2, padding=1)
    model = Net(lambda net, x: net.bn(net.conv(x, output_size=[8] * dims)), conv=conv, bn=NORMS[dims](3))
    assert_equals_eval(model, mode, images(2, 2, *[4] * dims, dtype=torch.float64))
    assert model(images(2, 2, *[4] * dims, dtype=torch.float64)).shape[2:] == (8,) * dims


@pytest.mark.parametrize("mode", FOLDED_MODES)
@pytest.mark.parametrize(
    ("conv", "bn", "shape"),
    [
        (nn.Linear(4, 5), nn.BatchNorm1d(5), (2, 5, 4)),  # the BatchNorm takes dimension 1 for its channels
        (nn.Conv1d(3, 5, 3, padding=1), nn.BatchNorm1d(5), (3, 5)),
        (nn.Conv2d(3, 5, 3, padding=1), nn.SyncBatchNorm(5), (3, 5, 5)),
        (nn.ConvTranspose1d(3, 5, 3, padding=1), nn.BatchNorm1d(5), (3, 5)),
    ],
    ids=["linear of sequences", "unbatched Conv1d", "unbatched Conv2d", "unbatched ConvTranspose1d"],
)
def test_an_input_without_the_usual_dimensions_equals_eval(
    conv: nn.Module, bn: nn.Module, shape: tuple[int, ...], mode: Mode
) -> None:
    assert_equals_eval(nn.Sequential(copy.deepcopy(conv), copy.deepcopy(bn)), mode, images(*shape, dtype=torch.float64))


@pytest.mark.parametrize("mode", ["train", "eval", *FOLDED_MODES])
def test_an_input_that_plain_layers_refuse_is_refused_with_their_words(mode: Mode) -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5))
    set_mode(model, mode)
    with pytest.raises(ValueError, match=r"expected 4D input \(got 3D input\)"):
        model(images(3, 6, 6))


@pytest.mark.parametrize("mode", FOLDED_MODES)
def test_frozen_parts_of_a_net_leave_the_other_gradients_right(mode: Mode) -> None:
    net = small_net().double()
    plain = copy.deepcopy(net).eval()
    set_mode(net, mode)
    frozen_parts = ["0.weight", "1.weight", "1.bias", "4.weight", "4.bias", "7.weight", "8.weight", "8.bias"]
    input = images(2, 3, 8, 8, dtype=torch.float64)
    for first in range(len(frozen_parts)):
        for model in (net, plain):
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name not in frozen_parts[first : first + 4])
        wanted, others = ([p for p in model.parameters() if p.requires_grad] for model in (net, plain))
        assert_close(gradients(net(input), *wanted), gradients(plain(input), *others), 1e-10)


def test_double_backward_through_a_net_equals_eval() -> None:
    net = small_net().double()
    plain = copy.deepcopy(net).eval()
    set_mode(net, "tune")

    def penalty(model: nn.Module) -> tuple[Tensor, ...]:
        input = images(2, 3, 8, 8, dtype=torch.float64).requires_grad_()
        slope = torch.autograd.grad(model(input).square().sum(), input, create_graph=True)[0]
        last_bias, *others = reversed(list(model.parameters()))
        return torch.autograd.grad(slope.square().sum(), [input, *others])

    assert_close(penalty(net), penalty(plain), 1e-10)


@pytest.mark.parametrize("mode", FOLDED_MODES)
@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")  # torch's own, in its jvp
def test_function_transforms_of_a_net_equal_eval(mode: Mode) -> None:
    net = small_net().double()
    plain = copy.deepcopy(net).eval()
    set_mode(net, mode)
    batch = images(3, 3, 8, 8, dtype=torch.float64)

    def per_sample_gradients(model: nn.Module) -> list[Tensor]:
        def loss(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
            return torch.func.functional_call(model, parameters, (image.unsqueeze(0),)).square().sum()

        parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
        rows = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, batch)
        return [rows[name] for name in sorted(rows)]

    def slope_along_ones(model: nn.Module) -> tuple[Tensor, ...]:
        return torch.func.jvp(model, (batch,), (torch.ones_like(batch),))

    assert_close(per_sample_gradients(net), per_sample_gradients(plain), 1e-10)
    assert_close(slope_along_ones(net), slope_along_ones(plain), 1e-10)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # PyTorch's, once in a process
@pytest.mark.parametrize("kernel", [2, 3, 4, (3, 4)])
def test_uneven_padding_keeps_what_the_plain_convolution_keeps(kernel: Any) -> None:
    plain = nn.Conv2d(3, 4, kernel, padding="same")
    pair = nn.Sequential(copy.deepcopy(plain), nn.BatchNorm2d(4))
    set_mode(pair, "tune")
    batch = images(2, 3, 9, 9)
    vectors = 2 * 4 * 4  # of four channels, in bytes
    assert count_saved_bytes(pair, batch) <= count_saved_bytes(plain, batch) + vectors


def test_a_copy_of_a_compiled_layer_computes_with_its_own_weight() -> None:
    net = small_net().double().requires_grad_(False)
    net[0].compile(backend="eager")
    set_mode(net, "deploy")
    image = images(2, 3, 8, 8, dtype=torch.float64)
    net(image)
    copied = copy.deepcopy(net)
    with torch.no_grad():
        copied[0].weight.mul_(2)
    set_mode(copied, "eval")
    expected = copied(image)
    set_mode(copied, "deploy")
    assert_close([copied(image)], [expected], 1e-10)


@pytest.mark.parametrize("mode", FOLDED_MODES)
def test_per_sample_gradients_of_a_resnet_equal_eval(mode: Mode) -> None:
    """Its ReLUs work in place on what the pairs put out."""
    model = random_model("resnet18").double()
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    buffers = dict(model.named_buffers())
    batch = images(2, 3, 32, 32, dtype=torch.float64)

    def loss(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
        return torch.func.functional_call(model, (parameters, buffers), (image.unsqueeze(0),)).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))
    expected = per_sample(parameters, batch)
    set_mode(model, mode)
    found = per_sample(parameters, batch)
    assert found.keys() == expected.keys()
    assert_close([*found.values()], [*expected.values()], 1e-9)


def test_a_fold_made_within_a_transform_serves_outside_of_it() -> None:
    net = small_net().double().requires_grad_(False)
    plain = copy.deepcopy(net).eval()
    batch = images(2, 3, 8, 8, dtype=torch.float64)
    set_mode(net, "deploy")
    slope = torch.func.grad(lambda input: net(input).square().sum())(batch)
    expected = torch.func.grad(lambda input: plain(input).square().sum())(batch)
    assert_close([slope], [expected], 1e-10)
    assert_close([net(batch)], [plain(batch)], 1e-12)
    assert_close([torch.func.vmap(net)(batch.unsqueeze(1))[:, 0]], [plain(batch)], 1e-12)
    assert_close([net(batch)], [plain(batch)], 1e-12)


@pytest.mark.parametrize("mode", FOLDED_MODES)
def test_activation_checkpointing_changes_nothing(mode: Mode) -> None:
    net = small_net().double()
    set_mode(net, mode)
    input = images(2, 3, 8, 8, dtype=torch.float64)
    output, expected = checkpoint(net, input, use_reentrant=False), net(input)
    assert torch.equal(output, expected)
    assert_close(gradients(output, *net.parameters()), gradients(expected, *net.parameters()), 1e-14)


def test_a_pair_whose_statistics_want_gradients_can_be_checkpointed() -> None:
    """A checkpoint unpacks every saved tensor once."""
    net = randomized(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).double()
    wanted = [*net.parameters(), net[1].running_mean.requires_grad_(), net[1].running_var.requires_grad_()]
    set_mode(net, "tune")
    input = images(2, 3, 8, 8, dtype=torch.float64)
    output = checkpoint(net, input, use_reentrant=False)
    assert_close(gradients(output, *wanted), gradients(net(input), *wanted), 1e-14)


@pytest.mark.parametrize("mode", FOLDED_MODES)
def test_a_compiled_net_has_one_graph_and_equals_eager(mode: Mode) -> None:
    net = small_net().double()
    set_mode(net, mode)
    input = images(2, 3, 8, 8, dtype=torch.float64)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    output, expected = compiled(input), net(input)
    assert_close([output], [expected], 1e-12)
    assert_close(gradients(output, *net.parameters()), gradients(expected, *net.parameters()), 1e-10)
    with torch.no_grad():
        assert_close([compiled(input)], [expected], 1e-12)
        net[0].weight.mul_(2)  # a fold kept by the graph would be stale now
        assert_close([compiled(input)], [net(input)], 1e-12)


def error(model: nn.Module, reference: nn.Module, input: Tensor, autocast: torch.dtype | None) -> tuple[float, float]:
    """The relative errors of the output and of all gradients against a float64 copy of the same model."""
    own = next(model.parameters()).dtype
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        output = model(input.to(own))
    expected = reference(input.double())
    probe = images(*output.shape)
    found = torch.autograd.grad((output * probe.to(output.dtype)).sum(), list(model.parameters()))
    true = torch.autograd.grad((expected * probe).sum(), list(reference.parameters()))
    assert [gradient.dtype for gradient in found] == [parameter.dtype for parameter in model.parameters()]
    flat, flat_true = (torch.cat([gradient.double().flatten() for gradient in tensors]) for tensors in (found, true))
    return relative(output, expected), relative(flat, flat_true)


@pytest.mark.parametrize(("dtype", "autocast"), [(torch.float16, None), (torch.float32, torch.float16)])
def test_fp16_runs_and_stays_within_its_rounding(dtype: torch.dtype, autocast: torch.dtype | None) -> None:
    net = small_net().to(dtype)
    reference = copy.deepcopy(net).double().eval()
    set_mode(net, "tune")
    assert max(error(net, reference, images(4, 3, 8, 8), autocast)) < 4e-3  # 4 layers of 2 ** -10 each


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_deployed_net_under_autocast_gives_autocasts_dtype_and_equals_its_copy(dtype: torch.dtype) -> None:
    net = small_net()
    copied = fuse_for_deploy(net)
    set_mode(net, "deploy")
    input = images(2, 3, 8, 8)
    with torch.no_grad(), torch.autocast("cpu", dtype):
        output, expected = net(input), copied(input)
    assert_close([output], [expected], 1e-6)
    with torch.no_grad():  # and the fold in half precision is not used outside
        assert_close([net(input)], [copied(input)], 1e-6)


@pytest.mark.parametrize("mode", ["eval", "tune"])
def test_statistics_written_between_forward_and_backward_are_refused_as_in_eval_mode(mode: Mode) -> None:
    net = small_net().double()[4:]  # all of its BatchNorms are folded
    set_mode(net, mode)
    output = net(images(2, 6, 8, 8, dtype=torch.float64))
    for buffer in net.buffers():
        buffer.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(output, *net.parameters())


def test_a_geometry_in_numbers_and_lists_is_that_of_the_layer() -> None:
    net, input = small_net()[:2].double().eval(), images(2, 3, 8, 8, dtype=torch.float64)
    net[0].padding, net[0].stride, net[0].dilation = 1, 2, [1, 1]
    expected = net(input)
    set_mode(net, "tune")
    assert_close([net(input)], [expected], 1e-12)


class Noted(Tensor):
    """A tensor that doubles what a convolution puts out."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = super().__torch_function__(func, types, args, kwargs or {})
        return 2 * output if func is torch.conv2d else output


def test_another_subclass_of_tensor_handles_both_layers_by_itself() -> None:
    net, input = small_net()[:2].eval(), images(2, 3, 8, 8).as_subclass(Noted)
    expected = net(input)
    set_mode(net, "tune")
    found = net(input)
    assert type(found) is type(expected) is Noted
    assert_close([found.as_subclass(Tensor)], [expected.as_subclass(Tensor)], 1e-5)


@pytest.mark.parametrize("recompute", ["none", "elementwise", ["0", "1"]], ids=str)
def test_where_saved_tensor_hooks_are_forbidden_the_results_are_evals(recompute: Any) -> None:
    net = nn.Sequential(*(nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)) for _ in range(2)))
    input = images(2, 3, 8, 8, dtype=torch.float64)
    expected = gradients(net.double().eval()(input), *net.parameters())
    set_mode(net, "tune", recompute=recompute)
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        assert_close(gradients(net(input), *net.parameters()), expected, 1e-10)


@pytest.mark.parametrize(
    "conv",
    [nn.Conv2d(16, 2, 3), nn.Conv2d(4, 4, 3, stride=2), nn.Conv2d(2, 16, 1), nn.ConvTranspose2d(4, 4, 2, 2)],
    ids=str,
)
def test_only_gamma_trained_never_keeps_more_than_eval(conv: Any) -> None:
    """Eval mode keeps the output then; where that is smaller than the input, the pair runs as in Eval mode."""
    net = nn.Sequential(copy.deepcopy(conv).requires_grad_(False), nn.BatchNorm2d(conv.out_channels))
    image = images(4, conv.in_channels, 12, 12)
    for wanted in (image, image.clone().requires_grad_()):
        tune, plain = (measure_memory(net, wanted, mode=mode).saved_bytes for mode in ("tune", "eval"))  # type: ignore[arg-type]
        assert tune <= plain
