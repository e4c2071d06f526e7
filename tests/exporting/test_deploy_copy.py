"""The Deploy copy: it has plain layers only, equals Eval mode, and leaves the original as it was."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.comparing import Snapshot, assert_close, gradients
from helpers.networks import images, randomized, small_net
from torch import Tensor, nn

from lightning_convbn import ConvBNPairs, Mode, find_conv_bn_pairs, fuse_for_deploy, set_mode


def expected_output(net: nn.Module, input: Tensor) -> Tensor:
    return net.eval()(input)


@pytest.mark.parametrize("mode", ["train", "eval", "tune", "deploy"])
def test_the_copy_equals_eval_and_the_original_is_not_touched(mode: Mode) -> None:
    net, input = small_net().double().train(), images(2, 3, 8, 8, dtype=torch.float64)
    set_mode(net, mode)
    if mode == "deploy":
        with torch.no_grad():
            net(input)  # makes the folded weights
    found = Snapshot.of(net)
    fused = fuse_for_deploy(net)
    assert Snapshot.of(net) == found
    set_mode(net, "train")
    assert_close([fused(input)], [expected_output(net, input)], 1e-12)
    shared = {tensor.data_ptr() for tensor in net.state_dict().values()}
    assert not shared & {tensor.data_ptr() for tensor in fused.state_dict().values()}


def test_the_copy_consists_of_plain_layers_in_eval_state() -> None:
    net = small_net()
    set_mode(net, "tune")
    fused = fuse_for_deploy(net)
    assert not [module for module in fused.modules() if type(module).__module__.startswith("lightning_convbn")]
    assert b"lightning_convbn" not in pickle.dumps(fused)
    assert not any(module.training for module in fused.modules())
    assert [name for name, module in fused.named_modules() if type(module) is nn.Identity] == ["1", "5", "8"]
    assert type(fused[3]) is nn.BatchNorm2d
    assert all(fused[index].bias is not None for index in (0, 4, 7))


@pytest.mark.parametrize(
    ("trainable", "of_weight", "of_bias"),
    [
        ((), False, False),
        (("0.weight",), True, True),
        (("0.bias",), False, True),
        (("1.weight",), True, True),
        (("1.bias",), False, True),
    ],
)
def test_a_folded_parameter_wants_a_gradient_if_a_source_does(
    trainable: tuple[str, ...], of_weight: bool, of_bias: bool
) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name in trainable)
    fused = fuse_for_deploy(net)
    assert fused[0].bias.requires_grad == of_bias
    assert fused[0].weight.requires_grad == of_weight


def test_gradients_of_the_copys_input_equal_evals() -> None:
    net, input = small_net().double(), images(2, 3, 8, 8, dtype=torch.float64).requires_grad_()
    fused = fuse_for_deploy(net)
    assert_close(gradients(fused(input), input), gradients(expected_output(net, input), input), 1e-10)


def test_a_norm_under_two_names_is_replaced_under_both() -> None:
    class TwoNames(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
            self.layers = nn.ModuleList([self.conv, self.bn])

        def forward(self, input: Tensor) -> Tensor:
            return self.layers[1](self.conv(input))

    net, input = randomized(TwoNames()).double(), images(2, 3, 8, 8, dtype=torch.float64)
    fused = fuse_for_deploy(net)
    assert type(fused.bn) is type(fused.layers[1]) is nn.Identity
    assert_close([fused(input)], [expected_output(net, input)], 1e-12)


def test_only_the_pairs_given_are_folded() -> None:
    net, input = small_net().double(), images(2, 3, 8, 8, dtype=torch.float64)
    fused = fuse_for_deploy(net, pairs=find_conv_bn_pairs(net).unfold({"5": "not this one"}))
    assert [type(fused[index]) for index in (1, 5, 8)] == [nn.Identity, nn.BatchNorm2d, nn.Identity]
    assert_close([fused(input)], [expected_output(net, input)], 1e-12)


def test_pairs_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="pairs: Sequential has no module `nowhere`"):
        fuse_for_deploy(small_net(), pairs=ConvBNPairs([("nowhere", "1")]))


def test_a_model_without_norms_is_copied() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3))
    fused = fuse_for_deploy(net)
    assert fused is not net
    assert torch.equal(fused(images(1, 3, 8, 8)), net(images(1, 3, 8, 8)))


def test_the_copy_of_a_transposed_convolution_and_a_linear_layer_equals_eval() -> None:
    net = nn.Sequential(
        nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, bias=False),
        nn.BatchNorm2d(6),
        nn.Flatten(),
        nn.Linear(6 * 9 * 9, 5),
        nn.BatchNorm1d(5),
    )
    net, input = randomized(net).double(), images(2, 4, 4, 4, dtype=torch.float64)
    assert_close([fuse_for_deploy(net)(input)], [expected_output(net, input)], 1e-12)


def test_a_saved_copy_runs_where_the_package_can_not_be_imported(tmp_path: Path) -> None:
    net, input = small_net(), images(2, 3, 8, 8)
    set_mode(net, "deploy")
    fused = fuse_for_deploy(net)
    torch.save((fused, input, fused(input).detach()), tmp_path / "fused.pt")
    script = (
        "import sys, torch; sys.modules['lightning_convbn'] = None\n"
        "model, input, output = torch.load('fused.pt', weights_only=False)\n"
        "torch.testing.assert_close(model(input).detach(), output)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
