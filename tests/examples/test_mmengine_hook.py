"""The hook on an MMEngine Runner: its losses are Eval mode's and those of MMEngine's own switch, at less memory."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from helpers.tiny_training import Snapshot, pretend_trained, statistics_of
from mmcv.cnn import ConvModule
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.runner import Runner
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from examples.other_trainers.mmengine_hook import ConvBNModeHook
from lightning_convbn import get_mode
from lightning_convbn.memory import count_saved_bytes

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:mmengine")


class Recorder(Hook):
    """Records the losses, and the bytes that the backbone keeps for the backward pass of a step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.kept_bytes = 0

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Count at the first step, when the Runner has made all of its changes."""
        if batch_idx == 0:
            self.kept_bytes = count_saved_bytes(runner.model.backbone, data_batch[0])

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self.losses.append(outputs["loss"].item())


class Backbone(nn.Sequential):
    """Three ConvModules; ``norm_eval`` keeps the BatchNorms in eval state, as the backbones of mmdetection do."""

    def __init__(self, norm_eval: bool) -> None:
        widths = [1, 16, 32, 32]
        norm = {"type": "BN"}
        super().__init__(
            *(ConvModule(w, wider, 3, padding=1, norm_cfg=norm) for w, wider in zip(widths, widths[1:], strict=False))
        )
        self.norm_eval = norm_eval

    def train(self, mode: bool = True) -> Backbone:
        """Switch to train state; with `norm_eval` the BatchNorms stay in eval state."""
        super().train(mode)
        if self.norm_eval:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self


class DigitNet(BaseModel):
    """Tells ten digits apart."""

    def __init__(self, norm_eval: bool = False) -> None:
        super().__init__()
        self.backbone = Backbone(norm_eval)
        self.head = nn.Linear(32, 10)

    def forward(self, images: Tensor, labels: Tensor, mode: str = "tensor") -> Tensor | dict[str, Tensor]:
        scores: Tensor = self.head(self.backbone(images).mean((2, 3)))
        return {"loss": cross_entropy(scores, labels)} if mode == "loss" else scores


def digits(low: int, high: int) -> DataLoader[tuple[Tensor, ...]]:
    """Return batches of the digits from low to below high, enlarged to 16 pixels."""
    found = load_digits()
    images, labels = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16, torch.tensor(found.target)
    chosen = (labels >= low) & (labels < high)
    enlarged = nn.functional.interpolate(images[chosen], scale_factor=2)
    generator = torch.Generator().manual_seed(0)
    return DataLoader(TensorDataset(enlarged, labels[chosen]), batch_size=32, shuffle=True, generator=generator)


def train(
    model: DigitNet,
    data: DataLoader[tuple[Tensor, ...]],
    *hooks: Hook | dict[str, Any],
    name: str,
    epochs: int = 1,
    config: Mapping[str, Any] | None = None,
) -> Recorder:
    """MMEngine needs a new name for each Runner. The model is changed."""
    recorder = Recorder()
    with tempfile.TemporaryDirectory() as folder:
        Runner(
            model,
            folder,
            train_dataloader=data,
            train_cfg={"by_epoch": True, "max_epochs": epochs},
            optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.01, "momentum": 0.9}},
            default_hooks={"checkpoint": None, "logger": None},
            custom_hooks=[*hooks, recorder],
            log_level="ERROR",
            experiment_name=name,
            cfg=dict(config or {}),
        ).train()
    return recorder


def run(name: str, *hooks: Any, norm_eval: bool = False, **config: Any) -> tuple[DigitNet, Recorder]:
    torch.manual_seed(0)
    model = DigitNet(norm_eval).double()
    pretend_trained(model)
    data = digits(5, 7)
    data.dataset.tensors = (data.dataset.tensors[0].double(), *data.dataset.tensors[1:])
    return model, train(model, data, *hooks, name=name, config=config)


def test_losses_and_weights_are_evals_and_mmengines_at_less_memory() -> None:
    evaluated, eval_run = run("eval", norm_eval=True)
    theirs, their_run = run("theirs", norm_eval=True, efficient_conv_bn_eval=["backbone"])
    ours, our_run = run("ours", {"type": "ConvBNModeHook", "target": "backbone"})
    assert len(our_run.losses) > 10
    assert our_run.losses[-1] < 0.7 * our_run.losses[0]
    assert our_run.kept_bytes < their_run.kept_bytes < 0.6 * eval_run.kept_bytes
    for model, recorder in ((evaluated, eval_run), (theirs, their_run)):
        assert our_run.losses == pytest.approx(recorder.losses, rel=1e-9)
        for name, parameter in ours.named_parameters():
            torch.testing.assert_close(parameter, model.get_parameter(name), rtol=1e-8, atol=1e-10)


def test_eval_mode_by_the_hook() -> None:
    _, expected = run("eval by the backbone", norm_eval=True)
    _, found = run("eval by the hook", ConvBNModeHook("eval", "backbone"))
    assert found.losses == expected.losses
    assert found.kept_bytes == expected.kept_bytes


def test_gives_back_plain_modules_with_frozen_statistics() -> None:
    modes = []

    class Looks(Recorder):
        def after_train_iter(self, runner: Any, *args: Any, **kwargs: Any) -> None:
            modes.append(get_mode(runner.model))

    torch.manual_seed(0)
    model = DigitNet().train()
    pretend_trained(model)
    before, statistics = Snapshot.of(model), statistics_of(model)
    train(model, digits(5, 6), ConvBNModeHook(target=""), Looks(), name="given back")
    assert set(modes) == {"tune"}
    assert Snapshot.of(model) == before
    for name, buffer in statistics_of(model).items():
        assert torch.equal(buffer, statistics[name]), name
