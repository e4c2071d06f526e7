"""Other callbacks beside ours: the run with each of them in Tune mode is the run with it in Eval mode."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.comparing import BACKWARD, assert_close
from helpers.lightning_matrix import names_that_work
from helpers.tiny_training import (
    BATCHES_PER_EPOCH,
    RESUMING_SAYS,
    TRUSTED,
    BoringModule,
    Snapshot,
    differing,
    images_and_targets,
    make_trainer,
    quick,
    state_of,
)
from lightning.pytorch import callbacks
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_convbn import measure_memory

pytestmark = [
    *RESUMING_SAYS,
    pytest.mark.filterwarnings(r"ignore:.*fit\(ckpt_path="),
]

EPOCHS = 3
DRIFT = 10 * BACKWARD  # of the losses and the weights: the errors of nine steps' gradients add up


class Filtering(BoringModule):
    """Is trained in float64, where no rounding moves a choice. Its optimizer starts with what is not frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.double()  # not by Lightning: pruned weights are no parameters, and it would leave them in float32

    def step(self, stage: str, batch: list[Tensor]) -> Tensor:
        return super().step(stage, [tensor.double() for tensor in batch])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        wanted = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.SGD(wanted, lr=self.learning_rate, momentum=0.9)


def pruned() -> Any:
    layers = [("stem", 0), ("middle", 0)]

    class Prunes(callbacks.ModelPruning):
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            self._parameters_to_prune = [
                (pl_module.get_submodule(f"backbone.{part}.{index}"), "weight") for part, index in layers
            ]
            super().setup(trainer, pl_module, stage)

    return Prunes("l1_unstructured", amount=0.3, parameter_names=["weight"])


def scheduled() -> Any:
    """The FinetuningScheduler of PyPI's finetuning-scheduler, with the schedule that it makes by itself."""
    package = importlib.import_module("finetuning_scheduler")
    stopping, saving = package.FTSEarlyStopping("loss", patience=1), package.FTSCheckpoint(monitor="loss")
    return [package.FinetuningScheduler(max_depth=1), stopping, saving]


OTHERS: dict[str, Callable[[], Any]] = {
    "BackboneFinetuning": lambda: callbacks.BackboneFinetuning(unfreeze_backbone_at_epoch=1),
    "EarlyStopping": lambda: callbacks.EarlyStopping("loss", patience=10),
    "FinetuningScheduler": scheduled,
    "GradientAccumulationScheduler": lambda: callbacks.GradientAccumulationScheduler({0: 1, 1: 2}),
    "LearningRateMonitor": lambda: callbacks.LearningRateMonitor(),
    "ModelCheckpoint": lambda: callbacks.ModelCheckpoint(monitor="loss", save_last=True),
    "ModelPruning": pruned,
    "OnExceptionCheckpoint": lambda: callbacks.OnExceptionCheckpoint("."),
    "RichModelSummary": lambda: callbacks.RichModelSummary(),
    "RichProgressBar": lambda: callbacks.RichProgressBar(),
    "Timer": lambda: callbacks.Timer(duration={"hours": 1}),
    "TQDMProgressBar": lambda: callbacks.TQDMProgressBar(),
    "WeightAveraging": lambda: callbacks.WeightAveraging(),
    "EMAWeightAveraging": lambda: callbacks.EMAWeightAveraging(decay=0.5),
}
SINCE_2_6 = {"WeightAveraging", "EMAWeightAveraging"}


def fit(mode: Any, name: str, ours_first: bool, folder: Path) -> tuple[Filtering, Any]:
    module = Filtering()
    ours, others = quick(mode, eval_mode="eval" if mode == "eval" else "deploy"), OTHERS[name]()
    others = others if isinstance(others, list) else [others]
    trainer = make_trainer(
        *([ours, *others] if ours_first else [*others, ours]),
        max_epochs=EPOCHS,
        default_root_dir=folder,
        enable_checkpointing=True,
        enable_model_summary="Summary" in name,
        enable_progress_bar="ProgressBar" in name,
        logger=name == "LearningRateMonitor" and importlib.import_module("lightning.pytorch.loggers").CSVLogger(folder),
    )
    trainer.fit(module)
    return module, trainer


@pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist")
@pytest.mark.parametrize("ours_first", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", OTHERS)
def test_a_run_with_another_callback_is_evals(
    name: str, ours_first: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses in training and validation, and the weights; whichever of the two callbacks is given first."""
    if name in SINCE_2_6 and not hasattr(callbacks, name):
        pytest.skip(f"{name} is new in Lightning 2.6")
    monkeypatch.chdir(tmp_path)
    frozen, _ = fit("eval", name, ours_first, tmp_path / "eval")
    plain = Snapshot.of(Filtering())
    tuned, _ = fit("tune", name, ours_first, tmp_path / "tune")
    assert set(tuned.modes["fit"]) == {"tune"}
    assert set(tuned.modes["validate"]) == {"deploy"}
    assert len(tuned.losses["fit"]) >= EPOCHS * BATCHES_PER_EPOCH
    for stage in ("fit", "validate"):
        assert tuned.losses[stage] == pytest.approx(frozen.losses[stage], rel=DRIFT)
    torch.testing.assert_close(state_of(tuned), state_of(frozen), rtol=DRIFT, atol=DRIFT)
    after = Snapshot.of(tuned)
    assert (after.classes, after.tensors) == (plain.classes, plain.tensors) or name == "ModelPruning"


# -------------------------------------------------------------------------------------------------- batch size


class Limited(BoringModule):
    """Runs out of memory, as a GPU would, where a batch keeps more bytes for the backward pass than there are."""

    batch_size = 1
    limit = 0

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(images_and_targets(batches=32).dataset, batch_size=self.batch_size)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        kept = measure_memory(self.backbone, batch[0], mode=self.modes["fit"][-1]).saved_bytes
        if kept > self.limit:
            raise RuntimeError("CUDA out of memory.")
        return loss


@pytest.mark.filterwarnings("ignore:The number of training batches")
@pytest.mark.parametrize("search", ["power", pytest.param("binsearch", marks=pytest.mark.slow)])
def test_the_finder_reaches_a_larger_batch_in_tune_mode(tmp_path: Path, search: Any) -> None:
    """Under one limit in bytes, which 12 images reach in Eval mode."""
    images = torch.zeros(12, 3, 8, 8)
    limit = measure_memory(BoringModule().backbone, images, mode="eval").saved_bytes
    found = {}
    for mode in ("eval", "tune"):
        module = Limited()
        module.limit = limit
        finder = callbacks.BatchSizeFinder(search, steps_per_trial=1, max_trials=6)
        options = {"default_root_dir": tmp_path, "limit_train_batches": 1, "limit_val_batches": 0}
        make_trainer(quick(mode, verify=False), finder, **options).fit(module)
        found[mode] = module.batch_size
        kept = measure_memory(module.backbone, torch.zeros(found[mode], 3, 8, 8), mode=mode).saved_bytes
        assert kept <= limit
    assert found["tune"] > found["eval"]
    assert found["eval"] in {"power": [8], "binsearch": [11, 12]}[search]  # the search of Lightning 2.6 stops one short


# --------------------------------------------------------------------------------------------- after an exception


class Breaks(Filtering):
    """Fails when the second epoch starts."""

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            raise RuntimeError("a disk is unplugged")


def test_a_checkpoint_after_an_exception_is_plain_and_the_run_goes_on_from_it(tmp_path: Path) -> None:
    """With the weights of that moment, and as it goes on in Eval mode."""
    losses = []
    for mode in ("eval", "tune"):
        broken, resumed = Breaks(), Filtering()
        saving = callbacks.OnExceptionCheckpoint(tmp_path / mode)
        options = {"max_epochs": EPOCHS}
        with pytest.raises(RuntimeError, match="a disk is unplugged"):
            make_trainer(quick(mode), saving, enable_checkpointing=True, **options).fit(broken)
        path = tmp_path / mode / "on_exception.ckpt"
        assert differing(torch.load(path, weights_only=False)["state_dict"], state_of(broken)) == []
        make_trainer(quick(mode), **options).fit(resumed, ckpt_path=path, **TRUSTED)
        assert set(resumed.modes["fit"]) == {mode}
        losses.append(resumed.losses["fit"])
    assert losses[1] == pytest.approx(losses[0], rel=DRIFT)


# -------------------------------------------------------------------------------------------------- hooks of users


def test_hooks_on_layers_of_pairs_see_what_they_see_in_eval_mode() -> None:
    """A pair runs unfolded where a hook sees what passes in it, and the first batch says so."""
    seen: dict[str, list[Tensor]] = {}
    for mode in ("eval", "tune"):
        module = BoringModule()
        for name in ("backbone.stem.0", "backbone.middle.1", "backbone.lone"):
            hooked, values = module.get_submodule(name), seen.setdefault(f"{mode} {name}", [])
            hooked.register_forward_hook(lambda module, args, output, values=values: values.append(output.detach()))
        if mode == "tune":
            with pytest.warns(UserWarning, match=r"`backbone.stem.1` goes back to Eval mode: it .* has a hook"):
                make_trainer(quick("tune", eval_mode="eval"), precision="64-true").fit(module)
        else:
            make_trainer(quick("eval", eval_mode="eval"), precision="64-true").fit(module)
    for name in ("backbone.stem.0", "backbone.middle.1", "backbone.lone"):
        assert_close(seen[f"tune {name}"], seen[f"eval {name}"], 1e-9)


def test_the_docs_name_every_callback() -> None:
    assert names_that_work() >= {*OTHERS}
