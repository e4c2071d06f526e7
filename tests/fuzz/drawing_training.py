"""Adds Train mode with recomputation to a scenario, by random numbers of its own: a seed keeps what else it drew."""

from __future__ import annotations

from dataclasses import replace
from random import Random

from fuzz.drawing import Draft, add_pair
from fuzz.drawing_unseen import changed, inserted
from fuzz.interpreter import build
from fuzz.network import Action, Layer, Network, Scenario, Step

RECOMPUTE = ("elementwise", "blocks", "names", "whole")
TIMES = ("forwards", "accumulate")


def add_stage(random: Random, network: Network) -> Network:
    """A stage at the end: two blocks in a row, perhaps checkpointed by the user."""
    at = len(network.steps) - 1
    draft = Draft(random, Network(inputs=(build(network).shapes[-1][1:],)), False)
    add_pair(draft)
    add_pair(draft)
    op = "checkpoint" if random.random() < 0.2 else "call"
    grown = replace(network, layers={**network.layers, "stage": Layer("stage", body=draft.network)})
    return inserted(grown, at, Step(op, layer="stage"))


def vary_norms(random: Random, network: Network) -> Network:
    """Change what norms do in training, and put norms of other kinds in."""
    return replace(network, layers={name: varied(random, layer) for name, layer in network.layers.items()})


def varied(random: Random, layer: Layer) -> Layer:
    if layer.body is not None:
        return replace(layer, body=vary_norms(random, layer.body))
    if layer.kind != "norm":
        return replace(layer, parts=tuple(varied(random, part) for part in layer.parts))
    if layer.name in ("GroupNorm", "InstanceNorm"):
        return replace(layer, name=random.choice([layer.name, "LayerNorm", "RMSNorm"]))
    track, momentum = layer.track and random.random() < 0.95, random.choice([0.1, 0.1, 0.1, 0.5, None])
    return replace(layer, track=track, momentum=momentum)


def recomputing(random: Random, action: Action) -> Action:
    """Let a switch recompute more, or leave BatchNorms unfrozen; let a pass go forward twice."""
    if action.do == "mode" and action.mode != "deploy" and random.random() < 0.5:
        return replace(action, recompute=random.choice(RECOMPUTE), unfreeze=unfreezes(random, action))
    if action.do == "mode":
        return replace(action, unfreeze=unfreezes(random, action))
    return replace(action, times=random.choice(TIMES)) if action.do == "run" and random.random() < 0.3 else action


def unfreezes(random: Random, action: Action) -> bool:
    return action.mode != "train" and random.random() < 0.25


def trains(random: Random) -> tuple[Action, ...]:
    """Draw a while in Train mode, mostly with recomputation."""
    switch = Action("mode", "train", random.choice(["none", *RECOMPUTE, *RECOMPUTE]))
    runs = [Action("run", batch=random.choice([2, 3]), times=random.choice(["", *TIMES])) for _ in range(2)]
    return Action("flags", training=random.random() < 0.9), switch, *runs


def with_training(scenario: Scenario) -> Scenario:
    """Add to a scenario."""
    random = Random(f"training {scenario.seed}")
    network = scenario.network
    if random.random() < 0.3:
        network = changed(random, network, [add_stage])
    network = changed(random, network, [vary_norms])
    actions = [recomputing(random, action) for action in scenario.actions]
    at = random.randrange(len(actions))
    return replace(scenario, network=network, actions=(*actions[:at], *trains(random), *actions[at:]))
