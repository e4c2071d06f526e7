"""Private names of PyTorch and Lightning are there and do what we need, on the lowest and on the newest version."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import FrozenBatchNorm2d

from lightning_convbn import compat


def test_versions_count_writes() -> None:
    tensor = torch.ones(2)
    before = compat.version_of(tensor)
    assert before is not None
    tensor.add_(1)
    assert compat.version_of(tensor) == before + 1
    with torch.inference_mode():
        assert compat.version_of(torch.ones(2)) is None


@pytest.mark.parametrize(
    ("output_of", "name"),
    [
        (lambda x, w: torch.conv1d(x, w), "input"),
        (lambda x, w: torch.conv1d(x, w), "weight"),
        (lambda x, w: nn.functional.linear(x[0], w[..., 0], torch.ones(2)), "mat1"),
        (lambda x, w: nn.functional.linear(x[0], w[..., 0], torch.ones(2)), "mat2"),
        (lambda x, w: x * w[:, :1], "other"),
        (lambda x, w: torch.addcmul(torch.ones(2, 2, 2), x, w, value=-1), "tensor1"),
        (lambda x, w: torch.addcmul(torch.ones(2, 2, 2), x, w, value=-1), "tensor2"),
        (lambda x, w: nn.functional.silu(x), "self"),
    ],
)
def test_a_saved_tensor_is_replaced_by_a_recipe(output_of: Any, name: str) -> None:
    """The names that `ops/` uses are those of the nodes. What a recipe returns is what the backward pass reads."""
    x, w = torch.rand(2, 2, 2, requires_grad=True), torch.rand(2, 2, 2, requires_grad=True)
    node = output_of(x, w).grad_fn
    saved = compat.saved_by(node, name)
    assert saved is not None
    assert compat.replace_saved(node, name, lambda _: saved.detach() + 1)
    replaced = compat.saved_by(node, name)
    assert replaced is not None
    assert torch.equal(replaced, saved + 1)
    assert not compat.replace_saved(node, name, torch.ones)  # it takes one recipe


def test_nothing_is_replaced_where_nothing_is_saved_or_others_hold_it() -> None:
    x = torch.rand(2, 2, 2, requires_grad=True)
    assert not compat.replace_saved((x * torch.ones(())).grad_fn, "self", torch.ones)
    assert not compat.replace_saved(x.clone().grad_fn, "weight", torch.ones)
    assert compat.saved_by(x.clone().grad_fn, "weight") is None
    with torch.autograd.graph.save_on_cpu():
        assert not compat.replace_saved(nn.functional.silu(x).grad_fn, "self", torch.ones)


def test_modes_are_off_within() -> None:
    class Counts(compat.TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.seen += 1
            return func(*args, **(kwargs or {}))

    with Counts() as counts:
        torch.ones(2) + 1
        before = counts.seen
        with compat.without_modes():
            torch.ones(2) + 1
        assert counts.seen == before > 0
        torch.ones(2) + 1
        assert counts.seen == 2 * before


def test_an_assertion_stays_in_a_graph() -> None:
    graph = fx.Graph()
    input = graph.placeholder("input")
    graph.call_function(compat.assert_in_graph, (input, "no"))
    graph.output(input)
    module = fx.GraphModule(nn.Module(), graph)
    assert module(True)
    with pytest.raises(AssertionError, match="no"):
        module(False)


def test_other_hooks_are_seen() -> None:
    seen = []
    assert not compat.other_saved_tensor_hooks()
    checkpoint(lambda x: seen.append(compat.other_saved_tensor_hooks()), torch.ones(1), use_reentrant=False)
    assert seen == [True]
    assert not compat.other_saved_tensor_hooks()


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")  # torch's own, in its jvp
def test_transforms_are_seen() -> None:
    seen = []

    def function(x: Tensor) -> Tensor:
        seen.append(compat.inside_transform())
        return (x * x).sum()

    function(torch.ones(2))
    torch.func.grad(function)(torch.ones(2))
    torch.func.vmap(function)(torch.ones(2, 2))
    torch.func.jvp(function, (torch.ones(2),), (torch.ones(2),))
    assert seen == [False, True, True, True]


def test_without_torch_function_a_subclass_is_a_plain_tensor() -> None:
    class Labelled(Tensor):
        pass

    labelled = torch.ones(2).as_subclass(Labelled)
    assert type(labelled + 1) is Labelled
    with compat.without_torch_function():
        assert type(labelled + 1) is Tensor


def test_a_dispatch_mode_sees_every_operator() -> None:
    seen = []

    class Sees(compat.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Sees():
        torch.ones(2) + torch.ones(2)
    assert seen.count("aten.add.Tensor") == 1


def test_fake_tensors_have_no_data_and_real_ones_are_to_be_had_meanwhile() -> None:
    real = torch.ones(2)
    with compat.fake_tensor_mode():
        assert type(torch.ones(2)) is compat.FakeTensor
        with compat.outside_fake_mode():
            assert type(real.clone()) is Tensor


def test_hooks_are_seen() -> None:
    hooks: dict[str, tuple[bool, bool]] = {  # name of the method -> whether they see the output, and the input
        "register_forward_hook": (True, False),
        "register_forward_pre_hook": (False, True),
        "register_full_backward_hook": (True, True),
        "register_full_backward_pre_hook": (True, True),
        "register_state_dict_post_hook": (False, False),
    }
    for method, seen in hooks.items():
        module = nn.Linear(1, 1)
        assert (compat.watches_output(module), compat.watches_input(module)) == (False, False)
        getattr(module, method)(lambda *args: None)
        assert (compat.watches_output(module), compat.watches_input(module)) == seen, method
        assert any(vars(module)[name] for name in compat.HOOKS)


def test_what_is_compiled_in_place_is_seen() -> None:
    module = nn.Linear(1, 1)
    assert not compat.is_compiled(module)
    torch.compile(module)
    assert not compat.is_compiled(module)
    module.compile()
    assert compat.is_compiled(module)


def test_no_other_file_of_the_package_has_a_private_name_of_pytorch() -> None:
    """As `torch._C` or `torch.utils._pytree`; the names of attributes are up to whoever reads a change."""
    package = Path(compat.__file__).parent
    lines = [
        f"{file.relative_to(package)}: {line.strip()}"
        for file in package.rglob("*.py")
        if file.name != "compat.py"
        for line in file.read_text().splitlines()
        if "torch._" in line.replace("torch.__version__", "")
        or "torch.utils._" in line
        or ("modules.batchnorm import _") in line
    ]
    assert not [line for line in lines if "`torch._subclasses" not in line]


def test_the_engine_is_called_by_the_function_of_that_name() -> None:
    """A dispatch mode sees who has called an operation."""
    assert callable(getattr(torch.autograd.graph, compat.RUNS_ENGINE))


def test_hooks_on_a_gradient_are_seen() -> None:
    parameter = nn.Parameter(torch.ones(2))
    assert not compat.has_gradient_hooks(parameter)
    handle = parameter.register_hook(lambda gradient: None)
    assert compat.has_gradient_hooks(parameter)
    handle.remove()
    assert not compat.has_gradient_hooks(parameter)


def test_the_tensors_of_a_pair_are_read_wherever_they_are() -> None:
    """Parameters and buffers, also those that are None, and what a parametrization computes."""
    names = ("weight", "bias", "running_mean", "running_var")
    for conv, bn in (
        (nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)),
        (nn.Conv2d(2, 2, 1, bias=False), nn.BatchNorm2d(2, affine=False)),
        (nn.Linear(2, 2), FrozenBatchNorm2d(2)),
        (nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2, track_running_stats=False)),
    ):
        expected = [conv.weight, conv.bias, *(getattr(bn, name) for name in names)]
        assert all(one is other for one, other in zip(compat.tensors_of_pair(conv, bn), expected, strict=True))
    parametrized = nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 2, 1))
    assert torch.equal(compat.tensors_of_pair(parametrized, nn.BatchNorm2d(2))[0], parametrized.weight)
