"""Runs of Lightning in two processes, as a script that Lightning starts once more for the second: not a test by itself.

    python tests/helpers/several_processes.py FOLDER

Every process writes what it has seen of every run to FOLDER, for `test_strategies.py` to compare.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from helpers.blocks import ResidualBackbone
from helpers.tiny_training import (
    TRUSTED,
    Backbone,
    BoringModule,
    PeekingBackbone,
    ResumableLoader,
    images_and_targets,
    make_trainer,
    state_of,
)
from helpers.torch_settings import apply_torch_settings
from lightning_convbn import ConvBNModeCallback, get_mode
from lightning_convbn.blocks.find import recompute_of
from lightning_convbn.layers import state as layer_state

BATCHES_PER_PROCESS = 4
MODES = ("eval", "tune")
EPOCHS = 2


class Shared(BoringModule):
    """The tiny module, with four batches for each of two processes; in float64, so that roundings change nothing."""

    precision = torch.float64

    def __init__(self, make_backbone: Callable[[], nn.Module] = Backbone) -> None:
        super().__init__(make_backbone)
        self.to(self.precision)

    def step(self, stage: str, batch: list[Tensor]) -> Tensor:
        return super().step(stage, [tensor.to(self.precision) for tensor in batch])

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Give different data to each process: Lightning adds the sampler."""
        return images_and_targets(2 * BATCHES_PER_PROCESS)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return images_and_targets(2)


class Single(Shared):
    """The same in float32, for mixed precision."""

    precision = torch.float32


class ByHand(Shared):
    """Two optimizers, stepped by hand, on gradients that are clipped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=self.learning_rate) for part in (self.backbone, self.head)]

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        loss = self.step("fit", batch)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
            optimizer.step()


class Unused(Shared):
    """A part of the backbone gets no gradient in the second process's even batches."""

    def forward(self, images: Tensor) -> Tensor:
        features = self.backbone(images)
        skips = self.trainer.global_rank == 1 and self.trainer.global_step % 2
        return features[:, :4] if skips else self.head(features)


class Budgeted(Shared):
    """Notes what each step recomputes."""

    def __init__(self) -> None:
        super().__init__(ResidualBackbone)
        self.recomputed: list[str] = []

    def step(self, stage: str, batch: list[Tensor]) -> Tensor:
        loss = super().step(stage, batch)
        if stage == "fit":
            self.recomputed.append(recompute_of(self.backbone))
        return loss


