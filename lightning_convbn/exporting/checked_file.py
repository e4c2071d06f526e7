"""Files of a Deploy copy: what is refused before any work, the comparison with Eval mode, whole or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.torch_version import TorchVersion
from torch.utils._pytree import tree_leaves, tree_map

from lightning_convbn.exporting.formats import FORMATS, Format, Inputs
from lightning_convbn.exporting.whole_file import check_writable, written_whole
from lightning_convbn.pairs.deviation import deviation_of, float_tensors, tolerance_of
from lightning_convbn.pairs.side_effects import side_effects_undone


def write_proven(deploy: nn.Module, plain: nn.Module, path: Path, inputs: Inputs, *, dynamic_batch: bool) -> Path:
    """Write a Deploy copy, read it back, compare it with the plain model, and only then give the file its name.

    Args:
        deploy: What to write.
        plain: What it is to be equal to, in eval state.
        path: The file; `check_path` has nothing against it.
        inputs: Positional arguments of a forward, by `checked_inputs`.
        dynamic_batch: Whether the file takes any batch size.

    Returns:
        The path.
    """
    form = FORMATS[path.suffix]
    sizes = batch_sizes(inputs)
    rows = sorted({1, *sizes, max(2, *sizes) + 1}) if dynamic_batch and form.captures else [None]
    with (
        written_whole(path) as file,
        side_effects_undone(plain, inputs, {}),
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
    ):
        generator = torch.Generator().manual_seed(0)
        samples = [random_like(inputs, size, generator) for size in rows]
        expected = [_floats(plain(*_cloned(sample))) for sample in samples]
        if not any(tensor.isfinite().any() for tensor in expected[0]):
            raise RuntimeError(
                f"model: the output of {type(plain).__name__} in Eval mode holds no finite number, so there is nothing "
                "to compare a file with"
            )
        _same(expected, [_floats(deploy(*_cloned(sample))) for sample in samples], plain, "the Deploy copy")
        example = random_like(inputs, max(2, *sizes) if dynamic_batch else None, generator)
        file.write_bytes(form.write(deploy, example, dynamic_batch))
        written = form.read(file, deploy)
        found = [_floats(written(*_cloned(sample))) for sample in samples]
        _same(expected, found, plain, f"path={str(path)!r}: what was written and read back")
    return path


# ------------------------------------------------------------------------------------------------- before any work


def check_suffix(argument: str, path: Path) -> Format:
    """Return the format of a path, or raise a ValueError that names the argument and the suffixes there are."""
    if path.suffix not in FORMATS:
        raise ValueError(f"{argument}={str(path)!r}: the suffix must be one of {', '.join(FORMATS)}")
    return FORMATS[path.suffix]


def check_path(argument: str, path: Path) -> None:
    """Raise if a file can't be written there: suffix, packages, folder.

    Raises:
        ValueError: If the path can't be used.
        ImportError: If a package is missing.
    """
    form, where = check_suffix(argument, path), f"{argument}={str(path)!r}"
    missing = [package for package in form.packages if find_spec(package) is None]
    if missing:
        raise ImportError(
            f"{where}: {path.suffix} files need {' and '.join(missing)}: pip install lightning-convbn[{form.extra}]"
        )
    if TorchVersion(torch.__version__) < form.since:
        raise ValueError(
            f"{where}: {path.suffix} files need PyTorch {form.since} or later; this is {torch.__version__}. "
            "Upgrade it, or write .pt2 or .pt"
        )
    check_writable(where, path)


def check_model(model: nn.Module, path: Path) -> None:
    """Raise a ValueError if a model's weights don't fit into a file of this format, or it could not be checked."""
    form = FORMATS[path.suffix]
    tensors = [*model.parameters(), *model.buffers()]
    size = sum(tensor.nbytes for tensor in tensors)
    if size > form.most_bytes:
        raise ValueError(
            f"model: {type(model).__name__} has {size / 2**30:.1f} GiB, more than the {form.most_bytes / 2**30:.0f} "
            f"GiB that one {path.suffix} file can hold; write .pt2, .pt or .safetensors"
        )
    dtypes = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
    for dtype in dtypes - form.dtypes if form.dtypes else ():
        raise ValueError(
            f"model: {type(model).__name__} has {dtype} tensors, and a {path.suffix} file of them can't be checked: "
            "onnxruntime does not run them on a CPU. Give a copy by .float(), or write .pt2"
        )


def checked_inputs(example_inputs: Sequence[Any], *, dynamic_batch: bool) -> Inputs:
    """Return copies of the positional arguments of a forward, without gradients, on the CPU.

    Raises:
        ValueError: If they are no sequence, hold no tensor, or have batches of different sizes.
    """
    if not isinstance(example_inputs, (tuple, list)):
        raise ValueError(
            "example_inputs must be a tuple of the positional arguments of forward, as (images,); "
            f"got {type(example_inputs).__name__}"
        )
    inputs: Inputs = tree_map(
        lambda leaf: leaf.detach().cpu().clone() if isinstance(leaf, Tensor) else leaf, (*example_inputs,)
    )
    sizes = batch_sizes(inputs)
    if not sizes:
        raise ValueError(f"example_inputs must hold a tensor with a batch dimension; got {example_inputs!r}")
    if dynamic_batch and len(sizes) > 1:
        raise ValueError(
            f"example_inputs: with dynamic_batch=True the first dimension of every tensor is the batch, but they are "
            f"{', '.join(map(str, sorted(sizes)))}; give batches of one size, or dynamic_batch=False"
        )
    return inputs


def batch_sizes(inputs: Inputs) -> set[int]:
    """Collect the first dimensions of all tensors in the arguments of a forward."""
    return {leaf.shape[0] for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.dim()}


# ---------------------------------------------------------------------------------------------------- comparing


def random_like(inputs: Inputs, rows: int | None, generator: torch.Generator) -> Inputs:
    """Draw arguments that resemble others: numbers of the same mean and spread, and rows of whatever is no number.

    Args:
        inputs: The others, without gradients, on the CPU.
        rows: The size of the first dimension; None for what it is.
        generator: Where randomness comes from.
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


def _cloned(inputs: Inputs) -> Inputs:
    """A forward may write into its arguments."""
    clones: Inputs = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, inputs)
    return clones


def _floats(output: Any) -> list[Tensor]:
    """The numbers to compare, in the order in which files give them; what only Python knows is searched through."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()] or (
        float_tensors(output)
    )


def _same(expected: list[list[Tensor]], found: list[list[Tensor]], plain: nn.Module, what: str) -> None:
    for one, other in zip(expected, found, strict=True):
        deviation, tolerance = deviation_of(other, one), tolerance_of(plain, one)
        if not deviation <= tolerance:
            raise RuntimeError(
                f"{what} deviates from {type(plain).__name__} in Eval mode by {deviation:.1e}, more than the "
                f"{tolerance:.0e} that rounding may cause; nothing was written"
            )
