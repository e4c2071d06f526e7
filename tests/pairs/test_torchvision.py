"""torchvision: what tracing finds is what a recorded forward pass proves, and folding it changes no output.

The provers look at the data flow alone, so where a model looks at no values they run on the meta device.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import torch
from helpers.comparing import BACKWARD, gradients, relative
from helpers.model_checks import Counts, assert_folded_equals_eval, assert_provers_agree, norms, randomized
from helpers.networks import FAMILIES, images, random_model
from torch import nn
from torchvision import models

from lightning_convbn import Mode, set_mode

# What other libraries deprecate from release to release is no failure of these tests.
pytestmark = pytest.mark.filterwarnings("ignore")

# What becomes of the BatchNorms of models that have little in common. By night all of torchvision is tried.
COUNTS = {
    "densenet121": Counts(59, 62),
    "fasterrcnn_mobilenet_v3_large_320_fpn": Counts(46, 0),
    "googlenet": Counts(57, 2),
    "lraspp_mobilenet_v3_large": Counts(47, 0),
    "maxvit_t": Counts(23, 11),
    "mobilenet_v3_small": Counts(34, 0),
    "r2plus1d_18": Counts(37, 0),
    "regnet_x_400mf": Counts(71, 0),
    "ssdlite320_mobilenet_v3_large": Counts(70, 0),
}
DETECTORS = models.list_models(module=models.detection)


def build(name: str, **options: Any) -> nn.Module:
    """Build a model in its eval state without weights from anywhere; a detector is told to find little."""
    takes = inspect.signature(models.get_model_builder(name)).parameters
    options = {"weights": None, **({"weights_backbone": None} if "weights_backbone" in takes else {}), **options}
    if "rcnn" in name:
        options |= {"rpn_pre_nms_top_n_test": 10, "rpn_post_nms_top_n_test": 5, "box_detections_per_img": 2}
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    model = models.get_model(name, **options).eval()
    if name in DETECTORS and "ssd" not in name:
        model.transform.min_size, model.transform.max_size = (96,), 96
    return model


def prepared(name: str) -> tuple[nn.Module, tuple[Any, ...]]:
    """Build a model and the arguments of its forward; what looks at no values is without data."""
    if name in DETECTORS:
        return build(name, num_classes=3), ([torch.rand(3, 96, 96)],)
    with torch.device("cpu" if name.startswith("regnet") else "meta"):  # a RegNet computes its widths with tensors
        model = build(name).to("meta")
    kind = models.get_model_builder(name).__module__
    if "raft" in name:
        return model, (torch.empty(1, 3, 128, 128, device="meta"),) * 2
    size = 299 if "inception" in name else 224
    return model, (torch.empty(1, 3, *((16,) if ".video" in kind else ()), size, size, device="meta"),)


@pytest.mark.parametrize("name", COUNTS)
def test_counts(name: str) -> None:
    model, inputs = prepared(name)
    assert Counts.of(assert_provers_agree(model, *inputs)) == COUNTS[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*models.list_models()} - COUNTS.keys()))
def test_provers_agree_on_all_of_torchvision(name: str) -> None:
    model, inputs = prepared(name)
    if norms(model):  # or else there is nothing to record
        assert_provers_agree(model, *inputs, untraced=None)


NUMERIC: dict[str, tuple[int, ...]] = {
    **{name: (1, 3, size, size) for name, size in FAMILIES.items()},
    "maxvit_t": (1, 3, 224, 224),
    "deeplabv3_mobilenet_v3_large": (2, 3, 64, 64),
    "lraspp_mobilenet_v3_large": (2, 3, 64, 64),
    "r2plus1d_18": (1, 3, 4, 32, 32),
}
SLOW = re.compile("efficientnet|inception|maxvit|mnasnet|regnet_y|resnext|resnet50|vgg|wide")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if SLOW.match(name) else []) for name in NUMERIC]
)
def test_folded_equals_eval(name: str) -> None:
    torch.manual_seed(0)
    model = random_model(name) if name in FAMILIES else randomized(build(name))
    assert_folded_equals_eval(model, images(*NUMERIC[name]))


@pytest.mark.parametrize(("name", "mode"), [("resnet18", "deploy"), ("mobilenet_v3_small", "tune")])
def test_gradients_of_parameters_equal_evals(name: str, mode: Mode) -> None:
    model, batch = random_model(name).double(), images(2, 3, 64, 64, dtype=torch.float64)
    found = []
    for each in ("eval", mode):
        set_mode(model, each)  # type: ignore[arg-type]
        found.append(torch.cat([gradient.flatten() for gradient in gradients(model(batch), *model.parameters())]))
    assert relative(found[1], found[0]) < BACKWARD
