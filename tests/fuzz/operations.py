"""What the steps of a network do: each operation is a function of a frame, a step and the values that it reads."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
import torch.nn.functional as F
from fuzz.network import Network, Step
from fuzz.unseen import ask, compute, unseen
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass
class Frame:
    """One forward pass of an interpreter: the interpreter, its arguments, and the values so far."""

    model: Any
    given: Any
    values: list[Any]
    domain: Any
    building: bool = False


def holds(guard: str, frame: Frame, x: Any) -> Any:
    """Decide a branch."""
    if frame.building or not guard:
        return True
    match guard:
        case "shape":
            return x.shape[0] > 2
        case "argument":
            return frame.domain % 2 == 1
        case "attribute":
            return frame.model.domain % 2 == 1
        case "random":
            return random.random() < 0.5
        case "torch_random":
            return torch.rand(()) < 0.5
        case "value":
            return x.sum() > 0
        case "training":
            return frame.model.training
        case "grad":
            return torch.is_grad_enabled()
    raise ValueError(f"no such guard: {guard!r}")


GUARDS = ("shape", "argument", "attribute", "random", "torch_random", "value", "training", "grad")


def call(frame: Frame, step: Step, x: Any) -> Any:
    module = frame.model.layer(step.layer, x)
    return module(x, frame.domain) if isinstance(getattr(module, "network", None), Network) else module(x)


def pick(frame: Frame, step: Step, x: Any) -> Any:
    modules = [frame.model.layer(name, x) for name in step.layers]
    number = frame.domain if step.name == "argument" else frame.model.domain
    return modules[number % len(modules)](x)


def checkpointed(frame: Frame, step: Step, x: Any) -> Any:
    """Run a layer that is run again in the backward pass.

    PyTorch gives the second run the same random numbers of its own, and asks that it computes the same. Python's random
    numbers are up to the network. Without them a branch goes another way the second time. Then Eval mode, too, raises
    or computes a gradient of something else, as the number of saved tensors happens to be.
    """
    state, layer = random.getstate(), frame.model.layer(step.layer, x)

    @contextmanager
    def second_run() -> Iterator[None]:
        now = random.getstate()
        random.setstate(state)
        try:
            with statistics_unwritten(layer):
                yield
        finally:
            random.setstate(now)

    contexts = nullcontext(), second_run()
    return checkpoint(layer, x, use_reentrant=False, context_fn=lambda: contexts)


ONCE: WeakSet[nn.Module] = WeakSet()  # BatchNorms of plain models that write no statistics in a second run


@contextmanager
def statistics_unwritten(layer: nn.Module) -> Iterator[None]:
    """Let the BatchNorms of `ONCE` write to copies of their buffers, as those of the package do in a second run."""
    kept: dict[nn.Module, dict[str, Any]] = {}

    def before(module: nn.Module, args: Any) -> None:
        kept[module] = dict(module._buffers)
        module._buffers.update({name: tensor.clone() for name, tensor in module.named_buffers(recurse=False)})

    def after(module: nn.Module, args: Any, output: Any) -> None:
        module._buffers.update(kept.pop(module))

    with ExitStack() as stack:
        for module in [norm for norm in ONCE.intersection(layer.modules()) if norm.training]:
            stack.callback(module.register_forward_pre_hook(before).remove)
            stack.callback(module.register_forward_hook(after, always_call=True).remove)
        yield


def rows(frame: Frame, step: Step, x: Any) -> Any:
    """Linear layer and BatchNorm on the pixels: the rows are flattened in between, as in LeViT, or transposed."""
    pixels = x.flatten(2).transpose(1, 2)
    linear = frame.model.layer(step.layers[0], x.flatten(2)[:, :, 0] if frame.building else x)
    y = linear(pixels)
    norm = frame.model.layer(step.layers[1], y.flatten(0, 1) if frame.building else y)
    if step.name == "transposed":
        return norm(y.transpose(1, 2)).unflatten(2, x.shape[2:])
    return norm(y.flatten(0, 1)).reshape_as(y).transpose(1, 2).unflatten(2, x.shape[2:])


def parameter(frame: Frame, step: Step, x: Any) -> Any:
    """Use a layer's weight outside of the layer."""
    weight = frame.model.layer(step.layer, x).weight
    if weight is None:
        raise ValueError(f"a layer without weight: {step!r}")
    return x * weight.mean()


