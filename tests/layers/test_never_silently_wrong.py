"""What takes a folded output past Python's eyes gets what Eval would have given, or an error that names the layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers.right_or_named import MODES, Pair, Use, assert_same, check_right_or_named, image, pair, results
from lightning.pytorch.profilers.pytorch import RegisterRecordFunction
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge, register_multi_grad_hook
from torch.nn.modules import module as every_module
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from lightning_convbn import find_conv_bn_pairs, measure_memory, set_mode

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),
    pytest.mark.filterwarnings("ignore:Using a non-full backward hook"),
]
IN_EVERY_MODE = pytest.mark.parametrize(("mode", "recompute"), MODES)

# ------------------------------------------------------------------------------------------------ autograd.Function


class Scale(Function):
    forward = staticmethod(lambda ctx, x: x.view_as(x))
    backward = staticmethod(lambda ctx, slope: 0.1 * slope)


class Reverse(Function):
    forward = staticmethod(lambda ctx, x: x)
    backward = staticmethod(lambda ctx, slope: -2 * slope)


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

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x + float(x.sum())

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        return slope * float(slope.abs().max())


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

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        return 2 * slope


class TwoOutputs(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        largest = x.amax()
        ctx.mark_non_differentiable(largest)
        return x * 3, largest

    @staticmethod
    def backward(ctx: Any, slope: Tensor, _: Tensor) -> Tensor:
        return 3 * slope


@torch.library.custom_op("convbn_tests::tripled", mutates_args=())
def tripled(x: Tensor) -> Tensor:
    """An operator whose kernel is Python behind the dispatcher."""
    return 3 * x


tripled.register_autograd(lambda ctx, slope: 0.3 * slope)

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "scales": Scale.apply,
    "reverses": Reverse.apply,
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
def test_a_function_of_autograd(name: str, place: Any, mode: Any, recompute: Any) -> None:
    if name == "in place" and place is afterwards:
        pytest.skip("Eval mode raises, too: what the BatchNorm keeps is written")
    check_right_or_named(lambda net, x: place(net, x, FUNCTIONS[name]), mode, recompute)


@IN_EVERY_MODE
@pytest.mark.parametrize("trained", ["conv", "bn", "none"])
@pytest.mark.parametrize("name", ["scales", "spies", "saves"])
def test_a_function_of_autograd_where_a_part_is_trained(name: str, trained: str, mode: Any, recompute: Any) -> None:
    check_right_or_named(lambda net, x: on_the_way(net, x, FUNCTIONS[name]), mode, recompute, trained)


@pytest.mark.parametrize("mode", ["tune", "deploy"])
@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ["spies", "saves", "two inputs", "setup_context", "custom_op"])
def test_a_function_of_autograd_sees_evals_values_without_gradients(name: str, without: Any, mode: Any) -> None:
    def use(net: Pair, x: Tensor) -> Tensor:
        with without():
            return on_the_way(net, x.detach().clone(), FUNCTIONS[name])

    check_right_or_named(use, mode)


def penalised(net: Pair, x: Tensor) -> Tensor:
    """Differentiates twice."""
    loss = on_the_way(net, x, WithSetup.apply).square().sum()
    return torch.autograd.grad(loss, [x, net.conv.weight], create_graph=True)[0]


def in_a_transform(net: Pair, x: Tensor) -> Tensor:
    return torch.func.grad(lambda x: on_the_way(net, x, WithSetup.apply).square().sum())(x)


def in_a_vmap(net: Pair, x: Tensor) -> Tensor:
    return torch.func.vmap(lambda x: on_the_way(net, x[None], WithSetup.apply)[0])(x)


@pytest.mark.parametrize("mode", ["tune", "deploy"])
@pytest.mark.parametrize("use", [penalised, in_a_transform, in_a_vmap])
def test_a_function_of_autograd_in_other_passes(use: Use, mode: Any) -> None:
    check_right_or_named(use, mode)


# ------------------------------------------------------------------- checkpoints, edges of the graph, shared storages


def reentrant_norm(net: Pair, x: Tensor) -> Tensor:
    return checkpoint(net.bn, net.conv(x), use_reentrant=True)  # type: ignore[return-value]


def reentrant_convolution(net: Pair, x: Tensor) -> Tensor:
    return net.bn(checkpoint(net.conv, x, use_reentrant=True))  # type: ignore[no-any-return]


def reentrant_pair(net: Pair, x: Tensor) -> Tensor:
    return checkpoint(net, x, use_reentrant=True)  # type: ignore[return-value]


def reentrant_tail(net: Pair, x: Tensor) -> Tensor:
    return checkpoint(lambda y: net.bn(y) * y.mean(), net.conv(x), use_reentrant=True)  # type: ignore[return-value]


def plain_checkpoint_of_the_norm(net: Pair, x: Tensor) -> Tensor:
    return checkpoint(net.bn, net.conv(x), use_reentrant=False)  # type: ignore[return-value]


def hook_of_the_node(net: Pair, x: Tensor) -> Tensor:
    y = net.conv(x)
    y.grad_fn.register_prehook(lambda slopes: (0.1 * slopes[0],))  # type: ignore[union-attr]
    return net.bn(y)  # type: ignore[no-any-return]


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


def detached_in_place(net: Pair, x: Tensor) -> Tensor:
    y = net.conv(x)
    y.detach_()
    return net.bn(y)  # type: ignore[no-any-return]


def data_written(net: Pair, x: Tensor) -> Tensor:
    y = net.conv(x)
    y.data.mul_(2)
    return net.bn(y)  # type: ignore[no-any-return]


def detached_view_written(net: Pair, x: Tensor) -> Tensor:
    y = net.conv(x)
    y.detach()[:, 0] = 1
    return net.bn(y)  # type: ignore[no-any-return]


def array_written(net: Pair, x: Tensor) -> Tensor:
    y = net.conv(x)
    y.detach().numpy()[:, 0] = 1
    return net.bn(y)  # type: ignore[no-any-return]


def written_in_a_list(net: Pair, x: Tensor) -> Tensor:
    y = net.conv(x)
    with torch.no_grad():
        torch._foreach_mul_([y], 2.0)
    return net.bn(y)  # type: ignore[no-any-return]


def data_replaced(net: Pair, x: Tensor) -> Tensor:
    y = net.conv(x)
    y.data = 2 * y.data
    return net.bn(y)  # type: ignore[no-any-return]


def another_class(net: Pair, x: Tensor) -> Tensor:
    class Named(Tensor):
        pass

    y: Tensor = net.conv(x).as_subclass(Named)
    return net.bn(y).as_subclass(Tensor)  # type: ignore[no-any-return]


def without_torch_function(net: Pair, x: Tensor) -> Tensor:
    y = net.conv(x)
    with torch._C.DisableTorchFunctionSubclass():
        z = y * 2
    return net.bn(y) + z  # type: ignore[no-any-return]


def without_torch_function_on_the_way(net: Pair, x: Tensor) -> Tensor:
    y = net.conv(x)
    with torch._C.DisableTorchFunctionSubclass():
        y = y * 2
    return net.bn(y)  # type: ignore[no-any-return]


PASSES: list[Use] = [
    reentrant_norm,
    reentrant_convolution,
    reentrant_pair,
    reentrant_tail,
    plain_checkpoint_of_the_norm,
    hook_of_the_node,
    hook_of_several,
    gradient_at_the_edge,
    backward_to_the_tap,
    detached_in_place,
    data_written,
    detached_view_written,
    array_written,
    written_in_a_list,
    data_replaced,
    another_class,
    without_torch_function,
    without_torch_function_on_the_way,
]


@IN_EVERY_MODE
@pytest.mark.parametrize("use", PASSES, ids=lambda use: use.__name__)
def test_what_takes_the_edge_or_the_storage(use: Use, mode: Any, recompute: Any) -> None:
    right = check_right_or_named(use, mode, recompute)
    assert right or use is not reentrant_pair  # both layers are inside


# ------------------------------------------------------------------------------------------------------- TorchScript


def doubled(y: Tensor) -> Tensor:
    return 2 * y


class Doubles(nn.Module):
    def forward(self, y: Tensor) -> Tensor:
        return 2 * y


SCRIPTED: dict[str, Callable[[], Any]] = {
    "function": lambda: torch.jit.script(doubled),
    "module": lambda: torch.jit.script(Doubles()),
    "trace": lambda: torch.jit.trace(doubled, torch.ones(2, 8, 10, 10, dtype=torch.float64)),
}


@IN_EVERY_MODE
@pytest.mark.parametrize("place", [on_the_way, beside, afterwards, of_a_view, later], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", SCRIPTED)
def test_a_script_reads_evals_values(name: str, place: Any, mode: Any, recompute: Any) -> None:
    function = SCRIPTED[name]()
    check_right_or_named(lambda net, x: place(net, x, function), mode, recompute)

    def use(net: Pair, x: Tensor) -> Tensor:
        with torch.no_grad():
            return place(net, x, function)  # type: ignore[no-any-return]

    check_right_or_named(use, mode, recompute)


# --------------------------------------------------------------------------------------------- hooks of every module

GLOBAL: dict[str, tuple[str, Callable[..., Any]]] = {
    "forward pre": ("register_module_forward_pre_hook", lambda module, args: (args[0] * 1.5,)),
    "forward": ("register_module_forward_hook", lambda module, args, output: output * 1.5),
    "full backward pre": ("register_module_full_backward_pre_hook", lambda module, slopes: (slopes[0] * 1.5,)),
    "full backward": ("register_module_full_backward_hook", lambda module, inputs, slopes: (inputs[0] * 1.5,)),
    "backward": ("register_module_backward_hook", lambda module, inputs, slopes: None),
}


def noted(hook: Callable[..., Any] | None, seen: list[Any]) -> Callable[..., Any]:
    """A hook that writes down what it sees of the layers, and changes it if it is to."""

    def note(module: nn.Module, *values: Any) -> Any:
        seen.append(type(module).__name__)
        seen.extend(leaf.detach().clone() for leaf in torch.utils._pytree.tree_leaves(values) if leaf is not None)
        return None if hook is None else hook(module, *values)

    return note


@contextmanager
def hooked(kind: str, changes: bool, seen: list[Any]) -> Iterator[None]:
    register, hook = GLOBAL[kind]
    handle = getattr(every_module, register)(noted(hook if changes else None, seen))
    try:
        yield
    finally:
        handle.remove()
        every_module._global_is_full_backward_hook = None


@IN_EVERY_MODE
@pytest.mark.parametrize("changes", [False, True])
@pytest.mark.parametrize("kind", GLOBAL)
@pytest.mark.parametrize("when", ["before the switch", "after the switch", "for one of two passes"])
def test_hooks_of_every_module_see_and_change_what_they_do_in_eval_mode(
    when: str, kind: str, changes: bool, mode: Any, recompute: Any
) -> None:
    plain, net = pair(), pair()
    seen: list[list[Any]] = [[], []]
    if when == "before the switch":
        with hooked(kind, changes, []):
            assert len(set_mode(net, mode, recompute=recompute)) <= 1
    else:
        set_mode(net, mode, recompute=recompute)
    for _ in range(1 + (when == "for one of two passes")):
        found = []
        for each, notes in zip((net, plain), seen, strict=True):
            with hooked(kind, changes, notes):
                found.append(results(each, Pair.__call__))
        assert_same(*found)
        assert_same(*seen)
        assert_same(results(net, Pair.__call__), results(plain, Pair.__call__))


def test_hooks_of_every_module_are_not_called_while_somebody_looks() -> None:
    seen: list[Any] = []
    for kind in GLOBAL:
        with hooked(kind, False, seen):
            net = pair()
            pairs = find_conv_bn_pairs(net, example_inputs=(image(),))
            set_mode(net, "tune", pairs=pairs)
            measure_memory(net, image(), mode="tune")
    assert not seen


# ------------------------------------------------------------------------------------------------ who counts and logs


class LogsOperators(TorchDispatchMode):
    """Counts the convolutions that are run, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "convolution" in str(func)
        return func(*args, **(kwargs or {}))


