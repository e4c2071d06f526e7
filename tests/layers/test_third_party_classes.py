"""Layers of other packages against the plain layers: numbers, memory, restoring, state dicts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import efficientnet_lite_pytorch.utils
import efficientnet_pytorch.utils
import pytest
import torch
import torch.nn.functional as F
from helpers.comparing import BACKWARD, FORWARD, Snapshot, assert_close, gradients, outputs
from helpers.model_checks import assert_folded_equals_eval, norms, randomized
from helpers.networks import images
from hypothesis import given, settings
from hypothesis import strategies as st
from segmentation_models_pytorch.encoders import _efficientnet as smp_efficientnet
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d, SplitBatchNorm2d
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.norm_act import SyncBatchNormAct
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from lightning_convbn import ConvBNPair, Mode, find_conv_bn_pairs, fuse_for_deploy, get_mode, set_mode
from lightning_convbn.memory import measure_memory_abstractly

# Libraries whose EfficientNets pad as TensorFlow does.
PADDED = [
    efficientnet_pytorch.utils,
    efficientnet_lite_pytorch.utils,
    smp_efficientnet,
]
FOLDED_MODES: tuple[Mode, ...] = ("tune", "deploy")


class Detectron2FrozenBatchNorm2d(nn.Module):
    """As detectron2 has it: buffers, a version of its own, and a checkpoint's stray key left to the caller."""

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_features, self.eps = num_features, eps
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features) - eps)

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            scale = self.weight * (self.running_var + self.eps).rsqrt()
            bias = self.bias - self.running_mean * scale
            return x * scale.reshape(1, -1, 1, 1) + bias.reshape(1, -1, 1, 1)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, eps=self.eps)


class TransformersFrozenBatchNorm2d(nn.Module):
    """As the DETR-like models of transformers have it: epsilon stands in the forward."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(n))
        self.register_buffer("bias", torch.zeros(n))
        self.register_buffer("running_mean", torch.zeros(n))
        self.register_buffer("running_var", torch.ones(n))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.pop(prefix + "num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, mean, var = (
            tensor.reshape(1, -1, 1, 1) for tensor in (self.weight, self.bias, self.running_mean, self.running_var)
        )
        scale = weight * (var + 1e-5).rsqrt()
        return x * scale + (bias - mean * scale)


def conv(**options: Any) -> nn.Module:
    return nn.Conv2d(16, 16, 3, padding=1, **options)


# name -> a convolution and a BatchNorm of 16 channels that keep the size of the image
PAIRS: dict[str, Callable[[], tuple[nn.Module, nn.Module]]] = {
    "bn_act": lambda: (conv(bias=False), BatchNormAct2d(16)),
    "bn_act, SiLU": lambda: (conv(), BatchNormAct2d(16, act_layer=nn.SiLU)),
    "bn_act, no activation": lambda: (conv(), BatchNormAct2d(16, apply_act=False)),
    "bn_act, dropout": lambda: (conv(), BatchNormAct2d(16, drop_layer=nn.Dropout)),
    "bn_act, not affine": lambda: (conv(), BatchNormAct2d(16, affine=False)),
    "sync_bn_act": lambda: (conv(), synchronised(BatchNormAct2d(16))),
    "frozen_bn_act": lambda: (conv(), FrozenBatchNormAct2d(16)),
    "frozen, torchvision": lambda: (conv(bias=False), FrozenBatchNorm2d(16, eps=1e-3)),
    "frozen, detectron2": lambda: (conv(bias=False), Detectron2FrozenBatchNorm2d(16)),
    "frozen, transformers": lambda: (conv(), TransformersFrozenBatchNorm2d(16)),
    "same": lambda: (Conv2dSame(16, 16, 3, bias=False), nn.BatchNorm2d(16)),
    "same, bn_act": lambda: (Conv2dSame(16, 16, 4, groups=4, bias=True), BatchNormAct2d(16)),
    "static same": lambda: (PADDED[0].Conv2dStaticSamePadding(16, 16, 3, image_size=128), nn.BatchNorm2d(16)),
}
FROZEN = [name for name in PAIRS if "frozen" in name]


def synchronised(norm: nn.Module) -> nn.Module:
    """Make a SyncBatchNormAct out of a BatchNormAct2d, as timm's ``convert_sync_batchnorm`` does."""
    made = SyncBatchNormAct(norm.num_features)
    made.drop, made.act = norm.drop, norm.act
    return made


def network(name: str) -> nn.Sequential:
    """A pair between two convolutions, its statistics as after training."""
    torch.manual_seed(0)
    net = nn.Sequential(*PAIRS[name](), nn.Conv2d(16, 2, 1)).train()
    assert [*find_conv_bn_pairs(net)] == [ConvBNPair("0", "1")]
    return randomized(net)


