"""The result of counting, and how a number of bytes is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

MIB = 2**20


def as_mib(size: int) -> str:
    """Write a number of bytes in MiB. Sizes below one MiB get more digits.

    Example:
        >>> as_mib(3 * 2**20), as_mib(2**10)
        ('3.0 MiB', '0.001 MiB')
    """
    return f"{size / MIB:.1f} MiB" if size >= MIB else f"{size / MIB:.3f} MiB"


@dataclass(frozen=True)
class MemoryUse:
    """The result of `measure_memory`. All sizes are in bytes, beyond parameters and buffers.

    Attributes:
        saved_bytes: Kept: what one forward pass keeps for the backward pass.
        peak_bytes: Peak: the most that is alive at once in a step: forward pass, backward pass of the sum of the
            outputs, the inputs and the gradients, and the optimizer, if one was named. It is counted, on every device.
            None if the backward pass of that sum fails.
        peak_allocated_bytes: On CUDA, the most bytes that the allocator has given out at once in a forward and a
            backward pass, without an optimizer. Bytes that were allocated before do not count. None on other devices,
            and if nothing was run.
        saved_by_module: Qualified name of a module -> the bytes of ``saved_bytes`` that were allocated while it was the
            innermost running module. The name is ``""`` for the model's own forward and ``"(input)"`` for the inputs.
    """

    saved_bytes: int
    peak_bytes: int | None = None
    peak_allocated_bytes: int | None = None
    saved_by_module: Mapping[str, int] = field(default_factory=dict, repr=False, hash=False)

    @property
    def saved_mib(self) -> float:
        """``saved_bytes`` in MiB."""
        return self.saved_bytes / MIB

    @property
    def peak_mib(self) -> float | None:
        """``peak_bytes`` in MiB."""
        return None if self.peak_bytes is None else self.peak_bytes / MIB
