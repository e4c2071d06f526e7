"""Counts the kept bytes of each variant of a model, and times its steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_convbn.command.bytes_per_block import sum_by_block
from lightning_convbn.command.largest_batch import largest_batch
from lightning_convbn.command.model_checks import check_has_batchnorm, check_takes
from lightning_convbn.command.results import TITLES, VARIANTS, Measurement, Variant, VariantResult
from lightning_convbn.exporting.deploy_copy import fuse_for_deploy
from lightning_convbn.layers.swap import Mode
from lightning_convbn.layers.table import takes_other_dimensions
from lightning_convbn.memory import forward_and_backward, measure_memory, measure_memory_abstractly
from lightning_convbn.modes import set_mode
from lightning_convbn.pairs.find import find_conv_bn_pairs
from lightning_convbn.pairs.pair import ConvBNPair, ConvBNPairs
from lightning_convbn.text import first_line


class ModelMeasurer:
    """Measures one model in several variants, on inputs of one shape, in its eval state.

    Eval and Tune are modes of the model. The Deploy copy is the copy that `fuse_for_deploy` makes, measured as if it
    were trained. Every parameter that wants a gradient gets one.

    Args:
        model: Any module that takes one tensor. It is moved to ``device`` and ``dtype``.
        shape: Shape of the input. The batch is first.
        dtype: Dtype of the input, the parameters and the buffers.
        device: The device to run on.

    Raises:
        CommandError: If the model has no BatchNorm or does not take this input.
    """

    def __init__(self, model: nn.Module, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        check_has_batchnorm(model)
        self.model = model.eval().to(device=device, dtype=dtype)
        self.batch, *self.sample = shape
        self.dtype = dtype
        self.device = device
        check_takes(model, self._input(self.batch))
        self.pairs = find_conv_bn_pairs(model)
        if self.pairs.untraced:
            self.pairs = find_conv_bn_pairs(model, example_inputs=(self._input(self.batch),))
        elif any(takes_other_dimensions(*self._modules_of(pair)) for pair in self.pairs):
            self.pairs = find_conv_bn_pairs(model, example_inputs=(self._input(min(self.batch, 2)),))
        self.deploy_copy = fuse_for_deploy(model, pairs=self.pairs)

    def measure(
        self, variants: Sequence[Variant], *, rounds: int, budget: int | None, progress: Callable[[str], None]
    ) -> Measurement:
        """Measure variants. Eval is always measured, because the others are compared with it.

        Args:
            variants: What to measure.
            rounds: How often to time a step of each variant. 0 times none.
            budget: The bytes that the largest batch must fit into, or None.
            progress: Called with the next piece of work, `count_progress_steps` times.

        Returns:
            What was measured. The model is in Train mode again.
        """
        chosen = [variant for variant in VARIANTS if variant in ("eval", *variants)]
        found = Measurement(self.pairs, (self.batch, *self.sample), self.dtype, self.device)
        self._count(found, chosen, progress, with_peak=self.device.type == "cuda" and rounds > 0)
        if budget is not None:
            for variant in chosen:
                progress(f"searching the largest batch of {TITLES[variant]}")
                found.variants[variant].largest_batch = self._largest_batch(variant, budget, found)
        self._time(found, rounds, progress)
        set_mode(self.model, "train")
        return found

    def _modules_of(self, pair: ConvBNPair) -> tuple[nn.Module, nn.Module]:
        return self.model.get_submodule(pair.conv), self.model.get_submodule(pair.bn)

    def _variant(self, variant: Variant) -> tuple[nn.Module, Mode, ConvBNPairs]:
        """Return the module to run, its mode and its pairs."""
        if variant == "deploy-copy":
            return self.deploy_copy, "train", ConvBNPairs([])  # Train mode does not convert any module
        return self.model, variant, self.pairs

    def _input(self, batch: int) -> Tensor:
        """Return an input in which all samples share the memory of one. So a large batch takes no more memory."""
        sample = torch.randn(1, *self.sample, generator=torch.Generator().manual_seed(0))
        return sample.to(self.device, self.dtype).expand(batch, *self.sample)

    def _count(
        self, found: Measurement, chosen: Sequence[Variant], progress: Callable[[str], None], *, with_peak: bool
    ) -> None:
        """Count the kept bytes of each variant and of each block."""
        by_module: dict[Variant, Mapping[str, int]] = {}
        for variant in chosen:
            progress(f"counting {TITLES[variant]}")
            model, mode, pairs = self._variant(variant)
            use = measure_memory_abstractly(model, (self._input(self.batch),), {}, mode=mode, pairs=pairs)
            by_module[variant] = use.saved_by_module
            found.variants[variant] = VariantResult(use.saved_bytes, _fixed_bytes(model))
            if with_peak:
                found.variants[variant].peak_allocated_bytes = self._peak(variant, found)
        found.blocks = sum_by_block(self.model, self.pairs, by_module)

    def _peak(self, variant: Variant, found: Measurement) -> int | None:
        model, mode, pairs = self._variant(variant)
        try:
            return measure_memory(model, self._input(self.batch), mode=mode, pairs=pairs).peak_allocated_bytes
        except torch.OutOfMemoryError as error:
            found.notes.append(f"{TITLES[variant]}: no peak, {first_line(error)}")
            return None

    def _largest_batch(self, variant: Variant, budget: int, found: Measurement) -> int | None:
        model, mode, pairs = self._variant(variant)

        def kept(batch: int) -> int:
            inputs = (self._input(batch),)
            use = measure_memory_abstractly(model, inputs, {}, mode=mode, pairs=pairs, allow_real_run=False)
            return use.saved_bytes

        try:
            largest = largest_batch(kept, budget - found.variants[variant].fixed_bytes)
            why_none = "a larger batch keeps no more bytes"
        except Exception as error:  # a user's forward may raise anything if a tensor has no data
            largest = None
            why_none = f"the model can't run on tensors without data: {type(error).__name__}: {first_line(error)}"
        if largest is None:
            found.notes.append(f"{TITLES[variant]}: no largest batch, because {why_none}")
        return largest

    def _time(self, found: Measurement, rounds: int, progress: Callable[[str], None]) -> None:
        """Time steps in interleaved rounds. A disturbance of the machine then affects all variants alike."""
        batch = self._input(self.batch).contiguous()
        running = list(found.variants)
        for number in range(rounds + 1 if rounds else 0):
            progress(f"timing round {number} of {rounds}" if number else "warming up")
            for variant in running[:] if number % 2 else running[::-1]:
                model, mode, pairs = self._variant(variant)
                set_mode(model, mode, pairs=pairs)
                try:
                    seconds = step_seconds(model, batch)
                except torch.OutOfMemoryError as error:
                    found.notes.append(f"{TITLES[variant]}: not timed, {first_line(error)}")
                    found.variants[variant].step_seconds.clear()
                    running.remove(variant)
                else:
                    if number:  # round 0 warms up
                        found.variants[variant].step_seconds.append(seconds)


def count_progress_steps(variants: Sequence[Variant], *, rounds: int, budget: int | None) -> int:
    """Count how often `ModelMeasurer.measure` calls ``progress``."""
    chosen = len({"eval", *variants})
    return chosen + (chosen if budget is not None else 0) + (rounds + 1 if rounds else 0)


def step_seconds(model: nn.Module, batch: Tensor) -> float:
    """Return the seconds that one forward and backward pass takes."""
    if batch.is_cuda:
        torch.cuda.synchronize(batch.device)
    started = time.perf_counter()
    forward_and_backward(model, (batch,), {})
    if batch.is_cuda:
        torch.cuda.synchronize(batch.device)
    return time.perf_counter() - started


def _fixed_bytes(model: nn.Module) -> int:
    parameters = sum(parameter.nbytes * (2 if parameter.requires_grad else 1) for parameter in model.parameters())
    return parameters + sum(buffer.nbytes for buffer in model.buffers())
