"""Hooks of every module, counters, loggers and compilers see a converted pair as they see it in Eval mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers.right_or_named import MODES, Pair, assert_same, image, pair, results
from lightning.pytorch.profilers.pytorch import RegisterRecordFunction
from torch import Tensor, nn
from torch.nn.modules import module as every_module
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from lightning_convbn import find_conv_bn_pairs, measure_memory, set_mode

pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),
    pytest.mark.filterwarnings("ignore:Using a non-full backward hook"),
]
IN_EVERY_MODE = pytest.mark.parametrize(("mode", "recompute"), MODES)

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
