"""timm: what tracing finds is what a recorded forward pass proves, and folding it changes no output.

The provers look at the data flow alone, so they run on the meta device, at each model's own image size.
"""

from __future__ import annotations

import pytest
import timm
import torch
from helpers.model_checks import Counts, assert_folded_equals_eval, assert_provers_agree, norms, randomized
from helpers.networks import images
from torch import nn

# What other libraries deprecate from release to release is no failure of these tests.
pytestmark = pytest.mark.filterwarnings("ignore")

# What becomes of the BatchNorms of ten models that people fine-tune (docs/benchmarks/coverage.md).
COUNTS = {
    "efficientnet_b0": Counts(49, 0),
    "mobilenetv3_large_100": Counts(46, 0),
    "efficientnetv2_rw_s": Counts(112, 0),
    "regnety_004": Counts(53, 0),
    "levit_128": Counts(4, 60),
    "hrnet_w18": Counts(325, 0),
    "repvgg_a0": Counts(44, 17),
    "mixnet_s": Counts(15, 34),
    "ghostnet_100": Counts(80, 0),
    "nasnetalarge": Counts(260, 4),
}

LARGE = {"efficientnetv2_rw_s", "hrnet_w18", "nasnetalarge"}

# A small member of each other architecture; those in one line come from one file of timm. The rest of the tests takes
# a dozen that have little in common.
FAST = {
    "bat_resnext26ts",
    "botnet26t_256",
    "coatnet_nano_rw_224",
    "cspresnet50",
    "efficientvit_b0",
    "fastvit_t8",
    "levit_conv_128s",
    "mobilenetv4_hybrid_medium",
    "regnetz_b16",
    "tiny_vit_5m_224",
    "xcit_nano_12_p16_224",
    "xception41p",
}
SMALL_MEMBERS = """
    botnet26t_256 eca_halonext26ts lambda_resnet26t
    gernet_s resnext26ts gcresnext26ts bat_resnext26ts mobileone_s1 regnetz_b16
    convmixer_768_32
    cpubone_nano
    darknet17 cspresnet50 cs3darknet_focus_s
    cspnext_tiny
    densenet121
    dla46_c dla60_res2net
    dpn48b
    efficientformer_l1
    efficientformerv2_s0
    efficientnet_es efficientnetv2_rw_t fbnetc_100 mnasnet_small mobilenet_edgetpu_100 mobilenetv1_100 mobilenetv2_050
    semnasnet_075 spnasnet_100 tf_efficientnet_b0 tf_efficientnetv2_b0 tf_mixnet_s tinynet_e
    efficientvim_m1
    efficientvit_b0 efficientvit_l1
    efficientvit_m0
    fasternet_t0
    fastvit_t8
    ghostnetv2_100 ghostnetv3_050
    hardcorenas_a
    hgnet_tiny hgnetv2_b0
    hrnet_w18_small
    iformer_t
    inception_next_atto
    inception_resnet_v2
    inception_v3
    inception_v4
    lcnetv2_small
    levit_conv_128s
    lowformer_b0
    coatnet_nano_rw_224
    fbnetv3_b lcnet_035 mobilenetv3_small_050 mobilenetv4_conv_small mobilenetv4_hybrid_medium
    mobilevit_xxs mobilevitv2_050
    nextvit_small
    regnetv_040 regnetx_002
    repghostnet_050
    repvit_m0_9
    res2net50_14w_8s
    resnest14d
    ecaresnet26t resnet18 resnetblur50 resnetrs50 resnext50_32x4d seresnext26t_32x4d
    resnetv2_18
    rexnet_100
    selecsls42
    legacy_seresnet18
    shvit_s1
    skresnet18
    starnet_s050
    swiftformer_xs
    tiny_vit_5m_224
    tresnet_m
    vgg11_bn
    visformer_tiny
    vit_small_resnet26d_224
    volo_d1_224
    eca_vovnet39b ese_vovnet19b_slim_dw
    legacy_xception
    xception41 xception41p
    xcit_nano_12_p16_224
    maxvit_tiny_tf_224 pnasnet5large
"""
ARCHITECTURES = SMALL_MEMBERS.split()

NUMERIC = {
    "mobilenetv3_small_050": 64,  # BatchNormAct2d
    "tf_mixnet_s": 65,  # SAME padding of an odd size
    "levit_conv_128s": 224,
    "hrnet_w18_small": 64,
    "repvgg_a0": 64,
    "skresnet18": 64,
}


def abstract_model(name: str) -> tuple[nn.Module, torch.Tensor]:
    """Build a model in its eval state and an image that suits it, both without data."""
    with torch.device("meta"):
        model = timm.create_model(name).eval()
        return model, torch.empty(1, *model.default_cfg["input_size"])


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in LARGE else []) for name in COUNTS]
)
def test_counts(name: str) -> None:
    model, image = abstract_model(name)
    assert Counts.of(assert_provers_agree(model, image)) == COUNTS[name]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in ARCHITECTURES]
)
def test_provers_agree(name: str) -> None:
    model, image = abstract_model(name)
    pairs = assert_provers_agree(model, image)
    assert norms(model)
    assert not pairs.unfrozen


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*timm.list_models()} - {*COUNTS, *ARCHITECTURES}))
def test_provers_agree_on_all_of_timm(name: str) -> None:
    model, image = abstract_model(name)
    assert_provers_agree(model, image, untraced=None)


@pytest.mark.parametrize("name", ["levit_128s", "repvgg_a0"])
def test_provers_agree_in_the_training_state(name: str) -> None:
    model, image = abstract_model(name)
    assert_provers_agree(model.train(), image.expand(2, -1, -1, -1))


@pytest.mark.parametrize("name", NUMERIC)
def test_folded_equals_eval(name: str) -> None:
    torch.manual_seed(0)
    model = randomized(timm.create_model(name, num_classes=10).eval())
    assert_folded_equals_eval(model, images(2, 3, NUMERIC[name], NUMERIC[name]))
