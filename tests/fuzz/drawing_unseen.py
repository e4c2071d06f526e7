"""Adds to a scenario what no proof sees, by random numbers of its own: a seed keeps all else that it has drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random

from fuzz.interpreter import build
from fuzz.network import Action, Layer, Network, Scenario, Step
from fuzz.operations import GUARDS
from fuzz.unseen import EVERY_MODULE, UNSEEN

INVALID = (RuntimeError, ValueError, IndexError, AttributeError)  # of a step that does not fit


def inserted(network: Network, at: int, step: Step) -> Network:
    """Put a step behind another one. Who has read that one's result reads the new step's."""
    value = len(network.inputs) + at

    def moved(read: int) -> int:
        return read + (read >= value)

    behind = [replace(one, x=tuple(map(moved, one.x))) for one in network.steps[at + 1 :]]
    steps = (*network.steps[: at + 1], replace(step, x=(value,)), *behind)
    return replace(network, steps=steps, outputs=tuple(map(moved, network.outputs)))


def add_function(random: Random, network: Network) -> Network:
    """A function that Python does not see, perhaps only in some passes."""
    guard = random.choice(["", *GUARDS])
    step = Step("unseen", guard=guard, name=random.choice(sorted(UNSEEN)))
    return inserted(network, random.randrange(len(network.steps)), step)


def add_question(random: Random, network: Network) -> Network:
    """A forward that asks for the class of a layer that was called before."""
    asked = [(at, step.layer) for at, step in enumerate(network.steps) if step.op == "call"]
    at, layer = random.choice(asked)
    return inserted(network, at, Step("ask", layer=layer))


def take_statistics(random: Random, network: Network) -> Network:
    """The forward computes with a BatchNorm in the place of calling it."""
    norms = [at for at, step in enumerate(network.steps) if is_called_norm(network, step)]
    at = random.choice(norms)
    steps = [replace(step, op="compute") if number == at else step for number, step in enumerate(network.steps)]
    return replace(network, steps=tuple(steps))


def is_called_norm(network: Network, step: Step) -> bool:
    layer = network.layers.get(step.layer)
    return step.op == "call" and layer is not None and layer.kind == "norm"


def derive(random: Random, network: Network) -> Network:
    """A layer gets a class that is derived from its own."""
    name = random.choice(sorted(name for name, layer in network.layers.items() if layer.kind in KINDS))
    layer = network.layers[name]
    if layer.kind == "seq":
        changed = replace(layer, parts=tuple(derived(part) for part in layer.parts))
    else:
        changed = derived(layer)
    return replace(network, layers={**network.layers, name: changed})


KINDS = ("conv", "transposed", "norm", "seq")


def derived(layer: Layer) -> Layer:
    return replace(layer, name="derived") if layer.kind in KINDS and not layer.name else layer


Change = Callable[[Random, Network], Network]
CHANGES: list[Change] = [
    add_function,
    add_function,
    add_question,
    take_statistics,
    derive,
]


def changed(random: Random, network: Network, changes: Sequence[Change] = CHANGES) -> Network:
    """Change a network in one way, if that fits."""
    try:
        candidate = random.choice(changes)(random, network)
        build(candidate)
    except INVALID:
        return network
    return candidate


def with_unseen(scenario: Scenario) -> Scenario:
    """Add to a scenario. About a third of all stay as they are."""
    random = Random(f"unseen {scenario.seed}")
    network = scenario.network
    for _ in range(random.choice([0, 1, 2])):
        network = changed(random, network)
    hooked = bool(network is not scenario.network and random.random() < 0.3)
    actions = tuple(with_hook(random, action) if hooked else action for action in scenario.actions)
    return replace(scenario, network=network, actions=actions)


def with_hook(random: Random, action: Action) -> Action:
    """Let hooks of every module be there in some of the runs."""
    there = action.do == "run" and random.random() < 0.5
    return replace(action, every_module=random.choice(EVERY_MODULE)) if there else action
