"""What others do to the model during a run: change it, copy it, hide parts of it, fail."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.comparing import assert_close
from helpers.tiny_training import (
    BATCHES_PER_EPOCH,
    LIGHTNING_SAYS,
    Backbone,
    BoringModule,
    FindsBatchSize,
    PrintedLines,
    Snapshot,
    conv_bn,
    make_trainer,
    pretend_trained,
    quick,
)
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder, Timer
from torch import Tensor, nn
from torch.ao import quantization

from lightning_convbn import ConvBNModeCallback, find_conv_bn_pairs, get_mode
from lightning_convbn.pairs import reasons
from lightning_convbn.trainer import report
from lightning_convbn.trainer.converted_part import ConvertedPart

pytestmark = [
    *LIGHTNING_SAYS,
    pytest.mark.filterwarnings(r"ignore:(?s).*torch.ao.quantization is deprecated"),
    pytest.mark.filterwarnings("ignore:Please use quant_min and quant_max"),
    pytest.mark.filterwarnings("ignore:.*reduce_range will be deprecated"),
]


class InHook(Callback):
    """Does something to the LightningModule, once, in one hook."""

    def __init__(self, hook: str, act: Callable[[Any], Any], *, epoch: int = 0) -> None:
        self.acted = False

        def called(trainer: Any, module: Any, *args: Any, **kwargs: Any) -> None:
            if not self.acted and trainer.current_epoch >= epoch:
                self.acted = True
                act(module)

        setattr(self, hook, called)


def in_own_hook(
    module: BoringModule, hook: str, act: Callable[[Any], Any], when: Callable[[], bool] = lambda: True
) -> None:
    acted = []

    def called(*args: Any, **kwargs: Any) -> None:
        if not acted and when():
            acted.append(hook)
            act(module)

    setattr(module, hook, called)


def prepare_qat(module: Any) -> None:
    module.backbone.train()
    module.backbone.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    quantization.prepare_qat(module.backbone, inplace=True)


def quantised(model: nn.Module) -> int:
    return sum(type(module) is torch.ao.nn.qat.Conv2d for module in model.modules())


@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.parametrize(("hook", "epoch"), [("setup", 0), ("on_train_start", 0), ("on_train_epoch_start", 1)])
def test_another_callback_quantises_every_convolution(hook: str, epoch: int, ours_first: bool) -> None:
    """``prepare_qat`` knows modules by their exact class, so it needs plain ones."""
    module, other = BoringModule(), InHook(hook, prepare_qat, epoch=epoch)
    make_trainer(*([quick(), other] if ours_first else [other, quick()]), max_epochs=2).fit(module)
    assert quantised(module) == 3
    assert module.modes["fit"][-1] == "tune"  # its BatchNorms are frozen, and not folded
    assert get_mode(module) == "train"


@pytest.mark.parametrize("hook", ["setup", "on_train_epoch_start"])
def test_the_module_itself_quantises_every_convolution(hook: str) -> None:
    module = BoringModule()
    in_own_hook(module, hook, prepare_qat)
    make_trainer(quick(), num_sanity_val_steps=1).fit(module)
    assert quantised(module) == 3


@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_epoch_start"])
def test_after_a_finder_the_module_itself_can_quantise(tmp_path: Path, hook: str) -> None:
    """The finder's trials have these hooks, too, so the module waits until they are over."""
    module = FindsBatchSize()

    def quantise(module: Any) -> None:
        assert get_mode(module) == "train"
        prepare_qat(module)

    in_own_hook(module, hook, quantise, when=lambda: bool(module.trainer.callbacks))
    finder = BatchSizeFinder(max_trials=2, steps_per_trial=2)
    make_trainer(finder, quick(), default_root_dir=tmp_path).fit(module)
    assert quantised(module) == 3
    assert "on_fit_start" not in vars(finder)


