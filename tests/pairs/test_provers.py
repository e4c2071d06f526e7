"""One model of each torchvision family: folded, it computes what it computed in Eval mode."""

from __future__ import annotations

import re

import pytest
import torch
from helpers.comparing import BACKWARD, gradients, relative
from helpers.model_checks import assert_folded_equals_eval
from helpers.networks import FAMILIES, images, random_model

from lightning_convbn import Mode, set_mode

FAST = re.compile("densenet|googlenet|mobilenet|regnet_x|resnet18|shufflenet")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if FAST.match(name) else pytest.mark.slow) for name in FAMILIES]
)
def test_output_in_tune_and_deploy_mode_equals_eval(name: str) -> None:
    model, batch = random_model(name), images(1, 3, FAMILIES[name], FAMILIES[name])
    assert_folded_equals_eval(model, batch)
    with torch.no_grad():
        assert model(batch).std() > 0


@pytest.mark.parametrize(("name", "mode"), [("resnet18", "deploy"), ("mobilenet_v3_small", "tune")])
def test_gradients_of_parameters_equal_evals(name: str, mode: Mode) -> None:
    model = random_model(name).double()
    batch = images(2, 3, FAMILIES[name], FAMILIES[name], dtype=torch.float64)
    set_mode(model, "eval")
    expected = gradients(model(batch), *model.parameters())
    set_mode(model, mode)
    found = gradients(model(batch), *model.parameters())
    flat, flat_expected = (torch.cat([gradient.flatten() for gradient in tensors]) for tensors in (found, expected))
    assert relative(flat, flat_expected) < BACKWARD
