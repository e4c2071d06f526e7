"""Networks and what is done with them, as data: drawn from a seed, run by an interpreter, made smaller, printed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields


class Short:
    """Prints a dataclass as one can paste it into a test, without the fields that have their defaults."""

    def __repr__(self) -> str:
        shown = []
        for one in fields(self):  # type: ignore[arg-type]
            value = getattr(self, one.name)
            default = one.default_factory() if one.default_factory is not MISSING else one.default
            if value != default:
                shown.append(f"{one.name}={value!r}")
        return f"{type(self).__name__}({', '.join(shown)})"


@dataclass(frozen=True, repr=False)
class Layer(Short):
    """A module. What it is for its input (Conv1d or Conv2d, how many channels) follows from its first input.

    Attributes:
        kind: "conv", "transposed", "norm", "act", "drop", "pool", "seq", "block", or "stage": two blocks in a row.
        name: Of a norm or an activation, its class; of a convolution, what is special ("weight_norm", "subclass" ...);
            "derived" for a class that inherits all of its own.
        out: Channels of a convolution's output; 0 for those of its input.
        parts: The layers of a Sequential.
        body: The network inside of a block, or of each block of a stage.
    """

    kind: str
    name: str = ""
    out: int = 0
    kernel: int = 1
    stride: int = 1
    groups: int = 1
    bias: bool = True
    padding: str = "zeros"
    eps: float = 1e-5
    affine: bool = True
    track: bool = True
    momentum: float | None = 0.1
    inplace: bool = False
    parts: tuple[Layer, ...] = ()
    body: Network | None = None


@dataclass(frozen=True, repr=False)
class Step(Short):
    """One line of a forward. It computes one value from earlier ones.

    Attributes:
        op: A name of `operations.OPERATIONS`.
        x: The numbers of the values that it reads. The inputs come first, then the results of the steps.
        layer: The layer that it calls: a name, or ``"b.0"`` for a part of a Sequential.
        layers: The layers of which it picks one.
        guard: On what it depends whether the step is done; the result is the first value if not.
        no_grad: Whether it runs under ``torch.no_grad()``.
        name: What else an operation must know.
    """

    op: str
    x: tuple[int, ...] = (0,)
    layer: str = ""
    layers: tuple[str, ...] = ()
    guard: str = ""
    no_grad: bool = False
    name: str = ""


@dataclass(frozen=True, repr=False)
class Hook(Short):
    """A forward hook or pre-hook. It does "read", "store", "scale" (returns another tensor) or "scale_" (in place)."""

    layer: str
    before: bool = False
    does: str = "read"


@dataclass(frozen=True, repr=False)
class Network(Short):
    """A network.

    Attributes:
        inputs: Shapes of the inputs, without the batch.
        takes: How forward gets them: "tensor", "list", "dict" or "two" arguments.
        gives: How it returns its outputs: "tensor", "list", "dict" or "nested".
        outputs: The numbers of the values that it returns.
    """

    steps: tuple[Step, ...] = ()
    layers: Mapping[str, Layer] = field(default_factory=dict)
    inputs: tuple[tuple[int, ...], ...] = ((2, 5, 5),)
    outputs: tuple[int, ...] = (-1,)
    hooks: tuple[Hook, ...] = ()
    takes: str = "tensor"
    gives: str = "tensor"


@dataclass(frozen=True, repr=False)
class Action(Short):
    """Something that is done with a network: to the converted one, and to its twin as far as it is no switch.

    Attributes:
        do: "mode", "run", "flags" (``.train()`` or ``.eval()``), "domain", "replace", "copy", "fuse", "load" or "free".
        recompute: Of a mode, "none", "elementwise", "blocks", "names" (all that can be named) or "whole" (the network).
        look: Of a mode, how pairs are found: "" by ``pairs=None``, "trace", or "record" (with example inputs).
        unfreeze: Of a mode, whether half of the BatchNorms stay unfrozen.
        grad: Of a run: "grad" with a backward pass, "no_grad" or "inference".
        domain: The argument of the forward, or the attribute's value.
        times: Of a run, two forwards for one backward pass ("forwards"), or two of each ("accumulate").
        every_module: Of a run, the kind of hook that all modules have in the meantime.
    """

    do: str
    mode: str = "tune"
    recompute: str = "none"
    look: str = ""
    unfreeze: bool = False
    grad: str = "grad"
    batch: int = 2
    domain: int = 0
    layer: str = ""
    training: bool = False
    times: str = ""
    every_module: str = ""


@dataclass(frozen=True, repr=False)
class Scenario(Short):
    """A network and what is done with it.

    Attributes:
        seed: Of weights, statistics and inputs.
        trained: Which parameters want gradients: "all", "none", "norms", "convs" or "some".
        input_grad: Whether the inputs want gradients.
        training: Whether the network is found in its training state.
        precision: "float64", "float32" or "autocast".
    """

    network: Network
    actions: tuple[Action, ...] = (Action("mode"), Action("run"))
    seed: int = 0
    trained: str = "all"
    input_grad: bool = False
    training: bool = False
    precision: str = "float64"


def steps_of(network: Network) -> Iterator[Step]:
    """Yield the steps of a network and of those inside of it."""
    yield from network.steps
    for layer in network.layers.values():
        if layer.body is not None:
            yield from steps_of(layer.body)
