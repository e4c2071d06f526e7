"""Reads a checkpoint without running code that it carries."""

from __future__ import annotations

import pickle
import re
import warnings
from os import PathLike
from typing import IO, Any

import torch

_TYPE = re.compile(r"GLOBAL ([\w.]+)")  # how PyTorch names what it refuses to unpickle


def load_only_weights(file: str | PathLike[str] | IO[bytes], name: str) -> Any:
    """Unpickle tensors and plain values on the CPU, and nothing else.

    A pickle may carry a command, which runs when it is unpickled. PyTorch refuses each type that is not known to be
    harmless. We ask it to on every version, because the default depends on the versions of PyTorch and Lightning.

    Args:
        file: The checkpoint.
        name: What to call it in an error.

    Raises:
        ValueError: If the checkpoint holds another type. The text names the type.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an old pickle protocol
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = _TYPE.search(str(error))
        what = f"a `{found[1]}`" if found else "something that PyTorch does not know"
        raise ValueError(
            f"{name} holds {what}; only weights and plain values are loaded, because unpickling can run any code"
        ) from error
