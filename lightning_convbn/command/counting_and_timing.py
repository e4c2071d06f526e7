"""Counts the peak and the kept bytes of each variant of a model, and times its steps."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from lightning_convbn.command.bytes_per_block import sum_by_block
from lightning_convbn.command.errors import CommandError
from lightning_convbn.command.inputs import Call, Inputs
from lightning_convbn.command.model_checks import (
    check_has_batchnorm,
    check_names,
    check_takes,
    is_within,
    runs_abstractly,
)
from lightning_convbn.command.results import MODES, TITLES, VARIANTS, Measurement, Variant, VariantResult, reference_of
from lightning_convbn.command.terminal import Job, run_jobs
from lightning_convbn.compat import tree_map
from lightning_convbn.exporting.deploy_copy import fuse_for_deploy
from lightning_convbn.layers.norms import buffers_unwritten
from lightning_convbn.layers.supported_layers import takes_other_dimensions
from lightning_convbn.memory.budget import fixed_bytes
from lightning_convbn.memory.largest_batch import largest_batch
from lightning_convbn.memory.measure import forward_and_backward, measure_memory_abstractly
from lightning_convbn.memory.optimizers import Optimizer
from lightning_convbn.modes import set_mode
from lightning_convbn.pairs.find import find_conv_bn_pairs, find_recorded_pairs
from lightning_convbn.pairs.pair import ConvBNPairs
from lightning_convbn.text import first_line


class ModelMeasurer:
    """Measures one model in several variants, on the same inputs.

    Train, Eval and Tune are modes of the model, also with recomputation. The Deploy copy is the copy that
    `fuse_for_deploy` makes, measured as if it were trained. Every parameter that wants a gradient gets one. In Train's
    variants the model is in its train state, in the others in its eval state. Its buffers are left as they were.

    Args:
        model: Any module. It is moved to ``device`` and ``dtype``.
        inputs: What it is called with.
        dtype: Dtype of the floats: parameters, buffers and inputs.
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
        check_names(model, freeze)
        self.model = model.eval().to(device=device, dtype=dtype)
        self.inputs = inputs.to(dtype, device)
        check_takes(model, self.inputs)
        self.pairs = self._find_pairs()
        self.deploy_copy = fuse_for_deploy(model, pairs=self.pairs)
        for part in (self.model, self.deploy_copy):
            for name, parameter in part.named_parameters():
                if is_within(name, freeze):
                    parameter.requires_grad_(False)
        self.found = Measurement(self.pairs, self.inputs, dtype, device, optimizer)
        self._by_module: dict[Variant, Mapping[str, int]] = {}
        self._timed: list[Variant] = []  # without those that ran out of memory

    def measure(self, variants: Sequence[Variant], *, rounds: int, budget: int | None) -> Measurement:
        """Measure variants, and what they are compared with: Train, Eval or both.

        Args:
            variants: What to measure.
            rounds: How often to time a step of each variant. 0 times none.
            budget: The bytes that the largest batch must fit into, or None. It needs inputs that have a batch.

        Returns:
            What was measured. The model is in Train mode again, and in its eval state.

        Raises:
            CommandError: If no variant can be measured.
        """
        chosen = [variant for variant in VARIANTS if variant in {*variants, *map(reference_of, variants)}]
        jobs: list[Job] = [(f"counting {TITLES[variant]}", partial(self._count, variant)) for variant in chosen]
        if budget is not None:
            search = "searching the largest batch of"
            jobs += [(f"{search} {TITLES[variant]}", partial(self._search, variant, budget)) for variant in chosen]
        if rounds:
            jobs += [("warming up", partial(self._time, 0))]
            jobs += [
                (f"timing round {number} of {rounds}", partial(self._time, number)) for number in range(1, rounds + 1)
            ]
        run_jobs(jobs)
        if not self.found.variants:
            raise CommandError(self.found.notes[0])
        set_mode(self.model.eval(), "train")
        self.found.blocks = sum_by_block(self.model, self.pairs, self._by_module)
        return self.found

    def _find_pairs(self) -> ConvBNPairs:
        """Find the pairs, and run the model only if a trace does not tell: on two samples, if it takes them."""
        pairs = find_conv_bn_pairs(self.model)
        layers = [[self.model.get_submodule(name) for name in pair] for pair in pairs]
        if not pairs.untraced and not any(takes_other_dimensions(*pair) for pair in layers):
            return pairs
        few = self.inputs if self.inputs.batch is None else self.inputs.with_batch(min(self.inputs.batch, 2))
        inputs = few if runs_abstractly(self.model, few.call()) else self.inputs
        return find_recorded_pairs(self.model, *inputs.call(writable=True))

    def _variant(self, variant: Variant) -> tuple[nn.Module, dict[str, Any]]:
        """Return the module to run, in the right state, and the arguments that set its mode."""
        mode, recompute = MODES[variant]
        if variant == "deploy-copy":
            return self.deploy_copy, {"mode": mode, "pairs": ConvBNPairs([])}
        return self.model.train(mode == "train"), {"mode": mode, "pairs": self.pairs, "recompute": recompute}

    def _count(self, variant: Variant) -> None:
        """Count the peak and the kept bytes, without data if the model allows it.

        A model may not run in its train state: a detector needs targets there, and a BatchNorm two values per channel.
        Blocks may fail where Train mode alone runs.
        """
        reference = reference_of(variant)
        if variant != reference and reference not in self.found.variants:
            return
        model, mode = self._variant(variant)
        try:
            use = measure_memory_abstractly(model, *self.inputs.call(), optimizer=self.found.optimizer, **mode)
        except Exception as error:  # a user's forward may raise anything
            if reference != "train":
                raise
            self._note(variant, f"not measured, because the model can't run in its train state: {_named(error)}")
            return
        self._timed.append(variant)
        self._by_module[variant] = use.saved_by_module
        self.found.variants[variant] = VariantResult(use.saved_bytes, fixed_bytes(model), use.peak_bytes)
        if use.peak_bytes is None:
            self._note(variant, "no peak, because its backward pass fails")

    def _search(self, variant: Variant, budget: int) -> None:
        """Search the largest batch, without data."""
        if variant not in self.found.variants:
            return
        (model, mode), result = self._variant(variant), self.found.variants[variant]
        tried = self.inputs

        def needed(batch: int) -> int:
            nonlocal tried
            tried = self.inputs.with_batch(batch)
            asked = {"optimizer": self.found.optimizer, "allow_real_run": False, **mode}
            try:
                peak = measure_memory_abstractly(model, *tried.call(), **asked).peak_bytes
            except ValueError:
                if batch > 1 or reference_of(variant) != "train":
                    raise
                return needed(2)  # a BatchNorm in training needs more than one value per channel
            if peak is None:
                raise RuntimeError("its backward pass fails")
            return peak

        try:
            result.largest_batch = largest_batch(needed, budget - result.fixed_bytes)
            why = "a larger batch takes no more bytes"
        except Exception as error:  # a user's forward may raise anything if a tensor has no data
            why = f"the model can't run on tensors without data, on the input {tried}: "
            why += _named(error)
        if result.largest_batch is None:
            self._note(variant, f"no largest batch, because {why}")

    def _time(self, number: int) -> None:
        """Time a step of each variant, in turn, so that a disturbance of the machine affects all alike."""
        call = self.inputs.call(writable=True)
        for variant in self._timed[:] if number % 2 else self._timed[::-1]:
            (model, mode), result = self._variant(variant), self.found.variants[variant]
            set_mode(model, **mode)
            torch.manual_seed(number)  # so that all variants draw alike: whole layers may be dropped
            random.seed(number)
            try:
                with buffers_unwritten(model.modules()):
                    own_containers = tree_map(lambda leaf: leaf, call)
                    seconds, peak = run_step(model, own_containers, self.found.device)
            except torch.OutOfMemoryError as error:
                self._note(variant, f"not timed, {first_line(error)}")
                result.step_seconds.clear()
                self._timed.remove(variant)
            else:
                result.step_seconds += [seconds] if number else []  # round 0 warms up
                result.peak_allocated_bytes = peak

    def _note(self, variant: Variant, text: str) -> None:
        self.found.notes.append(f"{TITLES[variant]}: {text}")


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def run_step(model: nn.Module, call: Call, device: torch.device) -> tuple[float, int | None]:
    """Run a forward and a backward pass. Return its seconds and, on CUDA, the most bytes that it allocated at once."""
    if device.type != "cuda":
        started = time.perf_counter()
        forward_and_backward(model, *call)
        return time.perf_counter() - started, None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before, started = torch.cuda.memory_allocated(device), time.perf_counter()
    forward_and_backward(model, *call)
    torch.cuda.synchronize(device)
    return time.perf_counter() - started, torch.cuda.max_memory_allocated(device) - before
