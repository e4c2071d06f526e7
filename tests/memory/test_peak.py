"""The peak of a step: worked out by hand for small networks, and within 3 % of the CPU allocator for real ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from helpers.networks import images, small_net, torchvision_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from examples.benchmarks.allocator import peak_by_allocator
from lightning_convbn import Mode, Recompute, measure_memory, recomputed_blocks, set_mode
from lightning_convbn.memory import count_saved_bytes, measure_memory_abstractly
from lightning_convbn.memory.step import count_step

FLOAT = 4
COUNTS: list[Callable[..., Any]] = [
    measure_memory,
    lambda model, *inputs, **asked: measure_memory_abstractly(model, inputs, {}, **asked),
]


pytestmark = pytest.mark.usefixtures("_quick_garbage_collection")


def gradients_of(model: nn.Module, batch: Tensor) -> tuple[Tensor, ...]:
    """A step as a training loop does it: it holds the batch, and the gradients stay."""
    batch = batch.clone()
    output = model(batch)
    outputs = output.values() if isinstance(output, dict) else [output]
    loss = torch.stack([tensor.sum() for tensor in outputs if tensor.requires_grad]).sum()
    del output, outputs
    return torch.autograd.grad(loss, [*model.parameters()], allow_unused=True)


class TestByHand:
    @pytest.mark.parametrize("count", COUNTS)
    def test_a_linear_layer(self, count: Callable[..., Any]) -> None:
        """Backward: the input, the output's gradient of one value, and both gradients. The output is gone by then."""
        use = count(nn.Linear(3, 100), torch.zeros(2, 3), mode="train")
        assert use.saved_bytes == 2 * 3 * FLOAT
        assert use.peak_bytes == (2 * 3 + 1 + 3 * 100 + 100) * FLOAT

    @pytest.mark.parametrize("count", COUNTS)
    def test_a_chain_frees_what_it_has_used(self, count: Callable[..., Any]) -> None:
        """Three outputs of exp are kept. Each step back has the gradient that comes and the one that goes."""
        model = nn.Sequential(Exp(), Exp(), Exp())
        use = count(model, torch.zeros(1000, requires_grad=True), mode="train")
        assert use.saved_bytes == 3 * 1000 * FLOAT
        # The input and three outputs. Backward: the last output and the gradient of one value give a gradient.
        assert use.peak_bytes == (1000 + 3 * 1000 + 1 + 1000) * FLOAT

    @pytest.mark.parametrize("count", COUNTS)
    def test_gradients_that_meet_are_added_in_place(self, count: Callable[..., Any]) -> None:
        """As autograd does it without a dispatch mode: two gradients are alive, not three."""
        use = count(Fork(), torch.zeros(1000, requires_grad=True), mode="train")
        assert use.saved_bytes == 1000 * FLOAT
        # The input, exp(x), the gradient of one value, and the two gradients that it gives. Their sum is one of them.
        assert use.peak_bytes == (2 * 1000 + 1 + 2 * 1000) * FLOAT
        assert use.peak_bytes == pytest.approx(peak_by_allocator(lambda: gradient_of_input(Fork())), abs=8 * FLOAT)

    @pytest.mark.parametrize("count", COUNTS)
    @pytest.mark.parametrize("in_place", [False, True])
    def test_in_place_operations_allocate_nothing(self, count: Callable[..., Any], in_place: bool) -> None:
        model = nn.Sequential(nn.Conv2d(1, 50, 1, bias=False), nn.ReLU(in_place)).requires_grad_(False)
        use = count(model, torch.zeros(1, 1, 8, 8), mode="train")
        assert use.peak_bytes == (1 + 50 * (1 if in_place else 2)) * 64 * FLOAT

    @pytest.mark.parametrize("count", COUNTS)
    def test_views_allocate_nothing(self, count: Callable[..., Any]) -> None:
        model = nn.Sequential(nn.Flatten(), nn.Unflatten(1, (2, 3)), nn.Flatten())
        assert count(model, torch.zeros(5, 6), mode="train").peak_bytes == 5 * 6 * FLOAT

    @pytest.mark.parametrize("count", COUNTS)
    def test_a_checkpoint_runs_its_forward_again_in_the_backward_pass(self, count: Callable[..., Any]) -> None:
        class Checkpointed(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = nn.Sequential(Exp(), Exp(), Exp())

            def forward(self, input: Tensor) -> Tensor:
                return checkpoint(self.inner, input, use_reentrant=False).neg()  # type: ignore[no-any-return]

        use = count(Checkpointed(), torch.zeros(1000, requires_grad=True), mode="train")
        assert use.saved_bytes == 1000 * FLOAT
        assert use.peak_bytes >= 5 * 1000 * FLOAT

    @pytest.mark.parametrize("count", COUNTS)
    def test_what_a_closure_holds_counts(self, count: Callable[..., Any]) -> None:
        class Holder(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, input: Tensor) -> Tensor:
                ctx.held = input.new_zeros(1000)
                return input * 1

            @staticmethod
            def backward(ctx: Any, gradient: Tensor) -> Tensor:
                return gradient + ctx.held.sum()  # type: ignore[no-any-return]

        class Holds(nn.Module):
            def forward(self, input: Tensor) -> Tensor:
                return Holder.apply(input)  # type: ignore[no-any-return]

        use = count(Holds(), torch.zeros(3, requires_grad=True), mode="train")
        assert 1000 * FLOAT < use.peak_bytes < 1020 * FLOAT

    def test_eval_and_tune_of_a_pair(self) -> None:
        pixels = 2 * 16 * 16
        net, batch = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)), images(2, 3, 16, 16)
        plain, tune = (measure_memory(net, batch, mode=mode) for mode in ("eval", "tune"))
        # At the end of the forward pass: the input, the convolution's output, and BatchNorm's.
        assert plain.peak_bytes is not None
        assert plain.peak_bytes == pytest.approx((3 + 8 + 8) * pixels * FLOAT, rel=0.01)
        assert tune.peak_bytes is not None
        assert tune.peak_bytes < plain.peak_bytes

    def test_without_a_parameter_that_wants_a_gradient_it_is_that_of_the_forward_pass(self) -> None:
        net = nn.Sequential(nn.Conv2d(3, 5, 1, bias=False), nn.ReLU()).requires_grad_(False)
        assert measure_memory(net, images(2, 3, 8, 8), mode="train").peak_bytes == (3 + 5 + 5) * 2 * 64 * FLOAT

    def test_the_peak_is_never_below_what_is_kept(self) -> None:
        for mode in ("train", "eval", "tune", "deploy"):
            use = measure_memory(small_net(), images(2, 3, 8, 8), mode=mode)  # type: ignore[arg-type]
            assert use.peak_bytes is not None
            assert use.peak_bytes > use.saved_bytes


