"""Draws networks: mostly pairs, with all that makes it hard to prove them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from random import Random
from typing import Any

from fuzz.building import ACTIVATIONS, SPECIAL_CONVOLUTIONS, SPECIAL_NORMS
from fuzz.interpreter import Interpreter, build
from fuzz.network import Hook, Layer, Network, Step
from fuzz.operations import FUNCTIONS, GUARDS, WRITERS

INVALID = (RuntimeError, ValueError, IndexError)  # of a step that does not fit
LETTERS = "abcdefghijklmnopqrstuvwxyz"


class Draft:
    """A network that grows step by step. A step that does not fit is left out."""

    def __init__(self, random: Random, network: Network, deep: bool) -> None:
        self.random = random
        self.network = network
        self.deep = deep  # whether it may hold blocks
        self.model: Interpreter = build(network)
        self.at = 0  # the value that the next motif continues
        self.convolved: list[int] = []  # the values that convolutions have computed

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def shape(self, number: int | None = None) -> tuple[int, ...]:
        return self.model.shapes[self.at if number is None else number]

    def new_name(self) -> str:
        return next(letter for letter in LETTERS if letter not in self.network.layers)

    def add(self, step: Step, layers: Mapping[str, Layer] | None = None) -> bool:
        """Add a step and continue from its result, if the network can be built with it."""
        layers = {**self.network.layers, **(layers or {})}
        grown = replace(self.network, steps=(*self.network.steps, step), layers=layers)
        try:
            self.model = build(grown)
        except INVALID:
            return False
        self.network = grown
        self.at = len(self.model.shapes) - 1
        return True

    def call(self, layer: Layer, **options: Any) -> bool:
        """Call a new layer on the current value."""
        name = self.new_name()
        return self.add(Step("call", (self.at,), name, **options), {name: layer})

    def modifiers(self) -> dict[str, Any]:
        """Sometimes make a step depend on something, or run it without gradients."""
        options: dict[str, Any] = {}
        if self.chance(0.08):
            options["guard"] = self.random.choice(GUARDS)
        if self.chance(0.03):
            options["no_grad"] = True
        return options

    def other(self) -> int:
        """A value to combine with the current one: of the same shape, and often a convolution's output."""
        same = [number for number, shape in enumerate(self.model.shapes) if shape == self.shape()]
        tapped = [number for number in self.convolved if number in same]
        return self.random.choice(tapped if tapped and self.chance(0.4) else same)


def draw_conv(draft: Draft) -> Layer:
    """Draw a convolution that fits the current value."""
    random, size = draft.random, draft.shape()[1]
    rank = len(draft.shape())
    out = random.choice([0, 0, 2, 3, 4, 6])
    transposed = rank > 2 and draft.chance(0.15)
    groups = random.choice([1, size]) if out in (0, size) else 1
    stride = 2 if draft.chance(0.1) and (min(draft.shape()[2:], default=0) >= 4 or transposed) else 1
    special = ""
    if draft.chance(0.1):
        special = random.choice([*SPECIAL_CONVOLUTIONS, "weight_norm", "Conv3DSimple"])
        transposed, groups = False, 1
    padding = random.choice(["zeros", "zeros", "zeros", "same", "circular", "reflect"])
    kind = "transposed" if transposed else "conv"
    padding = "zeros" if transposed or stride > 1 else padding
    return Layer(kind, special, out, random.choice([1, 3, 3]), stride, groups, draft.chance(0.5), padding)


def draw_norm(draft: Draft) -> Layer:
    """Draw a norm: mostly a BatchNorm that may be folded."""
    random = draft.random
    name = ""
    if draft.chance(0.35):
        names = ["SyncBatchNorm", "_BatchNormXd", "GroupNorm", "InstanceNorm"]
        name = random.choice([*names, *(SPECIAL_NORMS if len(draft.shape()) == 4 else ())])
    eps = random.choice([1e-5, 1e-3, 0.1])
    return Layer("norm", name, eps=eps, affine=draft.chance(0.85), track=draft.chance(0.95))


