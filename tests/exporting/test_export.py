"""`export`: a file computes what Eval mode computes. It is written completely or not at all."""

from __future__ import annotations

import copy
import dataclasses
import errno
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors.torch
import torch
from helpers.comparing import Snapshot, assert_close
from helpers.networks import Net, images, randomized, small_net
from torch import Tensor, nn

from lightning_convbn import export, fuse_for_deploy, set_mode
from lightning_convbn.exporting.formats import FORMATS

# The exporters of torch and ONNX warn about each other.
pytestmark = pytest.mark.filterwarnings("ignore")

SUFFIXES = [*FORMATS]
OLD = b"an older file"


def load(path: Path, model: nn.Module) -> Callable[[Tensor], Any]:
    """Read a file as a user would. Weights go into the Deploy copy of another network."""
    if path.suffix == ".onnx":
        session = onnxruntime.InferenceSession(path)
        (name,) = (argument.name for argument in session.get_inputs())
        return lambda input: torch.from_numpy(session.run(None, {name: input.numpy()})[0])
    if path.suffix == ".pt2":
        return torch.export.load(path).module()
    state = torch.load(path, weights_only=True) if path.suffix == ".pt" else safetensors.torch.load_file(path)
    other = fuse_for_deploy(small_net(seed=1))
    other.load_state_dict(state)
    return other


def outputs_equal(path: Path, model: nn.Module, *sizes: int) -> None:
    with torch.no_grad():
        for size in sizes:
            input = images(size, 3, 8, 8)
            assert_close([load(path, model)(input)], [model.eval()(input)], 1e-5)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_computes_what_eval_mode_computes_and_the_model_stays_as_it_was(suffix: str, tmp_path: Path) -> None:
    net = small_net().train()
    net[3].eval()
    set_mode(net, "tune")
    net[0].weight.grad = torch.ones_like(net[0].weight)
    found, example = Snapshot.of(net), images(1, 3, 8, 8)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    path = export(net, tmp_path / f"model{suffix}", (example,))
    assert path == tmp_path / f"model{suffix}"
    assert [*tmp_path.iterdir()] == [path]
    assert Snapshot.of(net) == found
    assert torch.equal(net[0].weight.grad, torch.ones_like(net[0].weight))
    assert torch.equal(example, images(1, 3, 8, 8))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]
    set_mode(net, "train")
    outputs_equal(path, net, 1, 2, 7)


@pytest.mark.parametrize(("suffix", "message"), [(".onnx", "Expected: 3"), (".pt2", "(==|equal to) 3")])
def test_a_fixed_batch_is_fixed(suffix: str, message: str, tmp_path: Path) -> None:
    path = export(small_net(), tmp_path / f"model{suffix}", (images(3, 3, 8, 8),), dynamic_batch=False)
    outputs_equal(path, small_net(), 3)
    with pytest.raises(Exception, match=message):
        load(path, small_net())(images(2, 3, 8, 8))


