"""Counts what a scenario has drawn, so that a run can show that nothing is missing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from fuzz.building import ACTIVATIONS, OTHER_NORMS, SPECIAL_NORMS
from fuzz.drawing_training import RECOMPUTE, TIMES
from fuzz.network import Layer, Network, Scenario
from fuzz.operations import FUNCTIONS, GUARDS, OPERATIONS
from fuzz.unseen import EVERY_MODULE, UNSEEN

# What every run of some hundred scenarios must hold at least once.
EXPECTED = {
    *(f"step {op}" for op in OPERATIONS),
    *(f"function {name}" for name in FUNCTIONS),
    *(f"guard {guard}" for guard in GUARDS),
    *(f"act {name}" for name in ACTIVATIONS),
    *(
        f"norm {name}"
        for name in (*SPECIAL_NORMS, "", "SyncBatchNorm", "_BatchNormXd", "GroupNorm", "InstanceNorm", *OTHER_NORMS)
    ),
    *(f"layer {kind}" for kind in ("conv", "transposed", "norm", "act", "drop", "pool", "seq", "block", "stage")),
    *(f"norm {attribute}" for attribute in ("momentum=None", "affine=False", "track=False")),
    *(f"conv {name}" for name in ("", "grouped", "strided", "same", "circular", "reflect", "weight_norm", "subclass")),
    *(f"{size} dimensions" for size in range(4)),
    *(f"hook {does}" for does in ("read", "store", "scale", "scale_")),
    *(f"takes {how}" for how in ("tensor", "list", "dict", "two")),
    *(f"gives {how}" for how in ("tensor", "list", "dict", "nested")),
    *(f"action {do}" for do in ("mode", "run", "flags", "domain", "replace", "copy", "fuse", "load", "free")),
    *(f"mode {mode}" for mode in ("train", "eval", "tune", "deploy")),
    *(f"{mode} recompute={what}" for mode in ("train", "eval", "tune") for what in ("none", *RECOMPUTE)),
    *(f"unfreeze in {mode}" for mode in ("eval", "tune", "deploy")),
    *(f"times {times}" for times in ("", *TIMES)),
    *(f"look {look}" for look in ("", "trace", "record")),
    *(f"trained {policy}" for policy in ("all", "none", "norms", "convs", "some")),
    *(f"precision {name}" for name in ("float64", "float32", "autocast")),
    *(f"unseen {name}" for name in UNSEEN),
    *(f"hook of every module {kind}" for kind in EVERY_MODULE),
    *("conv derived", "norm derived"),
    *("no_grad", "part of a Sequential", "shared", "tap"),
}


def features_of(scenario: Scenario) -> Counter[str]:
    """Count the features of a scenario."""
    found = Counter(features_of_network(scenario.network))
    found.update([f"trained {scenario.trained}", f"precision {scenario.precision}"])
    for action in scenario.actions:
        found[f"action {action.do}"] += 1
        found[f"hook of every module {action.every_module}"] += 1
        found[f"times {action.times}"] += action.do == "run" and action.grad == "grad"
        if action.do == "mode":
            found.update([f"mode {action.mode}", f"look {action.look}"])
            found[f"{action.mode} recompute={action.recompute}"] += 1
            found[f"unfreeze in {action.mode}"] += action.unfreeze
    return found


def features_of_network(network: Network) -> Iterator[str]:
    """Yield the features of a network and of those inside of it."""
    yield from (f"takes {network.takes}", f"gives {network.gives}", f"{len(network.inputs[0]) - 1} dimensions")
    yield from (f"hook {hook.does}" for hook in network.hooks)
    called = [step.layer for step in network.steps if step.op == "call"]
    convolved = [
        len(network.inputs) + number
        for number, step in enumerate(network.steps)
        if step.layer in network.layers and network.layers[step.layer].kind in ("conv", "transposed")
    ]
    readers = Counter(number for step in network.steps for number in step.x)
    yield from ("tap" for number in convolved if readers[number] > 1)
    yield from ("shared" for name, count in Counter(called).items() if count > 1)
    for step in network.steps:
        yield f"step {step.op}"
        yield f"guard {step.guard}"
        yield from [f"{step.op} {step.name}"] * (step.op in ("function", "unseen"))
        yield from ["no_grad"] * step.no_grad + ["part of a Sequential"] * ("." in step.layer)
    for layer in network.layers.values():
        yield from features_of_layer(layer)


def features_of_layer(layer: Layer) -> Iterator[str]:
    """Yield the features of a layer and of those inside of it."""
    yield f"layer {layer.kind}"
    if layer.kind in ("norm", "act"):
        yield f"{layer.kind} {layer.name}"
        yield from (f"norm {name}={getattr(layer, name)}" for name in ("momentum", "affine", "track"))
    if layer.kind in ("conv", "transposed"):
        yield f"conv {layer.name}"
        yield from ["conv grouped"] * (layer.groups > 1) + ["conv strided"] * (layer.stride > 1)
        yield f"conv {layer.padding}"
    for part in layer.parts:
        yield from features_of_layer(part)
    if layer.body is not None:
        yield from features_of_network(layer.body)
