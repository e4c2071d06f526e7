"""Switching: exact there and back, frozen for good, never stale, and bad input changes nothing."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from threading import Thread
from typing import Any, get_args

import pytest
import torch
from helpers.blocks import Tower
from helpers.comparing import Snapshot, assert_close, gradients
from helpers.counting_operations import NewTensors, count_alive
from helpers.networks import BATCH_NORMS, images, randomized, small_net, torchvision_model
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.parametrizations import weight_norm

from lightning_convbn import ConvBNPairs, Mode, conv_bn_mode, find_conv_bn_pairs, fuse_for_deploy, get_mode, set_mode

MODES: tuple[Mode, ...] = get_args(Mode)
FROZEN: tuple[Mode, ...] = ("eval", "tune", "deploy")


class DoublingBatchNorm2d(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class Patchwork(nn.Module):
    """Pairs that fold, and BatchNorms frozen, held by a hook, and unfrozen; its training flags are mixed."""

    def __init__(self) -> None:
        super().__init__()
        self.body = small_net()
        self.hooked = nn.Sequential(nn.Conv2d(3, 3, 1), DoublingBatchNorm2d(3))
        self.left = nn.BatchNorm2d(3, track_running_stats=False)
        randomized(self).train()
        self.body[1].eval()
        self.body[4].eval()
        self.hooked[1].eval()

    def forward(self, input: Tensor) -> Tensor:
        return self.body(self.left(self.hooked(input)))


def batch(dtype: torch.dtype = torch.float64) -> Tensor:
    return images(2, 3, 8, 8, dtype=dtype)


def eval_output(model: nn.Module) -> Tensor:
    """What the model computes in plain PyTorch's eval state, on a copy."""
    plain = copy.deepcopy(model)
    set_mode(plain, "train")
    with torch.no_grad():
        return plain.eval()(batch(next(plain.parameters()).dtype))


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(batch(next(model.parameters()).dtype))


@pytest.mark.parametrize("second", MODES)
@pytest.mark.parametrize("first", MODES)
def test_a_switch_there_and_back_is_exact(first: Mode, second: Mode) -> None:
    model = Patchwork()
    found = Snapshot.of(model)
    pairs = find_conv_bn_pairs(model)
    for mode in (first, second, second):
        assert set_mode(model, mode) == pairs
        assert get_mode(model) == mode
        assert Snapshot.of(model).parameters == found.parameters
        assert Snapshot.of(model).tensors == found.tensors
        assert list(model.state_dict()) == list(found.tensors)
    set_mode(model, "train")
    assert get_mode(model) == "train"
    assert Snapshot.of(model) == found


def test_a_switch_there_and_back_computes_nothing() -> None:
    """So it takes no time that grows with the weights."""
    model = torchvision_model("resnet152")
    with NewTensors() as new:
        assert len(set_mode(model, "tune")) == 155
        set_mode(model, "train")
    assert new.count == 0


def test_get_mode_of_a_mixed_model_names_its_parts() -> None:
    net = nn.Sequential(small_net()[:3], small_net()[:3])
    set_mode(net[0], "tune")
    assert get_mode(net) == "tune"
    set_mode(net[1], "eval")
    with pytest.raises(ValueError, match=r"Sequential is in no single mode \(`1.1` is in 'eval', `0.1` is in 'tune'\)"):
        get_mode(net)
    set_mode(net, "deploy")
    assert get_mode(net) == "deploy"


