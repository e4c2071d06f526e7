"""Makes a scenario that fails as small as it gets while it still fails in the same way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from math import prod
from typing import TypeVar

from fuzz.network import Action, Layer, Network, Scenario, Short, Step
from fuzz.trial import try_scenario

Part = TypeVar("Part", bound=Short)
TRIES = 1500
SIMPLER_SIZES = ((2, 3), (2, 4, 4), (2, 5, 5), (2, 3, 3, 3), (2,))


def shrunk(scenario: Scenario, fails: Callable[[Scenario], bool] | None = None, tries: int = TRIES) -> Scenario:
    """Return the smallest scenario found that still fails, by removing and simplifying greedily.

    Args:
        scenario: A scenario that fails.
        fails: Whether a scenario fails; None for "it is wrong in the same kind of thing as ``scenario`` is".
        tries: The most scenarios to try.
    """
    fails = fails or same_failure(scenario)
    while True:
        for candidate in simpler(scenario):
            if size(candidate) >= size(scenario):
                continue
            tries -= 1
            if fails(candidate):
                scenario = candidate
                break
            if not tries:
                return scenario
        else:
            return scenario


def same_failure(scenario: Scenario) -> Callable[[Scenario], bool]:
    """Return a function that tells whether another scenario fails as this one does."""
    wrong = try_scenario(scenario).wrong
    if wrong is None:
        raise ValueError(f"scenario does not fail: {scenario!r}")

    def fails(candidate: Scenario) -> bool:
        try:
            found = try_scenario(candidate).wrong
        except Exception:  # the candidate is no network: a step does not fit any more
            return False
        return found is not None and found.kind == wrong.kind

    return fails


def size(scenario: Scenario) -> tuple[int, int]:
    """What shrinking makes smaller: what one reads, then the inputs."""
    return len(repr(scenario)), sum(prod(shape) for shape in scenario.network.inputs)


def simpler(scenario: Scenario) -> Iterator[Scenario]:
    """Yield scenarios with one thing removed or simplified, the largest cuts first."""
    count = len(scenario.actions)
    for length in (8, 4, 2, 1):
        for start in range(count - length, -1, -1):
            yield replace(scenario, actions=scenario.actions[:start] + scenario.actions[start + length :])
    for network in simpler_networks(scenario.network):
        yield replace(scenario, network=network)
    for number, action in enumerate(scenario.actions):
        for other in simpler_actions(action):
            yield replace(scenario, actions=(*scenario.actions[:number], other, *scenario.actions[number + 1 :]))
    for name in ("seed", "trained", "input_grad", "training", "precision"):
        yield with_default(scenario, name)


def simpler_actions(action: Action) -> Iterator[Action]:
    """Yield actions with a field at its default; a switch without ``pairs`` still looks by tracing."""
    for one in fields(action):
        if one.name != "do" and getattr(action, one.name) != one.default:
            yield with_default(action, one.name)
    if action.look == "record":
        yield replace(action, look="trace")


def with_default(part: Part, name: str) -> Part:
    """Set a field to its default."""
    default = next(one.default for one in fields(part) if one.name == name)  # type: ignore[arg-type]
    return replace(part, **{name: default})  # type: ignore[type-var]


def simpler_networks(network: Network) -> Iterator[Network]:
    """Yield networks with a step, a hook, an output or an input less, or with something simplified."""
    for number in reversed(range(len(network.steps))):
        yield without_step(network, number)
    for number in range(len(network.hooks)):
        yield replace(network, hooks=network.hooks[:number] + network.hooks[number + 1 :])
    if len(network.outputs) > 1:
        yield from (replace(network, outputs=(number,), gives="tensor") for number in network.outputs)
    if network.outputs == (len(network.inputs) + len(network.steps) - 1,):
        yield replace(network, outputs=(-1,))
    yield from (with_default(network, "gives"), with_default(network, "takes"), *without_second_input(network))
    yield with_used_layers(network)
    for number, step in enumerate(network.steps):
        for other in simpler_steps(step):
            yield replace(network, steps=(*network.steps[:number], other, *network.steps[number + 1 :]))
    for name, layer in network.layers.items():
        for simplest in simpler_layers(layer):
            yield replace(network, layers={**network.layers, name: simplest})
    for shape in SIMPLER_SIZES:
        yield replace(network, inputs=(shape,) * len(network.inputs))


def without_step(network: Network, number: int) -> Network:
    """Remove a step. Who reads its result reads what it has read."""
    value = len(network.inputs) + number
    instead = network.steps[number].x[0]

    def moved(read: int) -> int:
        return instead if read == value else read - 1 if read > value else read

    steps = [
        replace(step, x=tuple(map(moved, step.x))) for step in network.steps[:number] + network.steps[number + 1 :]
    ]
    return with_used_layers(replace(network, steps=tuple(steps), outputs=tuple(map(moved, network.outputs))))


def with_used_layers(network: Network) -> Network:
    """Drop the layers that no step calls, and their hooks."""
    used = {name.partition(".")[0] for step in network.steps for name in (step.layer, *step.layers)}
    layers = {name: layer for name, layer in network.layers.items() if name in used}
    hooks = tuple(hook for hook in network.hooks if hook.layer.partition(".")[0] in used)
    return replace(network, layers=layers, hooks=hooks)


def without_second_input(network: Network) -> Iterator[Network]:
    """Take one input only: who reads the second one reads the first."""
    if len(network.inputs) == 2:
        steps = tuple(replace(step, x=tuple(max(read - 1, 0) for read in step.x)) for step in network.steps)
        outputs = tuple(read if read < 0 else max(read - 1, 0) for read in network.outputs)
        takes = "tensor" if network.takes == "two" else network.takes
        yield replace(network, inputs=network.inputs[:1], steps=steps, outputs=outputs, takes=takes)


def simpler_steps(step: Step) -> Iterator[Step]:
    """Yield steps without a condition."""
    yield from (with_default(step, "guard"), with_default(step, "no_grad"))
    if len(step.layers) > 1 and step.op == "pick":
        yield Step("call", step.x, step.layers[0], guard=step.guard)


def simpler_layers(layer: Layer) -> Iterator[Layer]:
    """Yield layers with a field at its default, or with less inside."""
    for one in fields(layer):
        if one.name not in ("kind", "body", "parts") and getattr(layer, one.name) != one.default:
            yield with_default(layer, one.name)
    for number, part in enumerate(layer.parts):
        yield replace(layer, parts=layer.parts[:number] + layer.parts[number + 1 :])
        for other in simpler_layers(part):
            yield replace(layer, parts=(*layer.parts[:number], other, *layer.parts[number + 1 :]))
    if layer.body is not None:
        for body in simpler_networks(layer.body):
            yield replace(layer, body=body)
