"""Switching recomputation on and off: what `set_mode`, the context manager and the callback make of it."""

from __future__ import annotations

import pytest
from helpers.comparing import Snapshot
from helpers.recomputation import batch, conv, net
from torch import Tensor, nn

from lightning_convbn import Mode, conv_bn_mode, find_conv_bn_pairs, set_mode
from lightning_convbn.ops.recomputable import RecomputableTensor


class TestSwitching:
    def model(self) -> nn.Sequential:
        return net(nn.SiLU(inplace=True), *conv(6, 4), nn.GELU("tanh"), nn.ReLU()).train()

    @pytest.mark.parametrize("then", ["train", "eval", "tune", "deploy"])
    @pytest.mark.parametrize("mode", ["eval", "tune"])
    def test_a_switch_without_recomputation_puts_out_plain_tensors(self, mode: Mode, then: Mode) -> None:
        model, expected = self.model(), self.model()
        for _ in range(2):
            set_mode(model, mode, recompute="elementwise")
            assert type(model(batch())) is RecomputableTensor
        set_mode(expected, then)
        set_mode(model, then)
        assert type(model(batch())) is Tensor
        assert str(model) == str(expected)

    def test_the_context_manager_brings_it_back(self) -> None:
        model = self.model()
        set_mode(model, "tune", recompute="elementwise")
        found = Snapshot.of(model)
        for mode, recompute in (("tune", "none"), ("eval", "elementwise"), ("deploy", "none")):
            with conv_bn_mode(model, mode, recompute=recompute):
                assert (type(model(batch())) is Tensor) == (recompute == "none")
            assert Snapshot.of(model) == found
            assert type(model(batch())) is RecomputableTensor

    def test_pairs_and_reasons_are_found_as_in_the_plain_model(self) -> None:
        model = net(nn.SiLU(), nn.BatchNorm2d(6), nn.Mish(), nn.BatchNorm2d(6))
        expected = find_conv_bn_pairs(model)
        set_mode(model, "eval", recompute="elementwise")
        assert find_conv_bn_pairs(model) == expected
        assert "`2` (SiLU)" in expected.unpaired["3"]
