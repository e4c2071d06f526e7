"""Random running statistics for networks with random weights, so that the benchmarks need no trained ones."""

from __future__ import annotations

import torch
from torch import nn

from lightning_convbn.layers.supported_layers import is_norm


@torch.no_grad()
def give_statistics(model: nn.Module) -> None:
    """Draw the statistics and the affine parameters of every BatchNorm, so that none looks as if it were new."""
    for module in model.modules():
        if is_norm(module):
            tensors = {**module._parameters, **module._buffers}
            for name, low, high in (("running_var", 0.5, 2.0), ("weight", 0.7, 1.3)):
                if (tensor := tensors.get(name)) is not None:
                    tensor.uniform_(low, high)
            for name in ("running_mean", "bias"):
                if (tensor := tensors.get(name)) is not None:
                    tensor.normal_(0, 0.2)