class TestContextManager:
    @pytest.mark.parametrize("before", MODES)
    def test_restores_after_an_exception(self, before: Mode) -> None:
        model = Patchwork()
        set_mode(model, before)
        found = Snapshot.of(model)
        with pytest.raises(ZeroDivisionError), conv_bn_mode(model, "tune" if before != "tune" else "eval"):
            raise ZeroDivisionError
        assert get_mode(model) == before
        assert Snapshot.of(model) == found

    def test_nests(self) -> None:
        model = Patchwork()
        found = Snapshot.of(model)
        seen = []
        with conv_bn_mode(model, "tune"):
            with conv_bn_mode(model, "train"):
                seen.append(get_mode(model))
            with conv_bn_mode(model, "deploy"), conv_bn_mode(model, "eval"):
                seen.append(get_mode(model))
            seen.append(get_mode(model))
        assert seen == ["train", "eval", "tune"]
        assert Snapshot.of(model) == found

    def test_brings_back_the_pairs_in_force(self) -> None:
        net = small_net()
        chosen = find_conv_bn_pairs(net).unfold({"5": "mine"})
        set_mode(net, "tune", pairs=chosen)
        with conv_bn_mode(net, "tune", pairs=chosen.unfold({"1": "this one, too"})) as inner:
            assert list(inner) == [("7", "8")]
        with conv_bn_mode(net, "train"):
            pass
        assert set_mode(net, "deploy") == chosen


