"""What is done with a folded output gets what Eval would have given, or an error that names both layers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.right_or_named import MODES, Pair, Use, check_right_or_named, pair
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge, register_multi_grad_hook
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),
]
IN_EVERY_MODE = pytest.mark.parametrize(("mode", "recompute"), MODES)

# ------------------------------------------------------------------------------------------------ autograd.Function


class Scale(Function):
    forward = staticmethod(lambda ctx, x: x.view_as(x))
    backward = staticmethod(lambda ctx, slope: 0.1 * slope)


class Stop(Function):
    forward = staticmethod(lambda ctx, x: x.clone())
    backward = staticmethod(lambda ctx, slope: None)


class Saves(Function):
    """A function of the values, whose gradient depends on them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * slope


class Spy(Function):
    """Changes the output by what it has seen."""

    forward = staticmethod(lambda ctx, x: x + float(x.sum()))
    backward = staticmethod(lambda ctx, slope: slope * float(slope.abs().max()))


class Two(Function):
    forward = staticmethod(lambda ctx, x, y, factor: x + factor * y)
    backward = staticmethod(lambda ctx, slope: (slope, 0.5 * slope, None))


class WithSetup(Function):
    generate_vmap_rule = True
    forward = staticmethod(lambda x: x.sin())
    setup_context = staticmethod(lambda ctx, inputs, output: ctx.save_for_backward(*inputs))
    backward = staticmethod(lambda ctx, slope: slope * ctx.saved_tensors[0].cos())


class Once(Function):
    forward = staticmethod(lambda ctx, x: 2 * x)
    backward = staticmethod(once_differentiable(lambda ctx, slope: 2 * slope))


