"""`detection.py` in plain Python: copy this page to start a script of your own.

python examples/detection_plain.py
"""

from __future__ import annotations

from coco import CocoData
from detection import Detector, report
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_convbn import ConvBNModeCallback


def main(source: str = "digits", epochs: int = 4) -> None:
    """Train, test and report.

    Args:
        source: `digits`, or `coco:FOLDER` for your own images.
        epochs: Passes over the training images.
    """
    seed_everything(0)
    data = CocoData(source, batch_size=4, flip=0.0)
    model = Detector(data.classes, "fasterrcnn", image_size=192, channels=64, regions=64)
    trainer = Trainer(
        callbacks=[
            ConvBNModeCallback("tune", target="detector.backbone"),
            ModelCheckpoint(monitor="val_map", mode="max", filename="best"),
        ],
        max_epochs=epochs,
        gradient_clip_val=1.0,
        default_root_dir="runs/detection",
    )
    trainer.fit(model, data)
    trainer.test(model, data, ckpt_path="best", verbose=False)
    report(trainer, model, data)


if __name__ == "__main__":
    main()