class Interrupts(nn.BatchNorm2d):
    """A BatchNorm at which the first switch is interrupted."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "training" and vars(self).pop("ready", False):
            raise KeyboardInterrupt
        super().__setattr__(name, value)


def test_a_switch_that_is_interrupted_leaves_plain_modules() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), Interrupts(8)).eval()
    found = Snapshot.of(net)
    vars(net[3])["ready"] = True
    with pytest.raises(KeyboardInterrupt), conv_bn_mode(net, "tune"):
        pass
    assert get_mode(net) == "train"
    assert Snapshot.of(net) == found


def back_to_train(model: nn.Module) -> None:
    model.train()


def set_flags(model: nn.Module) -> None:
    for module in model.modules():
        module.training = True


def freeze_as_lightning_does(model: nn.Module) -> None:
    """BaseFinetuning.freeze_module: the flag says that there are no statistics, but the buffers are there."""
    for module in model.modules():
        if isinstance(module, BATCH_NORMS):
            module.track_running_stats = False
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad = False
    model.train()


@pytest.mark.parametrize("mode", FROZEN)
@pytest.mark.parametrize("thaw", [back_to_train, set_flags, freeze_as_lightning_does])
def test_frozen_is_frozen_for_good(thaw: Callable[[nn.Module], None], mode: Mode) -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), DoublingBatchNorm2d(3), *small_net())
    randomized(model).double()
    set_mode(model, mode)
    expected = output(model)
    statistics = Snapshot.of(model).tensors
    thaw(model)
    for _ in range(2):
        assert torch.equal(output(model), expected)
        model(batch())
    assert Snapshot.of(model).tensors == statistics


def test_flags_cleared_before_the_switch_do_not_thaw_either() -> None:
    net = small_net().double()
    expected = eval_output(net)
    freeze_as_lightning_does(net)
    assert len(set_mode(net, "tune")) == 3
    assert_close([output(net)], [expected], 1e-12)


def other_weights(net: nn.Module) -> dict[str, Tensor]:
    return {name: tensor * 1.5 for name, tensor in net.state_dict().items()}


def step_of_an_optimizer(net: nn.Module) -> None:
    for parameter in net.parameters():
        parameter.requires_grad_()
    net(batch()).sum().backward()
    torch.optim.SGD(net.parameters(), 0.1).step()
    net.requires_grad_(False)


def statistics_of_inference_mode(net: nn.Module) -> None:
    with torch.inference_mode():
        net[1].running_mean, net[1].running_var = net[1].running_mean + 1, net[1].running_var * 2


def data_and_switches(*modes: Mode) -> Callable[[nn.Module], Any]:
    """As weight averaging does: no version counter tells of it, the switch does."""

    def change(net: nn.Module) -> None:
        net[0].weight.data.mul_(2)
        for mode in modes:
            set_mode(net, mode)

    return change


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "load_state_dict": lambda net: net.load_state_dict(other_weights(net)),
    "load_state_dict, assigned": lambda net: net.load_state_dict(other_weights(net), assign=True),
    "a step of an optimizer": step_of_an_optimizer,
    "written statistics": lambda net: (net[1].running_mean.add_(1), net[8].running_var.mul_(2)),
    "another gamma": lambda net: setattr(net[1], "weight", nn.Parameter(net[1].weight * 2, requires_grad=False)),
    "another eps": lambda net: setattr(net[1], "eps", 0.5),
    "statistics of inference mode": statistics_of_inference_mode,
    "another dtype": lambda net: net.float(),
    "data and a switch": data_and_switches("tune", "deploy"),
    "data and the same mode": data_and_switches("deploy"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(("mode", "trainable"), [("deploy", False), ("tune", False), ("tune", True)])
def test_what_is_kept_is_never_stale(change: str, mode: Mode, trainable: bool) -> None:
    """Deploy mode keeps folds, so does Tune mode of pairs that are frozen as a whole; of others it keeps constants."""
    net = small_net().double().requires_grad_(trainable)
    set_mode(net, mode)
    before = output(net)
    CHANGES[change](net)
    after = output(net)
    assert_close([after], [eval_output(net)], 1e-12 if after.dtype is torch.float64 else 1e-5)
    assert after.dtype is not before.dtype or not torch.equal(after, before)


@pytest.mark.parametrize("mode", ["deploy", "tune"])
def test_a_tensor_that_takes_another_part_is_noticed(mode: Mode) -> None:
    net = small_net().double().requires_grad_(False)
    vector, net[1].weight = net[1].bias, None
    set_mode(net, mode)
    output(net)
    net[1].weight, net[1].bias = vector, None
    assert_close([output(net)], [eval_output(net)], 1e-12)


@pytest.mark.parametrize(("trainable", "gradients_of_the_input"), [(True, False), (False, False), (False, True)])
def test_deploy_mode_folds_once(trainable: bool, gradients_of_the_input: bool) -> None:
    """From the second forward on it computes no more tensors than the Deploy copy does."""
    net, image = small_net().requires_grad_(trainable), images(2, 3, 8, 8).requires_grad_(gradients_of_the_input)
    copied = fuse_for_deploy(net)
    set_mode(net, "deploy")
    counts = []
    with torch.set_grad_enabled(gradients_of_the_input):
        net(image)
        for model in (net, copied):
            with NewTensors() as new:
                model(image)
            counts.append(new.count)
    assert counts[0] <= counts[1]


def test_threads_in_different_precisions_share_a_model_in_deploy_mode() -> None:
    net, errors = small_net().requires_grad_(False), []
    set_mode(net, "deploy")

    def run(half: bool) -> None:
        try:
            for _ in range(50):
                with torch.autocast("cpu", torch.bfloat16, enabled=half), torch.no_grad():
                    net(images(2, 3, 8, 8))
        except Exception as error:
            errors.append(error)

    threads = [Thread(target=run, args=(half,)) for half in (True, False) * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_a_fold_without_data_is_not_kept() -> None:
    net = small_net().requires_grad_(False)
    set_mode(net, "deploy")
    image = images(2, 3, 8, 8)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        net(image)
    assert type(output(net)) is Tensor


def test_a_fold_of_a_weight_that_is_sharded_between_two_calls_is_not_kept() -> None:
    """It would hold what FSDP frees after each forward."""

    class Shard(Tensor):
        pass

    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).requires_grad_(False)
    whole = net[0].weight
    net[0].weight = nn.Parameter(whole.data.as_subclass(Shard), requires_grad=False)
    set_mode(net, "deploy")
    net[0].weight = whole
    before = count_alive(whole.shape)
    net(torch.ones(1, 3, 5, 5))
    assert count_alive(whole.shape) == before


@pytest.mark.parametrize("mode", ["deploy", "tune"])
@pytest.mark.parametrize("trainable", [True, False])
def test_tensors_of_inference_mode_are_folded_at_each_forward(mode: Mode, trainable: bool) -> None:
    """They have no version that would tell of a write."""
    other = small_net(seed=1).double().state_dict()
    with torch.inference_mode():
        net = small_net().double().requires_grad_(trainable)
        set_mode(net, mode)
        net(batch())
        net.load_state_dict(other)
        assert_close([net(batch())], [eval_output(net)], 1e-12)


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.filterwarnings("ignore:.torch.jit", "ignore::torch.jit.TracerWarning")
def test_a_traced_model_holds_nothing_that_was_kept(trainable: bool) -> None:
    """By TorchScript, and by make_fx: weights that are loaded later matter."""
    net = small_net().double().requires_grad_(trainable)
    set_mode(net, "tune")
    with torch.no_grad():
        net(batch())
        scripted = torch.jit.trace(net, batch(), check_trace=False)
        graph = make_fx(net)(batch())
        other = small_net(seed=1).double().state_dict()
        scripted.load_state_dict(other)
        net.load_state_dict(other)
        expected = eval_output(net)
        assert_close([scripted(batch()), graph(batch())], [expected, expected], 1e-12)


def test_a_graph_of_make_fx_has_gradients() -> None:
    """Of a layer that eager mode would scale the output of, in place."""
    net = randomized(nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4))).double()
    set_mode(net, "tune")
    input = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    assert_close(gradients(make_fx(net)(input)(input), input), gradients(net(input), input), 1e-12)


def test_nothing_is_kept_of_parameters_without_data() -> None:
    """As when a model is counted by `functional_call` with fake parameters, and its own buffers."""
    net = small_net().requires_grad_(False)
    set_mode(net, "tune")
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        parameters = {name: fake.from_tensor(parameter) for name, parameter in net.named_parameters()}
        torch.func.functional_call(net, parameters, (fake.from_tensor(batch().float()),))
    assert not isinstance(output(net), FakeTensor)
    assert_close([output(net)], [eval_output(net)], 1e-5)


def test_another_storage_at_the_same_address_is_noticed() -> None:
    """As when weights are replaced by `.data = ...` again and again."""
    net = small_net().double().requires_grad_(False)
    set_mode(net, "tune")
    for _ in range(5):
        output(net)
        weight = net[0].weight.detach().clone() * 1.5
        net[0].weight.data = torch.empty(0, dtype=torch.float64)
        net[0].weight.data = weight.clone()
        del weight
        assert_close([output(net)], [eval_output(net)], 1e-12)


def test_constants_made_in_inference_mode_serve_double_backward() -> None:
    """As after a validation in Tune mode."""
    net = small_net().double()
    set_mode(net, "tune")
    with torch.inference_mode():
        net(batch())
    (once,) = torch.autograd.grad(net(batch()).pow(2).sum(), net[0].weight, create_graph=True)
    twice = torch.autograd.grad(once.pow(2).sum(), net[0].weight)
    set_mode(net, "eval")
    (once,) = torch.autograd.grad(net(batch()).pow(2).sum(), net[0].weight, create_graph=True)
    assert_close(twice, torch.autograd.grad(once.pow(2).sum(), net[0].weight), 1e-10)


def test_statistics_that_want_a_gradient_are_no_constants() -> None:
    """Each step has a graph of its own."""
    net = small_net().double()
    set_mode(net, "tune")
    net[1].running_mean.requires_grad_()
    steps = [torch.autograd.grad(net(batch()).sum(), net[1].running_mean) for _ in range(2)]
    assert_close(steps[0], steps[1], 0.0)


def test_a_pair_that_is_trained_again_keeps_no_fold() -> None:
    """As at the end of a frozen phase: its gradients are Eval's, and nobody holds the fold any longer."""
    net = small_net().double().requires_grad_(False)
    set_mode(net, "tune")
    output(net)
    net.requires_grad_(True)
    before = count_alive(net[4].weight.shape)
    tuned = gradients(net(batch()), *net.parameters())
    assert count_alive(net[4].weight.shape) <= before + 1  # the gradient
    set_mode(net, "eval")
    assert_close(tuned, gradients(net(batch()), *net.parameters()), 1e-10)


