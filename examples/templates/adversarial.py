"""Make adversarial examples, by FGSM or PGD, with a pretrained network in Eval, Tune or Deploy mode.

    pip install --editable ".[examples]"  # in the root folder of this repository
    python examples/templates/adversarial.py predict  # PGD on the photographs of scikit-learn
    python examples/templates/adversarial.py predict --model.attack=fgsm --convbn.eval_mode=eval
    python examples/templates/adversarial.py predict --data.source=imagefolder:PATH --model.checkpoint=CLASSIFIER.ckpt

Only the images need gradients here. So Tune mode keeps no input of a convolution, and Deploy mode folds once. Eval mode
keeps the output of every convolution. The defaults are in `configs/adversarial.yaml`. A page to copy, without a command
line, is `examples/single_file/adversarial.py`; `examples/benchmarks/adversarial.py` compares the three modes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchvision.models import MobileNet_V2_Weights

from examples.data.data_module import IMAGENET
from examples.data.images_with_classes import ImageData
from examples.data.pretrained_weights import WeightsError
from examples.templates.classification import Classifier
from examples.templates.networks.classifiers import build_classifier
from examples.templates.template_cli import TemplateCLI, run

CATEGORIES = MobileNet_V2_Weights.IMAGENET1K_V1.meta["categories"]


class Examples(NamedTuple):
    """A batch of clean and of adversarial images, values from 0 to 1, and the classes that the network sees in them."""

    clean: Tensor
    adversarial: Tensor
    clean_labels: Tensor
    adversarial_labels: Tensor

    @property
    def fooled(self) -> Tensor:
        """Which images have another class after the attack."""
        return self.clean_labels != self.adversarial_labels


class Attack(LightningModule):
    """Changes images a little, so that a frozen network sees another class in them.

    Args:
        backbone: `torchvision:NAME` or `timm:NAME`, with its 1000 classes of ImageNet.
        weights: `default` for its library's, `none`, or a file with a state dict.
        checkpoint: A checkpoint of `classification.py` to attack instead; null for none.
        attack: `fgsm` for one step of the largest allowed size, or `pgd` for several steps from a random start.
        epsilon: The most that a value of a pixel, 0 to 255, may change by.
        steps: Number of steps of `pgd`.
        step_size: Size of each step, in values of a pixel.
        seed: Seed of the random start.
    """

    def __init__(
        self,
        backbone: str = "torchvision:mobilenet_v2",
        weights: str = "default",
        checkpoint: Path | None = None,
        attack: Literal["fgsm", "pgd"] = "pgd",
        epsilon: float = 2.0,
        steps: int = 10,
        step_size: float = 0.5,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.network = build_classifier(backbone, weights) if checkpoint is None else _load_classifier(checkpoint)
        self.network.requires_grad_(requires_grad=False)  # so Tune mode keeps nothing for their gradients
        self.attack = attack
        self.epsilon, self.step_size = epsilon / 255, step_size / 255
        self.steps = steps
        self.seed = seed
        self.register_buffer("mean", torch.tensor(IMAGENET.mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGENET.std).view(3, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        """Return a score per image and class, for values from 0 to 1."""
        scores: Tensor = self.network((pixels - self.get_buffer("mean")) / self.get_buffer("std"))
        return scores

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Examples:
        """Attack a batch. The right answers are those that the network gives for the clean images."""
        if torch.is_inference_mode_enabled():
            raise RuntimeError("an attack needs gradients: make the Trainer with inference_mode=False")
        clean = (batch[0] * self.get_buffer("std") + self.get_buffer("mean")).clamp(0, 1)
        labels = self(clean).argmax(1)
        with torch.enable_grad():  # Lightning predicts without
            if self.attack == "fgsm":
                adversarial = fgsm(self, clean, labels, self.epsilon)
            else:
                random = torch.Generator().manual_seed(self.seed + batch_idx)
                start = (2 * torch.rand(clean.shape, generator=random) - 1) * self.epsilon
                adversarial = pgd(
                    self, clean, labels, self.epsilon, self.step_size, self.steps, start.to(device=clean.device)
                )
        return Examples(clean, adversarial, labels, self(adversarial).argmax(1))


def fgsm(network: nn.Module, images: Tensor, labels: Tensor, epsilon: float) -> Tensor:
    """Go one step against the labels, by the sign of the gradient: arXiv 1412.6572, section 4.

    Args:
        network: From values between 0 and 1 to scores.
        images: `(N, C, H, W)`, from 0 to 1.
        labels: `(N,)`.
        epsilon: The most that a value may change by.
    """
    return pgd(network, images, labels, epsilon, step_size=epsilon, steps=1)


def pgd(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    epsilon: float,
    step_size: float,
    steps: int,
    start: Tensor | float = 0.0,
) -> Tensor:
    """Go several steps, and clip the change to the allowed range after each: arXiv 1706.06083, section 2.1.

    Args:
        network: From values between 0 and 1 to scores.
        images: `(N, C, H, W)`, from 0 to 1.
        labels: `(N,)`.
        epsilon: The most that a value may change by.
        step_size: By how much a value changes in each step.
        steps: Number of steps.
        start: The change before the first step.
    """
    adversarial = (images + start).clamp(0, 1)
    for _ in range(steps):
        adversarial.requires_grad_()
        (gradient,) = torch.autograd.grad(cross_entropy(network(adversarial), labels), adversarial)
        change = (adversarial.detach() + step_size * gradient.sign() - images).clamp(-epsilon, epsilon)
        adversarial = (images + change).clamp(0, 1)
    return adversarial


class SaveExamples(Callback):
    """Counts the images that fool the network, and saves a picture of some: clean, change, adversarial, with labels.

    Args:
        path: File of the picture.
        count: Most images in it.
    """

    def __init__(self, path: Path = Path("runs/adversarial.png"), count: int = 4) -> None:
        self.path = Path(path)
        self.count = count
        self.fooled: list[bool] = []

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start counting."""
        self.fooled = []

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Examples,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count, and draw some of the first batch."""
        self.fooled += outputs.fooled.tolist()
        if batch_idx == 0 and trainer.is_global_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            draw(outputs, self.count, _names(trainer, pl_module)).savefig(self.path)
            print(f"{self.path}: clean images, changes, adversarial images")

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the count."""
        print(f"{sum(self.fooled)} of {len(self.fooled)} images are taken for something else after the attack")


