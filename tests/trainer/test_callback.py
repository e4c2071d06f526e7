"""What the callback does in runs that go well: modes in force, frozen statistics, targets, verification, logging."""

from __future__ import annotations

import contextlib
import logging
import re
from typing import Any

import lightning.pytorch
import pytest
import pytorch_lightning
from helpers.networks import Net
from helpers.tiny_training import (
    BATCHES_PER_EPOCH,
    LIGHTNING_SAYS,
    Backbone,
    BoringModule,
    BoringSteps,
    OwnNorm,
    PrintedLines,
    Snapshot,
    conv_bn,
    differing,
    half_in_eval,
    make_trainer,
    module_of,
    pretend_trained,
    quick,
    state_of,
    statistics_of,
    with_fresh_norm,
)
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch import Tensor, nn

from lightning_convbn import ConvBNModeCallback
from lightning_convbn.layers import folded as folded_layers
from lightning_convbn.layers import state
from lightning_convbn.trainer.converted_part import ConvertedPart
from lightning_convbn.trainer.report import Findings, describe, sides_of

pytestmark = LIGHTNING_SAYS

# ------------------------------------------------------------------------------------------------ modes in force


@pytest.mark.parametrize(("mode", "eval_mode"), [("train", "tune"), ("eval", "eval"), ("tune", "deploy")])
def test_every_stage_runs_in_its_mode_and_gives_back_the_plain_module(mode: Any, eval_mode: Any) -> None:
    """Validation, test and predict before the fit, test after it, and the fit itself with its sanity check."""
    module = half_in_eval()
    before = Snapshot.of(module)
    trainer = make_trainer(quick(mode, eval_mode=eval_mode), max_epochs=2, num_sanity_val_steps=1)
    for stage in ("validate", "test", "predict", "fit", "test"):
        module.forget()
        getattr(trainer, stage)(module)
        expected = {stage: [eval_mode]}
        if stage == "fit":
            expected = {"sanity": [eval_mode], "fit": [mode] * 2 * BATCHES_PER_EPOCH, "validate": [eval_mode] * 2}
        assert module.modes == expected
        assert Snapshot.of(module) == before, f"after {stage}"


@pytest.mark.parametrize("package", [lightning.pytorch, pytorch_lightning])
def test_runs_in_the_trainers_of_both_packages(package: Any) -> None:
    """One class of callback for ``lightning`` and ``pytorch_lightning``."""

    module = module_of(package)
    before = Snapshot.of(module)
    bar = type("Lines", (PrintedLines, package.callbacks.ProgressBar), {})()
    trainer = make_trainer(quick(), bar, trainer_class=package.Trainer, num_sanity_val_steps=1)
    trainer.fit(module)
    trainer.test(module)
    assert module.modes["fit"] == ["tune"] * BATCHES_PER_EPOCH
    assert module.modes["sanity"] == module.modes["validate"] == module.modes["test"] == ["deploy"]
    assert "verified: Tune equals Eval" in bar.text
    assert Snapshot.of(module) == before


# ------------------------------------------------------------------------------------------------ frozen for good


class CallsTrain(BoringModule):
    """Switches itself to train state, as many a recipe does."""

    def on_train_epoch_start(self) -> None:
        self.train()


@pytest.mark.parametrize("mode", ["eval", "tune"])
def test_statistics_stay_bit_identical_whatever_train_is_called(mode: Any) -> None:
    """Paired and unpaired BatchNorms alike, while the weights do move."""
    module = CallsTrain()
    statistics, state = statistics_of(module), state_of(module)
    make_trainer(quick(mode), max_epochs=2).fit(module)
    assert differing(statistics_of(module), statistics) == []
    assert set(differing(state_of(module), state)) == {name for name, _ in module.named_parameters()}


def test_validation_in_the_middle_of_an_epoch_leaves_training_as_it_was() -> None:
    """Lightning puts flags back past any ``.train()``; with a learning rate of 0 every epoch has the same losses."""
    module = BoringModule()
    module.learning_rate = 0.0
    make_trainer(quick(), max_epochs=2, val_check_interval=1).fit(module)
    first, second = module.losses["fit"][:BATCHES_PER_EPOCH], module.losses["fit"][BATCHES_PER_EPOCH:]
    assert first == second
    assert module.modes["fit"] == ["tune"] * 2 * BATCHES_PER_EPOCH
    assert module.modes["validate"] == ["deploy"] * 2 * BATCHES_PER_EPOCH


