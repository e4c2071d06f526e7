"""Writes a Deploy copy to a file, reads it back, and compares it with the model in Eval mode."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_convbn.compat import tree_leaves, tree_map
from lightning_convbn.exporting.argument_checks import batch_sizes
from lightning_convbn.exporting.atomic_file import atomic_write
from lightning_convbn.exporting.formats import FORMATS, Inputs
from lightning_convbn.pairs.output_deviation import deviation_of, float_tensors, tolerance_of
from lightning_convbn.pairs.side_effects import side_effects_undone


def write_and_compare(deploy: nn.Module, plain: nn.Module, path: Path, inputs: Inputs, *, dynamic_batch: bool) -> Path:
    """Write a Deploy copy, read it back, and compare it with the plain model. Only then is the file at ``path``.

    Args:
        deploy: The Deploy copy.
        plain: The model that it must be equal to, in eval state.
        path: The file. `check_path` has accepted it.
        inputs: Positional arguments of a forward, by `checked_inputs`.
        dynamic_batch: Whether the file takes any batch size.

    Returns:
        The path.

    Raises:
        RuntimeError: If the model can't be captured, or if the Deploy copy or the file deviates. No file is left.
    """
    form = FORMATS[path.suffix]
    sizes = batch_sizes(inputs)
    rows = sorted({1, *sizes, max(2, *sizes) + 1}) if dynamic_batch and form.captures else [None]
    with (
        atomic_write(path) as file,
        side_effects_undone(plain, inputs, {}),
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
    ):
        generator = torch.Generator().manual_seed(0)
        samples = [random_like(inputs, size, generator) for size in rows]
        expected = _outputs(plain, samples)
        _check_finite(expected[0], plain)
        _check_equal(_outputs(deploy, samples), expected, plain, "the Deploy copy")
        example = random_like(inputs, max(2, *sizes) if dynamic_batch else None, generator)
        file.write_bytes(form.write(deploy, example, dynamic_batch))
        found = _outputs(form.read(file, deploy), samples)
        _check_equal(found, expected, plain, f"path={str(path)!r}: what was written and read back")
    return path


def random_like(inputs: Inputs, rows: int | None, generator: torch.Generator) -> Inputs:
    """Draw random arguments that resemble given ones.

    Floating-point tensors get random numbers of the same mean and spread. Other tensors get rows of the given tensor.

    Args:
        inputs: The given arguments, without gradients, on the CPU.
        rows: The size of the first dimension. None keeps the size.
        generator: The source of the random numbers.
    """

    def draw(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.dim():
            return leaf
        size = leaf.shape[0] if rows is None else rows
        if not leaf.is_floating_point():
            return leaf[torch.randint(leaf.shape[0], (size,), generator=generator)]
        numbers = leaf.double().nan_to_num(posinf=0, neginf=0)
        noise = torch.randn(size, *leaf.shape[1:], generator=generator, dtype=torch.float64)
        spread = float(numbers.std(correction=0)) or 1.0
        return (noise * spread + numbers.mean()).to(leaf.dtype)

    drawn: Inputs = tree_map(draw, inputs)
    return drawn


def _outputs(forward: Callable[..., Any], samples: list[Inputs]) -> list[list[Tensor]]:
    """Return the floating-point tensors of each output, in the order in which files give them."""
    outputs = [forward(*_cloned(sample)) for sample in samples]
    # `tree_leaves` has the order of files. `float_tensors` also finds tensors in objects that files do not know.
    return [
        [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        or float_tensors(output)
        for output in outputs
    ]


def _cloned(inputs: Inputs) -> Inputs:
    """Copy the tensors, because a forward may write into its arguments."""
    clones: Inputs = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, inputs)
    return clones


def _check_finite(output: list[Tensor], plain: nn.Module) -> None:
    if not any(tensor.isfinite().any() for tensor in output):
        raise RuntimeError(
            f"model: the output of {type(plain).__name__} in Eval mode holds no finite number, so there is nothing "
            "to compare a file with"
        )


def _check_equal(found: list[list[Tensor]], expected: list[list[Tensor]], plain: nn.Module, what: str) -> None:
    for output, reference in zip(found, expected, strict=True):
        deviation, tolerance = deviation_of(output, reference), tolerance_of(plain, reference)
        if not deviation <= tolerance:
            raise RuntimeError(
                f"{what} deviates from {type(plain).__name__} in Eval mode by {deviation:.1e}, more than the "
                f"{tolerance:.0e} that rounding may cause; nothing was written"
            )