class Deceptive(Shared):
    """In the second process only, somebody reads a folded convolution's output past the data flow that was proven."""

    def __init__(self) -> None:
        super().__init__(PeekingBackbone)
        self.backbone.peeks = False  # until it is known which process this is

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Tell the backbone which process it is in, now that the pairs are found."""
        self.backbone.peeks = self.global_rank == 1


class Sharded(Shared):
    """Sharded by FSDP2: the whole, blocks, the backbone, or a convolution apart from its BatchNorm."""

    def __init__(self, *units: str) -> None:
        super().__init__()
        self.units = units

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        for unit in self.units:
            fully_shard(self.get_submodule(unit), mesh=mesh)


def fsdp2() -> ModelParallelStrategy:
    return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)


RUNS: dict[str, tuple[Callable[[], Shared], dict[str, Any]]] = {
    "ddp": (Shared, {"strategy": "ddp"}),
    "accumulated": (
        Shared,
        {
            "strategy": partial(DDPStrategy, gradient_as_bucket_view=True),
            "accumulate_grad_batches": 2,
            "gradient_clip_val": 0.1,
        },
    ),
    "static_graph": (Shared, {"strategy": partial(DDPStrategy, static_graph=True)}),
    "by_hand": (ByHand, {"strategy": "ddp"}),
    "unused": (Unused, {"strategy": "ddp_find_unused_parameters_true"}),
    "budget": (Budgeted, {"strategy": "ddp", "memory_budget": ("1GiB", "100KiB")}),
    "bf16": (Single, {"strategy": "ddp", "precision": "bf16-mixed"}),
    "deceptive": (Deceptive, {"strategy": "ddp"}),
    "deceptive_export": (Deceptive, {"strategy": "ddp"}),
    "fsdp2_whole": (partial(Sharded, ""), {"strategy": fsdp2}),
    "fsdp2_blocks": (partial(Sharded, "backbone.stem", "backbone.middle", ""), {"strategy": fsdp2}),
    "fsdp2_backbone": (partial(Sharded, "backbone", ""), {"strategy": fsdp2}),
    "fsdp2_apart": (partial(Sharded, "backbone.last.0", ""), {"strategy": fsdp2}),
}


def run(name: str, mode: Any, folder: Path) -> dict[str, Any]:
    """Train in a mode; return what this process saw."""
    make_module, options = RUNS[name]
    options = dict(options)
    budgets = options.pop("memory_budget", (None, None))  # of the two processes
    if callable(options["strategy"]):
        options = {**options, "strategy": options["strategy"]()}
    module = make_module()
    logger = CSVLogger(folder, name=name, version=mode)
    trainer = make_trainer(
        ConvBNModeCallback(
            mode,
            eval_mode="eval" if mode == "eval" else "deploy",
            memory_budget=budgets[int(os.environ.get("LOCAL_RANK", "0"))],
            export_path=folder / f"{mode}.pt" if name == "deceptive_export" else None,
        ),
        devices=2,
        max_epochs=EPOCHS,
        logger=logger,
        **options,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module)
    return seen_of(module, [str(warning.message) for warning in caught])


def seen_of(module: Shared, told: list[str]) -> dict[str, Any]:
    state = {name: whole(tensor) for name, tensor in state_of(module).items()}
    converted = [name for name, part in module.named_modules() if is_converted(part)]
    return {
        "losses": dict(module.losses),
        "modes": dict(module.modes),
        "state": state,
        "converted": converted,
        "mode": get_mode(module),
        "recomputed": getattr(module, "recomputed", []),
        "told": told,
    }


def is_converted(part: nn.Module) -> bool:
    """Say whether a module still has a state of the package."""
    return layer_state.state_of(part) is not None


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class Resumable(Shared):
    """The tiny module on data that can be resumed."""

    def train_dataloader(self) -> Any:
        return ResumableLoader(images_and_targets(2 * BATCHES_PER_PROCESS).dataset, batch_size=2)


def resume(folder: Path) -> dict[str, Any]:
    """Train without and with an interruption in the middle of the second epoch."""
    straight = Resumable()
    saving = ModelCheckpoint(folder / "resumed", filename="{step}", save_top_k=-1, every_n_train_steps=1)
    options = {"strategy": "ddp", "devices": 2, "max_epochs": EPOCHS}
    make_trainer(ConvBNModeCallback(), saving, enable_checkpointing=True, **options).fit(straight)
    resumed = Resumable()
    trainer = make_trainer(ConvBNModeCallback(), **options)
    path = folder / "resumed" / f"step={BATCHES_PER_PROCESS + 2}.ckpt"
    trainer.fit(resumed, ckpt_path=path, **TRUSTED)
    return {"straight": seen_of(straight, []), "resumed": seen_of(resumed, [])}


def train_statistics(*callbacks: Any) -> dict[str, Any]:
    """Train with the statistics of the batch, of repeated blocks."""
    module = Shared(ResidualBackbone)
    make_trainer(*callbacks, strategy="ddp", devices=2, max_epochs=EPOCHS).fit(module)
    return seen_of(module, [])


def main(folder: Path) -> None:
    apply_torch_settings()
    results: dict[Any, Any] = {(name, mode): run(name, mode, folder) for name in RUNS for mode in ("eval", "tune")}
    results["resume"] = resume(folder)
    results["train"] = train_statistics()
    for recompute in ("elementwise", "blocks"):
        callback = ConvBNModeCallback("train", eval_mode="eval", recompute=recompute)  # type: ignore[arg-type]
        results["train", recompute] = train_statistics(callback)
    torch.save(results, folder / f"{torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