class LogsFunctions(TorchFunctionMode):
    """Hands everything on."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def flops(net: nn.Module) -> tuple[Any, list[Tensor | None]]:
    with FlopCounterMode(display=False) as counter:
        found = results(net, Pair.__call__)
    return {name: dict(counts) for name, counts in counter.get_flop_counts().items()}, found


def operators(net: nn.Module) -> tuple[Any, list[Tensor | None]]:
    with LogsOperators() as log:
        found = results(net, Pair.__call__)
    return log.count, found


def functions(net: nn.Module) -> tuple[Any, list[Tensor | None]]:
    with LogsFunctions(), torch.device("cpu"):
        return None, results(net, Pair.__call__)


def asked_for_gradients(net: nn.Module) -> tuple[Any, list[Tensor | None]]:
    """Looks at the output in between, as loggers do, and reads no value of it."""

    def use(net: Pair, x: Tensor) -> Tensor:
        y = net.conv(x)
        assert y.requires_grad
        assert not y.is_leaf
        return net.bn(y)  # type: ignore[no-any-return]

    with LogsOperators() as log:
        found = results(net, use)
    return log.count, found


def hooks_of_the_profiler(net: nn.Module) -> tuple[Any, list[Tensor | None]]:
    with RegisterRecordFunction(net), torch.autograd.profiler.profile():
        return None, results(net, Pair.__call__)


@IN_EVERY_MODE
@pytest.mark.parametrize("count", [flops, operators, functions, asked_for_gradients, hooks_of_the_profiler])
def test_who_counts_and_logs_counts_as_in_eval_mode(count: Any, mode: Any, recompute: Any) -> None:
    plain, net = pair(), pair()
    set_mode(net, mode, recompute=recompute)
    (ours, found), (theirs, expected) = count(net), count(plain)
    assert ours == theirs
    assert_same(found, expected)


# --------------------------------------------------------------------------------------------------- compiled graphs


@pytest.fixture
def _no_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_no_graphs")
@pytest.mark.parametrize("mode", ["tune", "deploy"])
@pytest.mark.parametrize("between", [torch.clone, lambda y: y.view_as(y), lambda y: y])
def test_what_a_graph_has_decided_is_forgotten_at_the_switch(between: Any, mode: Any) -> None:
    plain, net, other = pair(), pair(), pair()
    for each in (net, other):
        set_mode(each, mode)
    torch.compile(net, backend="eager")(image())
    set_mode(net, "train")
    set_mode(net, mode)
    expected = results(plain, lambda net, x: net.bn(between(net.conv(x))))
    for each in (net, other):  # the other one was never compiled
        check = results(each, lambda net, x: net.bn(between(net.conv(x)).clone()))
        assert_same(check, expected)
