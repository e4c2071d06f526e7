"""The networks of the benchmark, with random weights and statistics, and a batch for each."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from examples.benchmarks import detectors
from examples.benchmarks.random_statistics import give_statistics
from lightning_convbn import ConvBNPairs, find_conv_bn_pairs, fuse_for_deploy
from lightning_convbn.blocks.find import find_blocks
from lightning_convbn.command.model_argument import load_model
from lightning_convbn.layers.supported_layers import is_norm

DETECTOR = "fasterrcnn_resnet50"
MODELS = [
    "resnet18",
    "resnet50",
    "resnet101",
    "resnext101_32x8d",
    "regnet_y_3_2gf",
    "timm:hrnet_w18",
    "mobilenet_v2",
    "mobilenet_v3_large",
    "efficientnet_b0",
    "efficientnet_v2_s",
    "densenet121",
    DETECTOR,
]
# The modules that activation checkpointing wraps: stages, or blocks if a network has no stages.
STAGE = re.compile(r"(backbone\.body\.)?layer\d|stage\d|(features|trunk_output|blocks|stages)\.\w+")


@dataclass
class Workload:
    """A network in its eval state, and the batch of its training step.

    Attributes:
        model: The plain network; its BatchNorms use running statistics.
        inputs: Positional arguments of its forward.
        part: Qualified name of the part for compilers and tracers; ``""`` for the whole network. The code of a detector
            depends on values, so only its backbone is compiled.
        training: Whether all but the BatchNorms is in training state. A detector returns losses only then.
    """

    model: nn.Module
    inputs: tuple[Any, ...]
    part: str = ""
    training: bool = False

    def __post_init__(self) -> None:
        self.freeze(self.model)

    def freeze(self, model: nn.Module) -> nn.Module:
        """Set the training flags; BatchNorms are always in eval state."""
        model.train(self.training)
        for module in model.modules():
            if is_norm(module):
                module.eval()
        return model

    def copy(self, model: nn.Module, *, own_buffers: bool = False) -> nn.Module:
        """Copy a network that shares its parameters, and its buffers unless `own_buffers` is set."""
        shared = [*model.parameters(), *([] if own_buffers else model.buffers())]
        return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})

    @cached_property
    def pairs(self) -> ConvBNPairs:
        """The pairs that can be folded."""
        pairs = find_conv_bn_pairs(self.model)
        return find_conv_bn_pairs(self.model, example_inputs=self.inputs) if pairs.untraced else pairs

    @cached_property
    def fused(self) -> nn.Module:
        """The Deploy copy."""
        return self.freeze(fuse_for_deploy(self.model, pairs=self.pairs))

    @cached_property
    def stages(self) -> list[str]:
        """Qualified names of the stages for activation checkpointing."""
        modules = self.model.named_modules()
        return [name for name, module in modules if STAGE.fullmatch(name) and any(module.children())]

    @cached_property
    def blocks(self) -> list[str]:
        """Qualified names of the blocks for activation checkpointing: those that ``recompute="blocks"`` finds."""
        return [*find_blocks(self.model, self.pairs).names]


def build(name: str) -> tuple[nn.Module, bool]:
    """Build a network; return it and whether it is a detector.

    Args:
        name: `DETECTOR`, a name in torchvision, or a name that the command ``lightning-convbn`` takes.

    Raises:
        CommandError: If there is no such network.
    """
    torch.manual_seed(0)
    detector = name == DETECTOR
    if detector:
        model = detectors.build("Faster R-CNN", nn.BatchNorm2d)
    else:
        model = load_model(name if ":" in name or name.endswith(".ckpt") else f"torchvision:{name}")
    give_statistics(model)
    return model.requires_grad_(), detector


def workload(name: str, batch: int, pixels: int, device: torch.device, channels_last: bool) -> Workload:
    """Build a network and a batch on a device."""
    model, detector = build(name)
    images = torch.rand(batch, 3, pixels, pixels, generator=torch.Generator().manual_seed(0))
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = model.to(device=device, memory_format=layout)  # type: ignore[call-overload]
    if detector:
        model.transform.min_size, model.transform.max_size = (pixels,), pixels
        targets = [detectors.target(pixels) for _ in range(batch)]
        inputs = tree_map_only(Tensor, lambda tensor: tensor.to(device), (list(images), targets))
        return Workload(model, inputs, part="backbone", training=True)
    return Workload(model, (images.to(device=device, memory_format=layout),))


def loss_of(output: Any) -> Tensor:
    """Return the sum of the means of all outputs: the logits of a classifier, or the losses of a detector."""
    means = [leaf.float().mean() for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
    return torch.stack(means).sum()
