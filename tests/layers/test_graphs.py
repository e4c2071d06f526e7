"""Pairs in graphs: compiled together, alone, or half, before and after the switch. Everybody reads Eval's values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers.comparing import assert_close
from helpers.model_checks import randomized
from helpers.networks import Net, images
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.fx.experimental.proxy_tensor import make_fx

from lightning_convbn import find_conv_bn_pairs, set_mode

pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),  # what the compiler hides itself
    pytest.mark.filterwarnings("ignore:.torch.jit"),
]

Compile = Callable[[nn.Sequential], Any]


@pytest.fixture(autouse=True)
def _no_past() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def two_blocks() -> nn.Sequential:
    """``0.0`` and ``1.0`` are a pair over the border of two blocks, ``1.2`` and ``1.3`` one within a block."""
    torch.manual_seed(0)
    second = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5))
    net = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1)), second)
    return randomized(net.double().eval())  # type: ignore[return-value]


def wrap(parent: nn.Module, index: int) -> None:
    parent[index] = torch.compile(parent[index], backend="eager")  # type: ignore[operator, index]


def both_by_themselves(net: nn.Sequential) -> None:
    wrap(net[0], 0)
    wrap(net[1], 0)


ALONE: dict[str, Compile] = {
    "convolution in place": lambda net: net[0][0].compile(backend="eager"),
    "convolution wrapped": lambda net: wrap(net[0], 0),
    "norm in place": lambda net: net[1][0].compile(backend="eager"),
    "norm wrapped": lambda net: wrap(net[1], 0),
    "block of the convolution in place": lambda net: net[0].compile(backend="eager"),
    "block of the convolution wrapped": lambda net: wrap(net, 0),
    "block of the norm in place": lambda net: net[1].compile(backend="eager"),
    "block of the norm wrapped": lambda net: wrap(net, 1),
    "both by themselves": both_by_themselves,
}


def evals(net: nn.Module) -> tuple[Tensor, Tensor]:
    image = images(2, 3, 8, 8, dtype=torch.float64)
    return image, net(image)


@pytest.mark.parametrize("mode", ["tune", "deploy"])
@pytest.mark.parametrize("alone", ALONE)
def test_a_pair_that_is_not_compiled_together_is_not_folded(alone: str, mode: Any) -> None:
    image, expected = evals(two_blocks())
    net = two_blocks()
    ALONE[alone](net)
    pairs = set_mode(net, mode)
    assert len(pairs) == 1
    assert [reason.partition("`")[0] for reason in pairs.unpaired.values()] == [
        "it is not compiled together with its convolution "
    ]
    assert_close([net(image)], [expected], 1e-12)


@pytest.mark.parametrize("mode", ["tune", "deploy"])
@pytest.mark.parametrize("alone", ALONE)
def test_a_layer_that_is_compiled_alone_after_the_switch_gives_evals_result(alone: str, mode: Any) -> None:
    image, expected = evals(two_blocks())
    net = two_blocks()
    set_mode(net, mode)
    net(image)
    ALONE[alone](net)
    for _ in range(2):
        assert_close([net(image)], [expected], 1e-12)
    if "wrapped" not in alone:  # names that the wrappers have changed
        return
    set_mode(net, "train")
    set_mode(net, mode)
    assert_close([net(image)], [expected], 1e-12)


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_pair_that_is_compiled_together_is_folded(wrapped: bool) -> None:
    image, expected = evals(two_blocks())
    net = two_blocks()
    model = torch.compile(net, backend="eager", fullgraph=True) if wrapped else net
    if not wrapped:
        net.compile(backend="eager", fullgraph=True)
    assert len(find_conv_bn_pairs(model)) == 2
    assert len(set_mode(model, "tune")) == 2
    assert_close([model(image)], [expected], 1e-12)
    with torch.compiler.set_stance("force_eager"):
        assert_close([model(image)], [expected], 1e-12)


def test_a_graph_that_ends_between_the_two_layers_does_not_matter() -> None:
    def breaks(model: Net, x: Tensor) -> Tensor:
        x = model.net[0](x)
        torch._dynamo.graph_break()
        return model.net[1](x)

    image, expected = evals(two_blocks())
    model = Net(breaks, net=two_blocks())
    set_mode(model, "tune", pairs=find_conv_bn_pairs(model, example_inputs=(image,)))
    assert "convbn='tune'" in str(model.net[0])
    assert_close([torch.compile(model, backend="eager")(image)], [expected], 1e-12)


def test_a_norm_left_out_of_the_graph_normalises_what_comes_out_of_it() -> None:
    outside = torch.compiler.disable(lambda model, x: model.net[1](x))
    image, expected = evals(two_blocks())
    model = Net(lambda model, x: outside(model, model.net[0](x)), net=two_blocks())
    set_mode(model, "tune", pairs=find_conv_bn_pairs(model, example_inputs=(image,)))
    assert_close([torch.compile(model, backend="eager")(image)], [expected], 1e-12)


def branches(model: Net, x: Tensor) -> Tensor:
    """The output of a convolution goes elsewhere too, or alone, after a proof that has not seen it."""
    x = model.net[0](x)
    if model.way == "both":
        return model.net[1](x) + x.mean()
    return x.relu() if model.way == "alone" else model.net[1](x)


@pytest.mark.parametrize("way", ["norm", "both", "alone"])
@pytest.mark.parametrize("graph", ["compile", "export", "jit.trace", "make_fx"])
def test_in_a_graph_nobody_reads_folded_values_either(way: str, graph: str) -> None:
    model = Net(branches, net=two_blocks())
    model.way = "norm"
    image = images(2, 3, 8, 8, dtype=torch.float64)
    pairs = find_conv_bn_pairs(model, example_inputs=(image,))
    model.way = way
    expected = model(image)
    assert set_mode(model, "tune", pairs=pairs)[0].bn.startswith("net.1")
    run = {
        "compile": lambda: torch.compile(model, backend="eager", fullgraph=True),
        "export": lambda: torch.export.export(model, (image,)).module(),
        "jit.trace": lambda: torch.jit.trace(model, image),
        "make_fx": lambda: make_fx(model)(image),
    }[graph]()
    assert_close([run(image)], [expected], 1e-12)


def test_a_compiler_convolves_once_for_a_pair() -> None:
    net, graphs = two_blocks(), []

    def note(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    set_mode(net, "tune")
    torch.compile(net, backend=aot_autograd(fw_compiler=note))(images(2, 3, 8, 8, dtype=torch.float64))
    targets = [str(node.target) for node in graphs[0].graph.nodes]
    assert sum("convolution" in target for target in targets) == 2
    assert not any("batch_norm" in target for target in targets)


def test_what_ran_in_a_graph_is_run_without_it_unfolded() -> None:
    """Only gamma is trained, and the output is smaller: the pair runs unfolded outside of graphs, too."""
    net = nn.Sequential(nn.Conv2d(8, 2, 3).requires_grad_(False), nn.BatchNorm2d(2)).double().eval()
    randomized(net)
    image = images(2, 8, 8, 8, dtype=torch.float64)
    expected = net(image)
    set_mode(net, "tune")
    for run in (torch.compile(net, backend="eager"), net):
        assert_close([run(image)], [expected], 1e-12)


@pytest.mark.parametrize("mode", ["tune", "deploy"])
def test_a_compiled_reader_of_a_folded_output_reads_evals(mode: Any) -> None:
    net = two_blocks()
    image = images(2, 3, 8, 8, dtype=torch.float64)
    expected = net[0](image).relu() + 1
    set_mode(net, mode)
    reader = torch.compile(lambda x: x.relu() + 1, backend="eager")
    assert_close([reader(net[0](image))], [expected], 1e-12)