def test_validation_sees_the_weights_of_the_moment() -> None:
    """A fold that is kept from one validation to the next would repeat the first loss."""
    tune, plain = BoringModule(), BoringModule()
    make_trainer(quick(), max_epochs=3, precision="64-true").fit(tune)
    make_trainer(quick("eval", eval_mode="eval"), max_epochs=3, precision="64-true").fit(plain)
    assert len(set(tune.losses["validate"])) == 3
    assert tune.losses["validate"] == pytest.approx(plain.losses["validate"], rel=1e-9)


def branching() -> nn.Module:
    """Has an auxiliary output in train state, so that its second pair may be folded in eval state only."""

    def forward(net: Net, images: Tensor) -> Tensor:
        maps = net.conv(net.first(images))
        features = net.bn(maps)
        return (features + maps if net.training else features).mean((2, 3))  # type: ignore[no-any-return]

    net = Net(forward, first=conv_bn(3, 8), conv=nn.Conv2d(8, 8, 1), bn=nn.BatchNorm2d(8))
    pretend_trained(net)
    return net


@pytest.mark.parametrize("val_check_interval", [1, 1.0])
@pytest.mark.parametrize("in_eval_before", [False, True], ids=["train_before", "eval_before"])
def test_what_is_folded_follows_the_state_that_the_module_is_in(
    val_check_interval: float, in_eval_before: bool
) -> None:
    """Training folds what is proven for train state, also after a validation that came in the middle of an epoch."""
    losses = {}
    for mode in ("eval", "tune"):
        module = CallsTrain(branching)
        module.train(not in_eval_before)
        callback = quick(mode, verify=False)
        make_trainer(callback, precision="64-true", val_check_interval=val_check_interval, max_epochs=2).fit(module)
        losses[mode] = module.losses
    assert losses["tune"]["fit"] == pytest.approx(losses["eval"]["fit"], rel=1e-9)
    assert losses["tune"]["validate"] == pytest.approx(losses["eval"]["validate"], rel=1e-9)


# -------------------------------------------------------------------------------- start_epoch, freeze_untrained


class KeepsStatistics(BoringModule):
    """Remembers the running statistics at the start of every epoch."""

    def on_train_epoch_start(self) -> None:
        self.at_start = [*getattr(self, "at_start", []), statistics_of(self)]


@pytest.mark.parametrize("mode", ["eval", "tune"])
def test_before_start_epoch_batchnorm_is_ordinary_and_then_frozen(mode: Any) -> None:
    module = KeepsStatistics()
    before = Snapshot.of(module)
    lines = PrintedLines()
    make_trainer(quick(mode, start_epoch=2), lines, max_epochs=4).fit(module)
    assert module.modes["fit"] == ["train"] * 2 * BATCHES_PER_EPOCH + [mode] * 2 * BATCHES_PER_EPOCH
    assert module.modes["validate"] == ["deploy"] * 4
    zero, one, two, three = module.at_start
    assert set(differing(zero, one)) == set(differing(one, two)) == set(zero)
    assert differing(two, three) == differing(three, statistics_of(module)) == []
    assert lines.text.count("folded") == 1
    assert Snapshot.of(module) == before


def test_a_start_epoch_that_is_never_reached_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="start_epoch=2 is not reached: max_epochs=2 ends this fit before"):
        make_trainer(quick(start_epoch=2), max_epochs=2).fit(BoringModule())


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ({"start_epoch": 1}, {"max_epochs": 2}),
        ({"start_epoch": 1}, {"max_epochs": -1, "max_steps": 1}),
        ({"start_epoch": 1}, {"fast_dev_run": True}),
        ({"start_epoch": 1, "mode": "train"}, {}),
    ],
    ids=str,
)
def test_a_start_epoch_that_may_be_reached_is_not(arguments: dict[str, Any], options: dict[str, Any]) -> None:
    """Nor one that does not matter. Warnings are errors here."""
    make_trainer(quick(**arguments), **options).fit(BoringModule())


