"""What forwards, hooks and tools of other people do with a converted model: right, and nobody notices the mode."""

from __future__ import annotations

import socket
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.blocks import Residual, Tower
from helpers.networks import images, randomized
from helpers.right_or_named import MODES, Pair, assert_same, image, pair, results
from helpers.run_script import type_in
from helpers.tiny_training import LIGHTNING_SAYS, BoringModule, images_and_targets, make_trainer, quick
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook

from lightning_convbn import Mode, find_conv_bn_pairs, measure_memory, set_mode

pytestmark = LIGHTNING_SAYS
FROZEN: tuple[Mode, ...] = ("eval", "tune", "deploy")
IN_EVERY_MODE = pytest.mark.parametrize(("mode", "recompute"), MODES)

# ---------------------------------------------------------------- between a forward and its second run, under "blocks"


def convolution(model: Tower) -> Any:
    return model.blocks[1].conv1  # type: ignore[union-attr]


def looks(*values: Any) -> None:
    pass


HOOKS: dict[str, Callable[[Tower], Any]] = {
    "forward hook": lambda model: convolution(model).register_forward_hook(looks),
    "forward pre-hook of the norm": lambda model: model.blocks[1].bn1.register_forward_pre_hook(looks),  # type: ignore[operator, union-attr]
    "backward hook": lambda model: convolution(model).register_full_backward_hook(looks),
    "backward pre-hook": lambda model: convolution(model).register_full_backward_pre_hook(looks),
    "hook of every module": lambda model: register_module_forward_hook(looks),
}


def step(model: Tower, between: Callable[[], Any]) -> list[Any]:
    """The gradients of a step, in which something happens between forward and backward."""
    model.zero_grad()
    input = images(2, 3, 8, 8, dtype=torch.float64).requires_grad_()
    output = model(input)
    between()
    output.square().sum().backward()
    return [output.detach(), input.grad, *(parameter.grad for parameter in model.parameters())]


def tower() -> Tower:
    return Tower(Residual).double()


def expected_step() -> list[Any]:
    return step(tower().eval(), looks)


@pytest.mark.parametrize("mode", ["eval", "tune"])
@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_that_comes_or_goes_between_forward_and_backward(hook: str, mode: Any) -> None:
    model = tower()
    set_mode(model, mode, recompute="blocks")
    handle = HOOKS[hook](model)
    assert_same(step(model, handle.remove), expected_step())
    handles: list[Any] = []
    assert_same(step(model, lambda: handles.append(HOOKS[hook](model))), expected_step())
    handles[0].remove()


FLAGS: dict[str, Callable[[Tower], Any]] = {
    "eval the model": lambda model: model.eval(),
    "train the model": lambda model: model.train(),
    "eval the norms": lambda model: [part.eval() for part in model.modules() if isinstance(part, nn.BatchNorm2d)],
    "assign to the norms": lambda model: [
        setattr(part, "training", not part.training) for part in model.modules() if isinstance(part, nn.BatchNorm2d)
    ],
}