def assert_equals_eval(model: nn.Module, image: Tensor) -> None:
    """Compare output and gradients in the folded modes with Eval's, in float64."""
    image.requires_grad_()
    found = []
    for mode in ("eval", *FOLDED_MODES):
        set_mode(model, mode)
        torch.manual_seed(3)  # for dropout
        output = model(image)
        found.append((output, gradients(output, image, *model.parameters())))
    for output, slopes in found[1:]:
        assert_close([output], [found[0][0]], FORWARD)
        assert_close(slopes, found[0][1], BACKWARD)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", PAIRS)
def test_output_and_gradients_equal_evals(name: str, training: bool) -> None:
    assert_equals_eval(network(name).double().train(training), images(2, 16, 9, 9, dtype=torch.float64))


@pytest.mark.parametrize("name", PAIRS)
def test_eval_mode_equals_the_plain_layers(name: str) -> None:
    model, image = network(name).double().eval(), images(2, 16, 9, 9, dtype=torch.float64)
    with torch.no_grad():
        assert_close(outputs(model, "eval", image), [model(image)], FORWARD)
    assert_folded_equals_eval(model, image)


def test_dropout_behind_a_folded_batch_norm_follows_train_and_eval() -> None:
    model, image = network("bn_act, dropout"), images(2, 16, 9, 9)
    set_mode(model, "tune")
    torch.manual_seed(0)
    assert not torch.equal(model.train()(image), model(image))
    assert torch.equal(model.eval()(image), model(image))


def test_fused_copy_keeps_drop_and_activation() -> None:
    fused = fuse_for_deploy(network("bn_act, dropout"))
    assert [type(module) for module in fused[1]] == [nn.Dropout, nn.ReLU]
    assert type(fuse_for_deploy(network("bn_act, SiLU"))[1]) is nn.SiLU
    assert type(fuse_for_deploy(network("frozen, torchvision"))[1]) is nn.Identity


def test_what_a_plain_batch_norm_does_not_run_stays_unrun() -> None:
    """torch's ``convert_sync_batchnorm`` leaves timm's drop and activation behind as children that nothing calls."""
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(conv(), BatchNormAct2d(16)))
    model, image = randomized(converted).double().eval(), images(2, 16, 9, 9, dtype=torch.float64)
    assert [name for name, _ in model[1].named_children()] == ["drop", "act"]
    with torch.no_grad():
        assert_close(outputs(model, "eval", image), [model(image)], FORWARD)
    assert_folded_equals_eval(model, image)


@st.composite
def same_convolutions(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, int]]:
    """A convolution with SAME padding, and the size of an image."""
    groups = draw(st.sampled_from([1, 2]))
    options = {name: draw(st.tuples(*[st.integers(1, 3)] * 2)) for name in ("stride", "dilation")}
    layer = Conv2dSame(
        2 * groups,
        3 * groups,
        draw(st.tuples(*[st.integers(1, 5)] * 2)),
        groups=groups,
        bias=draw(st.booleans()),
        **options,
    )
    return layer, draw(st.tuples(*[st.integers(1, 11)] * 2))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(same_convolutions())
def test_same_padding(drawn: tuple[nn.Module, tuple[int, int]]) -> None:
    torch.manual_seed(0)
    layer, size = drawn
    model = randomized(nn.Sequential(layer, nn.BatchNorm2d(layer.out_channels)).double())
    image = images(2, layer.in_channels, *size, dtype=torch.float64)
    assert_equals_eval(model, image)
    (output,) = outputs(model, "tune", image)
    assert output.shape[2:] == tuple(math.ceil(n / stride) for n, stride in zip(size, layer.stride, strict=True))


@pytest.mark.parametrize("library", PADDED)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(kernel=st.integers(1, 5), stride=st.integers(1, 3), size=st.integers(4, 11), bias=st.booleans())
def test_static_same_padding(library: Any, kernel: int, stride: int, size: int, bias: bool) -> None:
    torch.manual_seed(0)
    layer = library.Conv2dStaticSamePadding(4, 6, kernel, image_size=size, stride=stride, bias=bias, groups=2)
    model = randomized(nn.Sequential(layer, nn.BatchNorm2d(6)).double())
    assert_equals_eval(model, images(2, 4, size, size, dtype=torch.float64))


@pytest.mark.parametrize("library", PADDED)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(kernel=st.integers(1, 5), stride=st.integers(1, 3), size=st.integers(4, 11), dilation=st.integers(1, 2))
def test_dynamic_same_padding(library: Any, kernel: int, stride: int, size: int, dilation: int) -> None:
    torch.manual_seed(0)
    layer = library.Conv2dDynamicSamePadding(4, 6, kernel, stride=stride, dilation=dilation, groups=2)
    model = randomized(nn.Sequential(layer, nn.BatchNorm2d(6)).double())
    assert_equals_eval(model, images(2, 4, size, size + 1, dtype=torch.float64))


