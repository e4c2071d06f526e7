"""Private names of PyTorch and Lightning are there and do what we need, on the oldest and on the newest version."""

from __future__ import annotations

from typing import Any

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from torch import Tensor, nn

from lightning_convbn.compat_trainer import (
    HOLDERS_OF_THE_TRAINER,
    TorchDispatchMode,
    has_forward_hooks,
    has_forward_pre_hooks,
    outside_fake_mode,
    without_compile,
)
from lightning_convbn.memory import FakeTensorMode


def test_a_dispatch_mode_sees_every_operator() -> None:
    seen = []

    class Sees(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Sees():
        torch.ones(2) + torch.ones(2)
    assert seen.count("aten.add.Tensor") == 1


def test_outside_of_a_fake_mode_tensors_are_real() -> None:
    real = torch.ones(2)
    with FakeTensorMode():
        with outside_fake_mode():
            assert type(real.clone()) is Tensor
        assert type(torch.ones(2)) is not Tensor


@pytest.mark.parametrize("package", [lightning.pytorch, pytorch_lightning])
def test_a_lightning_module_holds_its_trainer_there(package: Any) -> None:
    assert vars(package.LightningModule()).keys() >= HOLDERS_OF_THE_TRAINER


def test_hooks_are_seen() -> None:
    module = nn.Linear(1, 1)
    assert not has_forward_hooks(module)
    assert not has_forward_pre_hooks(module)
    hook = module.register_forward_hook(lambda *args: None)
    assert has_forward_hooks(module)
    hook.remove()
    module.register_forward_pre_hook(lambda *args: None)
    assert has_forward_pre_hooks(module)
    assert not has_forward_hooks(module)


def test_the_wrapper_of_the_compiler_is_taken_off() -> None:
    module = nn.Linear(1, 1)
    assert without_compile(torch.compile(module)) is module
    assert without_compile(module) is module
