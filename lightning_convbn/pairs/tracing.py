"""The first prover: symbolic tracing, which needs no data and sees every path that does not depend on data."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx, nn

from lightning_convbn.layers.activations import RecomputedActivation
from lightning_convbn.layers.swap import class_name, plain_class
from lightning_convbn.layers.table import is_norm
from lightning_convbn.pairs import reasons
from lightning_convbn.pairs.data_flow import DataFlow, is_leaf
from lightning_convbn.pairs.fsdp import is_fsdp_unit
from lightning_convbn.pairs.side_effects import stashed, traced_quietly
from lightning_convbn.text import first_line

METADATA = ("shape", "ndim", "dtype", "device")  # what folding leaves unchanged in a convolution's output


def trace_data_flow(model: nn.Module) -> DataFlow:
    """Trace a model in the train or eval state that it is in; where a module does not trace, trace its children."""
    flow = DataFlow({module: name for name, module in model.named_modules()})
    with traced_quietly(model):
        _trace(model, flow, "")
    return flow


class _Tracer(fx.Tracer):
    """Symbolic tracing that stops at every convolution and BatchNorm, of whatever subclass."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # An Identity is looked through: what it returns is the very tensor that it was given.
        # An activation that is swapped is described as it was found.
        swapped = isinstance(m, RecomputedActivation) and plain_class(m).__module__.startswith("torch.nn")
        known = swapped or is_leaf(m)
        return known or (type(m) is not nn.Identity and super().is_leaf_module(m, module_qualified_name))

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Take a module that does not trace for a whole if there is nothing to find in it, as a pooling that pads.

        FSDP's hooks are passed by: at their first call they would make the module the root of all units.
        """
        stack = self.module_stack.copy()
        forward = m.forward if is_fsdp_unit(m) else forward
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            if any(is_leaf(child) for child in m.modules()):
                raise
            self.module_stack = stack
            return self.create_proxy("call_module", self.path_of_module(m), args, kwargs)


def _trace(module: nn.Module, flow: DataFlow, why: str) -> None:
    if is_norm(module):
        flow.unseen.setdefault(module, why)
        return
    if not any(is_norm(child) for child in module.modules()):
        return
    try:
        graph = _Tracer(param_shapes_constant=True).trace(module, _defaults(module))
    except Exception as error:  # a user's forward may raise anything when it is given proxies
        if not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            name = flow.names[module] or "the model"
            flow.untraced.append(name)
            why = reasons.UNTRACED.format(name=name, cls=class_name(module), error=first_line(error))
        for child in module.children():
            _trace(child, flow, why)
        return
    for node in graph.nodes:
        if node.op == "call_module":
            _take_down(module, node, flow)
    for name, leaf in stashed(module):
        if isinstance(leaf, fx.Proxy) and leaf.node.op == "call_module":
            flow.users[module.get_submodule(str(leaf.node.target))].append(f"whoever reads the attribute `{name}`")


def _take_down(region: nn.Module, node: fx.Node, flow: DataFlow) -> None:
    """Note one call of a module in a traced region."""
    module = region.get_submodule(str(node.target))
    flow.calls[module] += 1
    if is_norm(module):
        source = node.all_input_nodes[0]
        linear = _flattened_linear(region, source)
        if linear is not None:
            source = linear
            flow.flattened.add(module)
        flow.sources[module].append(
            region.get_submodule(str(source.target)) if source.op == "call_module" else _described(source)
        )
    else:
        for user in _consumers(region, node):
            consumer = region.get_submodule(str(user.target)) if user.op == "call_module" else None
            if consumer is not None and is_norm(consumer):
                flow.norms[module].append(consumer)
            elif _reads_values(user, node):
                flow.users[module].append(_described(user))


def _consumers(region: nn.Module, node: fx.Node) -> Iterator[fx.Node]:
    """Who uses the output of a call; instead of a flattening that is looked through, who uses what is flattened."""
    for user in node.users:
        if _flattened_linear(region, user) is node:
            yield from user.users
        else:
            yield user


def _flattened_linear(region: nn.Module, node: fx.Node) -> fx.Node | None:
    """Look through ``linear(x).flatten(0, 1)``, which gives a BatchNorm1d the rows of a sequence (LeViT)."""
    if node.target not in ("flatten", torch.flatten) or node.args[1:] != (0, 1) or node.kwargs:
        return None
    source = node.args[0]
    if not isinstance(source, fx.Node) or source.op != "call_module":
        return None
    return source if isinstance(region.get_submodule(str(source.target)), nn.Linear) else None


def _defaults(module: nn.Module) -> dict[str, object]:
    """Trace with optional arguments at their defaults: a proxy in their place would choose other branches."""
    parameters = inspect.signature(module.forward).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.default is not parameter.empty}


def _reads_values(user: fx.Node, node: fx.Node) -> bool:
    """Whether a consumer reads more of a tensor than folding leaves unchanged."""
    if user.op == "call_method":
        return user.target not in ("size", "dim", "ndimension") and not (
            user.target in ("reshape_as", "view_as", "expand_as") and user.args[0] is not node
        )
    return not (user.op == "call_function" and user.target is getattr and user.args[1] in METADATA)


def _described(node: fx.Node) -> str:
    match node.op:
        case "placeholder":
            return f"the argument `{node.target}` of forward"
        case "output":
            return "the caller, as it is returned"
        case "get_attr":
            return f"the attribute `{node.target}`"
        case "call_function":
            return f"`{getattr(node.target, '__name__', node.target)}`"
        case _:
            return f"`{node.target}`"
