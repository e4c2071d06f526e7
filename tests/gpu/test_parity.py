"""Tune mode equals Eval mode on every device, in every precision and layout: outputs and all gradients.

**The bound.** Let ``u`` be the largest relative rounding error of the numbers that a layer multiplies. In each of
the ``DEPTH`` layers that are one behind the other, both modes round the input, the weight and the output, and Tune mode
also the folded weight and the folded bias: eight roundings. If products are added up in numbers of that same precision,
the sum of up to ``PRODUCTS`` of them adds that many roundings in each mode. The backward pass has as many once more.
The signs of the errors have nothing to do with each other, so they add up as the root of their number. Each is ``u`` at
most. Four times that root leaves room for signs that agree by chance.

Float32 and float64 add up in their own precision; TF32, bf16 and fp16 are multiplied in a lower one than they are added
up in. `test_a_wrong_fold_would_be_noticed` shows that the bounds are small enough.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from helpers.blocks import Residual, Tower, batch
from helpers.comparing import relative
from helpers.networks import images, random_model
from helpers.recomputation import assert_same_bits
from helpers.smooth_network import DEPTH, PRODUCTS, smooth_net
from helpers.torch_settings import one_thread
from torch import Tensor, nn

from lightning_convbn import Recompute, recomputed_blocks, set_mode
from lightning_convbn.layers.supported_layers import is_norm

# What the numbers are that a layer multiplies. TF32 has the significand of fp16.
MULTIPLIED = {
    "float64": torch.float64,
    "fp32": torch.float32,
    "tf32": torch.float16,
    "bf16-mixed": torch.bfloat16,
    "fp16-mixed": torch.float16,
}
RECOMPUTE: tuple[Recompute, ...] = ("none", "elementwise")


def bound(precision: str) -> float:
    """The largest relative error of an output or a gradient; see the module."""
    unit = torch.finfo(MULTIPLIED[precision]).eps / 2
    in_sums = 2 * PRODUCTS if precision in ("float64", "fp32") else 0
    forward = (8 + in_sums) * DEPTH
    return 4 * math.sqrt(2 * forward) * unit


@pytest.fixture(params=MULTIPLIED)
def precision(request: pytest.FixtureRequest) -> Iterator[str]:
    """Multiply in this precision. TF32 is a matter of NVIDIA's matrix units; elsewhere it is float32."""
    settings = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = [setting.fp32_precision for setting in settings]
    for setting in settings:
        setting.fp32_precision = "tf32" if request.param == "tf32" else "ieee"
    yield str(request.param)
    for setting, found in zip(settings, before, strict=True):
        setting.fp32_precision = found


