"""Blocks that run again in the backward pass: the same bits, less memory, and as torch's own checkpoint around them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from helpers.blocks import Residual, Tower, batch, count_calls, step_results
from helpers.comparing import Snapshot
from helpers.networks import images, random_model
from helpers.recomputation import assert_same_bits, results
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from lightning_convbn import Mode, conv_bn_mode, find_conv_bn_pairs, get_mode, recomputed_blocks, set_mode
from lightning_convbn.memory import measure_memory_abstractly
from lightning_convbn.memory.step import count_step

MODES: list[Mode] = ["tune", "eval"]

pytestmark = pytest.mark.usefixtures("_quick_garbage_collection")


class TestSameBits:
    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "densenet121"])
    def test_of_torchvisions_networks(self, name: str, mode: Mode) -> None:
        model, input = random_model(name), images(2, 3, 64, 64)
        set_mode(model, mode)
        expected = results(model, input)
        set_mode(model, mode, recompute="blocks")
        assert_same_bits(results(model, input), expected)
        blocks = recomputed_blocks(model)
        assert blocks.names
        assert not blocks.left_out

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("frozen", ["stem", "blocks.0", "blocks", "weights", "all"])
    def test_with_frozen_parts(self, frozen: str, mode: Mode) -> None:
        def tower() -> Tower:
            model = Tower()
            for name, parameter in model.named_parameters():
                matches = name.startswith(frozen) or (frozen == "weights" and not name.endswith("bias"))
                parameter.requires_grad_(not (matches or frozen == "all"))
            return model

        model = tower()
        calls = [count_calls(block.between) for block in model.blocks]  # type: ignore[arg-type]
        assert_same_bits(step_results(model, "blocks", mode), step_results(tower(), "none", mode))
        once = {"stem": 0, "blocks.0": 1, "blocks": 3, "weights": 3, "all": 3}[frozen]  # nothing is trained in them
        assert [len(call) for call in calls] == [1] * once + [2] * (3 - once)

    @pytest.mark.parametrize("mode", MODES)
    def test_under_autocast(self, mode: Mode) -> None:
        def run(recompute: Any) -> list[Tensor]:
            with torch.autocast("cpu", torch.bfloat16):
                return step_results(model, recompute, mode)

        model = Tower()
        expected = run("none")
        assert expected[0].dtype is torch.bfloat16
        assert_same_bits(run("blocks"), expected)

    def test_the_backward_pass_may_run_outside_of_autocast(self) -> None:
        model = Tower()
        found = []
        for recompute in ("none", "blocks"):
            set_mode(model, "tune", recompute=recompute)  # type: ignore[arg-type]
            with torch.autocast("cpu", torch.bfloat16):
                output = model(batch())
            found.append(torch.autograd.grad(output.sum(), [*model.parameters()]))
        assert_same_bits([*found[1]], [*found[0]])

    def test_of_a_block_that_is_called_twice(self) -> None:
        class Twice(Tower):
            def run(self, block: nn.Module, input: Tensor) -> Tensor:
                return block(block(input))  # type: ignore[no-any-return]

        assert_same_bits(step_results(Twice(), "blocks"), step_results(Twice(), "none"))

    def test_of_two_backward_passes_and_of_double_backward(self) -> None:
        def gradients(recompute: Any) -> list[Tensor]:
            set_mode(model, "tune", recompute=recompute)
            input = batch().requires_grad_()
            output = model(input).square().sum()
            first = torch.autograd.grad(output, [input, *model.parameters()], retain_graph=True)
            (slope,) = torch.autograd.grad(output, input, create_graph=True)
            return [*first, slope, *torch.autograd.grad(slope.square().sum(), [*model.parameters()], allow_unused=True)]

        model = Tower()
        assert_same_bits([*filter(_is_there, gradients("blocks"))], [*filter(_is_there, gradients("none"))])


def _is_there(gradient: Tensor | None) -> bool:
    return gradient is not None


class Functional(nn.Module):
    def forward(self, input: Tensor) -> Tensor:
        return F.dropout(input, 0.5, self.training)


class TestRandomNumbers:
    DRAWING: dict[str, Callable[[], nn.Module]] = {
        "dropout": lambda: nn.Dropout(0.5),
        "stochastic depth": lambda: torchvision.ops.StochasticDepth(0.5, "row"),
        "a function": Functional,
        "RReLU": nn.RReLU,
    }

    @pytest.mark.parametrize("kind", DRAWING)
    def test_are_the_same_in_both_runs(self, kind: str) -> None:
        def tower() -> Tower:
            return Tower(lambda: Residual(between=self.DRAWING[kind])).train()

        model = tower()
        expected = step_results(tower(), "none")
        assert_same_bits(step_results(model, "blocks"), expected)
        assert not all(map(torch.equal, step_results(model, "blocks", seed=1), expected))

    def test_a_block_is_looked_at_again_in_another_state(self) -> None:
        """In its eval state it does not draw, and that must not be believed in training."""

        def gradients(recompute: Any) -> list[Tensor]:
            model = Tower(lambda: Residual(between=Functional))
            set_mode(model, "tune", recompute=recompute)
            found = []
            for state in (False, True, False):
                torch.manual_seed(0)
                found += torch.autograd.grad(model.train(state)(batch()).sum(), [*model.parameters()])
            return found

        assert_same_bits(gradients("blocks"), gradients("none"))


class TestMemory:
    @pytest.mark.parametrize("name", ["resnet50", "mobilenet_v3_small", "densenet121"])
    def test_less_is_kept_and_the_peak_is_lower_than_with_elementwise(self, name: str) -> None:
        model = torchvision.models.get_model(name).eval()
        uses = [
            measure_memory_abstractly(model, (torch.zeros(8, 3, 224, 224),), {}, mode="tune", recompute=recompute)
            for recompute in ("none", "elementwise", "blocks")
        ]
        kept, peaks = [use.saved_bytes for use in uses], [use.peak_bytes or 0 for use in uses]
        assert kept[2] < kept[1] < kept[0]
        assert 0 < peaks[2] < peaks[1] < peaks[0]

    def test_what_is_given_to_a_block_is_what_is_kept_of_it(self) -> None:
        model, input = Tower(blocks=2), images(4, 3, 16, 16)
        set_mode(model, "tune", recompute="blocks")
        kept = count_step(model, (input,), {}, None).kept
        assert sum(size for name, size in kept.items() if name.startswith("blocks.1.")) == 0
        features = 4 * 6 * 16 * 16 * 4
        assert sum(size for name, size in kept.items() if name == "blocks.0") == pytest.approx(features, rel=0.05)


class TestWithOthers:
    @pytest.mark.parametrize("reentrant", [False, True])
    def test_under_a_users_own_checkpoint_theirs_comes_first(self, reentrant: bool) -> None:
        class Checkpointed(Tower):
            def run(self, block: nn.Module, input: Tensor) -> Tensor:
                return checkpoint(block, input, use_reentrant=reentrant)  # type: ignore[no-any-return]

        model = Checkpointed()
        calls = count_calls(model.blocks[0].between)  # type: ignore[arg-type]
        assert_same_bits(step_results(model, "blocks"), step_results(Checkpointed(), "none"))
        assert len(calls) <= 2 + reentrant  # its first run is without gradients, its second one ours runs again

    def test_a_users_own_checkpoint_within_a_block(self) -> None:
        class Checkpointed(Residual):
            def forward(self, input: Tensor) -> Tensor:
                return checkpoint(super().forward, input, use_reentrant=False)  # type: ignore[no-any-return]

        model = Tower(Checkpointed)
        assert_same_bits(step_results(model, "blocks"), step_results(Tower(Checkpointed), "none"))
        assert recomputed_blocks(model).left_out == {}

    @pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.autograd.graph.save_on_cpu])
    def test_without_gradients_or_under_other_hooks_a_block_runs_once(self, context: Callable[[], Any]) -> None:
        model = Tower()
        set_mode(model, "tune", recompute="blocks")
        calls = count_calls(model.blocks[0].between)  # type: ignore[arg-type]
        with context():
            output = model(batch())
        set_mode(model, "tune")
        assert torch.equal(output, model(batch()))
        if output.requires_grad:
            output.sum().backward()
        assert len(calls) == 2

    def test_hooks_run_once_for_each_run_as_with_torchs_checkpoint(self) -> None:
        class Checkpointed(Tower):
            def run(self, block: nn.Module, input: Tensor) -> Tensor:
                return checkpoint(block, input, use_reentrant=False)  # type: ignore[no-any-return]

        ours, theirs = Tower(), Checkpointed()
        inner = [count_calls(model.blocks[0].between) for model in (ours, theirs)]  # type: ignore[arg-type]
        own = count_calls(ours.blocks[0])
        step_results(ours, "blocks")
        step_results(theirs, "none")
        assert inner[0] == inner[1] == [True, True]
        assert own == [True]  # it is around what runs again

    def test_a_transform_runs_it_once(self) -> None:
        def losses(recompute: Any) -> Tensor:
            set_mode(model, "tune", recompute=recompute)
            parameters = dict(model.named_parameters())

            def loss(image: Tensor) -> Tensor:
                return torch.func.functional_call(model, parameters, (image[None],)).sum()

            return torch.func.vmap(torch.func.grad(loss))(batch())

        model = Tower()
        assert torch.equal(losses("blocks"), losses("none"))

    def test_in_a_compiled_model_the_compiler_decides(self) -> None:
        model = Tower()
        expected = step_results(model, "none")
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        calls: list[int] = []
        set_mode(model, "tune", recompute="blocks")
        model.zero_grad()
        input = batch().requires_grad_()
        output = compiled(input)
        (output * images(*output.shape, seed=2)).sum().backward()
        gradients = [leaf.grad for leaf in (input, *model.parameters()) if leaf.grad is not None]
        for found, other in zip([output, *gradients], expected, strict=False):
            torch.testing.assert_close(found, other, rtol=1e-4, atol=1e-5)
        assert calls == []
        torch._dynamo.reset()

    def test_pairs_are_found_as_in_a_plain_model(self) -> None:
        model = Tower()
        expected = find_conv_bn_pairs(model)
        set_mode(model, "tune", recompute="blocks")
        assert find_conv_bn_pairs(model) == expected
        assert find_conv_bn_pairs(model, example_inputs=(batch(),)) == expected


@pytest.fixture
def _one_process(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("_one_process")
@pytest.mark.parametrize("static", [False, True])
def test_under_ddp(static: bool) -> None:
    plain, model = Tower(), Tower()
    expected = step_results(plain, "none")
    wrapped = DistributedDataParallel(model, static_graph=static)
    for _ in range(2):
        assert_same_bits(step_results(wrapped, "blocks"), expected)
    assert recomputed_blocks(wrapped).names == ("module.blocks.0", "module.blocks.1", "module.blocks.2")


class TestSwitching:
    @pytest.mark.parametrize("mode", MODES)
    def test_train_mode_takes_all_of_it_off(self, mode: Mode) -> None:
        model = Tower()
        found = Snapshot.of(model)
        step_results(model, "blocks", mode)
        assert type(model.blocks[0]) is Residual
        assert get_mode(model) == mode
        assert model.state_dict().keys() == found.tensors.keys()
        set_mode(model, "train")
        assert Snapshot.of(model) == found
        set_mode(model, mode)
        assert recomputed_blocks(model).names == ()

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    def test_copies_are_plain(self, copied: Callable[[Any], Any]) -> None:
        model = Tower()
        step_results(model, "blocks")
        with torch.no_grad():
            expected = model(batch())
        for one, other in ((copied(model), Tower()), (copied(model.blocks[0]), Residual())):
            assert str(one) == str(other)
            assert [vars(module).keys() for module in one.modules()] == [vars(m).keys() for m in other.modules()]
        assert torch.allclose(copied(model)(batch()), expected, atol=1e-5)

    def test_the_context_manager_brings_it_back(self) -> None:
        model = Tower()
        for recompute in ("blocks", ["blocks.1"], []):
            set_mode(model, "tune", recompute=recompute)  # type: ignore[arg-type]
            found, names = Snapshot.of(model), recomputed_blocks(model).names
            for inner in ("none", "elementwise", "blocks"):
                with conv_bn_mode(model, "eval", recompute=inner):  # type: ignore[arg-type]
                    assert (len(recomputed_blocks(model).names) == 3) == (inner == "blocks")
                assert Snapshot.of(model) == found
                assert recomputed_blocks(model).names == names

    def test_a_part_may_be_switched_alone(self) -> None:
        model = Tower()
        set_mode(model, "tune", recompute="blocks")
        set_mode(model.blocks[0], "train")
        assert recomputed_blocks(model).names == ("blocks.1", "blocks.2")
        set_mode(model.blocks[1].bn1, "train")  # type: ignore[arg-type]
        model.train()
        model(batch()).sum().backward()
        assert model.blocks[1].bn1.num_batches_tracked == 1  # type: ignore[union-attr]

    @pytest.mark.parametrize("mode", ["train", "eval", "deploy"])
    def test_a_switch_between_forward_and_backward_is_an_error(self, mode: Any) -> None:
        model = Tower().eval()
        set_mode(model, "tune", recompute="blocks")
        loss = model(batch()).sum()
        set_mode(model, mode)
        with pytest.raises(RuntimeError, match=r"a Residual is to run again .* Call backward\(\) before that"):
            loss.backward()
