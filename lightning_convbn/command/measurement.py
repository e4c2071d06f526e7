"""What a model would keep, how long its steps would take and how large a batch would fit, mode by mode."""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_convbn.command.errors import CommandError, first_line
from lightning_convbn.exporting.deploy_copy import fuse_for_deploy
from lightning_convbn.layers.layers import Mode, class_name, is_norm
from lightning_convbn.memory import (
    INPUT,
    forward_and_backward,
    measure_memory,
    measure_memory_abstractly,
)
from lightning_convbn.modes import set_mode
from lightning_convbn.pairs.find import find_conv_bn_pairs
from lightning_convbn.pairs.pair import ConvBNPairs

Variant = Literal["eval", "tune", "deploy"]
VARIANTS: tuple[Variant, ...] = ("eval", "tune", "deploy")
TITLES: dict[Variant, str] = {"eval": "Eval", "tune": "Tune", "deploy": "Deploy copy"}

OWN_FORWARD = "(the model's own forward)"


@dataclass(frozen=True)
class Block:
    """A convolution with its BatchNorm, or any other module that keeps something.

    Attributes:
        name: What it is called: qualified names.
        part: The part of the model that it lies in.
        about: What it is, and what becomes of its BatchNorm.
        saved_bytes: Variant -> bytes kept for the backward pass that were allocated in it.
    """

    name: str
    part: str
    about: str
    saved_bytes: dict[Variant, int]


@dataclass
class Figures:
    """What was measured of one variant of a model.

    Attributes:
        saved_bytes: Bytes that one forward pass keeps for the backward pass.
        constant_bytes: Bytes of the parameters, of one gradient each where wanted, and of the buffers.
        peak_allocated_bytes: On CUDA, the most bytes allocated at once in forward and backward, beyond those allocated
            before; None elsewhere, without rounds, and where the memory of the device did not suffice.
        step_seconds: Duration of a forward and backward pass, round by round; empty where none was timed.
        largest_batch: The largest batch that fits the budget; None if no budget was given or the search is impossible.
    """

    saved_bytes: int
    constant_bytes: int
    peak_allocated_bytes: int | None = None
    step_seconds: list[float] = field(default_factory=list)
    largest_batch: int | None = None

    @property
    def median_seconds(self) -> float | None:
        """The median of ``step_seconds``; None if there is none."""
        return statistics.median(self.step_seconds) if self.step_seconds else None


@dataclass
class Measurement:
    """What was measured of a model.

    Attributes:
        pairs: What is folded, and why the rest is not.
        shape: Shape of the input, the batch first.
        dtype: Type of the input, the parameters and the buffers.
        device: Where the steps were timed.
        figures: Variant -> what was measured of it.
        blocks: What each block keeps, in the order of the model.
        notes: What could not be measured, and why.
    """

    pairs: ConvBNPairs
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    figures: dict[Variant, Figures] = field(default_factory=dict)
    blocks: list[Block] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def step_time_ratio(self, variant: Variant) -> tuple[float, float, float] | None:
        """Return the ratio of the median step times to Eval's, and the smallest and largest ratio of a round."""
        own, reference = self.figures[variant], self.figures["eval"]
        if own.median_seconds is None or reference.median_seconds is None:
            return None
        ratios = [seconds / other for seconds, other in zip(own.step_seconds, reference.step_seconds, strict=True)]
        return own.median_seconds / reference.median_seconds, min(ratios), max(ratios)

    def as_dict(self) -> dict[str, Any]:
        """Return everything in types that JSON has."""
        return {
            "batchnorms": count_norms(self.pairs),
            "input": list(self.shape),
            "dtype": dtype_name(self.dtype),
            "device": str(self.device),
            "threads": torch.get_num_threads(),
            "modes": {
                variant: {**asdict(figures), "step_time_ratio": self.step_time_ratio(variant)}
                for variant, figures in self.figures.items()
            },
            "blocks": [asdict(block) for block in self.blocks],
            "notes": self.notes,
        }


