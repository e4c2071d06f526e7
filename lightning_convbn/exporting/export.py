"""Writes the Deploy copy of a model to a file, and checks the file."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from lightning_convbn.exporting.argument_checks import check_model, check_path, checked_inputs
from lightning_convbn.exporting.deploy_copy import fuse_for_deploy
from lightning_convbn.exporting.plain_copy import check_copyable, plain_copy
from lightning_convbn.exporting.write_and_compare import write_and_compare


def export(
    model: nn.Module,
    path: str | PathLike[str],
    example_inputs: Sequence[Any],
    *,
    dynamic_batch: bool = True,
) -> Path:
    """Write the Deploy copy of a model to a file, and check that it computes what the model computes in Eval mode.

    The suffix chooses the format: ``.onnx``, ``.pt2`` (``torch.export``), ``.pt`` (a state dict that loads with
    ``weights_only=True``) or ``.safetensors``.

    The file is written in a temporary folder and read back; onnxruntime reads an ONNX file. It is then compared with
    the model in Eval mode, on random inputs that resemble the examples. Only a file that passes is moved to ``path``.
    Until then an existing file stays. All of this happens on the CPU. The model, its device, its mode, its flags and
    the random states do not change.

    Args:
        model: Any module that `fuse_for_deploy` takes.
        path: The file, in a folder that exists.
        example_inputs: Positional arguments of the model's forward. They give the shapes. The model also runs on them
            to prove pairs that can't be traced. Their values are not written.
        dynamic_batch: Let ``.onnx`` and ``.pt2`` files take any batch size. The batch is the first dimension of each
            tensor in ``example_inputs``. The file is compared on several batch sizes, one of them 1.

    Returns:
        The path.

    Raises:
        ValueError: If an argument can't be used. Nothing was written.
        ImportError: If the format needs a package that is not installed. Nothing was written.
        RuntimeError: If the model can't be captured, or if the file deviates. No new file is left.
        OSError: If the file can't be written. An existing file is not changed.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export(model, f"{folder}/model.pt", (torch.randn(2, 3, 8, 8),)).name
        'model.pt'
    """
    path = Path(path)
    check_path("path", path)
    inputs = checked_inputs(example_inputs, dynamic_batch=dynamic_batch)
    check_copyable(model)
    check_model(model, path)
    copied = plain_copy(model)
    copied.model.cpu()
    fused = fuse_for_deploy(copied.model, pairs=copied.find_pairs(inputs))
    return write_and_compare(fused, copied.model, path, inputs, dynamic_batch=dynamic_batch)
