"""The data flow around convolutions and BatchNorms: the form in which tracing and recording both report it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from lightning_convbn.compat import outside_fake_mode
from lightning_convbn.layers.marks import Applied
from lightning_convbn.layers.supported_layers import conv_layer, is_norm
from lightning_convbn.layers.swap import class_name
from lightning_convbn.pairs import reasons

_CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
)

# Users of a convolution's output that are no module and no function.
RETURNED = "the caller, as it is returned"
PUT_INTO_ARGUMENT = "the caller, as it is put into an argument of forward"
READER_OF_ATTRIBUTE = "whoever reads the attribute `{name}`"

WHOLE_MODEL = "the model"  # the name of a model that can't be traced, among those of its parts

METADATA = ("shape", "ndim", "dtype", "device")
"""Attributes of a convolution's output that folding leaves unchanged. Whoever reads them reads no values."""

TAKES_ONLY_THE_SHAPE = ("reshape_as", "view_as", "expand_as")
"""Functions that read nothing but the shape of their second argument."""


def is_leaf(module: nn.Module) -> bool:
    """Whether a module is a convolution or a BatchNorm, also of a subclass. Its forward is not looked into."""
    return is_norm(module) or isinstance(module, _CONVOLUTIONS) or conv_layer(module) is not None


def is_inside(name: str, of: str) -> bool:
    """Whether a qualified name is that of a module inside of another one, which may be `WHOLE_MODEL`."""
    return of == WHOLE_MODEL or f"{name}.".startswith(f"{of}.")


def dims_behind_views(module: nn.Module, views: Sequence[Applied]) -> int | None:
    """Return the dimensions of a view of a linear layer's output whose channels are the layer's features, else None.

    LeViT has ``bn(linear(x).flatten(0, 1))``, and point clouds ``bn(linear(x).transpose(1, 2))``. The views are tried
    on two outputs of three dimensions, in which each value is the number of its feature.

    Args:
        module: The layer.
        views: What is applied to its output, without any size of a batch.
    """
    if not isinstance(module, nn.Linear):
        return None
    dims = None
    with outside_fake_mode():
        features = torch.arange(module.out_features, device="cpu")
        for sizes in ((2, 3), (5, 7)):
            view = features.expand(*sizes, -1)
            try:
                for func, args, kwargs in views:
                    view = func(view, *args, **kwargs)
            except (RuntimeError, IndexError, TypeError):  # they need other dimensions, or name the size of a batch
                return None
            dims = view.dim()
            if dims < 2 or view.shape[1] != len(features) or not bool((view.transpose(1, -1) == features).all()):
                return None
    return dims


@dataclass
class DataFlow:
    """Where the inputs of BatchNorms come from, and where the outputs of convolutions go.

    Attributes:
        names: Module -> qualified name, for all modules.
        calls: Convolution or BatchNorm -> how often it is called.
        sources: BatchNorm -> for each call, the module that has computed its input, or words for what else did.
        users: Convolution -> words for each use of its output, except by BatchNorms.
        norms: Convolution -> the BatchNorms that use its output.
        readers: Convolution or BatchNorm -> words for whoever reads values of its parameters or buffers from outside.
        dims: BatchNorm -> the dimensions of its input; unknown without data.
        reshaped: BatchNorm whose input is a view of a linear layer's output -> the dimensions of that view.
        unseen: BatchNorm that could not be observed -> why.
        untraced: Names of the modules that could not be traced, so that only their children were.
        drawing: Names of the modules whose forward draws random numbers itself, and may branch by them.
    """

    names: dict[nn.Module, str]
    calls: dict[nn.Module, int] = field(default_factory=lambda: defaultdict(int))
    sources: dict[nn.Module, list[nn.Module | str]] = field(default_factory=lambda: defaultdict(list))
    users: dict[nn.Module, list[str]] = field(default_factory=lambda: defaultdict(list))
    norms: dict[nn.Module, list[nn.Module]] = field(default_factory=lambda: defaultdict(list))
    readers: dict[nn.Module, list[str]] = field(default_factory=lambda: defaultdict(list))
    dims: dict[nn.Module, int] = field(default_factory=dict)
    reshaped: dict[nn.Module, int] = field(default_factory=dict)
    unseen: dict[nn.Module, str] = field(default_factory=dict)
    untraced: list[str] = field(default_factory=list)
    drawing: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, model: nn.Module) -> DataFlow:
        """Return the data flow of a model of which nothing is known yet."""
        return cls({module: name for name, module in model.named_modules()})

    def of_originals(self, originals: Mapping[nn.Module, nn.Module]) -> DataFlow:
        """Return the data flow of a model, given that of its shadow.

        Args:
            originals: Module of the shadow -> the module that it is the shadow of.
        """

        def original(value: Any) -> Any:
            if isinstance(value, list):
                return [original(item) for item in value]
            return originals[value] if isinstance(value, nn.Module) else value

        names = {originals[module]: name for module, name in self.names.items()}
        flow = DataFlow(names, untraced=self.untraced, drawing=self.drawing)
        for name in ("calls", "sources", "users", "norms", "readers", "dims", "reshaped", "unseen"):
            getattr(flow, name).update({originals[key]: original(value) for key, value in getattr(self, name).items()})
        return flow

    @cached_property
    def _owners(self) -> dict[int, list[nn.Module]]:
        """Id of a parameter or buffer -> the convolutions and BatchNorms that have it."""
        owners: dict[int, list[nn.Module]] = defaultdict(list)
        for module in filter(is_leaf, self.names):
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                owners[id(tensor)].append(module)
        return owners

    def record_read(self, value: object, user: str) -> None:
        """Record that a value is read, if it is a parameter or a buffer of a convolution or BatchNorm."""
        for module in self._owners.get(id(value), ()):
            self.readers[module].append(user)

    def partner(self, bn: nn.Module) -> nn.Module | str | None:
        """Return the convolution in front of a BatchNorm, or why there is none; None if ``bn`` was never called.

        Both may be called often, as in a Siamese network, if every call of one goes with a call of the other.
        """
        if not self.calls[bn]:
            return None
        sources = set(self.sources[bn])
        if len(sources) > 1:
            return reasons.CALLED_OFTEN.format(count=self.calls[bn])
        (source,) = sources
        if isinstance(source, str):
            return reasons.NO_CONVOLUTION.format(source=source)
        name = self.names[source]
        if not is_leaf(source) or is_norm(source):
            return reasons.NO_CONVOLUTION.format(source=f"`{name}` ({class_name(source)})")
        others = [*self.users[source], *(f"`{self.names[norm]}`" for norm in self.norms[source] if norm is not bn)]
        if others:
            return reasons.SECOND_CONSUMER.format(conv=name, user=others[0])
        if self.calls[source] != self.calls[bn]:
            return reasons.OTHER_CALLS.format(count=self.calls[bn], conv=name, other=self.calls[source])
        return source