def test_an_untrained_batchnorm_stays_in_train_mode_with_a_warning() -> None:
    """Its statistics move, those of the others don't; validation uses its running statistics, folded."""
    module = with_fresh_norm()
    before, statistics = Snapshot.of(module), statistics_of(module)
    lines = PrintedLines()
    with pytest.warns(
        UserWarning, match=r"1 BatchNorm\(s\) of `backbone` stay in Train mode: `middle.1` was never trained"
    ):
        make_trainer(quick(), lines, max_epochs=2).fit(module)
    moved = {f"backbone.middle.1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    assert set(differing(statistics_of(module), statistics)) == moved
    assert module.backbone.middle[1].num_batches_tracked == 2 * BATCHES_PER_EPOCH
    assert "unfrozen       1 (in Train mode)\n" in lines.text
    assert module.modes["validate"] == ["deploy"] * 2
    loss = module.losses["validate"][-1]
    module.forget()
    make_trainer().validate(module)
    assert module.losses["validate"] == [pytest.approx(loss, rel=1e-5)]
    assert Snapshot.of(module) == before


@pytest.mark.filterwarnings(r"ignore:ConvBN. 1 BatchNorm.s. of `backbone` stay in Train mode")
def test_looking_at_the_first_batch_does_not_move_the_statistics_in_train_mode() -> None:
    """The number of batches tracked included, which is what a BatchNorm without momentum averages by."""
    module, expected = with_fresh_norm(), with_fresh_norm()
    make_trainer(ConvBNModeCallback()).fit(module)
    make_trainer(ConvBNModeCallback(verify=False, log_memory=False)).fit(expected)
    assert differing(state_of(module), state_of(expected)) == []


def test_freeze_untrained_freezes_it_too(recwarn: pytest.WarningsRecorder) -> None:
    module = with_fresh_norm()
    statistics = statistics_of(module)
    make_trainer(quick(freeze_untrained=True)).fit(module)
    assert differing(statistics_of(module), statistics) == []
    assert not [warning for warning in recwarn if "never trained" in str(warning.message)]


# ---------------------------------------------------------------------------------------------------------- target


def norms(module: nn.Module, *, converted: bool = False) -> set[str]:
    return {
        name
        for name, child in module.named_modules()
        if isinstance(child, nn.BatchNorm2d) and not (converted and state.state_of(child) is None)
    }


class Parts(BoringSteps, LightningModule):
    """Two parts with BatchNorms in a network that is not called ``backbone``."""

    def __init__(self, *, calls_network: bool = False) -> None:
        super().__init__()
        self.network = nn.Sequential()
        self.network.add_module("neck", conv_bn(3, 3))
        self.network.add_module("encoder", Backbone())
        self.head = nn.Linear(8, 4)
        self.calls_network = calls_network
        pretend_trained(self)
        self.forget()

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.network(images))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Go by forward, or call the network directly, as many do."""
        self.converted = norms(self, converted=True)
        if self.calls_network:
            return (self.head(self.network(batch[0])) - batch[1]).square().mean()
        return self.step("fit", batch)


@pytest.mark.parametrize("calls_network", [False, True], ids=["by_forward", "called_directly"])
def test_without_a_target_every_child_with_a_batchnorm_is_converted(calls_network: bool) -> None:
    """It is verified and counted, whether the LightningModule's forward is called or not."""
    module = Parts(calls_network=calls_network)
    before = Snapshot.of(module)
    lines = PrintedLines()
    make_trainer(ConvBNModeCallback(), lines).fit(module)
    assert module.converted == norms(module)
    assert "ConvBN: `network` trains in Tune mode and is evaluated in Deploy mode" in lines.text
    assert "folded         4 of 5 BatchNorms" in lines.text
    assert "verified: Tune equals Eval" in lines.text
    assert re.search(r"kept for backward: Eval 0\.\d{3} MiB, Tune 0\.\d{3} MiB, ", lines.text)
    assert Snapshot.of(module) == before


def test_without_a_target_a_backbone_alone_is_converted() -> None:
    module = BoringModule()
    module.head = nn.Sequential(module.head, nn.BatchNorm1d(4))
    lines = PrintedLines()
    make_trainer(quick(), lines).fit(module)
    assert "ConvBN: `backbone` trains in Tune mode" in lines.text
    assert module.head[1].num_batches_tracked == BATCHES_PER_EPOCH