def kept(model: nn.Module, mode: Mode) -> int:
    """Bytes kept for the backward pass, for an image so large that vectors of a value per channel don't count."""
    return measure_memory_abstractly(model, (torch.zeros(1, 16, 128, 128),), {}, mode=mode).saved_bytes


@pytest.mark.parametrize("name", PAIRS)
def test_tune_keeps_what_deploy_keeps(name: str) -> None:
    """The floor is a plain, trainable network without BatchNorms."""
    model = network(name).eval()
    floor = kept(fuse_for_deploy(model), "train")
    assert floor > 2**20
    assert kept(model, "tune") <= 1.01 * floor


@pytest.mark.parametrize("name", FROZEN)
@pytest.mark.parametrize("trainable", [True, False])
def test_tune_never_keeps_more_than_eval_with_a_frozen_norm(name: str, trainable: bool) -> None:
    model = network(name).requires_grad_(trainable)
    model[2].requires_grad_()
    assert kept(model, "tune") <= kept(model, "eval")


@pytest.mark.parametrize("name", PAIRS)
def test_restored_exactly(name: str) -> None:
    model = network(name)
    model[1].training = False
    before = Snapshot.of(model)
    for mode in ("eval", "tune", "deploy", "tune", "eval"):
        set_mode(model, mode)
        model(images(1, 16, 8, 8))
        now = Snapshot.of(model)
        assert (now.classes, now.parameters, now.tensors) == (before.classes, before.parameters, before.tensors)
    set_mode(model, "train")
    assert Snapshot.of(model) == before


@pytest.mark.parametrize("mode", ["train", "eval", "tune", "deploy"])
@pytest.mark.parametrize("name", ["frozen, torchvision", "frozen, transformers", "frozen_bn_act"])
def test_checkpoint_of_a_batch_norm_loads_into_a_frozen_one(name: str, mode: Mode) -> None:
    """It has a key too many, ``num_batches_tracked``, which the plain class drops; a converted one must do so, too."""
    model, image = network(name), images(1, 16, 8, 8)
    set_mode(model, mode)
    outputs(model, mode, image)  # so that Deploy mode has a fold that goes stale
    checkpoint = {key: tensor + 0.25 for key, tensor in model.state_dict().items()}
    result = model.load_state_dict({**checkpoint, "1.num_batches_tracked": torch.tensor(7)})
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert all(torch.equal(tensor, checkpoint[key]) for key, tensor in model.state_dict().items())
    assert_close(outputs(model, mode, image), outputs(model, "eval", image), 1e-5)


def test_a_missing_key_is_still_an_error() -> None:
    model = network("frozen, torchvision")
    set_mode(model, "tune")
    state = {key: tensor for key, tensor in model.state_dict().items() if key != "1.running_var"}
    with pytest.raises(RuntimeError, match=r"1\.running_var"):
        model.load_state_dict(state)
    assert get_mode(model) == "tune"


def test_an_unknown_batch_norm_is_frozen_and_says_why() -> None:
    norm = SplitBatchNorm2d(16, num_splits=2)
    model, image = randomized(nn.Sequential(conv(), norm)).eval(), images(2, 16, 8, 8)
    with torch.no_grad():
        expected = model(image)
    reason = f"is a {type(norm).__name__}, which is not in the table of supported layers"
    pairs = set_mode(model, "tune")
    assert pairs.frozen["1"] == reason
    before = {name: tensor.clone() for name, tensor in norm.state_dict().items()}
    with torch.no_grad():
        assert_close([model.train()(image)], [expected], 0.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in norm.state_dict().items())
    set_mode(model, "train")
    assert not norm._forward_pre_hooks


def test_a_frozen_batch_norm_is_recognised_by_its_buffers() -> None:
    """Of whatever package; one of the name that holds something else is not."""

    class OtherFrozenBatchNorm2d(FrozenBatchNorm2d):
        def __init__(self, num_features: int) -> None:
            super().__init__(num_features)
            self.register_buffer("extra", torch.ones(num_features))

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = super().forward(x) + self.get_buffer("extra").view(1, -1, 1, 1)
            return output

    assert len(norms(nn.Sequential(FrozenBatchNorm2d(4), Detectron2FrozenBatchNorm2d(4)))) == 2
    assert not len(find_conv_bn_pairs(nn.Sequential(conv(), OtherFrozenBatchNorm2d(16))))