def draw_act(draft: Draft) -> Layer:
    """Draw an activation."""
    return Layer("act", draft.random.choice(sorted(ACTIVATIONS)), inplace=draft.chance(0.3))


def add_pair(draft: Draft) -> None:
    """A convolution and a norm, and mostly an activation: as layers of their own, as a Sequential, or picked."""
    conv, norm = draw_conv(draft), draw_norm(draft)
    style = draft.random.choice(["layers"] * 5 + ["seq"] * 3 + ["parts", "pick", "rows"])
    name = draft.new_name()
    if style == "seq":
        parts = (conv, norm, draw_act(draft)) if draft.chance(0.5) else (conv, norm)
        draft.call(Layer("seq", parts=parts), **draft.modifiers())
        return
    if style == "parts":
        draft.add(Step("call", (draft.at,), f"{name}.0"), {name: Layer("seq", parts=(conv, norm))})
        draft.convolved.append(draft.at)
        convolved = draft.at
        maybe_tap(draft)
        draft.add(Step("call", (convolved,), f"{name}.1"))
        return
    if style == "rows" and len(draft.shape()) > 2:
        other = next(letter for letter in LETTERS if letter not in draft.network.layers and letter != name)
        view = "transposed" if draft.at % 2 else ""
        layers = {name: Layer("conv"), other: Layer("norm")}
        draft.add(Step("rows", (draft.at,), layers=(name, other), name=view), layers)
        return
    if draft.call(conv, **draft.modifiers()):
        draft.convolved.append(draft.at)
    if style == "pick":
        add_pick(draft)
    elif draft.chance(0.15):
        convolved = draft.at
        maybe_tap(draft)
        draft.at = convolved
    draft.call(norm, **draft.modifiers())
    if draft.chance(0.6):
        draft.call(draw_act(draft), **draft.modifiers())


def add_pick(draft: Draft) -> None:
    """Choose one of two norms by an argument or an attribute."""
    first = draft.new_name()
    second = next(letter for letter in LETTERS if letter not in draft.network.layers and letter != first)
    how = draft.random.choice(["argument", "attribute"])
    norms = {first: draw_norm(draft), second: draw_norm(draft)}
    draft.add(Step("pick", (draft.at,), layers=(first, second), name=how), norms)


def maybe_tap(draft: Draft) -> None:
    """Let something else read the current value, perhaps only under a condition."""
    if draft.chance(0.5):
        guard = draft.random.choice(["", *GUARDS])
        op = draft.random.choice(["log", "keep", "gate", "add", "function"])
        x = (0, draft.at) if op in ("gate", "add") else (draft.at,)
        draft.add(Step(op, x, guard=guard, name=draft.random.choice(sorted(FUNCTIONS)) if op == "function" else "tap"))
    else:
        add_put(draft)


def add_put(draft: Draft) -> None:
    """Write a value into what the caller has given."""
    ops = {"list": ["put", "append"], "dict": ["put"]}.get(draft.network.takes)
    if ops:
        draft.add(Step(draft.random.choice(ops), (draft.at,)))


def add_function(draft: Draft) -> None:
    """An activation or another function of one value."""
    names = sorted(set(FUNCTIONS) - set(WRITERS)) if draft.chance(0.6) else sorted(WRITERS)
    draft.add(Step("function", (draft.at,), name=draft.random.choice(names), **draft.modifiers()))


def add_combination(draft: Draft) -> None:
    """A function of two values."""
    op = draft.random.choice(["add", "add", "add_", "mul", "sub", "cat", "stack", "gate", "zeros", "expand"])
    draft.add(Step(op, (draft.at, draft.other()), **draft.modifiers()))


