"""Builds the model of a scenario: the same one each time."""

from __future__ import annotations

from zlib import crc32

from fuzz.building import randomize
from fuzz.interpreter import Interpreter, build
from fuzz.network import Scenario
from torch import nn

from lightning_convbn.layers.supported_layers import is_norm


def trained(policy: str, name: str, module: nn.Module) -> bool:
    """Whether a parameter of a module wants a gradient."""
    some = crc32(name.encode()) % 2 == 0
    return {"all": True, "none": False, "norms": is_norm(module), "convs": not is_norm(module), "some": some}[policy]


def build_model(scenario: Scenario) -> Interpreter:
    """Build the model of a scenario, with values that training might leave behind."""
    model = build(scenario.network)
    randomize(model, scenario.seed)
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            parameter.requires_grad_(trained(scenario.trained, f"{prefix}.{name}", module))
    if scenario.precision == "float64":
        model.double()
    return model.train(scenario.training)
