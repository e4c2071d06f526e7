"""The Deploy copy of a model in whatever wrapping or state: plain and alike, or refused with the fix."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator

import pytest
import torch
from efficientnet_lite_pytorch.utils import Conv2dStaticSamePadding
from helpers.comparing import Snapshot, assert_close
from helpers.model_checks import norms
from helpers.model_checks import randomized as randomized_frozen_too
from helpers.networks import Net, images, randomized, small_net
from helpers.tiny_training import BoringModule, make_trainer, quick
from lightning.fabric import Fabric
from timm.layers import BatchNormAct2d
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, fx, nn
from torchvision.ops import FrozenBatchNorm2d

from lightning_convbn import find_conv_bn_pairs, fuse_for_deploy, set_mode


@pytest.fixture
def process_group() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def compiled(net: nn.Module) -> nn.Module:
    return torch.compile(net, backend="eager")


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compiled": compiled,
    "compiled by module.compile": lambda net: (net.compile(backend="eager"), net)[1],
    "DDP": nn.parallel.DistributedDataParallel,
    "DataParallel": nn.DataParallel,
    "Fabric": lambda net: Fabric(accelerator="cpu", devices=1).setup(net),
    "compiled DDP": lambda net: compiled(nn.parallel.DistributedDataParallel(net)),
    "part compiled": lambda net: nn.Sequential(compiled(net[:9]), net[9:]),
    "part in DDP": lambda net: nn.Sequential(nn.parallel.DistributedDataParallel(net[:9]), net[9:]),
}


@pytest.mark.usefixtures("process_group")
@pytest.mark.filterwarnings("ignore:.*(deprecated|DataParallel)")
@pytest.mark.parametrize("name", WRAPPERS)
def test_what_wraps_a_model_is_left_out(name: str) -> None:
    net, input = small_net().double().eval(), images(2, 3, 8, 8, dtype=torch.float64)
    expected = net(input)
    set_mode(net, "tune")
    wrapped = WRAPPERS[name](net)
    found = Snapshot.of(net)
    fused = fuse_for_deploy(wrapped)
    assert Snapshot.of(net) == found
    assert_close([fused(input)], [expected], 1e-12)
    assert [type(module) for module in norms(fused).values()] == [nn.BatchNorm2d]
    assert {type(module).__module__.split(".")[:2][-1] for module in fused.modules()} == {"nn"}
    torch.save(fused, io.BytesIO())


def test_pairs_of_a_wrapped_model_are_known_by_their_names_there() -> None:
    wrapped = compiled(small_net())
    pairs = find_conv_bn_pairs(wrapped)
    fused = fuse_for_deploy(wrapped, pairs=pairs.unfold({pairs[0].bn: "not this one"}))
    assert pairs[0].bn == "_orig_mod.1"
    assert [type(fused[index]) for index in (1, 5, 8)] == [nn.BatchNorm2d, nn.Identity, nn.Identity]


def test_a_lightningmodule_attached_to_a_trainer_is_copied_without_it() -> None:
    module = BoringModule()
    trainer = make_trainer(quick())
    module.trainer = trainer
    fused = fuse_for_deploy(module)
    assert module.trainer is trainer
    assert fused._trainer is None
    assert len(norms(fused)) == 1
    torch.save(fused, io.BytesIO())
    assert_close([fused(images(2, 3, 8, 8))], [module.eval()(images(2, 3, 8, 8))], 1e-5)


def test_a_tensor_that_a_forward_left_behind_is_copied_without_its_graph() -> None:
    def stashes(net: Net, x: Tensor) -> Tensor:
        net.features = net.inner(x)
        return net.features

    model = Net(stashes, inner=small_net())
    model(images(2, 3, 8, 8))
    fused = fuse_for_deploy(model)
    assert model.features.grad_fn is not None
    assert fused.features.grad_fn is None
    assert torch.equal(fused.features, model.features)


@pytest.mark.filterwarnings("ignore:.*(deprecated|jit)")
@pytest.mark.parametrize("part", [False, True])
def test_torchscript_is_refused(part: bool) -> None:
    scripted = torch.jit.script(small_net().eval())
    name = "0.1" if part else "1"
    with pytest.raises(ValueError, match=f"model: `{name}` is a BatchNorm in TorchScript, .* before scripting"):
        fuse_for_deploy(nn.Sequential(scripted) if part else scripted)


@pytest.mark.filterwarnings("ignore:DTensor random operators may not have complete support")
@pytest.mark.usefixtures("process_group")
def test_sharded_weights_are_refused() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_module

    net = distribute_module(small_net(), init_device_mesh("cpu", (1,)))
    with pytest.raises(ValueError, match="`0` is sharded over processes; give a plain model with weights from a cons"):
        fuse_for_deploy(net)


def test_old_weight_norm_is_refused_after_a_forward() -> None:
    net = small_net()
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(net[0])
    net(images(2, 3, 8, 8))
    with pytest.raises(ValueError, match=r"`0` computes its weight anew in every forward"):
        fuse_for_deploy(net)


LAYERS: dict[str, Callable[[], nn.Sequential]] = {
    "conv1d": lambda: nn.Sequential(nn.Unflatten(1, (3, 1)), nn.Flatten(2), nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8)),
    "conv3d": lambda: nn.Sequential(nn.Unflatten(1, (3, 1)), nn.Conv3d(3, 8, (1, 3, 3)), nn.BatchNorm3d(8)),
    "transposed": lambda: nn.Sequential(nn.ConvTranspose2d(3, 8, 3, 2, output_padding=1), nn.BatchNorm2d(8)),
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 81, 8, bias=False), nn.BatchNorm1d(8)),
    "timm SAME": lambda: nn.Sequential(Conv2dSame(3, 8, 3, stride=2), BatchNormAct2d(8, act_layer=nn.SiLU)),
    "static SAME": lambda: nn.Sequential(Conv2dStaticSamePadding(3, 8, 3, image_size=9), nn.BatchNorm2d(8)),
    "same": lambda: nn.Sequential(nn.Conv2d(3, 8, 2, padding="same", padding_mode="reflect"), nn.BatchNorm2d(8)),
    "frozen": lambda: nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), FrozenBatchNorm2d(8)),
    "sync": lambda: nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.SyncBatchNorm(8)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_supported_layers_become_plain_ones(name: str) -> None:
    torch.manual_seed(0)
    net = randomized_frozen_too(randomized(LAYERS[name]())).double().eval()
    input = images(2, 3, 9, 9, dtype=torch.float64)
    fused = fuse_for_deploy(net)
    with torch.no_grad():
        assert_close([fused(input)], [net(input)], 1e-12)
    assert not norms(fused)
    convs = [(type(one), type(other)) for one, other in zip(net, fused, strict=True) if hasattr(one, "weight")]
    assert all(
        one is other or other in (nn.Identity, nn.SiLU) or issubclass(other, fx.GraphModule) for one, other in convs
    )
