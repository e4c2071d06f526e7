"""With recomputation no network keeps more than without: torchvision's classifiers, and timm's families."""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision
from pairs.test_timm import ARCHITECTURES
from torch import nn
from torch._subclasses import FakeTensorMode

from lightning_convbn import find_conv_bn_pairs, measure_memory
from lightning_convbn.layers.supported_layers import is_norm

pytestmark = pytest.mark.filterwarnings("ignore")  # what other libraries deprecate is no failure of these tests

CLASSIFIERS = [*torchvision.models.list_models(module=torchvision.models)]


def kept_ratio(model: nn.Module, *size: int) -> float:
    """Bytes kept with recomputation over those without it, of one image without data."""
    model = model.to_empty(device="cpu")
    pairs = find_conv_bn_pairs(model)
    with FakeTensorMode(allow_non_fake_inputs=True):
        image = torch.empty(1, *size)
        without, recomputing = (
            measure_memory(model, image, mode="tune", pairs=pairs, recompute=recompute).saved_bytes
            for recompute in ("none", "elementwise")
        )
    return recomputing / without


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_of_torchvision(name: str) -> None:
    options = {"init_weights": False} if name in ("inception_v3", "googlenet") else {}
    with torch.device("cpu" if name.startswith("regnet") else "meta"):
        model = torchvision.models.get_model(name, **options)
    if not any(is_norm(module) for module in model.modules()):
        pytest.skip("has no BatchNorm")
    ratio = kept_ratio(model.to("meta").eval(), 3, 224, 224)
    print(f"{name} {ratio:.3f}")
    assert ratio <= 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_of_timm(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name).eval()
    ratio = kept_ratio(model, *model.default_cfg["input_size"])
    print(f"{name} {ratio:.3f}")
    assert ratio <= 1