def draw(examples: Examples, count: int, names: Sequence[str]) -> Figure:
    """Draw some examples, one in a row. The change is scaled; grey means no change."""
    every = max(1, len(examples.clean) // count)
    chosen = Examples(*(tensor[::every][:count].cpu() for tensor in examples))
    change = chosen.adversarial - chosen.clean
    shown = [chosen.clean, 0.5 + change / (2 * change.abs().max().clamp_min(1e-12)), chosen.adversarial]
    figure = Figure(figsize=(7.5, 2.7 * len(change)), layout="constrained")
    axes = figure.subplots(len(change), 3, squeeze=False)
    largest = 255 * float(change.abs().max())
    for row, before, after, *images in zip(axes, chosen.clean_labels, chosen.adversarial_labels, *shown, strict=True):
        titles = (names[int(before)], f"change, at most {largest:.1f} of 255", names[int(after)])
        for axis, image, title in zip(row, images, titles, strict=True):
            axis.imshow(image.permute(1, 2, 0).numpy())
            axis.set_title(title, fontsize=10)
            axis.set_axis_off()
    return figure


def _names(trainer: Trainer, module: LightningModule) -> Sequence[str]:
    """Return the names of the classes that the attacked network tells apart."""
    names: Sequence[str] = CATEGORIES
    if isinstance(module.network, Classifier):
        names = trainer.datamodule.classes  # type: ignore[attr-defined]
    return names


def _load_classifier(path: Path) -> Classifier:
    try:
        return Classifier.load_from_checkpoint(path, map_location="cpu")
    except Exception as error:  # whatever the file holds instead, torch.load has no common error class for it
        reason = " ".join(str(error).split())
        raise WeightsError(
            f"--model.checkpoint {path}: not a checkpoint of classification.py ({reason[:200]})"
        ) from error


class AttackCLI(TemplateCLI):
    """A TemplateCLI that draws what it has made, and writes the share of images that fool."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the picture."""
        super().add_arguments_to_parser(parser)
        parser.add_lightning_class_args(SaveExamples, "picture")

    def after_predict(self) -> None:
        """Write the file of `--results`."""
        (saved,) = (callback for callback in self.trainer.callbacks if isinstance(callback, SaveExamples))  # type: ignore[attr-defined]
        self.write_results([{"fooled": sum(saved.fooled), "images": len(saved.fooled)}])


def main() -> None:
    """Run the command line."""
    run(AttackCLI, Attack, ImageData, "adversarial.yaml")


if __name__ == "__main__":
    main()
