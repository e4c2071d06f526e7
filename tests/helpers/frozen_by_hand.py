"""Frozen BatchNorms as plain PyTorch has them, to compare with: nothing of this package is in them."""

from __future__ import annotations

from torch import nn


class AlwaysInEval(nn.BatchNorm2d):
    """A BatchNorm that no `.train()` brings out of its eval state."""

    def train(self, mode: bool = True) -> AlwaysInEval:
        return super().train(False)


def freeze(model: nn.Module) -> nn.Module:
    """Keep every BatchNorm of a model in eval state, whoever trains the model."""
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = AlwaysInEval
            module.eval()
    return model