@pytest.mark.parametrize("mode", ["eval", "tune"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("flags", FLAGS)
def test_flags_of_frozen_norms_are_set_between_forward_and_backward(flags: str, training: bool, mode: Any) -> None:
    model = tower().train(training)
    set_mode(model, mode, recompute="blocks")
    assert_same(step(model, lambda: FLAGS[flags](model)), expected_step())


# -------------------------------------------------------------------------------------------- statistics that are gone


@pytest.mark.parametrize("mode", FROZEN)
@pytest.mark.parametrize("gone", ["set to None", "deleted and flag cleared"])
def test_a_norm_without_statistics_runs_plain_from_then_on(gone: str, mode: Mode) -> None:
    """As test-time adaptation does it."""
    plain, net = pair(), pair()
    set_mode(net, mode)
    for each in (plain, net):
        each(image())
        each.bn.running_mean = each.bn.running_var = None  # type: ignore[assignment]
        if gone != "set to None":
            each.bn.track_running_stats = False
    for _ in range(2):
        assert_same(results(net, Pair.__call__), results(plain, Pair.__call__))
    for then in ("tune", "deploy"):
        pairs = set_mode(net, then)  # type: ignore[arg-type]
        assert "has no running statistics" in pairs.unpaired["bn"]
        assert_same(results(net, Pair.__call__), results(plain, Pair.__call__))
    set_mode(net, "train")
    assert str(net) == str(plain)
    assert_same(results(net.eval(), Pair.__call__), results(plain, Pair.__call__))


# ------------------------------------------------------------------------------------------------ hooks that collect


class Stages(nn.Module):
    """Three pairs, one behind the other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.SiLU()) for _ in range(3)
        )
        randomized(self).double().eval()

    def forward(self, input: Tensor) -> Any:
        for block in self.blocks:
            input = block(input)
        return input


class CollectsWhileItRuns(Stages):
    """As transformers 5 collects hidden states: closures that are registered in forward, or stay and look up a list."""

    def forward(self, input: Tensor) -> Any:
        collected: list[Tensor] = []
        handles = [
            block.register_forward_hook(lambda module, args, output: collected.append(output)) for block in self.blocks
        ]
        output = super().forward(input)
        for handle in handles:
            handle.remove()
        return output, collected[0], collected[2]


ACTIVE: list[list[Tensor]] = []


class CollectsForGood(Stages):
    """As transformers 5 does: the hooks stay, and look up who collects at the moment."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.register_forward_hook(lambda module, args, output: ACTIVE[-1].append(output) if ACTIVE else None)

    def forward(self, input: Tensor) -> Any:
        ACTIVE.append([])
        try:
            output = super().forward(input)
        finally:
            collected = ACTIVE.pop()
        return output, collected[1]


class Features:
    """As timm's ``FeatureHooks``: an object beside the model that keeps what hooks give it."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self.kept: dict[int, Tensor] = {}
        for number, module in enumerate(modules):
            module.register_forward_hook(partial(self.collect, number))

    def collect(self, number: int, module: nn.Module, args: Any, output: Tensor) -> None:
        self.kept[number] = output

    def take(self) -> list[Tensor]:
        taken, self.kept = [self.kept[number] for number in sorted(self.kept)], {}
        return taken


class GivesFeatures(Stages):
    """As timm's ``FeatureHookNet``."""

    def __init__(self) -> None:
        super().__init__()
        self.hooks = Features([self.blocks[0], self.blocks[2]])

    def forward(self, input: Tensor) -> Any:
        super().forward(input)
        first, last = self.hooks.take()
        return last, first


class KeepsByAClosure(Stages):
    """Keeps the output of its first activation by a closure over itself, as libraries for explanations do."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []
        self.blocks[0][2].register_forward_hook(lambda module, args, output: self.seen.append(output))  # type: ignore[index]

    def forward(self, input: Tensor) -> Any:
        self.seen.clear()
        return super().forward(input), self.seen[0]


COLLECTORS = [CollectsWhileItRuns, CollectsForGood, GivesFeatures, KeepsByAClosure]


def summed(net: Any, input: Tensor) -> Tensor:
    return sum(value.mean() for value in net(input))  # type: ignore[return-value]


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("cls", COLLECTORS)
def test_hooks_that_collect_are_in_nobodys_way(cls: type[Stages], recorded: bool) -> None:
    plain, net = cls(), cls()
    with torch.no_grad():
        pairs = find_conv_bn_pairs(net, example_inputs=(image(),) if recorded else None)
    assert len(pairs) == 3, pairs
    for mode, recompute in MODES:
        set_mode(net, mode, pairs=pairs, recompute=recompute)  # type: ignore[arg-type]
        assert_same(results(net, summed), results(plain, summed))


@pytest.mark.parametrize("cls", COLLECTORS)
def test_what_can_not_be_counted_is_said(cls: type[Stages]) -> None:
    """It is never 0 bytes."""
    expected = measure_memory(Stages(), image(), mode="tune").saved_bytes
    error = ""
    try:
        counted = measure_memory(cls(), image(), mode="tune").saved_bytes
    except (RuntimeError, ValueError) as raised:
        counted, error = 0, str(raised)
    assert "hook" in error or counted >= expected > 0, error


# --------------------------------------------------------------------------------------------- types, lists, handles


READS_NO_VALUES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "type_as": lambda x, y: x.type_as(y),
    "to": lambda x, y: x.to(y),
    "type": lambda x, y: x.type(y.type()),
    "new_zeros": lambda x, y: x + y.new_zeros(()),
    "new_full": lambda x, y: x + y.new_full((1,), 2.0),
    "dtype and device": lambda x, y: x.to(y.device, y.dtype),
}


@IN_EVERY_MODE
@pytest.mark.parametrize("name", READS_NO_VALUES)
def test_whoever_takes_only_the_type_of_an_output_is_no_consumer(name: str, mode: Any, recompute: Any) -> None:
    class Takes(Pair):
        def forward(self, input: Tensor) -> Tensor:
            y = self.conv(input)
            return READS_NO_VALUES[name](input.mean(), y) + self.bn(y)

    plain, net = Takes().double().eval(), Takes().double().eval()
    net.load_state_dict(plain.state_dict())
    assert len(set_mode(net, mode, recompute=recompute)) == 1
    assert_same(results(net, Pair.__call__), results(plain, Pair.__call__))
    assert len(find_conv_bn_pairs(plain, example_inputs=(image(),))) == 1


def opened_zip(folder: Path) -> Any:
    with zipfile.ZipFile(folder / "data.zip", "w") as archive:
        archive.writestr("a", "text")
    return zipfile.ZipFile(folder / "data.zip")


class Closes:
    """Says that it was deleted, as handles of libraries in C do."""

    closed: list[bool] = []

    def __init__(self, forgotten: None) -> None:
        pass

    def __del__(self) -> None:
        self.closed.append(True)


HANDLES: dict[str, tuple[Callable[[Path], Any], Callable[[Any], bool]]] = {
    "zip": (opened_zip, lambda handle: handle.read("a") == b"text"),
    "file": (lambda folder: (folder / "log").open("w"), lambda handle: handle.write("a") == 1),
    "socket": (lambda folder: socket.socket(), lambda handle: handle.fileno() >= 0),
    "folder": (lambda folder: tempfile.TemporaryDirectory(), lambda handle: Path(handle.name).exists()),
    "finalizer": (lambda folder: Closes(Closes.closed.clear()), lambda handle: not handle.closed),
    "in a list": (lambda folder: [opened_zip(folder)], lambda handle: handle[0].read("a") == b"text"),
}


@pytest.fixture
def handle(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    make, use = HANDLES[request.param]
    made = make(tmp_path)
    yield made, use
    for one in made if isinstance(made, list) else [made]:
        getattr(one, "close", getattr(one, "cleanup", looks))()


@pytest.mark.parametrize("handle", HANDLES, indirect=True)
def test_what_a_module_holds_open_stays_open(handle: Any) -> None:
    held, use = handle
    net = pair()
    net.held = held
    for inputs in (None, (image(),)):
        assert len(find_conv_bn_pairs(net, example_inputs=inputs)) == 1
        assert use(held)
    assert measure_memory(net, image(), mode="tune").saved_bytes > 0
    set_mode(net, "tune", recompute="blocks")
    net(image())
    assert use(held)
    assert net.held is held


@pytest.mark.parametrize("held", ["torch.ops.aten.mul", "torch.ops.aten.mul.Tensor"])
def test_an_operator_that_a_module_holds_is_not_copied(held: str, tmp_path: Path) -> None:
    """A copy of one looks for its own attributes without end, so this runs in a process that can be ended."""
    script = (
        "import torch\n"
        "from helpers.right_or_named import image, pair\n"
        "from lightning_convbn import find_conv_bn_pairs\n"
        "net = pair()\n"
        f"net.held = {held}\n"
        "print('pairs:', len(find_conv_bn_pairs(net)), len(find_conv_bn_pairs(net, example_inputs=(image(),))))\n"
    )
    assert "pairs: 1 1" in type_in(tmp_path, script, timeout=60)


# ------------------------------------------------------------------------------- functions with positional arguments

POSITIONAL: dict[str, Callable[[Tensor], Tensor]] = {
    "max_pool2d": lambda h: torch.max_pool2d(h, 2, 2, 0, 1, True),
    "F.max_pool2d": lambda h: F.max_pool2d(h, 2, 2, 0, 1, True),
    "F.max_pool2d with indices": lambda h: F.max_pool2d(h, 2, 2, 0, 1, True, True)[0],
    "F.avg_pool2d": lambda h: F.avg_pool2d(h, 2, 2, 0, True, False, 3),
    "F.adaptive_max_pool2d": lambda h: F.adaptive_max_pool2d(h, (2, 3), True)[0],
    "F.relu": lambda h: F.relu(h, True),
    "F.silu": lambda h: F.silu(h, True),
    "F.leaky_relu": lambda h: F.leaky_relu(h, 0.3, True),
    "F.hardtanh": lambda h: F.hardtanh(h, -0.5, 0.7, True),
    "F.elu": lambda h: F.elu(h, 0.7, False),
    "F.gelu": lambda h: F.gelu(h, approximate="tanh"),
    "clamp": lambda h: torch.clamp(h, -0.5, 0.7),
    "clamp by name": lambda h: h.clamp(max=0.7, min=-0.5),
    "cat": lambda h: torch.cat((F.relu(h), h), 1),
    "cat by name": lambda h: torch.cat(tensors=[F.relu(h), h], dim=1),
    "add": lambda h: torch.add(F.relu(h), h, alpha=2),
    "F.dropout": lambda h: F.dropout(F.silu(h), 0.5, False, True),
    "F.interpolate": lambda h: F.interpolate(F.silu(h), None, 2.0, "nearest"),
    "F.pad": lambda h: F.pad(F.silu(h), [1, 1, 1, 1], "constant", 0.5),
}


@pytest.mark.parametrize("recompute", ["none", "elementwise"])
@pytest.mark.parametrize("name", POSITIONAL)
def test_functions_take_their_arguments_by_position_and_by_name(name: str, recompute: Any) -> None:
    def use(net: Pair, x: Tensor) -> Tensor:
        return POSITIONAL[name](F.silu(net(x)))

    plain, net = pair(), pair()
    set_mode(net, "tune", recompute=recompute)
    assert_same(results(net, use), results(plain, use))


# ----------------------------------------------------------------------------------- weights written in an evaluation


class Averages(BoringModule):
    """Takes other weights for one pass of each batch of an evaluation, by `.data`, as torch_ema does."""

    def __init__(self, within_a_step: bool) -> None:
        super().__init__()
        self.within_a_step = within_a_step
        self.outputs: list[Tensor] = []

    def scale(self, factor: float) -> None:
        for parameter in self.parameters():
            parameter.data.mul_(factor)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        if self.within_a_step:
            self.outputs.append(self(batch[0]))
        self.scale(2.0)
        self.outputs.append(self(batch[0]))
        if self.within_a_step:
            self.scale(0.5)

    def val_dataloader(self) -> Any:
        return images_and_targets(batches=2)


@pytest.mark.parametrize("within_a_step", [True, False])
def test_weights_that_are_written_by_data_within_an_evaluation_are_used(within_a_step: bool) -> None:
    plain, module = Averages(within_a_step), Averages(within_a_step)
    make_trainer().validate(plain, verbose=False)
    make_trainer(quick(eval_mode="deploy")).validate(module, verbose=False)
    torch.testing.assert_close(module.outputs, plain.outputs, rtol=1e-4, atol=1e-5)
