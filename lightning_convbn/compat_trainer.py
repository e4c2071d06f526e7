"""The private names of PyTorch and Lightning that ``pairs/`` and ``trainer/`` use, all in one place.

Each has a note: the private name, why we need it, what breaks if it goes, and since which version it is there.
"""

from __future__ import annotations

from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["HOLDERS_OF_THE_TRAINER", "TorchDispatchMode", "has_forward_hooks", "outside_fake_mode", "without_compile"]

# TorchDispatchMode
#   Private: the module ``torch.utils._python_dispatch``. PyTorch's notes on extending it import the class from there.
#   Why: it sees the operators that a scripted function calls. `TorchFunctionMode`, which is public, does not.
#   What breaks: `pairs/recording.py` can't record a forward pass.
#   Since: PyTorch 1.12.

outside_fake_mode = unset_fake_temporarily
"""Context manager in which tensors are real, although a ``FakeTensorMode`` is active around it.

Private: ``torch._subclasses.fake_tensor.unset_fake_temporarily``.
Why: buffers are copied before a forward pass on fake tensors. The copies must hold the real values.
What breaks: counting memory on fake tensors. The buffers could not be put back after it.
Since: PyTorch 2.3.
"""

HOLDERS_OF_THE_TRAINER = frozenset({"_trainer", "_fabric"})
"""Attributes in which a LightningModule holds its Trainer or its Fabric.

Private: ``LightningModule._trainer`` and ``LightningModule._fabric``.
Why: a search through a module's attributes must not go on through the whole Trainer.
What breaks if they get other names: nothing is wrong, but the search is slow and may find tensors of the Trainer.
Since: Lightning 2.0.
"""


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether a module has a hook that sees its output.

    Private: ``Module._forward_hooks``. There is no public way to list hooks.
    Why: a hook on a folded layer sees other values than in Eval mode, and the callback warns of it.
    What breaks: that warning.
    Since: PyTorch 0.1.
    """
    return bool(module._forward_hooks)


def has_forward_pre_hooks(module: nn.Module) -> bool:
    """Whether a module has a hook that sees its input.

    Private: ``Module._forward_pre_hooks``; see `has_forward_hooks`.
    """
    return bool(module._forward_pre_hooks)


def without_compile(module: nn.Module) -> nn.Module:
    """Return the module that ``torch.compile`` has wrapped; any other module as it is.

    Private: the class ``torch._dynamo.OptimizedModule``. It is known by its name, so that it need not be imported.
    Its one child is the wrapped module.
    Why: parameters and classes are changed in the wrapped module, and names have no prefix ``_orig_mod``.
    What breaks: the names in the callback's messages, and the export at the end of a fit.
    Since: PyTorch 2.0.
    """
    if any(cls.__name__ == "OptimizedModule" for cls in type(module).__mro__):
        return next(module.children())
    return module
