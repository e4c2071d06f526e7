"""A converted layer is what it was: its class, its attributes, what others make of it. Only its forward is another."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, get_args

import pytest
import torch
from helpers.comparing import assert_close, gradients
from helpers.networks import images, randomized, small_net
from torch import Tensor, fx, nn
from torch._dynamo.testing import CompileCounter
from torch.nn.utils import parametrizations, parametrize
from torchvision.models.feature_extraction import create_feature_extractor

from lightning_convbn import Mode, set_mode

MODES: tuple[Mode, ...] = get_args(Mode)
FROZEN: tuple[Mode, ...] = ("eval", "tune", "deploy")
FOLDED: tuple[Mode, ...] = ("tune", "deploy")


def pair(conv: type[nn.Conv2d] = nn.Conv2d, bn: type[nn.BatchNorm2d] = nn.BatchNorm2d) -> nn.Sequential:
    torch.manual_seed(0)
    return randomized(nn.Sequential(conv(3, 8, 3), bn(8))).double().eval()  # type: ignore[return-value]


def image() -> Tensor:
    return images(2, 3, 8, 8, dtype=torch.float64)


def results(model: Callable[[Tensor], Tensor], *parameters: Tensor) -> list[Tensor]:
    input = image().requires_grad_()
    output = model(input)
    return [output.detach(), *gradients(output, input, *parameters)]


# ----------------------------------------------------------------------------------------------------------- classes


class Block(nn.Module):
    """A block whose forward asks for types, as some of BackPACK's and KFAC's helpers do."""

    def __init__(self, channels: int = 6) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, input: Tensor) -> Tensor:
        known = type(self.conv) is nn.Conv2d and type(self.bn).__name__ == "BatchNorm2d"
        return torch.relu(self.bn(self.conv(input))) + (input if known else 0)


@pytest.mark.parametrize("mode", FROZEN)
def test_a_forward_that_asks_for_types_takes_the_branch_that_it_takes_in_a_plain_model(mode: Mode) -> None:
    plain, model = (randomized(nn.Sequential(Block(3))).double().eval() for _ in range(2))
    model.load_state_dict(plain.state_dict())
    set_mode(model, mode)
    assert_close(results(model, *model.parameters()), results(plain, *plain.parameters()), 1e-9)


def per_sample_gradients(model: nn.Module) -> dict[str, Tensor]:
    """As opacus computes them: a table of classes says which layers are hooked, and how."""
    inputs, found = {}, {}

    def of_conv(conv: nn.Conv2d, input: Tensor, slope: Tensor) -> Tensor:
        columns = torch.nn.functional.unfold(input, conv.kernel_size, padding=conv.padding)
        return torch.einsum("nop,nip->noi", slope.flatten(2), columns)

    def of_norm(bn: nn.BatchNorm2d, input: Tensor, slope: Tensor) -> Tensor:
        normalised = torch.nn.functional.batch_norm(input, bn.running_mean, bn.running_var, eps=bn.eps)
        return (normalised * slope).sum((2, 3))

    table: dict[type[nn.Module], Any] = {nn.Conv2d: of_conv, nn.BatchNorm2d: of_norm}
    for name, module in model.named_modules():
        if any(True for _ in module.parameters(recurse=False)):
            rule = table[type(module)]
            module.register_forward_hook(lambda module, args, output: inputs.update({module: args[0].detach()}))
            module.register_full_backward_hook(
                lambda module, grad_input, grad_output, name=name, rule=rule: found.update(
                    {name: rule(module, inputs[module], grad_output[0])}
                )
            )
    model(image().requires_grad_()).square().sum().backward()
    return found


@pytest.mark.parametrize("mode", FROZEN)
def test_tables_of_classes_and_their_hooks_give_per_sample_gradients(mode: Mode) -> None:
    plain, model = pair(), pair()
    expected = per_sample_gradients(plain)
    set_mode(model, mode)
    found = per_sample_gradients(model)
    assert found.keys() == expected.keys() == {"0", "1"}
    assert_close([found[name] for name in expected], [*expected.values()], 1e-9)


# ------------------------------------------------------------------------------------------- what others make of it


def exported(model: nn.Module) -> nn.Module:
    return torch.export.export(model, (image(),)).module()


def called_with_other_tensors(model: nn.Module) -> Callable[[Tensor], Tensor]:
    others = {name: tensor * 1.5 for name, tensor in model.state_dict().items()}
    return lambda input: torch.func.functional_call(model, others, input)


MADE: dict[str, Callable[[nn.Module], Callable[[Tensor], Any]]] = {
    "fx": fx.symbolic_trace,
    "fx feature extractor": lambda model: lambda input: create_feature_extractor(model, ["8"])(input)["8"],
    "jit.trace": lambda model: torch.jit.trace(model, image()),
    "export": exported,
    "functional_call": called_with_other_tensors,
}


@pytest.mark.parametrize("mode", FROZEN)
@pytest.mark.parametrize("made", MADE)
@pytest.mark.filterwarnings("ignore:.torch.jit", "ignore::torch.jit.TracerWarning")
def test_what_is_made_of_a_converted_model_computes_what_a_plain_one_computes(made: str, mode: Mode) -> None:
    plain = small_net()[:9].double().eval()
    model = copy.deepcopy(plain)
    set_mode(model, mode)
    expected = called_with_other_tensors(plain) if made == "functional_call" else plain
    assert_close([MADE[made](model)(image())], [expected(image())], 1e-9)
    assert_close(results(model, *model.parameters()), results(plain, *plain.parameters()), 1e-9)


def test_the_nodes_of_a_trace_are_the_layers() -> None:
    model = small_net()
    set_mode(model, "tune")
    nodes = [node.target for node in fx.symbolic_trace(model).graph.nodes if node.op == "call_module"]
    assert nodes == [name for name, _ in model.named_children()]


@pytest.mark.parametrize("mode", FROZEN)
@pytest.mark.parametrize("index", [0, 1])
def test_parametrizations_come_and_go_after_the_switch(index: int, mode: Mode) -> None:
    plain, model = pair(), pair()
    set_mode(model, mode)
    for net in (plain, model):
        parametrize.register_parametrization(net[index], "weight", nn.Softplus())
    assert_close([model(image()), copy.deepcopy(model)(image())], [plain(image())] * 2, 1e-9)
    for net in (plain, model):
        parametrize.remove_parametrizations(net[index], "weight")
    assert type(model[index]) is type(plain[index])
    assert_close(results(model, *model.parameters()), results(plain, *plain.parameters()), 1e-9)
    set_mode(model, "train")
    assert str(model) == str(plain)
    assert [vars(module).keys() for module in model] == [vars(module).keys() for module in plain]


def test_parametrizations_that_were_there_before_the_switch_are_removed_after_it() -> None:
    plain, model = pair(), pair()
    for net in (plain, model):
        parametrizations.weight_norm(net[0])
        parametrize.register_parametrization(net[1], "weight", nn.Softplus())
    set_mode(model, "tune")
    for net in (plain, model):
        parametrize.remove_parametrizations(net[0], "weight")
        parametrize.remove_parametrizations(net[1], "weight")
    assert_close([model(image())], [plain(image())], 1e-9)
    assert [type(module) for module in model] == [nn.Conv2d, nn.BatchNorm2d]


# ------------------------------------------------------------------------------------- derived classes, own functions


class Derived(nn.Conv2d):
    """As in many packages: other defaults, the same forward."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"bias": False, **options})


