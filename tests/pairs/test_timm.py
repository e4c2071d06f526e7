"""timm: what tracing finds is what a recorded forward pass proves, and folding it changes no output.

The provers look at the data flow alone, so they run on the meta device, at each model's own image size.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from helpers.model_checks import Counts, assert_folded_equals_eval, assert_provers_agree, norms, randomized
from helpers.networks import images
from torch import nn

# What other libraries deprecate from release to release is no failure of these tests.
pytestmark = pytest.mark.filterwarnings("ignore")

COVERAGE = Path(__file__).resolve().parents[2] / "docs" / "benchmarks" / "coverage.json"
# What becomes of the BatchNorms of models that people fine-tune, as the docs say it.
COUNTS = {
    row["model"].removeprefix("timm:"): Counts(row["folded"], row["frozen"], row["unfrozen"])
    for row in json.loads(COVERAGE.read_text())["rows"]
    if row["model"].startswith("timm:")
}
LARGE = {"efficientnetv2_rw_s", "hrnet_w18", "nasnetalarge"}

# A dozen architectures that have little in common. By night all of timm is tried.
ARCHITECTURES = [
    *("bat_resnext26ts", "botnet26t_256", "coatnet_nano_rw_224", "cspresnet50", "efficientvit_b0", "fastvit_t8"),
    *("levit_conv_128s", "mobilenetv4_hybrid_medium", "regnetz_b16", "tiny_vit_5m_224"),
    *("xcit_nano_12_p16_224", "xception41p"),
]

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


@pytest.mark.parametrize("name", ARCHITECTURES)
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