@pytest.mark.parametrize("stage", ["fit", "predict"])
@pytest.mark.parametrize("error", [None, RuntimeError("boom")])
def test_after_a_run_the_list_of_callbacks_is_what_it_was(stage: str, error: Exception | None) -> None:
    """The same list, with the same callbacks in the same order; also after a run that has failed."""
    module = BoringModule()
    trainer = make_trainer(LearningRateFinder(num_training_steps=2), quick(), Timer(), PrintedLines())
    if stage != "fit" or error is not None:  # a finder's failure leaves Lightning without its callbacks
        del trainer.callbacks[0]
    found, before = trainer.callbacks, [*trainer.callbacks]
    if error is None:
        getattr(trainer, stage)(module)
    else:
        step = {"fit": "training_step", "predict": "predict_step"}[stage]
        in_own_hook(module, step, lambda module: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            getattr(trainer, stage)(module)
    assert trainer.callbacks is found
    assert trainer.callbacks == before


def test_callbacks_that_come_and_go_during_a_run_are_not_brought_back() -> None:
    ours, leaves, comes = quick(), Timer(), Callback()

    def change(module: Any) -> None:
        module.trainer.callbacks.remove(leaves)
        module.trainer.callbacks.append(comes)

    trainer = make_trainer(ours, leaves, other := InHook("on_train_start", change))
    trainer.fit(BoringModule())
    assert trainer.callbacks == [ours, other, comes]


def test_modules_are_plain_except_while_batches_run() -> None:
    """So that whoever knows modules by their classes can work between epochs."""
    module, seen = BoringModule(), {}
    hooks = ["on_fit_start", "on_train_start", "on_train_epoch_start", "on_train_epoch_end", "on_train_end"]
    hooks += ["on_train_batch_start", "on_train_batch_end", "on_validation_batch_start", "on_validation_end"]
    for hook in hooks:
        setattr(module, hook, lambda *args, hook=hook: seen.setdefault(hook, set()).add(get_mode(module)))
    make_trainer(quick(), max_epochs=2, val_check_interval=2, num_sanity_val_steps=1).fit(module)
    running = {
        "on_train_batch_start": {"tune"},
        "on_train_batch_end": {"tune"},
        "on_validation_batch_start": {"deploy"},
    }
    assert seen == {hook: running.get(hook, {"train"}) for hook in hooks}


# --------------------------------------------------------------------------------------------------------- surgery


def replace(module: Any) -> None:
    """Put a new convolution and a new BatchNorm in the place of two, and a block of others in the place of a third."""
    new = conv_bn(8, 8)
    pretend_trained(new)
    module.backbone.stem[1] = new[1]
    module.backbone.middle[0] = new[0]
    module.backbone.last = nn.Sequential(*conv_bn(8, 8)[:2], nn.Dropout(0.0), nn.ReLU())
    pretend_trained(module.backbone.last)
    module.backbone.to(module.head.weight.dtype)


@pytest.mark.parametrize(
    ("hook", "ours_first"),
    [("on_train_epoch_start", True), ("on_train_batch_start", False), ("on_train_batch_end", True)],
)
def test_pairs_are_found_anew_after_modules_were_replaced(hook: str, ours_first: bool) -> None:
    """In the middle of a run, which goes on as that of Eval mode, and is verified again."""
    losses, table = [], ""
    for mode in ("eval", "tune"):
        torch.manual_seed(0)
        module, lines = BoringModule(), PrintedLines()
        other = InHook(hook, replace, epoch=1)
        callbacks = [quick(mode), other][:: 1 if ours_first else -1]
        make_trainer(*callbacks, lines, max_epochs=3, precision="64-true").fit(module)
        losses.append(module.losses["fit"])
        table = lines.text
        assert get_mode(module) == "train"
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)
    assert len(losses[1]) == 3 * BATCHES_PER_EPOCH
    assert table.count("folded         3 of 4 BatchNorms") == 2
    assert table.count("verified: Tune equals Eval") == 2


