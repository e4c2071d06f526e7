"""Deploy copies of whole models: they equal Eval mode, have no folded BatchNorm, and run without this package.

Each copy is loaded and run in a process that can't import lightning_convbn.
"""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import timm
import torch
from helpers.comparing import assert_close, floats
from helpers.model_checks import norms, randomized
from helpers.networks import FAMILIES, images, random_model
from torch import Tensor, nn
from torchvision import models
from torchvision.models.detection.backbone_utils import mobilenet_backbone
from torchvision.models.efficientnet import MBConvConfig
from torchvision.models.regnet import BlockParams
from torchvision.ops import FrozenBatchNorm2d

from lightning_convbn import export, find_conv_bn_pairs, fuse_for_deploy
from lightning_convbn.exporting.formats import to_onnx

# Other libraries deprecate something with every release. That is no failure of these tests.
pytestmark = pytest.mark.filterwarnings("ignore")

# Ten models of timm (docs/benchmarks/coverage.md) -> the size of an image.
TIMM = {
    "efficientnet_b0": 64,
    "mobilenetv3_large_100": 64,
    "efficientnetv2_rw_s": 64,
    "regnety_004": 64,
    "hrnet_w18": 64,
    "repvgg_a0": 64,
    "mixnet_s": 64,
    "ghostnet_100": 64,
    "nasnetalarge": 96,
}
# Short members of five families. The exporter takes a second or two for each, instead of ten.
SHORTENED: dict[str, Callable[[], nn.Module]] = {
    "resnet": lambda: models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=10),
    "mobilenet_v2": lambda: models.MobileNetV2(10, inverted_residual_setting=[[1, 16, 1, 1], [6, 24, 2, 2]]),
    "shufflenet_v2": lambda: models.ShuffleNetV2([2, 1, 1], [24, 48, 96, 192, 256], num_classes=10),
    "regnet": lambda: models.RegNet(BlockParams([1, 2], [16, 32], [8, 8], [1.0, 1.0], [2, 2], 0.25), 10),
    "efficientnet": lambda: models.EfficientNet([MBConvConfig(4, 3, 2, 32, 16, 2, 1.0, 1.0)], 0.0, num_classes=10),
}
ONNX = ("resnet18", "mobilenet_v3_small", "regnet_x_400mf", "shufflenet_v2_x0_5", "mnasnet0_5")

# Of the family of resnet18, and of regnet_y_400mf.
COUSINS = ("resnet50", "resnext50_32x4d", "wide_resnet50_2", "regnet_x_400mf")
SMALL = [name for name in FAMILIES if name not in COUSINS]


ELSEWHERE = """
import sys, warnings
sys.modules["lightning_convbn"] = None
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(int(sys.argv[1]))
torch.backends.mkldnn.set_flags(sys.argv[2] == "True")
for line in sys.stdin:
    model, inputs, outputs = torch.load(line.strip(), weights_only=False)
    with torch.no_grad():
        found = torch.utils._pytree.tree_leaves(model(*inputs))
    same = len(found) == len(outputs) and all(map(torch.allclose, found, outputs))
    print("same" if same else "different", flush=True)
"""

RunsElsewhere = Callable[[nn.Module, Tensor], bool]


@pytest.fixture(scope="module")
def runs_elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunsElsewhere]:
    """Give a function that says whether a model computes the same in a process without this package."""
    path = tmp_path_factory.mktemp("elsewhere") / "model.pt"
    errors = (path.parent / "errors.txt").open("w+")
    how = [str(torch.get_num_threads()), str(torch.backends.mkldnn.enabled)]  # the same kernels give the same bits
    command = [sys.executable, "-c", ELSEWHERE, *how]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=path.parent, stdin=pipe, stdout=pipe, stderr=errors, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def run(model: nn.Module, input: Tensor) -> bool:
            with torch.no_grad():
                torch.save((model, (input,), floats(model(input))), path)
            print(path, file=process.stdin, flush=True)
            answer = process.stdout.readline()
            path.unlink()
            assert answer, Path(errors.name).read_text()
            return answer == "same\n"

        yield run
        process.stdin.close()


def settled(model: nn.Module, batch: Tensor) -> nn.Module:
    """Give BatchNorms a random affine map and the statistics of a batch. Other statistics make rounding grow."""
    for norm in norms(randomized(model)).values():
        norm.momentum = 0.7
    with torch.no_grad():
        model.train()(batch)
    return model.eval()


