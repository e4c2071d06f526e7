"""What holds of a pair in a graph: of a compiler, or of a trace. There are no marks in a graph.

In a graph a folded convolution returns the folded output, and its BatchNorm returns what it gets. That is right if both
do so. But one of the two may be in a graph, and the other one not: if it was compiled alone, or if a graph ends between
the two. So a convolution decides once, when a graph is first made of it or of its BatchNorm, and all graphs go by that:

- The convolution comes first: it is folded in graphs. If its BatchNorm then gets a tensor without a mark outside of a
  graph, nobody knows if that is normalised already, and an error says so.
- The BatchNorm comes first, so it was compiled without its convolution: in graphs the pair runs unfolded.
"""

from __future__ import annotations

from weakref import WeakSet

import torch
from torch import nn

from lightning_convbn.layers.swap import Converted

_FOLDED: WeakSet[nn.Module] = WeakSet()  # the convolutions that are folded in graphs
_UNFOLDED: WeakSet[nn.Module] = WeakSet()  # those that are not


class DecidesForGraphs(Converted):
    """Base of the folded convolutions. A compiler calls these methods while it makes a graph, and not in the graph."""

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def folds_in_graph(self) -> bool:
        """Whether the convolution is folded in the graph that is being made of it."""
        if self not in _UNFOLDED:
            _FOLDED.add(self)
        return self in _FOLDED

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def is_folded_in_graphs(self) -> bool:
        """Whether the BatchNorm, of which a graph is being made, gets what is normalised already."""
        if self not in _FOLDED:
            _UNFOLDED.add(self)
        return self in _FOLDED


def may_be_normalised(conv: nn.Module) -> bool:
    """Whether a tensor without a mark may be the folded output of a convolution: one that a graph has put out."""
    return conv in _FOLDED
