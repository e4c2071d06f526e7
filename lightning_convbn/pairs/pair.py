"""`ConvBNPairs`: the pairs of a model, and what happens to every BatchNorm that is in none."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, overload


class ConvBNPair(NamedTuple):
    """A convolution and the BatchNorm behind it, by qualified name. Nothing else uses the convolution's output."""

    conv: str
    bn: str


class ConvBNPairs(Sequence[ConvBNPair]):
    """The pairs of a model, in the order of its BatchNorms, and a reason for every BatchNorm that is in no pair.

    A BatchNorm of a pair is folded. Every other one is frozen, or unfrozen: then it keeps running as it was found.
    ``print`` shows all of them in a table.

    Attributes:
        unpaired: The BatchNorms that are in no pair: qualified name -> why it is not folded.
        unfrozen: Those of ``unpaired`` that are not frozen either.
        unfused: Those BatchNorms of pairs that a Deploy copy keeps: qualified name -> why.
        untraced: Modules that could not be traced. A pair inside of them is proven by the forward of their children,
            and not by how they call these children.
    """

    def __init__(
        self,
        pairs: Iterable[ConvBNPair],
        unpaired: Mapping[str, str] | None = None,
        unfrozen: Iterable[str] = (),
        untraced: Iterable[str] = (),
        unfused: Mapping[str, str] | None = None,
    ) -> None:
        self._pairs = tuple(ConvBNPair(*pair) for pair in pairs)
        self.unpaired = dict(unpaired or {})
        self.unfrozen = frozenset(unfrozen)
        self.untraced = frozenset(untraced)
        self.unfused = {pair.bn: unfused[pair.bn] for pair in self._pairs if unfused and pair.bn in unfused}

    @overload
    def __getitem__(self, index: int) -> ConvBNPair: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[ConvBNPair, ...]: ...
    def __getitem__(self, index: int | slice) -> ConvBNPair | tuple[ConvBNPair, ...]:
        """Return the pair at ``index``."""
        return self._pairs[index]

    def __len__(self) -> int:
        """Count the pairs."""
        return len(self._pairs)

    def __eq__(self, other: object) -> bool:
        """Compare the pairs, the reasons, and which BatchNorms are unfrozen."""
        if not isinstance(other, ConvBNPairs):
            return NotImplemented
        compared = ("_pairs", "unpaired", "unfrozen")
        return all(getattr(self, name) == getattr(other, name) for name in compared)

    __hash__ = None  # type: ignore[assignment]

    def unfuse(self, reasons: Mapping[str, str]) -> ConvBNPairs:
        """Return the same pairs, of which a Deploy copy keeps some more.

        Args:
            reasons: Qualified name of a BatchNorm -> why. Names that are in no pair do not matter.
        """
        unfused = {**reasons, **self.unfused}
        return ConvBNPairs(self._pairs, self.unpaired, self.unfrozen, self.untraced, unfused)

    @property
    def frozen(self) -> dict[str, str]:
        """The BatchNorms that are frozen but not folded: qualified name -> why."""
        return {bn: reason for bn, reason in self.unpaired.items() if bn not in self.unfrozen}

    def unfold(self, bns: Mapping[str, str]) -> ConvBNPairs:
        """Return these pairs without those of some BatchNorms, which stay frozen.

        Args:
            bns: The BatchNorms: qualified name -> why.
        """
        return ConvBNPairs(
            [pair for pair in self if pair.bn not in bns],
            {**self.unpaired, **bns},
            self.unfrozen - bns.keys(),
            self.untraced,
            self.unfused,
        )

    def unfreeze(self, bns: Mapping[str, str]) -> ConvBNPairs:
        """Return these pairs without those of some BatchNorms, which are not frozen either.

        Args:
            bns: The BatchNorms: qualified name -> why.
        """
        pairs = self.unfold(bns)
        unfrozen = self.unfrozen | bns.keys()
        return ConvBNPairs(pairs, pairs.unpaired, unfrozen, pairs.untraced, pairs.unfused)

    def count_by_reason(self) -> dict[str, int]:
        """Count the BatchNorms in no pair by reason. Reasons that differ only in a qualified name count as one."""
        return {reason: len(names) for reason, names in grouped(self.unpaired).items()}

    def summary(self, word: str = "folded") -> list[str]:
        """Describe in a few lines what happens to the BatchNorms; those with the same reason share a line.

        Args:
            word: What the first line calls those of the pairs: in Eval mode none of them is folded.
        """
        total = len(self) + len(self.unpaired)
        unfrozen = {bn: reason for bn, reason in self.unpaired.items() if bn in self.unfrozen}
        lines = [f"{word:<11} {len(self):>4} of {total} BatchNorms"]
        for state, bns in (("frozen", self.frozen), ("unfrozen", unfrozen)):
            lines.append(f"{state:<11} {len(bns):>4}")
            lines += [f"  {len(names):>4} × {reason}: {abbreviated(names)}" for reason, names in grouped(bns).items()]
        return lines

    def __str__(self) -> str:
        """Return a table with a row for each BatchNorm."""
        rows = [("state", "BatchNorm", "how or why")]
        rows += [("folded", pair.bn, f"into {pair.conv}") for pair in self]
        rows += [("unfrozen" if bn in self.unfrozen else "frozen", bn, why) for bn, why in self.unpaired.items()]
        state, name = (max(len(row[column]) for row in rows) for column in (0, 1))
        return "\n".join(f"{row[0]:<{state}}  {row[1]:<{name}}  {row[2]}" for row in rows)

    def __repr__(self) -> str:
        """Return the pairs, the reasons, and which BatchNorms are unfrozen."""
        return f"ConvBNPairs({list(self._pairs)!r}, unpaired={self.unpaired!r}, unfrozen={sorted(self.unfrozen)!r})"


# Of a module, not of a method. What calls a function is a module, too.
_QUALIFIED_NAME = re.compile(r"(?<=in the forward of )`[^`]+`|`(?!Tensor\.)[^`]+\.[^`]+`")


def grouped(bns: Mapping[str, str]) -> dict[str, list[str]]:
    """Group names by their reason. Reasons that differ only in a qualified name count as one."""
    groups: dict[str, list[str]] = defaultdict(list)
    for bn, reason in bns.items():
        groups[_QUALIFIED_NAME.sub("…", reason)].append(bn)
    return groups


def abbreviated(names: Sequence[str], most: int = 3) -> str:
    """Name the first few."""
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")