class DerivedAgain(Derived):
    """Has something to say, and nothing else to compute."""

    def fan_out(self) -> int:
        return self.out_channels


class DerivedNorm(nn.BatchNorm2d):
    """Takes anything, which changes no result."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass


class OwnForward(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 1.5


class OwnConvForward(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(torch.flip(input, (3,)), weight, bias)


class OwnCall(nn.Conv2d):
    def __call__(self, input: Tensor) -> Tensor:
        output: Tensor = super().__call__(input)
        return output * 1.5


class OwnForwardNorm(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 1.5


class OwnForwardLater(OwnForward):
    """Inherits the forward of a class that is in no table."""


@pytest.mark.parametrize("mode", FROZEN)
@pytest.mark.parametrize("classes", [{"conv": Derived}, {"conv": DerivedAgain}, {"bn": DerivedNorm}])
def test_a_derived_class_that_inherits_the_forward_is_folded(classes: dict[str, Any], mode: Mode) -> None:
    plain, model = pair(**classes), pair(**classes)
    pairs = set_mode(model, mode)
    assert [*pairs] == [("0", "1")], pairs
    assert_close(results(model, *model.parameters()), results(plain, *plain.parameters()), 1e-9)
    assert [type(module) for module in model] == [type(module) for module in plain]


@pytest.mark.parametrize("mode", FROZEN)
@pytest.mark.parametrize(
    "classes",
    [
        *({"conv": own} for own in (OwnForward, OwnConvForward, OwnCall, OwnForwardLater)),
        {"bn": OwnForwardNorm},
    ],
    ids=lambda classes: next(iter(classes.values())).__name__,
)
def test_a_derived_class_with_a_forward_of_its_own_is_not_folded(classes: dict[str, Any], mode: Mode) -> None:
    plain, model = pair(**classes), pair(**classes)
    assert set_mode(model, mode).frozen["1"]
    assert_close(results(model, *model.parameters()), results(plain, *plain.parameters()), 1e-9)


def set_on(module: nn.Module, attribute: str) -> None:
    """Set a function on a module that doubles what the class's own computes."""
    own = getattr(module, attribute)
    setattr(module, attribute, lambda *args: 2 * own(*args))


