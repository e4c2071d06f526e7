"""Tensors are found wherever a forward may put them."""

from __future__ import annotations

from collections import OrderedDict, UserDict, deque
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from lightning_convbn.pairs.side_effects import leaves_in_attributes, leaves_of

ONE, TWO = torch.ones(1), torch.zeros(2)


@dataclass
class AsDataclass:
    first: Any
    second: Any


class AsNamedTuple(NamedTuple):
    first: Any
    second: Any


class WithSlots:
    __slots__ = ("first", "second", "unset")

    def __init__(self, first: Any, second: Any) -> None:
        self.first, self.second = first, second


class ListWithAttribute(list[Any]):
    extra: Any = None


def list_with_attribute(first: Any, second: Any) -> ListWithAttribute:
    made = ListWithAttribute([first])
    made.extra = second
    return made


@pytest.mark.parametrize(
    "contain",
    [
        lambda one, two: [one, two],
        lambda one, two: (one, two),
        lambda one, two: {one, two},
        lambda one, two: {"a": one, "b": two},
        lambda one, two: OrderedDict(a=one, b=two),
        lambda one, two: UserDict(a=one, b=two),
        lambda one, two: deque([one, two]),
        lambda one, two: {"a": [{"b": (one, [two])}]},
        AsDataclass,
        AsNamedTuple,
        WithSlots,
        list_with_attribute,
    ],
)
def test_tensors_are_found_in_every_container_and_object(contain: Any) -> None:
    found = [leaf for leaf in leaves_of(contain(ONE, TWO)) if isinstance(leaf, Tensor)]
    assert {id(leaf) for leaf in found} == {id(ONE), id(TWO)}


class LoadsWhenAsked(OrderedDict[str, Any]):
    """As the tables of classes in transformers: to ask for the values imports what they name."""

    def values(self) -> Any:
        raise ValueError("could not load")

    __iter__ = items = keys = values


def test_nothing_is_loaded_to_look_for_tensors() -> None:
    lazy = LoadsWhenAsked()
    OrderedDict.__setitem__(lazy, "a", ONE)
    assert list(leaves_of([lazy])) == [ONE]
    assert list(leaves_of([torch, test_a_container_may_hold_itself])) == [torch, test_a_container_may_hold_itself]


def test_a_container_may_hold_itself() -> None:
    loop: list[Any] = [ONE]
    loop.append(loop)
    assert list(leaves_of(loop)) == [ONE]


def test_attributes_are_searched_but_not_what_every_module_has() -> None:
    module = nn.Sequential(nn.BatchNorm2d(2))
    module[0].seen = {"features": [ONE]}
    found = [(name, leaf) for name, leaf in leaves_in_attributes(module) if isinstance(leaf, Tensor)]
    assert found == [("seen", ONE)]
