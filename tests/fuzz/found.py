"""The smallest scenario of each kind that the fuzzer has found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fuzz.network import Action, Hook, Layer, Network, Scenario, Step

CONV, NORM, TUNE, RUN = Layer("conv"), Layer("norm"), Action("mode"), Action("run")
REFLECT = Layer("conv", padding="reflect")
RECORDED = (Action("mode", look="record"),)
TWO = {"a": CONV, "b": NORM}
SEQUENTIAL = {"s": Layer("seq", parts=(CONV, NORM))}


def network(*steps: Step, layers: Mapping[str, Layer] = TWO, **options: Any) -> Network:
    """A network of a few steps."""
    return Network(steps, layers, **options)


def pair(guard: str = "", norm: str = "", **options: Any) -> Network:
    """A convolution and its BatchNorm, which may be skipped."""
    layers = {"a": CONV, "b": Layer("norm", norm)}
    return network(Step("call", (0,), "a"), Step("call", (1,), "b", guard=guard), layers=layers, **options)


def domains(how: str) -> Network:
    """One BatchNorm for each domain: ``bns[domain](conv(x))``."""
    layers = {**TWO, "c": NORM}
    return network(Step("call", layer="a"), Step("pick", (1,), layers=("b", "c"), name=how), layers=layers)


def in_parts(*between: Step, **options: Any) -> Network:
    """The parts of a Sequential, called one by one, with steps in between."""
    return network(Step("call", layer="s.0"), *between, Step("call", (1,), "s.1"), layers=SEQUENTIAL, **options)


def checkpointed(guard: str, *more: Step, norm_guard: str = "") -> Network:
    """A pair in a checkpointed block, whose convolution or BatchNorm may be skipped, and more steps of the block."""
    layers = {**TWO, "d": Layer("act", "ELU")}
    steps = (Step("call", (0,), "a", guard=guard), Step("call", (1,), "b", guard=norm_guard), *more)
    body = network(*steps, layers=layers if more else TWO)
    return network(Step("checkpoint", layer="c"), layers={"c": Layer("block", body=body)})


FOUND: dict[str, Scenario] = {
    "looking writes an input that the forward writes": Scenario(network(Step("standardize")), RECORDED),
    "looking writes an input that a hook writes": Scenario(
        network(Step("call", layer="a"), hooks=(Hook("a", True, "scale_"),)), RECORDED
    ),
    "looking writes an input that an activation writes": Scenario(
        network(Step("function", name="leaky_relu_")), RECORDED
    ),
    "looking writes into the caller's dict": Scenario(network(Step("put"), outputs=(0,), takes="dict"), RECORDED),
    "looking appends to the caller's list": Scenario(network(Step("append"), outputs=(0,), takes="list"), RECORDED),
    "looking appends to a list of the model": Scenario(network(Step("log")), RECORDED),
    "tracing leaves a proxy in a list of the model": Scenario(
        network(Step("call", layer="b"), Step("log", (1,))), (TUNE,)
    ),
    "an argument picks the BatchNorm": Scenario(domains("argument"), (TUNE, Action("run", domain=1))),
    "an attribute picks the BatchNorm": Scenario(domains("attribute"), (TUNE, Action("domain", domain=1), RUN)),
    "BatchNorm is skipped at another batch size": Scenario(
        pair("shape"), (Action("mode", look="record", batch=3), RUN)
    ),
    "BatchNorm is skipped without gradients": Scenario(pair("grad"), (TUNE, Action("run", grad="inference"))),
    "BatchNorm is skipped at random": Scenario(pair("torch_random"), (TUNE, RUN, RUN), seed=51),
    "BatchNorm is skipped in training": Scenario(
        pair("training"), (Action("flags", training=True), TUNE, Action("flags"), RUN)
    ),
    "the convolution is replaced": Scenario(pair(), (TUNE, Action("replace", layer="a"), RUN)),
    "the BatchNorm is replaced": Scenario(pair(), (TUNE, Action("replace", layer="b"), RUN)),
    "the BatchNorm is replaced by an Identity": Scenario(pair(), (TUNE, Action("replace", layer="b", domain=1), RUN)),
    "the convolution of a Sequential is replaced": Scenario(
        network(Step("call", layer="s"), layers=SEQUENTIAL), (TUNE, Action("replace", layer="s.0"), RUN)
    ),
    "a linear layer on rows is replaced": Scenario(
        network(Step("rows", layers=("a", "b"))), (TUNE, Action("replace", layer="a"), RUN)
    ),
    "a switch after a module was replaced": Scenario(pair(), (TUNE, Action("replace", layer="a"), TUNE)),
    "a hook returns another output of the convolution": Scenario(pair(hooks=(Hook("a", does="scale"),))),
    "a hook writes the output of the convolution": Scenario(pair(hooks=(Hook("a", does="scale_"),))),
    "a hook returns another input of the BatchNorm": Scenario(pair(hooks=(Hook("b", True, "scale"),))),
    "a hook writes the input of the BatchNorm": Scenario(pair(hooks=(Hook("b", True, "scale_"),))),
    "a hook stores the output of the convolution": Scenario(pair(hooks=(Hook("a", does="store"),))),
    "a hook stores the input of the BatchNorm": Scenario(pair(hooks=(Hook("b", True, "store"),))),
    "the BatchNorm runs without gradients": Scenario(
        network(Step("call", (0,), "a"), Step("call", (1,), "b", no_grad=True))
    ),
    "the convolution runs without gradients": Scenario(
        network(Step("call", (0,), "a", no_grad=True), Step("call", (1,), "b"))
    ),
    "a tap between the parts of a Sequential": Scenario(
        in_parts(Step("keep", (1,), guard="shape", name="tap")), (TUNE, Action("run", batch=3))
    ),
    "the caller's list gets what is between the parts": Scenario(in_parts(Step("put", (1,)), takes="list")),
    "the second part of a Sequential is never called": Scenario(
        network(Step("call", layer="s.0"), Step("put", (1,)), layers=SEQUENTIAL, outputs=(1,), takes="dict")
    ),
    "an activation's flag after two switches": Scenario(
        network(Step("call", layer="b"), Step("call", (1,), "c"), layers={**TWO, "c": Layer("act", "LeakyReLU")}),
        (Action("mode", recompute="elementwise"), Action("flags", training=True), TUNE),
    ),
    "a convolution's flag after two switches": Scenario(
        pair(), (TUNE, Action("flags", training=True), Action("mode", "eval"))
    ),
    "the memory format behind circular padding of nothing, by which dropout draws": Scenario(
        network(
            Step("rows", layers=("a", "b")),
            Step("call", (1,), "c"),
            Step("call", (2,), "d"),
            Step("call", (3,), "e"),
            layers={**TWO, "c": Layer("conv", padding="circular"), "d": NORM, "e": Layer("drop")},
        ),
        training=True,
    ),
    "the memory layout behind a transposed linear layer, by which dropout draws": Scenario(
        network(
            Step("rows", layers=("a", "b"), name="transposed"),
            Step("call", (1,), "c"),
            layers={**TWO, "c": Layer("drop")},
        ),
        training=True,
    ),
    "a parametrized module copies its __dict__ by itself, so the copy has our methods": Scenario(
        network(*pair().steps, layers={"a": Layer("conv", "weight_norm"), "b": NORM}), (TUNE, Action("copy"))
    ),
    "FrozenBatchNorm2d has other bits than F.batch_norm, which recomputation has called": Scenario(
        pair(norm="FrozenBatchNorm2d"), (Action("mode", "eval"), RUN)
    ),
    "Deploy copy: a hook returns another input of the BatchNorm": Scenario(
        pair(hooks=(Hook("b", True, "scale"),)), (Action("fuse"),)
    ),
    "Deploy copy: a hook returns another output of the convolution": Scenario(
        pair(hooks=(Hook("a", does="scale"),)), (Action("fuse"),)
    ),
    "Deploy copy: a hook returns another output of the BatchNorm": Scenario(
        pair(hooks=(Hook("b", does="scale"),)), (Action("fuse"),)
    ),
    "Deploy copy: an argument picks the BatchNorm": Scenario(domains("argument"), (Action("fuse", domain=1),)),
    "Deploy copy: the weight of the convolution is used a second time": Scenario(
        network(*pair().steps, Step("parameter", (2,), "a")), (Action("fuse"),)
    ),
    "Deploy copy: the weight of the BatchNorm is used a second time": Scenario(
        network(*pair().steps, Step("parameter", (2,), "b")), (Action("fuse"),)
    ),
    "Deploy copy: BatchNorm is skipped without gradients": Scenario(pair("grad"), (Action("fuse", grad="no_grad"),)),
    "Deploy copy: the convolution is skipped at random": Scenario(
        checkpointed("torch_random"), (Action("fuse"),), seed=461
    ),
    "Deploy copy: a tap is taken at random, and the pair was recorded without it": Scenario(
        network(*pair().steps, Step("gate", (2, 1), guard="random")),
        (RUN, *RECORDED, Action("fuse", domain=1)),
        seed=5039,
    ),
    "a convolution pads by itself what could be computed again": Scenario(
        network(
            Step("call", layer="a"),
            Step("cat", (1, 1)),
            Step("call", (2,), "b"),
            layers={"a": NORM, "b": Layer("block", body=network(*pair().steps, layers={"a": REFLECT, "b": NORM}))},
        )
    ),
    "a Function holds a concatenation, and so what it was made of": Scenario(
        network(
            *pair().steps,
            Step("cat", (2, 1)),
            Step("unseen", (3,), name="Scale"),
            Step("call", (4,), "c"),
            layers={**TWO, "c": CONV},
        ),
        (Action("mode", mode="train", recompute="elementwise"), RUN),
    ),
    "a Function saves a concatenation, and so what it was made of": Scenario(
        network(*pair().steps, Step("cat", (2, 1)), Step("unseen", (3,), name="Square")),
        (Action("mode", mode="train", recompute="elementwise"), RUN),
    ),
    "Python's random numbers decide a branch in a checkpoint": Scenario(
        checkpointed("", Step("call", (2,), "d"), norm_guard="random"), seed=3528
    ),
}