@pytest.mark.parametrize("mode", ["deploy", "tune"])
def test_a_fold_made_in_inference_mode_serves_a_gradient_of_the_input(mode: Mode) -> None:
    net = small_net().double().requires_grad_(False)
    plain = copy.deepcopy(net).eval()
    set_mode(net, mode)
    with torch.inference_mode():
        net(batch())
    ours, theirs = batch().requires_grad_(), batch().requires_grad_()
    assert_close(gradients(net(ours), ours), gradients(plain(theirs), theirs), 1e-10)


def test_a_deployed_model_with_trainable_parameters_gives_tunes_gradients() -> None:
    net = small_net().double()
    set_mode(net, "tune")
    expected = gradients(net(batch()), *net.parameters())
    set_mode(net, "deploy")
    output(net)  # a fold is kept now
    assert_close(gradients(net(batch()), *net.parameters()), expected, 0.0)


def plain_attributes(layers: nn.Module, part: slice = slice(None)) -> bool:
    """Whether layers of the small network have the attributes that they have in a plain one, and no others."""
    return [vars(layer).keys() for layer in layers] == [vars(layer).keys() for layer in small_net()[part]]


class TestAfterSurgery:
    """Coming back always works, and what is left of a pair computes the right thing."""

    @pytest.mark.parametrize("mode", FROZEN)
    @pytest.mark.parametrize("replaced", ["0", "1", "7", "8"])
    def test_a_model_is_restored_after_a_module_was_replaced(self, replaced: str, mode: Mode) -> None:
        model = small_net().double().eval()
        set_mode(model, mode)
        old, new = model.get_submodule(replaced), small_net(seed=1).double().eval().get_submodule(replaced)
        setattr(model, replaced, new)
        expected = eval_output(copy.deepcopy(model))
        assert_close([output(model)], [expected], 1e-12)
        set_mode(model, "tune" if mode == "deploy" else "deploy")
        assert_close([output(model)], [expected], 1e-12)
        set_mode(model, "train")
        assert plain_attributes(model)
        set_mode(old, "train")
        assert vars(old).keys() == vars(new).keys()
        set_mode(model, mode)
        assert_close([output(model)], [eval_output(model)], 1e-12)

    @pytest.mark.parametrize("mode", FROZEN)
    @pytest.mark.parametrize("part", [slice(0, 1), slice(1, 2), slice(1, 5), slice(5, 9)])
    def test_a_part_is_restored_and_the_rest_computes_as_before(self, part: slice, mode: Mode) -> None:
        model = small_net().double().eval()
        expected = eval_output(model)
        set_mode(model, mode)
        set_mode(model[part], "train")
        assert plain_attributes(model[part], part)
        assert_close([output(model)], [expected], 1e-12)
        set_mode(model, mode)
        assert_close([output(model)], [expected], 1e-12)
        set_mode(model, "train")
        assert plain_attributes(model)

    @pytest.mark.parametrize("to", ["eval", "tune", "deploy"])
    @pytest.mark.parametrize("part", [slice(1, 2), slice(1, 5), slice(5, 9)])
    def test_a_part_is_switched_and_the_rest_computes_as_before(self, part: slice, to: Mode) -> None:
        model = small_net().double().eval()
        expected = eval_output(model)
        set_mode(model, "tune")
        set_mode(model[part], to)
        assert_close([output(model)], [expected], 1e-12)

    def test_a_wrapper_that_is_refused_can_be_restored(self) -> None:
        model = small_net()
        set_mode(model, "tune")
        set_mode(nn.DataParallel(model), "train")
        assert get_mode(model) == "train"

    def test_the_context_manager_comes_back_though_a_layer_was_parametrized(self) -> None:
        model = small_net().double()
        found = set_mode(model, "tune")
        expected = eval_output(model)
        with conv_bn_mode(model, "eval"):
            weight_norm(model[0])
        assert get_mode(model) == "tune"
        assert set_mode(model, "tune").unpaired.keys() == found.unpaired.keys()
        assert_close([output(model)], [expected], 1e-12)


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
@pytest.mark.parametrize("mode", FROZEN)
def test_a_scripted_activation_does_not_matter(mode: Mode) -> None:
    model = small_net().double()
    expected = eval_output(model)
    model[2], model[6] = torch.jit.script(model[2]), torch.jit.trace(model[6], batch())
    pairs = set_mode(model, mode)
    assert len(pairs) == 3
    assert_close([output(model)], [expected], 1e-12)
    assert_close([fuse_for_deploy(model)(batch())], [expected], 1e-12)
    set_mode(model, "train")
    assert isinstance(model[1], nn.BatchNorm2d)


