"""The Deploy copy: it has plain layers only, equals Eval mode, and leaves the original as it was."""

from __future__ import annotations

import pickle
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.comparing import Snapshot, assert_close, gradients
from helpers.networks import Net, images, randomized, small_net
from torch import Tensor, nn

from lightning_convbn import ConvBNPairs, Mode, conv_bn_mode, export, find_conv_bn_pairs, fuse_for_deploy, set_mode


def expected_output(net: nn.Module, input: Tensor) -> Tensor:
    return net.eval()(input)


@pytest.mark.parametrize("mode", ["train", "tune", "deploy"])
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
    conv, bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
    net = Net(lambda net, x: net.layers[1](net.conv(x)), conv=conv, bn=bn, layers=nn.ModuleList([conv, bn]))
    net, input = randomized(net).double(), images(2, 3, 8, 8, dtype=torch.float64)
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


def tied_decoder(net: Net, x: Tensor) -> Tensor:
    """The decoder uses the weight of the encoder's convolution."""
    features = nn.functional.conv_transpose2d(net.bn(net.conv(x)), net.conv.weight)
    return net.last_bn(net.last(features))  # type: ignore[no-any-return]


def reads_the_norm(net: Net, x: Tensor) -> Tensor:
    shape = (1, -1, 1, 1)
    return net.bn(net.conv(x)) * net.bn.weight.view(shape) + net.bn.running_mean.view(shape)  # type: ignore[no-any-return]


def penalised(net: Net, x: Tensor) -> Tensor:
    """The output has a penalty on all weights in it. It does not depend on the input."""
    return net.bn(net.conv(x)) + sum(parameter.square().sum() for parameter in net.parameters())  # type: ignore[no-any-return]


def tied_by_name(net: Net, x: Tensor) -> Tensor:
    return nn.functional.conv_transpose2d(net.bn(net.conv(x)), net.decoder)


def untraceable(net: Net, x: Tensor) -> Tensor:
    return tied_decoder(net, x) if x.sum() < 1e9 else x


def autoencoder(forward: Callable[[Net, Tensor], Tensor]) -> Net:
    layers = {"conv": nn.Conv2d(3, 4, 3), "bn": nn.BatchNorm2d(4)}
    net = Net(forward, **layers, last=nn.Conv2d(3, 3, 1), last_bn=nn.BatchNorm2d(3))
    if forward is tied_by_name:  # which is found under the name of the decoder first
        net.decoder = net.conv.weight
    return randomized(net).double()  # type: ignore[return-value]


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("forward", [tied_decoder, reads_the_norm, penalised, tied_by_name])
def test_a_pair_whose_parameters_are_read_elsewhere_stays_as_it_is(forward: Any, recorded: bool) -> None:
    net, input = autoencoder(forward), images(2, 3, 8, 8, dtype=torch.float64)
    expected = expected_output(net, input)
    example = (input,) if recorded else None
    pairs = find_conv_bn_pairs(net, example_inputs=example)
    assert ("conv", "bn") in pairs
    assert re.match(
        r"a Deploy copy would change the parameters of `(conv|bn)`, which are also read by", pairs.unfused["bn"]
    )
    for fused in (
        fuse_for_deploy(net, example_inputs=example),
        fuse_for_deploy(net, pairs=pairs),
        fuse_for_deploy(net, pairs=ConvBNPairs([("conv", "bn")])),
    ):
        assert type(fused.bn) is nn.BatchNorm2d
        assert_close([fused(input)], [expected], 1e-12)
    with conv_bn_mode(net, "tune"):
        assert "convbn='tune'" in str(net.conv)
        assert_close([net(input)], [expected], 1e-12)


@pytest.mark.parametrize("given", [False, True])
def test_a_pair_that_is_one_only_while_gradients_are_wanted_stays_as_it_is(given: bool) -> None:
    def asks(net: Net, x: Tensor) -> Tensor:
        output = net.first(x)
        return net.bn(net.second(output) if torch.is_grad_enabled() else output)

    net = Net(asks, first=nn.Conv2d(3, 3, 1), second=nn.Conv2d(3, 3, 1), bn=nn.BatchNorm2d(3))
    model, input = randomized(net).eval(), images(2, 3, 4, 4)
    fused = fuse_for_deploy(model, pairs=find_conv_bn_pairs(model) if given else None)
    for wanted in (True, False):
        with torch.set_grad_enabled(wanted):
            assert torch.equal(fused(input), model(input))


def test_other_pairs_of_a_tied_decoder_are_folded() -> None:
    assert type(fuse_for_deploy(autoencoder(tied_decoder)).last_bn) is nn.Identity


@pytest.mark.parametrize("read", ["dtype", "shape"])
def test_reading_what_a_weight_is_like_is_no_use_of_it(read: str) -> None:
    def reading(net: Net, x: Tensor) -> Tensor:
        like = getattr(net.conv.weight, read)
        return net.bn(net.conv(x if read == "shape" else x.to(like))) * (like is not None)  # type: ignore[no-any-return]

    for example in (None, (images(2, 3, 8, 8, dtype=torch.float64),)):
        assert not find_conv_bn_pairs(autoencoder(reading), example_inputs=example).unfused


