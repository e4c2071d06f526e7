"""The module that runs a network."""

from __future__ import annotations

from typing import Any

import torch
from fuzz.building import make
from fuzz.network import Hook, Layer, Network
from fuzz.operations import Frame, run_step, sample
from torch import Tensor, nn

KEYS = ("left", "right")


class Interpreter(nn.Module):
    """Runs the steps of a network in its forward. ``torch.fx`` can trace it as far as the steps allow.

    The layers are built in the first pass, here in the constructor, for the shapes that they get there.
    """

    def __init__(self, network: Network, example: Tensor | None = None) -> None:
        super().__init__()
        self.network = network
        self.domain = 0
        self.kept: dict[str, Any] = {}
        self.history: list[Any] = []
        self.shapes: list[tuple[int, ...]] = []
        given = [sample(shape) for shape in network.inputs] if example is None else [example]
        with torch.no_grad():
            frame = Frame(self, list(given), list(given), 0, building=True)
            if network.takes == "dict":
                frame.given = dict(zip(KEYS, given, strict=False))
            for step in network.steps:
                self.shapes = [tuple(value.shape) for value in frame.values]
                run_step(frame, step)
        self.shapes = [tuple(value.shape) for value in frame.values]
        for hook in network.hooks:
            install(hook, self)

    def layer(self, path: str, x: Any) -> nn.Module:
        """Return a layer; build it for its first input."""
        name = path.partition(".")[0]
        if name not in self._modules:
            layer = self.network.layers[name]
            self.add_module(name, make(layer, x) if layer.body is None else make_blocks(layer, x))
        return self.get_submodule(path)

    def shape_of(self, number: int) -> tuple[int, ...]:
        """Return the shape that a value had when the network was built."""
        return self.shapes[number]

    def run(self, values: list[Any], given: Any, domain: Any) -> Any:
        """Run all steps and pack the outputs."""
        self.kept = {}
        frame = Frame(self, given, values, domain)
        for step in self.network.steps:
            run_step(frame, step)
        outputs = [frame.values[number] for number in self.network.outputs]
        match self.network.gives:
            case "list":
                return outputs
            case "dict":
                return {f"out{number}": output for number, output in enumerate(outputs)}
            case "nested":
                return {"first": outputs[0], "rest": [(output, number) for number, output in enumerate(outputs[1:])]}
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def forward(self, x: Any, domain: Any = 0) -> Any:
        """Run the network on a tensor, or on a list or dict of tensors."""
        if self.network.takes == "tensor":
            return self.run([x], x, domain)
        keys = KEYS if self.network.takes == "dict" else range(len(self.network.inputs))
        return self.run([x[key] for key, _ in zip(keys, self.network.inputs, strict=False)], x, domain)


def make_blocks(layer: Layer, x: Tensor) -> nn.Module:
    """Build a block, or a stage of two."""
    block = Interpreter(layer.body, x)
    return block if layer.kind == "block" else nn.Sequential(block, Interpreter(layer.body, block(x)))


class TwoInputs(Interpreter):
    """An interpreter that takes its two inputs as two arguments."""

    def forward(self, x: Any, y: Any, domain: Any = 0) -> Any:  # type: ignore[override]
        """Run the network."""
        return self.run([x, y], [x, y], domain)


def build(network: Network) -> Interpreter:
    """Build the module of a network, with nothing kept of the pass that has built it."""
    model = (TwoInputs if network.takes == "two" else Interpreter)(network)
    for module in model.modules():
        if isinstance(module, Interpreter):
            module.kept, module.history = {}, []
    return model


class HookFunction:
    """What a hook does. It is an object, so that a deep copy of a model has hooks that belong to the copy."""

    def __init__(self, hook: Hook, model: Interpreter) -> None:
        self.hook = hook
        self.model = model

    def __call__(self, module: nn.Module, args: Any, output: Any = None) -> Any:
        """Read, store or change what goes into the module or comes out of it."""
        value = args[0] if self.hook.before else output
        match self.hook.does:
            case "read":
                value.detach().sum()
            case "store":
                self.model.kept[f"{self.hook.layer}:{'before' if self.hook.before else 'after'}"] = value
            case "scale":
                return (value * 1.5,) if self.hook.before else value * 1.5
            case "scale_":
                value.mul_(1.5)
        return None


def install(hook: Hook, model: Interpreter) -> None:
    """Register a hook."""
    module, function = model.get_submodule(hook.layer), HookFunction(hook, model)
    if hook.before:
        module.register_forward_pre_hook(function)
    else:
        module.register_forward_hook(function)