def assert_ships(model: nn.Module, input: Tensor, runs_elsewhere: RunsElsewhere) -> None:
    """Compare the Deploy copy with the model in two precisions, check its layers, and run it in the other process."""
    pairs = find_conv_bn_pairs(model)
    assert len(pairs)
    with torch.no_grad():
        expected = floats(model(input))
        fused = fuse_for_deploy(model, pairs=pairs)
        assert_close(floats(fused(input)), expected, 1e-4)
        assert runs_elsewhere(fused, input)
        assert sorted(norms(fused)) == sorted(pairs.unpaired)
        model.double()
        expected = floats(model(input.double()))
        assert_close(floats(fuse_for_deploy(model, pairs=pairs)(input.double())), expected, 1e-12)


def fast(names: Iterable[str], *chosen: str) -> list[Any]:
    """Leave all but the chosen ones to the nightly run."""
    return [pytest.param(name, marks=[] if name in chosen else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", fast(SMALL, "densenet121", "googlenet", "mobilenet_v3_small", "resnet18"))
def test_torchvision(name: str, runs_elsewhere: RunsElsewhere) -> None:
    assert_ships(random_model(name), images(1, 3, FAMILIES[name], FAMILIES[name]), runs_elsewhere)


def test_maxvit(runs_elsewhere: RunsElsewhere) -> None:
    torch.manual_seed(0)
    model = models.MaxVit((64, 64), 8, 4, [16, 32], [1, 1], 8, 0.0, num_classes=10).eval()
    assert_ships(randomized(model), images(1, 3, 64, 64), runs_elsewhere)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*models.list_models(models)} - {*SMALL}))
def test_all_of_torchvisions_classifiers(name: str, runs_elsewhere: RunsElsewhere) -> None:
    torch.manual_seed(0)
    model = models.get_model(name, weights=None)
    if norms(model):
        assert_ships(settled(model, images(2, 3, 224, 224)), images(1, 3, 224, 224), runs_elsewhere)


@pytest.mark.parametrize("name", fast(TIMM, "mixnet_s", "repvgg_a0", "regnety_004"))
def test_timm(name: str, runs_elsewhere: RunsElsewhere) -> None:
    torch.manual_seed(0)
    model = settled(timm.create_model(name, num_classes=10), images(4, 3, TIMM[name], TIMM[name]))
    assert_ships(model, images(1, 3, TIMM[name], TIMM[name]), runs_elsewhere)


def test_faster_rcnn_backbone(runs_elsewhere: RunsElsewhere) -> None:
    torch.manual_seed(0)
    options = {"weights": None, "fpn": True, "norm_layer": FrozenBatchNorm2d}
    model = mobilenet_backbone(backbone_name="mobilenet_v3_large", **options).eval()
    assert_ships(randomized(model), images(1, 3, 64, 64), runs_elsewhere)


@pytest.mark.parametrize("name", fast(SHORTENED, "efficientnet", "resnet"))
def test_onnx_graph_of_five_families(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    assert_lean_graph(settled(SHORTENED[name](), images(4, 3, 64, 64)), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ONNX)
def test_onnx_graph_of_whole_models(name: str, tmp_path: Path) -> None:
    assert_lean_graph(random_model(name), tmp_path)


def assert_lean_graph(model: nn.Module, folder: Path) -> None:
    """Compare the file with Eval mode for several batch sizes, and its graph with the graph of Eval mode."""
    assert not find_conv_bn_pairs(model).unpaired
    session = onnxruntime.InferenceSession(export(model, folder / "deploy.onnx", (images(1, 3, 64, 64),)))
    for size in (1, 2, 5):
        batch = images(size, 3, 64, 64, seed=size)
        with torch.no_grad():
            expected = model(batch)
        (found,) = session.run(None, {session.get_inputs()[0].name: batch.numpy()})
        assert_close([torch.from_numpy(found)], [expected], 1e-4)
    deploy = nodes((folder / "deploy.onnx").read_bytes())
    plain = nodes(to_onnx(model, (images(2, 3, 64, 64),), True))
    assert deploy["BatchNormalization"] == 0
    assert deploy["Conv"] == sum(isinstance(module, nn.Conv2d) for module in model.modules())
    assert deploy.total() <= plain.total()


def nodes(file: bytes) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load_from_string(file).graph.node)
