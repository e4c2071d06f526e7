"""Precisions: Tune mode's rounding error is Eval mode's, within a tenth, in whatever precision the Trainer runs."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import torchvision
from helpers.models import images, randomized
from helpers.runs import LIGHTNING_SAYS, BoringModule, make_trainer, quick
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

pytestmark = LIGHTNING_SAYS

SEEDS = 6
PRECISIONS = [
    "32-true",
    "64-true",
    "bf16-true",
    pytest.param("16-true", marks=pytest.mark.slow),  # a CPU has to emulate it
    "bf16-mixed",
    "16-mixed",
]


class Precise(BoringModule):
    """A ResNet-18 that keeps the features and the gradients of its only step."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.backbone = randomized(torchvision.models.resnet18(num_classes=8), seed)
        self.data = TensorDataset(images(8, 3, 32, 32, seed=10 + seed), images(8, 4, seed=20 + seed))

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.data, batch_size=8)

    def forward(self, batch: Tensor) -> Tensor:
        self.features = self.backbone(batch)
        return self.head(self.features)

    def on_after_backward(self) -> None:
        gradients = [parameter.grad for parameter in self.backbone.parameters() if parameter.grad is not None]
        self.kept = self.features.detach().double(), torch.cat([gradient.double().flatten() for gradient in gradients])


@cache
def first_step(mode: Any, precision: Any, seed: int) -> tuple[Tensor, Tensor]:
    """Run one step; return features and gradients."""
    module = Precise(seed)
    make_trainer(quick(mode, eval_mode="eval", verify=False), precision=precision, limit_val_batches=0).fit(module)
    return module.kept


def squared_errors(mode: Any, precision: Any) -> Tensor:
    """Relative errors of features and gradients against float64, squared, as the mean over several networks."""
    errors = []
    for seed in range(SEEDS):
        found, exact = first_step(mode, precision, seed), first_step("eval", "64-true", seed)
        errors.append([float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)])
    return torch.tensor(errors, dtype=torch.float64).square().mean(0)


@pytest.mark.filterwarnings("ignore:.*precision='16-mixed'.* but AMP with fp16 is not supported on CPU")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_error_of_tune_is_evals(precision: str) -> None:
    """The error of one step is a matter of luck, so it is taken over several.

    On a CPU Lightning takes bf16-mixed for 16-mixed, and says so.
    """
    ratio = (squared_errors("tune", precision) / squared_errors("eval", precision)).sqrt()
    if precision == "64-true":  # where Eval mode is what is compared with
        assert squared_errors("tune", precision).max() < 1e-24
    else:
        assert (ratio <= 1.1).all(), ratio
