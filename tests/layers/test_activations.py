"""Recomputed activations: the plain path's numbers to the bit, fewer bytes, and the plain path where it can't work."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers.comparing import Snapshot
from helpers.networks import FAMILIES, images, random_model, randomized, torchvision_model
from helpers.tiny_training import LIGHTNING_SAYS, BoringModule, PrintedLines, make_trainer
from test_memory import _quick_garbage_collection, allocated_by  # noqa: F401 - for every test here, too
from torch import Tensor, nn
from torch._functorch import config
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from lightning_convbn import (
    ConvBNModeCallback,
    Mode,
    conv_bn_mode,
    find_conv_bn_pairs,
    get_mode,
    measure_memory,
    set_mode,
)
from lightning_convbn.layers.activations import ACTIVATION_LAYERS, RecomputedActivation, RecomputedSiLU
from lightning_convbn.memory import as_mib, count_saved_bytes
from lightning_convbn.ops.recomputed_activations import RecomputedTensor

PLAIN_ACTIVATIONS = [key for key in ACTIVATION_LAYERS if not isinstance(key, str)]
IN_PLACE = [cls for cls in PLAIN_ACTIVATIONS if cls is not nn.GELU]


class Gated(nn.Module):
    """A product with a gate computed from the input, as in squeeze-excite."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, channels, 1)

    def forward(self, input: Tensor) -> Tensor:
        return torch.sigmoid(self.squeeze(input.mean((2, 3), keepdim=True))) * input


def conv(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs)]


CONSUMERS: dict[str, Callable[[], list[nn.Module]]] = {
    "a folded convolution": lambda: conv(6, 4),
    "a plain convolution": lambda: [nn.Conv2d(6, 4, 1), nn.Conv2d(4, 4, 1)],
    "a gate": lambda: [Gated(6)],
    "pooling": lambda: [nn.MaxPool2d(2)],
    "a linear layer": lambda: [nn.Linear(8, 3)],
    "a frozen BatchNorm": lambda: [nn.BatchNorm2d(6)],
    "a view and a linear layer": lambda: [nn.Flatten(), nn.Linear(6 * 64, 2)],
    "dropout": lambda: [nn.Dropout(0.5), nn.Conv2d(6, 4, 1)],
    "dropout in place": lambda: [nn.Dropout(0.5, inplace=True), nn.Conv2d(6, 4, 1)],
    "another activation": lambda: [nn.SiLU(), nn.Conv2d(6, 4, 1)],
    "another activation in place": lambda: [nn.SiLU(inplace=True), nn.Conv2d(6, 4, 1)],
    "nobody": lambda: [],
}


