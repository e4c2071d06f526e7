"""What is kept: exact bytes, each part once, never more than without recipes; and every write is noticed."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.networks import FAMILIES, torchvision_model
from helpers.recomputation import (
    ACTIVATED,
    FLOAT,
    IMAGE,
    PAIR,
    VALUES,
    Apply,
    assert_recomputed_alike,
    assert_same_bits,
    batch,
    conv,
    net,
    pair_of,
    results,
)
from pairs.test_timm import ARCHITECTURES, abstract_model
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from lightning_convbn import find_conv_bn_pairs, measure_memory, set_mode
from lightning_convbn.ops.elementwise import ROWS, Row
from lightning_convbn.ops.values import PASSES

pytestmark = pytest.mark.usefixtures("_quick_garbage_collection")
Function = Callable[[Tensor], Tensor]
PLAIN = IMAGE + PAIR  # kept by the first pair

ELEMENTWISE: dict[str, Function] = {
    "F.relu": F.relu,
    "x.relu()": lambda x: x.relu(),
    "F.silu": F.silu,
    "swish by hand": lambda x: torch.sigmoid(x) * x,
    "hardswish by hand": lambda x: x * F.relu6(x + 3) / 6,
    "a sum": lambda x: F.silu(x) + 1,
    "a difference": lambda x: 1 - F.silu(x),
    "+=": lambda x: F.silu(x).__iadd__(1),
    "pad": lambda x: F.pad(F.silu(x), (0, 1)),
    "a cast and back": lambda x: F.silu(x).double().float(),
    "a view": lambda x: F.silu(x).view(2, 6, 4, 16).transpose(2, 3),
    "chunk": lambda x: torch.cat(F.silu(x).chunk(2, 1)[::-1], 1),
    "split": lambda x: torch.stack(torch.split(F.silu(x), 3, 1)).flatten(0, 1),
    "channel shuffle": lambda x: F.silu(x).view(2, 2, 3, 8, 8).transpose(1, 2).contiguous().view(2, 6, 8, 8),
    "pixel shuffle": lambda x: F.pixel_unshuffle(F.silu(x), 2),
    "a slice": lambda x: F.silu(x)[:, :, 1:],
    "roll and flip": lambda x: F.silu(x).roll(1, 2).flip(3),
}
HELD: dict[str, Function] = {
    "concatenation": lambda x: x,
    "view": lambda x: x.flatten(2).unflatten(2, (8, 8)),
    "copy": lambda x: x.flip(1),
    "activation": F.silu,
    "written": lambda x: x.cos_(),
}


class TestBytes:
    @pytest.mark.parametrize("name", ELEMENTWISE)
    def test_the_input_of_functions_is_kept_alone(self, name: str) -> None:
        function = ELEMENTWISE[name]
        channels = function(torch.zeros(2, 6, 8, 8)).shape[1]
        kept = assert_recomputed_alike(net(Apply(function), nn.Conv2d(channels, 4, 1)))
        clipped = "hardswish" in name  # its product keeps the clipped factor, too
        assert kept[1] == PLAIN + (1 + clipped) * ACTIVATED
        assert kept[1] < kept[0] or "relu" in name

    @pytest.mark.parametrize("inplace", [False, True])
    @pytest.mark.parametrize("cls", [nn.SiLU, nn.Hardswish, nn.Mish, nn.ReLU6])
    def test_one_of_input_and_output_is_kept(self, cls: Any, inplace: bool) -> None:
        kept = assert_recomputed_alike(net(cls(inplace=inplace), nn.Conv2d(6, 4, 1)))
        assert kept[1] == PLAIN + ACTIVATED
        assert kept[0] == PLAIN + 2 * ACTIVATED or (cls is nn.ReLU6 and inplace)  # which goes by its output

    def test_a_gate_is_kept_and_not_the_product(self) -> None:
        def gated(x: Tensor, squeeze: nn.Module, last: nn.Module) -> Tensor:
            return last(x * torch.sigmoid(squeeze(F.adaptive_avg_pool2d(x, 1))))

        kept = assert_recomputed_alike(net(nn.SiLU(), Apply(gated, nn.Conv2d(6, 6, 1), nn.Conv2d(6, 4, 1))))
        vector = 2 * 6 * FLOAT
        assert kept == [PLAIN + 3 * ACTIVATED + 2 * vector, PLAIN + ACTIVATED + 2 * vector]

    def test_parts_of_dense_concatenations_are_kept_once(self) -> None:
        def dense(x: Tensor, *layers: nn.Module) -> Tensor:
            parts = [x]
            for layer in layers:
                parts.append(layer(torch.cat(parts, 1)))
            return torch.cat(parts, 1)

        def layer(channels: int) -> nn.Module:
            return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, 6, 1))

        kept = assert_recomputed_alike(net(Apply(dense, layer(6), layer(12), layer(18))))
        # The parts; of each BatchNorm that is not folded, nothing: its vectors are buffers and parameters.
        assert kept[1] == PLAIN + 3 * ACTIVATED
        assert kept[0] >= PLAIN + (2 + 4 + 6) * ACTIVATED - ACTIVATED

    def test_average_pools_and_frozen_layers_keep_shapes(self) -> None:
        def frozen() -> list[nn.Module]:
            return [nn.Conv2d(6, 6, 1).requires_grad_(False), nn.BatchNorm2d(6).requires_grad_(False)]

        kept = assert_recomputed_alike(net(nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(3), *frozen()))
        assert kept[1] == PLAIN
        kept = assert_recomputed_alike(net(nn.Identity(), *frozen()), mode="eval")
        assert kept[1] == IMAGE + ACTIVATED  # for the gamma of the first pair

    def test_dropout_keeps_one_bit(self) -> None:
        for inplace in (False, True):
            kept = assert_recomputed_alike(net(nn.Dropout(0.4, inplace=inplace)).train())
            assert kept == [PLAIN + ACTIVATED, PLAIN + VALUES // 8]
        kept = assert_recomputed_alike(net(nn.SiLU(), nn.Dropout(0.4), nn.Conv2d(6, 4, 1)).train())
        assert kept == [PLAIN + 3 * ACTIVATED, PLAIN + ACTIVATED + VALUES // 8]

    @pytest.mark.parametrize("inplace", [False, True])
    @pytest.mark.parametrize("cls", [nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU])
    def test_a_frozen_network_keeps_one_bit_of_each_clipped_value(self, cls: Any, inplace: bool) -> None:
        model = net(cls(inplace=inplace), nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), cls(inplace=inplace), nn.MaxPool2d(2))
        plain, recomputing = pair_of(model.requires_grad_(False))
        assert_same_bits(results(recomputing, batch()), results(plain, batch()))
        kept = [
            measure_memory(model, batch().requires_grad_(), mode="tune", recompute=recompute).saved_bytes
            for recompute in ("none", "elementwise")
        ]
        windows = VALUES // 4
        assert kept[1] == 2 * VALUES // 8 + windows
        assert kept[0] >= 2 * ACTIVATED + 8 * windows

    def test_several_consumers_keep_it_once(self) -> None:
        def several(x: Tensor) -> Tensor:
            return (x * x.exp()).sum() + F.max_pool2d(x, 2).sum()

        kept = assert_recomputed_alike(net(nn.SiLU(), Apply(several)))
        assert kept[1] == PLAIN + ACTIVATED + VALUES // 4

    def test_bits_make_way_for_an_output_that_is_kept_after_all(self) -> None:
        def skip(x: Tensor, last: nn.Module) -> Tensor:
            x = F.relu(x)
            return F.max_pool2d(x, 2).sum() + last(x.view(2, 6, 8, 8))

        kept = assert_recomputed_alike(net(Apply(skip, nn.Conv2d(6, 4, 1))))
        assert kept[1] == PLAIN + ACTIVATED + VALUES // 4  # the output and the windows, and no bits

    @pytest.mark.parametrize("read_before", [False, True])
    @pytest.mark.parametrize("name", HELD)
    @pytest.mark.parametrize("frozen", [False, True])
    def test_what_a_checkpoint_holds_is_kept_itself_without_its_parts(
        self, read_before: bool, name: str, frozen: bool
    ) -> None:
        def hold(x: Tensor, before: nn.Module, *block: nn.Module) -> Tensor:
            x = HELD[name](torch.cat([x, x], 1))
            read = before(x).sum() if read_before else 0
            return checkpoint(nn.Sequential(*block), x, use_reentrant=False).sum() + read

        model = net(Apply(hold, nn.Conv2d(12, 4, 1), *conv(12, 4)))
        for module in list(model.modules())[-2:]:
            module.requires_grad_(not frozen)
        assert_recomputed_alike(model)

    def test_a_small_operand_is_not_held_for_a_sum_that_is_kept(self) -> None:
        def shifted(x: Tensor, last: nn.Module) -> Tensor:
            return last(x + torch.cos(x.mean((2, 3), keepdim=True)))

        model = net(nn.Identity(), Apply(shifted, nn.Conv2d(6, 4, 1)))
        assert len({*assert_recomputed_alike(model)}) == 1

    @pytest.mark.parametrize("length", [PASSES, PASSES + 1, 40])
    def test_a_chain_is_computed_again_up_to_a_length(self, length: int) -> None:
        def chain(x: Tensor, last: nn.Module) -> Tensor:
            x = F.silu(x)
            for _ in range(length - 1):
                x = x + 1
            return last(x)

        kept = assert_recomputed_alike(net(Apply(chain, nn.Conv2d(6, 4, 1))))
        assert kept[1] == PLAIN + ACTIVATED * (1 if length <= PASSES else 2)

    @pytest.mark.parametrize(
        ("name", "share"),
        [("efficientnet_b0", 0.62), ("mobilenet_v3_large", 0.80), ("mobilenet_v2", 0.54), ("densenet121", 0.30)],
    )
    def test_far_below_the_floor_of_tune_mode(self, name: str, share: float) -> None:
        model = torchvision_model(name).to_empty(device="cpu")
        with FakeTensorMode(allow_non_fake_inputs=True):
            image = torch.empty(8, 3, 224, 224)
            tune = measure_memory(model, image, mode="tune")
            recomputing = measure_memory(model, image, mode="tune", recompute="elementwise")
        assert recomputing.saved_bytes <= share * tune.saved_bytes
        assert sum(recomputing.saved_by_module.values()) == recomputing.saved_bytes

    def test_each_consumer_recomputes_once_and_frees_at_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        made: list[weakref.ref[Tensor]] = []
        alive: list[int] = []

        def compute(input: Tensor, inplace: bool) -> Tensor:
            alive.append(sum(reference() is not None for reference in made))
            output = F.silu(input)
            made.append(weakref.ref(output))
            return output

        monkeypatch.setitem(ROWS, F.silu, ROWS[F.silu]._replace(compute=compute))
        model = net(*(layer for _ in range(3) for layer in (nn.SiLU(), nn.Conv2d(6, 6, 1))))
        set_mode(model, "tune", recompute="elementwise")
        model(batch()).sum().backward()
        assert alive == [0, 0, 0]
        made.clear(), alive.clear()
        model = net(*(layer for _ in range(3) for layer in (nn.SiLU(), *conv(6, 6))))
        set_mode(model, "tune", recompute="elementwise")
        model(batch()).sum().backward()
        assert alive == [0, 0, 0]


FAST = {"densenet121", "googlenet", "mobilenet_v3_small", "regnet_x_400mf"}
NETWORKS = [*FAMILIES, *(f"timm:{name}" for name in ARCHITECTURES)]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in NETWORKS]
)
@pytest.mark.parametrize("frozen", [False, True])
def test_never_more_than_without(name: str, frozen: bool) -> None:
    if name in FAMILIES:
        model, size = torchvision_model(name), (3, FAMILIES[name], FAMILIES[name])
    else:
        model, image = abstract_model(name.removeprefix("timm:"))
        size = image.shape[1:]
    model = model.to_empty(device="cpu").requires_grad_(not frozen)
    pairs = find_conv_bn_pairs(model)
    with FakeTensorMode(allow_non_fake_inputs=True):
        image = torch.empty(1, *size, requires_grad=frozen)
        without, recomputing = (
            measure_memory(model, image, mode="tune", pairs=pairs, recompute=recompute).saved_bytes
            for recompute in ("none", "elementwise")
        )
    assert recomputing <= without


@torch.overrides.wrap_torch_function(lambda input: (input,))
def wave(input: Tensor) -> Tensor:
    """A function of a user, which torch hands to a subclass of Tensor."""
    return torch.sin(input) + input


class TestAFunctionOfOnesOwn:
    def test_a_row_makes_it_recomputable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = net(Apply(wave), nn.Conv2d(6, 4, 1))
        without = assert_recomputed_alike(model)
        assert without[1] == without[0]
        monkeypatch.setitem(ROWS, wave, Row(wave))
        assert assert_recomputed_alike(model) == [without[0], without[0] - ACTIVATED]

    def test_it_is_computed_again_in_the_autocast_state_of_the_forward_pass(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        states: list[bool] = []

        def compute(input: Tensor) -> Tensor:
            states.append(torch.is_autocast_enabled("cpu"))
            return wave(input)

        monkeypatch.setitem(ROWS, wave, Row(compute))
        _, recomputing = pair_of(net(Apply(wave), *conv(6, 4)))
        for forward in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=forward):
                output = recomputing(batch())
            with torch.autocast("cpu", torch.bfloat16, enabled=not forward):
                output.float().sum().backward()
        assert states == [False, True]


def pooled(x: Tensor) -> Tensor:
    """A recomputable tensor that can't be computed again."""
    return F.avg_pool2d(x, 1)


