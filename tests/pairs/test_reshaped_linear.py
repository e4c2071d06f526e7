"""A linear layer whose output is flattened or transposed before its BatchNorm1d: folded if features become channels."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.comparing import BACKWARD, FORWARD, assert_close, gradients
from helpers.model_checks import assert_folded_equals_eval, assert_provers_agree, randomized
from helpers.networks import images
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from lightning_convbn import Mode, export, find_conv_bn_pairs, fuse_for_deploy, set_mode
from lightning_convbn.layers.supported_layers import is_norm

Reshape = Callable[[Tensor], Tensor]
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # what the compiler hides itself
BATCH = 3, 5, 4
ROWS: dict[str, Reshape] = {
    "flatten(0, 1)": lambda y: y.flatten(0, 1),
    "flatten(0, -2)": lambda y: torch.flatten(y, 0, -2),
    "reshape(-1, 6)": lambda y: y.reshape(-1, 6),
    "view(-1, 6)": lambda y: y.view(-1, 6),
}
TRANSPOSED: dict[str, Reshape] = {
    "transpose(1, 2)": lambda y: y.transpose(1, 2),
    "transpose(-1, -2)": lambda y: torch.transpose(y, -1, -2),
    "permute(0, 2, 1)": lambda y: y.permute(0, 2, 1),
    "permute((0, 2, 1))": lambda y: torch.permute(y, (0, 2, 1)),
    "contiguous": lambda y: y.transpose(1, 2).contiguous(),
    "there and back and there": lambda y: y.transpose(1, 2).transpose(1, 2).permute(0, -1, 1),
}
PROVEN = {**ROWS, **TRANSPOSED}
UNPROVEN: dict[str, Reshape] = {
    "the batch becomes the channels": lambda y: y.permute(1, 0, 2),
    "features of several rows in a channel": lambda y: y.reshape(-1, 6, y.shape[1]),
    "a size of the batch": lambda y: y.reshape(y.shape[0] * y.shape[1], 6),
    "a function between two views": lambda y: (y.transpose(1, 2) + 1).transpose(1, 2).transpose(1, 2),
    "by name": lambda y: y.flatten(end_dim=1),
}


@pytest.fixture(autouse=True)
def _no_past() -> None:
    torch._dynamo.reset()


class Reshaped(nn.Module):
    """A linear layer, a view of its output, and a BatchNorm."""

    def __init__(self, reshape: Reshape, norm: type[nn.Module] = nn.BatchNorm1d, inputs: int = 4) -> None:
        super().__init__()
        self.linear, self.bn, self.reshape = nn.Linear(inputs, 6), norm(6), reshape
        randomized(self.double().eval())

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.reshape(self.linear(x))))


def batch(*shape: int) -> Tensor:
    return images(*(shape or BATCH)).double()


@pytest.mark.parametrize("name", PROVEN)
def test_is_folded_in_every_mode_and_computes_as_eval(name: str) -> None:
    model = Reshaped(PROVEN[name])
    pairs = assert_provers_agree(model, batch())
    assert [*pairs] == [("linear", "bn")]
    assert pairs.reshaped == {"bn": 2 if name in ROWS else 3}
    assert_folded_equals_eval(model, batch(), pairs=pairs)


@pytest.mark.parametrize("name", PROVEN)
def test_no_plain_output_is_computed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Reshaped(PROVEN[name])
    set_mode(model, "tune")
    monkeypatch.setattr(nn.Linear, "forward", lambda *_: pytest.fail("the plain layer has run"))
    model(batch())


@pytest.mark.parametrize("name", UNPROVEN)
def test_what_is_not_proven_is_refused_and_computes_as_eval(name: str) -> None:
    model, x = Reshaped(UNPROVEN[name]), batch(3, 6, 4) if "becomes" in name else batch()
    x = x.transpose(0, 1) if "becomes" in name else x
    for pairs in (find_conv_bn_pairs(model), find_conv_bn_pairs(model, example_inputs=(x,))):
        assert not len(pairs)
        assert "not from a convolution" in pairs.unpaired["bn"]
        assert_close([fuse_for_deploy(model, pairs=pairs)(x)], [model(x)], FORWARD)


@pytest.mark.parametrize("name", PROVEN)
def test_what_comes_out_lies_in_memory_as_in_eval_mode(name: str) -> None:
    """So a `view` works behind it, and a dropout draws alike."""
    model = Reshaped(PROVEN[name])
    expected = model(batch())
    outputs = [fuse_for_deploy(model)(batch())]
    for mode in ("tune", "deploy"):
        set_mode(model, mode)
        outputs += [model(batch()), torch.compile(model, backend="eager")(batch())]
    assert {output.stride() for output in outputs} == {expected.stride()}


def test_a_view_that_something_else_reads_is_a_second_use_of_the_output() -> None:
    class Tapped(Reshaped):
        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x).transpose(1, 2)
            return self.bn(y) + torch.tanh(y)

    model = Tapped(ROWS["flatten(0, 1)"])
    for pairs in (find_conv_bn_pairs(model), find_conv_bn_pairs(model, example_inputs=(batch(),))):
        assert "is also used by `tanh`" in pairs.unpaired["bn"]


def test_a_pair_is_proven_on_tensors_without_data() -> None:
    model = Reshaped(PROVEN["transpose(1, 2)"])
    with FakeTensorMode(allow_non_fake_inputs=True):
        pairs = find_conv_bn_pairs(model, example_inputs=(torch.empty(*BATCH).double(),))
    assert len(pairs) == 1


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.SyncBatchNorm])
@pytest.mark.parametrize("mode", ["tune", "deploy"])
@pytest.mark.parametrize("shape", [(5, 6, 6, 4), (2, 3, 6, 4)])
def test_an_input_of_another_dimension_computes_as_eval(mode: Mode, shape: tuple[int, ...], norm: Any) -> None:
    """`flatten(0, 1)` leaves three dimensions then, of which the second is no feature."""
    model = Reshaped(PROVEN["flatten(0, 1)"], norm)
    expected = model(batch(*shape))
    set_mode(model, mode)
    assert_close([model(batch(*shape))], [expected], FORWARD)


@pytest.mark.parametrize("name", PROVEN)
def test_a_deploy_copy_is_folded_and_refuses_other_dimensions(name: str) -> None:
    model = Reshaped(PROVEN[name])
    fused = fuse_for_deploy(model)
    assert not any(map(is_norm, fused.modules()))
    assert_close([fused(batch())], [model(batch())], FORWARD)
    if name == "flatten(0, 1)":
        with pytest.raises(AssertionError, match="bn: this Deploy copy is right for 2 dimensions here"):
            fused(batch(5, 6, 6, 4))


@pytest.mark.filterwarnings("ignore")  # the exporter's own
@pytest.mark.parametrize("name", ["flatten(0, 1)", "transpose(1, 2)"])
def test_an_exported_file_computes_as_eval(name: str, tmp_path: Path) -> None:
    model = Reshaped(PROVEN[name])
    path = export(model, tmp_path / "model.pt2", (batch(),))
    assert_close([torch.export.load(path).module()(batch())], [model(batch())], FORWARD)


class TestCompiled:
    @pytest.mark.parametrize("name", PROVEN)
    @pytest.mark.parametrize("trained", ["all", "gamma"])
    def test_computes_as_eval(self, name: str, trained: str) -> None:
        """If only gamma is trained, and there are fewer features than inputs, the pair runs unfolded."""
        model = Reshaped(PROVEN[name], inputs=8)
        model.linear.requires_grad_(trained == "all")
        x = batch(6, 6, 8)
        expected = model(x)
        wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
        expected_gradients = gradients(expected, *wanted)
        set_mode(model, "tune")
        output = torch.compile(model, backend="eager")(x)
        assert_close([output], [expected], FORWARD)
        assert_close(gradients(output, *wanted), expected_gradients, BACKWARD)

    @pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.SyncBatchNorm])
    def test_an_input_of_another_dimension_is_an_error(self, norm: Any) -> None:
        model = Reshaped(PROVEN["flatten(0, 1)"], norm)
        set_mode(model, "tune")
        compiled = torch.compile(model, backend="eager")
        compiled(batch())
        with pytest.raises(RuntimeError, match="right for inputs of 2 or 3 dimensions, not for 4: leave this pair out"):
            compiled(batch(5, 6, 6, 4))


def test_a_converted_model_remembers_the_dimensions() -> None:
    model = Reshaped(PROVEN["transpose(1, 2)"])
    expected = model(batch())
    set_mode(model, "tune", pairs=find_conv_bn_pairs(model))
    set_mode(model, "deploy")
    assert_close([fuse_for_deploy(copy.deepcopy(model))(batch()), model(batch())], [expected] * 2, FORWARD)
