"""Builds the module of a layer for its first input, and gives all tensors values that training might leave behind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from zlib import crc32

import torch
import torchvision
from fuzz.network import Layer
from fuzz.unseen import derived
from lightning.pytorch.plugins.layer_sync import _BatchNormXd
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torchvision.models.video.resnet import Conv3DSimple

from lightning_convbn.layers.supported_layers import is_norm

try:
    import timm.layers as timm_layers
except ImportError:
    timm_layers = None


class ScaledConv2d(nn.Conv2d):
    """A subclass that computes something else: it may not be folded."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 1.5


class DoublingBatchNorm2d(nn.BatchNorm2d):
    """A subclass that computes something else: it may be frozen, but not folded."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


CONVOLUTIONS = {2: nn.Linear, 3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
TRANSPOSED = {3: nn.ConvTranspose1d, 4: nn.ConvTranspose2d, 5: nn.ConvTranspose3d}
BATCH_NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
OTHER_NORMS = {"LayerNorm": nn.LayerNorm, "RMSNorm": nn.RMSNorm}  # over all that one input of a batch holds
INSTANCE_NORMS = {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d}
POOLS = {3: nn.AvgPool1d, 4: nn.MaxPool2d, 5: nn.AvgPool3d}

ACTIVATIONS: dict[str, Callable[[Layer], nn.Module]] = {
    "ReLU": lambda layer: nn.ReLU(layer.inplace),
    "ReLU6": lambda layer: nn.ReLU6(layer.inplace),
    "SiLU": lambda layer: nn.SiLU(layer.inplace),
    "Hardswish": lambda layer: nn.Hardswish(layer.inplace),
    "Mish": lambda layer: nn.Mish(layer.inplace),
    "LeakyReLU": lambda layer: nn.LeakyReLU(0.2, layer.inplace),
    "ELU": lambda layer: nn.ELU(0.7, layer.inplace),
    "Hardtanh": lambda layer: nn.Hardtanh(-0.7, 1.3, layer.inplace),
    "GELU": lambda layer: nn.GELU(),
    "Sigmoid": lambda layer: nn.Sigmoid(),
    "Tanh": lambda layer: nn.Tanh(),
}


def special_norms() -> dict[str, Callable[[int, Layer], nn.Module]]:
    """Norms for images only, those of other libraries among them."""
    norms: dict[str, Callable[[int, Layer], nn.Module]] = {
        "FrozenBatchNorm2d": lambda size, layer: torchvision.ops.FrozenBatchNorm2d(size, eps=layer.eps),
        "DoublingBatchNorm2d": lambda size, layer: DoublingBatchNorm2d(size, layer.eps),
    }
    if timm_layers is not None:
        norms |= {
            "BatchNormAct2d": lambda size, layer: timm_layers.BatchNormAct2d(size, layer.eps, act_layer="silu"),
            "SyncBatchNormAct": lambda size, layer: with_act(timm_layers.SyncBatchNormAct(size, layer.eps)),
            "FrozenBatchNormAct2d": lambda size, layer: timm_layers.FrozenBatchNormAct2d(size, layer.eps),
        }
    return norms


def with_act(norm: nn.Module) -> nn.Module:
    """Add what timm's conversion to SyncBatchNorm adds."""
    norm.act, norm.drop = nn.SiLU(), nn.Identity()
    return norm


SPECIAL_NORMS = special_norms()
SPECIAL_CONVOLUTIONS = ("subclass", "Conv2dSame") if timm_layers is not None else ("subclass",)


def make(layer: Layer, x: Tensor) -> nn.Module:
    """Build the module that a layer is for an input."""
    if layer.name == "derived":
        return derived(make(replace(layer, name=""), x))
    match layer.kind:
        case "conv" | "transposed":
            return make_conv(layer, x)
        case "norm":
            return make_norm(layer, x)
        case "act":
            return ACTIVATIONS[layer.name](layer)
        case "drop":
            return nn.Dropout(0.3, layer.inplace)
        case "pool":
            return POOLS[x.dim()](3, stride=layer.stride, padding=1)
        case "identity":
            return nn.Identity()
        case "seq":
            return make_sequential(layer, x)
    raise ValueError(f"no such kind of layer: {layer!r}")