WRITES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "add_": lambda part, earlier: part.add_(1),
    "+=": lambda part, earlier: part.__iadd__(1),
    "relu_": lambda part, earlier: torch.relu_(part),
    "an activation in place": lambda part, earlier: F.silu(input=part, inplace=True),
    "assignment": lambda part, earlier: part.__setitem__((slice(None), 0), 1.0),
    "a view": lambda part, earlier: part[:, :1].mul_(2),
    "a view of a view": lambda part, earlier: part.view(2, -1)[:, :3].zero_(),
    "a view that is not in the table": lambda part, earlier: part.as_strided((4,), (1,)).add_(1),
    "an attribute": lambda part, earlier: part.mT.add_(1),
    "a detached tensor": lambda part, earlier: part.detach().add_(1),
    "an earlier detached tensor": lambda part, earlier: earlier.add_(1),
    "data": lambda part, earlier: part.data.add_(1),
    "a list": lambda part, earlier: torch._foreach_add_([part], 1.0),
}


class TestWritesInPlace:
    @pytest.mark.parametrize("no_grad", [False, True])
    @pytest.mark.parametrize("first", [False, True])
    @pytest.mark.parametrize("write", WRITES)
    def test_to_a_part_after_its_concatenation(self, write: str, first: bool, no_grad: bool) -> None:
        """Autograd allows them: a concatenation does not save its parts."""

        def run(x: Tensor, last: nn.Module) -> Tensor:
            part = pooled(x)
            earlier = part.detach() if "earlier" in write else part
            both = torch.cat([part, F.silu(x)], 1)
            output = None if first else last(both)
            with torch.set_grad_enabled(not no_grad):
                WRITES[write](part, earlier)
            return (last(both) if output is None else output) + part.sum()

        assert_recomputed_alike(net(Apply(run, nn.Conv2d(12, 4, 1))))

    def test_to_a_plain_part(self) -> None:
        def run(x: Tensor, last: nn.Module) -> Tensor:
            part = torch.cos(x)
            output = last(torch.cat([part, x], 1))
            part.add_(1)
            return output + part.sum()

        assert_recomputed_alike(net(Apply(run, nn.Conv2d(12, 4, 1))))

    def test_to_the_base_of_a_view_that_is_a_part(self) -> None:
        def run(x: Tensor, last: nn.Module) -> Tensor:
            base = pooled(x)
            view = base.view(2, 6, 8, 8)
            output = last(torch.cat([view, F.relu(view)], 1))
            base.add_(1)
            return output + base.sum()

        assert_recomputed_alike(net(Apply(run, nn.Conv2d(12, 4, 1))))

    def test_to_a_small_operand_of_a_sum(self) -> None:
        def run(x: Tensor, last: nn.Module) -> Tensor:
            shift = torch.cos(x.mean((2, 3), keepdim=True))
            output = last(F.silu(x) + shift)
            shift.add_(1)
            return output

        assert_recomputed_alike(net(Apply(run, nn.Conv2d(6, 4, 1))))

    def test_to_an_output_before_it_is_saved(self) -> None:
        assert_recomputed_alike(net(nn.SiLU(), Apply(lambda x: x.mul_(2)), nn.Conv2d(6, 4, 1)))
        assert_recomputed_alike(net(nn.SiLU(), Apply(lambda x: x.flatten(1).mul_(2).view_as(x)), nn.Conv2d(6, 4, 1)))

    def test_to_an_output_after_it_is_saved_is_right_or_refused(self) -> None:
        """Autograd refuses it. A recipe gives what was saved; where there is none, it is refused, too."""
        weight = torch.ones(6, 1, 1, requires_grad=True)
        for act, computed in ((nn.SiLU(), True), (nn.ReLU6(), False)):
            _, recomputing = pair_of(net(act))
            output = recomputing(batch())
            expected = output.detach().sum((0, 2, 3))[:, None, None].clone()
            loss = (output * weight).sum()
            with torch.no_grad():
                output.mul_(2)
            if computed:
                (gradient,) = torch.autograd.grad(loss, weight)
                torch.testing.assert_close(gradient, expected)
            else:
                with pytest.raises(RuntimeError, match=r"modified by an inplace operation: a tensor of shape \[2, 6"):
                    loss.backward()

    def test_to_what_is_saved_is_refused(self) -> None:
        def run(x: Tensor, last: nn.Module) -> Tensor:
            output = last(F.silu(x))
            with torch.no_grad():
                x.mul_(2)
            return output

        for model in pair_of(net(nn.Identity(), Apply(run, nn.Conv2d(6, 4, 1)))):
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                model(batch()).sum().backward()

    def test_to_a_parameter_of_a_product_is_refused(self) -> None:
        weight = nn.Parameter(torch.ones(6, 1, 1))
        for model in pair_of(net(nn.SiLU())):
            loss = (model(batch()) * weight).sum()
            with torch.no_grad():
                weight.mul_(2)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()

    def test_a_skip_connection_is_added_in_place(self) -> None:
        for act in (nn.ReLU6(), nn.SiLU(), nn.ReLU6(inplace=True)):
            assert_recomputed_alike(net(act, Apply(lambda x: x.add_(1))))


