"""The hook on an MMEngine Runner: its losses are Eval mode's and those of MMEngine's own switch, at less memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_training import pretend_trained
from helpers.watched_run import WatchedRun
from mmcv.cnn import ConvModule
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from examples.other_trainers.mmengine_hook import ConvBNModeHook

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:mmengine")
STEPS = 5


class Watch(Hook):
    """Looks at the model before each step, when the Runner has made all of its changes, and notes the loss."""

    def __init__(self, run: WatchedRun) -> None:
        self.run = run

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        self.run.look(runner.model, *data_batch)

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self.run.losses.append(outputs["loss"].item())


class Backbone(nn.Sequential):
    """Three ConvModules; ``norm_eval`` keeps the BatchNorms in eval state, as the backbones of mmdetection do."""

    def __init__(self, norm_eval: bool) -> None:
        modules = [ConvModule(inputs, 32, 3, padding=1, norm_cfg={"type": "BN"}) for inputs in (1, 32, 32)]
        super().__init__(*modules)
        self.norm_eval = norm_eval

    def train(self, mode: bool = True) -> Backbone:
        super().train(mode)
        for module in self.modules() if self.norm_eval else ():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self


class Classifier(BaseModel):
    def __init__(self, norm_eval: bool) -> None:
        super().__init__()
        self.backbone, self.head = Backbone(norm_eval), nn.Linear(32, 10)

    def forward(self, images: Tensor, labels: Tensor, mode: str = "tensor") -> Any:
        """The scores; in MMEngine's mode `loss` the loss."""
        scores = self.head(self.backbone(images).mean((2, 3)))
        return {"loss": cross_entropy(scores, labels)} if mode == "loss" else scores


def train(folder: Path, name: str, *hooks: Any, norm_eval: bool = False, **config: Any) -> WatchedRun:
    """Train a network that looks pretrained. MMEngine needs a new name for each Runner."""
    torch.manual_seed(0)
    model = Classifier(norm_eval).double().train()
    pretend_trained(model)
    run = WatchedRun(model)
    images = torch.randn(8 * STEPS, 1, 16, 16, dtype=torch.float64)
    Runner(
        model,
        str(folder),
        train_dataloader=DataLoader(TensorDataset(images, torch.randint(10, (8 * STEPS,))), batch_size=8),
        train_cfg={"by_epoch": True, "max_epochs": 1},
        optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.01, "momentum": 0.9}},
        default_hooks={"checkpoint": None, "logger": None},
        custom_hooks=[*hooks, Watch(run)],
        log_level="ERROR",
        experiment_name=name,
        cfg=config,
    ).train()
    return run


def test_losses_and_weights_are_evals_and_mmengines_at_less_memory(tmp_path: Path) -> None:
    frozen = train(tmp_path, "frozen", norm_eval=True)
    theirs = train(tmp_path, "theirs", norm_eval=True, efficient_conv_bn_eval=["backbone"])
    ours = train(tmp_path, "ours", {"type": "ConvBNModeHook", "target": "backbone"})
    ours.assert_as_frozen_by_hand(frozen, steps=STEPS, saved=0.4)
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-9)
    assert ours.kept < theirs.kept


def test_eval_mode_by_the_hook(tmp_path: Path) -> None:
    expected = train(tmp_path, "eval by the backbone", norm_eval=True)
    found = train(tmp_path, "eval by the hook", ConvBNModeHook("eval", "backbone"))
    assert found.losses == expected.losses
    assert found.kept == expected.kept