def test_without_a_target_a_backbone_without_a_batchnorm_is_passed_over() -> None:
    """The other children that have one are converted."""
    module, lines = BoringModule(lambda: nn.Sequential(nn.Conv2d(3, 3, 1))), PrintedLines()
    module.head = Backbone()
    module.step = lambda stage, batch: module(batch[0]).square().mean()
    make_trainer(quick(), lines).fit(module)
    assert "ConvBN: `head` trains in Tune mode" in lines.text


def test_a_batchnorm_of_the_lightningmodule_itself_is_converted() -> None:
    module = OwnNorm()
    before, statistics = Snapshot.of(module), statistics_of(module)
    lines = PrintedLines()
    make_trainer(quick(), lines).fit(module)
    assert module.modes["fit"] == ["tune"] * BATCHES_PER_EPOCH
    assert "ConvBN: the whole module trains in Tune mode" in lines.text
    assert "folded         2 of 2 BatchNorms" in lines.text
    assert "verified: Tune equals Eval" in lines.text
    assert differing(statistics_of(module), statistics) == []
    assert Snapshot.of(module) == before


@pytest.mark.parametrize(
    ("target", "prefixes"),
    [
        ("network", ["network."]),
        ("network.encoder", ["network.encoder."]),
        (["network.neck"], ["network.neck."]),
        (("network.neck", "network.encoder.stem"), ["network.neck.", "network.encoder.stem."]),
    ],
)
def test_a_target_names_what_is_converted(target: Any, prefixes: list[str]) -> None:
    """One path or several, at any depth; each is verified and reported."""
    module = Parts()
    before = Snapshot.of(module)
    lines = PrintedLines()
    make_trainer(ConvBNModeCallback(target=target), lines).fit(module)
    assert module.converted == {name for name in norms(module) if name.startswith(tuple(prefixes))}
    for prefix in prefixes:
        assert f"ConvBN: `{prefix[:-1]}` trains in Tune mode" in lines.text
    assert lines.text.count("verified: Tune equals Eval") == len(prefixes)
    assert Snapshot.of(module) == before


class SkipsFirstEpoch(BoringModule):
    """Trains from its second epoch on."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """Lightning's way to skip the rest of an epoch."""
        return -1 if self.current_epoch == 0 else None


def test_the_first_batch_is_one_that_is_trained_on() -> None:
    """An epoch that is skipped has none."""
    module, lines = SkipsFirstEpoch(), PrintedLines()
    make_trainer(ConvBNModeCallback(), lines, max_epochs=2).fit(module)
    assert module.modes == {"fit": ["tune"] * BATCHES_PER_EPOCH, "validate": ["deploy"]}
    assert lines.text.count("verified: Tune equals Eval") == 1
    assert "% saved" in lines.text


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({}, "  neither verified nor counted: the first batch did not pass through its forward"),
        ({"log_memory": False}, "  not verified: the first batch did not pass through its forward"),
        ({"verify": False}, "  not counted: the first batch did not pass through its forward"),
        ({"mode": "eval"}, "  not counted: the first batch did not pass through its forward"),
        ({"verify": False, "log_memory": False}, "  unfrozen       0"),
    ],
    ids=str,
)
def test_the_table_says_what_was_asked_for_and_not_done(arguments: dict[str, Any], line: str) -> None:
    module, lines = Parts(), PrintedLines()
    module.spare = conv_bn(3, 3)
    pretend_trained(module)
    warning = pytest.warns(UserWarning, match="folded pairs of `spare` are not verified: .* Set target=")
    with warning if "verified" in line else contextlib.nullcontext():
        make_trainer(ConvBNModeCallback(**arguments, target=["network", "spare"]), lines).fit(module)
    used, spare = lines.text.split("ConvBN: `spare`")
    assert ("verified: Tune equals Eval" in used) == ("verified" in line)
    assert spare.splitlines()[-1] == line
    assert module.converted == norms(module)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            "network.nek",
            r"'network' \(\w+\) has no module 'nek'; did you mean 'network.neck'\? its modules are .*'neck'",
        ),
        ("trunk", r"target='trunk': Parts has no module 'trunk'; its modules are 'network', 'head'"),
        ("head.fc", r"target='head.fc': 'head' \(Linear\) has no module 'fc'; it has no modules"),
        ("head", r"target='head': Linear has no BatchNorm; name the part that has, or leave ConvBNModeCallback out"),
        (["network", "network.neck"], r"target=\['network', 'network.neck'\]: 'network.neck' lies within 'network'"),
    ],
)
def test_a_target_that_does_not_fit_is_refused(target: Any, message: str) -> None:
    """With the module as it was."""
    module = Parts()
    before, state = Snapshot.of(module), state_of(module)
    trainer = make_trainer(quick(target=target))
    with pytest.raises(ValueError, match=message):
        trainer.fit(module)
    assert Snapshot.of(module) == before
    assert differing(state_of(module), state) == []


