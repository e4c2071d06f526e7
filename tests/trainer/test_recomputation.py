"""Recomputation under the callback: the same run to the bit, in Train mode too, a table, plain modules afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.blocks import Residual, ResidualBackbone, count_calls
from helpers.tiny_training import (
    BATCHES_PER_EPOCH,
    RESUMING_SAYS,
    TRUSTED,
    Backbone,
    BoringModule,
    PrintedLines,
    conv_bn,
    csv_metrics,
    differing,
    make_trainer,
    pretend_trained,
    state_of,
)
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import mobilenet_v3_small, resnet18

from lightning_convbn import ConvBNModeCallback, measure_memory
from lightning_convbn.blocks.find import recompute_of
from lightning_convbn.memory import MIB, as_mib
from lightning_convbn.memory.budget import fixed_bytes
from lightning_convbn.memory.optimizers import optimizer_bytes

pytestmark = RESUMING_SAYS


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


# --------------------------------------------------------------------------------------------- blocks


class WritesInput(Residual):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.relu(input, inplace=True))


class Blocks(nn.Module):
    """Three blocks that can run again, two of another class that can't; all draw."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8)
        blocks = [Residual(8, lambda: nn.Dropout(0.3)) for _ in range(3)]
        self.body = nn.Sequential(*blocks, *(WritesInput(8, lambda: nn.Dropout(0.3)) for _ in range(2)))
        pretend_trained(self)

    def forward(self, images: Tensor) -> Tensor:
        return self.body(self.stem(images)).mean((2, 3))  # type: ignore[no-any-return]


def fit_blocks(
    recompute: Any, *callbacks: Any, epochs: int = 2, resume: Path | None = None, **options: Any
) -> BoringModule:
    module = BoringModule(Blocks)
    torch.manual_seed(0)
    callback = ConvBNModeCallback(recompute=recompute, **{"log_memory": False, **options})
    trainer = make_trainer(callback, *callbacks, max_epochs=epochs, enable_checkpointing=bool(callbacks[1:]))
    trainer.fit(module, ckpt_path=resume, **TRUSTED)
    return module


@pytest.mark.parametrize("mode", ["tune", "eval"])
def test_a_fit_ends_with_the_same_weights_and_plain_modules(mode: Any) -> None:
    expected, module = fit_blocks("none", mode=mode), fit_blocks("blocks", mode=mode)
    assert module.losses == expected.losses
    assert differing(state_of(module), state_of(expected)) == []
    assert str(module) == str(BoringModule(Blocks))


def test_the_table_says_which_blocks_run_again_and_why_others_do_not() -> None:
    lines = PrintedLines()
    fit_blocks("blocks", lines, log_memory=True)
    assert "verified: Tune equals Eval" in lines.text
    assert "run again      3 of 5 blocks\n       2 × writes a tensor that it is given, in place: body.3" in lines.text
    assert "(recompute=blocks)" in lines.text
    lines = PrintedLines()
    fit_blocks("elementwise", lines)
    assert "run again" not in lines.text


def test_blocks_run_again_in_training_alone() -> None:
    """A module in a block runs twice in a training step; in evaluation there are no gradients."""
    module = BoringModule(Blocks)
    calls = count_calls(module.backbone.body[0].between)  # type: ignore[index]
    make_trainer(ConvBNModeCallback(recompute="blocks", log_memory=False)).fit(module)
    assert calls.count(True) == 2 * len(module.losses["fit"])
    assert calls.count(False) == len(module.losses["validate"])


def test_a_run_is_resumed_as_without_recomputation(tmp_path: Path) -> None:
    def train(recompute: Any, **options: Any) -> BoringModule:
        saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        return fit_blocks(recompute, PrintedLines(), saving, **options)

    train("blocks", epochs=1)
    saved = tmp_path / "epoch=0.ckpt"
    assert torch.load(saved, weights_only=False)["state_dict"].keys() == BoringModule(Blocks).state_dict().keys()
    expected, module = train("none", resume=saved), train("blocks", resume=saved)
    assert module.losses == expected.losses
    assert len(module.losses["fit"]) == BATCHES_PER_EPOCH
    assert differing(state_of(module), state_of(expected)) == []


def test_a_network_without_blocks_trains_as_with_elementwise() -> None:
    lines = PrintedLines()
    module = BoringModule(Backbone)
    make_trainer(ConvBNModeCallback(recompute="blocks", log_memory=False), lines).fit(module)
    assert "run again      0 of 0 blocks" in lines.text
