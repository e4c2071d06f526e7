"""The fine-tuning of `finetune.py` from the command line and from YAML, without a line of code for the modes.

    pip install lightning-convbn[examples]
    python examples/cli.py fit                                          # Tune mode
    python examples/cli.py fit --convbn.mode=eval --convbn.eval_mode=eval
    python examples/cli.py fit --config examples/configs/start_epoch.yaml
    python examples/cli.py test --ckpt_path=PATH/TO/CHECKPOINT

Your own images: `--data.source=imagefolder:PATH`. Without a network: `--model.weights=PATH/mobilenet_v2-b0353104.pth`,
or `--model.pretrained=false` for a backbone that starts at random.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from data import DataError, ImageData
from finetune import FineTuner
from lightning.pytorch.cli import LightningArgumentParser
from weights import WeightsError, load_pretrained

from lightning_convbn.cli import ConvBNCLI


class PretrainedFineTuner(FineTuner):
    """MobileNetV2 with a new head.

    Args:
        num_classes: Outputs of the head; the data decide.
        class_weights: Weight of each class in the loss; the data decide.
        lr: Peak learning rate of the head; the backbone's is a tenth.
        pretrained: Start from ImageNet weights.
        weights: These weights as a .pth file; null downloads them.
    """

    def __init__(
        self,
        num_classes: int,
        class_weights: Sequence[float] | None = None,
        lr: float = 0.01,
        pretrained: bool = True,
        weights: Path | None = None,
    ) -> None:
        super().__init__(num_classes, class_weights, lr, load_pretrained(weights) if pretrained else None)


class FineTuneCLI(ConvBNCLI):
    """A ConvBNCLI with defaults, in which the data tell the model its classes."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Set and link arguments as in any LightningCLI."""
        parser.set_defaults({"data.source": "elpv", "trainer.max_epochs": 3, "trainer.gradient_clip_val": 1.0})
        parser.link_arguments("data.classes", "model.num_classes", compute_fn=len, apply_on="instantiate")
        parser.link_arguments("data.class_weights", "model.class_weights", apply_on="instantiate")


if __name__ == "__main__":
    try:
        FineTuneCLI(PretrainedFineTuner, ImageData, seed_everything_default=0)
    except (DataError, WeightsError) as error:
        sys.exit(f"error: {error}")