class TestTrainModeWithRecomputation:
    """It is Train mode: switching to it, from it and back is exact, and pairs are found as in the plain model."""

    @pytest.mark.parametrize("recompute", ["elementwise", "blocks", ["blocks.1"]], ids=str)
    @pytest.mark.parametrize("mode", ["train", "eval", "tune", "deploy"])
    def test_switches_to_and_from(self, mode: Mode, recompute: Any) -> None:
        model = Tower().train()
        model.blocks[0].bn1.eval()  # type: ignore[union-attr]
        found, pairs = Snapshot.of(model), find_conv_bn_pairs(model)
        assert set_mode(model, mode) == pairs
        other = Snapshot.of(model)
        assert set_mode(model, "train", recompute=recompute) == pairs
        recomputing = Snapshot.of(model)
        assert get_mode(model) == "train"
        assert "convbn='train', recompute=" in str(model)
        assert recomputing.training == found.training
        with conv_bn_mode(model, mode) as chosen:
            assert (chosen, Snapshot.of(model)) == (pairs, other)
        assert Snapshot.of(model) == recomputing
        assert set_mode(model, mode) == pairs
        with conv_bn_mode(model, "train", recompute=recompute):
            assert Snapshot.of(model) == recomputing
        assert Snapshot.of(model) == other
        set_mode(model, "train", recompute=recompute)
        set_mode(model, "train")
        assert Snapshot.of(model) == found

    @pytest.mark.filterwarnings("ignore:.torch.jit.trace")
    @pytest.mark.parametrize("recompute", ["elementwise", "blocks"])
    def test_copies_pickles_traces_and_exports_are_those_of_the_plain_model(self, recompute: Any) -> None:
        plain, model = Tower().eval(), Tower().eval()
        set_mode(model, "train", recompute=recompute)
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert Snapshot.of(copied)[:4] == Snapshot.of(plain)[:4]  # all but what tells parameters apart
        image = images(2, 3, 8, 8)
        assert torch.fx.symbolic_trace(model).code == torch.fx.symbolic_trace(plain).code
        for run in (torch.export.export(model, (image,)).module(), torch.jit.trace(model, image)):
            assert torch.equal(run(image), plain(image))

    @pytest.mark.parametrize("recompute", ["elementwise", "blocks"])
    def test_a_compiled_step_is_the_plain_models(self, recompute: Any) -> None:
        found = []
        for how in ("none", recompute):
            model = Tower().train()
            set_mode(model, "train", recompute=how)
            torch.compiler.reset()
            output = torch.compile(model, backend="aot_eager", fullgraph=True)(images(2, 3, 8, 8))
            gradients = torch.autograd.grad(output.sum(), [*model.parameters()])
            found.append([output.detach(), *gradients, *model.buffers()])
        assert all(map(torch.equal, *found))


