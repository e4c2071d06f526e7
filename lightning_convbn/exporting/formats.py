"""The file formats of a Deploy copy: how each is written and read, and what it needs.

`FORMATS` at the end has one row for each suffix. A new format is a new row with a function to write and one to read.
"""

from __future__ import annotations

import inspect
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_convbn.compat import tree_leaves, tree_map

Inputs = tuple[Any, ...]


@dataclass(frozen=True)
class Format:
    """How files of one suffix are written and read.

    Attributes:
        write: Returns the bytes of the file. It gets the Deploy copy, example arguments of its forward, and whether the
            batch size is dynamic. The file is made in memory, because torch ends the whole process if the disk is full
            while it writes a file itself.
        read: Returns a callable that computes what the file says. It gets the file and the Deploy copy, because a file
            that only has weights needs modules to load them into.
        captures: Whether the file holds the computation, not only the weights.
        packages: The packages that must be installed.
        dtypes: Dtypes of parameters for which the file can be checked. Empty for all.
        most_bytes: The largest size of a file.
    """

    write: Callable[[nn.Module, Inputs, bool], bytes]
    read: Callable[[Path, nn.Module], Callable[..., Any]]
    captures: bool = False
    packages: tuple[str, ...] = ()
    dtypes: frozenset[torch.dtype] = frozenset()
    most_bytes: float = float("inf")


def _captured(model: nn.Module, example: Inputs, dynamic_batch: bool) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch")

    def shape(leaf: Any) -> dict[int, Any] | None:
        return {0: batch} if dynamic_batch and isinstance(leaf, Tensor) and leaf.dim() else None

    arguments = inspect.signature(model.forward).bind(*example).arguments
    try:
        return torch.export.export(model, example, dynamic_shapes=tree_map(shape, dict(arguments)), strict=False)
    except Exception as error:  # the model's forward and the tracer of torch may raise anything
        fix = "; try dynamic_batch=False" if dynamic_batch else ""
        raise RuntimeError(f"model: torch.export can't capture {type(model).__name__}{fix}: {error}") from error


def to_onnx(model: nn.Module, example: Inputs, dynamic_batch: bool) -> bytes:
    """Return the bytes of an ONNX file of any model. It has no external data, and no paths of this machine."""
    program = torch.onnx.export(_captured(model, example, dynamic_batch), dynamo=True, verbose=False)
    assert program is not None
    proto = program.model_proto
    for node in proto.graph.node:  # the exporter adds stack traces, and they have paths of this machine
        kept = [entry for entry in node.metadata_props if not entry.key.endswith("stack_trace")]
        del node.metadata_props[:]
        node.metadata_props.extend(kept)
    shapes = [value.type.tensor_type.shape for value in (*proto.graph.input, *proto.graph.output)]
    symbols = {dim.dim_param for shape in shapes for dim in shape.dim[:1]} - {""}
    for dim in (dim for shape in shapes for dim in shape.dim):
        if len(symbols) == 1 and dim.dim_param in symbols:
            dim.dim_param = "batch"
    whole: bytes = proto.SerializeToString()
    return whole


def _read_onnx(file: Path, model: nn.Module) -> Callable[..., Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # warnings are only about speed
    session = onnxruntime.InferenceSession(file.read_bytes(), options, providers=["CPUExecutionProvider"])

    def run(*inputs: Any) -> list[Tensor]:
        tensors = [leaf.numpy() for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
        named = {argument.name: tensor for argument, tensor in zip(session.get_inputs(), tensors, strict=True)}
        return [torch.from_numpy(output) for output in session.run(None, named)]

    return run


def _to_pt2(model: nn.Module, example: Inputs, dynamic_batch: bool) -> bytes:
    file = io.BytesIO()
    torch.export.save(_captured(model, example, dynamic_batch), file)
    return file.getvalue()


def _read_pt2(file: Path, model: nn.Module) -> Callable[..., Any]:
    module: nn.Module = torch.export.load(file).module()
    return module


def _to_pt(model: nn.Module, example: Inputs, dynamic_batch: bool) -> bytes:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.getvalue()


def _read_pt(file: Path, model: nn.Module) -> Callable[..., Any]:
    return _with_weights(model, torch.load(file, weights_only=True))


def _to_safetensors(model: nn.Module, example: Inputs, dynamic_batch: bool) -> bytes:
    from safetensors.torch import save

    # The format can't share tensors. So a tied weight is written once for each of its names.
    state = model.state_dict()
    return save({name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.items()})


def _read_safetensors(file: Path, model: nn.Module) -> Callable[..., Any]:
    from safetensors.torch import load_file

    return _with_weights(model, load_file(file))


def _with_weights(model: nn.Module, state: Mapping[str, Any]) -> nn.Module:
    for tensor in model.state_dict().values():
        if isinstance(tensor, Tensor):
            tensor.zero_()  # so the comparison fails if the file lacks a tensor
    model.load_state_dict(state)
    return model


FORMATS = {
    ".onnx": Format(
        to_onnx,
        _read_onnx,
        captures=True,
        packages=("onnx", "onnxscript", "onnxruntime"),
        dtypes=frozenset({torch.float32, torch.float16}),
        most_bytes=2**31,  # the limit of one protocol buffer
    ),
    ".pt2": Format(_to_pt2, _read_pt2, captures=True),
    ".pt": Format(_to_pt, _read_pt),
    ".safetensors": Format(_to_safetensors, _read_safetensors, packages=("safetensors",)),
}
