"""What one pass of a model leaves behind, and how the passes of two models are compared."""

from __future__ import annotations

import copy
import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from fuzz.interpreter import KEYS, Interpreter
from fuzz.network import Action, Scenario
from fuzz.unseen import hook_of_every_module
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

Outcome = dict[str, Any]  # what it is, "output.0" say -> a tensor, or a value that must be equal

# Relative bounds of outputs and of gradients. In float64 they are far above the rounding errors of ten layers, and far
# below any mistake. A half-precision gradient is not compared: a ReLU whose input is rounded over 0 changes it.
# "exact" is for any precision: to the bit.
BOUNDS = {"exact": (0.0, 0.0), "float64": (1e-9, 1e-9), "float32": (1e-3, 5e-2), "autocast": (0.3, None)}
# A tensor far smaller than the largest one of its kind, or than 1, may be the difference of two that are larger. The
# gradient of what an InstanceNorm and a mean cancel is an example. So errors are not compared with less than this part.
FLOOR = 1e-4
ROUNDED = {"float64": 2.0**-52, "float32": 2.0**-23, "autocast": 2.0**-8}  # one unit in the last place
NUDGES = 16  # times that all parameters are changed by at most that unit
NOISE = 10  # a difference up to so many times what these changes make is no difference


class Wrong(Exception):
    """The converted model differs from its twin."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind = kind
        self.detail = detail


class Different(Wrong):
    """A tensor is outside of its bound."""

    def __init__(self, kind: str, detail: str, error: float) -> None:
        super().__init__(kind, detail)
        self.error = error


def draw_inputs(scenario: Scenario, action: Action) -> tuple[list[Tensor], Any]:
    """Draw the inputs of a pass: the leaves of the graph, and what is given to the forward."""
    dtype = torch.float64 if scenario.precision == "float64" else torch.float32
    generator = torch.Generator().manual_seed(scenario.seed)
    shapes = [(action.batch, *shape) for shape in scenario.network.inputs]
    leaves = [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]
    given = [leaf.requires_grad_().clone() if scenario.input_grad else leaf for leaf in leaves]
    if scenario.network.takes == "dict":
        return leaves, dict(zip(KEYS, given, strict=False))
    return leaves, given[0] if scenario.network.takes == "tensor" else given


def arguments_of(scenario: Scenario, given: Any) -> tuple[Any, ...]:
    """Turn what is given into positional arguments."""
    return tuple(given) if scenario.network.takes == "two" else (given,)


def run(model: nn.Module, scenario: Scenario, action: Action) -> Outcome:
    """Run a model forward, and backward where a gradient is wanted; take down all that can be seen of it.

    What hooks and steps have kept counts too, and what became of the lists and dicts that were given.
    """
    torch.manual_seed(scenario.seed)
    random.seed(scenario.seed)
    all_leaves, outputs, seen = [], [], []
    outcome: Outcome = {}
    with hook_of_every_module(action.every_module, seen):
        for time in ("", " again")[: 2 if action.times else 1]:
            leaves, given = draw_inputs(scenario, replace(action, batch=5 - action.batch) if time else action)
            all_leaves += leaves
            outputs.append(forward(model, scenario, action, given))
            noted: Outcome = {"random state": (torch.get_rng_state().tolist(), random.getstate())}
            taken_down(noted, model, outputs[-1], given)
            outcome |= {f"{name}{time}": value for name, value in noted.items()}
            if action.grad == "grad" and action.times == "accumulate":
                differentiate(outputs.pop())
        if action.grad == "grad":
            differentiate(outputs)
    note(outcome, "seen", seen)
    for name, parameter in model.named_parameters():
        outcome[f"gradient.{name}"] = taken_gradient(parameter)
    for number, leaf in enumerate(all_leaves):
        outcome[f"input gradient.{number}"] = taken_gradient(leaf)
    note(outcome, "buffer", dict(model.named_buffers()))
    return outcome


def forward(model: nn.Module, scenario: Scenario, action: Action, given: Any) -> Any:
    """Run a model forward."""
    inference = torch.inference_mode(action.grad == "inference")
    with inference, torch.set_grad_enabled(action.grad == "grad"), autocast(scenario):
        return model(*arguments_of(scenario, given), action.domain)


def taken_down(outcome: Outcome, model: nn.Module, output: Any, given: Any) -> None:
    """Write down what a forward has left, before the backward pass."""
    note(outcome, "output", output)
    note(outcome, "given", given)
    note(outcome, "kept", [module.kept for module in model.modules() if hasattr(module, "kept")])
    note(outcome, "history", [module.history for module in model.modules() if hasattr(module, "history")])


def autocast(scenario: Scenario) -> torch.autocast:
    """Autocast, on or off."""
    return torch.autocast("cpu", torch.bfloat16, enabled=scenario.precision == "autocast")


def note(outcome: Outcome, kind: str, value: Any) -> None:
    """Write down the leaves of a value, and its structure."""
    leaves, structure = tree_flatten(value)
    outcome[f"{kind} structure"] = str(structure)
    for number, leaf in enumerate(leaves):
        outcome[f"{kind}.{number}"] = leaf.detach().clone() if isinstance(leaf, Tensor) else leaf
        outcome[f"{kind} wants a gradient.{number}"] = isinstance(leaf, Tensor) and leaf.requires_grad


def differentiate(output: Any) -> None:
    """Run backward from a random projection of all outputs."""
    tensors = [leaf for leaf in tree_flatten(output)[0] if isinstance(leaf, Tensor) and leaf.requires_grad]
    generator = torch.Generator().manual_seed(3)
    probes = [torch.randn(tensor.shape, generator=generator).to(tensor.dtype) for tensor in tensors]
    if tensors:
        sum((tensor * probe).sum() for tensor, probe in zip(tensors, probes, strict=True)).backward()


def taken_gradient(tensor: Tensor) -> Tensor | None:
    """Take the gradient away from a leaf."""
    gradient, tensor.grad = tensor.grad, None
    return gradient


def compare(
    outcome: Outcome, expected: Outcome, precision: str = "float64", nudged: Callable[[], list[Outcome]] = list
) -> None:
    """Raise `Wrong` for the first thing that differs.

    Args:
        outcome: What is compared.
        expected: What the twin has computed.
        precision: A key of `BOUNDS`.
        nudged: Returns what `nudged_runs` returns. Where sums cancel, a twin differs as much from itself.
    """
    if outcome.keys() != expected.keys():
        raise Wrong("structure", f"{sorted(outcome.keys() ^ expected.keys())}")
    scales = largest_norms(expected)
    for name, wanted in expected.items():
        least = FLOOR * scales[family_of(name)]
        try:
            compare_one(name, outcome[name], wanted, least, precision)
        except Different as different:
            noise = max((error_of(other[name], wanted, least) for other in nudged()), default=0.0)
            if different.error > NOISE * noise:
                raise


def forget(model: nn.Module) -> None:
    """Drop what a model keeps of its last pass."""
    for module in model.modules():
        if isinstance(module, Interpreter):
            module.kept = {}


def nudged_runs(model: nn.Module, scenario: Scenario, action: Action) -> list[Outcome]:
    """Return what copies of a plain model compute whose parameters are changed in their last place."""
    generator = torch.Generator().manual_seed(0)
    outcomes = []
    forget(model)  # tensors of a graph can't be copied
    for _ in range(NUDGES):
        nudged = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in nudged.parameters():
                drawn = torch.rand(parameter.shape, generator=generator, dtype=parameter.dtype)
                parameter.mul_(1 + ROUNDED[scenario.precision] * (2 * drawn - 1))
        outcomes.append(run(nudged, scenario, action))
    return outcomes


def compare_one(name: str, value: Any, wanted: Any, least: float, precision: str) -> None:
    """Raise `Wrong` if one thing differs: tensors within the bounds, all else exactly."""
    kind = kind_of(name)
    if not isinstance(wanted, Tensor) or not isinstance(value, Tensor):
        if value is not wanted and (isinstance(value, Tensor) or isinstance(wanted, Tensor) or value != wanted):
            raise Wrong(kind, f"{name} is {shortened(value)}, not {shortened(wanted)}")
        return
    # A folded FrozenBatchNorm2d gives the dtype of autocast, as BatchNorm2d does; by itself it gives float32.
    lower = precision == "autocast" and (value.dtype, wanted.dtype) == (torch.bfloat16, torch.float32)
    if value.shape != wanted.shape or (value.dtype is not wanted.dtype and not lower):
        raise Wrong(kind, f"{name} is {shortened(value)}, not {shortened(wanted)}")
    bound = BOUNDS[precision][kind.endswith("gradient")]
    error = error_of(value, wanted, least)
    if bound is not None and not error <= bound:
        raise Different(kind, f"{name} differs by {error:.1e}", error)


def error_of(value: Tensor, wanted: Tensor, least: float) -> float:
    """Return the relative error of a tensor, beside one of a norm of at least ``least``."""
    return norm(value.double() - wanted.double()) / max(norm(wanted), least)


def kind_of(name: str) -> str:
    """The part of a name before its number."""
    return name.partition(".")[0]


def family_of(name: str) -> str:
    """What tensors have a common scale."""
    return kind_of(name).removeprefix("input ")


def norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor.double()))


def largest_norms(outcome: Mapping[str, Any]) -> dict[str, float]:
    """The largest norm of the tensors of each kind, at least 1; gradients of parameters and inputs are one kind."""
    scales: dict[str, float] = defaultdict(lambda: 1.0)
    for name, value in outcome.items():
        if isinstance(value, Tensor):
            scales[family_of(name)] = max(scales[family_of(name)], norm(value))
    return scales


def without_parameters(outcome: Outcome) -> Outcome:
    """Leave out what a Deploy copy has in another form."""
    return {name: value for name, value in outcome.items() if not name.startswith(("gradient", "buffer"))}


def finite(outcome: Mapping[str, Any]) -> bool:
    """Whether all tensors can be compared."""
    tensors: Sequence[Tensor] = [value for value in outcome.values() if isinstance(value, Tensor)]
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def shortened(value: Any) -> str:
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else repr(value)[:60]