def casting(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """Autocast as Lightning's precision of that name does."""
    return torch.autocast(device.type, dtype=MULTIPLIED[precision], enabled=precision.endswith("mixed"))


def step(net: nn.Module, device: torch.device, precision: str, channels_last: bool = False) -> dict[str, Tensor]:
    """Make a step; return the output, and the gradients of the input and of every parameter."""
    dtype = next(net.parameters()).dtype
    layout = torch.channels_last if channels_last else torch.contiguous_format
    batch = images(4, 3, 16, 16).to(device=device, dtype=dtype, memory_format=layout).requires_grad_()
    with casting(device, precision):
        output = net(batch)
    weights = images(4, 4, seed=2).to(device)
    (output.to(dtype) * weights).sum().backward()
    found = {"output": output.detach(), "input": batch.grad, **{n: p.grad for n, p in net.named_parameters()}}
    assert all(tensor is not None for tensor in found.values())
    return found  # type: ignore[return-value]


def errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    return {name: relative(tensor, expected[name]) for name, tensor in found.items()}


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_tune_is_eval(device: torch.device, precision: str, recompute: Recompute, channels_last: bool) -> None:
    dtype = torch.float64 if precision == "float64" else torch.float32
    steps = []
    for mode in ("eval", "tune"):
        net = smooth_net(device, dtype, channels_last=channels_last)
        pairs = set_mode(net, mode, recompute=recompute if mode == "tune" else "none")
        assert len(pairs) == 5
        steps.append(step(net, device, precision, channels_last))
    expected, found = steps
    assert all(tensor.dtype is dtype for name, tensor in found.items() if name != "output")
    assert found["output"].dtype is expected["output"].dtype
    off = errors(found, expected)
    assert max(off.values()) <= bound(precision), off


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_deploy_puts_out_what_eval_does(device: torch.device, precision: str, channels_last: bool) -> None:
    dtype = torch.float64 if precision == "float64" else torch.float32
    layout = torch.channels_last if channels_last else torch.contiguous_format
    batch = images(4, 3, 16, 16).to(device=device, dtype=dtype, memory_format=layout)
    outputs = []
    for mode in ("eval", "deploy"):
        net = smooth_net(device, dtype, channels_last=channels_last)
        set_mode(net, mode)
        with torch.no_grad(), casting(device, precision):
            outputs.append(net(batch))
    assert relative(outputs[1], outputs[0]) <= bound(precision)


def without_shift(net: nn.Module) -> None:
    """What a fold is like that forgets beta."""
    for module in net.modules():
        if is_norm(module):
            nn.init.zeros_(module.bias)


def of_another_variance(net: nn.Module) -> None:
    """What a fold is like that was made before the statistics changed by a half."""
    for module in net.modules():
        if is_norm(module):
            module.running_var.mul_(1.5)


@pytest.mark.parametrize("change", [without_shift, of_another_variance])
def test_a_wrong_fold_would_be_noticed(
    device: torch.device, precision: str, change: Callable[[nn.Module], None]
) -> None:
    dtype = torch.float64 if precision == "float64" else torch.float32
    expected = step(smooth_net(device, dtype), device, precision)
    wrong = smooth_net(device, dtype)
    with torch.no_grad():
        change(wrong)
    set_mode(wrong, "tune")
    off = errors(step(wrong, device, precision), expected)
    assert max(off.values()) > bound(precision), off


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("precision_of_network", ["fp32", "bf16-mixed"])
@pytest.mark.parametrize("name", ["smooth", "resnet18", "mobilenet_v3_small"])
@one_thread()
def test_recomputing_changes_no_bit(
    device: torch.device, name: str, precision_of_network: str, channels_last: bool
) -> None:
    """With all kinks: what is computed again is computed by the same kernel from the same values.

    In channels_last, CUDA's backward pass of a max-pool adds in an order of its own in each run. No bit can be asked of
    gradients then.
    """
    layout = torch.channels_last if channels_last else torch.contiguous_format
    batch = images(2, 3, 64, 64).to(device=device, memory_format=layout)
    found = []
    for recompute in RECOMPUTE:
        net = smooth_net(torch.device("cpu")) if name == "smooth" else random_model(name)
        net = net.to(device=device, memory_format=layout)  # type: ignore[call-overload]
        set_mode(net, "tune", recompute=recompute)
        with casting(device, precision_of_network):
            output = net(batch)
        output.float().square().mean().backward()
        found.append([output.detach(), *(parameter.grad for parameter in net.parameters())])
    assert torch.equal(found[0][0], found[1][0])
    if device.type == "cuda" and channels_last:
        assert max(map(relative, found[1], found[0])) <= bound(precision_of_network)
    else:
        assert [number for number, pair in enumerate(zip(*found, strict=True)) if not torch.equal(*pair)] == []


@pytest.mark.parametrize("trained", ["all", "nothing", "shifts and scales"])
def test_only_what_is_trained_gets_a_gradient(device: torch.device, trained: str) -> None:
    """The gradient of the input is Eval's, also where weights are frozen and shapes stand in the place of inputs."""
    for channels_last in (False, True):
        found = []
        for mode in ("eval", "tune"):
            net = smooth_net(device, torch.float64, channels_last=channels_last)
            norms = [module for module in net.modules() if is_norm(module)]
            net.requires_grad_(trained == "all")
            for norm in norms if trained == "shifts and scales" else ():
                norm.requires_grad_()
            set_mode(net, mode, recompute="elementwise")
            batch = images(4, 3, 16, 16, dtype=torch.float64).to(device).requires_grad_()
            net(batch).square().sum().backward()
            gradients = {name: parameter.grad for name, parameter in net.named_parameters()}
            found.append({"input": batch.grad, **{name: grad for name, grad in gradients.items() if grad is not None}})
        assert found[0].keys() == found[1].keys()
        assert max(errors(found[1], found[0]).values()) <= bound("float64")


class TestGradScaler:
    """fp16-mixed as Lightning runs it: the loss is scaled, so that small gradients are no zeros."""

    def run(self, device: torch.device, recompute: Recompute | None, scale: float) -> tuple[nn.Module, float]:
        net = smooth_net(device)
        set_mode(net, "eval" if recompute is None else "tune", recompute=recompute or "none")
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler(device.type, init_scale=scale, growth_interval=1000)
        with casting(device, "fp16-mixed"):
            output = net(images(4, 3, 16, 16).to(device))
        scaler.scale(output.float().square().mean()).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        return net, scaler.get_scale()

    @pytest.mark.parametrize("recompute", RECOMPUTE)
    def test_gradients_are_evals(self, device: torch.device, recompute: Recompute) -> None:
        (expected, _), (found, scale) = (self.run(device, each, 2.0**10) for each in (None, recompute))
        assert scale == 2.0**10
        off = {
            name: relative(parameter.grad, expected.get_parameter(name).grad)
            for name, parameter in found.named_parameters()
        }
        assert max(off.values()) <= bound("fp16-mixed"), off

    @pytest.mark.parametrize("recompute", RECOMPUTE)
    def test_an_overflow_is_seen_and_the_step_is_left_out(self, device: torch.device, recompute: Recompute) -> None:
        net, scale = self.run(device, recompute, 2.0**60)
        assert scale == 2.0**59
        before = smooth_net(device)
        assert all(torch.equal(one, other) for one, other in zip(net.parameters(), before.parameters(), strict=True))


@pytest.mark.parametrize("between", [nn.SiLU, nn.Dropout])
@pytest.mark.parametrize("autocast", [False, True])
def test_blocks_that_run_again_change_no_bit(device: torch.device, between: type[nn.Module], autocast: bool) -> None:
    """With dropout, too."""
    model, found = Tower(lambda: Residual(between=between)).train().to(device), []
    for recompute in ("none", "blocks"):
        set_mode(model, "tune", recompute=recompute)  # type: ignore[arg-type]
        torch.manual_seed(0)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            output = model(batch().to(device))
        found.append([output.detach(), *torch.autograd.grad(output.square().sum(), [*model.parameters()])])
    assert_same_bits(*found)
    assert len(recomputed_blocks(model).names) == 3
