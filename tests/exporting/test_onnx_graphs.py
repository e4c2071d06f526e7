"""The ONNX graphs of five families of torchvision: they equal Eval mode, and no BatchNorm is left in them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from helpers.comparing import assert_close
from helpers.model_checks import randomized
from helpers.networks import images
from torch import nn
from torchvision import models
from torchvision.models.efficientnet import MBConvConfig
from torchvision.models.regnet import BlockParams

from lightning_convbn import export, find_conv_bn_pairs
from lightning_convbn.exporting.formats import to_onnx

# Other libraries deprecate something with every release. That is no failure of these tests.
pytestmark = pytest.mark.filterwarnings("ignore")

# Short members of five families. The exporter takes a second or two for each, instead of ten.
SHORTENED: dict[str, Callable[[], nn.Module]] = {
    "resnet": lambda: models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=10),
    "mobilenet_v2": lambda: models.MobileNetV2(10, inverted_residual_setting=[[1, 16, 1, 1], [6, 24, 2, 2]]),
    "shufflenet_v2": lambda: models.ShuffleNetV2([2, 1, 1], [24, 48, 96, 192, 256], num_classes=10),
    "regnet": lambda: models.RegNet(BlockParams([1, 2], [16, 32], [8, 8], [1.0, 1.0], [2, 2], 0.25), 10),
    "efficientnet": lambda: models.EfficientNet([MBConvConfig(4, 3, 2, 32, 16, 2, 1.0, 1.0)], 0.0, num_classes=10),
}


FAST = {"efficientnet", "resnet"}


def nodes(file: bytes) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load_from_string(file).graph.node)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in SHORTENED]
)
def test_a_file_equals_eval_for_any_batch_and_its_graph_is_no_longer_than_evals(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = randomized(SHORTENED[name]())
    with torch.no_grad():
        model.train()(images(4, 3, 64, 64))  # with statistics that are far off rounding grows
    assert not find_conv_bn_pairs(model.eval()).unpaired
    path = export(model, tmp_path / "deploy.onnx", (images(1, 3, 64, 64),))
    session = onnxruntime.InferenceSession(path)
    for size in (1, 2, 5):
        batch = images(size, 3, 64, 64, seed=size)
        (found,) = session.run(None, {session.get_inputs()[0].name: batch.numpy()})
        with torch.no_grad():
            assert_close([torch.from_numpy(found)], [model(batch)], 1e-4)
    deploy, plain = nodes(path.read_bytes()), nodes(to_onnx(model, (images(2, 3, 64, 64),), True))
    assert deploy["BatchNormalization"] == 0
    assert deploy["Conv"] == sum(isinstance(module, nn.Conv2d) for module in model.modules())
    assert deploy.total() <= plain.total()
