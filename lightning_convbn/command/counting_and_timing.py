"""Counts the peak and the kept bytes of each variant of a model, and times its steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from lightning_convbn.command.bytes_per_block import sum_by_block
from lightning_convbn.command.inputs import Call, Inputs
from lightning_convbn.command.model_checks import (
    check_has_batchnorm,
    check_names,
    check_takes,
    is_within,
    runs_abstractly,
)
from lightning_convbn.command.results import RECOMPUTES, TITLES, VARIANTS, Measurement, Variant, VariantResult
from lightning_convbn.compat import tree_map
from lightning_convbn.exporting.deploy_copy import fuse_for_deploy
from lightning_convbn.layers.state import Mode, Recompute
from lightning_convbn.layers.supported_layers import takes_other_dimensions
from lightning_convbn.memory.budget import fixed_bytes
from lightning_convbn.memory.largest_batch import largest_batch
from lightning_convbn.memory.measure import (
    forward_and_backward,
    measure_memory_abstractly,
    measure_memory_of_call,
)
from lightning_convbn.memory.optimizers import Optimizer
from lightning_convbn.memory.use import MemoryUse, as_mib
from lightning_convbn.modes import set_mode
from lightning_convbn.pairs.find import find_conv_bn_pairs, find_recorded_pairs
from lightning_convbn.pairs.pair import ConvBNPair, ConvBNPairs
from lightning_convbn.text import first_line


class ModelMeasurer:
    """Measures one model in several variants, on the same inputs, in its eval state.

    Eval and Tune are modes of the model, Tune also with recomputation. The Deploy copy is the copy that
    `fuse_for_deploy` makes, measured as if it were trained. Every parameter that wants a gradient gets one.

    Args:
        model: Any module. It is moved to ``device`` and ``dtype``.
        inputs: What it is called with.
        dtype: Dtype of the parameters, the buffers, and the inputs whose dtype was not given.
        device: The device to run on.
        optimizer: The optimizer whose state and step are in the peak.
        freeze: Names of modules or parameters. Their parameters want no gradient.

    Raises:
        CommandError: If the model has no BatchNorm, does not take the inputs, or has no parameter of a name to freeze.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        dtype: torch.dtype,
        device: torch.device,
        *,
        optimizer: Optimizer = "none",
        freeze: Sequence[str] = (),
    ) -> None:
        check_has_batchnorm(model)
        self.model = model.eval().to(device=device, dtype=dtype)
        self.inputs = inputs
        self.dtype = dtype
        self.device = device
        self.optimizer: Optimizer = optimizer
        self.freeze = freeze
        check_names(model, freeze)
        call = check_takes(model, inputs, dtype, device)
        self.pairs = find_conv_bn_pairs(model)
        if self.pairs.untraced:
            self.pairs = find_recorded_pairs(model, *call)
        elif any(takes_other_dimensions(*self._modules_of(pair)) for pair in self.pairs):
            self.pairs = find_recorded_pairs(model, *self._small_call(call))
        self.deploy_copy = fuse_for_deploy(model, pairs=self.pairs)

    def measure(
        self, variants: Sequence[Variant], *, rounds: int, budget: int | None, progress: Callable[[str], None]
    ) -> Measurement:
        """Measure variants. Eval is always measured, because the others are compared with it.

        Args:
            variants: What to measure.
            rounds: How often to time a step of each variant. 0 times none.
            budget: The bytes that the largest batch must fit into, or None. It needs inputs that have a batch.
            progress: Called with the next piece of work, `count_progress_steps` times.

        Returns:
            What was measured. The model is in Train mode again.
        """
        chosen = [variant for variant in VARIANTS if variant in ("eval", *variants)]
        found = Measurement(self.pairs, self.inputs, self.dtype, self.device, self.optimizer)
        self._freeze(found, chosen)
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

    def _small_call(self, call: Call) -> Call:
        """Return the arguments for two samples, if the model takes them, else ``call``."""
        if self.inputs.batch is None:
            return call
        small = self.inputs.with_batch(min(self.inputs.batch, 2)).make(self.dtype, self.device)
        return small if runs_abstractly(self.model, small) else call

    def _freeze(self, found: Measurement, chosen: Sequence[Variant]) -> None:
        """Freeze the parameters that were named, and note the peaks without that."""
        if not self.freeze:
            return
        peaks = {variant: self._use(variant, self.inputs).peak_bytes for variant in chosen}
        before = ", ".join(f"{TITLES[name]} {as_mib(peak)}" for name, peak in peaks.items() if peak is not None)
        frozen = [parameter for name, parameter in self.model.named_parameters() if is_within(name, self.freeze)]
        count = sum(parameter.numel() for parameter in frozen if parameter.requires_grad)
        found.notes.append(
            f"--freeze {' '.join(self.freeze)}: {count:,} parameters want no gradient. Without it, the peak of a step: "
            f"{before}."
        )
        for model in (self.model, self.deploy_copy):
            for name, parameter in model.named_parameters():
                if is_within(name, self.freeze):
                    parameter.requires_grad_(False)

    def _variant(self, variant: Variant) -> tuple[nn.Module, Mode, ConvBNPairs, Recompute]:
        """Return the module to run, its mode, its pairs and what it recomputes."""
        if variant == "deploy-copy":
            return self.deploy_copy, "train", ConvBNPairs([]), "none"  # Train mode does not convert any module
        mode: Mode = "eval" if variant == "eval" else "tune"
        return self.model, mode, self.pairs, RECOMPUTES.get(variant, "none")

    def _use(self, variant: Variant, inputs: Inputs, *, allow_real_run: bool = True) -> MemoryUse:
        """Count a variant, without data if it can."""
        model, mode, pairs, recompute = self._variant(variant)
        return measure_memory_abstractly(
            model,
            *inputs.make(self.dtype, self.device),
            mode=mode,
            pairs=pairs,
            recompute=recompute,
            optimizer=self.optimizer,
            allow_real_run=allow_real_run,
        )

    def _count(
        self, found: Measurement, chosen: Sequence[Variant], progress: Callable[[str], None], *, with_peak: bool
    ) -> None:
        """Count the peak and the kept bytes of each variant, and the kept bytes of each block."""
        by_module: dict[Variant, Mapping[str, int]] = {}
        for variant in chosen:
            progress(f"counting {TITLES[variant]}")
            use = self._use(variant, self.inputs)
            by_module[variant] = use.saved_by_module
            fixed = fixed_bytes(self._variant(variant)[0])
            found.variants[variant] = VariantResult(use.saved_bytes, fixed, use.peak_bytes)
            if use.peak_bytes is None:
                found.notes.append(f"{TITLES[variant]}: no peak, because its backward pass fails")
            if with_peak:
                found.variants[variant].peak_allocated_bytes = self._peak(variant, found)
        found.blocks = sum_by_block(self.model, self.pairs, by_module)

    def _peak(self, variant: Variant, found: Measurement) -> int | None:
        model, mode, pairs, recompute = self._variant(variant)
        try:
            use = measure_memory_of_call(
                model, *self.inputs.make(self.dtype, self.device), mode=mode, pairs=pairs, recompute=recompute
            )
        except torch.OutOfMemoryError as error:
            found.notes.append(f"{TITLES[variant]}: no peak, {first_line(error)}")
            return None
        return use.peak_allocated_bytes

    def _largest_batch(self, variant: Variant, budget: int, found: Measurement) -> int | None:
        tried = self.inputs

        def needed(batch: int) -> int:
            nonlocal tried
            tried = self.inputs.with_batch(batch)
            peak = self._use(variant, tried, allow_real_run=False).peak_bytes
            if peak is None:
                raise RuntimeError("its backward pass fails")
            return peak

        try:
            largest = largest_batch(needed, budget - found.variants[variant].fixed_bytes)
            why_none = "a larger batch takes no more bytes"
        except Exception as error:  # a user's forward may raise anything if a tensor has no data
            largest = None
            why = f"{type(error).__name__}: {first_line(error)}"
            why_none = f"the model can't run on tensors without data, on the input {tried}: {why}"
        if largest is None:
            found.notes.append(f"{TITLES[variant]}: no largest batch, because {why_none}")
        return largest

    def _time(self, found: Measurement, rounds: int, progress: Callable[[str], None]) -> None:
        """Time steps in interleaved rounds. A disturbance of the machine then affects all variants alike."""
        call = self.inputs.make(self.dtype, self.device, dense=True)
        running = list(found.variants)
        for number in range(rounds + 1 if rounds else 0):
            progress(f"timing round {number} of {rounds}" if number else "warming up")
            for variant in running[:] if number % 2 else running[::-1]:
                model, mode, pairs, recompute = self._variant(variant)
                set_mode(model, mode, pairs=pairs, recompute=recompute)
                try:
                    seconds = step_seconds(model, tree_map(lambda leaf: leaf, call), self.device)  # own containers
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


def step_seconds(model: nn.Module, call: Call, device: torch.device) -> float:
    """Return the seconds that one forward and backward pass takes on a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    forward_and_backward(model, *call)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