class Exp(nn.Module):
    def forward(self, input: Tensor) -> Tensor:
        return input.exp()


class Fork(nn.Module):
    def forward(self, input: Tensor) -> Tensor:
        first = input.exp()
        return (first * 2).add_(first * 3)


def gradient_of_input(model: nn.Module) -> tuple[Tensor, ...]:
    input = torch.zeros(1000, requires_grad=True)
    return torch.autograd.grad(model(input).sum(), [input])


class TestNothingIsNoticed:
    @pytest.mark.parametrize("count", COUNTS)
    def test_a_hook_on_a_gradient_is_not_called(self, count: Callable[..., Any]) -> None:
        net, seen = small_net(), []
        net[0].weight.register_hook(seen.append)
        net[0].weight.register_post_accumulate_grad_hook(seen.append)
        tied = net[0].weight
        use = count(net, images(2, 3, 8, 8), mode="tune")
        assert not seen
        assert net[0].weight is tied
        assert all(parameter.grad is None for parameter in net.parameters())
        assert use == count(small_net(), images(2, 3, 8, 8), mode="tune")

    def test_a_backward_pass_that_fails_leaves_the_kept_bytes(self) -> None:
        class Fails(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, input: Tensor) -> Tensor:
                return input * 1

            @staticmethod
            def backward(ctx: Any, gradient: Tensor) -> Tensor:
                raise ValueError("always")

        class Net(nn.Module):
            def forward(self, input: Tensor) -> Tensor:
                return Fails.apply(input.exp())  # type: ignore[no-any-return]

        use = measure_memory(Net(), torch.zeros(9, requires_grad=True), mode="train")
        assert (use.saved_bytes, use.peak_bytes, use.peak_mib) == (9 * FLOAT, None, None)

    def test_a_function_alone_has_no_backward_pass(self) -> None:
        weight = torch.ones(8, requires_grad=True)
        step = count_step(lambda x: x * weight, (images(8),), {}, None)
        assert step.peak is None
        assert sum(step.kept.values()) == count_saved_bytes(lambda x: x * weight, images(8))


VARIANTS: list[tuple[Mode, Recompute]] = [
    ("eval", "none"),
    ("tune", "none"),
    ("tune", "elementwise"),
    ("tune", "blocks"),
]
# Network -> how far the count may be off. A kernel of oneDNN makes copies of its operands in another layout, which the
# count does not see. They weigh where the images are as small as here, and a layer has many weights; and the lower the
# peak, the more.
NETWORKS = {
    "resnet18": 0.03,
    "resnet50": 0.03,
    "mobilenet_v2": 0.08,
    "mobilenet_v3_large": 0.03,
    "efficientnet_b0": 0.05,
    "densenet121": 0.03,
    "googlenet": 0.04,
    "vgg11_bn": 0.08,
    "regnet_y_400mf": 0.03,
    "shufflenet_v2_x1_0": 0.03,
    "fpn": 0.03,
}


def network(name: str) -> nn.Module:
    if name == "fpn":
        detector = torchvision.models.detection.retinanet_resnet50_fpn(weights=None, weights_backbone=None)
        return detector.backbone.eval()  # type: ignore[no-any-return]
    model = torchvision_model(name).to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.fill_(0.01 if tensor.is_floating_point() else 0)
    return model.eval()


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in ("resnet18", "densenet121") else pytest.mark.slow) for name in NETWORKS],
)
def test_the_peak_agrees_with_the_allocator(name: str) -> None:
    model, batch = network(name), images(2, 3, 64, 64)
    for mode, recompute in VARIANTS:
        counted = measure_memory_abstractly(model, (batch,), {}, mode=mode, recompute=recompute).peak_bytes
        set_mode(model, mode, recompute=recompute)
        gradients_of(model, batch)  # oneDNN allocates more the first time
        seen, without_copies = (
            peak_by_allocator(lambda: gradients_of(model, batch), count_workspaces=own) for own in (True, False)
        )
        # A checkpoint holds a random state for each block. The CPU's allocator sees those, which are no activations.
        states = len(recomputed_blocks(model).names) * torch.get_rng_state().nbytes
        set_mode(model, "train")
        assert counted is not None
        print(f"{name} {mode} {recompute}: {100 * (counted / seen - 1):+.2f} %, {counted / without_copies - 1:+.5f}")
        if torch.backends.mkldnn.enabled:  # type: ignore[truthy-bool]  # PyTorch's own kernels have larger workspaces
            assert counted == pytest.approx(seen, rel=NETWORKS[name]), f"{mode}, {recompute}"
        assert counted == pytest.approx(without_copies, abs=states + 0.001 * without_copies), f"{mode}, {recompute}"
