"""`classification.py` in plain Python: copy this page, change what you like.

python examples/classification_plain.py --data imagefolder:PATH/TO/IMAGES
"""

from __future__ import annotations

import argparse
import sys

from backbones import BackboneError
from classification import Classifier
from data import ImageData
from datasets import DataError
from lightning.pytorch import Trainer, seed_everything
from weights import WeightsError

from lightning_convbn import ConvBNModeCallback


def main() -> None:
    """Fine-tune, and test."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="elpv", help="elpv, fashion-mnist, imagefolder:PATH, cub:PATH, ...")
    parser.add_argument("--backbone", default="torchvision:mobilenet_v2", help="torchvision:NAME or timm:NAME")
    parser.add_argument("--weights", default="default", help="default, none or a file")
    parser.add_argument("--image-size", type=int, default=128, help="edge of the square images in pixels")
    parser.add_argument("--batch-size", type=int, default=32, help="images per training step")
    parser.add_argument("--epochs", type=int, default=3, help="passes over the training images")
    args = parser.parse_args()

    seed_everything(0)
    try:
        data = ImageData(args.data, image_size=args.image_size, batch_size=args.batch_size)
        model = Classifier(len(data.classes), data.class_weights, args.backbone, args.weights)
    except (BackboneError, DataError, WeightsError) as error:
        sys.exit(f"error: {error}")
    trainer = Trainer(max_epochs=args.epochs, gradient_clip_val=1.0, callbacks=[ConvBNModeCallback()])
    trainer.fit(model, data)
    trainer.test(model, data)


if __name__ == "__main__":
    main()
