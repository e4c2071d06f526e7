"""Deploy mode for good: a standalone copy of a model with every paired BatchNorm folded away, and its files."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_convbn.exporting.checked_file import check_model, check_path, checked_inputs, write_proven
from lightning_convbn.layers.layers import affine_of, norm_layer
from lightning_convbn.modes import set_mode
from lightning_convbn.ops.fold import fold_conv_bn
from lightning_convbn.pairs import reasons
from lightning_convbn.pairs.find import find_conv_bn_pairs, pairs_in_force
from lightning_convbn.pairs.pair import ConvBNPair, ConvBNPairs
from lightning_convbn.pairs.side_effects import leaves_in_attributes

# What runs a model in another way without changing what it computes -> its attribute that holds the model.
WRAPPERS = {
    "OptimizedModule": "_orig_mod",
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "_FabricModule": "_original_module",
}


def fuse_for_deploy(model: nn.Module, *, pairs: ConvBNPairs | None = None) -> nn.Module:
    """Return a copy of a model, in eval state, whose paired BatchNorms are folded into their convolutions for good.

    The copy consists of plain layers: convolutions with a bias, and ``nn.Identity`` where a BatchNorm was folded; it
    loads and runs with torch and the library that the model comes from. A parameter of the copy wants a gradient if one
    of those it was made of does. What wraps the model or parts of it (``torch.compile``, DDP, ``DataParallel``, Fabric)
    is left out of the copy. The original is not touched, whatever mode it is in.

    Args:
        model: Any module, plain or converted by `set_mode`; neither TorchScript nor sharded.
        pairs: What to fold; None for what `find_conv_bn_pairs` finds in the eval state, in a converted model without
            what is not in force there.

    Raises:
        ValueError: If the model can't be copied, if ``pairs`` does not fit it, or if a convolution has no weight of its
            own (weight_norm).

    Source: "Deploy mode" of arXiv 2305.11624, section 2.

    Example:
        >>> from torch import nn
        >>> fuse_for_deploy(nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)))
        Sequential(
          (0): Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
          (1): Identity()
        )
    """
    copied = plain_copy(model)
    fused = copied.model
    pairs = copied.find_pairs() if pairs is None else copied.renamed(pairs)
    if len(pairs):
        with torch.no_grad():
            set_mode(fused, "eval", pairs=pairs)  # checks the pairs
            set_mode(fused, "train", pairs=pairs)
            for pair in pairs:
                _fold_for_good(fused, pair)
    return fused


def export(
    model: nn.Module,
    path: str | PathLike[str],
    example_inputs: Sequence[Any],
    *,
    dynamic_batch: bool = True,
) -> Path:
    """Write the Deploy copy of a model to a file that is proven to compute what the model computes in Eval mode.

    The suffix names the format: ``.onnx``, ``.pt2`` (``torch.export``), ``.pt`` (a state dict that loads with
    ``weights_only=True``) or ``.safetensors``. What was written is read back, an ONNX file by onnxruntime, and compared
    with the model in Eval mode on random inputs that resemble the examples. Only then does the file get its name: an
    existing file is replaced by a whole and proven one or not at all. All of this happens on the CPU. The model, its
    device, mode and flags and the random states stay as they are.

    Args:
        model: Any module that `fuse_for_deploy` takes.
        path: The file, in a folder that exists.
        example_inputs: Positional arguments of the model's forward. They give the shapes, and pairs are proven by
            running them, too; their values are not written.
        dynamic_batch: Let ``.onnx`` and ``.pt2`` files take any batch size: any first dimension of the tensors in
            ``example_inputs``. The files are compared on several sizes, one of them 1.

    Returns:
        The path.

    Raises:
        ValueError: If an argument can't be used; nothing was written.
        ImportError: If a package that the format needs is not installed; nothing was written.
        RuntimeError: If the model can't be captured, or if what was written deviates; no file is left.
        OSError: If the file can't be written; an existing one is intact.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export(model, f"{folder}/model.pt", (torch.randn(2, 3, 8, 8),)).name
        'model.pt'
    """
    path = Path(path)
    check_path("path", path)
    inputs = checked_inputs(example_inputs, dynamic_batch=dynamic_batch)
    _check_whole(model)
    check_model(model, path)
    copied = plain_copy(model)
    copied.model.cpu()
    fused = fuse_for_deploy(copied.model, pairs=copied.find_pairs(inputs))
    return write_proven(fused, copied.model, path, inputs, dynamic_batch=dynamic_batch)


@dataclass(frozen=True)
class PlainCopy:
    """A copy of a model in eval state without conversion and wrappers.

    Attributes:
        model: The copy.
        names: Qualified name of a module in the original -> its name in the copy.
        in_force: The pairs that the original was converted with, as named in the copy; None for a plain original.
    """

    model: nn.Module
    names: Mapping[str, str]
    in_force: ConvBNPairs | None

    def renamed(self, pairs: ConvBNPairs) -> ConvBNPairs:
        """Return pairs of the original as they are named in the copy."""
        return _renamed(pairs, self.names)

    def load_state_dict(self, state: Mapping[str, Any], *, strict: bool) -> None:
        """Load weights of the original, with the names that they have there."""
        split = {key: key.rpartition(".") for key in state}
        parents = {key: self.names.get(parent, parent) for key, (parent, _, _) in split.items()}
        renamed = {f"{parents[key]}.{split[key][2]}".lstrip("."): value for key, value in state.items()}
        self.model.load_state_dict(renamed, strict=strict)

    def find_pairs(self, example_inputs: Sequence[Any] | None = None) -> ConvBNPairs:
        """Find the pairs of the copy: those proven in its eval state, if the original was converted also in force."""
        pairs = find_conv_bn_pairs(self.model, example_inputs=example_inputs)
        if self.in_force is None:
            return pairs
        return pairs.unfold({pair.bn: reasons.NOT_GIVEN for pair in pairs if pair not in self.in_force})


def plain_copy(model: nn.Module) -> PlainCopy:
    """Copy a model, in whatever mode and wrapping, to its plain modules in eval state.

    Raises:
        ValueError: If the model is no module, TorchScript or sharded.
    """
    _check_whole(model)
    # A tensor that a forward left behind in an attribute, with its graph, can't be copied: its values can.
    copies: dict[int, Any] = {
        id(leaf): leaf.detach().clone()
        for _, leaf in leaves_in_attributes(model)
        if isinstance(leaf, Tensor) and leaf.grad_fn is not None
    }
    # A compiled LightningModule holds its steps compiled, bound to itself and not to the copy.
    compiled = {name: ctx for name, module in model.named_modules() if (ctx := module.__dict__.get("_compiler_ctx"))}
    copies |= {id(ctx): None for ctx in compiled.values()}
    try:
        for module in reversed([*model.modules()]):  # inner wrappers first
            inside = WRAPPERS.get(type(module).__name__)
            if inside is not None:
                copies[id(module)] = copy.deepcopy(getattr(module, inside), copies)
        copied: nn.Module = copy.deepcopy(model, copies)
    except TypeError as error:  # of a lock, a file, a generator in an attribute
        raise ValueError(
            f"model: {type(model).__name__} can't be copied: {error}; take what can't be out of its attributes"
        ) from error
    for name, ctx in compiled.items():
        for original in ctx:
            copied.get_submodule(name).__dict__.pop(original.removeprefix("original_"), None)
    in_copy = {id(module): name for name, module in copied.named_modules()}
    names = {
        name: in_copy[id(copies[id(module)])]
        for name, module in model.named_modules()
        if id(copies.get(id(module))) in in_copy
    }
    in_force = pairs_in_force(model)
    set_mode(copied, "train", pairs=ConvBNPairs([]))
    return PlainCopy(copied.eval(), names, None if in_force is None else _renamed(in_force, names))


def _check_whole(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    for name, module in model.named_modules():
        where = f"model: `{name or type(module).__name__}`"
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(f"{where} is TorchScript, whose code can't be changed; give the model before scripting")
        tensors = {type(parameter).__name__ for parameter in module.parameters(recurse=False)}
        if type(module).__name__ == "FullyShardedDataParallel" or tensors & {"DTensor", "FlatParameter"}:
            raise ValueError(
                f"{where} is sharded over processes; give a plain model with weights from a consolidated checkpoint"
            )


def _renamed(pairs: ConvBNPairs, names: Mapping[str, str]) -> ConvBNPairs:
    def new(name: str) -> str:
        return names.get(name, name)

    return ConvBNPairs(
        [ConvBNPair(new(pair.conv), new(pair.bn)) for pair in pairs],
        {new(bn): reason for bn, reason in pairs.unpaired.items()},
        map(new, pairs.unfrozen),
        map(new, pairs.flattened),
    )


def _fold_for_good(model: nn.Module, pair: ConvBNPair) -> None:
    conv, bn = cast(nn.Conv2d, model.get_submodule(pair.conv)), model.get_submodule(pair.bn)
    if "weight" not in conv._parameters:
        raise ValueError(
            f"model: `{pair.conv}` computes its weight anew in every forward (weight_norm, spectral_norm, pruning); "
            "make it permanent first, by torch.nn.utils.remove_weight_norm, remove_spectral_norm or prune.remove"
        )
    affine = affine_of(bn)
    weight, bias = fold_conv_bn(
        conv.weight,
        conv.bias,
        *affine,
        transposed=bool(getattr(conv, "transposed", False)),
        groups=int(getattr(conv, "groups", 1)),
    )
    gamma, beta = affine.weight, affine.bias
    of_weight = any(tensor is not None and tensor.requires_grad for tensor in (conv.weight, gamma))
    of_bias = any(tensor is not None and tensor.requires_grad for tensor in (conv.bias, gamma, beta))
    conv.weight = nn.Parameter(weight, requires_grad=of_weight)
    conv.bias = nn.Parameter(bias, requires_grad=of_bias or of_weight)
    row = norm_layer(bn)
    assert row is not None
    kept = [child for name in row.runs_after if isinstance(child := getattr(bn, name, None), nn.Module)]
    kept = [child for child in kept if not isinstance(child, nn.Identity)]
    rest: nn.Module = nn.Identity() if not kept else kept[0] if len(kept) == 1 else nn.Sequential(*kept)
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module is bn:
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, rest.eval())