class TestBadInput:
    """A ValueError that names the argument, and an untouched model."""

    @pytest.mark.parametrize(
        ("mode", "options", "message"),
        [
            ("Tune", {}, "mode must be one of 'train', 'eval', 'tune', 'deploy'; got 'Tune'."),
            ("tune", {"recompute": "all"}, "recompute must be one of 'none', 'elementwise', 'blocks'; got 'all'."),
            ("train", {"recompute": True}, "recompute must be one of 'none', 'elementwise', 'blocks'; got True."),
            (
                "deploy",
                {"recompute": "elementwise"},
                "recompute='elementwise' needs the mode to be 'train', 'eval' or 'tune'; got 'deploy'",
            ),
            ("tune", {"pairs": ConvBNPairs([("body.0", "no")])}, "pairs: Patchwork has no module `no`"),
            (
                "deploy",
                {"pairs": ConvBNPairs([("body.0", "body.2")])},
                "pairs: `body.0` and `body.2` can't be folded: `body.2` is no BatchNorm",
            ),
            (
                "eval",
                {"pairs": ConvBNPairs([("body.0", "body.8")])},
                "pairs: `body.0` and `body.8` can't be folded: `body.0` gives 6 channels, not the 8 that it has",
            ),
            (
                "tune",
                {"pairs": ConvBNPairs([("hooked.0", "left")])},
                "pairs: `hooked.0` and `left` can't be folded: has no running statistics",
            ),
            (
                "tune",
                {"pairs": ConvBNPairs([("hooked.0", "hooked.1")])},
                "pairs: `hooked.0` and `hooked.1` can't be folded: is a DoublingBatchNorm2d, which is not in the table",
            ),
            (
                "tune",
                {"pairs": ConvBNPairs([("body.0", "body.1"), ("body.0", "body.3")])},
                "pairs: a convolution or a BatchNorm is in more than one pair",
            ),
        ],
    )
    @pytest.mark.parametrize("before", ["train", "deploy"])
    def test_arguments(self, before: Mode, mode: Any, options: dict[str, Any], message: str) -> None:
        model = Patchwork()
        set_mode(model, before)
        found = Snapshot.of(model)
        for switch in (set_mode, lambda *args, **kwargs: conv_bn_mode(*args, **kwargs).__enter__()):
            with pytest.raises(ValueError) as raised:  # noqa: PT011 - compared as a string below
                switch(model, mode, **options)
            assert str(raised.value).startswith(message)
            assert Snapshot.of(model) == found

    def test_not_a_module(self) -> None:
        with pytest.raises(ValueError, match="model must be a torch.nn.Module; got list"):
            set_mode([small_net()], "tune")

    def test_data_parallel(self) -> None:
        model = nn.Sequential(nn.DataParallel(small_net()))
        found = Snapshot.of(model)
        with pytest.raises(ValueError, match="model: `0` is wrapped in DataParallel, .* use DistributedDataParallel"):
            set_mode(model, "tune")
        assert Snapshot.of(model) == found
        set_mode(model[0].module, "tune")
        with pytest.raises(RuntimeError, match=r"DataParallel: this Conv2d is converted by set_mode"):
            model[0].module[0]._replicate_for_data_parallel()
        set_mode(model, "train")
        assert type(model[0].module[0]._replicate_for_data_parallel()) is nn.Conv2d

    @pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
    def test_a_scripted_norm_is_named(self) -> None:
        model = nn.Sequential(torch.jit.trace(small_net().eval(), batch(torch.float32)), small_net())
        for switch in (lambda: set_mode(model, "tune"), lambda: fuse_for_deploy(model)):
            with pytest.raises(ValueError, match="model: `0.1` is a BatchNorm in TorchScript, .* before scripting"):
                switch()
        set_mode(model, "train")

    @pytest.mark.parametrize("mode", FROZEN)
    def test_a_model_without_norms(self, mode: Mode) -> None:
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4))
        with pytest.raises(
            ValueError, match=f"Sequential has no BatchNorm, so there is nothing to put in '{mode}' mode"
        ):
            set_mode(model, mode)
        assert len(set_mode(model, "train")) == 0
