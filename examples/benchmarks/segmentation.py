"""Compare three ways to treat a new head whose BatchNorms are untrained, on the segmentation template.

python examples/benchmarks/segmentation.py --epochs 8
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer, seed_everything

from examples.data.images_with_masks import MaskData
from examples.data.pretrained_weights import WeightsError
from examples.data.sources import DataError
from examples.results_file import as_table, write_json
from examples.templates.segmentation import SavePredictions, Segmenter
from lightning_convbn import ConvBNModeCallback


def ways(epochs: int) -> dict[str, dict[str, Any]]:
    """Return the options of the callback for each way, by name."""
    return {
        "start_epoch": {
            "start_epoch": max(1, epochs // 2)
        },  # the first half in Train mode, then all BatchNorms are frozen and folded
        "default": {},  # the head stays in Train mode, with a warning
        "freeze_untrained": {"freeze_untrained": True},  # the head is folded at mean 0 and variance 1
    }


def main() -> None:
    """Train each way, print a table and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="images and masks (digits on photographs)")
    parser.add_argument("--weights", default="default", help="of MobileNetV2: default, none or a file")
    parser.add_argument("--image-size", type=int, default=128, help="edge of the square images in pixels")
    parser.add_argument("--epochs", type=int, default=3, help="passes over the training images")
    parser.add_argument("--out", type=Path, default=Path("runs/segmentation"), help="folder for all that is saved")
    args = parser.parse_args()
    rows = []
    for way, options in ways(args.epochs).items():
        seed_everything(0, verbose=False)
        try:
            data = MaskData(args.folder, image_size=args.image_size, cache=args.out / "data")
            model = Segmenter(len(data.classes), data.class_weights, weights=args.weights)
        except (DataError, WeightsError) as error:
            sys.exit(f"error: {error}")
        callback = ConvBNModeCallback(**options)
        picture = SavePredictions(args.out / f"{way}.png")
        trainer = Trainer(
            max_epochs=args.epochs, gradient_clip_val=1.0, default_root_dir=args.out, callbacks=[callback, picture]
        )
        trainer.fit(model, data)
        (scores,) = trainer.test(model, data, verbose=False)
        rows.append({"way": way, "mIoU": scores["test_miou"]})
    print(as_table(rows))
    print(write_json(args.out / "results.json", rows, ("torch", "torchvision", "lightning"), epochs=args.epochs))


if __name__ == "__main__":
    main()
