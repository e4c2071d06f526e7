"""What MODEL may be, and the one line that says why a model can't be built."""

from __future__ import annotations

import sys

import pytest
from helpers.command_line import SMALL, refusal, write_module

REFUSALS: dict[str, tuple[list[str], str]] = {
    "unknown torchvision model": (
        ["torchvision:resnet51"],
        "torchvision has no 'resnet51'; did you mean torchvision:resnet5",
    ),
    "no form of a model": (["resnet50"], "unknown model 'resnet50': say where it is from; MODEL is torchvision:NAME, "),
    "unknown module": (["no_such.module:net"], "no module 'no_such': it is neither installed nor in "),
    "unknown attribute": (
        ["helpers.networks:smal_net"],
        "helpers.networks has no 'smal_net'; did you mean helpers.networks:small_net?",
    ),
    "module that needs another": (["needs:net"], "needs needs 'not_there'; pip install"),
    "module that raises": (["raises:net"], "raises can't be imported: ZeroDivisionError: division by zero"),
    "factory that raises": (["factories:broken"], "could not be built: ValueError: give me weights"),
    "factory that wants arguments": (["factories:greedy"], "missing 1 required positional argument: 'width'"),
    "factory of something else": (["factories:other"], "factories:other gives a int, not a torch.nn.Module"),
    "model without BatchNorm": (["torch.nn:Identity"], "Identity has no BatchNorm: there is nothing to fold or freeze"),
    "checkpoint without class": (["last.ckpt"], "add --class package.module:LightningModuleClass"),
    "missing checkpoint": (
        ["last.ckpt", "--class", "helpers.tiny_training:BoringModule"],
        "no checkpoint 'last.ckpt' in ",
    ),
    "unwritable JSON": (
        ["helpers.networks:small_net", "--json", "no/such.json"],
        "--json no/such.json: there is no folder",
    ),
    "bad size": (
        ["helpers.networks:small_net", "--size", "8x"],
        "--size '8x' is no number of pixels, as 224, and no shape without batch",
    ),
    "channels that don't fit": (
        ["helpers.networks:small_net", "--size", "1x8x8"],
        "Sequential can't take the input 2x1x8x8, float32: ",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSALS.values(), ids=REFUSALS)
def test_inspect_refuses_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("needs", "raises", "factories"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    write_module("needs", "import not_there")
    write_module("raises", "1 / 0")
    write_module(
        "factories",
        "def broken(): raise ValueError('give me weights\\nplease')\n"
        "def greedy(width): return nn.Linear(width, width)\n"
        "def other(): return 7",
    )
    assert message in refusal(capsys, "inspect", *arguments)


@pytest.mark.parametrize(
    ("missing", "arguments", "message"),
    [
        ("timm", ["inspect", "timm:resnet18"], "no module 'timm': it is neither installed nor in "),
        (
            "matplotlib",
            ["measure", *SMALL, "--plot", "a.png"],
            "--plot needs matplotlib; pip install matplotlib",
        ),
        ("plotly", ["measure", *SMALL, "--html", "a.html"], "--html needs plotly; pip install plotly"),
    ],
)
def test_a_missing_library_is_named(
    missing: str,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    for module in ("plot", "html_report"):
        monkeypatch.setattr(f"lightning_convbn.command.{module}.find_spec", lambda name: None)
    assert message in refusal(capsys, *arguments)