def written_then_activated(y: Tensor) -> Tensor:
    y[:, 0] = 0
    return F.leaky_relu(y, 0.1, inplace=True)


def activated_with_an_alias_alive(y: Tensor) -> Tensor:
    alias = y.detach()
    return torch.sigmoid_(y) * (1 + 0 * alias.sum())


def saved_by_a_statistic_first(y: Tensor) -> Tensor:
    statistic = y.abs().mean()
    return F.gelu(F.silu(y, inplace=True)) + 0 * statistic.detach()


def half_plus_float_in_place(y: Tensor) -> Tensor:
    k = F.silu(y).half()
    k += y
    return F.gelu(k.float())


def in_place_on_a_view(y: Tensor) -> Tensor:
    v = F.silu(y)[:, :, :5, :5]
    return F.gelu(F.silu(v, inplace=True))


def sliced_by_a_counter(y: Tensor) -> Tensor:
    start, total = torch.tensor(0), y.new_zeros(())
    for _ in range(3):
        total = total + F.silu(y[:, start : start + 2] * 2).sum()
        start += 2
    return total + F.silu(y)


def indexed_by_an_array(y: Tensor) -> Tensor:
    chosen = np.array([0, 1])
    z = F.silu(y[:, chosen] * 2)
    chosen[1] = 5
    return z.sum() + F.silu(y)


