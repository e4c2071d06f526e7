"""Builds the model that the argument MODEL names.

MODEL is ``torchvision:resnet50``, ``timm:...``, ``package.module:factory``, or the path of a checkpoint.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import io
import os
import sys
import warnings
from collections.abc import Iterable
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from lightning_convbn.command.errors import CommandError
from lightning_convbn.exporting.checkpoint_file import load_only_weights
from lightning_convbn.text import first_line

FORMS = "torchvision:NAME, timm:NAME, package.module:factory, or a Lightning checkpoint (*.ckpt)"
_HYPERPARAMETERS = ("hyper_parameters", "hparams", "module_arguments")  # where a checkpoint has them, old ones too


def load_model(spec: str, checkpoint_class: str | None = None, trust_checkpoint: bool = False) -> nn.Module:
    """Build the model that ``spec`` names, on the CPU and in its eval state. No weights are downloaded.

    Args:
        spec: ``torchvision:NAME`` or ``timm:NAME`` for a model with random weights, ``package.module:factory`` for a
            module or a callable without required arguments, or the path of a checkpoint. The current directory is
            importable.
        checkpoint_class: The class of a checkpoint, as ``package.module:LightningModuleClass``.
        trust_checkpoint: Whether a checkpoint may hold more than weights and plain values. Then it can run any code.

    Raises:
        CommandError: If there is no such model, or it can't be built.

    Example:
        >>> load_model("torch.nn:Identity")
        Identity()
    """
    is_checkpoint = spec.endswith(".ckpt")
    if checkpoint_class is not None and not is_checkpoint:
        raise CommandError(f"--class is for a Lightning checkpoint (*.ckpt); MODEL is {spec!r}")
    if trust_checkpoint and not is_checkpoint:
        raise CommandError(f"--trust-checkpoint is for a Lightning checkpoint (*.ckpt); MODEL is {spec!r}")
    source, _, name = spec.partition(":")
    if is_checkpoint:
        model = _from_checkpoint(spec, checkpoint_class, trust=trust_checkpoint)
    elif not source or not name:
        raise CommandError(f"unknown model {spec!r}: say where it is from; MODEL is {FORMS}")
    elif source == "torchvision":
        model = _from_torchvision(name)
    elif source == "timm":
        model = _from_timm(name)
    else:
        model = _from_factory(spec, _attribute(spec))
    return model.eval()


def has_random_weights(spec: str) -> bool:
    """Whether ``spec`` names a model of a library, which is built with random weights."""
    return spec.startswith(("torchvision:", "timm:"))


def _from_torchvision(name: str) -> nn.Module:
    models = _library("torchvision.models")
    if name not in models.list_models():
        raise _unknown("torchvision", name, models.list_models())
    builder = models.get_model_builder(name)
    # Detectors and segmentation models download the weights of their backbone by default.
    options = {"weights_backbone": None} if "weights_backbone" in inspect.signature(builder).parameters else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a later version will choose other initial values
        return _built(f"torchvision:{name}", lambda: builder(weights=None, **options))


def _from_timm(name: str) -> nn.Module:
    timm = _library("timm")
    if not timm.is_model(name):
        raise _unknown("timm", name, timm.list_models())
    return _built(f"timm:{name}", lambda: timm.create_model(name, pretrained=False))


def _from_factory(spec: str, found: object) -> nn.Module:
    if isinstance(found, nn.Module):
        return found
    if not callable(found):
        raise CommandError(f"{spec} is a {type(found).__name__}, neither a model nor a callable that returns one")
    return _built(spec, found)


def _from_checkpoint(path: str, checkpoint_class: str | None, *, trust: bool) -> nn.Module:
    if checkpoint_class is None:
        raise CommandError(
            f"{path} is a Lightning checkpoint, which does not say how its model is built; "
            "add --class package.module:LightningModuleClass"
        )
    if not Path(path).is_file():
        raise CommandError(f"no checkpoint {path!r} in {os.getcwd()}")
    found = _attribute(checkpoint_class)
    if not hasattr(found, "load_from_checkpoint"):
        raise CommandError(f"--class {checkpoint_class} is not a LightningModule class: it has no load_from_checkpoint")
    file = path if trust else _only_weights(path)
    # Before 2.6 Lightning has no such argument, and it unpickles everything.
    options = {"weights_only": not trust} if _takes_weights_only(found.load_from_checkpoint) else {}
    return _built(path, lambda: found.load_from_checkpoint(file, map_location="cpu", **options))


def _only_weights(path: str) -> io.BytesIO:
    """Return the checkpoint as a file that this process has written, so that Lightning may unpickle all of it."""
    own = "if the file is your own, add --trust-checkpoint"
    try:
        checkpoint = load_only_weights(path, path)
    except ValueError as error:
        raise CommandError(f"{error}; {own}") from error
    except Exception as error:  # a damaged file may raise anything
        raise CommandError(f"{path} can't be read: {type(error).__name__}: {first_line(error)}") from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise CommandError(f"{path} is no Lightning checkpoint: it has no state_dict")
    for key in _HYPERPARAMETERS:
        hyperparameters = checkpoint.get(key)
        if isinstance(hyperparameters, dict) and "_instantiator" in hyperparameters:
            raise CommandError(
                f"{path} names a function that builds its model, `{hyperparameters['_instantiator']}`, as those of "
                f"LightningCLI do; only weights and plain values are loaded, because it could be any function; {own}"
            )
    file = io.BytesIO()
    torch.save(checkpoint, file)
    file.seek(0)
    return file


def _takes_weights_only(load: Any) -> bool:
    return "weights_only" in inspect.signature(load).parameters


def _built(spec: str, build: Any) -> nn.Module:
    try:
        model = build()
    except Exception as error:  # a user's factory may raise anything
        raise CommandError(f"{spec} could not be built: {type(error).__name__}: {first_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise CommandError(f"{spec} returns a {type(model).__name__}, not a torch.nn.Module")
    return model


def _library(module: str) -> ModuleType:
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise CommandError(
            f"{package}:NAME needs {package}, which can't be imported ({error}); pip install {package}"
        ) from error


def _attribute(spec: str) -> Any:
    """Import what ``package.module:name`` names. The current directory comes first, as for ``python -m``."""
    module_name, _, name = spec.partition(":")
    if not module_name or not name:
        raise CommandError(f"{spec!r} is not of the form package.module:name")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module_name}.".startswith(f"{error.name}."):
            raise CommandError(
                f"no module {error.name!r}, neither installed nor in {os.getcwd()}; MODEL is {FORMS}"
            ) from error
        raise CommandError(f"{module_name} needs {error.name!r}; pip install what provides it") from error
    except Exception as error:  # importing a user's module may raise anything
        raise CommandError(f"{module_name} can't be imported: {type(error).__name__}: {first_line(error)}") from error
    try:
        return attrgetter(name)(module)
    except AttributeError as error:
        raise _unknown(module_name, name, (public for public in vars(module) if public[0] != "_")) from error


def _unknown(source: str, name: str, known: Iterable[str]) -> CommandError:
    close = difflib.get_close_matches(name, list(known), n=3)
    hint = f"; did you mean {' or '.join(f'{source}:{match}' for match in close)}?" if close else ""
    return CommandError(f"{source} has no {name!r}{hint}")
