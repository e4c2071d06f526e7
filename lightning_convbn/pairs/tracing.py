"""The prover without example inputs: a symbolic trace. It sees all that does not depend on data."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from operator import attrgetter
from typing import Any

from torch import fx, nn
from torch.overrides import TorchFunctionMode

from lightning_convbn.layers.marks import name_of, reads_values
from lightning_convbn.layers.supported_layers import is_norm
from lightning_convbn.pairs import reasons
from lightning_convbn.pairs.data_flow import (
    READER_OF_ATTRIBUTE,
    RETURNED,
    WHOLE_MODEL,
    DataFlow,
    is_leaf,
)
from lightning_convbn.pairs.shadow import Shadow
from lightning_convbn.pairs.side_effects import (
    leaves_in_attributes,
    leaves_of,
    random_states,
    reentrant_checkpoints_reported,
    side_effects_undone,
)
from lightning_convbn.pairs.units import is_fsdp_unit
from lightning_convbn.text import first_line


def trace_data_flow(model: nn.Module) -> DataFlow:
    """Trace a model in its present train or eval state. Where a module can't be traced, trace each of its children.

    The shadow of the model is traced. Warnings that its forward gives because of the proxies are not shown.
    """
    shadow = Shadow(model)
    plain = shadow.restore()
    data_flow = DataFlow.of(plain)
    with warnings.catch_warnings(), side_effects_undone(plain, (), {}):
        warnings.simplefilter("ignore")
        _trace(plain, data_flow, "")
    return data_flow.of_originals(shadow.originals)


class _Tracer(fx.Tracer):
    """Symbolic tracing that stops at every convolution and BatchNorm, also at those of a subclass."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if type(m) is nn.Identity:  # it returns the very tensor that it gets, so the trace goes on through it
            return False
        return is_leaf(m) or super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Trace a module; if that fails and it holds no pair, take it as one operation (a pooling that pads, say).

        FSDP's hooks are not run: at their first call they would make this module the root of all units.
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


class _EagerReads(TorchFunctionMode):
    """Records who reads parameters apart from the input, as a penalty on weights does. The graph does not show it."""

    def __init__(self, data_flow: DataFlow) -> None:
        super().__init__()
        self._data_flow = data_flow

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, kwargs = name_of(func), kwargs or {}
        if reads_values(name):
            for leaf in leaves_of((args, kwargs)):
                self._data_flow.record_read(leaf, f"`{name}`")
        return func(*args, **kwargs)


def _trace(module: nn.Module, data_flow: DataFlow, why: str) -> None:
    """Trace a module, or else its children.

    Args:
        module: The module.
        data_flow: Where to record what is seen.
        why: Why the parent could not be traced; empty for the whole model.
    """
    if is_norm(module):
        data_flow.unseen.setdefault(module, why)
        return
    if not any(is_norm(child) for child in module.modules()):
        return
    try:
        before = random_states()
        with _EagerReads(data_flow), reentrant_checkpoints_reported(_refuse_reentrance):
            graph = _Tracer(param_shapes_constant=True).trace(module, _defaults(module))
        if random_states() != before:  # a proxy draws no numbers: the forward itself does, and may branch on them
            data_flow.untraced.append(data_flow.names[module] or WHOLE_MODEL)
            data_flow.drawing.append(data_flow.untraced[-1])
    except Exception as error:  # a forward that gets proxies instead of tensors may raise anything
        if not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            name = data_flow.names[module] or WHOLE_MODEL
            data_flow.untraced.append(name)
            why = reasons.UNTRACED.format(name=name, cls=type(module).__name__, error=first_line(error))
        for child in module.children():
            _trace(child, data_flow, why)
        return
    for node in graph.nodes:
        if node.op == "call_module":
            _record_call(module, node, data_flow)
        elif node.op == "get_attr":
            tensor = attrgetter(str(node.target))(module)
            for user in node.users:
                if _reads_values(user, node):
                    data_flow.record_read(tensor, _described(user, data_flow.names[module]))
    for name, leaf in leaves_in_attributes(module):
        if isinstance(leaf, fx.Proxy) and leaf.node.op == "call_module":
            used = module.get_submodule(str(leaf.node.target))
            data_flow.users[used].append(READER_OF_ATTRIBUTE.format(name=name))


def _refuse_reentrance(*args: Any) -> None:
    raise RuntimeError("it calls checkpoint(..., use_reentrant=True)")


def _record_call(root: nn.Module, node: fx.Node, data_flow: DataFlow) -> None:
    """Record one call of a module.

    Args:
        root: The module that was traced.
        node: The call.
        data_flow: Where to record it.
    """
    module, name = root.get_submodule(str(node.target)), data_flow.names[root]
    data_flow.calls[module] += 1
    if is_norm(module):
        source = node.all_input_nodes[0]
        data_flow.sources[module].append(
            root.get_submodule(str(source.target)) if source.op == "call_module" else _described(source, name)
        )
    else:
        for user in node.users:
            used_by = root.get_submodule(str(user.target)) if user.op == "call_module" else None
            if used_by is not None and is_norm(used_by):
                data_flow.norms[module].append(used_by)
            elif _reads_values(user, node):
                data_flow.users[module].append(_described(user, name))


def _defaults(module: nn.Module) -> dict[str, object]:
    """Return the defaults of the optional arguments of forward: with a proxy it would take other branches."""
    parameters = inspect.signature(module.forward).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.default is not parameter.empty}


def _reads_values(user: fx.Node, node: fx.Node) -> bool:
    """Whether a user of a convolution's output reads values of it. Folding changes them, but not shape or dtype."""
    if user.op not in ("call_method", "call_function"):
        return True
    name = user.target if isinstance(user.target, str) else name_of(user.target)
    if user.target is getattr:
        name = str(user.args[1])
    return (
        any(reads_values(name, position, len(user.args)) for position, given in enumerate(user.args) if given is node)
        or node not in user.args
    )  # it is in a list, or has a name


def _described(node: fx.Node, root: str) -> str:
    """Return words for what a node is. A function or a method is found in the forward that calls it.

    Args:
        node: The node.
        root: Qualified name of the module that was traced.
    """
    match node.op:
        case "placeholder":
            return f"the argument `{node.target}` of {f'the forward of `{root}`' if root else 'forward'}"
        case "output":
            return RETURNED
        case "get_attr":
            return f"the attribute `{node.target}`"
        case "call_module":
            return f"`{_joined(root, str(node.target))}`"
        case "call_function":
            name = f"`{getattr(node.target, '__name__', node.target)}`"
        case _:
            name = f"`Tensor.{node.target}`"
    modules = node.meta.get("nn_module_stack", {})
    caller = _joined(root, [*modules.values()][-1][0] if modules else "")
    return f"{name} in the forward of `{caller}`" if caller else name


def _joined(root: str, name: str) -> str:
    return f"{root}.{name}".strip(".")
