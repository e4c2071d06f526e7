"""The callback in Train mode with recomputation: plain training to the bit, and what is said of the memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.blocks import ResidualBackbone
from helpers.tiny_training import (
    LIGHTNING_SAYS,
    BoringModule,
    PrintedLines,
    csv_metrics,
    differing,
    make_trainer,
    state_of,
)
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import mobilenet_v3_small, resnet18

from lightning_convbn import ConvBNModeCallback, measure_memory
from lightning_convbn.blocks.find import recompute_of
from lightning_convbn.memory import MIB, as_mib
from lightning_convbn.memory.budget import fixed_bytes
from lightning_convbn.memory.optimizers import optimizer_bytes

pytestmark = LIGHTNING_SAYS


class Dropping(BoringModule):
    """Repeated blocks, with dropout in front of the head."""

    pixels = 8

    def __init__(self, make_backbone: Any = ResidualBackbone) -> None:
        super().__init__(make_backbone)
        self.recomputed: list[str] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.recomputed.append(recompute_of(self.backbone))
        return loss

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(torch.nn.functional.dropout(self.backbone(images), 0.3, self.training))

    def train_dataloader(self) -> Any:
        generator = torch.Generator().manual_seed(1)
        images = torch.randn(6, 3, self.pixels, self.pixels, generator=generator)
        return DataLoader(TensorDataset(images, torch.randn(6, 4, generator=generator)), batch_size=2)


def fit(module: BoringModule, *callbacks: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    make_trainer(*callbacks, **{"max_epochs": 2, **options}).fit(module)
    return module


@pytest.mark.parametrize("recompute", ["elementwise", "blocks"])
def test_a_fit_is_plain_trainings(recompute: Any) -> None:
    """Losses, validation in Eval mode, weights and statistics; and the modules are plain afterwards."""
    plain = fit(Dropping())
    module = fit(Dropping(), ConvBNModeCallback("train", eval_mode="eval", recompute=recompute))
    assert module.losses == plain.losses
    assert differing(state_of(module), state_of(plain)) == []
    assert {*module.modes["fit"]} == {"train"}
    assert {*module.recomputed} == {recompute}
    assert str(module) == str(Dropping())


@pytest.mark.filterwarnings(r"ignore:ConvBN. 1 BatchNorm.s. of `backbone` stay in Train mode")
@pytest.mark.parametrize("start_epoch", [0, 1])
def test_what_is_not_frozen_recomputes_in_tune_mode(start_epoch: int) -> None:
    """A BatchNorm that was never trained, and all of them before ``start_epoch``."""
    found = []
    for recompute in ("none", "elementwise", "blocks"):
        module = Dropping()
        module.backbone.body[1].bn1.reset_running_stats()  # type: ignore[index, union-attr, operator]
        options: Any = {"recompute": recompute, "start_epoch": start_epoch}
        found.append(fit(module, ConvBNModeCallback(eval_mode="eval", log_memory=False, **options)))
        assert {*module.recomputed} == {recompute}
    for module in found[1:]:
        assert module.losses == found[0].losses
        assert differing(state_of(module), state_of(found[0])) == []


def test_the_table_and_the_metrics_compare_with_plain_training(tmp_path: Path) -> None:
    module, lines, logger = BoringModule(), PrintedLines(), CSVLogger(tmp_path)
    make_trainer(ConvBNModeCallback("train", recompute="elementwise"), lines, logger=logger).fit(module)
    uses = [
        measure_memory(module.backbone, torch.zeros(2, 3, 8, 8), mode="train", recompute=how)
        for how in ("none", "elementwise")
    ]
    plain, recomputing = (as_mib(use.saved_bytes) for use in uses)
    assert f"kept for backward: Train {plain}, recompute=elementwise {recomputing}, " in lines.text
    assert "peak of a step: Train " in lines.text
    assert "ConvBN: `backbone` trains in Train mode and is evaluated in Deploy mode" in lines.text
    logged = {name: values[0] for name, values in csv_metrics(logger).items() if name.startswith("convbn/")}
    assert {*logged} == {
        *(f"convbn/activations_{name}" for name in ("train_mib", "train_recomputed_mib", "saved_mib", "saved_percent")),
        *(f"convbn/predicted_peak_{name}_mib" for name in ("train", "train_recomputed")),
    }
    assert logged["convbn/activations_train_mib"] == pytest.approx(uses[0].saved_bytes / MIB)
    assert logged["convbn/activations_train_recomputed_mib"] == pytest.approx(uses[1].saved_bytes / MIB)


def test_without_recomputation_the_table_says_what_it_would_keep() -> None:
    lines = PrintedLines()
    make_trainer(ConvBNModeCallback("train"), lines).fit(BoringModule())
    assert ", recompute=elementwise would keep " in lines.text


def resnet() -> Any:
    return resnet18(num_classes=8)


def mobilenet() -> Any:
    return mobilenet_v3_small(num_classes=8)


@pytest.mark.parametrize("make_backbone", [ResidualBackbone, resnet, mobilenet])
def test_a_budget_of_six_tenths_holds_with_the_losses_of_plain_training(make_backbone: Any) -> None:
    """Six tenths of what plain training takes beside its parameters, their gradients and the optimizer's state."""

    class Large(Dropping):
        pixels = 96
        learning_rate = 0.001

    def peak(recompute: Any) -> int:
        images = torch.zeros(2, 3, 96, 96)
        use = measure_memory(Large(make_backbone).backbone, images, mode="train", recompute=recompute, optimizer="sgd")
        assert use.peak_bytes is not None
        return use.peak_bytes

    plain = Large(make_backbone)
    head = fixed_bytes(plain.head) + optimizer_bytes([*plain.head.parameters()], "sgd").state
    fixed = fixed_bytes(plain) + head
    trained = sum(parameter.nbytes for parameter in plain.backbone.parameters())
    state = 2 * trained  # gradients, and SGD's momentum
    budget = fixed + state + int(0.6 * (peak("none") - state))
    module = fit(Large(make_backbone), ConvBNModeCallback("train", eval_mode="eval", memory_budget=budget))
    (chosen,) = {*module.recomputed}
    assert chosen in ("elementwise", "blocks")
    assert fixed + peak(chosen) <= budget
    assert module.losses == fit(plain).losses
