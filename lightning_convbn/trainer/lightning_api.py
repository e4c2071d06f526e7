"""The names of Lightning that we use, from the package that is installed: ``lightning`` or ``pytorch_lightning``."""

from __future__ import annotations

from importlib import metadata
from typing import TYPE_CHECKING

__all__ = ["Callback", "LightningModule", "Trainer", "rank_zero_info", "rank_zero_warn"]


def _refuses_other_callbacks() -> bool:
    """Whether pytorch_lightning is installed too, and its Trainer refuses callbacks derived from lightning's class.

    It does up to 2.5 ("Expected a parent"), not from 2.6 on.
    """
    try:
        major, minor = metadata.version("pytorch-lightning").split(".")[:2]
    except metadata.PackageNotFoundError:
        return False
    return (int(major), int(minor)) < (2, 6)


if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
else:
    try:
        from lightning.pytorch import Callback, LightningModule, Trainer
        from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
    except ImportError:
        from pytorch_lightning import Callback, LightningModule, Trainer
        from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
    else:
        if _refuses_other_callbacks():
            import pytorch_lightning

            class Callback(Callback, pytorch_lightning.Callback):
                """A callback for the Trainers of both packages."""
