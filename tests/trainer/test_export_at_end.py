"""The export at the end of a fit: the right network with the right weights, and nothing that a run has to fear."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.comparing import assert_close
from helpers.networks import images
from helpers.tiny_training import (
    LIGHTNING_SAYS,
    TRUSTED,
    BoringModule,
    PeekingBackbone,
    Snapshot,
    differing,
    images_and_targets,
    make_trainer,
    quick,
    state_of,
)
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_convbn import ConvBNModeCallback, fuse_for_deploy

pytestmark = [
    *LIGHTNING_SAYS,
    pytest.mark.filterwarnings(r"ignore:Checkpoint directory .* exists and is not empty"),
]


def fit(module: Any, path: Path, *callbacks: Any, **options: Any) -> Any:
    arguments = {name: options.pop(name) for name in ("mode", "target", "eval_mode") if name in options}
    trainer = make_trainer(quick(export_path=path, **arguments), *callbacks, **options)
    trainer.fit(module)
    return trainer


def exported(path: Path) -> dict[str, Tensor]:
    return torch.load(path, weights_only=True)


def assert_holds(path: Path, module: nn.Module) -> None:
    """Whether a file of weights holds a module's Deploy copy."""
    expected = fuse_for_deploy(module).state_dict()
    found = exported(path)
    assert found.keys() == expected.keys()
    assert_close([*found.values()], [*expected.values()], 1e-6)


@pytest.mark.parametrize("mode", ["train", "tune"])
def test_the_last_weights_are_exported_without_a_best_checkpoint(
    mode: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module, path = BoringModule(), tmp_path / "model.pt"
    caplog.set_level(logging.INFO)
    fit(module, path, ModelCheckpoint(tmp_path / "checkpoints"), mode=mode, enable_checkpointing=True)
    assert f"exported BoringModule with the last weights, to {path}" in caplog.text
    assert_holds(path, module)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["checkpoints", "model.pt"]


class WorseEveryEpoch(BoringModule):
    """Whose monitored loss is best after the first epoch."""

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("loss", float(self.current_epoch))


def test_the_best_checkpoint_is_exported_if_there_is_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module, path = WorseEveryEpoch(), tmp_path / "model.pt"
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", monitor="loss")
    caplog.set_level(logging.INFO)
    fit(module, path, saving, enable_checkpointing=True, max_epochs=3)
    assert saving.best_model_path.endswith("epoch=0.ckpt")
    assert f"with the best checkpoint, {saving.best_model_path}, to {path}" in caplog.text
    best = WorseEveryEpoch.load_from_checkpoint(saving.best_model_path, **TRUSTED)
    assert_holds(path, best)
    with pytest.raises(AssertionError):
        assert_holds(path, module)


class WithAFolder(WorseEveryEpoch):
    """Whose hyperparameters are no plain values."""

    def __init__(self, folder: Path = Path()) -> None:
        super().__init__()
        self.save_hyperparameters()


def test_a_best_checkpoint_of_this_run_may_hold_any_object(tmp_path: Path) -> None:
    module, path = WithAFolder(tmp_path), tmp_path / "model.pt"
    saving = ModelCheckpoint(tmp_path, monitor="loss")
    fit(module, path, saving, enable_checkpointing=True)
    assert_holds(path, WithAFolder.load_from_checkpoint(saving.best_model_path, **TRUSTED))


class Command:
    """Writes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.file}",)


@pytest.mark.filterwarnings("ignore:.*(dirpath has changed|when using `ckpt_path`)")
def test_a_command_in_the_best_checkpoint_that_a_resumed_run_is_told_of_is_not_run(tmp_path: Path) -> None:
    """A checkpoint names the best one. Whoever gives you the first may have written both."""
    saving = ModelCheckpoint(tmp_path, filename="first", monitor="loss")
    make_trainer(saving, enable_checkpointing=True).fit(WorseEveryEpoch())
    stranger = torch.load(tmp_path / "first.ckpt", weights_only=True)
    torch.save({**stranger, "more": Command(tmp_path / "written")}, tmp_path / "best.ckpt")
    for state in stranger["callbacks"].values():
        state["best_model_path"] = str(tmp_path / "best.ckpt")
    torch.save(stranger, tmp_path / "stranger.ckpt")
    trainer = make_trainer(quick(export_path=tmp_path / "model.pt"), saving, enable_checkpointing=True, max_epochs=2)
    message = r"best.ckpt holds a `posix.system`; only weights .* This run was resumed from .*stranger\.ckpt"
    with pytest.warns(UserWarning, match=rf"nothing was exported.*{message}"):
        trainer.fit(WorseEveryEpoch(), ckpt_path=tmp_path / "stranger.ckpt")
    assert not (tmp_path / "written").exists()
    assert not (tmp_path / "model.pt").exists()


def test_the_best_checkpoint_of_a_resumed_run_is_exported(tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path, monitor="loss")
    make_trainer(saving, enable_checkpointing=True).fit(WorseEveryEpoch())
    path, module = tmp_path / "model.pt", WorseEveryEpoch()
    trainer = make_trainer(quick(export_path=path), saving, enable_checkpointing=True, max_epochs=2)
    trainer.fit(module, ckpt_path=saving.best_model_path)
    assert_holds(path, WorseEveryEpoch.load_from_checkpoint(saving.best_model_path))


class NoForward(LightningModule):
    """What BoringModule is, without a forward: its steps call the parts."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        module = BoringModule()
        self.backbone, self.head = module.backbone, module.head
        for name, part in parts.items():
            setattr(self, name, part)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.head(self.backbone(batch[0])).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)

    def train_dataloader(self) -> Any:
        return images_and_targets()


