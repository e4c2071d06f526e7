"""The prover with example inputs: the data flow of one real forward pass. It also sees what can't be traced.

Hooks watch the convolutions and BatchNorms. A torch function mode watches all that runs between them. Each output of a
convolution is followed by its identity: a function that gets this tensor as an argument uses it.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_convbn.compat import TorchDispatchMode
from lightning_convbn.layers.marks import name_of, reads_values
from lightning_convbn.layers.supported_layers import is_norm
from lightning_convbn.pairs.data_flow import (
    PUT_INTO_ARGUMENT,
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
    tensors_of,
)


def record_data_flow(model: nn.Module, inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> DataFlow:
    """Run one forward pass of the model's shadow, without gradients, and record its data flow.

    Args:
        model: Any module, plain or converted. Only where its tensors go matters, not their values.
        inputs: Positional arguments of its forward.
        kwargs: Keyword arguments of its forward.
    """
    shadow = Shadow(model)
    plain = shadow.restore()
    inputs, kwargs = shadow.inputs(inputs, kwargs)
    data_flow = DataFlow.of(plain)
    recorder = _Recorder(data_flow)
    with torch.no_grad(), side_effects_undone(plain, inputs, kwargs):
        reporting = reentrant_checkpoints_reported(recorder.record_reentrance)
        with warnings.catch_warnings(), reporting, recorder.watching(plain), recorder, _OperatorRecorder(recorder):
            warnings.simplefilter("ignore")  # the real pass gives its warnings itself
            before = random_states()
            with shadow.running():
                output = plain.forward(*inputs, **kwargs)
        if not model.training and random_states() != before:  # in training a dropout draws, in eval who branches by it
            data_flow.drawing.append(WHOLE_MODEL)
        for leaf in leaves_of(output):
            recorder.record_use(leaf, RETURNED)
        for leaf in leaves_of((inputs, kwargs)):
            recorder.record_use(leaf, PUT_INTO_ARGUMENT)
        for name, leaf in leaves_in_attributes(plain):
            recorder.record_use(leaf, READER_OF_ATTRIBUTE.format(name=name))
    return data_flow.of_originals(shadow.originals)


class _Recorder(TorchFunctionMode):
    """Records the calls of convolutions and BatchNorms, and each torch function between them."""

    def __init__(self, data_flow: DataFlow) -> None:
        super().__init__()
        self._data_flow = data_flow
        # Tensor id -> the tensor and the convolution that computed it. The tensor is held, so its id stays its own.
        self._outputs: dict[int, tuple[Tensor, nn.Module]] = {}
        self._makers: dict[int, tuple[weakref.ref[Tensor], str]] = {}  # tensor id -> words for what computed it
        self._depth = 0  # how many watched modules are running, one inside the other

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Add hooks to every convolution and BatchNorm of a model."""
        with ExitStack() as stack:
            for module in model.modules():
                if is_leaf(module):
                    before = module.register_forward_pre_hook(self._enter, prepend=True, with_kwargs=True)
                    after = module.register_forward_hook(self._leave, always_call=True)
                    stack.callback(before.remove)
                    stack.callback(after.remove)
            yield

    def record_use(self, value: Any, user: str) -> None:
        """Record a use of a convolution's output, parameter or buffer, if it is not used inside a watched module."""
        if self._depth == 0:
            self._data_flow.record_read(value, user)
        conv = self._source(value) if isinstance(value, Tensor) and self._depth == 0 else None
        if conv is not None:
            self._data_flow.users[conv].append(user)

    def record_reentrance(self, *args: Any) -> None:
        """Record that a reentrant checkpoint uses what it is given."""
        for leaf in leaves_of(args):
            self.record_use(leaf, "`checkpoint` with use_reentrant=True")

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._depth == 0:
            self._data_flow.calls[module] += 1
            given = tensors_of((args, kwargs))
            if is_norm(module):
                self._record_norm(module, given)
            else:
                for tensor in given:
                    self.record_use(tensor, f"`{self._data_flow.names[module]}`")
        self._depth += 1

    def _record_norm(self, bn: nn.Module, given: list[Tensor]) -> None:
        for tensor in given:
            if (conv := self._source(tensor)) is not None:
                self._data_flow.norms[conv].append(bn)
        source = self._source(given[0]) if given else None
        self._data_flow.dims[bn] = given[0].dim() if given else 0
        self._data_flow.sources[bn].append(self._maker(given) if source is None else source)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, Tensor) and self._depth == 1:
            if is_norm(module):
                if self._source(output) is not None:
                    output = output.detach()  # a class of the user's own may return its input: the output needs an id
                self._record_maker(output, f"`{self._data_flow.names[module]}` ({type(module).__name__})")
            else:
                self._outputs[id(output)] = output, module
        self._depth -= 1
        return output

    def _source(self, tensor: Tensor) -> nn.Module | None:
        return self._outputs[id(tensor)][1] if id(tensor) in self._outputs else None

    def _maker(self, given: list[Tensor]) -> str:
        made, name = self._makers.get(id(given[0]), (None, "")) if given else (None, "")
        return name if made is not None and made() is given[0] else "an argument of forward"

    def _record_maker(self, output: Tensor, description: str) -> None:
        self._makers[id(output)] = weakref.ref(output), description

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._depth > 0:
            return func(*args, **kwargs)
        name = name_of(func)
        arguments = (*args, *kwargs.values())
        for position, argument in enumerate(arguments):
            if reads_values(name, position, len(arguments)):
                for leaf in leaves_of(argument):
                    self.record_use(leaf, f"`{name}`")
        output = func(*args, **kwargs)
        if isinstance(output, Tensor):
            self._record_maker(output, f"`{name}`")
        return output


class _OperatorRecorder(TorchDispatchMode):
    """Records what a torch function mode does not see: the operators that a scripted function calls."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if reads_values(func.overloadpacket.__name__):
            for leaf in leaves_of((args, kwargs)):
                self._recorder.record_use(leaf, f"`{func}`")
        return func(*args, **kwargs)
