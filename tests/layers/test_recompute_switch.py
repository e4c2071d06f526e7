"""Switching recomputation on and off: what `set_mode`, the context manager and the callback make of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.comparing import Snapshot
from helpers.recomputation import batch, conv, net
from helpers.tiny_training import LIGHTNING_SAYS, BoringModule, PrintedLines, make_trainer
from torch import Tensor, nn

from lightning_convbn import ConvBNModeCallback, Mode, conv_bn_mode, find_conv_bn_pairs, measure_memory, set_mode
from lightning_convbn.memory import as_mib
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


class TestCallback:
    pytestmark = LIGHTNING_SAYS

    def fit(self, module: BoringModule, **arguments: Any) -> tuple[BoringModule, set[str], str]:
        module.backbone.stem[2], module.backbone.middle[2] = nn.SiLU(inplace=True), nn.Hardswish()
        seen: set[str] = set()
        module.backbone.stem[2].register_forward_hook(
            lambda act, args, output: seen.add(f"{type(output).__name__} {'train' if module.training else 'eval'}")
        )
        lines = PrintedLines()
        trainer = make_trainer(ConvBNModeCallback(**{"log_memory": False, **arguments}), lines)
        trainer.fit(module)
        return module, seen, lines.text

    @pytest.mark.parametrize("mode", ["tune", "eval"])
    def test_trains_to_the_same_weights(self, mode: Mode) -> None:
        torch.manual_seed(0)
        plain, recomputing = BoringModule(), BoringModule()
        recomputing.load_state_dict(plain.state_dict())
        self.fit(plain, mode=mode)
        module, seen, _ = self.fit(recomputing, mode=mode, recompute="elementwise")
        assert seen >= {"RecomputableTensor train", "Tensor eval"}
        for name, tensor in plain.state_dict().items():
            assert torch.equal(module.state_dict()[name], tensor), name

    def test_the_table_counts_with_recomputation(self) -> None:
        module, _, text = self.fit(BoringModule(), recompute="elementwise", log_memory=True, verify=True)
        assert "verified: Tune equals Eval" in text
        (line,) = [line for line in text.splitlines() if "kept for backward" in line]
        (shape,) = [line for line in text.splitlines() if "counted on an input of" in line]
        image = torch.zeros([int(size) for size in shape.split(" of ")[1].split(" × ")])
        plain = measure_memory(module.backbone, image, mode="eval").saved_bytes
        tune = measure_memory(module.backbone, image, mode="tune", recompute="elementwise").saved_bytes
        assert tune < measure_memory(module.backbone, image, mode="tune").saved_bytes
        assert f"Eval {as_mib(plain)}, Tune {as_mib(tune)}" in line
