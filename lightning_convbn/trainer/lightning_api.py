"""What we need of Lightning, from whichever of its packages is installed, ``lightning`` or ``pytorch_lightning``."""

from __future__ import annotations

from importlib import metadata
from typing import TYPE_CHECKING

__all__ = ["Callback", "LightningModule", "Trainer", "rank_zero_info", "rank_zero_warn"]


def _only_knows_its_own(package: str) -> bool:
    """Whether an installed Trainer refuses callbacks that derive from the other package's class, as up to 2.5."""
    try:
        major, minor = metadata.version(package).split(".")[:2]
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
        if _only_knows_its_own("pytorch-lightning"):
            import pytorch_lightning

            class Callback(Callback, pytorch_lightning.Callback):
                """A callback for the Trainers of both packages."""
