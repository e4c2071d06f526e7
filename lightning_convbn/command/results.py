"""What ``lightning-convbn measure`` has found: for each variant, for each block, for the whole model."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch

from lightning_convbn.command.inputs import Inputs, dtype_name
from lightning_convbn.layers.state import Mode, Recompute
from lightning_convbn.memory.optimizers import Optimizer
from lightning_convbn.memory.use import MIB, as_mib
from lightning_convbn.pairs.pair import ConvBNPairs

# What is compared: modes of the model, with and without recomputation, and the model's Deploy copy.
Variant = Literal[
    "train", "train-elementwise", "train-blocks", "eval", "tune", "tune-elementwise", "tune-blocks", "deploy-copy"
]
TITLES: dict[Variant, str] = {
    "train": "Train",
    "train-elementwise": "Train + elementwise",
    "train-blocks": "Train + blocks",
    "eval": "Eval",
    "tune": "Tune",
    "tune-elementwise": "Tune + elementwise",
    "tune-blocks": "Tune + blocks",
    "deploy-copy": "Deploy copy",
}
VARIANTS: tuple[Variant, ...] = tuple(TITLES)
MODES: dict[Variant, tuple[Mode, Recompute]] = {
    "train": ("train", "none"),
    "train-elementwise": ("train", "elementwise"),
    "train-blocks": ("train", "blocks"),
    "eval": ("eval", "none"),
    "tune": ("tune", "none"),
    "tune-elementwise": ("tune", "elementwise"),
    "tune-blocks": ("tune", "blocks"),
    "deploy-copy": ("train", "none"),  # of the copy, whose modules stay plain
}


def reference_of(variant: Variant) -> Variant:
    """Return the variant that another one is compared with: the one without this package that trains the same.

    Statistics are trained in Train's variants, and frozen in all others.
    """
    return "train" if variant in ("train", "train-elementwise", "train-blocks") else "eval"


@dataclass(frozen=True)
class Block:
    """A convolution with its BatchNorm, or another module that keeps bytes.

    Attributes:
        name: The qualified names of its modules.
        about: The classes of its modules, and whether its BatchNorm is folded, frozen or unfrozen.
        saved_bytes: Variant -> bytes that were allocated in it and are kept for the backward pass.
    """

    name: str
    about: str
    saved_bytes: dict[Variant, int]


@dataclass
class VariantResult:
    """What was measured of one variant.

    Attributes:
        saved_bytes: Bytes that one forward pass keeps for the backward pass.
        fixed_bytes: Bytes of the parameters and the buffers.
        peak_bytes: The most bytes that are alive at once in a step, beyond ``fixed_bytes``: inputs, forward pass,
            backward pass, gradients, and the optimizer that was named. None if the backward pass fails.
        peak_allocated_bytes: On CUDA, if steps were timed, the most bytes that the allocator has given out at once in
            a forward and a backward pass, beyond those before. None elsewhere, and if the device ran out of memory.
        step_seconds: Time of a forward and a backward pass in each round. Empty if nothing was timed.
        largest_batch: The largest batch that fits the budget. None without a budget, and if it can't be found.
    """

    saved_bytes: int
    fixed_bytes: int
    peak_bytes: int | None = None
    peak_allocated_bytes: int | None = None
    step_seconds: list[float] = field(default_factory=list)
    largest_batch: int | None = None

    @property
    def median_seconds(self) -> float | None:
        """The median of ``step_seconds``. None if there are none."""
        return statistics.median(self.step_seconds) if self.step_seconds else None


@dataclass
class Measurement:
    """What was measured of a model.

    Attributes:
        pairs: The pairs, and why the other BatchNorms are not folded.
        inputs: What the model was called with.
        dtype: Dtype of the floats: parameters, buffers and inputs.
        device: The device that the steps ran on.
        optimizer: The optimizer that is in the peak.
        variants: Variant -> what was measured of it.
        blocks: What each block keeps, in the order of the model.
        notes: What could not be measured, and why.
    """

    pairs: ConvBNPairs
    inputs: Inputs
    dtype: torch.dtype
    device: torch.device
    optimizer: Optimizer = "none"
    variants: dict[Variant, VariantResult] = field(default_factory=dict)
    blocks: list[Block] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def step_time_ratio(self, variant: Variant) -> tuple[float, float, float] | None:
        """Return the median step time divided by its reference's, and the smallest and the largest ratio of a round."""
        own, reference = self.variants[variant], self.variants[reference_of(variant)]
        if own.median_seconds is None or reference.median_seconds is None:
            return None
        ratios = [seconds / other for seconds, other in zip(own.step_seconds, reference.step_seconds, strict=True)]
        return own.median_seconds / reference.median_seconds, min(ratios), max(ratios)

    def points(self) -> list[tuple[Variant, float, float]]:
        """Return the peak in MiB and the median step time in ms of each variant that was counted and timed."""
        return [
            (variant, result.peak_bytes / MIB, 1000 * result.median_seconds)
            for variant, result in self.variants.items()
            if result.peak_bytes is not None and result.median_seconds is not None
        ]

    def as_table(self) -> tuple[list[str], list[list[str]]]:
        """Return the titles of the columns, and a row for each variant. A column without any number is left out."""
        refs = {variant: self.variants[reference_of(variant)] for variant in self.variants}
        columns: list[tuple[str, Callable[[Variant, VariantResult], str]]] = [
            ("variant", lambda variant, _: TITLES[variant]),
            ("vs", lambda variant, own: "-" if own is refs[variant] else TITLES[reference_of(variant)]),
            ("kept for backward", lambda _, own: as_mib(own.saved_bytes)),
            ("change", lambda variant, own: _change(own, refs[variant], "saved_bytes")),
            ("peak of a step", lambda _, own: _size(own.peak_bytes)),
            ("change", lambda variant, own: _change(own, refs[variant], "peak_bytes")),
            ("peak of the allocator", lambda _, own: _size(own.peak_allocated_bytes)),
            ("step time", lambda _, own: f"{1000 * own.median_seconds:.1f} ms" if own.median_seconds else "-"),
            ("ratio (rounds)", lambda variant, _: _ratio(self.step_time_ratio(variant))),
            ("largest batch", lambda _, own: "-" if own.largest_batch is None else str(own.largest_batch)),
        ]
        filled = [
            (title, cells)
            for title, cell in columns
            if {*(cells := [cell(variant, own) for variant, own in self.variants.items()])} != {"-"}
        ]
        return [title for title, _ in filled], [list(row) for row in zip(*(cells for _, cells in filled), strict=True)]

    def as_dict(self) -> dict[str, Any]:
        """Return everything in types that JSON has."""
        return {
            "batchnorms": count_batchnorms(self.pairs),
            "inputs": self.inputs.as_dict(),
            "batch": self.inputs.batch,
            "dtype": dtype_name(self.dtype),
            "device": str(self.device),
            "optimizer": self.optimizer,
            "threads": torch.get_num_threads(),
            "variants": {
                variant: {
                    "reference": reference_of(variant),
                    **asdict(result),
                    "step_time_ratio": self.step_time_ratio(variant),
                }
                for variant, result in self.variants.items()
            },
            "blocks": [asdict(block) for block in self.blocks],
            "notes": self.notes,
        }


def count_batchnorms(pairs: ConvBNPairs) -> dict[str, int]:
    """Count the BatchNorms that are folded, frozen and unfrozen."""
    total = len(pairs) + len(pairs.unpaired)
    return {"total": total, "folded": len(pairs), "frozen": len(pairs.frozen), "unfrozen": len(pairs.unfrozen)}


def _size(size: int | None) -> str:
    return "-" if size is None else as_mib(size)


def _change(own: VariantResult, reference: VariantResult, size: str) -> str:
    """Return by how many percent a size differs from the reference's."""
    new, old = getattr(own, size), getattr(reference, size)
    return "-" if own is reference or new is None or not old else f"{100 * (new / old - 1):+.1f} %"


def _ratio(ratio: tuple[float, float, float] | None) -> str:
    return "-" if ratio is None else f"{ratio[0]:.2f} ({ratio[1]:.2f} to {ratio[2]:.2f})"
