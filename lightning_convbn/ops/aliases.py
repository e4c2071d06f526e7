"""Which tensors share a storage: a write to one of them is a write to all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING
from weakref import ReferenceType, ref

from torch import Tensor

if TYPE_CHECKING:
    from lightning_convbn.ops.values import Value


class Aliases:
    """The values of all tensors that share one storage. A write to one of these tensors is a write to all of them."""

    __slots__ = ("_left", "_room", "_strangers", "_values")

    def __init__(self) -> None:
        self._left = False
        self._room = 16  # the list is cleared of the dead when it is full
        self._values: list[ReferenceType[Value]] = []
        self._strangers: Sequence[ReferenceType[Tensor]] = ()

    def add(self, value: Value) -> None:
        """Take in the value of one more tensor."""
        value.aliases = self
        if len(self._values) >= self._room:
            self._values = [reference for reference in self._values if reference() is not None]
            self._room = 2 * len(self._values) + 16
        self._values.append(ref(value))

    def add_stranger(self, tensor: Tensor) -> None:
        """Note a tensor that may be written unseen. Nothing is computed from the storage while it is alive."""
        self.before_write()
        self._strangers = [*self._strangers, ref(tensor)]

    def leave(self) -> None:
        """Compute nothing from the storage from now on: what is written to it may not even count as a version."""
        self.before_write()
        self._left = True

    @property
    def are_followed(self) -> bool:
        """Whether every write to the storage is seen."""
        if self._strangers:
            self._strangers = [stranger for stranger in self._strangers if stranger() is not None]
        return not self._strangers and not self._left

    def before_write(self) -> None:
        """Keep what is computed from these values, because they are about to be written in place."""
        for reference in self._values:
            value = reference()
            if value is not None:
                value.settle_followers()
