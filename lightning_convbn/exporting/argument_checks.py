"""Checks the arguments of an export before any work: the path, the model and the example inputs."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_convbn.compat import tree_leaves, tree_map
from lightning_convbn.exporting.atomic_file import check_writable
from lightning_convbn.exporting.formats import FORMATS, Format, Inputs


def check_suffix(argument: str, path: Path) -> Format:
    """Return the format of a path.

    Raises:
        ValueError: If no format has this suffix. It names the argument and the suffixes that exist.
    """
    if path.suffix not in FORMATS:
        raise ValueError(f"{argument}={str(path)!r}: the suffix must be one of {', '.join(FORMATS)}")
    return FORMATS[path.suffix]


def check_path(argument: str, path: Path) -> None:
    """Check the suffix of a path, the packages that its format needs, and its folder.

    Raises:
        ValueError: If no file can be written to the path.
        ImportError: If a package is missing.
    """
    form, where = check_suffix(argument, path), f"{argument}={str(path)!r}"
    missing = [package for package in form.packages if find_spec(package) is None]
    if missing:
        raise ImportError(f"{where}: {path.suffix} files need {' and '.join(missing)}: pip install {' '.join(missing)}")
    check_writable(where, path)


def check_model(model: nn.Module, path: Path) -> None:
    """Raise a ValueError if a file of this format can't hold the weights of a model, or can't be checked."""
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
    """Return copies of the positional arguments of a forward. They are on the CPU and want no gradients.

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
