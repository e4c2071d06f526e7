"""Blocks that run again in the backward pass, under the callback: the same run, a table, plain modules afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.blocks import Residual, count_calls
from helpers.tiny_training import (
    BATCHES_PER_EPOCH,
    RESUMING_SAYS,
    TRUSTED,
    Backbone,
    BoringModule,
    PrintedLines,
    conv_bn,
    differing,
    make_trainer,
    pretend_trained,
    state_of,
)
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_convbn import ConvBNModeCallback

pytestmark = RESUMING_SAYS


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


def fit(recompute: Any, *callbacks: Any, epochs: int = 2, resume: Path | None = None, **options: Any) -> BoringModule:
    module = BoringModule(Blocks)
    torch.manual_seed(0)
    callback = ConvBNModeCallback(recompute=recompute, **{"log_memory": False, **options})
    trainer = make_trainer(callback, *callbacks, max_epochs=epochs, enable_checkpointing=bool(callbacks[1:]))
    trainer.fit(module, ckpt_path=resume, **TRUSTED)
    return module


@pytest.mark.parametrize("mode", ["tune", "eval"])
def test_a_fit_ends_with_the_same_weights_and_plain_modules(mode: Any) -> None:
    expected, module = fit("none", mode=mode), fit("blocks", mode=mode)
    assert module.losses == expected.losses
    assert differing(state_of(module), state_of(expected)) == []
    assert str(module) == str(BoringModule(Blocks))


def test_the_table_says_which_blocks_run_again_and_why_others_do_not() -> None:
    lines = PrintedLines()
    fit("blocks", lines, log_memory=True)
    assert "verified: Tune equals Eval" in lines.text
    assert "run again      3 of 5 blocks\n       2 × writes a tensor that it is given, in place: body.3" in lines.text
    assert "(recompute=blocks)" in lines.text
    lines = PrintedLines()
    fit("elementwise", lines)
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
        return fit(recompute, PrintedLines(), saving, **options)

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