class Subject:
    """A model in its eval state, to be measured in several variants on inputs of one shape.

    Eval and Tune mode are the model's own; the Deploy copy is the plain copy that `fuse_for_deploy` makes, trained as
    it is. Every parameter that wants a gradient gets one.

    Args:
        model: Any module that takes one tensor. It is moved to ``device`` and ``dtype``.
        shape: Shape of the input, the batch first.
        dtype: What to run in.
        device: Where to run.

    Raises:
        CommandError: If the model has no BatchNorm or does not take such an input.
    """

    def __init__(self, model: nn.Module, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        check_has_norms(model)
        self.model = model.eval().to(device=device, dtype=dtype)
        self.batch, *self.sample = shape
        self.dtype = dtype
        self.device = device
        check_takes(model, self._input(self.batch))
        self.pairs = find_conv_bn_pairs(model)
        if self.pairs.untraced:
            self.pairs = find_conv_bn_pairs(model, example_inputs=(self._input(self.batch),))
        self.fused = fuse_for_deploy(model, pairs=self.pairs)

    def measure(
        self, variants: Sequence[Variant], *, rounds: int, budget: int | None, progress: Callable[[str], None]
    ) -> Measurement:
        """Measure variants; Eval, which the others are compared with, comes first in any case.

        Args:
            variants: What to measure.
            rounds: How often to time a step of each variant; 0 to time none.
            budget: Bytes to find the largest batch for, or None.
            progress: Called with what comes next, `count_stages` times.

        Returns:
            What was measured. The model is in Train mode again.
        """
        chosen = [variant for variant in VARIANTS if variant in ("eval", *variants)]
        result = Measurement(self.pairs, (self.batch, *self.sample), self.dtype, self.device)
        by_module: dict[Variant, Mapping[str, int]] = {}
        for variant in chosen:
            progress(f"counting {TITLES[variant]}")
            model, mode, pairs = self._variant(variant)
            use = measure_memory_abstractly(model, (self._input(self.batch),), {}, mode=mode, pairs=pairs)
            by_module[variant] = use.saved_by_module
            result.figures[variant] = Figures(use.saved_bytes, _constant_bytes(model))
            if self.device.type == "cuda" and rounds:
                result.figures[variant].peak_allocated_bytes = self._peak(variant, result)
        result.blocks = blocks(self.model, self.pairs, by_module)
        if budget is not None:
            for variant in chosen:
                progress(f"searching the largest batch of {TITLES[variant]}")
                result.figures[variant].largest_batch = self._largest_batch(variant, budget, result)
        self._time(result, rounds, progress)
        set_mode(self.model, "train")
        return result

    def _variant(self, variant: Variant) -> tuple[nn.Module, Mode, ConvBNPairs]:
        if variant == "deploy":
            return self.fused, "train", ConvBNPairs([])  # Train mode: the plain modules of the copy as they are
        return self.model, variant, self.pairs

    def _input(self, batch: int) -> Tensor:
        """An input that takes the memory of one sample, whatever the batch: every sample is the same one."""
        sample = torch.randn(1, *self.sample, generator=torch.Generator().manual_seed(0))
        return sample.to(self.device, self.dtype).expand(batch, *self.sample)

    def _peak(self, variant: Variant, result: Measurement) -> int | None:
        model, mode, pairs = self._variant(variant)
        try:
            return measure_memory(model, self._input(self.batch), mode=mode, pairs=pairs).peak_allocated_bytes
        except torch.OutOfMemoryError as error:
            result.notes.append(f"{TITLES[variant]}: no peak, {first_line(error)}")
            return None

    def _largest_batch(self, variant: Variant, budget: int, result: Measurement) -> int | None:
        model, mode, pairs = self._variant(variant)

        def kept(batch: int) -> int:
            inputs = (self._input(batch),)
            return measure_memory_abstractly(model, inputs, {}, mode=mode, pairs=pairs, or_for_real=False).saved_bytes

        try:
            found = largest_batch(kept, budget - result.figures[variant].constant_bytes)
            why_none = "what is kept does not grow with it"
        except Exception as error:  # whatever a user's forward raises when there are no values to read
            found = None
            why_none = (
                f"the model can't be counted on tensors without data: {type(error).__name__}: {first_line(error)}"
            )
        if found is None:
            result.notes.append(f"{TITLES[variant]}: no largest batch, because {why_none}")
        return found

    def _time(self, result: Measurement, rounds: int, progress: Callable[[str], None]) -> None:
        """Time steps in interleaved rounds, so that what disturbs the machine disturbs all variants alike."""
        batch = self._input(self.batch).contiguous()
        running = list(result.figures)
        for number in range(rounds + 1 if rounds else 0):
            progress(f"timing round {number} of {rounds}" if number else "warming up")
            for variant in running[:] if number % 2 else running[::-1]:
                model, mode, pairs = self._variant(variant)
                set_mode(model, mode, pairs=pairs)
                try:
                    seconds = _step_seconds(model, batch)
                except torch.OutOfMemoryError as error:
                    result.notes.append(f"{TITLES[variant]}: not timed, {first_line(error)}")
                    result.figures[variant].step_seconds.clear()
                    running.remove(variant)
                else:
                    if number:  # the first round warms up
                        result.figures[variant].step_seconds.append(seconds)


def count_stages(variants: Sequence[Variant], *, rounds: int, budget: int | None) -> int:
    """Count how often `Subject.measure` calls ``progress``."""
    chosen = len({"eval", *variants})
    return chosen + (chosen if budget is not None else 0) + (rounds + 1 if rounds else 0)


def check_has_norms(model: nn.Module) -> None:
    """Raise a `CommandError` if a model has no BatchNorm."""
    if not any(is_norm(module) for module in model.modules()):
        raise CommandError(f"{type(model).__name__} has no BatchNorm: there is nothing to fold or freeze")
    lazy = next((name for name, parameter in model.named_parameters() if is_lazy(parameter)), None)
    if lazy is not None:
        raise CommandError(f"{type(model).__name__} is lazy (`{lazy}`): let the factory run one batch through it")


def check_takes(model: nn.Module, batch: Tensor) -> None:
    """Raise a `CommandError` if the model's forward does not take such a batch; on tensors without data, if it can."""
    with suppress(Exception):  # whatever a user's forward raises; the real run tells whether the batch is to blame
        measure_memory_abstractly(model, (batch,), {}, mode="train", pairs=ConvBNPairs([]), or_for_real=False)
        return
    try:
        with torch.no_grad(), suppress(torch.OutOfMemoryError):  # it takes it; whether it fits is another question
            model(batch)
    except Exception as error:  # whatever a user's forward raises
        shape = " × ".join(map(str, batch.shape))
        raise CommandError(
            f"{type(model).__name__} can't take an input of {shape}, {dtype_name(batch.dtype)}: "
            f"{type(error).__name__}: {first_line(error)}; see --size, --batch-size and --dtype"
        ) from error


def count_norms(pairs: ConvBNPairs) -> dict[str, int]:
    """Count BatchNorms by what becomes of them."""
    total = len(pairs) + len(pairs.unpaired)
    return {"total": total, "folded": len(pairs), "frozen": len(pairs.frozen), "unfrozen": len(pairs.unfrozen)}


def dtype_name(dtype: torch.dtype) -> str:
    """Return ``float32`` of ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def largest_batch(kept: Callable[[int], int], room: int) -> int | None:
    """Find the largest batch that keeps no more than ``room`` bytes, by counting.

    What is kept grows with the batch by the same amount per sample, or nearly so. A guess by the first two counts is
    therefore close; the answer ``n`` is one for which ``n`` was counted to fit and ``n + 1`` not to.

    Args:
        kept: Batch -> bytes.
        room: Bytes.

    Returns:
        The batch; 0 if not even one sample fits, None if nothing more is kept for a larger batch.

    Example:
        >>> largest_batch(lambda batch: 10 + 3 * batch, 101)
        30
    """
    kept = cache(kept)
    if kept(1) > room:
        return 0
    per_sample = kept(2) - kept(1)
    if per_sample <= 0:
        return None
    fits, too_large, step = 1, math.inf, 1
    probe = max(2, 1 + (room - kept(1)) // per_sample)
    while too_large - fits > 1:
        if kept(probe) <= room:
            fits = probe
            probe = fits + step
        else:
            too_large = probe
            probe = probe - step
        if not fits < probe < too_large:
            probe = int(fits + too_large) // 2
        step *= 2
    return fits


def blocks(model: nn.Module, pairs: ConvBNPairs, by_module: Mapping[Variant, Mapping[str, int]]) -> list[Block]:
    """Sum up by block what each module keeps: a convolution and its BatchNorm are one block, with all within them.

    Args:
        model: The model, plain.
        pairs: Its pairs.
        by_module: Variant -> qualified name of a module -> bytes. Each byte comes to lie in exactly one block.

    Returns:
        The blocks that keep something in some variant.
    """
    bn_of = {pair.conv: pair.bn for pair in pairs} | {pair.bn: pair.bn for pair in pairs}
    conv_of = {pair.bn: pair.conv for pair in pairs}
    modules = dict(model.named_modules())
    sums: dict[str, dict[Variant, int]] = {}
    for variant, sizes in by_module.items():
        for name, size in sizes.items():
            key = next((bn_of[outer] for outer in _from_within(name) if outer in bn_of), name)
            sums.setdefault(key, dict.fromkeys(by_module, 0))[variant] += size
    order = {name: number for number, name in enumerate([INPUT, *modules])}
    first = {key: conv_of.get(key, key) for key in sums}
    parts = _parts({first[key]: max(sizes.values()) for key, sizes in sums.items()})
    return [
        Block(
            name=_label(key, conv_of),
            part=parts[first[key]] or OWN_FORWARD,
            about=_about(key, modules, pairs, conv_of),
            saved_bytes=sums[key],
        )
        for key in sorted(sums, key=lambda key: order[first[key]])
    ]


def _from_within(name: str) -> list[str]:
    """Return a qualified name and those of the modules around it, the innermost first."""
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(len(parts), 0, -1)]


def _label(key: str, conv_of: Mapping[str, str]) -> str:
    if key not in conv_of:
        return key or OWN_FORWARD
    conv = conv_of[key]
    (conv_parent, _, _), (bn_parent, _, bn_name) = conv.rpartition("."), key.rpartition(".")
    return f"{conv} + {bn_name if conv_parent == bn_parent else key}"


def _about(key: str, modules: Mapping[str, nn.Module], pairs: ConvBNPairs, conv_of: Mapping[str, str]) -> str:
    if key not in modules:
        return "the batch itself"
    described = class_name(modules[key])
    if key in conv_of:
        return f"{class_name(modules[conv_of[key]])} and {described}, folded"
    if key in pairs.unpaired:
        return f"{described}, {'unfrozen' if key in pairs.unfrozen else 'frozen'}: {pairs.unpaired[key]}"
    return described


def _parts(sizes: Mapping[str, int]) -> dict[str, str]:
    """Divide qualified names by their first parts; what holds more than half of the bytes is divided further."""
    depths = dict.fromkeys(sizes, 1)
    while True:
        parts = {name: ".".join(name.split(".")[:depth]) for name, depth in depths.items()}
        shares: Counter[str] = Counter()
        for name, part in parts.items():
            shares[part] += sizes[name]
        large = {part for part, share in shares.items() if 2 * share > sum(sizes.values())}
        within = [name for name, part in parts.items() if part in large and name != part]
        if not within:
            return parts
        for name in within:
            depths[name] += 1


def _constant_bytes(model: nn.Module) -> int:
    parameters = sum(parameter.nbytes * (2 if parameter.requires_grad else 1) for parameter in model.parameters())
    return parameters + sum(buffer.nbytes for buffer in model.buffers())


def _step_seconds(model: nn.Module, batch: Tensor) -> float:
    if batch.is_cuda:
        torch.cuda.synchronize(batch.device)
    started = time.perf_counter()
    forward_and_backward(model, (batch,), {})
    if batch.is_cuda:
        torch.cuda.synchronize(batch.device)
    return time.perf_counter() - started
