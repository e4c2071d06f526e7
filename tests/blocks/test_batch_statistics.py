"""Blocks of BatchNorms in Train mode: they run twice, and their statistics are those of one run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from helpers.blocks import Residual, Tower, batch, step_results
from helpers.recomputation import assert_same_bits, double_backward, several_forwards
from helpers.torch_settings import one_thread
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_convbn import find_conv_bn_pairs, measure_memory, recomputed_blocks, set_mode
from lightning_convbn.blocks import look, reasons
from lightning_convbn.blocks.find import Blocks

Recomputation = Any
ALL = Blocks(("blocks.0", "blocks.1", "blocks.2"))


class ReadsVariance(nn.BatchNorm2d):
    """Scales with a statistic that it has just written, as a batch renormalisation does."""

    def forward(self, input: Tensor) -> Tensor:
        output = super().forward(input)
        assert self.running_var is not None
        return output * self.running_var.view(1, -1, 1, 1)


class WritesByHand(nn.BatchNorm2d):
    """Averages the statistics itself, in place."""

    def forward(self, input: Tensor) -> Tensor:
        var, mean = torch.var_mean(input, (0, 2, 3))
        if self.training:
            assert self.running_mean is not None
            assert self.running_var is not None
            with torch.no_grad():
                self.running_mean.lerp_(mean, 0.1)
                self.running_var.mul_(0.9).add_(var, alpha=0.1)
        mean, var = (vector.view(1, -1, 1, 1) for vector in (mean, var))
        return (input - mean) * (var + self.eps).rsqrt()


def block_with(make_norm: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """A residual block whose first BatchNorm is another one."""

    def make() -> nn.Module:
        block = Residual()
        block.bn1 = make_norm()  # type: ignore[assignment]
        return block

    return make


NORMS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.BatchNorm2d(6),
    "an average over all batches": lambda: nn.BatchNorm2d(6, momentum=None),
    "without statistics": lambda: nn.BatchNorm2d(6, track_running_stats=False),
    "without weights": lambda: nn.BatchNorm2d(6, affine=False),
    "in its eval state": lambda: nn.BatchNorm2d(6).eval(),
    "of a subclass": lambda: WritesByHand(6),
}


def tower(norm: str = "plain") -> Tower:
    model = Tower(block_with(NORMS[norm])).train()
    if norm == "in its eval state":
        for block in model.blocks:
            block.bn1.eval()  # type: ignore[union-attr]
    return model


@pytest.mark.parametrize("norm", NORMS)
@one_thread()
def test_a_step_is_plain_trainings_and_statistics_are_written_once(norm: str) -> None:
    plain, model = tower(norm), tower(norm)
    for _ in range(2):
        assert_same_bits(step_results(model, "blocks", "train"), step_results(plain, "none", "train"))
    assert recomputed_blocks(model) == ALL
    kept = [measure_memory(model, batch(), mode="train", recompute=how).saved_bytes for how in ("none", "blocks")]
    assert kept[1] < kept[0] / 2


def _switched_in_between(model: Tower) -> Iterable[Tensor]:
    loss = model(batch()).square().sum()
    model.blocks[1].bn1.eval()  # type: ignore[union-attr]
    yield from torch.autograd.grad(loss, [*model.parameters()])
    assert not model.blocks[1].bn1.training  # type: ignore[union-attr]


def _looked_at(model: Tower) -> Iterable[Tensor]:
    """Tools that draw a graph ask each node what it has saved, outside of a backward pass."""
    nodes, seen = [model(batch()).grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [following for following, _ in node.next_functions]
            for name in dir(node):
                if name.startswith("_saved_"):
                    getattr(node, name)
    return ()


@pytest.mark.parametrize("use", [several_forwards, _switched_in_between, double_backward, _looked_at])
@one_thread()
def test_uses(use: Callable[[Tower], Iterable[Tensor]]) -> None:
    plain, model = tower(), tower()
    set_mode(model, "train", recompute="blocks")
    assert_same_bits([*use(model)], [*use(plain)])
    assert_same_bits([*model.buffers()], [*plain.buffers()])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("recompute", ["elementwise", "blocks"])
def test_under_a_checkpoint_of_the_users_statistics_are_those_of_plain_training(
    recompute: Recomputation, reentrant: bool
) -> None:
    """Under torch's checkpoint alone they are written twice."""

    class Checkpointed(Tower):
        def run(self, block: nn.Module, input: Tensor) -> Tensor:
            return checkpoint(block, input, use_reentrant=reentrant)  # type: ignore[no-any-return]

    plain, model = Tower().train(), Checkpointed().train()
    assert_same_bits(step_results(model, recompute, "train"), step_results(plain, "none", "train"))


@pytest.mark.parametrize("mode", ["tune", "eval"])
@pytest.mark.parametrize("recompute", ["elementwise", "blocks"])
def test_a_batchnorm_in_train_mode_takes_part_in_other_modes(mode: Any, recompute: Recomputation) -> None:
    """A new head, and a BatchNorm that has lost its statistics."""
    found = []
    for how in ("none", recompute):
        model = Tower().train()
        model.blocks[0].bn1.running_mean = model.blocks[0].bn1.running_var = None  # type: ignore[union-attr]
        pairs = find_conv_bn_pairs(model).unfreeze({"stem.1": "is new", "blocks.1.bn2": "is new"})
        set_mode(model, mode, pairs=pairs)
        found.append(step_results(model, how, mode))
    assert_same_bits(found[1], found[0])
    assert str(model).count(f"convbn='train', recompute={recompute!r}") >= 3
    if recompute == "blocks":
        assert recomputed_blocks(model) == ALL


def test_a_block_that_reads_what_it_has_written_is_left_out() -> None:
    """A second run would read other statistics."""
    plain, model = (Tower(block_with(lambda: ReadsVariance(6))).train() for _ in range(2))
    assert_same_bits(step_results(model, "blocks", "train"), step_results(plain, "none", "train"))
    assert {*recomputed_blocks(model).left_out.values()} == {reasons.READS_STATISTICS.format(name="bn1.running_var")}


def test_a_block_that_would_ask_other_processes_twice_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    block = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(Residual()))
    monkeypatch.setattr(look, "is_distributed", lambda: True)
    assert look.look_at(block.train(), (batch(),), {}).reason == reasons.SYNCHRONISED


def test_a_written_weight_is_an_error() -> None:
    model = tower()
    set_mode(model, "train", recompute="blocks")
    loss = model(batch()).sum()
    with torch.no_grad():
        model.blocks[0].bn1.weight.add_(1)  # type: ignore[union-attr, operator]
    with pytest.raises(RuntimeError, match="one of its parameters or buffers was written or replaced"):
        loss.backward()


class PreActivation(nn.Module):
    """A block whose last convolution is a pair with the first BatchNorm of the next block."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1))

    def forward(self, input: Tensor) -> Tensor:
        return self.layers(input)  # type: ignore[no-any-return]


def test_pairs_between_blocks_do_not_matter_where_nothing_is_folded() -> None:
    model = nn.Sequential(PreActivation(), PreActivation())
    set_mode(model, "train", recompute="blocks")
    assert recomputed_blocks(model) == Blocks(("0", "1"))
    set_mode(model, "train", recompute=["1"])
    assert recomputed_blocks(model).names == ("1",)