class InPlace(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.mul_(2)

    backward = staticmethod(lambda ctx, slope: 2 * slope)


class TwoOutputs(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        largest = x.amax()
        ctx.mark_non_differentiable(largest)
        return x * 3, largest

    backward = staticmethod(lambda ctx, slope, _: 3 * slope)


@torch.library.custom_op("convbn_tests::tripled", mutates_args=())
def tripled(x: Tensor) -> Tensor:
    """An operator whose kernel is Python behind the dispatcher."""
    return 3 * x


tripled.register_autograd(lambda ctx, slope: 0.3 * slope)


class Doubles(nn.Module):
    def forward(self, y: Tensor) -> Tensor:
        return 2 * y


def doubled(y: Tensor) -> Tensor:
    return 2 * y


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "scales": Scale.apply,
    "stops": Stop.apply,
    "saves": Saves.apply,
    "spies": Spy.apply,
    "two inputs": lambda y: Two.apply(y, y, 2.0),
    "second of two inputs": lambda y: Two.apply(torch.ones((), dtype=y.dtype), y, 2.0),
    "setup_context": WithSetup.apply,
    "once_differentiable": Once.apply,
    "in place": InPlace.apply,
    "two outputs": lambda y: torch.add(*TwoOutputs.apply(y)),
    "custom_op": tripled,
    "scripted function": lambda y: torch.jit.script(doubled)(y),
    "scripted module": lambda y: torch.jit.script(Doubles())(y),
    "trace": lambda y: torch.jit.trace(doubled, torch.ones(2, 8, 10, 10, dtype=torch.float64))(y),
}


def on_the_way(net: Pair, x: Tensor, function: Any) -> Tensor:
    return net.bn(function(net.conv(x)))  # type: ignore[no-any-return]


def beside(net: Pair, x: Tensor, function: Any) -> Tensor:
    y = net.conv(x)
    z = function(y)
    return net.bn(y) + z  # type: ignore[no-any-return]


def afterwards(net: Pair, x: Tensor, function: Any) -> Tensor:
    y = net.conv(x)
    return net.bn(y) * function(y)  # type: ignore[no-any-return]


def around(net: Pair, x: Tensor, function: Any) -> Tensor:
    return function(net.bn(net.conv(function(1 * x))))  # type: ignore[no-any-return]


def of_a_view(net: Pair, x: Tensor, function: Any) -> Tensor:
    return net.bn(function(net.conv(x).transpose(2, 3)).transpose(2, 3))  # type: ignore[no-any-return]


def later(net: Pair, x: Tensor, function: Any) -> Tensor:
    """Only in some calls, in a branch that no proof has seen."""
    first = net(x)
    net.between = function
    return first + net(x)  # type: ignore[no-any-return]


@IN_EVERY_MODE
@pytest.mark.parametrize("place", [on_the_way, beside, afterwards, around, of_a_view, later], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_of_autograd_or_of_torchscript(name: str, place: Any, mode: Any, recompute: Any) -> None:
    if name == "in place" and place is afterwards:
        pytest.skip("Eval mode raises, too: what the BatchNorm keeps is written")
    check_right_or_named(lambda net, x: place(net, x, FUNCTIONS[name]), mode, recompute)


@IN_EVERY_MODE
@pytest.mark.parametrize("trained", ["conv", "bn", "none"])
@pytest.mark.parametrize("name", ["scales", "spies", "saves"])
def test_a_function_where_a_part_is_trained(name: str, trained: str, mode: Any, recompute: Any) -> None:
    check_right_or_named(lambda net, x: on_the_way(net, x, FUNCTIONS[name]), mode, recompute, trained)


@pytest.mark.parametrize("mode", ["tune", "deploy"])
@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ["spies", "saves", "two inputs", "setup_context", "custom_op", "trace"])
def test_a_function_sees_evals_values_without_gradients(name: str, without: Any, mode: Any) -> None:
    def use(net: Pair, x: Tensor) -> Tensor:
        with without():
            return on_the_way(net, x.detach().clone(), FUNCTIONS[name])

    check_right_or_named(use, mode)


# ------------------------------------------------------------------------- right: the pair is folded, or Eval's values


def between(change: Callable[[Tensor], Any]) -> Use:
    """A forward that does something to the output of the convolution, and normalises it then."""

    def use(net: Pair, x: Tensor) -> Tensor:
        y = net.conv(x)
        change(y)
        return net.bn(y)  # type: ignore[no-any-return]

    return use


def changed(change: Callable[[Pair], Any]) -> Use:
    """A forward that changes the pair between its layers."""

    def use(net: Pair, x: Tensor) -> Tensor:
        y = net.conv(x)
        change(net)
        return net.bn(y)  # type: ignore[no-any-return]

    return use


def hooked(register: Callable[[Pair], Any]) -> Use:
    """A forward under a hook."""

    def use(net: Pair, x: Tensor) -> Tensor:
        handle = register(net)
        output: Tensor = net(x)
        handle.remove()
        return output

    return use


def hook_that_stores(net: Pair, x: Tensor) -> Tensor:
    stored: list[Tensor] = []
    handle = net.conv.register_forward_hook(lambda module, args, output: stored.append(output))
    output = net(x)
    handle.remove()
    return output.mean() + stored[0].mean()  # type: ignore[no-any-return]


def hook_on_gradients(net: Pair, x: Tensor) -> Tensor:
    net.conv.register_full_backward_hook(lambda module, inputs, outputs: (3 * inputs[0],))
    net.bn.register_full_backward_pre_hook(lambda module, outputs: (2 * outputs[0],))
    return net(x)  # type: ignore[no-any-return]


def convolution_without_gradients(net: Pair, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = net.conv(x)
    return net.bn(y)  # type: ignore[no-any-return]


def norm_without_gradients(net: Pair, x: Tensor) -> Tensor:
    y = net.conv(x)
    with torch.no_grad():
        z = net.bn(y)
    return net(x) + z.mean()  # type: ignore[no-any-return]


def norm_called_twice_and_written(net: Pair, x: Tensor) -> Tensor:
    y = net.conv(x)
    first = net.bn(y)
    first.relu_()
    return first + net.bn(y)  # type: ignore[no-any-return]


def view_of_what_is_written_later(net: Pair, x: Tensor) -> Tensor:
    y = net.conv(x)
    view = torch.flatten(input=y, start_dim=2)
    y.mul_(2)
    return view + 0


def penalised(net: Pair, x: Tensor) -> Tensor:
    loss = on_the_way(net, x, WithSetup.apply).square().sum()
    return torch.autograd.grad(loss, [x, net.conv.weight], create_graph=True)[0]


def with_other_parameters(net: Pair, x: Tensor) -> Tensor:
    others = {name: 2 * parameter for name, parameter in net.bn.named_parameters()}
    return functional_call(net.bn, others, (net.conv(x),))  # type: ignore[no-any-return]


class Doubled(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def of_another_class(net: Pair, x: Tensor) -> Tensor:
    net.conv.__class__ = Doubled
    return net(x)  # type: ignore[no-any-return]


def checkpointed(part: Any, x: Any, *, reentrant: bool = False) -> Any:
    return checkpoint(part, x, use_reentrant=reentrant)


RIGHT: dict[str, Use] = {
    "an input of another source": lambda net, x: net.bn(x.repeat(1, 3, 1, 1)[:, :8]),
    "read beside": lambda net, x: net(x) + net.conv(x),
    "read afterwards": lambda net, x: (lambda y: net.bn(y) + y)(net.conv(x)),
    "something between": lambda net, x: net.bn(net.conv(x) + 1),
    "another norm": lambda net, x: pair().bn(net.conv(x)) + net(x),
    "two inputs": lambda net, x: net(x) - net(2 * x),
    "a convolution": lambda net, x: F.conv2d(net.conv(x), torch.ones(1, 8, 1, 1, dtype=x.dtype)),
    "F.batch_norm": lambda net, x: F.batch_norm(net.conv(x), net.bn.running_mean, net.bn.running_var),
    "numpy": lambda net, x: net(x) * float(net.conv(x).detach().numpy().sum()),
    "a list": lambda net, x: (lambda ys: torch.cat([*ys, net.bn(ys[0])]))([net.conv(x)]),
    "an operator": lambda net, x: torch.ops.aten.mul(net.conv(x), 2.0),
    "deepcopy": lambda net, x: copy.deepcopy(net.conv(x).detach()) * net(x).mean(),
    "a checkpoint of the convolution": lambda net, x: net.bn(checkpointed(net.conv, x)),
    "a checkpoint of the norm": lambda net, x: checkpointed(lambda y: F.silu(net.bn(y)), net.conv(x)),
    "two checkpoints": lambda net, x: checkpointed(net.bn, checkpointed(net.conv, x)),
    "a reentrant checkpoint of both": lambda net, x: checkpointed(net, x, reentrant=True),
    "vmap": lambda net, x: torch.func.vmap(lambda one: (net(one[None]) + net.conv(one[None]))[0])(x),
    "grad": lambda net, x: torch.func.grad(lambda y: (net(y) + net.conv(y)).square().sum())(x),
    "a write": between(lambda y: y.add_(1)),
    "a write to a part": between(lambda y: y.__setitem__((slice(None), 0), 0)),
    "a write through a view": between(lambda y: y.flatten(2).mul_(2)),
    "a hook with another output": hooked(
        lambda net: net.conv.register_forward_hook(lambda module, args, output: 2 * output)
    ),
    "a hook with another input": hooked(lambda net: net.bn.register_forward_pre_hook(lambda module, args: args[0] + 1)),
    "written statistics": changed(lambda net: net.bn.running_var.fill_(2.0)),
    "other statistics": changed(
        lambda net: setattr(net.bn, "running_mean", torch.linspace(-1, 1, 8, dtype=torch.float64))
    ),
    "another shift": changed(lambda net: setattr(net.bn, "bias", nn.Parameter(net.bn.bias.detach() + 1))),
    "another eps": changed(lambda net: setattr(net.bn, "eps", 0.5)),
    "a hook that stores": hook_that_stores,
    "hooks on gradients": hook_on_gradients,
    "a convolution without gradients": convolution_without_gradients,
    "a norm without gradients": norm_without_gradients,
    "a norm called twice": norm_called_twice_and_written,
    "a view of what is written later": view_of_what_is_written_later,
    "other parameters": with_other_parameters,
    "another class of the convolution": of_another_class,
}


@IN_EVERY_MODE
@pytest.mark.parametrize("name", RIGHT)
def test_evals_results(name: str, mode: Any, recompute: Any) -> None:
    assert check_right_or_named(RIGHT[name], mode, recompute)


# ----------------------------------------------- right or named: what takes the edge of the graph, or the storage


def hook_of_several(net: Pair, x: Tensor) -> Tensor:
    y, seen = net.conv(x), []
    register_multi_grad_hook([y], lambda slopes: seen.append(slopes[0]))
    output: Tensor = net.bn(y)
    output.sum().backward(retain_graph=True)
    return output * seen[0].norm()


def gradient_at_the_edge(net: Pair, x: Tensor) -> Tensor:
    y = net.conv(x)
    edge = get_gradient_edge(y)
    output: Tensor = net.bn(y)
    return output * torch.autograd.grad(output.square().sum(), [edge], retain_graph=True)[0].norm()


def backward_to_the_tap(net: Pair, x: Tensor) -> Tensor:
    y = net.conv(x)
    y.retain_grad()
    output: Tensor = net.bn(y)
    output.square().sum().backward(inputs=[y], retain_graph=True)
    return output * y.grad.norm()  # type: ignore[no-any-return]


class Named(Tensor):
    pass


def without_torch_function(net: Pair, x: Tensor) -> Tensor:
    y = net.conv(x)
    with torch._C.DisableTorchFunctionSubclass():
        z = y * 2
    return net.bn(y) + z  # type: ignore[no-any-return]


RIGHT_OR_NAMED: dict[str, Use] = {
    "a reentrant checkpoint of the norm": lambda net, x: checkpointed(net.bn, net.conv(x), reentrant=True),
    "a reentrant checkpoint of the convolution": lambda net, x: net.bn(checkpointed(net.conv, x, reentrant=True)),
    "a reentrant checkpoint of the rest": lambda net, x: checkpointed(
        lambda y: net.bn(y) * y.mean(), net.conv(x), reentrant=True
    ),
    "a hook of several": hook_of_several,
    "a gradient at the edge": gradient_at_the_edge,
    "a backward pass to the tap": backward_to_the_tap,
    "a hook of the node": between(lambda y: y.grad_fn.register_prehook(lambda slopes: (0.1 * slopes[0],))),  # type: ignore[union-attr]
    "detach_": between(lambda y: y.detach_()),
    "written data": between(lambda y: y.data.mul_(2)),
    "a written view without a graph": between(lambda y: y.detach()[:, 0].fill_(1)),
    "a written array": between(lambda y: y.detach().numpy()[:, 0].fill(1)),
    "a list that is written": between(torch.no_grad()(lambda y: torch._foreach_mul_([y], 2.0))),
    "other data": between(lambda y: setattr(y, "data", 2 * y.data)),
    "another class": lambda net, x: net.bn(net.conv(x).as_subclass(Named)).as_subclass(Tensor),
    "without __torch_function__": without_torch_function,
    "a transform of a function": lambda net, x: torch.func.grad(
        lambda x: on_the_way(net, x, WithSetup.apply).square().sum()
    )(x),
    "a penalty of a function's gradient": penalised,
    "a vmap of a function": lambda net, x: torch.func.vmap(lambda x: on_the_way(net, x[None], WithSetup.apply)[0])(x),
}


@IN_EVERY_MODE
@pytest.mark.parametrize("name", RIGHT_OR_NAMED)
def test_evals_results_or_an_error(name: str, mode: Any, recompute: Any) -> None:
    check_right_or_named(RIGHT_OR_NAMED[name], mode, recompute)
