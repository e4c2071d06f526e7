"""`torch.compile` under the callback: no graph break, no recompilation after the first epoch, weights never stale."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.comparing import BACKWARD, FORWARD, assert_close
from helpers.tiny_training import (
    BATCHES_PER_EPOCH,
    LIGHTNING_SAYS,
    BoringModule,
    PrintedLines,
    differing,
    make_trainer,
    quick,
    state_of,
)
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.torch_version import TorchVersion

from lightning_convbn import ConvBNModeCallback, find_conv_bn_pairs, measure_memory, set_mode

pytestmark = LIGHTNING_SAYS

EPOCHS = 3
DRIFT = 10 * BACKWARD  # of the losses and the weights: the errors of nine steps' gradients add up


@pytest.fixture
def compiler() -> Iterator[CompileCounterWithBackend]:
    """A backend that counts its graphs, on a Dynamo without a past."""
    torch._dynamo.reset()
    counters.clear()
    yield CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()


class Compilable(BoringModule):
    """Records its losses outside of the steps, and how many graphs there are after each epoch; in float64."""

    compiler: CompileCounterWithBackend

    def __init__(self) -> None:
        super().__init__()
        self.double()

    def step(self, stage: str, batch: list[Tensor]) -> Tensor:
        images, targets = (tensor.double() for tensor in batch)
        return F.mse_loss(self(images), targets)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.step("validate", batch)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses["fit"].append(outputs["loss"].item())

    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.losses["validate"].append(outputs.item())

    def on_train_epoch_end(self) -> None:
        self.graphs.append(self.compiler.frame_count)


def build(where: str, compiler: CompileCounterWithBackend) -> Compilable:
    """Compile nothing, the whole module, or its backbone, wrapped or in place."""

    class Configured(Compilable):
        def configure_model(self) -> None:
            if where == "backbone in place":
                self.backbone.compile(backend=compiler, fullgraph=True)
            elif where == "backbone" and not hasattr(self.backbone, "_orig_mod"):
                self.backbone = torch.compile(self.backbone, backend=compiler, fullgraph=True)

    module = Configured()
    module.compiler, module.graphs = compiler, []
    return module


def fit(where: str, compiler: CompileCounterWithBackend, *callbacks: Any) -> Compilable:
    module = build(where, compiler)
    given = torch.compile(module, backend=compiler) if where == "module" else module
    make_trainer(*callbacks, max_epochs=EPOCHS).fit(given)
    return module


PLACES = ["module", "backbone", "backbone in place"]


@pytest.mark.parametrize(
    ("where", "eval_mode"),
    [
        ("module", "tune"),
        ("backbone in place", "deploy"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("module", "deploy"), ("backbone", "eval"))),
    ],
)
def test_compiled_training_is_eager_training_without_a_recompilation(
    where: str, eval_mode: Any, compiler: CompileCounterWithBackend
) -> None:
    """One graph to train, one to validate; both see the weights of the moment in every epoch."""
    eager = fit("nowhere", compiler, quick(eval_mode=eval_mode))
    assert compiler.frame_count == 0
    compiled = fit(where, compiler, quick(eval_mode=eval_mode))
    assert compiled.graphs == [2] * EPOCHS
    assert not counters["graph_break"]
    for stage in ("fit", "validate"):
        torch.testing.assert_close(compiled.losses[stage], eager.losses[stage], rtol=DRIFT, atol=0)
    assert len(set(compiled.losses["validate"])) == EPOCHS


@pytest.mark.parametrize("where", ["module", "backbone"])
def test_the_looks_at_the_first_batch_stay_out_of_the_compiled_code(
    where: str, compiler: CompileCounterWithBackend
) -> None:
    """They verify and count as ever, and report the names of the plain module."""
    printed = PrintedLines()
    fit(where, compiler, printed, ConvBNModeCallback())
    assert "folded         3 of 4 BatchNorms" in printed.text
    assert "verified: Tune equals Eval" in printed.text
    assert re.search(r"kept for backward: Eval 0\.\d+ MiB, Tune 0\.\d+ MiB", printed.text)
    assert "_orig_mod" not in printed.text


@pytest.mark.parametrize("where", ["module", "backbone"])
def test_a_compiled_module_is_exported(where: str, compiler: CompileCounterWithBackend, tmp_path: Path) -> None:
    """As the eager one, uncompiled, and with the weights at the end of the fit."""
    states = []
    for place in ("nowhere", where):
        fit(place, compiler, quick(export_path=tmp_path / f"{place}.pt"))
        states.append(torch.load(tmp_path / f"{place}.pt", weights_only=True))
    eager, compiled = states
    torch.testing.assert_close([*compiled.values()], [*eager.values()], rtol=DRIFT, atol=DRIFT)


def test_an_error_at_the_first_batch_leaves_the_compiler_on(compiler: CompileCounterWithBackend) -> None:
    """The first batch is trained on uncompiled; afterwards whatever is compiled is compiled again."""

    class Fails(BoringModule):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            raise RuntimeError("out of data")

    with pytest.raises(RuntimeError, match="out of data"):
        make_trainer(quick()).fit(Fails())
    torch.compile(nn.ReLU(), backend=compiler)(torch.ones(2))
    assert compiler.frame_count == 1


def test_only_the_first_batch_is_trained_on_uncompiled(compiler: CompileCounterWithBackend) -> None:
    """The one that is verified and counted."""
    compiling: list[bool] = []

    class Asks(Compilable):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            before = compiler.frame_count
            loss = super().training_step(batch, batch_idx)
            compiling.append(compiler.frame_count > before)
            return loss

        def configure_model(self) -> None:
            self.backbone.compile(backend=compiler)

    module = Asks()
    module.compiler, module.graphs = compiler, []
    make_trainer(quick()).fit(module)
    assert compiling == [False, True, *[False] * (BATCHES_PER_EPOCH - 2)]


def test_a_compiled_model_can_be_switched_and_measured_without_a_trainer(compiler: CompileCounterWithBackend) -> None:
    """By hand, on a model that was compiled before its first switch; looking at it compiles nothing."""
    plain = BoringModule().backbone.double()
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected = plain.eval()(images)
    kept = measure_memory(plain, images, mode="tune").saved_bytes

    model = BoringModule().backbone.eval().double()
    model.compile(backend=compiler, fullgraph=True)
    assert len(find_conv_bn_pairs(model)) == 3
    assert len(find_conv_bn_pairs(model, example_inputs=(images,))) == 3
    assert measure_memory(model, images, mode="tune").saved_bytes == kept
    assert compiler.frame_count == 0
    for mode in ("tune", "deploy", "eval", "train", "tune"):
        set_mode(model, mode)
        assert_close([model(images)], [expected], FORWARD)
    assert differing(state_of(model), state_of(plain)) == []


@pytest.mark.skipif(TorchVersion(torch.__version__) < "2.13", reason="PyTorch 2.9 keeps it in what it compiles")
def test_a_compiled_forward_keeps_no_folded_weight() -> None:
    """What is kept of the shape of a weight is the parameter itself; the compiler alone would keep the product."""
    model = BoringModule().backbone
    set_mode(model, "tune")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager_decomp_partition", fullgraph=True)
    parameters = {parameter.data_ptr() for parameter in model.parameters()}
    shapes = {parameter.shape for parameter in model.parameters() if parameter.dim() == 4}
    of_shape: list[bool] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.shape in shapes:
            of_shape.append(tensor.data_ptr() in parameters)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = compiled(torch.randn(2, 3, 8, 8))
    assert of_shape == [True] * 3
    output.sum().backward()
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("where", PLACES)
def test_training_compiled_by_inductor_is_eager_training(where: str) -> None:
    torch._dynamo.reset()
    inductor = CompileCounterWithBackend("inductor")
    eager, compiled = fit("nowhere", inductor, quick()), fit(where, inductor, quick())
    assert compiled.graphs == [2] * EPOCHS
    for stage in ("fit", "validate"):
        torch.testing.assert_close(compiled.losses[stage], eager.losses[stage], rtol=DRIFT, atol=0)