def padded_by_a_list(y: Tensor) -> Tensor:
    pads = [1, 1, 0, 0]
    z = F.silu(F.pad(y, pads))
    pads[2] = 5
    return z.sum() + F.silu(y)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    "function",
    [
        written_then_activated,
        activated_with_an_alias_alive,
        saved_by_a_statistic_first,
        half_plus_float_in_place,
        in_place_on_a_view,
        sliced_by_a_counter,
        indexed_by_an_array,
        padded_by_a_list,
    ],
    ids=lambda function: function.__name__,
)
def test_the_bits_are_the_plain_ones(function: Callable[[Tensor], Tensor], frozen: bool) -> None:
    assert_recomputed_alike(net(Apply(function)).requires_grad_(not frozen))


def test_a_view_that_is_asked_for_twice_sees_a_write_in_between() -> None:
    def write_late(model: torch.nn.Module) -> None:
        input = batch().requires_grad_()
        y = model(input)
        k = F.silu(y)
        v = y[:, :4]
        p, q = F.silu(v).sum() + 0 * k.sum(), F.gelu(v).sum()
        for loss in (p, q, p):
            torch.autograd.grad(loss, input, retain_graph=True)
        with torch.no_grad():
            y.mul_(2)
        torch.autograd.grad(q, input)

    for model in pair_of(net()):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            write_late(model)