def add_other(draft: Draft) -> None:
    """A layer without parameters, a split, a side effect, a weight that is used a second time."""
    op = draft.random.choice(
        ["act", "drop", "pool", "split", "slice", "log", "keep", "keep", "parameter", "put", "put"]
    )
    kept = [step.name for step in draft.network.steps if step.op == "keep"]
    if op in ("act", "drop", "pool") and (op != "pool" or len(draft.shape()) > 2):
        stride = draft.random.choice([1, 2])
        draft.call(draw_act(draft) if op == "act" else Layer(op, stride=stride), **draft.modifiers())
    elif op == "parameter":
        names = [name for name, layer in draft.network.layers.items() if layer.kind in ("conv", "norm")]
        if names:
            draft.add(Step("parameter", (draft.at,), draft.random.choice(names)))
    elif op == "put":
        add_put(draft)
    elif op == "keep" and kept:
        draft.add(Step("recall", (draft.at,), name=kept[-1]))
    else:
        draft.add(Step(op, (draft.at,), name="kept" if op == "keep" else "", **draft.modifiers()))


def add_shared(draft: Draft) -> None:
    """Call a layer a second time."""
    names = list(draft.network.layers)
    if names:
        draft.add(Step("call", (draft.at,), draft.random.choice(names), **draft.modifiers()))


def add_block(draft: Draft) -> None:
    """A network inside of the network, perhaps checkpointed."""
    if not draft.deep:
        add_pair(draft)
        return
    inside = Network(inputs=(draft.shape()[1:],))
    body = draw_steps(Draft(draft.random, inside, False), draft.random.choice([1, 2]))
    op = "checkpoint" if draft.chance(0.2) else "call"
    name = draft.new_name()
    draft.add(Step(op, (draft.at,), name, **draft.modifiers()), {name: Layer("block", body=body)})


MOTIFS = [(add_pair, 8), (add_function, 3), (add_combination, 4), (add_other, 5), (add_shared, 1), (add_block, 2)]


def draw_steps(draft: Draft, motifs: int) -> Network:
    """Let a draft grow."""
    add_pair(draft)
    for _ in range(motifs - 1):
        (motif,) = draft.random.choices([motif for motif, _ in MOTIFS], [weight for _, weight in MOTIFS])
        motif(draft)
    return draft.network


def draw_network(random: Random) -> Network:
    """Draw a network."""
    size = (random.choice([5, 6, 7, 8]),) * random.choice([0, 1, 2, 2, 2, 3])
    size = (5, 5, 5) if len(size) == 3 else size
    takes = random.choice(["tensor", "tensor", "tensor", "list", "dict", "two"])
    inputs = ((random.choice([2, 3, 4, 6]), *size),) * (1 if takes == "tensor" else 2)
    draft = Draft(random, Network(inputs=inputs, takes=takes), True)
    if draft.chance(0.1):
        draft.add(Step("standardize"))
    network = draw_steps(draft, random.choice([2, 3, 4, 5, 6]))
    if draft.chance(0.3) and len(draft.shape()) > 2 and draft.add(Step("pool", (draft.at,))):
        draft.call(Layer("conv", out=3))
        network = draft.network
    return replace(network, **draw_ends(draft))


def draw_ends(draft: Draft) -> dict[str, Any]:
    """Draw the outputs and the hooks."""
    random, count = draft.random, len(draft.model.shapes)
    gives = random.choice(["tensor", "tensor", "list", "dict", "nested"])
    outputs = [count - 1]
    if gives != "tensor":
        chosen = draft.convolved if draft.convolved and draft.chance(0.2) else range(count)
        outputs += [random.choice(list(chosen))]
    hooks = [draw_hook(draft) for _ in range(random.choice([0, 0, 0, 0, 1, 2])) if draft.network.layers]
    return {"gives": gives, "outputs": tuple(outputs), "hooks": tuple(hooks)}


def draw_hook(draft: Draft) -> Hook:
    """Draw a hook of any layer, of a part of a Sequential too."""
    names = [name for name, _ in draft.model.named_modules() if name and "parametrizations" not in name]
    does = draft.random.choice(["read", "read", "store", "scale", "scale_"])
    return Hook(draft.random.choice(names), draft.chance(0.5), does)
