"""Other libraries: transformers, segmentation-models-pytorch, mmcv, efficientnet_pytorch and its lite twin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import efficientnet_lite_pytorch
import efficientnet_pytorch
import pytest
import segmentation_models_pytorch as smp
import torch
import transformers
from helpers.model_checks import Counts, assert_folded_equals_eval, assert_provers_agree, randomized
from helpers.networks import Net, images
from helpers.transformers_models import RESNET, mobilenet_v2, resnet, rt_detr
from mmcv.cnn import ConvModule, DepthwiseSeparableConvModule
from torch import nn

from lightning_convbn import ConvBNPair, find_conv_bn_pairs

# What other libraries deprecate from release to release is no failure of these tests.
pytestmark = pytest.mark.filterwarnings("ignore")


def regnet() -> nn.Module:
    config = transformers.RegNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 2], groups_width=8)
    return transformers.RegNetForImageClassification(config)


def detr() -> nn.Module:
    """Its backbone's BatchNorms are replaced by frozen ones, whose epsilon stands in their forward."""
    config = transformers.DetrConfig(
        backbone_config=transformers.ResNetConfig(**RESNET, out_features=["stage2"]),
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_queries=3,
    )
    return transformers.DetrForObjectDetection(config)


@pytest.mark.parametrize(
    ("build", "counts", "untraced"),
    [
        pytest.param(resnet, Counts(8, 0), 0, id="resnet"),
        pytest.param(regnet, Counts(12, 0), 0, id="regnet"),
        pytest.param(mobilenet_v2, Counts(52, 0), 52, id="mobilenet_v2"),  # pads by the size of the image
        pytest.param(detr, Counts(8, 0), 0, id="detr"),
        pytest.param(rt_detr, Counts(65, 0), 0, id="rt_detr"),
    ],
)
def test_transformers(build: Callable[[], nn.Module], counts: Counts, untraced: int) -> None:
    torch.manual_seed(0)
    model, image = randomized(build().eval()), images(1, 3, 64, 64)
    pairs = assert_provers_agree(model, image, untraced=untraced)
    assert Counts.of(pairs) == counts
    assert_folded_equals_eval(model, image, pairs=pairs)


def test_detr_folds_its_own_frozen_batch_norm() -> None:
    model = detr()
    folded = {type(model.get_submodule(pair.bn)).__name__ for pair in find_conv_bn_pairs(model)}
    assert folded == {"DetrFrozenBatchNorm2d"}


@pytest.mark.parametrize(
    ("architecture", "encoder", "counts"),
    [
        ("Unet", "mobilenet_v2", Counts(62, 0)),
        ("UnetPlusPlus", "resnet18", Counts(42, 0)),
        ("DeepLabV3Plus", "resnet18", Counts(29, 0)),
        ("DeepLabV3Plus", "tu-mobilenetv3_small_050", Counts(43, 0)),
        ("PSPNet", "resnet18", Counts(14, 10)),
    ],
)
def test_segmentation_models_pytorch(architecture: str, encoder: str, counts: Counts) -> None:
    torch.manual_seed(0)
    model = randomized(getattr(smp, architecture)(encoder, encoder_weights=None).eval())
    image = images(1, 3, 64, 64)
    assert Counts.of(assert_provers_agree(model, image)) == counts
    assert_folded_equals_eval(model, image)


def conv_module(*args: Any, **options: Any) -> nn.Module:
    return ConvModule(*args, norm_cfg={"type": "BN"}, **options)


class Necklace(nn.Sequential):
    """mmcv's ConvModules in the orders that mmdetection's necks use."""

    def __init__(self) -> None:
        super().__init__(
            conv_module(3, 8, 3, padding=1),
            conv_module(8, 8, 3, padding=1, padding_mode="reflect", act_cfg={"type": "HSwish"}),
            conv_module(8, 8, 3, padding=1, act_cfg=None),
            conv_module(8, 8, 3, padding=1, order=("norm", "conv", "act")),
            DepthwiseSeparableConvModule(8, 4, 3, padding=1, norm_cfg={"type": "BN"}),
        )


def test_mmcv() -> None:
    torch.manual_seed(0)
    model, image = randomized(Necklace().eval()), images(2, 3, 16, 16)
    pairs = assert_provers_agree(model, image)
    assert [*pairs] == [
        ConvBNPair(f"{name}.conv", f"{name}.bn") for name in ("0", "1", "2", "4.depthwise_conv", "4.pointwise_conv")
    ]
    assert pairs.unpaired == {"3.bn": "its input comes from `2.bn` (BatchNorm2d), not from a convolution"}
    assert_folded_equals_eval(model, image)


def test_mmcv_module_told_not_to_normalize() -> None:
    """A ConvModule can be called without its norm: what is called decides, not what it holds."""

    model = Net(lambda net, x: net.block(x, norm=False), block=conv_module(3, 4, 3))
    pairs = assert_provers_agree(model.eval(), images(1, 3, 8, 8))
    assert pairs.unpaired == {"block.bn": "is never called by the model's forward in its eval state"}


@pytest.mark.parametrize(
    ("options", "convolution"),
    [({}, "Conv2dStaticSamePadding"), ({"image_size": None}, "Conv2dDynamicSamePadding")],
    ids=["static", "dynamic"],
)
def test_efficientnet_pytorch(options: dict[str, Any], convolution: str) -> None:
    torch.manual_seed(0)
    model = randomized(efficientnet_pytorch.EfficientNet.from_name("efficientnet-b0", **options).eval())
    image = images(1, 3, 75, 75)
    pairs = assert_provers_agree(model, image)
    assert Counts.of(pairs) == Counts(49, 0)
    assert {type(model.get_submodule(pair.conv)).__name__ for pair in pairs} == {convolution}
    assert_folded_equals_eval(model, image)


def test_efficientnet_lite_pytorch() -> None:
    torch.manual_seed(0)
    model = randomized(efficientnet_lite_pytorch.EfficientNet.from_name("efficientnet-lite0").eval())
    image = images(1, 3, 64, 64)
    pairs = assert_provers_agree(model, image)
    assert Counts.of(pairs) == Counts(49, 0)
    assert {type(model.get_submodule(pair.conv)).__name__ for pair in pairs} == {"Conv2dStaticSamePadding"}
    assert_folded_equals_eval(model, image)