SPECIAL = {
    "prelu": (torch.full((6,), 0.3),),
    "view": (2, 6, 64),
    "reshape": (2, 6, 64),
    "permute": (0, 2, 3, 1),
    "expand": (2, 2, 6, 8, 8),
    "transpose": (2, 3),
    "swapaxes": (2, 3),
    "movedim": (2, 3),
    "unflatten": (1, (2, 3)),
    "unsqueeze": (0,),
    "chunk": (2, 1),
    "split": (3, 1),
    "narrow": (1, 0, 3),
    "select": (1, 0),
    "__getitem__": ((slice(None), slice(1)),),
    "to": (torch.float64,),
    "roll": (1, 2),
    "flip": ((3,),),
    "channel_shuffle": (2,),
    "pixel_shuffle": (1,),
    "pixel_unshuffle": (2,),
    "pad": ((1, 1),),
    "clamp": (-0.3, 0.7),
    **dict.fromkeys(("mul", "multiply", "div", "divide", "true_divide", "add", "sub", "subtract"), (1.7,)),
    **dict.fromkeys(("avg_pool2d", "max_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d"), (2,)),
}
TWO_TENSORS = ("view_as", "reshape_as", "expand_as")
OTHER_INPUTS = ("batch_norm", "dropout", "cat", "concat", "concatenate", "stack", "conv")  # have tests of their own