def test_parts_of_a_like_name_do_not_overlap() -> None:
    module = BoringModule()
    module.backbone.lastly = conv_bn(3, 3)
    pretend_trained(module)
    make_trainer(quick(target=["backbone.last", "backbone.lastly"], verify=False)).fit(module)
    assert module.modes["fit"] == ["tune"] * BATCHES_PER_EPOCH


def test_a_module_without_a_batchnorm_is_refused() -> None:
    module = BoringModule(lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 8)))
    with pytest.raises(ValueError, match="target=None: BoringModule has no BatchNorm"):
        make_trainer(ConvBNModeCallback()).fit(module)
    module = Parts()
    module.network = nn.Sequential(nn.Flatten(), nn.Linear(192, 8))
    with pytest.raises(ValueError, match="target=None: Parts has no BatchNorm"):
        make_trainer(ConvBNModeCallback()).fit(module)


# ------------------------------------------------------------------------------------------------- other arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "deploy"}, r"mode must be one of 'train', 'eval', 'tune'; got 'deploy'\. .*unstable .*: use 'tune'"),
        ({"eval_mode": "train"}, r"eval_mode must be one of 'eval', 'tune', 'deploy'; got 'train'"),
        ({"start_epoch": -1}, r"start_epoch must be an epoch, 0 or later; got -1"),
        ({"recompute": True}, r"recompute must be one of 'none', 'elementwise', 'blocks'; got True"),
        (
            {"export_path": "x.tflite"},
            r"export_path='x\.tflite': the suffix must be one of \.onnx, \.pt2, \.pt, \.safet",
        ),
        ({"target": ["backbone", 3]}, r"target must be one or more attribute paths .*; got \['backbone', 3\]"),
    ],
    ids=str,
)
def test_an_argument_that_cannot_be_used_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConvBNModeCallback(**arguments)


@pytest.mark.parametrize("stage", ["fit", "predict"])
def test_two_callbacks_are_refused(stage: str) -> None:
    module = BoringModule()
    before = Snapshot.of(module)
    trainer = make_trainer(quick(), quick("eval", target="backbone.last"))
    with pytest.raises(ValueError, match=r"callbacks: ConvBNModeCallback is given 2 times; give one, with target=\["):
        getattr(trainer, stage)(module)
    assert Snapshot.of(module) == before


class AveragingOfMyOwn(StochasticWeightAveraging):
    """A subclass is refused as well."""


@pytest.mark.parametrize(
    ("package", "averaging"),
    [
        (lightning.pytorch, StochasticWeightAveraging),
        (lightning.pytorch, AveragingOfMyOwn),
        (pytorch_lightning, pytorch_lightning.callbacks.StochasticWeightAveraging),
    ],
)
def test_stochastic_weight_averaging_is_refused(package: Any, averaging: Any) -> None:
    module = module_of(package)
    before, state = Snapshot.of(module), state_of(module)
    trainer = make_trainer(averaging(swa_lrs=0.1), quick(), trainer_class=package.Trainer)
    with pytest.raises(ValueError, match="callbacks: StochasticWeightAveraging resets .* use WeightAveraging"):
        trainer.fit(module)
    assert Snapshot.of(module) == before
    assert differing(state_of(module), state) == []


# ---------------------------------------------------------------------------------------------------- verification


def deceptive(net: Net, x: Any) -> Any:
    """What ``torch.fx`` sees is a convolution and its BatchNorm; given tensors, it uses the convolution twice."""
    x = net.conv(x)
    return net.bn(x) + x if isinstance(x, Tensor) else net.bn(x)