def make_sequential(layer: Layer, x: Tensor) -> nn.Sequential:
    """Build the parts one after the other, each for what the one before it computes."""
    modules = []
    for part in layer.parts:
        modules.append(make(part, x))
        x = modules[-1](x)
    return nn.Sequential(*modules)


def make_conv(layer: Layer, x: Tensor) -> nn.Module:
    """Build a convolution that keeps the size of its input, but for its stride."""
    size, out = x.shape[1], layer.out or x.shape[1]
    options: dict[str, Any] = {"stride": layer.stride, "groups": layer.groups, "bias": layer.bias}
    if x.dim() == 2:
        conv: nn.Module = nn.Linear(size, out, layer.bias)
    elif layer.kind == "transposed":
        kernel = layer.kernel if layer.stride == 1 else layer.stride
        conv = TRANSPOSED[x.dim()](size, out, kernel, padding=kernel // 2 if layer.stride == 1 else 0, **options)
    elif layer.name == "Conv2dSame" and x.dim() == 4:
        conv = timm_layers.Conv2dSame(size, out, layer.kernel, **options)
    elif layer.name == "subclass" and x.dim() == 4:
        conv = ScaledConv2d(size, out, layer.kernel, padding=layer.kernel // 2, **options)
    elif layer.name == "Conv3DSimple" and x.dim() == 5:
        conv = Conv3DSimple(size, out, stride=layer.stride)
    elif layer.padding == "same":
        conv = CONVOLUTIONS[x.dim()](size, out, layer.kernel, padding="same", **options)
    else:
        options["padding_mode"] = layer.padding
        conv = CONVOLUTIONS[x.dim()](size, out, layer.kernel, padding=layer.kernel // 2, **options)
    return weight_norm(conv) if layer.name == "weight_norm" else conv


def make_norm(layer: Layer, x: Tensor) -> nn.Module:
    """Build a normalisation of as many channels as an input has."""
    size = x.shape[1]
    match layer.name:
        case "GroupNorm":
            return nn.GroupNorm(1, size, layer.eps)
        case "InstanceNorm" if x.dim() > 2:
            return INSTANCE_NORMS[x.dim()](size, layer.eps, affine=True)
        case name if name in OTHER_NORMS:
            return OTHER_NORMS[name](x.shape[1:], layer.eps)
        case "SyncBatchNorm":
            return nn.SyncBatchNorm(size, layer.eps, layer.momentum, layer.affine)
        case "_BatchNormXd":
            return _BatchNormXd(size, layer.eps, layer.momentum, layer.affine)
        case name if name in SPECIAL_NORMS and x.dim() == 4:
            return SPECIAL_NORMS[name](size, layer)
    return BATCH_NORMS[x.dim()](size, layer.eps, layer.momentum, layer.affine, layer.track)


def randomize(model: nn.Module, seed: int, prefix: str = "") -> None:
    """Fill all tensors. The values depend on seed and name only, so that they stay when other layers are removed."""
    with torch.no_grad():
        for name, module in model.named_modules():
            tensors = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
            for key, tensor in tensors.items():
                if not tensor.is_floating_point():
                    tensor.zero_()  # the batches that a BatchNorm has counted
                else:
                    key_seed = crc32(f"{prefix}{name}.{key}".encode())
                    fill(tensor, key, is_norm(module), torch.Generator().manual_seed(seed * 10007 + key_seed))


def fill(tensor: Tensor, key: str, of_norm: bool, generator: torch.Generator) -> None:
    """Fill one tensor: positive variances; scales of which some are 0 and some negative; weights by their fan-in."""
    if key == "running_var":
        tensor.uniform_(0.3, 2.0, generator=generator)
    elif of_norm and key == "weight":
        tensor.normal_(0.5, 1.0, generator=generator)
        tensor[torch.rand(tensor.shape, generator=generator) < 0.15] = 0.0
    else:
        tensor.normal_(0.0, 0.6 if tensor.dim() < 2 else tensor[0].numel() ** -0.5, generator=generator)
