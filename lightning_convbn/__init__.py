"""Tune mode for Convolution-BatchNorm blocks in PyTorch Lightning (arXiv 2305.11624)."""

from lightning_convbn import third_party  # noqa: F401 - fills the table of supported layers
from lightning_convbn.callback import ConvBNModeCallback
from lightning_convbn.export import export, fuse_for_deploy
from lightning_convbn.layers import Mode
from lightning_convbn.memory import MemoryUse, measure_memory
from lightning_convbn.modes import conv_bn_mode, get_mode, set_mode
from lightning_convbn.pairs import ConvBNPair, ConvBNPairs, find_conv_bn_pairs

__all__ = [
    "ConvBNModeCallback",
    "ConvBNPair",
    "ConvBNPairs",
    "MemoryUse",
    "Mode",
    "conv_bn_mode",
    "export",
    "find_conv_bn_pairs",
    "fuse_for_deploy",
    "get_mode",
    "measure_memory",
    "set_mode",
]