class DeceptiveBackbone(Backbone):
    """Has one pair more, which must not be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Sequential(conv_bn(8, 8), Net(deceptive, conv=nn.Conv2d(8, 8, 1), bn=nn.BatchNorm2d(8)))
        pretend_trained(self)


def deceived(mode: Any = "tune", **arguments: Any) -> tuple[BoringModule, str]:
    module, lines = BoringModule(DeceptiveBackbone), PrintedLines()
    make_trainer(quick(mode, **arguments), lines, precision="64-true", max_epochs=2).fit(module)
    return module, lines.text


def test_a_pair_whose_convolution_others_read_goes_back_to_eval_mode() -> None:
    """It was right all the time, but a fold is of no use there."""
    with pytest.warns(UserWarning, match=r"`backbone.last.1.bn` goes back to Eval mode: in the first batch") as warned:
        module, table = deceived()
    assert len([warning for warning in warned if "goes back to Eval" in str(warning.message)]) == 1
    assert "folded         3 of 5 BatchNorms" in table
    expected, _ = deceived("eval", eval_mode="eval")
    assert module.losses["fit"] == pytest.approx(expected.losses["fit"], rel=1e-9)
    assert module.losses["validate"] == pytest.approx(expected.losses["validate"], rel=1e-9)


@pytest.mark.parametrize(("mode", "eval_mode"), [("train", "tune"), ("eval", "deploy")])
def test_what_only_validation_folds_is_right_too(mode: Any, eval_mode: Any) -> None:
    module, _ = deceived(mode, eval_mode=eval_mode)
    expected, _ = deceived(mode, eval_mode="eval")
    assert module.losses["validate"] == pytest.approx(expected.losses["validate"], rel=1e-9)


def test_without_verification_the_result_is_evals_too(recwarn: pytest.WarningsRecorder) -> None:
    module, table = deceived(verify=False)
    assert not [warning for warning in recwarn if "goes back to Eval" in str(warning.message)]
    assert "verified" not in table
    assert "folded         4 of 5 BatchNorms" in table
    expected, _ = deceived("eval", eval_mode="eval")
    assert module.losses["fit"] == pytest.approx(expected.losses["fit"], rel=1e-9)


def test_verification_catches_a_wrong_fold_before_it_does_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    """That step and all others give what Eval mode gives."""
    fold = folded_layers.conv_bn

    def wrong(input: Tensor, operands: Any, *options: Any) -> Tensor:
        output = fold(input, operands, *options)
        return output * 1.1 if operands.weight.shape[:2] == (8, 8) else output

    expected, _ = deceived("eval", eval_mode="eval")
    monkeypatch.setattr(folded_layers, "conv_bn", wrong)
    with pytest.warns(
        UserWarning, match="2 more BatchNorms go back to Eval mode: folded, it changed the output by 1.0e-01"
    ):
        module, table = deceived()
    assert "verified: Tune differs from Eval" in table
    assert module.losses["fit"] == pytest.approx(expected.losses["fit"], rel=1e-9)


def losses_of(*callbacks: Any, dropout: float = 0.0, precision: Any = "32-true", epochs: int = 2) -> list[float]:
    lightning.pytorch.seed_everything(3, verbose=False)
    module = BoringModule(lambda: Backbone(dropout))
    module.shuffle = True
    make_trainer(*callbacks, precision=precision, max_epochs=epochs).fit(module)
    return module.losses["fit"]


def test_verification_and_count_leave_the_random_numbers_alone() -> None:
    """With dropout and shuffling the losses are the same bit for bit, whatever is looked at on the way."""
    expected = losses_of(ConvBNModeCallback(verify=False, log_memory=False), dropout=0.5)
    for looks in ({"log_memory": False}, {"verify": False}, {}):
        assert losses_of(ConvBNModeCallback(**looks), dropout=0.5) == expected


def test_the_loss_curve_of_tune_is_evals() -> None:
    """In float64, over 12 steps with momentum."""
    tune, frozen = (losses_of(quick(mode), dropout=0.5, precision="64-true", epochs=4) for mode in ("tune", "eval"))
    assert len(tune) == 4 * BATCHES_PER_EPOCH
    assert len(set(tune)) == len(tune)
    assert tune == pytest.approx(frozen, rel=1e-9)


def test_train_mode_is_the_run_without_the_callback() -> None:
    assert losses_of(quick("train"), dropout=0.5) == losses_of(dropout=0.5)


# --------------------------------------------------------------------------------------------------------- logging


class KeepsGradients(BoringModule):
    """Keeps the gradients of the first step."""

    first: dict[str, Tensor] | None = None

    def on_after_backward(self) -> None:
        if self.first is None:
            assert all(parameter.grad is not None for parameter in self.parameters())
            self.first = {name: parameter.grad.clone() for name, parameter in self.named_parameters()}


def test_mixed_precision_survives_the_looks_at_the_first_batch() -> None:
    """A weight that autocast's cache had cast without gradients would get none in the first step."""
    quiet, module, lines = KeepsGradients(), KeepsGradients(), PrintedLines()
    make_trainer(ConvBNModeCallback(verify=False, log_memory=False), precision="bf16-mixed").fit(quiet)
    make_trainer(ConvBNModeCallback(), lines, precision="bf16-mixed").fit(module)
    assert "verified: Tune equals Eval" in lines.text
    assert "% saved" in lines.text
    assert module.first is not None
    assert quiet.first is not None
    assert all(gradient.abs().sum() > 0 for gradient in module.first.values())
    assert differing(module.first, quiet.first) == []
    assert module.losses == quiet.losses