class Nested(nn.Module):
    """Has nested arguments and results with integers in both, writes into an argument, and returns a tensor twice."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_net()

    def forward(self, batch: dict[str, list[Tensor]], scale: float, rows: Tensor) -> dict[str, Any]:
        features = self.net(batch["images"][0].mul_(scale))
        return {"twice": (features, features), "label": features.argmax(1), "picked": features + rows[:, None]}


@pytest.mark.parametrize("suffix", [".onnx", ".pt2", ".pt"])
def test_nested_arguments_and_results(suffix: str, tmp_path: Path) -> None:
    inputs = ({"images": [images(3, 3, 8, 8)]}, 2.0, torch.tensor([5, 0, 9]))
    path = export(Nested(), tmp_path / f"model{suffix}", inputs)
    assert torch.equal(inputs[0]["images"][0], images(3, 3, 8, 8))
    if suffix == ".pt2":
        inputs = ({"images": [images(4, 3, 8, 8)]}, 2.0, torch.arange(4))
        expected = Nested().eval()({"images": [images(4, 3, 8, 8)]}, 2.0, torch.arange(4))
        found = torch.export.load(path).module()(*inputs)
        assert_close([found["picked"]], [expected["picked"]], 1e-5)


def test_an_onnx_file_is_single_and_tells_nothing_of_where_it_was_made(tmp_path: Path) -> None:
    path = export(small_net(), tmp_path / "model.onnx", (images(1, 3, 8, 8),))
    graph = onnx.load(path).graph
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert graph.output[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert os.fsencode(os.path.dirname(torch.__file__)) not in path.read_bytes()
    assert not any(tensor.external_data for tensor in graph.initializer)


def test_values_of_the_examples_are_not_written(tmp_path: Path) -> None:
    secret = torch.full((2, 3, 8, 8), 1234.5678)
    secret[0, 0, 0, 0] = 0.0
    path = export(small_net(), tmp_path / "model.pt2", (secret,))
    assert secret[1].numpy().tobytes()[:64] not in path.read_bytes()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_half_precision_and_double(suffix: str, tmp_path: Path) -> None:
    for dtype in (torch.float16, torch.float64) if suffix != ".onnx" else (torch.float16,):
        export(small_net().to(dtype), tmp_path / f"model{suffix}", (images(1, 3, 8, 8, dtype=dtype),))


def test_what_only_the_examples_can_prove_is_folded(tmp_path: Path) -> None:
    def untraceable(net: Net, x: Tensor) -> Tensor:
        if x.shape[0] > 10**6:
            raise ValueError("too many images")
        return net.bn(net.conv(x))

    net = Net(untraceable, conv=nn.Conv2d(3, 4, 3), bn=nn.BatchNorm2d(4))
    path = export(randomized(net), tmp_path / "model.pt", (images(1, 3, 8, 8),))
    assert sorted(torch.load(path, weights_only=True)) == ["conv.bias", "conv.weight"]


# --------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("model.h5", r"path='.*model\.h5': the suffix must be one of \.onnx, \.pt2, \.pt, \.safetensors"),
        ("missing/model.pt", r"path='.*': there is no folder '.*missing'; make it first"),
        ("folder.pt", r"path='.*folder\.pt' is a folder; name a file in it"),
    ],
)
def test_a_path_that_cannot_be_used_is_refused(file: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(ValueError, match=message):
        export(small_net(), tmp_path / file, (images(1, 3, 8, 8),))
    assert [path.name for path in tmp_path.iterdir()] == ["folder.pt"]


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(*args: Any, **options: Any) -> None:  # in a container the tests run as root, who may write anywhere
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("tempfile.mkdtemp", read_only)
    with pytest.raises(ValueError, match=r"nothing can be written to its folder \(.*Permission denied\); name another"):
        export(small_net(), tmp_path / "model.pt", (images(1, 3, 8, 8),))


@pytest.mark.parametrize(
    ("suffix", "missing", "fix"),
    [
        (".onnx", "onnxruntime", r"\.onnx files need onnxruntime: pip install onnxruntime"),
        (".safetensors", "safetensors", r"files need safetensors: pip install safetensors"),
    ],
)
def test_a_missing_extra_is_named_before_any_work(
    suffix: str, missing: str, fix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=fix):
        export("no model at all", tmp_path / f"model{suffix}", ())


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (torch.zeros(1, 3, 8, 8), r"example_inputs must be a tuple .* as \(images,\); got Tensor"),
        ((), r"example_inputs must hold a tensor with a batch dimension; got \(\)"),
        ((torch.zeros(1, 3), torch.zeros(4)), r"first dimension of every tensor is the batch, but they are 1, 4"),
    ],
)
def test_inputs_that_cannot_be_used_are_refused(inputs: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        export(small_net(), tmp_path / "model.pt", inputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_dtype_that_onnxruntime_does_not_run_is_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"has {dtype} tensors, .* can't be checked: onnxruntime .*\.float\(\)"):
        export(small_net().to(dtype), tmp_path / "model.onnx", (images(1, 3, 8, 8, dtype=dtype),))


def test_a_model_too_large_for_a_single_onnx_file_is_refused(tmp_path: Path) -> None:
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(2**15, 2**15), nn.BatchNorm1d(2**15))
    with pytest.raises(ValueError, match=r"Sequential has 4\.0 GiB, more than the 2 GiB that one \.onnx file can hold"):
        export(net, tmp_path / "model.onnx", (torch.zeros(1, 2**15),))


def test_a_model_that_fixes_its_batch_says_so(tmp_path: Path) -> None:
    class FixedBatch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = small_net()

        def forward(self, input: Tensor) -> Tensor:
            return self.net(input) + torch.arange(2.0)[:, None] if len(input) == 2 else self.net(input)

    with pytest.raises(RuntimeError, match=r"can't capture FixedBatch; try dynamic_batch=False: "):
        export(FixedBatch(), tmp_path / "model.pt2", (images(2, 3, 8, 8),))
    assert not [*tmp_path.iterdir()]
    export(FixedBatch(), tmp_path / "model.pt2", (images(2, 3, 8, 8),), dynamic_batch=False)


def test_a_model_whose_output_is_not_finite_proves_nothing(tmp_path: Path) -> None:
    net = small_net()
    nn.init.constant_(net[-1].bias, float("nan"))
    with pytest.raises(RuntimeError, match="holds no finite number, so there is nothing to compare a file with"):
        export(net, tmp_path / "model.pt", (images(1, 3, 8, 8),))


# ---------------------------------------------------------------------------------------------------------- faults


def assert_old_file_alone(path: Path) -> None:
    assert path.read_bytes() == OLD
    assert [*path.parent.iterdir()] == [path]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_that_deviates_does_not_get_its_name(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(OLD)
    form = FORMATS[suffix]

    def write_wrong(model: nn.Module, *args: Any) -> bytes:
        wrong = copy.deepcopy(model)
        wrong[4].bias.data[2] += 0.1
        return form.write(wrong, *args)

    monkeypatch.setitem(FORMATS, suffix, dataclasses.replace(form, write=write_wrong))
    with pytest.raises(RuntimeError, match=r"written and read back deviates from Sequential in Eval mode by \d\.\de"):
        export(small_net(), path, (images(1, 3, 8, 8),))
    assert_old_file_alone(path)


@pytest.mark.parametrize(
    ("where", "error"),
    [
        ("os.replace", KeyboardInterrupt()),
        ("os.fsync", OSError(errno.ENOSPC, "No space left on device")),
        ("torch.save", KeyboardInterrupt()),
    ],
)
def test_a_fault_leaves_the_old_file_and_nothing_else(
    where: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise error

    path, net = tmp_path / "model.pt", small_net().train()
    path.write_bytes(OLD)
    found = Snapshot.of(net)
    monkeypatch.setattr(where, fail)
    with pytest.raises(type(error)):
        export(net, path, (images(1, 3, 8, 8),))
    monkeypatch.undo()
    assert_old_file_alone(path)
    assert Snapshot.of(net) == found


LIMITED = """
import resource, sys, warnings
warnings.simplefilter("ignore")
import torch
from torch import nn
from lightning_convbn import export
torch.manual_seed(0)
net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 4000))
example = (torch.randn(1, 3, 8, 8),)
resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
for path in sys.argv[1:]:
    try:
        export(net, path, example)
    except OSError as error:
        print(path, error.strerror)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")
def test_a_disk_that_takes_no_more_leaves_the_old_files_and_nothing_else(tmp_path: Path) -> None:
    """The operating system refuses to let a file grow beyond a megabyte, as a full disk would."""
    files = [f"model{suffix}" for suffix in SUFFIXES]
    for file in files:
        (tmp_path / file).write_bytes(OLD)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *files],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{file} File too large" for file in files], done.stdout + done.stderr
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == dict.fromkeys(files, OLD)