def test_a_new_norm_that_was_never_trained_stays_in_train_mode() -> None:
    """As one that was there from the start. An old one that was named untrained stays named."""
    module = BoringModule()
    module.backbone.middle[1].reset_running_stats()

    def add(module: Any) -> None:
        module.backbone.last[1] = nn.BatchNorm2d(8)

    with pytest.warns(UserWarning, match="stay in Train mode") as warned:
        make_trainer(quick(), InHook("on_train_epoch_start", add, epoch=1), max_epochs=2).fit(module)
    told = [str(warning.message) for warning in warned if "Train mode" in str(warning.message)]
    assert ["1 BatchNorm(s)" in told[0], "2 BatchNorm(s)" in told[1]] == [True, True]
    assert all(bool(bn.running_mean.any()) for bn in (module.backbone.middle[1], module.backbone.last[1]))


def forget_statistics(module: Any) -> None:
    """Let a BatchNorm normalise by the statistics of the batch from now on, as test-time adaptation does."""
    module.backbone.middle[1].running_mean = module.backbone.middle[1].running_var = None


@pytest.mark.parametrize("hook", ["on_train_epoch_start", "on_train_batch_end", "on_validation_end"])
def test_pairs_are_found_anew_after_statistics_were_taken_away(hook: str) -> None:
    """Such a BatchNorm runs plain from then on, in training and in evaluation."""
    losses = []
    for mode in ("eval", "tune"):
        module, lines = BoringModule(), PrintedLines()
        other, options = InHook(hook, forget_statistics), {"max_epochs": 2, "precision": "64-true"}
        make_trainer(quick(mode, eval_mode="eval"), other, lines, **options).fit(module)
        losses.append([module.losses["fit"], module.losses["validate"]])
        assert "has no running statistics, so it always normalises with the batch's: middle.1" in lines.text
    assert torch.tensor(losses[1][0]).allclose(torch.tensor(losses[0][0]), rtol=1e-6)
    assert losses[1][1] == pytest.approx(losses[0][1], rel=1e-6)


def test_statistics_that_are_given_back_are_frozen_again() -> None:
    module, lines, statistics = BoringModule(), PrintedLines(), torch.ones(8)
    forget_statistics(module)

    def give(module: Any) -> None:
        module.backbone.middle[1].running_mean, module.backbone.middle[1].running_var = statistics, 2 * statistics

    make_trainer(quick(), InHook("on_train_epoch_start", give, epoch=1), lines, max_epochs=2).fit(module)
    assert "folded         2 of 4 BatchNorms" in lines.text
    assert "folded         3 of 4 BatchNorms" in lines.text
    assert torch.equal(module.backbone.middle[1].running_mean, statistics)


def is_plain(model: nn.Module) -> bool:
    return get_mode(model) == "train" and "convbn=" not in str(model)


@pytest.mark.parametrize("error", [None, RuntimeError("boom")])
@pytest.mark.parametrize("hook", ["training_step", "on_validation_start"])
def test_what_was_moved_out_of_the_tree_is_restored_too(hook: str, error: Exception | None) -> None:
    """And the error that ends the run is the one that the user sees."""
    module, kept = BoringModule(), []
    forward = getattr(module, hook, None)

    def moving(*args: Any, **kwargs: Any) -> Any:
        if not kept:
            kept.extend([module.backbone.stem, module.backbone.last[1]])
            module.backbone.stem, module.backbone.last[1] = conv_bn(3, 8), nn.Identity()
        if error is not None:
            raise error
        return forward(*args, **kwargs)

    setattr(module, hook, moving)
    trainer = make_trainer(quick(verify=False), max_epochs=2)
    if error is None:
        trainer.fit(module)
    else:
        with pytest.raises(RuntimeError, match="boom"):
            trainer.fit(module)
    assert all(is_plain(each) for each in (module, *kept))