def net(activation: nn.Module, *rest: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return randomized(nn.Sequential(*conv(3, 6), activation, *rest)).to(dtype)


def pair_of(model: nn.Module, mode: Mode = "tune") -> tuple[nn.Module, nn.Module]:
    """The model in a mode, and a copy that also recomputes its activations."""
    recomputing = copy.deepcopy(model)
    set_mode(model, mode)
    set_mode(recomputing, mode, recompute="elementwise")
    return model, recomputing


def results(model: nn.Module, input: Tensor, run: Callable[..., Tensor] | None = None) -> list[Tensor]:
    """Output and all gradients."""
    model.zero_grad()
    torch.manual_seed(0)
    input = input.clone().requires_grad_()
    output = (run or model)(input)
    loss = (output * images(*output.shape, seed=2).to(output.dtype)).sum()
    loss.backward()
    return [output.detach(), *(leaf.grad for leaf in (input, *model.parameters()) if leaf.grad is not None)]


def assert_same_bits(outputs: list[Tensor], expected: list[Tensor]) -> None:
    assert len(outputs) == len(expected)
    assert all(torch.equal(output, other) for output, other in zip(outputs, expected, strict=True))


def batch(dtype: torch.dtype = torch.float32) -> Tensor:
    return images(2, 3, 8, 8, dtype=dtype)


@pytest.fixture(params=[nn.SiLU, nn.ReLU6])
def marked(request: pytest.FixtureRequest) -> Tensor:
    """The output of an activation that is recomputed, or that goes by its output, of shape ``(2, 6, 8, 8)``."""
    model = net(request.param())
    set_mode(model, "tune", recompute="elementwise")
    output = model(batch())
    assert isinstance(output, RecomputedTensor)
    return output


class TestSameNumbers:
    @pytest.mark.parametrize("mode", ["eval", "tune"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("inplace", [False, True])
    @pytest.mark.parametrize("cls", PLAIN_ACTIVATIONS)
    def test_of_every_activation(self, cls: type[nn.Module], inplace: bool, dtype: torch.dtype, mode: Mode) -> None:
        if inplace and cls not in IN_PLACE:
            pytest.skip("has no such argument")
        activation = cls(inplace=True) if inplace else cls()
        plain, recomputing = pair_of(net(activation, *conv(6, 4), dtype=dtype), mode)
        assert isinstance(recomputing[2], RecomputedActivation)
        assert_same_bits(results(recomputing, batch(dtype)), results(plain, batch(dtype)))

    @pytest.mark.parametrize(
        "activation",
        [nn.GELU(approximate="tanh"), nn.Hardtanh(-0.3, 0.7), nn.LeakyReLU(0.3), nn.ELU(alpha=2.0)],
        ids=str,
    )
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # which has no 0.7, so that a clamp rounds it
    def test_of_activations_with_arguments(self, activation: nn.Module, dtype: torch.dtype) -> None:
        plain, recomputing = pair_of(net(activation, *conv(6, 4), dtype=dtype))
        assert_same_bits(results(recomputing, batch(dtype)), results(plain, batch(dtype)))

    @pytest.mark.parametrize("inplace", [False, True])
    @pytest.mark.parametrize("consumer", CONSUMERS)
    def test_for_every_consumer(self, consumer: str, inplace: bool) -> None:
        plain, recomputing = pair_of(net(nn.Hardswish(inplace=inplace), *CONSUMERS[consumer]()))
        assert_same_bits(results(recomputing, batch()), results(plain, batch()))

    @pytest.mark.parametrize("name", ["mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0"])
    def test_of_whole_models(self, name: str) -> None:
        plain, recomputing = pair_of(random_model(name))
        assert_same_bits(results(recomputing, images(1, 3, 64, 64)), results(plain, images(1, 3, 64, 64)))

    def test_under_autocast(self) -> None:
        plain, recomputing = pair_of(net(nn.SiLU(), *conv(6, 4), Gated(4)))
        with torch.autocast("cpu", torch.bfloat16):
            assert_same_bits(results(recomputing, batch()), results(plain, batch()))
            assert count_saved_bytes(recomputing, batch()) < count_saved_bytes(plain, batch())

    def test_channels_last(self) -> None:
        plain, recomputing = pair_of(net(nn.SiLU(), *conv(6, 4)).to(memory_format=torch.channels_last))
        input = batch().to(memory_format=torch.channels_last)
        assert_same_bits(results(recomputing, input), results(plain, input))
        assert count_saved_bytes(recomputing, input) < count_saved_bytes(plain, input)

    def test_of_an_activation_in_place_on_a_slice(self) -> None:
        class Halves(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.act, self.conv = nn.SiLU(inplace=True), nn.Conv2d(3, 4, 1)

            def forward(self, input: Tensor) -> Tensor:
                return self.conv(self.act(input[:, :3])) + input[:, :1]

        plain, recomputing = pair_of(net(nn.Identity(), Halves()))
        assert_same_bits(results(recomputing, batch()), results(plain, batch()))

    def test_of_an_activation_called_twice(self) -> None:
        act = nn.SiLU()
        plain, recomputing = pair_of(net(act, *conv(6, 6), act, nn.Conv2d(6, 4, 1)))
        assert_same_bits(results(recomputing, batch()), results(plain, batch()))

    def test_of_timms_batch_norm_with_an_activation(self) -> None:
        torch.manual_seed(0)
        model = randomized(timm.create_model("mobilenetv3_small_050", num_classes=4)).eval()
        plain, recomputing = pair_of(model)
        input = images(1, 3, 64, 64)
        assert_same_bits(results(recomputing, input), results(plain, input))
        assert count_saved_bytes(recomputing, input) < 0.9 * count_saved_bytes(plain, input)

    def test_a_second_backward_pass_computes_it_again(self) -> None:
        _, recomputing = pair_of(net(nn.SiLU(), *conv(6, 4)))
        loss = recomputing(batch()).pow(2).sum()
        parameters = list(recomputing.parameters())
        first = torch.autograd.grad(loss, parameters, retain_graph=True)
        assert_same_bits(list(torch.autograd.grad(loss, parameters)), list(first))

    @pytest.mark.parametrize("act", [nn.SiLU(inplace=True), nn.Mish(), nn.GELU(), nn.LeakyReLU(0.2)], ids=str)
    def test_double_backward(self, act: nn.Module) -> None:
        model = net(act, Gated(6), *conv(6, 2), dtype=torch.float64)
        set_mode(model, "tune", recompute="elementwise")
        names = [name for name, _ in model.named_parameters()]

        def run(input: Tensor, *parameters: Tensor) -> Tensor:
            return torch.func.functional_call(model, dict(zip(names, parameters, strict=True)), input)

        arguments = (images(1, 3, 3, 3, dtype=torch.float64).requires_grad_(), *model.parameters())
        assert torch.autograd.gradcheck(run, arguments, fast_mode=True)
        assert torch.autograd.gradgradcheck(run, arguments, fast_mode=True)


FLOAT = 4
ACTIVATED, IMAGE = 2 * 6 * 8 * 8 * FLOAT, 2 * 3 * 8 * 8 * FLOAT


class TestBytes:
    @pytest.mark.parametrize("inplace", [False, True])
    @pytest.mark.parametrize("cls", [nn.SiLU, nn.Hardswish, nn.Mish, nn.ReLU6])
    def test_one_of_input_and_output_is_kept(self, cls: Any, inplace: bool) -> None:
        model = net(cls(inplace=inplace), nn.Conv2d(6, 4, 1))
        kept = [
            measure_memory(model, batch(), mode="tune", recompute=recompute).saved_bytes
            for recompute in ("none", "elementwise")
        ]
        vectors = 2 * 6 * FLOAT  # of the pair
        assert kept == [IMAGE + vectors + 2 * ACTIVATED, IMAGE + vectors + ACTIVATED]

    def test_several_consumers_keep_it_once(self) -> None:
        class Several(nn.Module):
            def forward(self, input: Tensor) -> Tensor:
                return (input * input.exp()).sum() + F.max_pool2d(input, 2).sum()

        counts = [count_saved_bytes(model, batch()) for model in pair_of(net(nn.SiLU(), Several()))]
        assert counts[0] - counts[1] == ACTIVATED

    def test_an_activation_in_place_that_keeps_its_output_stays_plain(self) -> None:
        plain, recomputing = pair_of(net(nn.LeakyReLU(inplace=True), nn.Conv2d(6, 4, 1)))
        assert count_saved_bytes(recomputing, batch()) == count_saved_bytes(plain, batch())

    def test_nothing_is_kept_for_frozen_parameters(self) -> None:
        model = net(nn.SiLU(), *conv(6, 4)).requires_grad_(False)
        set_mode(model, "tune", recompute="elementwise")
        assert type(model[:3](batch())) is Tensor
        model(batch())  # the folds stay from now on
        assert count_saved_bytes(model, batch()) == 0

    def test_without_gradients_the_output_is_plain(self) -> None:
        model = net(nn.SiLU())
        set_mode(model, "tune", recompute="elementwise")
        with torch.no_grad():
            assert type(model(batch())) is Tensor
        with torch.inference_mode():
            assert type(model(batch())) is Tensor

    @pytest.mark.parametrize(
        ("name", "mib", "share"),
        [
            ("efficientnet_b0", 281, 0.62),
            ("efficientnet_v2_s", 497, 0.63),
            ("mobilenet_v3_large", 158, 0.80),
            ("mobilenet_v2", 208, 0.54),
        ],
    )
    def test_far_below_the_floor_of_tune_mode(self, name: str, mib: int, share: float) -> None:
        model = torchvision_model(name).to_empty(device="cpu")
        with FakeTensorMode(allow_non_fake_inputs=True):
            image = torch.empty(8, 3, 224, 224)
            tune = measure_memory(model, image, mode="tune")
            recomputing = measure_memory(model, image, mode="tune", recompute="elementwise")
        assert recomputing.saved_mib == pytest.approx(mib, abs=1)
        assert recomputing.saved_bytes <= share * tune.saved_bytes
        assert sum(recomputing.saved_by_module.values()) == recomputing.saved_bytes

    @pytest.mark.parametrize("name", sorted(FAMILIES.keys() - {"efficientnet_b0", "efficientnet_v2_s", "mobilenet_v2"}))
    def test_never_more_than_without(self, name: str) -> None:
        model = torchvision_model(name).to_empty(device="cpu")
        pairs = find_conv_bn_pairs(model)
        with FakeTensorMode(allow_non_fake_inputs=True):
            image = torch.empty(1, 3, FAMILIES[name], FAMILIES[name])
            without, recomputing = (
                measure_memory(model, image, mode="tune", pairs=pairs, recompute=recompute).saved_bytes
                for recompute in ("none", "elementwise")
            )
        assert recomputing <= without

    @pytest.mark.parametrize("name", ["mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0"])
    def test_the_count_agrees_with_the_allocator(self, name: str) -> None:
        model, input = random_model(name), images(2, 3, 64, 64)
        set_mode(model, "tune", recompute="elementwise")
        kept = measure_memory(model, input, mode="tune", recompute="elementwise").saved_bytes
        with torch.no_grad():
            model(input)  # the constants of the pairs stay from now on
        assert kept == pytest.approx(allocated_by(model, input), rel=0.02)

    def test_each_consumer_recomputes_once_and_frees_at_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        made: list[weakref.ref[Tensor]] = []
        alive: list[int] = []

        def compute(input: Tensor) -> Tensor:
            alive.append(sum(reference() is not None for reference in made))
            output = F.silu(input)
            made.append(weakref.ref(output))
            return output

        monkeypatch.setattr(RecomputedSiLU, "out_of_place", lambda self: compute)
        model = net(*(layer for _ in range(3) for layer in (nn.SiLU(), nn.Conv2d(6, 6, 1))))
        set_mode(model, "tune", recompute="elementwise")
        model(batch()).sum().backward()
        assert alive == [0, 0, 0]


class TestSavedByEveryPath:
    """The pair behind an activation saves how to compute its input, however its own backward pass is done."""

    def saves_a_recipe(self, run: Callable[[nn.Module, Tensor], Tensor]) -> bool:
        model = net(nn.SiLU(), *conv(6, 4))
        set_mode(model, "tune", recompute="elementwise")
        activated = model[:3](batch())
        output = run(model[3:], activated)
        node = output.grad_fn
        saved = node._saved_input if hasattr(node, "_saved_input") else node.saved_tensors[0]
        return bool(saved.data_ptr() != activated.data_ptr() and torch.equal(saved, activated))

    def test_by_a_pair(self) -> None:
        assert self.saves_a_recipe(lambda pair, x: pair(x))

    def test_of_trainable_statistics(self) -> None:
        def run(pair: nn.Module, x: Tensor) -> Tensor:
            pair[1].running_mean.requires_grad_()
            return pair(x)

        assert self.saves_a_recipe(run)

    def test_within_forward_mode(self) -> None:
        def run(pair: nn.Module, x: Tensor) -> Tensor:
            with forward_ad.dual_level():
                return pair(x)

        assert self.saves_a_recipe(run)


class TestFallsBack:
    """Where others set saved-tensor hooks, compile or transform, the plain path runs."""

    @pytest.mark.parametrize("region", [torch.autograd.graph.save_on_cpu, lambda: checkpointing_hooks()])
    def test_hooks_of_the_user_see_what_they_would_see(self, region: Callable[[], AbstractContextManager[Any]]) -> None:
        plain, recomputing = pair_of(net(nn.SiLU(), *conv(6, 4)))

        def run(model: nn.Module) -> Callable[[Tensor], Tensor]:
            def forward(input: Tensor) -> Tensor:
                with region():
                    return model(input)

            return forward

        assert_same_bits(results(recomputing, batch(), run(recomputing)), results(plain, batch(), run(plain)))
        assert count_saved_bytes(run(recomputing), batch()) == count_saved_bytes(run(plain), batch())

    def test_hooks_that_begin_behind_the_activation(self, marked: Tensor) -> None:
        seen: list[Tensor] = []
        weight = torch.ones(6, 1, 1, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: seen.append(x) or x.detach(), lambda x: x):
            (marked * weight).sum().backward()
        assert any(tensor is marked for tensor in seen)

    @pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")  # while bytes are counted
    @pytest.mark.parametrize("reentrant", [False, True])
    @pytest.mark.parametrize("split", [0, 2, 3, 5])
    def test_activation_checkpointing(self, split: int, reentrant: bool) -> None:
        def run(model: nn.Sequential) -> Callable[[Tensor], Tensor]:
            return lambda x: checkpoint(model[split:], model[:split](x), use_reentrant=reentrant)

        plain, recomputing = pair_of(net(nn.SiLU(), *conv(6, 4), nn.Hardswish(), nn.Conv2d(4, 4, 1)))
        assert_same_bits(results(recomputing, batch(), run(recomputing)), results(plain, batch(), run(plain)))
        assert count_saved_bytes(run(recomputing), batch()) <= count_saved_bytes(run(plain), batch())

    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile reads it
    @pytest.mark.parametrize(("first", "last"), [(0, 3), (2, 3), (2, 5), (3, 5)])
    def test_compiled_parts(self, first: int, last: int) -> None:
        """PyTorch 2.14 looks for aliases at the first call, and fails on any subclass of Tensor; 2.15 does not."""
        if first == 3 and not hasattr(torch.compiler, "is_exporting"):
            pytest.skip("PyTorch 2.6 can't trace a subclass of Tensor that is the input")
        aliases = {"check_custom_op_aliasing": False} if hasattr(config, "check_custom_op_aliasing") else {}

        def run(model: nn.Sequential) -> Callable[[Tensor], Tensor]:
            part = torch.compile(model[first:last], backend="aot_eager", fullgraph=True)
            return lambda x: model[last:](part(model[:first](x)))

        torch.compiler.reset()
        plain, recomputing = pair_of(net(nn.SiLU(), *conv(6, 4), nn.Conv2d(4, 4, 1)))
        with config.patch(aliases):
            assert_same_bits(results(recomputing, batch(), run(recomputing)), results(plain, batch(), run(plain)))

    def test_compiles_without_a_graph_break(self) -> None:
        torch.compiler.reset()
        plain, recomputing = pair_of(net(nn.SiLU(), *conv(6, 4)))
        both = [torch.compile(model, backend="aot_eager", fullgraph=True) for model in (recomputing, plain)]
        assert_same_bits(results(recomputing, batch(), both[0]), results(plain, batch(), both[1]))

    @pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # which forward-mode differentiation uses
    def test_transforms_of_torch_func(self) -> None:
        plain, recomputing = pair_of(net(nn.SiLU(), *conv(6, 2), dtype=torch.float64))
        input = images(1, 3, 4, 4, dtype=torch.float64)
        for transform in (torch.func.jacrev, torch.func.jacfwd, torch.func.hessian):
            transformed = [transform(lambda x, m=m: m(x).sum((1, 2, 3)))(input) for m in (recomputing, plain)]
            assert torch.equal(*transformed)
        transformed = [torch.func.vmap(lambda x, m=m: m(x[None])[0])(input) for m in (recomputing, plain)]
        assert torch.equal(*transformed)

    def test_transforms_that_close_over_the_output(self, marked: Tensor) -> None:
        weight, plain = images(6, 1, 1), marked.detach()
        gradients = [torch.func.grad(lambda w, y=y: (y * w).sum())(weight) for y in (marked, plain)]
        assert torch.equal(*gradients)
        batched = [torch.func.vmap(lambda w, y=y: (y * w).sum())(weight) for y in (marked, plain)]
        assert torch.equal(*batched)

    @pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
    def test_forward_mode(self) -> None:
        plain, recomputing = pair_of(net(nn.SiLU(), *conv(6, 2)))
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(batch(), images(2, 3, 8, 8, seed=5))
            tangents = [forward_ad.unpack_dual(model(dual)).tangent for model in (recomputing, plain)]
        assert torch.equal(*tangents)

    @pytest.mark.filterwarnings("ignore:.torch.jit")
    def test_jit_trace(self) -> None:
        _, recomputing = pair_of(net(nn.SiLU(), *conv(6, 2)))
        traced = torch.jit.trace(recomputing, batch(), check_trace=False)
        assert torch.equal(traced(batch()), recomputing(batch()))

    def test_another_subclass_has_its_say(self, marked: Tensor) -> None:
        class Mine(Tensor):
            pass

        mine = torch.ones(6, 1, 1).as_subclass(Mine)
        assert type(torch.cat([marked, mine.expand(2, 6, 8, 8)])) is Mine
        assert type(marked) is Tensor


def checkpointing_hooks() -> AbstractContextManager[Any]:
    return torch.autograd.graph.saved_tensors_hooks(lambda x: x.detach().double(), lambda x: x.float())


class TestWritesInPlace:
    def loss(self, marked: Tensor) -> tuple[Tensor, Tensor]:
        weight = torch.ones(6, 1, 1, requires_grad=True)
        return weight, (marked * weight).sum()

    def test_to_the_output_before_it_is_saved(self, marked: Tensor) -> None:
        marked.mul_(2)
        weight, loss = self.loss(marked)
        (gradient,) = torch.autograd.grad(loss, weight)
        assert torch.equal(gradient, marked.detach().sum((0, 2, 3))[:, None, None])

    def test_to_the_output_through_data(self, marked: Tensor) -> None:
        """Without a new version: nothing but the access to `.data` shows it."""
        marked.data.mul_(2)
        assert type(marked) is Tensor
        weight, loss = self.loss(marked)
        (gradient,) = torch.autograd.grad(loss, weight)
        assert torch.equal(gradient, marked.detach().sum((0, 2, 3))[:, None, None])

    def test_to_the_output_through_a_view(self, marked: Tensor) -> None:
        marked.flatten(1).mul_(2)
        weight, loss = self.loss(marked)
        (gradient,) = torch.autograd.grad(loss, weight)
        assert torch.equal(gradient, marked.detach().sum((0, 2, 3))[:, None, None])

    def test_to_the_output_after_it_is_saved(self, marked: Tensor) -> None:
        """Autograd refuses this, unless there is a recipe: it computes what was saved."""
        expected, computed = marked.detach().sum((0, 2, 3))[:, None, None], marked._recipe is not None
        weight, loss = self.loss(marked)
        with torch.no_grad():
            marked.mul_(2)
        if computed:
            (gradient,) = torch.autograd.grad(loss, weight)
            assert torch.equal(gradient, expected)
        else:
            with pytest.raises(
                RuntimeError, match=r"modified by an inplace operation: a tensor of shape \[2, 6, 8, 8\]"
            ):
                loss.backward()

    def test_to_the_output_of_a_clamp_that_nobody_saves(self) -> None:
        """A skip connection is added in place, say: the activation keeps its input, as in the plain model."""

        def run(model: nn.Module) -> Callable[[Tensor], Tensor]:
            return lambda x: model[2](model[:2](x)).add_(1)

        plain, recomputing = pair_of(net(nn.ReLU6(inplace=True)))
        assert_same_bits(results(recomputing, batch(), run(recomputing)), results(plain, batch(), run(plain)))

    def test_a_clamp_drops_its_input_when_its_output_is_saved(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = net(nn.ReLU6())
        set_mode(model, "tune", recompute="elementwise")
        output = model(batch())
        node = output.grad_fn
        assert node._saved_self.data_ptr() != output.data_ptr()
        self.loss(output)
        assert type(output) is Tensor
        assert node._saved_self.data_ptr() == output.data_ptr()

    def test_to_the_input_of_the_activation(self) -> None:
        model = net(nn.SiLU())
        set_mode(model, "tune", recompute="elementwise")
        input = model[:2](batch())
        weight, loss = self.loss(model[2](input))
        with torch.no_grad():
            input.mul_(2)
        with pytest.raises(RuntimeError, match=r"modified by an inplace operation: a tensor of shape \[2, 6, 8, 8\]"):
            torch.autograd.grad(loss, weight)

    def test_to_another_operand(self, marked: Tensor) -> None:
        weight, loss = self.loss(marked)
        with torch.no_grad():
            weight.mul_(2)
        with pytest.raises(RuntimeError, match=r"modified by an inplace operation: a tensor of shape \[6, 1, 1\]"):
            loss.backward()

    def test_an_activation_in_place_still_overwrites_its_input(self) -> None:
        model = net(nn.SiLU(inplace=True))
        set_mode(model, "tune", recompute="elementwise")
        input = model[:2](batch())
        expected = F.silu(input.detach())
        assert model[2](input) is input
        assert torch.equal(input, expected)


class TestTheMarkedTensor:
    def test_results_are_plain(self, marked: Tensor) -> None:
        assert {type(marked * 2), type(marked.detach()), type(marked.mean()), type(marked.flatten(1))} == {Tensor}
        assert marked.to(torch.float32) is marked

    def test_pickles_as_a_plain_tensor(self, marked: Tensor) -> None:
        file = io.BytesIO()
        torch.save(marked, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
        for copied in (loaded, pickle.loads(pickle.dumps(marked))):
            assert type(copied) is Tensor
            assert torch.equal(copied, marked.detach())
        assert len(pickle.dumps(marked)) < 1.5 * marked.nbytes  # and without what it was made of

    def test_holds_no_cycle(self, marked: Tensor) -> None:
        """What it leaves is freed at once, and not by the garbage collector."""
        output = marked * marked
        freed = weakref.ref(output)
        gc.disable()
        try:
            del output
            assert freed() is None
        finally:
            gc.enable()


class TestSwitching:
    def model(self) -> nn.Sequential:
        return net(nn.SiLU(inplace=True), *conv(6, 4), nn.GELU("tanh"), nn.ReLU()).train()

    @pytest.mark.parametrize("then", ["train", "eval", "tune", "deploy"])
    @pytest.mark.parametrize("mode", ["eval", "tune"])
    def test_a_switch_without_recomputation_gives_the_activations_back(self, mode: Mode, then: Mode) -> None:
        model, expected = self.model(), self.model()
        for _ in range(2):
            set_mode(model, mode, recompute="elementwise")
        assert get_mode(model) == mode
        set_mode(expected, then)
        set_mode(model, then)
        found, wanted = Snapshot.of(model), Snapshot.of(expected)
        assert found._replace(parameters=[]) == wanted._replace(parameters=[])

    def test_it_is_visible_in_print(self) -> None:
        model = self.model()
        set_mode(model, "tune", recompute="elementwise")
        assert "(2): RecomputedSiLU(inplace=True)" in str(model)
        assert "(5): RecomputedGELU(approximate='tanh')" in str(model)
        assert "(6): ReLU()" in str(model)

    def test_the_context_manager_brings_it_back(self) -> None:
        model = self.model()
        set_mode(model, "tune", recompute="elementwise")
        found = Snapshot.of(model)
        for mode, recompute in (("tune", "none"), ("eval", "elementwise"), ("deploy", "none")):
            with conv_bn_mode(model, mode, recompute=recompute):
                assert Snapshot.of(model) != found
            assert Snapshot.of(model) == found

    def test_pairs_and_reasons_are_found_as_in_the_plain_model(self) -> None:
        model = net(nn.SiLU(), nn.BatchNorm2d(6), nn.Mish(), nn.BatchNorm2d(6))
        expected = find_conv_bn_pairs(model)
        set_mode(model, "eval", recompute="elementwise")
        assert find_conv_bn_pairs(model) == expected
        assert "`2` (SiLU)" in expected.unpaired["3"]

    def test_an_activation_of_ones_own(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(ACTIVATION_LAYERS, Scaled, RecomputedScaled)
        plain, recomputing = pair_of(net(Scaled(), *conv(6, 4)))
        assert_same_bits(results(recomputing, batch()), results(plain, batch()))
        assert count_saved_bytes(recomputing, batch()) < count_saved_bytes(plain, batch())

    def test_a_subclass_is_left_alone(self) -> None:
        model = net(Scaled())
        set_mode(model, "tune", recompute="elementwise")
        assert type(model[2]) is Scaled

    def test_a_class_without_its_function_says_so(self) -> None:
        with pytest.raises(TypeError, match="RecomputedActivation must say what it computes"):
            RecomputedActivation().out_of_place()


class Scaled(nn.SiLU):
    def forward(self, input: Tensor) -> Tensor:
        return F.gelu(input)


class RecomputedScaled(RecomputedActivation, Scaled):
    def out_of_place(self) -> Callable[[Tensor], Tensor]:
        return F.gelu


class TestCallback:
    pytestmark = LIGHTNING_SAYS

    def fit(self, module: BoringModule, **arguments: Any) -> tuple[BoringModule, list[str], str]:
        module.backbone.stem[2], module.backbone.middle[2] = nn.SiLU(inplace=True), nn.Hardswish()
        seen: list[str] = []
        module.backbone.stem[2].register_forward_hook(
            lambda act, args, output: seen.append(f"{type(act).__name__} {'train' if module.training else 'eval'}")
        )
        lines = PrintedLines()
        trainer = make_trainer(ConvBNModeCallback(**{"log_memory": False, **arguments}), lines)
        trainer.fit(module)
        return module, seen, lines.text

    @pytest.mark.parametrize("mode", ["tune", "eval"])
    def test_trains_to_the_same_weights_and_ends_plain(self, mode: Mode) -> None:
        torch.manual_seed(0)
        plain, recomputing = BoringModule(), BoringModule()
        recomputing.load_state_dict(plain.state_dict())
        self.fit(plain, mode=mode)
        module, seen, _ = self.fit(recomputing, mode=mode, recompute="elementwise")
        assert set(seen) >= {"RecomputedSiLU train", "SiLU eval"}
        assert type(module.backbone.stem[2]) is nn.SiLU
        for name, tensor in plain.state_dict().items():
            assert torch.equal(module.state_dict()[name], tensor), name

    def test_the_table_counts_with_recomputation(self) -> None:
        module, _, text = self.fit(BoringModule(), recompute="elementwise", log_memory=True, verify=True)
        assert "verified: Tune equals Eval" in text
        (line,) = [line for line in text.splitlines() if "kept for backward" in line]
        (shape,) = [line for line in text.splitlines() if "counted on an input of" in line]
        image = torch.zeros([int(size) for size in shape.split(" of ")[1].split(" × ")])
        plain = measure_memory(module.backbone, image, mode="eval").saved_bytes
        tune = measure_memory(module.backbone, image, mode="tune", recompute="elementwise").saved_bytes
        assert tune < measure_memory(module.backbone, image, mode="tune").saved_bytes
        assert f"Eval {as_mib(plain)}, Tune {as_mib(tune)} (activations recomputed), " in line