def plain_name(function: Any) -> str:
    name: str = function.__name__.removeprefix("_")
    return name.strip("_").removeprefix("r").removeprefix("i") if name.startswith("__") else name.rstrip("_")


def row_functions() -> list[Any]:
    named = [(plain_name(function), function) for function in ROWS if function.__name__ != "__float__"]
    return [function for name, function in named if not name.startswith(OTHER_INPUTS)]


@pytest.mark.parametrize("function", row_functions(), ids=lambda function: function.__name__)
def test_every_row_of_the_table(function: Any) -> None:
    """Once behind a pair, and what follows reads its output."""

    def run(x: Tensor) -> Tensor:
        x = F.avg_pool2d(x, 1)
        name = plain_name(function)
        special = function.__name__ if function.__name__ in SPECIAL else name
        arguments = (x,) if special in TWO_TENSORS else SPECIAL.get(special, ())
        output = function(x, *arguments)
        output = output[0] if isinstance(output, (tuple, list)) else output
        if output is NotImplemented:  # for a number
            output = function(x, torch.full_like(x, 1.7))
        return F.silu(output.float()) * torch.cos(output.float())

    try:
        results(pair_of(net(Apply(run)))[0], batch())
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        pytest.skip(f"plain PyTorch does not do that: {error}"[:120])
    assert_recomputed_alike(net(Apply(run)))
