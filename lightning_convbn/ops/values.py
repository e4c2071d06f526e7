"""Values: what the backward pass needs of a tensor, and what it can be computed from.

A *holder* stands in the autograd graph in the place of a tensor that a node has saved. It asks a `Value` for it. The
values are kept, or they are computed again from other values that are kept anyway. This is decided when a node saves
the tensor, and once more when something that it is made of is kept after all. So a graph never keeps more than it would
keep without recipes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from lightning_convbn.compat import storage_id, without_torch_function
from lightning_convbn.ops.aliases import Aliases
from lightning_convbn.ops.recipes import Source

PASSES = 16  # over the data, at most, for one tensor

Compute = Callable[..., Tensor]


class Loan(list[Source]):
    """What a concatenation or a view is made of. It is kept in its place, as soon as that is relied on.

    The tensor holds it; so it goes when the tensor goes.
    """


class Value:
    """The values of one tensor.

    Args:
        compute: Computes them from ``inputs``, out of place, to the same bits; None if they can't be computed.
        inputs: What they are made of. They are not kept for that: they are used if they are kept anyway.
        passes: How often ``compute`` goes over the data.
        loan: The data of ``inputs``, if they may be kept for this value.

    Attributes:
        aliases: The values that share a storage with these; None while no tensor is known to have them.
        frozen: Whether they come from layers whose parameters want no gradients. What follows will hardly save them.
        own: The holder by which the function that made them keeps its input, or them, to see where it was clipped.
        users: How many holders and other values rely on them.
    """

    __slots__ = (
        "__weakref__",
        "_asked",
        "_compute",
        "_depth",
        "_followers",
        "_inputs",
        "_loan",
        "_passes",
        "_relies",
        "_remembered",
        "_source",
        "aliases",
        "frozen",
        "own",
        "users",
    )

    def __init__(
        self,
        compute: Compute | None = None,
        inputs: Sequence[Value] = (),
        passes: int = 1,
        loan: Loan | None = None,
    ) -> None:
        self.aliases: Aliases | None = None
        self.frozen = False
        self.own: Callable[[], Holder | None] = _none
        self.users = 0
        self._compute = compute
        self._inputs = inputs
        self._passes = passes
        self._loan: Callable[[], Loan | None] = _none if loan is None else ref(loan)
        self._relies = False  # on the inputs: they are kept, or can be computed
        self._depth = 0  # if it relies on them: the passes that it takes
        self._source: Source | None = None
        self._followers: list[ReferenceType[Value]] = []  # the values that are made of these
        self._asked = 0
        self._remembered: Tensor | None = None
        for value in inputs:
            value._followers.append(ref(self))

    @classmethod
    def kept(cls, tensor: Tensor) -> Value:
        """Return the value of a tensor that is kept from now on."""
        value = cls()
        value._source = Source(tensor)
        return value

    @classmethod
    def computed(cls, compute: Compute) -> Value:
        """Return a value that is computed from what ``compute`` holds itself."""
        value = cls(compute, passes=0)
        value._relies = True
        return value

    @property
    def has_one_user(self) -> bool:
        """Whether the values themselves are kept, and for one holder or value alone."""
        return self._source is not None and self.users == 1

    @property
    def is_known(self) -> bool:
        """Whether the values are kept, or are going to be computed from what is kept."""
        return self._source is not None or self._relies

    def save(self, tensor: Tensor) -> Holder:
        """Return a holder of the values for a node that wants to save ``tensor``, which has them."""
        self.secure(tensor)
        return Holder(self)

    def secure(self, tensor: Tensor | Source) -> None:
        """See to it that the values can be had in the backward pass, at the least cost."""
        own = self.own()
        if own is not None and (own.value is self or not (own.sees_bits or own.value.users == 1)):
            own = None
        if not self.is_known:
            source = tensor if isinstance(tensor, Source) else Source(tensor)
            if self.can_be_had(source.storage[1]) and (own is None or not own.value.has_one_user):
                self._rely_on_inputs()
            else:
                self._keep(source)
        if own is not None:  # it goes by the output from now on, which is there for others, too
            own.take(self)

    def hold(self, source: Source) -> None:
        """Go by the tensor itself, which somebody holds anyway: nothing else need be kept for it."""
        if self._relies:
            self._rely_on_nothing()
            self._keep(source)

    def can_be_had(self, limit: int) -> bool:
        """Whether the values are kept, or can be computed if no more than ``limit`` bytes are kept for that."""
        debts: dict[int, int] = {}
        return self._count_passes(debts) is not None and sum(debts.values()) <= limit

    def _count_passes(self, debts: dict[int, int]) -> int | None:
        """How many passes over the data it takes to have the values; None if they can't be had, or at too many.

        What must be kept for them is written to ``debts``: the storages and their bytes.
        """
        if self._source is not None:
            return 0
        if self._relies:
            return self._depth
        if self._compute is None:
            return None
        loan = self._loan()
        most = 0
        for index, value in enumerate(self._inputs):
            passes = value._count_passes(debts)
            if passes is None and loan is None:
                return None
            if passes is None and loan is not None:
                storage, size = loan[index].storage
                debts[storage] = size
            most = max(most, passes or 0)
        return most + self._passes if most + self._passes <= PASSES else None

    def get(self) -> Tensor:
        """Return the values, detached. They are remembered until all who rely on them have asked.

        Raises:
            RuntimeError: If something that they are computed from was written since; in the words of autograd.
        """
        return self._get()[0]

    def _get(self) -> tuple[Tensor, bool]:
        """Return the values, and whether they may be written: they are new, and nobody else is going to ask."""
        if self._source is not None:
            return self._source.value(), False
        result, is_new = self._remembered, False
        if result is None:
            result, is_new = self._computed()
        self._asked += 1
        if self._asked < self.users and self._passes:  # a view costs nothing, and sees a write
            self._remembered = result
            return result, False
        self._remembered, self._asked = None, 0
        return result, is_new

    def _computed(self) -> tuple[Tensor, bool]:
        """Compute the values, in place if an input may be written. Return them, and whether their storage is new."""
        assert self._compute is not None
        given = [value._get() for value in self._inputs]
        inputs = [tensor for tensor, _ in given]
        with torch.no_grad(), without_torch_function():
            if len(given) == 1 and given[0][1] and getattr(self._compute, "works_in_place", False):
                return self._compute(*inputs, in_place=True), True
            result = self._compute(*inputs)
        return result, bool(self._passes) and all(storage_id(result) != storage_id(tensor) for tensor in inputs)

    def reads(self, storage: int) -> bool:
        """Whether the values are kept in a storage, or computed from what is."""
        if self._source is not None:
            return self._source.storage[0] == storage
        return self._relies and any(value.reads(storage) for value in self._inputs)

    def settle_followers(self) -> None:
        """Keep what is computed from these values, except for what shares their storage: it is written with them."""
        followers, self._followers = self._followers, []
        for reference in followers:
            value = reference()
            if value is None:
                continue
            if value.aliases is not None and value.aliases is self.aliases:
                self._followers.append(reference)
                value._loan = _none
                continue
            if value._relies:
                value._source = Source(value.get())
                value._rely_on_nothing()
            value._compute, value._inputs = None, ()

    def forget(self) -> None:
        """One holder or value less relies on these values. They are not kept if nobody does."""
        self.users -= 1
        self._asked = max(0, self._asked - 1)
        if not self.users:
            self._source = self._remembered = None
            if self._inputs:
                self._rely_on_nothing()

    def _keep(self, source: Source) -> None:
        self._source = source
        followers, self._followers = self._followers, []
        for reference in followers:
            value = reference()
            if value is not None:
                self._followers.append(reference)
                value._reconsider()

    def _reconsider(self) -> None:
        """Compute the values instead of keeping them, now that more of the inputs is kept."""
        source, self._source = self._source, None
        if source is not None and self.users and not self._relies and self.can_be_had(source.storage[1]):
            self._rely_on_inputs()
        else:
            self._source = source

    def _rely_on_inputs(self) -> None:
        loan = self._loan() or ()
        self._depth = self._count_passes({}) or 0
        self._relies = True
        for index, value in enumerate(self._inputs):
            value.users += 1
            if not value.is_known:
                if loan:
                    value.secure(loan[index])  # computes it if it can
                else:
                    value._rely_on_inputs()

    def _rely_on_nothing(self) -> None:
        if self._relies:
            self._relies = False
            for value in self._inputs:
                value.forget()


class Holder:
    """Stands in the autograd graph in the place of a saved tensor."""

    __slots__ = ("__weakref__", "clip", "sees_bits", "value")

    def __init__(self, value: Value) -> None:
        self.value = value
        self.clip: Any = None  # of a function that is clipped: what its node reads of its output
        self.sees_bits = False  # whether it has no more than where the function was clipped
        value.users += 1

    def __call__(self, _: object = None) -> Tensor:
        """Return what the node has saved."""
        return self.value.get()

    def __del__(self) -> None:
        """The node has let go of it."""
        self.value.forget()

    def take(self, value: Value, *, bits: bool = False) -> None:
        """Ask another value from now on."""
        if value is not self.value:
            value.users += 1
            self.value.forget()
            self.value = value
        self.sees_bits = bits


def _none() -> None:
    return None
