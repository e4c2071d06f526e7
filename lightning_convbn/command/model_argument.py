"""Builds the model that the argument MODEL names."""

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
from typing import Any

import torch
from torch import nn

from lightning_convbn.command.errors import CommandError, summary
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
    if spec.endswith(".ckpt"):
        return _model(spec, _from_checkpoint(spec, checkpoint_class, trust=trust_checkpoint))
    for option, given in (("--class", checkpoint_class), ("--trust-checkpoint", trust_checkpoint)):
        if given:
            raise CommandError(f"{option} is for a Lightning checkpoint (*.ckpt); MODEL is {spec!r}")
    source, _, name = spec.partition(":")
    if not source or not name:
        raise CommandError(f"unknown model {spec!r}: say where it is from; MODEL is {FORMS}")
    if source == "torchvision":
        return _model(spec, _from_torchvision(name))
    return _model(spec, _from_timm(name) if source == "timm" else build(spec, import_attribute(spec)))


def build(spec: str, found: Any) -> Any:
    """Return what ``spec`` names: a module or another value itself, and what a function or class returns.

    Args:
        spec: What an error names.
        found: A value, or a callable without required arguments.
    """
    if isinstance(found, nn.Module) or not callable(found):
        return found
    try:
        return found()
    except Exception as error:  # a user's factory may raise anything
        raise CommandError(f"{spec} could not be built: {summary(error)}") from error


def import_attribute(spec: str) -> Any:
    """Import what ``package.module:name`` names. The current directory comes first, as for ``python -m``."""
    module_name, _, name = spec.partition(":")
    if not module_name or not name:
        raise CommandError(f"{spec!r} is not of the form package.module:name")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    module = _import(module_name)
    try:
        return attrgetter(name)(module)
    except AttributeError as error:
        raise _unknown(module_name, name, (public for public in vars(module) if public[0] != "_")) from error


def _import(module_name: str) -> Any:
    try:
        return importlib.import_module(module_name)
    except Exception as error:  # importing a user's module may raise anything
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is None:
            raise CommandError(f"{module_name} can't be imported: {summary(error)}") from error
        if f"{module_name}.".startswith(f"{missing}."):
            raise CommandError(f"no module {missing!r}: it is neither installed nor in {os.getcwd()}") from error
        raise CommandError(f"{module_name} needs {missing!r}; pip install what provides it") from error


def _model(spec: str, found: object) -> nn.Module:
    if not isinstance(found, nn.Module):
        raise CommandError(f"{spec} gives a {type(found).__name__}, not a torch.nn.Module")
    return found.eval()


def _from_torchvision(name: str) -> Any:
    models = _import("torchvision.models")
    if name not in models.list_models():
        raise _unknown("torchvision", name, models.list_models())
    builder = models.get_model_builder(name)
    # Detectors and segmentation models download the weights of their backbone by default.
    options = {"weights_backbone": None} if "weights_backbone" in inspect.signature(builder).parameters else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a later version will choose other initial values
        return build(f"torchvision:{name}", lambda: builder(weights=None, **options))


def _from_timm(name: str) -> Any:
    timm = _import("timm")
    if not timm.is_model(name):
        raise _unknown("timm", name, timm.list_models())
    return build(f"timm:{name}", lambda: timm.create_model(name, pretrained=False))


def _from_checkpoint(path: str, checkpoint_class: str | None, *, trust: bool) -> Any:
    if checkpoint_class is None:
        raise CommandError(
            f"{path} is a Lightning checkpoint, which does not say how its model is built; "
            "add --class package.module:LightningModuleClass"
        )
    if not Path(path).is_file():
        raise CommandError(f"no checkpoint {path!r} in {os.getcwd()}")
    found = import_attribute(checkpoint_class)
    if not hasattr(found, "load_from_checkpoint"):
        raise CommandError(f"--class {checkpoint_class} is not a LightningModule class: it has no load_from_checkpoint")
    file = path if trust else _only_weights(path)
    # Before 2.6 Lightning has no such argument, and it unpickles everything.
    takes = inspect.signature(found.load_from_checkpoint).parameters
    options = {"weights_only": not trust} if "weights_only" in takes else {}
    return build(path, lambda: found.load_from_checkpoint(file, map_location="cpu", **options))


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


def _unknown(source: str, name: str, known: Iterable[str]) -> CommandError:
    close = difflib.get_close_matches(name, list(known), n=3)
    hint = f"; did you mean {' or '.join(f'{source}:{match}' for match in close)}?" if close else ""
    return CommandError(f"{source} has no {name!r}{hint}")
