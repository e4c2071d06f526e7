"""The templates run on tiny data, and do what they are there to show."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_training import LIGHTNING_SAYS, pretend_trained
from PIL import Image
from torch import nn
from torchvision.models import mobilenet_v2

from examples.data.digit_scenes import write_digit_masks
from examples.data.pretrained_weights import WeightsError
from examples.results_file import as_table
from examples.single_file.adversarial import Attack
from examples.templates import segmentation
from examples.templates.networks.classifiers import BackboneError, build_backbone, build_classifier
from lightning_convbn import conv_bn_mode

pytestmark = [
    *LIGHTNING_SAYS,
    pytest.mark.usefixtures("own_folder"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
]

QUIET = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("masks") / "digits"
    write_digit_masks(folder, {"train": 8, "val": 2, "test": 2}, size=32, seed=0)
    return folder


def typed(main: Callable[[], None], monkeypatch: pytest.MonkeyPatch, *args: str) -> None:
    monkeypatch.setattr(sys, "argv", ["template.py", *args])
    main()


def test_segmentation_trains_first_and_then_folds_the_head(
    digits: Path, weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = [f"--data.folder={digits}", f"--model.weights={weights}", "--data.image_size=32", "--data.batch_size=4"]
    tiny += ["--trainer.max_epochs=2", "--convbn.start_epoch=1"]
    typed(segmentation.main, monkeypatch, "fit", *tiny, *QUIET, "--results=scores.json")
    said = capsys.readouterr().out
    train = re.search(r"(\d+) training images in batches of 4, \d+ to validate", said)
    steps = re.search(r"only (\d+) steps", said)
    assert train is not None
    assert steps is not None
    assert int(steps[1]) == 2 * (int(train[1]) // 4)
    (score,) = json.loads(Path("scores.json").read_text())["rows"]
    assert 0 <= score["test_miou"] <= 1
    with Image.open("runs/segmentation.png") as image:
        picture = np.asarray(image)
    assert picture.shape == (3 * 34 + 2, 2 * 34 + 2, 3)
    assert not (picture[2:34, 2:34] == picture[36:68, 2:34]).all()  # a digit is coloured


def test_features_are_mobilenets_at_a_finer_resolution() -> None:
    """Dilation keeps what a filter sees: every fourth feature is that of the plain network, away from the border."""
    network = mobilenet_v2().eval()
    pretend_trained(network)
    images = torch.randn(1, 3, 512, 512, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = network.features[:18](images)
        found = segmentation.Features(network)(images)["out"]
    assert found.shape == (1, 320, 64, 64)
    middle = slice(7, 9)
    torch.testing.assert_close(
        found[..., ::4, ::4][..., middle, middle], expected[..., middle, middle], rtol=1e-3, atol=1e-4
    )


def small_classifier() -> nn.Module:
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )
    torch.manual_seed(0)
    for module in network:
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.running_mean, 0, 0.2)
    return network.double().eval().requires_grad_(requires_grad=False)


def attacked(network: nn.Module, images: torch.Tensor, **options: Any) -> torch.Tensor:
    return Attack(network, epsilon=0.1, **options).double().predict_step(images, 0).images


@pytest.mark.parametrize("mode", ["tune", "deploy"])
def test_adversarial_examples_are_evals_in_double_precision(mode: str) -> None:
    network = small_classifier()
    images = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = {}
    for each in ("eval", mode):
        with conv_bn_mode(network, each):
            found[each] = attacked(network, images, step_size=0.03)
    one, other = found.values()
    torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    assert 0.09 < (one - images).abs().max() <= 0.1 + 1e-12
    assert one.min() >= 0
    assert one.max() <= 1


def test_attacks_raise_the_loss_and_pgd_the_most() -> None:
    network = small_classifier()
    images = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    scores = Attack(network).double()
    labels = scores(images).argmax(1)
    fgsm = attacked(network, images, step_size=0.1, steps=1, random_start=False)
    pgd = attacked(network, images, step_size=0.02, steps=20, random_start=False)
    losses = [nn.functional.cross_entropy(scores(each), labels).item() for each in (images, fgsm, pgd)]
    assert losses == sorted(losses)
    assert losses[0] < losses[1]


@pytest.mark.parametrize(
    ("name", "weights", "error", "message"),
    [
        ("resnet18", "none", BackboneError, "--backbone resnet18: give torchvision:NAME or timm:NAME"),
        ("torchvision:resnet19", "none", BackboneError, "no such classifier; did you mean .*resnet18"),
        ("timm:eficientnet_b0", "none", BackboneError, "no such classifier; did you mean efficientnet_b0"),
        ("torchvision:resnet18", "nowhere.pth", WeightsError, "--weights nowhere.pth: no such file"),
        ("torchvision:resnet18", __file__, WeightsError, "test_templates.py: not weights of torchvision:resnet18"),
    ],
)
def test_a_wrong_backbone_is_refused_by_name(name: str, weights: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build_classifier(name, weights)


def test_weights_of_another_network_are_refused(weights: Path) -> None:
    with pytest.raises(WeightsError, match=r"mobilenet_v2.pth: not weights of torchvision:resnet18 \(Error"):
        build_classifier("torchvision:resnet18", str(weights))


@pytest.mark.parametrize(
    "name", ["torchvision:googlenet", "torchvision:vgg11_bn", "timm:mobilenetv3_small_050", "timm:resnet18"]
)
def test_a_backbone_gives_its_features(name: str) -> None:
    backbone, features = build_backbone(name, "none")
    assert backbone(torch.zeros(2, 3, 64, 64)).shape == (2, features)


def test_a_table_is_laid_out_in_columns() -> None:
    rows = [{"mode": "eval", "MiB": 123.45, "same": True}, {"mode": "tune", "MiB": 0.5, "same": False}]
    assert as_table(rows).splitlines() == ["mode    MiB   same", "eval  123.5   True", "tune    0.5  False"]
