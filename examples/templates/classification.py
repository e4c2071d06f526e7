"""Classify images by fine-tuning any torchvision or timm network, its BatchNorm layers in Tune mode.

    pip install --editable ".[examples]"  # in the root folder of this repository
    python examples/templates/classification.py fit  # MobileNetV2 on photographs of solar cells
    python examples/templates/classification.py fit --data.source=imagefolder:PATH/TO/IMAGES
    python examples/templates/classification.py fit --model.backbone=timm:efficientnet_b0 --data.source=csv:PATH
    python examples/templates/classification.py fit --convbn.mode=eval --convbn.eval_mode=eval
    python examples/templates/classification.py test --ckpt_path=PATH/TO/CHECKPOINT

The defaults are in `configs/classification.yaml`. A file to copy, without a command line, is
`examples/finetune.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics.classification import MulticlassAccuracy

from examples.data.images_with_classes import ImageData
from examples.templates.networks.classifiers import build_backbone
from examples.templates.template_cli import TemplateCLI, run

FEW_STEPS = 50  # a new head has learnt little before


class Classifier(LightningModule):
    """A pretrained network with a new head. The callback finds the part to switch by its name, `backbone`.

    Args:
        num_classes: Number of classes. On the command line it comes from the data.
        class_weights: Weight of each class in the loss; None for equal weights. On the command line they come from the
            data.
        backbone: `torchvision:NAME` or `timm:NAME`.
        weights: `default` for those of its library, `none`, or a file with a state dict. A checkpoint has its own.
        lr: Peak learning rate of the head; that of the backbone is a tenth.
    """

    def __init__(
        self,
        num_classes: int,
        class_weights: Sequence[float] | None = None,
        backbone: str = "torchvision:mobilenet_v2",
        weights: str = "none",
        lr: float = 0.01,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore="weights")
        self.lr = lr
        self.backbone, features = build_backbone(backbone, weights)
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(features, num_classes))
        balance = torch.ones(num_classes) if class_weights is None else torch.tensor(class_weights)
        self.register_buffer("class_weights", balance, persistent=False)
        self.val_accuracy = MulticlassAccuracy(num_classes, average="macro")
        self.test_accuracy = MulticlassAccuracy(num_classes, average="macro")
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """Return a score per image and class."""
        scores: Tensor = self.head(self.backbone(images))
        return scores

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss, in which each class has the same weight."""
        images, labels = batch
        loss = cross_entropy(self(images), labels, self.get_buffer("class_weights"))
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Count right answers, class by class."""
        images, labels = batch
        self.val_accuracy(self(images), labels)
        self.log("val_acc", self.val_accuracy, prog_bar=True)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Count right answers, class by class."""
        images, labels = batch
        self.test_accuracy(self(images), labels)
        self.log("test_acc", self.test_accuracy)

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the class of each image."""
        answers: Tensor = self(batch[0]).argmax(1)
        return answers

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return SGD with a warm-up and a decay. The pretrained backbone learns more slowly than the new head."""
        groups = [{"params": self.backbone.parameters()}, {"params": self.head.parameters()}]
        optimizer = torch.optim.SGD(groups, momentum=0.9, nesterov=True, weight_decay=1e-4)
        return one_cycle(self, optimizer, [self.lr / 10, self.lr])


def one_cycle(module: LightningModule, optimizer: torch.optim.Optimizer, peaks: list[float]) -> OptimizerLRScheduler:
    """Let the learning rate of each group of parameters rise to its peak and fall again."""
    steps = int(module.trainer.estimated_stepping_batches)
    if steps < FEW_STEPS:
        module.print(f"only {steps} steps: take a smaller --data.batch_size, or a larger --trainer.max_epochs")
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peaks, total_steps=steps, cycle_momentum=False)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main() -> None:
    """Run the command line."""
    run(TemplateCLI, Classifier, ImageData, "classification.yaml")


if __name__ == "__main__":
    main()