OWN = [(0, "forward"), (0, "_conv_forward"), (0, "__call__"), (1, "forward"), (1, "__call__")]


@pytest.mark.parametrize("mode", FROZEN)
@pytest.mark.parametrize(("index", "attribute"), OWN)
def test_a_layer_with_a_function_set_on_the_module_is_not_folded(index: int, attribute: str, mode: Mode) -> None:
    plain, model = pair(), pair()
    for net in (plain, model):
        set_on(net[index], attribute)
    pairs = set_mode(model, mode)
    assert len(pairs) == 0
    assert attribute in pairs.frozen["1"]
    assert f"`{index}`" in pairs.frozen["1"] or index == 1
    assert_close(results(model, *model.parameters()), results(plain, *plain.parameters()), 1e-9)
    set_mode(model, "train")
    assert attribute in vars(model[index])
    assert_close([model(image())], [plain(image())], 1e-9)


@pytest.mark.parametrize("mode", FROZEN)
@pytest.mark.parametrize(("index", "attribute"), [*OWN, (0, "_call_impl"), (1, "_call_impl")])
def test_a_function_that_is_set_on_the_module_after_the_switch_runs(index: int, attribute: str, mode: Mode) -> None:
    plain, model = pair(), pair()
    set_mode(model.train(), mode)
    for net in (plain, model):
        set_on(net[index], attribute)
    for _ in range(2):
        assert_close(results(model, *model.parameters()), results(plain, *plain.parameters()), 1e-9)
        assert_close([*model.buffers()], [*plain.buffers()], 0)
        set_mode(model, "train")
        model.eval()
    assert vars(model[index]).keys() == vars(plain[index]).keys()


# ------------------------------------------------------------------------------------------------- there and back


@pytest.mark.parametrize("mode", MODES)
def test_the_mode_is_visible_in_print(mode: Mode) -> None:
    net, plain = small_net(), small_net()
    pairs = set_mode(net, mode)
    shown = dict(zip(("0", "1"), map(str, net), strict=False))
    assert ("convbn=" in str(net)) == (mode != "train")
    folded = f"Conv2d(3, 6, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), bias=False, convbn='{mode}')"
    assert shown["0"] == (folded if mode in FOLDED else str(plain[0]))
    if mode != "train":
        assert shown["1"].startswith("BatchNorm2d(6, eps=1e-05, momentum=0.1, affine=True")
        assert shown["1"].endswith(f", convbn='{mode}')")
        assert "convbn=" in str(net[3])  # frozen, and in no pair
    assert str(net[2]) == str(plain[2])
    assert len(pairs) == 3


# ---------------------------------------------------------------------------------------------------- compiled models


@pytest.fixture
def counter() -> Iterator[CompileCounter]:
    torch._dynamo.reset()
    yield CompileCounter()
    torch._dynamo.reset()


@pytest.mark.parametrize("mode", FROZEN)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_equal_blocks_take_as_many_graphs_as_plain_ones(mode: Mode, counter: CompileCounter) -> None:
    frames = []
    for converted in (False, True):
        torch._dynamo.reset()
        counter.clear()
        model = nn.Sequential(*(Block() for _ in range(6))).eval()
        expected = model(images(2, 6, 5, 5))
        if converted:
            set_mode(model, mode)
        for block in model:
            block.compile(backend=counter)
        assert_close([model(images(2, 6, 5, 5))], [expected], 1e-5)
        frames.append(counter.frame_count)
    assert frames[1] <= frames[0]
