"""`lightning-convbn inspect`: what it lists, and what it refuses."""

from __future__ import annotations

import re

import pytest
import torch
from helpers.command_line import run_json, write_module
from helpers.networks import small_net
from helpers.tiny_training import BoringModule

from lightning_convbn import find_conv_bn_pairs
from lightning_convbn.command.main import main


class TestInspect:
    def test_a_row_per_batchnorm_and_a_count(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["inspect", "helpers.networks:small_net"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].split() == ["state", "BatchNorm", "how", "or", "why"]
        assert "folded  1          into 0" in lines
        assert "frozen  3          its input comes from `2` (ReLU), not from a convolution" in lines
        assert lines[-1] == "3 of 4 BatchNorms folded, 1 frozen, 0 unfrozen"

    def test_json_says_what_find_conv_bn_pairs_says(self, capsys: pytest.CaptureFixture[str]) -> None:
        found, pairs = run_json(capsys, "inspect", "helpers.networks:small_net"), find_conv_bn_pairs(small_net())
        assert found["folded"] == [pair._asdict() for pair in pairs]
        assert found["frozen"] == pairs.unpaired
        assert found["unfrozen"] == {}
        assert found["batchnorms"] == {"total": 4, "folded": 3, "frozen": 1, "unfrozen": 0}
        assert found["command"] == "lightning-convbn inspect helpers.networks:small_net --json"

    def test_what_has_no_statistics_is_unfrozen(self, capsys: pytest.CaptureFixture[str]) -> None:
        write_module(
            "stateless", "net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))"
        )
        assert list(run_json(capsys, "inspect", "stateless:net")["unfrozen"]) == ["1"]

    def test_an_input_proves_what_cannot_be_traced(self, capsys: pytest.CaptureFixture[str]) -> None:
        model = "helpers.command_line:LooksAtValues"
        assert "can't be traced" in run_json(capsys, "inspect", model)["frozen"]["bn"]
        assert run_json(capsys, "inspect", model, "--size", "8")["folded"] == [{"conv": "conv", "bn": "bn"}]

    @pytest.mark.parametrize(
        "model", ["torchvision:fasterrcnn_mobilenet_v3_large_320_fpn", "timm:mobilenetv3_small_050"]
    )
    def test_models_of_libraries_are_built_without_a_download(
        self, model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("urllib.request.urlopen", None)
        monkeypatch.setattr("socket.socket.connect", None)
        assert main(["inspect", model]) == 0
        out = capsys.readouterr().out
        (folded, total) = map(int, re.search(r"(\d+) of (\d+) BatchNorms folded, 0 frozen", out).groups())  # type: ignore[union-attr]
        assert folded == total > 30

    def test_a_checkpoint_is_loaded_by_its_class(self, capsys: pytest.CaptureFixture[str]) -> None:
        module = BoringModule()
        checkpoint = {"state_dict": module.state_dict(), "pytorch-lightning_version": "2.5.0", "epoch": 0}
        torch.save(checkpoint, "last.ckpt")
        found = run_json(capsys, "inspect", "last.ckpt", "--class", "helpers.tiny_training:BoringModule")
        assert [pair["bn"] for pair in found["folded"]] == [pair.bn for pair in find_conv_bn_pairs(module.eval())]