def test_a_linear_layer_that_shares_its_weight_as_a_module_keeps_it() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    net[2].weight = net[0].weight
    net, input = randomized(net).double(), images(5, 4, dtype=torch.float64)
    fused = fuse_for_deploy(net)
    assert "running_mean" not in dict(fused[1].named_buffers())
    assert_close([fused(input)], [expected_output(net, input)], 1e-12)


@pytest.mark.parametrize("recorded", [False, True])
def test_a_pair_in_a_forward_that_branches_at_random_stays_as_it_is(recorded: bool) -> None:
    def branches(net: Net, x: Tensor) -> Tensor:
        output = net.conv(x)
        return net.bn(output) + (output if random.random() < 0.5 else 0)

    net = Net(branches, conv=nn.Conv2d(3, 4, 1), bn=nn.BatchNorm2d(4))
    model, input = randomized(net.eval()), images(2, 3, 8, 8)
    for seed in range(6):
        random.seed(seed)
        pairs = find_conv_bn_pairs(model, example_inputs=(input,) if recorded else None)
        fused = fuse_for_deploy(model, pairs=pairs)
        if len(pairs):
            assert "the forward of `the model` draws random numbers" in pairs.unfused["bn"]
        for draw in range(4):
            random.seed(draw)
            expected = model(input)
            random.seed(draw)
            assert_close([fused(input)], [expected], 1e-6)


def test_a_model_that_can_not_be_traced_needs_example_inputs() -> None:
    """Its code may read a weight, and only a run shows it."""
    net, input = autoencoder(untraceable), images(2, 3, 8, 8, dtype=torch.float64)
    net.block = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    message = r"Net can't be folded for good by its code alone, because the model can't be traced; give example"
    for pairs in (None, find_conv_bn_pairs(net)):
        with pytest.raises(ValueError, match=message):
            fuse_for_deploy(net, pairs=pairs)
    fused = fuse_for_deploy(net, example_inputs=(input,))
    assert [type(fused.bn), type(fused.last_bn)] == [nn.BatchNorm2d, nn.Identity]
    assert_close([fused(input)], [expected_output(net, input)], 1e-12)


# A pair whose BatchNorm takes inputs of several dimensions, an input that suits, and one that fits by chance.
SEVERAL = {
    "linear": (lambda: (nn.Linear(5, 4), nn.BatchNorm1d(4)), (6, 5), (2, 4, 5)),
    "Conv1d": (lambda: (nn.Conv1d(5, 4, 3), nn.BatchNorm1d(4)), (2, 5, 6), (5, 6)),
    "Conv2d": (lambda: (nn.Conv2d(5, 4, 3), nn.SyncBatchNorm(4)), (2, 5, 6, 6), (5, 6, 6)),
}


@pytest.mark.filterwarnings("ignore:.torch.jit")
@pytest.mark.parametrize("case", SEVERAL)
def test_a_copy_refuses_dimensions_for_which_its_fold_is_wrong(case: str) -> None:
    build, suits, by_chance = SEVERAL[case]
    net = randomized(nn.Sequential(*build())).double()
    inputs = [images(*shape, dtype=torch.float64) for shape in (suits, by_chance)]
    for fused in (fuse_for_deploy(net), pickle.loads(pickle.dumps(fuse_for_deploy(net)))):
        assert_close([fused(inputs[0])], [expected_output(net, inputs[0])], 1e-12)
        with pytest.raises(AssertionError, match=r"1: this Deploy copy is right for \d dimensions here"):
            fused(inputs[1])
    assert_close([torch.jit.script(fuse_for_deploy(net))(inputs[0])], [expected_output(net, inputs[0])], 1e-12)
    for input in inputs:
        fused = fuse_for_deploy(net, example_inputs=(input,))
        assert_close([fused(input)], [expected_output(net, input)], 1e-12)


def test_a_pair_seen_with_other_dimensions_is_not_folded() -> None:
    pairs = find_conv_bn_pairs(nn.Sequential(*SEVERAL["linear"][0]()), example_inputs=(images(2, 4, 5),))
    assert pairs.unpaired == {"1": "gets an input of 3 dimensions from `0` (Linear), whose fold is for 2"}


@pytest.mark.parametrize(("suffix", "shape"), [(".onnx", (2, 4, 5)), (".pt2", (6, 5)), (".pt", (2, 4, 5))])
def test_a_file_of_a_linear_pair_computes_what_eval_computes(
    shape: tuple[int, ...], suffix: str, tmp_path: Path
) -> None:
    net = randomized(nn.Sequential(*SEVERAL["linear"][0]()))
    assert export(net, tmp_path / f"net{suffix}", (images(*shape),)).exists()