def keep(frame: Frame, step: Step, x: Any) -> Any:
    frame.model.kept[step.name] = x
    return x


def recall(frame: Frame, step: Step, x: Any) -> Any:
    """Read what was kept. Nothing was if a guard has skipped that step: in a pass that builds a block, too."""
    return frame.model.kept.get(step.name, x)


def log(frame: Frame, step: Step, x: Any) -> Any:
    frame.model.history.append(x.detach().mean())
    return x


def put(frame: Frame, step: Step, x: Any) -> Any:
    """Write into the list or dict that the caller has given."""
    frame.given["put" if isinstance(frame.given, dict) else 0] = x
    return x


def append(frame: Frame, step: Step, x: Any) -> Any:
    frame.given.append(x)
    return x


def gate(frame: Frame, step: Step, x: Any, y: Any) -> Any:
    return x * torch.sigmoid(y.mean(dim=tuple(range(2, len(frame.model.shape_of(step.x[1])))), keepdim=True))


def pool(frame: Frame, step: Step, x: Any) -> Any:
    """Pool to one value per channel, as a classifier's head does."""
    return x.flatten(2).mean(2)


FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "hardswish": F.hardswish,
    "abs": abs,
    "relu_": torch.relu_,
    "silu_": lambda x: F.silu(x, inplace=True),
    "leaky_relu_": lambda x: F.leaky_relu(x, 0.3, inplace=True),
    "scale": lambda x: x * 0.7 + 0.1,
    "mul_": lambda x: x.mul_(0.7),
    "detach": lambda x: x.detach(),
    "clone": lambda x: x.clone(),
    "alias": lambda x: x.view_as(x),
    "float": lambda x: x * float(x.detach().mean()),
    "flip": lambda x: x.flip(1),
}
WRITERS = ("relu_", "silu_", "leaky_relu_", "mul_")

OPERATIONS: dict[str, Callable[..., Any]] = {
    "call": call,
    "pick": pick,
    "checkpoint": checkpointed,
    "rows": rows,
    "parameter": parameter,
    "keep": keep,
    "recall": recall,
    "log": log,
    "put": put,
    "append": append,
    "gate": gate,
    "pool": pool,
    "unseen": unseen,
    "ask": ask,
    "compute": compute,
    "function": lambda frame, step, x: FUNCTIONS[step.name](x),
    "add": lambda frame, step, x, y: x + y,
    "add_": lambda frame, step, x, y: x.add_(y),
    "mul": lambda frame, step, x, y: x * y,
    "sub": lambda frame, step, x, y: torch.sub(x, y),
    "cat": lambda frame, step, x, y: torch.cat([x, y], dim=1),
    "stack": lambda frame, step, x, y: torch.stack([x, y]).mean(0),
    "zeros": lambda frame, step, x, y: x + torch.zeros_like(y),
    "expand": lambda frame, step, x, y: x + torch.ones((), dtype=x.dtype).expand_as(y),
    "split": lambda frame, step, x: x.chunk(2, 1)[0],
    "slice": lambda frame, step, x: x[:, 1:],
    "standardize": lambda frame, step, x: x.sub_(0.3).div_(1.7),
}


def run_step(frame: Frame, step: Step) -> None:
    """Do one step and add its result to the values."""
    xs = [frame.values[number] for number in step.x]
    if not holds(step.guard, frame, xs[0]):
        frame.values.append(xs[0])
        return
    with torch.set_grad_enabled(torch.is_grad_enabled() and not step.no_grad):
        result = OPERATIONS[step.op](frame, step, *xs)
    if frame.building and (result.numel() == 0 or (step.guard and result.shape != xs[0].shape)):
        raise ValueError(f"a step must compute something, and keep the shape if it may be skipped: {step!r}")
    frame.values.append(result)


def sample(shape: tuple[int, ...], batch: int = 2) -> Tensor:
    """An input to build a network with."""
    return torch.ones(batch, *shape)
