"""`lightning-convbn export`: the file that it writes, and what it refuses."""

from __future__ import annotations

import os
from unittest.mock import Mock

import pytest
import torch
from helpers.command_line import SMALL, refusal, write_module
from helpers.comparing import assert_close
from helpers.networks import images, small_net

from lightning_convbn.command import export
from lightning_convbn.command.main import main


class TestExport:
    def test_the_file_computes_what_eval_computes(self, capsys: pytest.CaptureFixture[str]) -> None:
        torch.save(small_net(seed=3).state_dict(), "trained.pt")
        write_module(
            "trained",
            "from helpers.networks import small_net\nnet = small_net()\nnet.load_state_dict(torch.load('trained.pt'))",
        )
        assert main(["export", "trained:net", "net.pt2", "--size", "8"]) == 0
        assert capsys.readouterr().out.startswith("wrote net.pt2: it was read back")
        batch = images(5, 3, 8, 8)
        expected = small_net(seed=3).eval()(batch)
        assert_close([torch.export.load("net.pt2").module()(batch)], [expected], 1e-5)

    def test_a_static_batch_is_fixed(self) -> None:
        assert main(["export", *SMALL, "net.pt2", "--static-batch", "--batch-size", "3"]) == 0
        with pytest.raises((AssertionError, RuntimeError)):
            torch.export.load("net.pt2").module()(images(5, 3, 8, 8))

    def test_random_weights_are_pointed_out(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["export", "torchvision:mobilenet_v3_small", "net.pt", "--size", "32"]) == 0
        assert "torchvision:mobilenet_v3_small has random weights" in capsys.readouterr().err

    def test_a_path_that_can_not_be_written_is_refused_first(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(export, "load_model", None)
        assert "PATH='no/net.pt': there is no folder " in refusal(capsys, "export", *SMALL, "no/net.pt")

    def test_what_fails_leaves_no_file(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(export, "export", failing := Mock(side_effect=RuntimeError("it deviates\nby much")))
        assert "it deviates\n" in refusal(capsys, "export", *SMALL, "net.pt")
        failing.assert_called_once()
        assert os.listdir() == []
