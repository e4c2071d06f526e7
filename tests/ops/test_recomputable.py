"""Recomputable tensors: the plain path's numbers to the bit, and the plain path where recipes can't work."""

from __future__ import annotations

import gc
import io
import pickle
import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers.networks import images, random_model, randomized
from helpers.recomputation import (
    Apply,
    assert_recomputed_alike,
    assert_same_bits,
    batch,
    conv,
    net,
    pair_of,
    results,
)
from helpers.torch_settings import one_thread
from torch import Tensor, nn
from torch._functorch import config
from torch.utils.checkpoint import checkpoint

from lightning_convbn import Mode, set_mode
from lightning_convbn.compat import other_saved_tensor_hooks
from lightning_convbn.memory import count_saved_bytes
from lightning_convbn.ops.recomputable import RecomputableTensor

ACTIVATIONS = [
    *(nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.SiLU, nn.Mish, nn.Hardswish),
    *(nn.Hardsigmoid, nn.GELU, nn.Softplus, nn.Sigmoid, nn.Tanh, nn.PReLU, nn.Threshold, nn.Softsign),
]
ARGUMENTS: dict[type[nn.Module], tuple[Any, ...]] = {nn.Threshold: (0.1, 0.2)}
NOT_IN_PLACE = (nn.GELU, nn.Softplus, nn.Sigmoid, nn.Tanh, nn.PReLU, nn.Softsign)