def test_without_a_forward_the_target_is_exported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module, path = NoForward(), tmp_path / "model.pt"
    caplog.set_level(logging.INFO)
    fit(module, path)
    assert f"exported `backbone` with the last weights, to {path}" in caplog.text
    assert_holds(path, module.backbone)


def test_what_is_exported_is_recorded_before_the_looks_at_it(tmp_path: Path) -> None:
    """The target is what is exported, and to count what it keeps it is called on tensors without data."""
    module, path = NoForward(), tmp_path / "model.pt"
    make_trainer(ConvBNModeCallback(export_path=path)).fit(module)
    assert_holds(path, module.backbone)


class ManyImages(BoringModule):
    """Takes a list of images, as detectors do."""

    def forward(self, images: list[Tensor]) -> Tensor:
        return super().forward(torch.stack(list(images)))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self([*batch[0]]).square().mean()

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self([*batch[0]])


def test_images_in_a_list_are_no_batch(tmp_path: Path) -> None:
    """Their first dimension is the channels'."""
    module, path = ManyImages(), tmp_path / "model.pt2"
    fit(module, path)
    pictures = [*images(2, 3, 8, 8)]
    assert_close([torch.export.load(path).module()(pictures)], [module.eval()(pictures)], 1e-5)


class ParentOfParts(BoringModule):
    """Whose training does not use its forward."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.head(self.backbone(batch[0])).square().mean()


def test_a_forward_that_training_does_not_use_needs_an_example(tmp_path: Path) -> None:
    module, path = ParentOfParts(), tmp_path / "model.pt"
    before = state_of(module)
    found = Snapshot.of(module)
    with pytest.raises(
        ValueError, match=r"did not pass through the forward of ParentOfParts.*`example_input_array` in"
    ):
        fit(module, path, max_epochs=100)
    assert Snapshot.of(module) == found
    assert len(differing(before, state_of(module))) > 0, "it was noticed after the first batch"
    assert not [*tmp_path.iterdir()]
    module.example_input_array = images(2, 3, 8, 8)
    fit(module, path)
    assert_holds(path, module)


@pytest.mark.parametrize("example", [(images(1, 3, 8, 8),), {"images": images(1, 3, 8, 8)}])
def test_the_example_may_be_given_in_all_of_lightnings_ways(example: Any, tmp_path: Path) -> None:
    module = ParentOfParts()
    module.example_input_array = example
    fit(module, tmp_path / "model.pt2")
    assert_close(
        [torch.export.load(tmp_path / "model.pt2").module()(images(3, 3, 8, 8))],
        [module.eval()(images(3, 3, 8, 8))],
        1e-5,
    )


@pytest.mark.filterwarnings("ignore:.*(LeafSpec|distributed|process group|find_unused|TCPStore)")
def test_under_ddp_the_example_is_what_forward_gets(tmp_path: Path) -> None:
    """DDP calls the training step in the place of the LightningModule's forward."""
    module, path = BoringModule(), tmp_path / "model.pt2"
    fit(module, path, strategy="ddp")
    torch.distributed.destroy_process_group()  # Lightning keeps it for the next fit
    outputs = [torch.export.load(path).module()(images(3, 3, 8, 8))]
    assert_close(outputs, [module.eval()(images(3, 3, 8, 8))], 1e-5)


