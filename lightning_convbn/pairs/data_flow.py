"""What a forward pass does with the outputs of convolutions: the form in which both provers state what they saw."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from torch import nn
from torch.nn.modules.conv import _ConvNd

from lightning_convbn.layers.swap import class_name
from lightning_convbn.layers.table import conv_layer, is_norm
from lightning_convbn.pairs import reasons


def is_leaf(module: nn.Module) -> bool:
    """Whether a module is a convolution or a BatchNorm, of whatever class: the provers don't look inside."""
    return is_norm(module) or isinstance(module, (_ConvNd, nn.Linear)) or conv_layer(module) is not None


@dataclass
class DataFlow:
    """Where the inputs of BatchNorms come from, and where the outputs of convolutions go.

    Attributes:
        names: Qualified name of every module.
        calls: How often each convolution and BatchNorm is called.
        sources: For each call of a BatchNorm, the module whose output it gets, or a description of what else.
        users: For each convolution, a description of whatever uses its output, BatchNorms excepted.
        norms: For each convolution, the BatchNorms that its output goes to.
        flattened: BatchNorms that get a linear layer's output with all but its last dimension flattened.
        unseen: For each BatchNorm that could not be observed, why.
        untraced: Names of the modules that could not be traced, so that only their children were.
    """

    names: dict[nn.Module, str]
    calls: dict[nn.Module, int] = field(default_factory=lambda: defaultdict(int))
    sources: dict[nn.Module, list[nn.Module | str]] = field(default_factory=lambda: defaultdict(list))
    users: dict[nn.Module, list[str]] = field(default_factory=lambda: defaultdict(list))
    norms: dict[nn.Module, list[nn.Module]] = field(default_factory=lambda: defaultdict(list))
    flattened: set[nn.Module] = field(default_factory=set)
    unseen: dict[nn.Module, str] = field(default_factory=dict)
    untraced: list[str] = field(default_factory=list)

    def partner(self, bn: nn.Module) -> nn.Module | str | None:
        """Return the convolution in front of a BatchNorm, or why there is none; None if ``bn`` was never called."""
        if not self.calls[bn]:
            return None
        if self.calls[bn] > 1:
            return reasons.CALLED_OFTEN.format(count=self.calls[bn])
        source = self.sources[bn][0]
        if isinstance(source, str):
            return reasons.NO_CONVOLUTION.format(source=source)
        name = self.names[source]
        if not is_leaf(source) or is_norm(source):
            return reasons.NO_CONVOLUTION.format(source=f"`{name}` ({class_name(source)})")
        if self.calls[source] > 1:
            return reasons.SHARED_CONVOLUTION.format(conv=name, count=self.calls[source])
        others = [*self.users[source], *(f"`{self.names[norm]}`" for norm in self.norms[source] if norm is not bn)]
        if others:
            return reasons.SECOND_CONSUMER.format(conv=name, user=others[0])
        return source
