"""Which modules are blocks: repeated, in a container, with a pair and two convolutions; the innermost ones."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torchvision
from helpers.blocks import Residual, Tower, batch
from helpers.comparing import Snapshot
from helpers.networks import Net, torchvision_model
from torch import Tensor, nn

from lightning_convbn import find_conv_bn_pairs, recomputed_blocks, set_mode
from lightning_convbn.blocks import reasons
from lightning_convbn.blocks.find import find_blocks


def found_in(model: nn.Module) -> tuple[str, ...]:
    return find_blocks(model, find_conv_bn_pairs(model)).names


@pytest.mark.parametrize(
    ("name", "count", "first", "last"),
    [
        ("resnet18", 8, "layer1.0", "layer4.1"),
        ("resnet50", 16, "layer1.0", "layer4.2"),
        ("mobilenet_v2", 17, "features.1", "features.17"),
        ("efficientnet_b0", 16, "features.1.0", "features.7.0"),  # those alone in their stage, too
        ("regnet_y_400mf", 16, "trunk_output.block1.block1-0", "trunk_output.block4.block4-5"),
        ("densenet121", 58, "features.denseblock1.denselayer1", "features.denseblock4.denselayer16"),
        ("shufflenet_v2_x0_5", 16, "stage2.0", "stage4.3"),
        ("vgg11_bn", 0, None, None),
    ],
)
def test_blocks_of_torchvision(name: str, count: int, first: str | None, last: str | None) -> None:
    names = found_in(torchvision_model(name))
    assert len(names) == count
    assert (names[0], names[-1]) == (first, last) if names else first is None


def around(*layers: nn.Module) -> nn.Module:
    """A module that is no container, around one."""
    return Net(lambda net, x: net.inner(x), inner=nn.Sequential(*layers))


def test_a_block_of_blocks_is_a_stage() -> None:
    def stage() -> nn.Module:
        return around(Residual(), Residual())

    assert found_in(Tower(stage, blocks=2)) == tuple(f"blocks.{i}.inner.{j}" for i in (0, 1) for j in (0, 1))


def test_what_is_no_block() -> None:
    def alone() -> nn.Module:
        """One convolution: what it reads is kept in any case."""
        return around(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6))

    def without_norms() -> nn.Module:
        return around(nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1))

    class Other(Residual):
        """Of a class of its own."""

    assert found_in(Tower(alone)) == ()
    assert found_in(Tower(without_norms)) == ()
    assert found_in(Tower(Residual, blocks=1)) == ()
    mixed = Tower(Residual, blocks=3)
    mixed.blocks[1] = Other()
    assert found_in(mixed) == ()


class TestLeftOut:
    """Found, but not run again: the others are, and the reason is told."""

    def left_out(self, model: Tower) -> str:
        set_mode(model, "tune", recompute="blocks")
        blocks = recomputed_blocks(model)
        assert blocks.names == ("blocks.0", "blocks.2")
        assert [*blocks.left_out] == ["blocks.1"]
        assert blocks.summary()[0] == "run again      2 of 3 blocks"
        assert [line.split(" × ")[0].strip() for line in blocks.summary()[1:]] == ["1"]
        assert blocks.summary()[1].endswith(": blocks.1")
        return blocks.left_out["blocks.1"]

    def test_a_forward_of_its_own(self) -> None:
        model = Tower()
        model.blocks[1].forward = partial(type(model.blocks[1]).forward, model.blocks[1])  # type: ignore[method-assign]
        assert self.left_out(model) == reasons.OWN_FORWARD

    def test_compiled_by_itself(self) -> None:
        model = Tower()
        model.blocks[1].compile(backend="eager")
        assert self.left_out(model) == reasons.COMPILED

    def test_a_pair_over_its_border(self) -> None:
        class Late(Tower):
            def __init__(self) -> None:
                super().__init__()
                self.late, self.blocks[1].bn2 = self.blocks[1].bn2, nn.Identity()

            def run(self, block: nn.Module, input: Tensor) -> Tensor:
                if block is not self.blocks[1]:
                    return block(input)  # type: ignore[no-any-return]
                inner = block.bn1(block.conv1(input))  # type: ignore[operator]
                return self.late(block.conv2(inner))  # type: ignore[operator, no-any-return]

        assert self.left_out(Late()) == reasons.CROSSED.format(conv="blocks.1.conv2", bn="late")


def test_a_model_without_blocks_has_none_and_is_converted_as_with_elementwise() -> None:
    model = torchvision.models.vgg11_bn(num_classes=2)
    set_mode(model, "tune", recompute="elementwise")
    expected = str(model)
    set_mode(model, "tune", recompute="blocks")
    assert recomputed_blocks(model).names == ()
    assert str(model).replace("'blocks'", "'elementwise'") == expected


@pytest.mark.parametrize("recompute", ["none", "elementwise"])
def test_without_the_option_there_are_none(recompute: str) -> None:
    model = Tower()
    set_mode(model, "tune", recompute=recompute)  # type: ignore[arg-type]
    assert recomputed_blocks(model).names == ()
    assert "Recomputed" not in str(model)


class TestNamed:
    def test_named_blocks_run_again_and_no_others(self) -> None:
        model = Tower()
        set_mode(model, "eval", recompute=["blocks.2", "stem"])
        assert recomputed_blocks(model).names == ("stem", "blocks.2")
        with torch.no_grad():
            model(batch())

    @pytest.mark.parametrize(
        ("names", "message"),
        [
            (["blocks.7"], "recompute: Tower has no module `blocks.7`"),
            (["blocks.0.conv1"], "recompute: `blocks.0.conv1` is a Conv2d, a layer; name a block of layers"),
            (["blocks.0", "head"], "recompute: `head` is a Linear, a layer; name a block of layers"),
            (["hooked"], f"recompute: `hooked` can't run again in the backward pass: it {reasons.OWN_FORWARD}"),
            ([0], r"recompute must be one of 'none', 'elementwise', 'blocks'; got [0]."),
        ],
    )
    def test_bad_names_change_nothing(self, names: list[str], message: str) -> None:
        model = Tower()
        model.hooked = Residual()
        model.hooked.forward = partial(Residual.forward, model.hooked)  # type: ignore[method-assign]
        found = Snapshot.of(model)
        with pytest.raises(ValueError) as raised:  # noqa: PT011 - compared as a string below
            set_mode(model, "tune", recompute=names)
        assert str(raised.value) == message
        assert Snapshot.of(model) == found
