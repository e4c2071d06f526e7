"""Strategies: DDP in two processes, FSDP2, SyncBatchNorm. What `several_processes.py` has seen is compared here."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.comparing import BACKWARD
from helpers.several_processes import BATCHES_PER_PROCESS, EPOCHS, RUNS, Shared
from helpers.tiny_training import (
    LIGHTNING_SAYS,
    BoringModule,
    OwnNorm,
    PrintedLines,
    Snapshot,
    differing,
    make_trainer,
    quick,
    state_of,
)
from lightning.pytorch.plugins.layer_sync import TorchSyncBatchNorm
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn

from lightning_convbn import ConvBNModeCallback, find_conv_bn_pairs, set_mode
from lightning_convbn.pairs import reasons
from lightning_convbn.trainer.processes import merged_over_processes

pytestmark = [
    *LIGHTNING_SAYS,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without torch.distributed"),
]

HERE = Path(__file__).parents[1] / "helpers"
STEPS = BATCHES_PER_PROCESS * EPOCHS


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """Run the script as a person would, once for all tests, and read what each of its two processes wrote."""
    folder = tmp_path_factory.mktemp("processes")
    paths = [str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "several_processes.py"), str(folder)]
    with (folder / "printed").open("w") as printed:
        done = subprocess.run(
            command, env=environment, stdout=printed, stderr=subprocess.STDOUT, timeout=900, check=False
        )
    assert done.returncode == 0, (folder / "printed").read_text()
    return [{**torch.load(folder / f"{rank}.pt"), "folder": folder} for rank in (0, 1)]


@pytest.mark.parametrize("name", RUNS)
def test_processes_end_with_the_same_bits_and_plain_modules(ranks: list[dict[Any, Any]], name: str) -> None:
    """In Tune mode; and what they were trained on differed."""
    one, other = (rank[name, "tune"] for rank in ranks)
    assert differing(one["state"], other["state"]) == []
    assert one["losses"]["fit"] != other["losses"]["fit"]
    for seen in (one, other):
        assert seen["mode"] == "train"
        assert seen["modes"]["fit"] == ["tune"] * STEPS
        assert set(seen["modes"]["validate"]) == {"deploy"}
        assert seen["converted"] == []


@pytest.mark.parametrize("name", [name for name in RUNS if not name.startswith("deceptive")])
def test_the_loss_curve_in_several_processes_is_evals(ranks: list[dict[Any, Any]], name: str) -> None:
    """Every loss of every process, and the weights.

    In bf16 a rounding is at most 2**-9. A loss has that of four layers with two roundings each, in Eval and in Tune
    mode, and the square in the loss doubles it: ``2 * sqrt(16) * 2**-9``, if each is as large as it can be.
    """
    tolerance = 8 * 2**-9 if name == "bf16" else 10 * BACKWARD
    for rank in ranks:
        tune, frozen = rank[name, "tune"], rank[name, "eval"]
        for stage in ("fit", "validate"):
            torch.testing.assert_close(tune["losses"][stage], frozen["losses"][stage], rtol=tolerance, atol=0)
        for key, tensor in tune["state"].items():
            torch.testing.assert_close(tensor, frozen["state"][key], rtol=tolerance, atol=tolerance, msg=key)
        assert len(set(tune["losses"]["fit"])) == STEPS


@pytest.mark.parametrize("recompute", ["elementwise", "blocks"])
def test_train_mode_with_recomputation_is_plain_ddp(ranks: list[dict[Any, Any]], recompute: str) -> None:
    """Losses, weights and statistics, to the bit."""
    for rank in ranks:
        plain, seen = rank["train"], rank["train", recompute]
        assert seen["losses"] == plain["losses"]
        assert differing(seen["state"], plain["state"]) == []
        assert seen["converted"] == []


def test_what_one_process_finds_wrong_is_unfolded_in_all(ranks: list[dict[Any, Any]]) -> None:
    """The first process has nothing to find, and would go on with other pairs than the second."""
    for rank in ranks:
        told = [message for message in rank["deceptive", "tune"]["told"] if "goes back to Eval" in message]
        assert all("`backbone.last.1`" in message for message in told)
    warned = [message for message in ranks[0]["deceptive", "tune"]["told"] if "goes back to Eval" in message]
    assert len(warned) == 1


def test_all_processes_recompute_what_one_of_them_must(ranks: list[dict[Any, Any]]) -> None:
    """The first one has room enough; after the first batch it follows the second, which has not."""
    one, other = (rank["budget", "tune"] for rank in ranks)
    assert one["recomputed"] == ["none"] + ["blocks"] * (STEPS - 1)
    assert other["recomputed"] == ["blocks"] * STEPS


def test_what_another_process_finds_wrong_is_not_folded_in_the_export(ranks: list[dict[Any, Any]]) -> None:
    names = torch.load(ranks[0]["folder"] / "tune.pt", weights_only=True)
    assert "backbone.last.1.running_mean" in names
    assert "backbone.stem.1.running_mean" not in names


def test_rank_zero_alone_reports_and_logs(ranks: list[dict[Any, Any]]) -> None:
    """One file with each metric once, one table for each run."""
    folder = ranks[0]["folder"]
    (metrics,) = (folder / "ddp" / "tune").glob("metrics.csv")
    header, *rows = metrics.read_text().splitlines()
    column = header.split(",").index("convbn/activations_tune_mib")
    assert len([row for row in rows if row.split(",")[column]]) == 1
    printed = (folder / "printed").read_text()
    assert printed.count("trains in Tune mode") == len(RUNS) + 2  # and the two of the run that is resumed


@pytest.mark.parametrize(
    ("name", "folded"), [("fsdp2_whole", 3), ("fsdp2_blocks", 3), ("fsdp2_backbone", 3), ("fsdp2_apart", 2)]
)
def test_a_pair_is_folded_within_one_fsdp_unit_only(ranks: list[dict[Any, Any]], name: str, folded: int) -> None:
    """Counted where the units allow it, and said so where not."""
    text = (ranks[0]["folder"] / "printed").read_text()
    table = text.split("trains in Tune mode")[1 + [*RUNS].index(name)].split("`Trainer.fit` stopped")[0]
    assert f"folded         {folded} of 4 BatchNorms" in table
    assert ("not counted: FSDP gathers parameters in its forward" in table) == (name != "fsdp2_whole")
    assert (reasons.OTHER_FSDP_UNIT.partition("`")[0] in table) == (name == "fsdp2_apart")


def test_a_run_in_several_processes_is_resumed_in_the_middle_of_an_epoch(ranks: list[dict[Any, Any]]) -> None:
    for rank in ranks:
        straight, resumed = rank["resume"]["straight"], rank["resume"]["resumed"]
        done = BATCHES_PER_PROCESS + 2
        assert len(straight["losses"]["fit"]) == STEPS
        assert resumed["losses"]["fit"] == straight["losses"]["fit"][done:]
        assert differing(resumed["state"], straight["state"]) == []


@pytest.mark.slow
def test_spawned_processes_train_and_the_main_process_stays_plain(ranks: list[dict[Any, Any]]) -> None:
    """The workers convert; the module that comes back has the weights that plain DDP arrives at."""
    module = Shared()
    before = Snapshot.of(module)
    trainer = make_trainer(quick(), strategy="ddp_spawn", devices=2, max_epochs=EPOCHS)
    trainer.fit(module)
    assert Snapshot.of(module) == before
    torch.testing.assert_close(state_of(module), ranks[0]["ddp", "tune"]["state"])
    assert trainer.callback_metrics["loss"] == pytest.approx(ranks[0]["ddp", "tune"]["losses"]["validate"][-1])


class CountsSteps(OwnNorm):
    """A BatchNorm of its own, so that it is the target itself; steps by hand if asked to."""

    def __init__(self, by_hand: bool) -> None:
        super().__init__()
        self.automatic_optimization = not by_hand
        self.indices: list[int] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.indices.append(batch_idx)
        loss = super().training_step(batch, batch_idx)
        if not self.automatic_optimization:
            self.manual_backward(loss)
            self.optimizers().step()
        return loss


@pytest.mark.filterwarnings("ignore:.*(LeafSpec|distributed|process group|find_unused|TCPStore)")
@pytest.mark.parametrize("by_hand", [False, True])
def test_no_step_is_taken_for_a_forward(by_hand: bool) -> None:
    """DDP calls the step in the forward's place; to verify and to count, only the forward itself is run."""
    module, lines = CountsSteps(by_hand), PrintedLines()
    make_trainer(ConvBNModeCallback(), lines, strategy="ddp").fit(module)
    torch.distributed.destroy_process_group()
    assert module.indices == [0, 1, 2]
    assert "verified: Tune equals Eval" in lines.text


