"""Tune mode on an MMEngine Runner: a hook of a few lines, and a run that compares it with MMEngine's own switch.

    pip install --editable ".[examples]" mmengine mmcv-lite  # in the root folder of this repository
    python examples/templates/mmengine_hook.py

trains a small network of mmcv's ConvModules on the handwritten digits 0 to 4. Then it fine-tunes the network on 5 to 9
in three ways: in Eval mode, with MMEngine's `efficient_conv_bn_eval`, and in Tune mode by `ConvBNModeHook`. For a
Runner of your own, copy this file beside your script, import it there, and put
`dict(type="ConvBNModeHook", target="backbone")` into `custom_hooks`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from typing import Any

import torch
from mmcv.cnn import ConvModule
from mmengine.hooks import Hook
from mmengine.model import BaseModel, is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_convbn import Mode, set_mode
from lightning_convbn.memory import count_saved_bytes


@HOOKS.register_module()
class ConvBNModeHook(Hook):
    """Trains a part of the model in one mode. After the training, the model has its plain modules again.

    Args:
        mode: `tune`, or `eval` for a comparison.
        target: Attribute path of the part, for example `backbone`; empty for the whole model.
    """

    def __init__(self, mode: Mode = "tune", target: str = "") -> None:
        self.mode = mode
        self.target = target

    def before_train(self, runner: Runner) -> None:
        """Convert, now that the model is wrapped and its weights are loaded."""
        pairs = set_mode(self._part(runner), self.mode)
        runner.logger.info(f"ConvBN: `{self.target or 'model'}` trains in {self.mode} mode\n{pairs}")

    def after_train(self, runner: Runner) -> None:
        """Restore the plain modules."""
        set_mode(self._part(runner), "train")

    def _part(self, runner: Runner) -> nn.Module:
        model: nn.Module = runner.model.module if is_model_wrapper(runner.model) else runner.model
        return model.get_submodule(self.target)


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
        """Record the loss."""
        self.losses.append(outputs["loss"].item())


class Backbone(nn.Sequential):
    """Three ConvModules.

    Args:
        norm_eval: Keep the BatchNorms in eval state during training, as the backbones of mmdetection do.
    """

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
        """Return the scores; in MMEngine's mode `loss`, return the loss."""
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
    """Train a model on a Runner.

    Args:
        model: The model; it is changed.
        data: Its batches.
        *hooks: Custom hooks of the Runner.
        name: Name of the experiment. MMEngine needs a new name for each Runner.
        epochs: Passes over the data.
        config: Further settings of the Runner, for example `efficient_conv_bn_eval`.
    """
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


def main() -> None:
    """Pretrain, fine-tune in three ways, and print kept bytes and losses of each."""
    torch.manual_seed(0)
    pretrained = DigitNet()
    train(pretrained, digits(0, 5), name="pretraining", epochs=2)
    ways: dict[str, tuple[bool, list[dict[str, Any]], dict[str, Any]]] = {
        "Eval mode": (True, [], {}),
        "MMEngine's efficient_conv_bn_eval": (True, [], {"efficient_conv_bn_eval": ["backbone"]}),
        "ConvBNModeHook": (False, [{"type": "ConvBNModeHook", "target": "backbone"}], {}),
    }
    print(f"{'':<36}{'kept KiB':>10}{'first loss':>12}{'last loss':>12}")
    for name, (norm_eval, hooks, config) in ways.items():
        torch.manual_seed(1)  # the same new head for each
        model = DigitNet(norm_eval)
        model.backbone.load_state_dict(pretrained.backbone.state_dict())
        recorder = train(model, digits(5, 10), *hooks, name=name, epochs=2, config=config)
        losses = recorder.losses
        print(f"{name:<36}{recorder.kept_bytes / 1024:>10.1f}{losses[0]:>12.5f}{losses[-1]:>12.5f}")


if __name__ == "__main__":
    main()
