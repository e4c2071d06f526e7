"""The callback under a memory budget: the plan is made before the first step, said, logged, and kept to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.blocks import ResidualBackbone
from helpers.tiny_training import (
    LIGHTNING_SAYS,
    Backbone,
    BoringModule,
    PrintedLines,
    csv_metrics,
    differing,
    make_trainer,
    state_of,
)
from lightning.pytorch.callbacks import BatchSizeFinder, GradientAccumulationScheduler
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_convbn import ConvBNModeCallback, measure_memory
from lightning_convbn.blocks.find import recompute_of
from lightning_convbn.blocks.recomputed import Block
from lightning_convbn.layers import state
from lightning_convbn.memory import MIB
from lightning_convbn.memory.budget import fixed_bytes
from lightning_convbn.memory.optimizers import optimizer_bytes
from lightning_convbn.trainer import converted_part

pytestmark = LIGHTNING_SAYS
PIXELS = 48


class Module(BoringModule):
    """Notes before each step what its backbone recomputed in the step before, and how many blocks ran again."""

    def __init__(self, sizes: tuple[int, ...] = (2, 2, 2)) -> None:
        super().__init__(ResidualBackbone)
        self.sizes = sizes
        self.recomputed: list[tuple[str, int]] = []

    def step(self, stage: str, batch: list[Tensor]) -> Tensor:
        loss = super().step(stage, batch)
        if stage == "fit":
            blocks = sum(isinstance(state.state_of(module), Block) for module in self.modules())
            self.recomputed.append((recompute_of(self.backbone), blocks))
        return loss

    def train_dataloader(self) -> Any:
        generator = torch.Generator().manual_seed(1)
        batches = [
            [torch.randn(size, 3, PIXELS, PIXELS, generator=generator), torch.randn(size, 4, generator=generator)]
            for size in self.sizes
        ]
        return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


class FindsBatchSize(Module):
    batch_size = 1

    def train_dataloader(self) -> Any:
        images, targets = torch.zeros(16, 3, PIXELS, PIXELS), torch.zeros(16, 4)
        return DataLoader(TensorDataset(images, targets), batch_size=self.batch_size)


def needed(recompute: Any, batch: int = 2) -> int:
    """What a step of the module takes, by counts that make no plan. SGD has one momentum for each parameter."""
    module = Module()
    peak = measure_memory(
        module.backbone, torch.zeros(batch, 3, PIXELS, PIXELS), mode="tune", recompute=recompute, optimizer="sgd"
    ).peak_bytes
    assert peak is not None
    head = fixed_bytes(module.head)
    return fixed_bytes(module) + peak + head + optimizer_bytes([*module.head.parameters()], "sgd").state


def fit(memory_budget: Any, *callbacks: Any, module: Module | None = None, **options: Any) -> Module:
    module = Module() if module is None else module
    arguments = {name: options.pop(name) for name in ("mode", "recompute", "target") if name in options}
    callback = ConvBNModeCallback(memory_budget=memory_budget, **arguments)
    make_trainer(callback, *callbacks, max_epochs=2, **options).fit(module)
    return module


class TestPlans:
    @pytest.mark.parametrize(
        ("level", "expected"),
        [("none", ("none", 0)), ("elementwise", ("elementwise", 0)), ("blocks", ("blocks", 3))],
    )
    def test_the_least_recomputation_that_fits_is_in_force_from_the_first_step_on(
        self, level: str, expected: tuple[str, int]
    ) -> None:
        """Three of the four blocks are enough: the last one would run again at once."""
        module = fit(needed(level))
        assert module.recomputed == [expected] * 6
        assert str(module) == str(Module())

    def test_some_blocks_are_enough_in_between(self) -> None:
        module = fit((needed("elementwise") + needed("blocks")) // 2)
        (what,) = set(module.recomputed)
        assert what[0] == "blocks"
        assert 0 < what[1] < 4

    def test_the_fit_is_the_one_without_a_budget(self) -> None:
        expected, module = fit(None), fit(needed("blocks"))
        assert module.losses == expected.losses
        assert differing(state_of(module), state_of(expected)) == []

    def test_eval_mode_can_have_a_budget(self) -> None:
        assert fit(2**30, mode="eval").recomputed == [("none", 0)] * 6


class TestWhatIsSaid:
    def test_one_line_before_the_table(self) -> None:
        lines = PrintedLines()
        fit(needed("elementwise"), lines)
        plan, table = lines.text.splitlines()[:2]
        assert plan.startswith("ConvBN: `backbone`: recompute elementwise, predicted peak of a step ")
        assert table.startswith("ConvBN: `backbone` trains in Tune mode")
        assert lines.text.count("predicted peak") == 1

    def test_the_predicted_peak_is_logged(self, tmp_path: Path) -> None:
        logger = CSVLogger(tmp_path)
        fit(2**30, logger=logger)
        (value,) = csv_metrics(logger)["convbn/predicted_peak_mib"]
        assert value == pytest.approx(needed("none") / MIB)

    def test_blocks_are_in_the_table(self) -> None:
        lines = PrintedLines()
        fit(needed("blocks"), lines)
        assert "run again      3 of 3 blocks" in lines.text
        assert "(recompute=3 blocks)" in lines.text

    def test_if_nothing_fits_a_warning_says_what_would_before_the_first_step(self) -> None:
        module = Module(sizes=(4, 4, 4))
        with pytest.warns(UserWarning, match=r"no recomputation makes a step fit .* A batch of [123] fits") as caught:
            fit(needed("blocks"), module=module)
        (said,) = [str(warning.message) for warning in caught if "ConvBN" in str(warning.message)]
        assert f"the smallest peak is {needed('blocks', 4) / MIB:.1f} MiB" in said

    def test_what_looks_at_values_recomputes_all_blocks(self) -> None:
        class LooksAtValues(ResidualBackbone):
            def forward(self, images: Tensor) -> Tensor:
                return super().forward(images) * float(images.shape[0] + 0 * images.mean())

        module = Module()
        module.backbone = LooksAtValues()
        with pytest.warns(UserWarning, match=r"can't be planned for, because it can't run on tensors without data"):
            fit(2**30, module=module)
        assert module.recomputed == [("blocks", 4)] * 6


class TestLargerBatches:
    def test_a_larger_batch_is_planned_for_anew_and_a_smaller_one_is_not(self) -> None:
        lines = PrintedLines()
        module = fit(needed("elementwise", 3), lines, module=Module(sizes=(2, 3, 2)))
        assert module.recomputed == [("none", 0)] + 5 * [("elementwise", 0)]
        assert lines.text.count("predicted peak of a step") == 2

    @pytest.mark.parametrize("head", [4, 4000])
    def test_parameters_that_are_unfrozen_are_planned_for_anew(self, head: int) -> None:
        """Also if fewer bytes are trained than before, because something larger is frozen at the same time."""

        class Unfreezes(Module):
            def on_train_epoch_start(self) -> None:
                self.backbone.requires_grad_(self.current_epoch == 1)
                self.large.requires_grad_(self.current_epoch == 0)

        module, lines = Unfreezes(), PrintedLines()
        module.large = nn.Linear(head, head)
        large = sum(parameter.nbytes for parameter in module.large.parameters())
        fit(needed("elementwise") + 3 * large, lines, module=module)
        assert {what for what, _ in module.recomputed[:3]} == {"none"}
        assert lines.text.count("predicted peak of a step") == 2

    def test_batches_that_are_accumulated_later_are_planned_for_anew(self) -> None:
        lines = PrintedLines()
        module = fit(needed("none"), GradientAccumulationScheduler({0: 1, 1: 2}), lines)
        assert module.recomputed == [("none", 0)] * 3 + [("elementwise", 0)] * 3
        assert lines.text.count("predicted peak of a step") == 2

    def test_within_a_batch_nothing_is_recomputed_less(self) -> None:
        """The target runs twice in a step, first on a large input: its blocks must be able to run again."""

        class Twice(Module):
            def step(self, stage: str, batch: list[Tensor]) -> Tensor:
                if stage == "fit":
                    self.first = self.backbone(torch.cat([batch[0]] * 4)).sum()
                return super().step(stage, batch) + 0 * self.first

        module = fit(needed("blocks", 8), module=Twice())
        assert {what for what, _ in module.recomputed} == {"blocks"}

    def test_a_recording_that_fails_is_tried_once_and_ends_no_step(self, monkeypatch: pytest.MonkeyPatch) -> None:
        tried = []

        def fails(*arguments: Any) -> Any:
            tried.append(arguments)
            raise RuntimeError("boom")

        class Branches(ResidualBackbone):
            def forward(self, images: Tensor) -> Tensor:
                return super().forward(images) if len(images.shape) and bool(images.sum() < 1e9) else images

        monkeypatch.setattr(converted_part, "find_recorded_pairs", fails)
        module, lines = Module(), PrintedLines()
        module.backbone = Branches()
        with pytest.warns(UserWarning, match="can't run on tensors without data"):
            fit(2**30, lines, module=module)
        assert len(module.losses["fit"]) == 6
        assert len(tried) == 1
        assert lines.text.count("not counted: RuntimeError: boom") == 1

    def test_a_validation_with_gradients_is_not_planned_for(self) -> None:
        class LooksAtGradients(Module):
            def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
                with torch.enable_grad():
                    self.backbone(torch.randn(20, 3, PIXELS, PIXELS)).sum().backward()

        lines = PrintedLines()
        module = fit(needed("none"), lines, module=LooksAtGradients(), inference_mode=False, num_sanity_val_steps=1)
        assert set(module.recomputed) == {("none", 0)}
        assert lines.text.count("predicted peak of a step") == 1

    def test_what_a_finder_tried_is_planned_for_and_forgotten(self, tmp_path: Path) -> None:
        """It tries 1, 2, 4 and 8. That fails, as if memory did not suffice. So it takes 4."""

        class Fails(FindsBatchSize):
            def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
                loss = super().training_step(batch, batch_idx)
                if len(batch[0]) > 4:
                    raise RuntimeError("CUDA out of memory.")
                return loss

        module, lines = Fails(), PrintedLines()
        finder = BatchSizeFinder(max_trials=5, steps_per_trial=1)
        fit(needed("elementwise", 8), finder, lines, module=module, default_root_dir=tmp_path)
        assert module.batch_size == 4
        steps = 2 * 16 // 4
        assert ("elementwise", 0) in module.recomputed[:-steps]
        assert module.recomputed[-steps:] == [("none", 0)] * steps


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"memory_budget": "8 apples"}, "memory_budget='8 apples' is no amount of memory"),
            ({"memory_budget": 0}, "memory_budget=0 is no whole number of bytes"),
            (
                {"memory_budget": "8GiB", "recompute": "blocks"},
                "memory_budget='8GiB' chooses what to recompute, and so does recompute='blocks'; give one of the two",
            ),
        ],
    )
    def test_arguments_are_checked_at_once(self, arguments: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            ConvBNModeCallback(**arguments)

    @pytest.mark.parametrize(
        ("budget", "message"),
        [
            ("auto", "memory_budget='auto' needs a CUDA device, and the model is on 'cpu'; give an amount, as '8GiB'"),
            (100, "memory_budget: 0.000 MiB can't hold the parameters and buffers of Module"),
        ],
    )
    def test_a_budget_that_can_not_be_is_refused_before_the_first_step(self, budget: Any, message: str) -> None:
        module = Module()
        with pytest.raises(ValueError, match=message):
            fit(budget, module=module)
        assert module.recomputed == []

    def test_an_optimizer_that_can_not_be_counted_is_named(self) -> None:
        class WithLBFGS(Module):
            def configure_optimizers(self) -> torch.optim.Optimizer:
                return torch.optim.LBFGS(self.parameters(), max_iter=1)

        with pytest.warns(UserWarning, match="LBFGS can't step without data, and counts as an AdamW"):
            assert fit(2**30, module=WithLBFGS()).recomputed == [("none", 0)] * 6

    def test_several_parts_are_refused(self) -> None:
        module = Module()
        module.other = Backbone()
        with pytest.raises(ValueError, match="memory_budget plans for one part, and 2 are converted: `backbone`, `oth"):
            fit("1GiB", module=module, target=["backbone", "other"])

    @pytest.mark.parametrize("what", ["backbone", "backbone.body", ""])
    def test_a_compiled_part_is_refused(self, what: str) -> None:
        module = Module()
        module.get_submodule(what).compile()
        with pytest.raises(ValueError, match="memory_budget can't plan for `backbone`: it is compiled"):
            fit("1GiB", module=module)

    def test_a_compiled_lightning_module_is_refused(self) -> None:
        with pytest.raises(ValueError, match="memory_budget can't plan for the LightningModule: it is compiled"):
            fit("1GiB", module=torch.compile(Module()))  # type: ignore[arg-type]

    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # PyTorch's compiler looks at it
    def test_another_compiled_module_is_no_matter(self) -> None:
        module = Module()
        module.head.compile(backend="eager")
        assert fit("1GiB", module=module).recomputed == [("none", 0)] * 6