def test_one_by_itself_waits_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its Trainer may run in one process of a larger job."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert merged_over_processes({"bn": "why"}, 1) == {"bn": "why"}


class Syncing(SingleDeviceStrategy):
    """Converts BatchNorms to SyncBatchNorm and back when DDP does; DDP itself refuses them on a CPU."""

    def setup(self, trainer: Any) -> None:
        assert self.model is not None
        self.model = TorchSyncBatchNorm().apply(self.model)
        self._lightning_module = self.model
        super().setup(trainer)

    def teardown(self) -> None:
        assert self.model is not None
        self.model = TorchSyncBatchNorm().revert(self.model)
        super().teardown()


@pytest.mark.parametrize("eval_mode", ["eval", "deploy"])
def test_batchnorms_that_are_synchronised_for_the_run_are_folded(eval_mode: Any) -> None:
    """The conversion comes before ours and is taken back after ours."""
    plain, synced = BoringModule(), BoringModule()
    make_trainer(quick(eval_mode=eval_mode), max_epochs=2).fit(plain)
    printed: list[str] = []

    class Looks(BoringModule):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if not printed:
                printed.append(str(self.backbone))

    synced = Looks()
    make_trainer(quick(eval_mode=eval_mode), max_epochs=2, strategy=Syncing("cpu")).fit(synced)
    assert len(re.findall(r" SyncBatchNorm\(.*convbn=", printed[0])) == 4
    assert synced.losses == plain.losses
    assert differing(state_of(synced), state_of(plain)) == []

    # What Lightning leaves behind are BatchNorms of a class of its own, which are folded as well.
    assert type(synced.backbone.lone) is not nn.BatchNorm2d
    for module in (plain, synced):
        module.forget()
        trainer = make_trainer(quick(eval_mode=eval_mode))
        trainer.fit(module)
    assert find_conv_bn_pairs(synced.backbone) == find_conv_bn_pairs(plain.backbone)
    assert synced.losses == plain.losses


def test_fsdp_units_are_told_apart_without_processes() -> None:
    """By the names of the classes, which FSDP makes for each module it shards."""

    class FSDPModule:
        pass

    def sharded(module: nn.Module) -> None:
        module.__class__ = type(f"FSDP{type(module).__name__}", (FSDPModule, type(module)), {})

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)))
    sharded(model[2])
    assert len(find_conv_bn_pairs(model)) == 2
    pairs = find_conv_bn_pairs(model)
    sharded(model[2][1])
    found = find_conv_bn_pairs(model)
    assert found.unpaired == {"2.1": reasons.OTHER_FSDP_UNIT.format(conv="2.0")}
    with pytest.raises(ValueError, match=r"`2.0` and `2.1` can't be folded: FSDP gathers it and its convolution"):
        set_mode(model, "tune", pairs=pairs)
    assert [type(part).__name__ for part in model[2]] == ["Conv2d", "FSDPBatchNorm2d"]
