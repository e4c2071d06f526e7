"""What leaves a converted model is plain: copies, pickles, averages; and derived classes stay what they are."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.comparing import assert_close
from helpers.networks import images, randomized, small_net
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.nn.utils.parametrizations import weight_norm
from torch.optim.swa_utils import AveragedModel, update_bn
from torchvision.ops import FrozenBatchNorm2d

from lightning_convbn import Mode, fuse_for_deploy, get_mode, set_mode

FROZEN: tuple[Mode, ...] = ("eval", "tune", "deploy")


class ClampingBatchNorm2d(nn.BatchNorm2d):
    """A BatchNorm that is not in the table. It also has a method of its own to be copied and pickled by."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).clamp(-1, 1)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "copies": getattr(self, "copies", 0) + 1}


class Zoo(nn.Module):
    """Has every kind of converted module: folded, frozen, frozen by its class, unknown, shared, recomputed."""

    def __init__(self) -> None:
        super().__init__()
        self.body = small_net()[:9]
        self.unknown = ClampingBatchNorm2d(8)
        self.always = FrozenBatchNorm2d(8)
        self.last = nn.Sequential(nn.Conv2d(8, 8, 1), FrozenBatchNorm2d(8), nn.Hardswish())
        self.again = self.last[2]
        randomized(self)
        self.train().double()

    def forward(self, input: Tensor) -> Tensor:
        return self.again(self.last(self.always(self.unknown(self.body(input)))))


def batch() -> Tensor:
    return images(4, 3, 8, 8, dtype=torch.float64)


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(batch())


def eval_output(model: nn.Module) -> Tensor:
    """What a plain model computes in plain PyTorch's eval state."""
    return output(copy.deepcopy(model).eval())


def saved_and_loaded(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def batches() -> Iterator[Tensor]:
    yield from (2 * batch() + 1, batch())


WAYS: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "torch.save": saved_and_loaded,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "protocol 0": lambda model: pickle.loads(pickle.dumps(model, protocol=0)),
    "ModuleList": lambda model: copy.deepcopy(nn.ModuleList([model]))[0],
}


@pytest.mark.parametrize("mode", FROZEN)
@pytest.mark.parametrize("way", WAYS)
def test_a_copy_is_plain_and_computes_the_same(way: str, mode: Mode) -> None:
    model, plain = Zoo(), Zoo()
    expected = eval_output(model)
    set_mode(model, mode, recompute="none" if mode == "deploy" else "elementwise")
    model(batch())  # Deploy mode keeps its fold
    copied = WAYS[way](model)
    assert [type(module) for module in copied.modules()] == [type(module) for module in plain.modules()]
    assert str(copied) == str(plain)
    assert get_mode(copied) == "train"
    for module, other in zip(copied.modules(), plain.modules(), strict=True):
        assert len(module._forward_pre_hooks) == 0
        assert module.training == (not isinstance(other, (nn.BatchNorm2d, FrozenBatchNorm2d)))
    assert copied.unknown.copies == 1
    assert copied.again is copied.last[2]
    assert_close([output(copied)], [expected], 1e-12)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.mul_(2)
    assert_close([output(copied)], [expected], 1e-12)
    assert get_mode(model) == mode
    copied.train()
    assert not torch.allclose(output(copied), expected)  # it is a plain model, and does as it is told
    assert len(set_mode(copied, "tune")) == 4
    set_mode(copied, "train")
    for module, other in zip(copied.modules(), plain.modules(), strict=True):
        assert vars(module).keys() - {"copies"} == vars(other).keys()
    set_mode(model, "train")
    assert str(model) == str(plain)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("mode", FROZEN)
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, saved_and_loaded])
def test_a_copy_of_one_layer_alone_computes_with_what_it_has(copied: Callable[[Any], Any], mode: Mode) -> None:
    """With its own attributes, whatever the original has, and the original with its own."""

    def changed(net: nn.Module) -> list[Tensor]:
        conv, bn = copied(net[0]), copied(net[1])
        conv.padding, bn.eps = (0, 0), 1.0
        conv._parameters = {**conv._parameters, "weight": nn.Parameter(2 * conv.weight)}
        assert (type(conv), type(bn)) == (nn.Conv2d, nn.BatchNorm2d)
        return [conv(batch()), bn.eval()(conv(batch())), bn(net[0](batch())), net[1](conv(batch())), output(net)]

    plain, model = (small_net()[:2].double().eval() for _ in range(2))
    set_mode(model, mode)
    assert_close(changed(model), changed(plain), 1e-12)
    set_mode(model, "train")
    assert_close([output(model)], [output(plain)], 1e-12)


