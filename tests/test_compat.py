"""Private names of PyTorch and Lightning are there and do what we need, on the lowest and on the newest version."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
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