def test_a_pair_that_is_found_wrong_is_not_folded(tmp_path: Path) -> None:
    """A hook reads what the convolution puts out. Tracing does not see it; the first batch shows it."""
    module, path = BoringModule(PeekingBackbone), tmp_path / "model.pt"
    make_trainer(quick(export_path=path, target="backbone")).fit(module)
    assert "backbone.last.1.running_mean" in exported(path)
    assert "backbone.middle.1.running_mean" not in exported(path)


# ------------------------------------------------------------------------------------------- refused before training


def test_what_cannot_be_written_is_refused_before_training(tmp_path: Path) -> None:
    module = BoringModule()
    before = Snapshot.of(module)
    with pytest.raises(ValueError, match=r"export_path='.*': there is no folder '.*missing'; make it first"):
        fit(module, tmp_path / "missing" / "model.onnx")
    assert module.modes == {}
    assert Snapshot.of(module) == before


@pytest.mark.parametrize("target", [None, ["backbone", "other"]])
def test_several_parts_without_a_forward_are_refused(target: Any, tmp_path: Path) -> None:
    module = NoForward(other=nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    if target is None:  # every child with a BatchNorm is one
        module.encoder = module._modules.pop("backbone")
    message = r"NoForward has no forward that says what to export; define one, or name a single part with target=\.\.\."
    with pytest.raises(ValueError, match=message):
        fit(module, tmp_path / "model.pt", target=target)


def test_sharded_weights_are_refused(tmp_path: Path) -> None:
    callback = quick(export_path=tmp_path / "model.pt")
    trainer = make_trainer(callback)
    trainer.strategy.__class__ = type("FSDPStrategy", (type(trainer.strategy),), {})
    with pytest.raises(ValueError, match="FSDPStrategy shards the weights; call export on a consolidated checkpoint"):
        trainer.fit(BoringModule())


def test_an_argument_by_keyword_only_is_refused(tmp_path: Path) -> None:
    class KeywordOnly(BoringModule):
        def forward(self, *, images: Tensor) -> Tensor:
            return super().forward(images)

        def step(self, stage: str, batch: list[Tensor]) -> Tensor:
            return self(images=batch[0]).square().mean()

    with pytest.raises(ValueError, match="the forward of KeywordOnly takes images by keyword only"):
        fit(KeywordOnly(), tmp_path / "model.pt")


# ------------------------------------------------------------------------------------------------ the run is unharmed


@pytest.mark.parametrize("where", ["os.replace", "torch.save"])
def test_a_failing_export_leaves_the_run_and_the_old_file_as_they_are(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = BoringModule()
    make_trainer(quick()).fit(plain)

    def fail(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path, module = tmp_path / "model.pt", BoringModule()
    path.write_bytes(b"an older file")
    found = Snapshot.of(module)
    monkeypatch.setattr(where, fail)
    with pytest.warns(UserWarning, match=r"export_path='.*': nothing was exported\. Weights and .*No space left"):
        trainer = fit(module, path)
    monkeypatch.undo()
    assert trainer.state.finished
    assert path.read_bytes() == b"an older file"
    assert [*tmp_path.iterdir()] == [path]
    assert Snapshot.of(module) == found
    assert differing(state_of(plain), state_of(module)) == []
    fit(module, path)
    assert_holds(path, module)


def test_an_export_changes_neither_training_nor_what_is_random_after_it(tmp_path: Path) -> None:
    results = []
    for path in (None, tmp_path / "model.pt2"):
        torch.manual_seed(3)
        module = BoringModule()
        module.shuffle = True
        make_trainer(quick(export_path=path), max_epochs=2).fit(module)
        results.append((state_of(module), module.losses, torch.rand(3).tolist(), Snapshot.of(module).hooks))
    assert (tmp_path / "model.pt2").exists()
    assert differing(results[0][0], results[1][0]) == []
    assert results[0][1:] == results[1][1:]


def test_a_fast_dev_run_overwrites_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(b"an older file")
    caplog.set_level(logging.INFO)
    fit(BoringModule(), path, fast_dev_run=True)
    assert "in a fast_dev_run" in caplog.text
    assert path.read_bytes() == b"an older file"


def test_a_fit_without_a_batch_says_that_it_exports_nothing(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="nothing was exported.*not one batch was trained on"):
        fit(BoringModule(), tmp_path / "model.pt", limit_train_batches=0)
    assert not [*tmp_path.iterdir()]