@pytest.mark.parametrize("mode", FROZEN)
def test_a_pickle_is_loaded_where_this_package_is_not_installed(tmp_path: Path, mode: Mode) -> None:
    model = small_net()
    set_mode(model, mode, recompute="none" if mode == "deploy" else "elementwise")
    with torch.no_grad():
        expected = model(batch().float())
    torch.save({"model": model, "batch": batch().float(), "expected": expected}, tmp_path / "model.pt")
    script = (
        "import sys, torch\n"
        "sys.modules['lightning_convbn'] = None\n"
        f"saved = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)\n"
        "torch.testing.assert_close(saved['model'](saved['batch']), saved['expected'])\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


class Feature(nn.Module):
    """Keeps what its convolution puts out, by a hook that leads from the convolution back to it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.body[1].register_forward_hook(self.keep)

    def keep(self, module: nn.Module, args: Any, output: Tensor) -> None:
        """Keep it."""


@pytest.mark.parametrize("copied", [copy.deepcopy, saved_and_loaded])
def test_a_hook_that_leads_back_to_the_model_is_copied_with_it(copied: Callable[[Any], Any]) -> None:
    model = Feature()
    set_mode(model, "tune")
    for start in (model, model.body[1]):
        other = copied(start)
        bn = other if start is model.body[1] else other.body[1]
        (hook,) = bn._forward_hooks.values()
        assert hook.__self__.body[1] is bn
        assert hook.__self__ is not model


# ----------------------------------------------------------------------------------------------- what others do


@pytest.mark.parametrize("mode", FROZEN)
def test_pytorch_fuses_a_converted_convolution_and_its_norm(mode: Mode) -> None:
    model = small_net().double()
    set_mode(model, mode)
    model.eval()
    fused = fuse_conv_bn_eval(model[0], model[1])
    assert type(fused) is nn.Conv2d
    expected = output(nn.Sequential(*copy.deepcopy(model)[:2]))
    assert_close([output(fused)], [expected], 1e-12)


@pytest.mark.parametrize("mode", FROZEN)
def test_an_averaged_model_is_plain_and_its_statistics_can_be_updated(mode: Mode) -> None:
    model, plain = small_net().double(), small_net().double()
    set_mode(model, mode)
    averaged = [AveragedModel(each) for each in (model, plain)]
    for average, each in zip(averaged, (model, plain), strict=True):
        with torch.no_grad():
            each[0].weight.mul_(3)
        average.update_parameters(each)
        update_bn(batches(), average)
    assert_close([output(averaged[0].eval())], [output(averaged[1].eval())], 1e-12)


@pytest.mark.parametrize("mode", FROZEN)
def test_statistics_of_a_frozen_model_are_not_reset(mode: Mode) -> None:
    model = Zoo()
    set_mode(model, mode)
    expected = output(model)
    resets: list[Callable[[], Any]] = [lambda: update_bn(batches(), model)]
    resets += [model.body[1].reset_running_stats, model.body[3].reset_parameters, model.unknown.reset_running_stats]
    for reset in resets:
        with pytest.raises(RuntimeError, match=rf"Norm2d is frozen, .* in '{mode}' mode.*set_mode\(model, .train"):
            reset()
        assert torch.equal(output(model), expected)
    set_mode(model, "train")
    update_bn(batches(), model)
    assert not torch.allclose(eval_output(model), expected)


# ---------------------------------------------------------------------------------------- classes that are derived


def classes_of(model: nn.Module) -> set[str]:
    """Name the packages of all classes of a model, base classes included."""
    return {cls.__module__.partition(".")[0] for part in model.modules() for cls in type(part).__mro__}


@pytest.mark.parametrize("mode", FROZEN)
def test_a_parametrized_original_stays_what_it_is_when_copies_are_made(mode: Mode) -> None:
    """A copy has the class that ``parametrize`` has derived for the original."""
    model = small_net().double()
    expected = eval_output(model)
    set_mode(model, mode)
    weight_norm(model[0])
    cls = type(model[0])
    for _ in range(2):
        assert_close([output(fuse_for_deploy(model))], [expected], 1e-12)
        copied = copy.deepcopy(model)
        assert "lightning_convbn" not in classes_of(copied)
        assert_close([output(copied)], [expected], 1e-12)
        twice = copy.deepcopy(copied)
        with torch.no_grad():
            twice[0].parametrizations.weight.original0.mul_(2)
        assert_close([output(copied)], [expected], 1e-12)
        assert type(model[0]) is cls
        assert_close([output(model)], [expected], 1e-12)
    set_mode(model, "train")
    assert "lightning_convbn" not in classes_of(model)
    assert_close([eval_output(model)], [expected], 1e-12)
    torch.nn.utils.parametrize.remove_parametrizations(copied[0], "weight")
    assert type(copied[0]) is nn.Conv2d


def test_switching_one_parametrized_module_leaves_others_of_its_class_alone() -> None:
    model = small_net().double()
    expected = eval_output(model)
    set_mode(model, "tune")
    weight_norm(model[0])
    other = nn.Conv2d(3, 6, 1)
    other.__class__ = type(model[0])
    cls, bases = type(other), type(other).__bases__
    for mode in ("deploy", "tune", "train"):
        set_mode(model, mode)
        assert_close([output(model.eval())], [expected], 1e-12)
        assert (type(other), type(other).__bases__) == (cls, bases)


@pytest.mark.parametrize("mode", FROZEN)
def test_a_norm_of_an_unknown_class_is_compiled_as_it_runs(mode: Mode) -> None:
    model = Zoo()
    set_mode(model, mode)
    expected = output(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_close([output(compiled)], [expected], 1e-12)