def test_an_error_in_restoring_does_not_hide_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    module = BoringModule()

    def failing(self: Any) -> None:
        raise TypeError("object layout differs")

    def step(*args: Any) -> None:
        monkeypatch.setattr(ConvertedPart, "restore", failing)
        raise RuntimeError("boom")

    module.training_step = step
    trainer = make_trainer(quick())
    with (
        pytest.warns(UserWarning, match="could not be made plain again; .* TypeError: object layout differs"),
        pytest.raises(RuntimeError, match="boom"),
    ):
        trainer.fit(module)


# ---------------------------------------------------------------------------------------------------------- copies


def pickled(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    return pickle.loads(pickle.dumps(model)) and torch.load(io.BytesIO(file.getvalue()), weights_only=False)


@pytest.mark.parametrize(
    ("hook", "way"),
    [
        ("on_train_batch_start", copy.deepcopy),
        ("training_step", pickled),
        ("on_train_batch_end", copy.deepcopy),
        ("on_validation_start", pickled),
    ],
)
def test_a_copy_made_in_the_middle_of_a_run_is_plain(hook: str, way: Callable[[Any], Any]) -> None:
    """Also before the forward that the first batch is watched by, of which a copy must know nothing."""
    module, copies = BoringModule(), []
    own = getattr(module, hook, None)

    def copying(*args: Any) -> Any:
        copies.append((way(module.backbone), copy.deepcopy(module.backbone.state_dict())))
        copies[-1][0](args[0][0] if args and isinstance(args[0], list) else torch.randn(2, 3, 8, 8))
        return own(*args)

    setattr(module, hook, copying)
    lines = PrintedLines()
    make_trainer(quick(), lines, max_epochs=2).fit(module)
    assert lines.text.count("verified: Tune equals Eval") == 1
    plain, images = Backbone().eval(), torch.randn(2, 3, 8, 8)
    for copied, state in copies:
        plain.load_state_dict(state)
        assert is_plain(copied)
        assert "lightning_convbn" not in str(pickle.dumps(copied))
        assert not any(bn.training for bn in copied.modules() if isinstance(bn, nn.BatchNorm2d))
        assert_close([copied(images)], [plain(images)], 1e-5)


# ---------------------------------------------------------------------------------------------- one thing, said once


class TwoNames(BoringModule):
    """Has its encoder under two attributes, and within a third."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = self.backbone
        del self.backbone
        self.same = self.encoder
        self.wrapped = nn.Sequential(self.encoder, self.head)

    def forward(self, images: Tensor) -> Tensor:
        return self.wrapped(images)


def test_an_encoder_under_several_names_is_one_part() -> None:
    module, lines = TwoNames(), PrintedLines()
    before = Snapshot.of(module)
    make_trainer(ConvBNModeCallback(), lines).fit(module)
    assert lines.text.count("trains in Tune mode") == 1
    assert "`wrapped` trains in Tune mode" in lines.text
    assert Snapshot.of(module) == before


def test_targets_that_are_one_module_are_one_part() -> None:
    module, lines = TwoNames(), PrintedLines()
    make_trainer(ConvBNModeCallback(target=["same", "encoder"]), lines).fit(module)
    assert lines.text.count("trains in Tune mode") == 1
    trainer = make_trainer(quick(target=["encoder", "wrapped"]))
    with pytest.raises(ValueError, match="'encoder' lies within 'wrapped'; name one of them"):
        trainer.fit(module)


def test_one_cause_is_one_warning(recwarn: pytest.WarningsRecorder) -> None:
    """However many pairs it concerns, and whatever numbers it names."""
    part, found = ConvertedPart("backbone", Backbone()), report.Findings()
    names = [pair.bn for pair in find_conv_bn_pairs(Backbone())]
    part.wrong = {name: reasons.CHANGED_OUTPUT.format(deviation=10.0**-index) for index, name in enumerate(names)}
    part.wrong["lone"] = "something else"
    report.warn_about(part, found)
    assert [str(warning.message) for warning in recwarn] == [
        "ConvBN: `backbone.stem.1` and 2 more BatchNorms go back to Eval mode: folded, it changed the output by "
        "1.0e+00",
        "ConvBN: `backbone.lone` goes back to Eval mode: something else",
    ]
