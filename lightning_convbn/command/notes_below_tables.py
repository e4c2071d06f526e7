"""The sentences that explain the numbers. The table and the HTML report show the same."""

from __future__ import annotations

import torch
from torch import nn

from lightning_convbn.command.inputs import Inputs
from lightning_convbn.command.option_values import dtype_name
from lightning_convbn.command.results import Measurement
from lightning_convbn.memory.optimizers import Optimizer
from lightning_convbn.pairs.pair import ConvBNPairs

WHAT_IS_COMPARED = (
    "Eval and Tune are modes of the model. Tune + elementwise is Tune mode with recompute='elementwise', Tune + blocks "
    "with recompute='blocks'. The Deploy copy is the plain copy that fuse_for_deploy makes. It is measured as if it "
    "were trained, but only to compare with, because training it is unstable."
)
WHAT_IS_COUNTED = (
    "Kept for backward: the bytes that one forward pass keeps for the backward pass. They are counted, with the model "
    "in its eval state. Parameters and buffers are not included."
)
WHAT_THE_PEAK_IS = (
    "Peak of a step: the most bytes that are alive at once in a step, counted in the same way. It includes the input, "
    "the backward pass, and one gradient for each parameter that wants one. Parameters and buffers are not included."
)
WHAT_THE_OPTIMIZER_ADDS: dict[Optimizer, str] = {
    "none": "No optimizer is included; --optimizer adds one.",
    "sgd": "SGD's momentum is included, and the gradients of the step before, which a Trainer frees after the forward "
    "pass.",
    "adamw": "AdamW's state and what its step allocates is included, and the gradients of the step before, which a "
    "Trainer frees after the forward pass.",
}
WHAT_THE_BUDGET_HOLDS = (
    "The budget holds the parameters, the buffers and the peak of a step. It does not include workspaces of cuDNN and "
    "other libraries, the CUDA context, and fragmentation."
)
WHAT_THE_ALLOCATOR_SAW = (
    "Peak of the allocator: the most bytes that PyTorch's allocator gave out at once in a forward and a backward pass, "
    "beyond those before, without an optimizer."
)
TORCHVISION_DETECTORS = (
    "With pretrained weights, torchvision builds its detectors with FrozenBatchNorm2d, and then Eval mode keeps less. "
    "Here they are built without weights, and most of them have BatchNorm2d."
)


def notes_on(found: Measurement, *, rounds: int, has_budget: bool) -> list[str]:
    """Return the sentences that explain the measured numbers, and then what could not be measured."""
    notes = [WHAT_IS_COUNTED, f"{WHAT_THE_PEAK_IS} {WHAT_THE_OPTIMIZER_ADDS[found.optimizer]}", WHAT_IS_COMPARED]
    if rounds:
        threads = f" It ran on {torch.get_num_threads()} CPU thread(s), so expect noise."
        noise = "" if found.device.type == "cuda" else threads
        notes.append(
            f"Step time: the median time of a forward and a backward pass in {rounds} interleaved round(s), without an "
            f"optimizer step. In brackets: the smallest and the largest ratio of a round.{noise}"
        )
    if any(result.peak_allocated_bytes is not None for result in found.variants.values()):
        notes.append(WHAT_THE_ALLOCATOR_SAW)
    if has_budget:
        notes.append(WHAT_THE_BUDGET_HOLDS)
    return notes + found.notes


def notes_on_model(model: nn.Module) -> list[str]:
    """Return what is special about a model of a library."""
    is_detector = type(model).__module__.startswith("torchvision.models.detection.")
    return [TORCHVISION_DETECTORS] if is_detector else []


def input_facts(inputs: Inputs, dtype: torch.dtype, device: torch.device) -> str:
    """Return the inputs, dtype and device in one line."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return f"input {inputs}, {dtype_name(dtype)}, {name}"


def folded_count(pairs: ConvBNPairs) -> str:
    """Return how many BatchNorms are folded, for example ``2 of 3 BatchNorms folded``."""
    return f"{len(pairs)} of {len(pairs) + len(pairs.unpaired)} BatchNorms folded"
