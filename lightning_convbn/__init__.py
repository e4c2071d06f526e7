"""Tune mode for Convolution-BatchNorm blocks in PyTorch Lightning (arXiv 2305.11624)."""

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_convbn.blocks.find import Blocks, recomputed_blocks
    from lightning_convbn.callback import ConvBNModeCallback
    from lightning_convbn.exporting.deploy_copy import fuse_for_deploy
    from lightning_convbn.exporting.export import export
    from lightning_convbn.layers.state import Mode, Recompute
    from lightning_convbn.memory.fit_budget import fit_memory_budget
    from lightning_convbn.memory.measure import measure_memory
    from lightning_convbn.memory.plan import MemoryPlan
    from lightning_convbn.memory.use import MemoryUse
    from lightning_convbn.modes import conv_bn_mode, get_mode, set_mode
    from lightning_convbn.pairs.find import find_conv_bn_pairs
    from lightning_convbn.pairs.pair import ConvBNPair, ConvBNPairs

__all__ = [
    "Blocks",
    "ConvBNModeCallback",
    "ConvBNPair",
    "ConvBNPairs",
    "MemoryPlan",
    "MemoryUse",
    "Mode",
    "Recompute",
    "conv_bn_mode",
    "export",
    "find_conv_bn_pairs",
    "fit_memory_budget",
    "fuse_for_deploy",
    "get_mode",
    "measure_memory",
    "recomputed_blocks",
    "set_mode",
]

# A name is imported when it is first used: every Trainer asks `entry_point.py`, and the command needs no Lightning.
_HOMES = {
    "Blocks": "blocks.find",
    "ConvBNModeCallback": "callback",
    "ConvBNPair": "pairs.pair",
    "ConvBNPairs": "pairs.pair",
    "MemoryPlan": "memory.plan",
    "MemoryUse": "memory.use",
    "Mode": "layers.state",
    "Recompute": "layers.state",
    "conv_bn_mode": "modes",
    "export": "exporting.export",
    "find_conv_bn_pairs": "pairs.find",
    "fit_memory_budget": "memory.fit_budget",
    "fuse_for_deploy": "exporting.deploy_copy",
    "get_mode": "modes",
    "measure_memory": "memory.measure",
    "recomputed_blocks": "blocks.find",
    "set_mode": "modes",
}


def __getattr__(name: str) -> Any:
    """Import a public name. The version is that of `pyproject.toml`, which the installed package has."""
    if name == "__version__":
        return metadata.version("lightning-convbn")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    """List the public names."""
    return sorted({*globals(), *__all__})
