"""How PyTorch computes in the tests, in this process and in those that the tests start.

Two variables let the whole suite run in other ways, so that no bound is right by the luck of one kernel:
``CONVBN_TEST_THREADS`` (1 by default) and ``CONVBN_TEST_ONEDNN`` (1 by default, 0 for off). PyTorch itself reads
``ATEN_CPU_CAPABILITY`` (default, avx2 or avx512).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def apply_torch_settings() -> None:
    """Set the number of threads, and switch oneDNN off if told to."""
    # The tests' tensors are tiny: a second thread costs more than it gives, above all on a busy machine.
    torch.set_num_threads(int(os.environ.get("CONVBN_TEST_THREADS", "1")))
    if os.environ.get("CONVBN_TEST_ONEDNN") == "0":
        torch.backends.mkldnn.set_flags(False)


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute in one thread, where bits are compared. In several, PyTorch's sums do not repeat their own bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
