"""The export at the end of a fit: which module, which inputs, which weights."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, cast

import fsspec
import torch
from torch import Tensor, nn

from lightning_convbn.exporting.argument_checks import (
    batch_sizes,
    check_model,
    check_path,
    checked_inputs,
)
from lightning_convbn.exporting.checkpoint_file import load_only_weights
from lightning_convbn.exporting.deploy_copy import fuse_for_deploy
from lightning_convbn.exporting.plain_copy import plain_copy
from lightning_convbn.exporting.write_and_compare import write_and_compare
from lightning_convbn.pairs.find import find_conv_bn_pairs
from lightning_convbn.pairs.side_effects import tensors_of
from lightning_convbn.trainer.lightning_api import LightningModule, Trainer, rank_zero_info, rank_zero_warn
from lightning_convbn.trainer.own_forward import before_forwards

_SHARDING = {"FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy"}  # class names: importing them takes long


class FitExport:
    """Exports a LightningModule: what its ``forward`` computes, or its single target if it has no forward of its own.

    Example inputs are ``example_input_array`` if the LightningModule has one. Else they are the first two samples of
    what that forward gets in the first training batch.

    Args:
        path: The file to write.

    Attributes:
        path: The file to write.
        inputs: The example inputs; None until they are known.
        wrong: BatchNorms that must not be folded: qualified name -> why.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = Path(path)
        self.wrong: dict[str, str] = {}
        self._module = ""  # qualified name of what is exported
        self.inputs: tuple[Any, ...] | None = None

    def prepare(self, trainer: Trainer, pl_module: LightningModule, parts: Sequence[str]) -> None:
        """Choose what is exported. If it can't be exported, say so now and not after the training.

        Args:
            trainer: The Trainer, at the start of fit.
            pl_module: What it trains.
            parts: Paths of the parts that the callback converts.

        Raises:
            ValueError: If the path, the strategy or the module can't be used.
            ImportError: If a package that the format needs is missing.
        """
        where = f"export_path={str(self.path)!r}"
        strategies = {cls.__name__ for cls in type(trainer.strategy).__mro__} & _SHARDING
        if strategies:
            raise ValueError(
                f"{where}: {strategies.pop()} shards the weights; call export on a consolidated checkpoint"
            )
        if trainer.is_global_zero:
            check_path("export_path", self.path)
        owner = next(cls for cls in type(pl_module).__mro__ if "forward" in vars(cls))
        has_forward = owner.__name__ not in ("LightningModule", "Module")
        if not has_forward and (len(parts) > 1 or not parts[0]):
            raise ValueError(
                f"{where}: {type(pl_module).__name__} has no forward that says what to export; define one, or name a "
                f"single part with target=..., not {list(parts)}"
            )
        self._module = "" if has_forward else parts[0]
        check_model(pl_module.get_submodule(self._module), self.path)
        example = pl_module.example_input_array
        if example is not None:
            args, kwargs = ((), example) if isinstance(example, dict) else (example, {})
            self._record(pl_module.get_submodule(self._module), args if isinstance(args, tuple) else (args,), kwargs)

    def open(self, pl_module: LightningModule) -> Callable[[], None]:
        """Take the example inputs from the next call of what is exported, if there are none yet.

        Returns:
            What ends that.
        """
        module = pl_module.get_submodule(self._module)

        def before(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.inputs is None:
                self._record(module, args, kwargs)

        return before_forwards(module, before)

    def check_recorded(self, pl_module: LightningModule) -> None:
        """Raise a ValueError if there are no example inputs after the first training batch."""
        if self.inputs is None:
            raise ValueError(
                f"export_path={str(self.path)!r}: the first training batch did not pass through the forward of "
                f"{_described(self._module, pl_module)}, so there are no example inputs; set `example_input_array` in "
                f"{type(pl_module).__name__}"
            )

    def write_or_warn(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export in the first process. If that fails, warn: an error would hide that the training has succeeded."""
        if not trainer.is_global_zero:
            return
        try:
            rank_zero_info(f"ConvBN: {self._write(trainer, pl_module)}")
        except Exception as error:
            rank_zero_warn(
                f"ConvBN: export_path={str(self.path)!r}: nothing was exported. Weights and checkpoints are as "
                f"trained: repair the cause and call lightning_convbn.export. {type(error).__name__}: {error}"
            )

    def _write(self, trainer: Trainer, pl_module: LightningModule) -> str:
        """Write the file, and return what was written.

        The weights are those of the best checkpoint, if a ModelCheckpoint monitors something, else the last ones.
        """
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return f"nothing is exported to {self.path} in a fast_dev_run"
        if self.inputs is None:
            raise RuntimeError("not one batch was trained on, so there are no example inputs")
        copied = plain_copy(pl_module)
        best = _best_checkpoint(trainer)
        if best:
            checkpoint = _load(best, trainer)
            cast(Any, copied.model).on_load_checkpoint(checkpoint)
            copied.load_state_dict(checkpoint["state_dict"], strict=pl_module.strict_loading)
        model = copied.model.cpu().get_submodule(copied.names[self._module])
        pairs = find_conv_bn_pairs(model, example_inputs=self.inputs)
        prefix = f"{self._module}." if self._module else ""
        # The names of compiled parts already lack the name of the wrapper, as in the copy.
        wrong = {copied.names.get(name, name).removeprefix(prefix): reason for name, reason in self.wrong.items()}
        fused = fuse_for_deploy(model, pairs=pairs.unfold(wrong))
        write_and_compare(fused, model, self.path, self.inputs, dynamic_batch=_is_batched(self.inputs))
        weights = f"the best checkpoint, {best}" if best else "the last weights"
        return f"exported {_described(self._module, pl_module)} with {weights}, to {self.path}"

    def _record(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Take the arguments of a forward as example inputs."""
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
        if bound.kwargs:
            bound.apply_defaults()
        if bound.kwargs:
            raise ValueError(
                f"export_path={str(self.path)!r}: the forward of {type(module).__name__} takes "
                f"{', '.join(bound.kwargs)} by keyword only, which a file can't; let it take them by position"
            )
        inputs = bound.args
        if _is_batched(inputs):  # two samples are enough, and they are held until the fit ends
            inputs = tuple(value[:2] if isinstance(value, Tensor) and value.dim() else value for value in inputs)
        self.inputs = checked_inputs(inputs, dynamic_batch=False)


def _is_batched(inputs: tuple[Any, ...]) -> bool:
    """Whether all tensors are arguments of one batch size. Tensors in a list, a detector's images say, are no batch."""
    tensors = tensors_of(inputs)
    return len(batch_sizes(inputs)) == 1 and len(tensors) == sum(isinstance(value, Tensor) for value in inputs)


def _described(module: str, pl_module: nn.Module) -> str:
    return f"`{module}`" if module else type(pl_module).__name__


def _best_checkpoint(trainer: Trainer) -> str:
    """Return the best checkpoint of the first ModelCheckpoint that monitors something; empty if there is none."""
    for callback in trainer.checkpoint_callbacks:
        if getattr(callback, "monitor", None) and getattr(callback, "best_model_path", ""):
            return str(callback.best_model_path)  # type: ignore[attr-defined]
    return ""


def _load(best: str, trainer: Trainer) -> dict[str, Any]:
    """Load the best checkpoint.

    It may hold more than weights: a module's hyperparameters can be objects of any class. A run that began here has
    written the file itself, so all of it is unpickled. A resumed run was told the path by the checkpoint that it was
    resumed from, so the file may be anybody's, and only weights are unpickled.
    """
    with fsspec.open(best, "rb") as file:
        if trainer.ckpt_path is None:
            return cast(dict[str, Any], torch.load(file, map_location="cpu", weights_only=False))
        try:
            return cast(dict[str, Any], load_only_weights(file, best))
        except ValueError as error:
            raise ValueError(
                f"{error}. This run was resumed from {trainer.ckpt_path}, which names that file. If the file is your "
                "own, load it and export it"
            ) from error
