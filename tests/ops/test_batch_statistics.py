"""Train mode with ``recompute="elementwise"``: plain training to the bit, statistics written once, and less memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from helpers.networks import images, randomized
from helpers.recomputation import Apply, Run, assert_same_bits, batch, double_backward, results, several_forwards
from helpers.torch_settings import one_thread
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from lightning_convbn import measure_memory, set_mode
from lightning_convbn.memory import count_saved_bytes

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def conv(inputs: int, outputs: int, size: int = 3) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=size // 2)


def in_training(*layers: nn.Module) -> nn.Module:
    return randomized(nn.Sequential(*layers)).train()


def around(function: Callable[..., Tensor], *layers: nn.Module) -> nn.Module:
    """A function of a tensor of 6 channels that is computed from what a BatchNorm puts out, behind a convolution."""
    torch.manual_seed(0)
    return in_training(conv(3, 6), nn.BatchNorm2d(6), nn.SiLU(), conv(6, 6), Apply(function, *layers))


def step(model: nn.Module, input: Tensor, run: Run | None = None) -> list[Tensor]:
    return [*results(model, input, run), *(buffer.clone() for buffer in model.buffers())]


def assert_trained_alike(
    model: nn.Module, input: Tensor | None = None, run: Callable[[nn.Module], Run] = lambda m: m
) -> None:
    """Two steps give the same bits as plain training, buffers included, and no more is kept."""
    input = batch() if input is None else input
    recomputing = copy.deepcopy(model)
    set_mode(recomputing, "train", recompute="elementwise")
    for _ in range(2):
        assert_same_bits(step(recomputing, input, run(recomputing)), step(model, input, run(model)))
    kept = [count_saved_bytes(one, input) for one in (recomputing, model)]
    assert kept[0] <= kept[1]


ACTIVATIONS = {
    name: make
    for cls in (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SiLU, nn.Mish, nn.Hardswish)
    for name, make in (
        (cls.__name__, cls),
        (f"{cls.__name__} in place", lambda cls=cls: cls(inplace=True)),  # type: ignore[misc]
    )
} | {cls.__name__: cls for cls in (nn.GELU, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.PReLU)}


class TestSameNumbers:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_of_every_activation(self, activation: str, dtype: torch.dtype) -> None:
        act: Any = ACTIVATIONS[activation]
        for size in (8, 5):  # of 5 x 5 values some are beside the vectors of a processor
            model = in_training(conv(3, 6), nn.BatchNorm2d(6), act(), conv(6, 4), nn.BatchNorm2d(4))
            assert_trained_alike(model.to(dtype), batch(dtype, size))

    @pytest.mark.parametrize(
        "options",
        [
            {"momentum": None},
            {"momentum": 0.0},
            {"eps": 0.1},
            {"affine": False},
            {"track_running_stats": False},
            {"affine": False, "track_running_stats": False},
        ],
        ids=str,
    )
    def test_of_every_batchnorm(self, options: dict[str, Any]) -> None:
        norms = [nn.BatchNorm2d(6, **options) for _ in range(2)]
        assert_trained_alike(in_training(conv(3, 6), norms[0], nn.SiLU(), conv(6, 6), norms[1], nn.ReLU(), conv(6, 2)))

    @pytest.mark.parametrize("size", [8, 5])
    @pytest.mark.parametrize("dims", [0, 1, 2, 3])
    def test_of_all_dimensions(self, dims: int, size: int) -> None:
        layer: Any = (lambda i, o, k: nn.Linear(i, o)) if not dims else getattr(nn, f"Conv{dims}d")
        norm: Any = getattr(nn, f"BatchNorm{max(dims, 1)}d")
        model = in_training(layer(3, 6, 3), norm(6), nn.SiLU(), layer(6, 4, 3), norm(4), nn.Hardswish(), layer(4, 2, 1))
        assert_trained_alike(model, images(4, 3, *[size] * dims))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_channels_last(self, dtype: torch.dtype) -> None:
        model = in_training(conv(3, 6), nn.BatchNorm2d(6), nn.SiLU(), conv(6, 4), nn.BatchNorm2d(4), nn.ReLU())
        last = {"memory_format": torch.channels_last}
        assert_trained_alike(model.to(dtype, **last), batch(dtype).to(**last))  # type: ignore[call-overload]

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("activation", [nn.SiLU, nn.ReLU, nn.PReLU])
    def test_under_autocast(self, activation: type[nn.Module], dtype: torch.dtype) -> None:
        def run(model: nn.Module) -> Run:
            return torch.autocast("cpu", dtype)(model.__call__)  # type: ignore[no-any-return]

        model = in_training(conv(3, 6), nn.BatchNorm2d(6), activation(), conv(6, 4), nn.BatchNorm2d(4), nn.Sigmoid())
        assert_trained_alike(model, run=run)

    @pytest.mark.parametrize("frozen", ["0.weight", "1.weight", "1", "0", "3", "4.bias"])
    def test_of_partly_frozen_networks(self, frozen: str) -> None:
        model = in_training(
            conv(3, 6), nn.BatchNorm2d(6), nn.ReLU(), conv(6, 4), nn.BatchNorm2d(4), nn.SiLU(), conv(4, 2)
        )
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.startswith(frozen))
        assert_trained_alike(model)

    def test_of_batchnorms_that_alone_are_trained(self) -> None:
        model = in_training(conv(3, 6), nn.BatchNorm2d(6), nn.ReLU(), conv(6, 4), nn.BatchNorm2d(4), nn.SiLU())
        for module in model:  # type: ignore[attr-defined]
            module.requires_grad_(isinstance(module, nn.BatchNorm2d))
        assert_trained_alike(model)


def _dense(x: Tensor, norm1: Any, conv1: Any, norm2: Any, conv2: Any) -> Tensor:
    first = torch.cat([x, conv1(F.relu(norm1(x)))], 1)
    return torch.cat([first, conv2(F.relu(norm2(first)))], 1)


def _gate(x: Tensor, norm: Any, squeeze: Any, last: Any) -> Tensor:
    y = F.silu(norm(x))
    return last(y * torch.sigmoid(squeeze(y.mean((2, 3), keepdim=True))))  # type: ignore[no-any-return]


def _halves(x: Tensor, norm1: Any, norm2: Any, last: Any) -> Tensor:
    one, other = x.chunk(2, 1)
    return last(torch.cat([F.silu(norm1(one)), F.silu(norm2(other))], 1))  # type: ignore[no-any-return]


def _holes(x: Tensor, norm: Any, last: Any) -> Tensor:
    return last(F.relu6(norm(x + torch.where(torch.arange(8) == 3, torch.inf, 0.0))))  # type: ignore[no-any-return]


def _bn() -> nn.Module:
    return nn.BatchNorm2d(6)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "a residual sum": lambda: around(
        lambda x, c, n, d, m: F.relu(m(d(F.silu(n(c(x))))) + x), conv(6, 6), _bn(), conv(6, 6), _bn()
    ),
    "a residual sum in place": lambda: around(
        lambda x, c, n, d, m: m(d(F.silu(n(c(x)), True))).add_(x).relu_(), conv(6, 6), _bn(), conv(6, 6), _bn()
    ),
    "two branches": lambda: around(
        lambda x, c, n, d, m: F.relu(m(d(x)) + n(c(x))), conv(6, 6), _bn(), conv(6, 6), _bn()
    ),
    "concatenations": lambda: around(_dense, _bn(), conv(6, 4), nn.BatchNorm2d(10), conv(10, 3)),
    "a gate": lambda: around(_gate, _bn(), conv(6, 6, 1), conv(6, 6)),
    "dropout": lambda: around(lambda x, n, c: c(F.dropout(F.silu(n(x)))), _bn(), conv(6, 6)),
    "dropout in place": lambda: around(lambda x, n, c: c(F.dropout(F.silu(n(x)), inplace=True)), _bn(), conv(6, 6)),
    "stochastic depth": lambda: around(
        lambda x, n, c: c(torchvision.ops.stochastic_depth(F.silu(n(x)), 0.5, "row")), _bn(), conv(6, 6)
    ),
    "shared layers": lambda: around(lambda x, n, c: F.hardswish(n(c(F.hardswish(n(c(x)))))), _bn(), conv(6, 6)),
    "one after the other": lambda: around(lambda x, n, m: m(n(x)), _bn(), _bn()),
    "two readers of one output": lambda: around(
        lambda x, n, c, d: (lambda y: c(F.silu(y)) + d(F.relu(y)))(n(x)), _bn(), conv(6, 6), conv(6, 6)
    ),
    "an input that others read": lambda: around(lambda x, n, c: c(F.silu(n(x))) + torch.sin(x), _bn(), conv(6, 6)),
    "strides": lambda: around(lambda x, n, c: c(F.silu(n(x[:, :, ::2, 1:]))), _bn(), conv(6, 6)),
    "a transposed input": lambda: around(lambda x, n, c: c(F.silu(n(x.transpose(2, 3)))), _bn(), conv(6, 6)),
    "an expanded input": lambda: around(
        lambda x, n, c: c(F.silu(n(x[:, :1].expand(-1, 6, -1, -1)))), _bn(), conv(6, 6)
    ),
    "halves": lambda: around(_halves, nn.BatchNorm2d(3), nn.BatchNorm2d(3), conv(6, 6)),
    "infinite values": lambda: around(_holes, _bn(), conv(6, 6)),
    "pools": lambda: around(lambda x, n, c: c(F.avg_pool2d(F.max_pool2d(F.relu(n(x)), 2), 2)), _bn(), conv(6, 6)),
    "a BatchNorm in its eval state": lambda: around(lambda x, n, c: c(F.silu(n.eval()(x))), _bn(), conv(6, 6)),
    "a computed weight": lambda: around(
        lambda x, n, c: c(F.silu(F.batch_norm(n(x), None, None, x.mean((0, 2, 3)), x.amax((0, 2, 3)), True))),
        _bn(),
        conv(6, 6),
    ),
    "an activation of timm's": lambda: around(
        lambda x, n, c: c(n(x=x)), timm.layers.BatchNormAct2d(6, act_layer=nn.SiLU), conv(6, 6)
    ),
    "layer norm": lambda: around(
        lambda x, n, m, c: c(F.gelu(m(n(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)),
        _bn(),
        nn.LayerNorm(6),
        conv(6, 6),
    ),
    "group norm": lambda: around(lambda x, n, m, c: c(F.gelu(m(n(x)))), _bn(), nn.GroupNorm(3, 6), conv(6, 6)),
    "instance norm": lambda: around(
        lambda x, n, m, c: c(F.gelu(m(n(x)))), _bn(), nn.InstanceNorm2d(6, affine=True), conv(6, 6)
    ),
    "instance norm with statistics": lambda: around(
        lambda x, n, m, c: c(F.gelu(m(n(x)))), _bn(), nn.InstanceNorm2d(6, track_running_stats=True), conv(6, 6)
    ),
    "RMS norm": lambda: around(lambda x, n, m, c: c(F.gelu(m(n(x)))), _bn(), nn.RMSNorm(8), conv(6, 6)),
}


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("kind", NETWORKS)
def test_of_networks_with(kind: str, layout: str) -> None:
    form = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}[layout]
    assert_trained_alike(NETWORKS[kind]().to(memory_format=form), batch().to(memory_format=form))  # type: ignore[call-overload]


@pytest.mark.parametrize(("cls", "normalised"), [(nn.LayerNorm, 8), (nn.GroupNorm, (2, 6)), (nn.RMSNorm, 8)])
def test_other_norms_behind_a_batchnorm_are_computed_again(cls: Any, normalised: Any) -> None:
    """So BatchNorm's input and the other norm's vectors are kept, and not what the two put out."""
    norm = cls(*normalised) if isinstance(normalised, tuple) else cls(normalised)
    model = in_training(conv(3, 6), nn.BatchNorm2d(6), norm, nn.GELU(), conv(6, 6))
    values = batch().numel() * 2 * 4
    kept = [measure_memory(model, batch(), mode="train", recompute=how).saved_bytes for how in ("none", "elementwise")]
    assert kept[0] - kept[1] == 3 * values


def _both() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    plain = in_training(
        conv(3, 6), nn.BatchNorm2d(6), nn.SiLU(), conv(6, 6), nn.BatchNorm2d(6), nn.Softplus(), conv(6, 2)
    )
    recomputing = copy.deepcopy(plain)
    set_mode(recomputing, "train", recompute="elementwise")
    return plain, recomputing


def _two_backwards(model: nn.Module) -> Iterable[Tensor]:
    loss = model(batch()).square().sum()
    return [
        *torch.autograd.grad(loss, [*model.parameters()], retain_graph=True),
        *torch.autograd.grad(loss, [*model.parameters()]),
    ]


def _functional(model: nn.Module) -> Iterable[Tensor]:
    def loss(parameters: Any, buffers: Any) -> tuple[Tensor, Any]:
        buffers = {name: buffer.clone() for name, buffer in buffers.items()}
        return torch.func.functional_call(model, (parameters, buffers), batch()).square().sum(), buffers

    found, buffers = torch.func.grad(loss, has_aux=True)(dict(model.named_parameters()), dict(model.named_buffers()))
    return [*found.values(), *buffers.values()]


def _hooks(model: nn.Module) -> Iterable[Tensor]:
    seen: list[Tensor] = []
    for module in model.children():
        module.register_full_backward_hook(lambda module, given, gradients: seen.append(gradients[0].clone()))
    model[1].register_forward_hook(lambda module, args, output: output.add_(1))  # type: ignore[index]
    model(batch().requires_grad_()).square().sum().backward()
    return [*seen, *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]


def _after_an_exception(model: nn.Module) -> Iterable[Tensor]:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = model[4].register_forward_hook(interrupt)  # type: ignore[index]
    with pytest.raises(KeyboardInterrupt):
        model(batch())
    hook.remove()
    return step(model, batch())


def _saved_elsewhere(model: nn.Module) -> Iterable[Tensor]:
    with torch.autograd.graph.save_on_cpu():
        loss = model(batch()).square().sum()
    return torch.autograd.grad(loss, [*model.parameters()])


def _without_gradients(model: nn.Module) -> Iterable[Tensor]:
    with torch.no_grad():
        model(batch())
    with torch.inference_mode():
        model(batch())
    return step(model, batch())


@pytest.mark.parametrize(
    "use",
    [
        *(several_forwards, _two_backwards, double_backward, _functional, _hooks, _after_an_exception),
        *(_saved_elsewhere, _without_gradients),
    ],
)
@one_thread()
def test_uses(use: Callable[[nn.Module], Iterable[Tensor]]) -> None:
    plain, recomputing = _both()
    assert_same_bits([*use(recomputing)], [*use(plain)])
    assert_same_bits([*recomputing.buffers()], [*plain.buffers()])


@pytest.mark.parametrize("written", ["weight", "input"])
def test_a_write_between_forward_and_backward_is_autograds_error(written: str) -> None:
    for model in _both():
        given: list[Tensor] = []
        model[1].register_forward_pre_hook(lambda module, args, given=given: given.extend(args))  # type: ignore[index, misc]
        loss = model(batch()).sum()
        with torch.no_grad():
            (model[1].weight if written == "weight" else given[0]).add_(1)  # type: ignore[index, union-attr, operator]
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_a_batchnorm_that_takes_a_list_runs_plainly() -> None:
    class Each(nn.BatchNorm2d):
        def forward(self, inputs: Any) -> Any:
            return [super(Each, self).forward(input) for input in inputs]

    model = nn.Sequential(Each(3))
    set_mode(model, "train", recompute="elementwise")
    assert [type(output) for output in model([batch(), batch()])] == [Tensor, Tensor]


def test_a_count_without_data_is_that_of_a_real_run() -> None:
    model, _ = _both()
    use = measure_memory(model, batch(), mode="train", recompute="elementwise")
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert measure_memory(model, batch(), mode="train", recompute="elementwise").saved_bytes == use.saved_bytes
    image, values, vectors = 2 * 3 * 64 * 4, 2 * 6 * 64 * 4, 2 * 2 * 6 * 4
    assert use.saved_bytes == image + 2 * values + vectors  # inputs of the BatchNorms, their means and deviations


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "densenet121", "shufflenet_v2_x0_5"])
def test_of_torchvisions_networks(name: str) -> None:
    torch.manual_seed(0)
    assert_trained_alike(torchvision.models.get_model(name, num_classes=4).train(), images(2, 3, 64, 64))