class Gated(nn.Module):
    """A product with a gate computed from the input, as in squeeze-excite."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, channels, 1)

    def forward(self, input: Tensor) -> Tensor:
        return torch.sigmoid(self.squeeze(input.mean((2, 3), keepdim=True))) * input


CONSUMERS: dict[str, Callable[[], list[nn.Module]]] = {
    "a folded convolution": lambda: conv(6, 4),
    "a plain convolution": lambda: [nn.Conv2d(6, 4, 1), nn.Conv2d(4, 4, 1)],
    "a transposed convolution": lambda: [nn.ConvTranspose2d(6, 4, 2)],
    "a gate": lambda: [Gated(6)],
    "max-pooling": lambda: [nn.MaxPool2d(2)],
    "average pooling": lambda: [nn.AvgPool2d(3, 2, 1)],
    "adaptive pooling": lambda: [nn.AdaptiveAvgPool2d(3), nn.AdaptiveMaxPool2d(2)],
    "a linear layer": lambda: [nn.Linear(8, 3)],
    "a frozen BatchNorm": lambda: [nn.BatchNorm2d(6)],
    "a layer norm": lambda: [nn.LayerNorm(8)],
    "a view and a linear layer": lambda: [nn.Flatten(), nn.Linear(6 * 64, 2)],
    "dropout": lambda: [nn.Dropout(0.5), nn.Conv2d(6, 4, 1)],
    "dropout in place": lambda: [nn.Dropout(0.5, inplace=True), nn.Conv2d(6, 4, 1)],
    "another activation": lambda: [nn.SiLU(), nn.Conv2d(6, 4, 1)],
    "another activation in place": lambda: [nn.SiLU(inplace=True), nn.Conv2d(6, 4, 1)],
    "a function that is not in the table": lambda: [Apply(torch.cos), nn.Conv2d(6, 4, 1)],
    "nobody": lambda: [],
}


@pytest.fixture
def marked() -> Tensor:
    """The output of an activation, of shape ``(2, 6, 8, 8)``."""
    model = net(nn.SiLU())
    set_mode(model, "tune", recompute="elementwise")
    output = model(batch())
    assert isinstance(output, RecomputableTensor)
    return output


def within(region: Callable[[], AbstractContextManager[Any]], model: nn.Module) -> Callable[[Tensor], Tensor]:
    """The forward of a model, in a context."""

    def forward(input: Tensor) -> Tensor:
        with region():
            return model(input)

    return forward


def assert_same_within(region: Callable[[], Any], plain: nn.Module, recomputing: nn.Module) -> None:
    found, expected = (results(model, batch(), within(region, model)) for model in (recomputing, plain))
    assert_same_bits(found, expected)


class TestSameNumbers:
    @pytest.mark.parametrize("mode", ["eval", "tune"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    @pytest.mark.parametrize("inplace", [False, True])
    @pytest.mark.parametrize("cls", ACTIVATIONS)
    def test_of_every_activation(self, cls: type[nn.Module], inplace: bool, dtype: torch.dtype, mode: Mode) -> None:
        if inplace and cls in NOT_IN_PLACE:
            pytest.skip("has no such argument")
        activation = cls(*ARGUMENTS.get(cls, ()), **({"inplace": True} if inplace else {}))
        for size in (8, 5):  # of 5 x 5 values some are beside the vectors of a processor
            assert_recomputed_alike(net(activation, *conv(6, 4), dtype=dtype), batch(dtype, size), mode)

    @pytest.mark.parametrize(
        "activation",
        [nn.GELU(approximate="tanh"), nn.Hardtanh(-0.3, 0.7), nn.LeakyReLU(0.3), nn.LeakyReLU(-0.3), nn.ELU(alpha=2.0)],
        ids=str,
    )
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # which has no 0.7, so that a clamp rounds it
    @pytest.mark.parametrize("frozen", [False, True])
    def test_of_activations_with_arguments(self, activation: nn.Module, dtype: torch.dtype, frozen: bool) -> None:
        model = net(activation, *conv(6, 4), dtype=dtype)
        assert_recomputed_alike(model.requires_grad_(not frozen), batch(dtype))

    @pytest.mark.parametrize("inplace", [False, True])
    @pytest.mark.parametrize("consumer", CONSUMERS)
    @pytest.mark.parametrize("cls", [nn.Hardswish, nn.ReLU])
    def test_for_every_consumer(self, cls: Any, consumer: str, inplace: bool) -> None:
        if cls is nn.ReLU and "in place" in consumer:
            pytest.skip("autograd needs the output of a ReLU")
        assert_recomputed_alike(net(cls(inplace=inplace), *CONSUMERS[consumer]()))

    @pytest.mark.parametrize("trained", range(8))
    def test_of_partly_frozen_models(self, trained: int) -> None:
        model = net(nn.ReLU6(), nn.MaxPool2d(2), Gated(6), *conv(6, 6), nn.LeakyReLU(), nn.Conv2d(6, 2, 1))
        for number, parameter in enumerate(model.parameters()):
            parameter.requires_grad_((trained >> number % 3) & 1 == 1)
        for mode in ("eval", "tune"):
            assert_recomputed_alike(model, mode=mode)

    @pytest.mark.parametrize("name", ["mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "densenet121"])
    def test_of_whole_models(self, name: str) -> None:
        assert_recomputed_alike(random_model(name), images(1, 3, 64, 64))

    @pytest.mark.parametrize("cls", [nn.SiLU, nn.ReLU, nn.PReLU])
    def test_under_autocast(self, cls: type[nn.Module]) -> None:
        model = net(cls(), *conv(6, 4), Gated(4), nn.MaxPool2d(2), nn.Conv2d(4, 4, 1), nn.Sigmoid(), *conv(4, 4))
        with torch.autocast("cpu", torch.bfloat16):
            kept = assert_recomputed_alike(model)
        assert kept[1] < kept[0]

    @pytest.mark.parametrize("backward", [False, True])
    def test_where_autocast_is_switched_for_the_backward_pass(self, backward: bool) -> None:
        models = pair_of(net(nn.SiLU(), *conv(6, 4), nn.Hardswish(), nn.Conv2d(4, 4, 1)))
        with torch.autocast("cpu", torch.bfloat16, enabled=backward):
            assert_same_within(lambda: torch.autocast("cpu", torch.bfloat16, enabled=not backward), *models)

    @pytest.mark.parametrize("size", [8, 5])
    @pytest.mark.parametrize("reads", [slice(0, 3), slice(0, 6)])
    def test_of_an_activation_in_place_on_a_slice(self, reads: slice, size: int) -> None:
        """Along other strides a vectorised function gives other bits."""

        def halves(input: Tensor, act: nn.Module, last: nn.Module) -> Tensor:
            first = act(input[:, :3])
            return last(first.contiguous()) + input[:, reads].sum(1, keepdim=True)

        assert_recomputed_alike(
            net(nn.Identity(), Apply(halves, nn.SiLU(inplace=True), nn.Conv2d(3, 4, 1))), batch(size=size)
        )

    def test_of_an_activation_called_twice(self) -> None:
        act = nn.SiLU()
        assert_recomputed_alike(net(act, *conv(6, 6), act, nn.Conv2d(6, 4, 1)))

    def test_of_values_that_are_not_numbers(self) -> None:
        """A ReLU passes the gradient where its input is NaN, a LeakyReLU multiplies it with the slope."""

        def spoil(input: Tensor) -> Tensor:
            hole = torch.zeros_like(input)
            hole[0, 0, 0, 0], hole[0, 1, 0, 0], hole[0, 2, 0, 0] = torch.nan, torch.inf, -torch.inf
            return input + hole

        for activation in (nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU, nn.SiLU):
            for frozen in (False, True):
                assert_recomputed_alike(net(Apply(spoil), activation(), nn.MaxPool2d(2)).requires_grad_(not frozen))

    def test_of_timms_batch_norm_with_an_activation(self) -> None:
        torch.manual_seed(0)
        model = randomized(timm.create_model("mobilenetv3_small_050", num_classes=4)).eval()
        kept = assert_recomputed_alike(model, images(1, 3, 64, 64))
        assert kept[1] < 0.9 * kept[0]

    def test_a_second_backward_pass_computes_it_again(self) -> None:
        _, recomputing = pair_of(net(nn.SiLU(), *conv(6, 4), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout()))
        loss = recomputing(batch()).pow(2).sum()
        parameters = list(recomputing.parameters())
        first = torch.autograd.grad(loss, parameters[:2], retain_graph=True)
        second = torch.autograd.grad(loss, parameters, retain_graph=True)
        assert_same_bits(list(second[:2]), list(first))
        assert_same_bits(list(torch.autograd.grad(loss, parameters)), list(second))

    @pytest.mark.parametrize(
        "act",
        [nn.SiLU(inplace=True), nn.Mish(), nn.GELU(), nn.LeakyReLU(0.2), nn.Sequential(nn.ReLU(), nn.MaxPool2d(2))],
        ids=str,
    )
    @pytest.mark.parametrize("frozen", [False, True])
    def test_double_backward(self, act: nn.Module, frozen: bool) -> None:
        model = net(act, Gated(6), *conv(6, 2), dtype=torch.float64)
        set_mode(model, "tune", recompute="elementwise")
        names = [name for name, _ in model.named_parameters()]

        def run(input: Tensor, *parameters: Tensor) -> Tensor:
            return torch.func.functional_call(model, dict(zip(names, parameters, strict=True)), input)

        model.requires_grad_(not frozen)
        arguments = (images(1, 3, 4, 4, dtype=torch.float64).requires_grad_(), *model.parameters())
        assert torch.autograd.gradcheck(run, arguments, fast_mode=True)
        assert torch.autograd.gradgradcheck(run, arguments, fast_mode=True)

    def test_of_two_models_in_two_threads(self) -> None:
        models = [pair_of(net(nn.SiLU(), *conv(6, 6), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 4, 1))) for _ in "ab"]
        expected = [results(plain, batch()) for plain, _ in models]
        found: dict[tuple[int, int], list[Tensor]] = {}

        @one_thread()  # each thread has a number of its own
        def work(number: int) -> None:
            for turn in range(20):
                model, input = models[number][1], batch().requires_grad_()
                model.zero_grad()
                output = model(input)
                (output * images(*output.shape, seed=2)).sum().backward()
                gradients = [parameter.grad.clone() for parameter in model.parameters()]
                found[number, turn] = [output.detach(), input.grad, *gradients]

        threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 40
        for (number, _), outcome in found.items():
            assert_same_bits(outcome, expected[number])


def hooks_of_the_user() -> AbstractContextManager[Any]:
    return torch.autograd.graph.saved_tensors_hooks(lambda x: x.detach().double(), lambda x: x.float())


class TestStepsAside:
    """Where others set saved-tensor hooks, compile or transform, the plain path runs."""

    @pytest.mark.parametrize("region", [torch.autograd.graph.save_on_cpu, hooks_of_the_user])
    def test_hooks_of_the_user_see_what_they_would_see(self, region: Callable[[], AbstractContextManager[Any]]) -> None:
        plain, recomputing = pair_of(net(nn.SiLU(), *conv(6, 4)))
        assert_same_within(region, plain, recomputing)
        kept = [count_saved_bytes(within(region, model), batch()) for model in (plain, recomputing)]
        assert kept[0] == kept[1]

    def test_hooks_that_begin_behind_the_activation(self, marked: Tensor) -> None:
        seen: list[Tensor] = []
        weight = torch.ones(6, 1, 1, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: seen.append(x) or x.detach(), lambda x: x):
            product = marked * weight
        assert any(tensor is marked for tensor in seen)
        assert type(product) is Tensor

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
        plain, recomputing = pair_of(net(nn.SiLU(), *conv(6, 4), nn.ReLU(), nn.BatchNorm2d(4), nn.MaxPool2d(2)))
        both = [torch.compile(model, backend="aot_eager", fullgraph=True) for model in (recomputing, plain)]
        assert_same_bits(results(recomputing, batch(), both[0]), results(plain, batch(), both[1]))

    @pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # which forward-mode differentiation uses
    def test_transforms_of_torch_func(self) -> None:
        plain, recomputing = pair_of(net(nn.SiLU(), nn.BatchNorm2d(6), *conv(6, 2), dtype=torch.float64))
        input = images(1, 3, 4, 4, dtype=torch.float64)
        for transform in (torch.func.jacrev, torch.func.jacfwd, torch.func.hessian):
            transformed = [transform(lambda x, m=m: m(x).sum((1, 2, 3)))(input) for m in (recomputing, plain)]
            assert torch.equal(*transformed)
        transformed = [torch.func.vmap(lambda x, m=m: m(x[None])[0])(input) for m in (recomputing, plain)]
        assert torch.equal(*transformed)

    def test_transforms_that_close_over_the_output(self, marked: Tensor) -> None:
        weight, plain = images(6, 1, 1), marked.detach().clone()
        gradients = [torch.func.grad(lambda w, y=y: (y * w).sum())(weight) for y in (marked, plain)]
        assert torch.equal(*gradients)
        batched = [torch.func.vmap(lambda w, y=y: (y * w).sum())(weight) for y in (marked, plain)]
        assert torch.equal(*batched)

    @pytest.mark.filterwarnings("ignore:.torch.jit")
    def test_jit_trace(self) -> None:
        _, recomputing = pair_of(net(nn.SiLU(), nn.BatchNorm2d(6), *conv(6, 2)))
        traced = torch.jit.trace(recomputing, batch(), check_trace=False)
        assert torch.equal(traced(batch()), recomputing(batch()))

    def test_export(self) -> None:
        _, recomputing = pair_of(net(nn.SiLU(), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), *conv(6, 2)))
        exported = torch.export.export(recomputing, (batch(),)).module()
        assert torch.equal(exported(batch()), recomputing(batch()))

    @pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
    def test_without_gradients(self, off: Callable[[], AbstractContextManager[Any]], marked: Tensor) -> None:
        model = net(nn.SiLU(), nn.BatchNorm2d(6))
        set_mode(model, "tune", recompute="elementwise")
        with off():
            assert type(model(batch())) is Tensor
            assert type(marked * 2) is Tensor

    def test_nothing_is_marked_where_nothing_wants_a_gradient(self) -> None:
        model = net(nn.SiLU()).requires_grad_(False)
        set_mode(model, "tune", recompute="elementwise")
        assert type(model(batch())) is Tensor
        model(batch())  # the folds stay from now on
        assert count_saved_bytes(model, batch()) == 0

    def test_another_subclass_has_its_say(self, marked: Tensor) -> None:
        mine = torch.ones(6, 1, 1).as_subclass(Mine)
        assert type(torch.cat([marked, mine.expand(2, 6, 8, 8)])) is Mine
        assert type(marked) is Tensor

    def test_another_subclass_as_the_weight_of_a_norm_has_its_say(self) -> None:
        model = net(nn.ReLU(), nn.BatchNorm2d(6))
        set_mode(model, "eval", recompute="elementwise")
        model[3].weight = nn.Parameter(model[3].weight.detach().as_subclass(Mine))
        model[1].weight = nn.Parameter(model[1].weight.detach().as_subclass(Mine))
        Mine.seen.clear()
        model(batch()).sum().backward()
        assert Mine.seen.count(F.batch_norm) == 2

    @pytest.mark.parametrize("when", ["before", "within", "behind"])
    def test_an_exception_leaves_nothing_behind(self, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
        hooks = torch.autograd.graph.saved_tensors_hooks
        enter = hooks.__enter__

        def interrupted(self: Any) -> None:
            if when == "behind":
                enter(self)
            raise KeyboardInterrupt

        _, recomputing = pair_of(net(nn.SiLU(), *conv(6, 4)))
        with monkeypatch.context() as patched:
            if when == "within":
                patched.setattr(torch.Tensor, "sigmoid", Tensor.sigmoid)
                with pytest.raises(RuntimeError):
                    recomputing[:3](batch()) @ torch.ones(3)
            else:
                patched.setattr(hooks, "__enter__", interrupted)
                with pytest.raises(KeyboardInterrupt):
                    recomputing(batch())
        assert not other_saved_tensor_hooks()


class Mine(Tensor):
    """Another subclass, which looks at the functions that it is given to."""

    seen: list[Any] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


class TestTheMarkedTensor:
    def test_what_is_computed_by_unknown_functions_is_plain(self, marked: Tensor) -> None:
        assert {type(torch.cos(marked)), type(marked.detach()), type(marked.mean())} == {Tensor}
        assert {type(marked * 2), type(marked.flatten(1)), type(F.relu(marked))} == {RecomputableTensor}
        assert marked.to(torch.float32) is marked

    def test_access_through_data_ends_the_mark(self, marked: Tensor) -> None:
        assert type(marked.data) is Tensor
        assert type(marked) is Tensor

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
        output = torch.cat([marked * marked, F.avg_pool2d(marked, 1)])
        freed = [weakref.ref(output), weakref.ref(output._value)]
        gc.disable()
        try:
            del output
            assert [reference() for reference in freed] == [None, None]
        finally:
            gc.enable()

    def test_a_function_of_somebody_else_reads_it(self) -> None:
        class Cube(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, input: Tensor) -> Tensor:
                ctx.save_for_backward(input)
                return input**3

            @staticmethod
            def backward(ctx: Any, gradient: Tensor) -> Tensor:
                (input,) = ctx.saved_tensors
                return gradient * 3 * input**2

        class Twice(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, input: Tensor) -> Tensor:
                ctx.mark_dirty(input)
                return input.mul_(2)

            @staticmethod
            def backward(ctx: Any, gradient: Tensor) -> Tensor:
                return gradient * 2

        assert_recomputed_alike(net(nn.SiLU(), Apply(Cube.apply), nn.Conv2d(6, 4, 1)))
        assert_recomputed_alike(net(nn.SiLU(), Apply(Twice.apply), nn.Conv2d(6, 4, 1)))

        def written_later(x: Tensor, last: nn.Module) -> Tensor:
            pooled = F.avg_pool2d(x, 1)
            return last(torch.cat([pooled, x], 1)) + Twice.apply(pooled).sum()

        assert_recomputed_alike(net(Apply(written_later, nn.Conv2d(12, 4, 1))))

    def test_hooks_and_retained_gradients_work(self, marked: Tensor) -> None:
        seen: list[Tensor] = []
        marked.register_hook(seen.append)
        marked.retain_grad()
        (marked * 2).sum().backward()
        assert torch.equal(seen[0], torch.full_like(seen[0], 2))
        assert torch.equal(marked.grad, seen[0])


class TestSwitching:
    def model(self) -> nn.Sequential:
        return net(nn.SiLU(inplace=True), *conv(6, 4), nn.GELU("tanh"), nn.ReLU()).train()

    @pytest.mark.parametrize("then", ["train", "eval", "tune", "deploy"])
    @pytest.mark.parametrize("mode", ["eval", "tune"])
    def test_a_switch_without_recomputation_puts_out_plain_tensors(self, mode: Mode, then: Mode) -> None:
        model, expected = self.model(), self.model()
        for _ in range(2):
            set_mode(model, mode, recompute="elementwise")
            assert type(model(batch())) is RecomputableTensor
        set_mode(expected, then)
        set_mode(model, then)
        assert type(model(batch())) is Tensor
        assert str(model) == str(expected)
