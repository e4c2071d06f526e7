"""What stands in the place of a folded BatchNorm that takes inputs of several dimensions."""

from __future__ import annotations

import operator

from torch import fx, nn

from lightning_convbn.compat import assert_in_graph


def dimension_check(dims: int, name: str) -> nn.Module:
    """Return a module that returns its input, contiguous as a BatchNorm does, and refuses one of other dimensions.

    `torch.nn.BatchNorm1d` normalises the second of two or three dimensions. The fold of a linear layer is right for
    two, and that of a ``Conv1d`` for three. A copy can't see in advance which it will get.

    The module is a graph of ``torch.fx``, so that it loads without this package.

    Args:
        dims: The dimensions that the input must have.
        name: Qualified name of the BatchNorm.
    """
    graph = fx.Graph()
    input = graph.placeholder("input")
    right = graph.call_function(operator.eq, (graph.call_method("dim", (input,)), dims))
    text = (
        f"{name}: this Deploy copy is right for {dims} dimensions here; for others make it by fuse_for_deploy(model, "
        "example_inputs=...)"
    )
    graph.call_function(assert_in_graph, (right, text))
    graph.output(graph.call_method("contiguous", (input,)))
    return fx.GraphModule(nn.Module(), graph)