def lines_of_table(**arguments: Any) -> list[str]:
    lines = PrintedLines()
    make_trainer(ConvBNModeCallback(**arguments), lines).fit(BoringModule())
    return lines.text.splitlines()


def test_the_table_counts_and_groups_the_reasons() -> None:
    heading, folded, frozen, reason, unfrozen, kept, peak, verified, counted = lines_of_table()
    assert heading == "ConvBN: `backbone` trains in Tune mode and is evaluated in Deploy mode"
    assert folded == "  folded         3 of 4 BatchNorms"
    assert frozen == "  frozen         1"
    assert re.fullmatch(r" +1 × its input comes from .+ \(ReLU\), not from a convolution: lone", reason)
    assert unfrozen == "  unfrozen       0"
    assert re.fullmatch(r"  kept for backward: Eval 0\.\d{3} MiB, Tune 0\.\d{3} MiB, \d\d\.\d % saved", kept)
    assert re.fullmatch(r"  peak of a step: Eval 0\.\d{3} MiB, Tune 0\.\d{3} MiB, \d+\.\d % (less|more)", peak)
    assert verified.startswith("  verified: Tune equals Eval, relative deviation ")
    assert counted == "  counted on an input of 2 × 3 × 8 × 8"


@pytest.mark.parametrize(
    ("mode", "eval_mode", "line"),
    [
        ("eval", "eval", "  foldable       3 of 4 BatchNorms; Tune mode would fold them"),
        ("train", "eval", "  foldable       3 of 4 BatchNorms; Tune mode would fold them"),
        ("eval", "deploy", "  folded         3 of 4 BatchNorms, in evaluation alone"),
        ("tune", "eval", "  folded         3 of 4 BatchNorms"),
    ],
)
def test_the_table_does_not_call_folded_what_is_not(mode: Any, eval_mode: Any, line: str) -> None:
    assert lines_of_table(mode=mode, eval_mode=eval_mode)[1] == line


@pytest.mark.parametrize(("after", "words"), [(97, ("3.0 % saved", "3.0 % less")), (103, ("3.0 % more", "3.0 % more"))])
def test_the_table_says_more_where_more_is_kept(after: int, words: tuple[str, str]) -> None:
    part = ConvertedPart("backbone", Backbone())
    found = Findings(sides=sides_of(part), kept_bytes=[100, after], peak_bytes=[100, after])
    kept, peak = describe(part, found, "tune", "deploy")[-2:]
    assert (kept.endswith(f", {words[0]}"), peak.endswith(f", {words[1]}")) == (True, True)


@pytest.mark.parametrize("enable_progress_bar", [False, True])
def test_the_table_is_seen_with_and_without_a_progress_bar(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, enable_progress_bar: bool
) -> None:
    logger = logging.getLogger("lightning.fabric")
    logger.addHandler(caplog.handler)
    try:
        make_trainer(quick(), enable_progress_bar=enable_progress_bar).fit(BoringModule())
    finally:
        logger.removeHandler(caplog.handler)
    console = capfd.readouterr()
    seen = console.out + console.err if enable_progress_bar else caplog.text
    assert "ConvBN: `backbone` trains in Tune mode" in seen
    assert "folded         3 of 4 BatchNorms" in seen
    assert "(ReLU), not from a convolution: lone" in seen
