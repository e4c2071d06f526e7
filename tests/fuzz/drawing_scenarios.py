"""Draws a scenario from a seed: a network, and the switches and passes that it goes through."""

from __future__ import annotations

from random import Random

from fuzz.drawing import draw_network
from fuzz.drawing_training import with_training
from fuzz.drawing_unseen import with_unseen
from fuzz.network import Action, Network, Scenario


def draw_mode(random: Random) -> Action:
    """Draw a switch."""
    mode = random.choice(["eval", "tune", "tune", "tune", "deploy", "deploy", "train"])
    recompute = "elementwise" if mode in ("eval", "tune") and random.random() < 0.4 else "none"
    return Action(
        "mode", mode, recompute, random.choice(["", "trace", "record", "record"]), batch=random.choice([2, 3])
    )


def draw_run(random: Random) -> Action:
    """Draw a forward pass, mostly with a backward pass."""
    grad = random.choice(["grad", "grad", "grad", "no_grad", "inference"])
    return Action("run", grad=grad, batch=random.choice([2, 2, 3]), domain=random.choice([0, 0, 1]))


def draw_other_action(random: Random, network: Network) -> Action:
    """Draw something that happens between two switches."""
    do = random.choice(["flags", "domain", "replace", "copy", "copy", "fuse", "fuse", "load", "free"])
    names = [name for name, layer in network.layers.items() if layer.kind in ("conv", "transposed", "norm", "seq")]
    layer = random.choice(names) if names else ""
    if layer and network.layers[layer].kind == "seq":
        layer += random.choice([".0", ".1"])
    return Action(do, layer=layer, training=random.random() < 0.5, domain=random.choice([0, 1]), grad="no_grad")


def draw_actions(random: Random, network: Network) -> tuple[Action, ...]:
    """Draw switches in random order, with passes and other things in between."""
    actions = []
    for _ in range(random.choice([2, 3, 4])):
        actions.append(draw_mode(random))
        if random.random() < 0.35:
            actions.append(draw_run(random))
        if random.random() < 0.4:
            actions.append(draw_other_action(random, network))
        actions.append(draw_run(random))
    return (*actions, Action("mode", "train"), draw_run(random))


def draw_scenario(seed: int) -> Scenario:
    """Draw a scenario: the same one for the same seed."""
    random = Random(seed)
    network = draw_network(random)
    scenario = Scenario(
        network,
        draw_actions(random, network),
        seed,
        random.choice(["all", "all", "all", "none", "norms", "convs", "some"]),
        random.random() < 0.5,
        random.random() < 0.5,
        random.choice(["float64"] * 18 + ["float32", "autocast"]),
    )
    return with_training(with_unseen(scenario))
