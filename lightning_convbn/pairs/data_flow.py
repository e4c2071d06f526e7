"""The data flow around convolutions and BatchNorms: the form in which tracing and recording both report it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import nn

from lightning_convbn.layers.supported_layers import CONVOLUTIONS, conv_layer, is_norm
from lightning_convbn.pairs import reasons

# Users of a convolution's output that are no module and no function.
RETURNED = "the caller, as it is returned"
PUT_INTO_ARGUMENT = "the caller, as it is put into an argument of forward"
READER_OF_ATTRIBUTE = "whoever reads the attribute `{name}`"

WHOLE_MODEL = "the model"  # the name of a model that can't be traced, among those of its parts


def is_leaf(module: nn.Module) -> bool:
    """Whether a module is a convolution or a BatchNorm, also of a subclass. Its forward is not looked into."""
    return is_norm(module) or isinstance(module, CONVOLUTIONS) or conv_layer(module) is not None


def is_inside(name: str, of: str) -> bool:
    """Whether a qualified name is that of a module inside of another one, which may be `WHOLE_MODEL`."""
    return of == WHOLE_MODEL or f"{name}.".startswith(f"{of}.")


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
        for name in ("calls", "sources", "users", "norms", "readers", "dims", "unseen"):
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
            return reasons.NO_CONVOLUTION.format(source=f"`{name}` ({type(source).__name__})")
        others = [*self.users[source], *(f"`{self.names[norm]}`" for norm in self.norms[source] if norm is not bn)]
        if others:
            return reasons.SECOND_CONSUMER.format(conv=name, user=others[0])
        if self.calls[source] != self.calls[bn]:
            return reasons.OTHER_CALLS.format(count=self.calls[bn], conv=name, other=self.calls[source])
        return source
