"""Does with a converted model and with its plain twin what a scenario says, and compares them after each action."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any
from zlib import crc32

import torch
from fuzz.building import randomize
from fuzz.checks import compare_given, compare_histories, compare_modules, inside_norm, norms_of, raises, scramble
from fuzz.interpreter import Interpreter, build
from fuzz.models import build_model
from fuzz.network import Action, Scenario, steps_of
from fuzz.operations import ONCE
from fuzz.outcomes import Outcome, Wrong, arguments_of, autocast, compare, draw_inputs, finite, forget, nudged_runs, run
from fuzz.recomputation import compare_recomputation
from helpers.torch_settings import one_thread
from torch import nn

from lightning_convbn import ConvBNPairs, find_conv_bn_pairs, fuse_for_deploy, set_mode
from lightning_convbn.blocks.find import why_not
from lightning_convbn.layers.supported_layers import is_norm
from lightning_convbn.pairs.find import pairs_in_force, statistics_missing

# Errors of the package that may end a scenario -> why they are right. The model must be plain and whole afterwards.
REFUSALS = {
    "has no BatchNorm, so there is nothing to put in": "all norms of the network are of other kinds",
    "The output between the two is read in inference mode": "an activation in place has left nothing to compare with",
    "computes its weight anew in every forward": "fuse_for_deploy can't fold into weight_norm for good",
    "can't be folded for good by its code alone": "fuse_for_deploy wants example inputs of what can't be traced",
}
# An error that names both layers is right, too, where a function takes values and graph past Python's eyes.
NAMES_LAYERS = re.compile(r"(Conv|Linear)\w*\(.*BatchNorm")


class Ended(Exception):
    """A scenario ends early: plain PyTorch raises too, or the package refuses for a reason that we know."""


@dataclass
class Report:
    """What a scenario has shown.

    Attributes:
        wrong: How the converted model differs from its twin; None if it does not.
        action: The action after which it was seen.
        folded: The pairs that were folded, in all switches to Tune or Deploy mode.
        runs: The passes that were compared while pairs were folded.
        ended: Why it ended early.
    """

    wrong: Wrong | None = None
    action: Action | None = None
    folded: int = 0
    runs: int = 0
    ended: str = ""


@one_thread()
def try_scenario(scenario: Scenario) -> Report:
    """Run a scenario to its end, or to the first difference."""
    torch.manual_seed(scenario.seed)  # a trace that draws decides by these numbers which branch it sees
    random.seed(scenario.seed)
    trial = Trial(scenario)
    for action in scenario.actions:
        trial.report.action = action
        try:
            trial.perform(action)
        except Wrong as wrong:
            trial.report.wrong = wrong
            break
        except Ended as ended:
            trial.report.ended = str(ended)
            break
    return trial.report


class Trial:
    """A converted model, its twin, and what must be known to compare them.

    The twin is built from the same seed. Only plain PyTorch works on it: its BatchNorms are put in their eval state,
    except in Train mode, where the two are equal to the bit.
    """

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.report = Report()
        self.ours, self.twin = build_model(scenario), build_model(scenario)
        self.twin.load_state_dict(self.ours.state_dict())  # a branch by random numbers may have run another norm
        self.found: dict[str, bool] = {}  # the training flags when the model was first converted
        self.wanted = self.flags()  # the training flags as they were last set
        self.frozen: set[str] = set()
        self.replaced: set[str] = set()
        self.unfrozen: set[str] = set()  # the BatchNorms that were to stay unfrozen since the last restore
        self.pairs: ConvBNPairs | None = None
        self.folded = False
        self.mode, self.recompute = "train", "none"

    def flags(self) -> dict[str, bool]:
        return {name: module.training for name, module in self.ours.named_modules()}

    def perform(self, action: Action) -> None:
        """Do one action with both models, and compare."""
        getattr(self, f"do_{action.do}")(action)
        self.compare_states(f"after {action.do}")

    def compare_states(self, when: str) -> None:
        """Compare parameters and buffers exactly, and what the models hold beside them."""
        ours, twin = self.ours.state_dict(), self.twin.state_dict()
        if list(ours) != list(twin):
            raise Wrong("state_dict", f"{when}: keys {sorted(ours.keys() ^ twin.keys())}")
        for name, value in twin.items():
            if not torch.equal(ours[name], value):
                raise Wrong("state_dict", f"{when}: `{name}` was written")
        for (name, one), (_, other) in zip(self.ours.named_parameters(), self.twin.named_parameters(), strict=True):
            if one.requires_grad != other.requires_grad or one.grad is not None:
                raise Wrong("parameter", f"{when}: `{name}` has other flags, or a gradient")
        compare_histories(self.ours, self.twin, when)
        for name, module in self.ours.named_modules():
            if not inside_norm(self.ours, name) and module.training != self.wanted[name]:
                raise Wrong("flags", f"{when}: `{name}`.training is {module.training}")

    def do_mode(self, action: Action) -> None:
        pairs = self.looked_up(action)
        ids = [id(parameter) for parameter in self.ours.parameters()]
        if not self.found:
            self.found = self.flags()
        chosen = self.attempt("set_mode", lambda: switch(self.ours, action, pairs))
        if ids != [id(parameter) for parameter in self.ours.parameters()]:
            raise Wrong("parameter", "set_mode has replaced a parameter")
        self.folded = action.mode in ("tune", "deploy") and len(chosen) > 0
        self.mode, self.recompute = action.mode, action.recompute
        norms = norms_of(self.twin).values()
        (ONCE.difference_update if action.recompute == "none" else ONCE.update)(norms)
        if action.mode == "train":
            self.compare_restored(whole=action.recompute == "none")
        else:
            self.unfrozen |= half(norms_of(self.twin)) if action.unfreeze else set()
            self.pairs = chosen
            self.report.folded += len(chosen) if self.folded else 0
            self.freeze_twin(chosen)

    def freeze_twin(self, chosen: ConvBNPairs) -> None:
        """Put the twin's BatchNorms in their eval state. Only those that were put in since may stay unfrozen."""
        norms = {name for name, module in norms_of(self.twin).items() if statistics_missing(module) is None}
        if forgotten := (norms & chosen.unfrozen) - self.replaced - self.unfrozen:
            raise Wrong("unfrozen", f"{sorted(forgotten)}")
        self.frozen = norms - chosen.unfrozen
        self.set_twin_flags()

    def set_twin_flags(self) -> None:
        for name, module in self.twin.named_modules():
            module.training = self.wanted[name]
        for name in self.frozen:
            self.twin.get_submodule(name).eval()

    def looked_up(self, action: Action) -> ConvBNPairs | None:
        """Find pairs as the action says. Looking must not change anything."""
        if not action.look:
            return None
        _, given = draw_inputs(self.scenario, action)
        _, unchanged = draw_inputs(self.scenario, action)
        examples = arguments_of(self.scenario, given) if action.look == "record" else None
        state, kept, flags = torch.get_rng_state(), dict(self.ours.kept), self.flags()
        python_state = random.getstate()
        with autocast(self.scenario):
            pairs = self.attempt(
                "find_conv_bn_pairs",
                lambda: find_conv_bn_pairs(self.ours, example_inputs=examples),
                lambda: run(copy.deepcopy(self.twin), self.scenario, replace(action, grad="no_grad")),
            )
        if not torch.equal(state, torch.get_rng_state()) or python_state != random.getstate():
            raise Wrong("looking", "a random state has changed")
        compare_given(given, unchanged)
        if any(self.ours.kept.get(name) is not value for name, value in kept.items()) or flags != self.flags():
            raise Wrong("looking", "an attribute has changed")
        self.compare_states("after looking")
        return pairs

    def attempt(self, what: str, ours: Callable[[], Any], twin: Callable[[], Any] | None = None) -> Any:
        """Call the package. An error must be a refusal that we know, or be plain PyTorch's too."""
        try:
            return ours()
        except Wrong:
            raise
        except Exception as error:
            text = f"{type(error).__name__}: {error}".partition("\n")[0]
            if twin is not None and raises(twin):
                raise Ended(f"plain PyTorch raises, too: {text}") from error
            if self.is_refusal(text):
                self.ours.zero_grad()
                self.attempt("set_mode after a refusal", lambda: set_mode(self.ours, "train"))
                self.compare_restored()
                raise Ended(text) from error
            raise Wrong(f"{what} raises {type(error).__name__}", text) from error

    def is_refusal(self, text: str) -> bool:
        """Whether an error says what a user can act on, and is one that we know."""
        hidden = any(step.op == "unseen" for step in steps_of(self.scenario.network))
        return any(refusal in text for refusal in REFUSALS) or (hidden and NAMES_LAYERS.search(text) is not None)

    def compare_restored(self, whole: bool = True) -> None:
        """After a switch to "train", everything is as found; the modules themselves if nothing is recomputed."""
        if whole:
            compare_modules(self.ours, self.twin)
        for name, module in self.ours.named_modules():
            if module.training not in (self.found.get(name, self.wanted[name]), self.wanted[name]):
                raise Wrong("flags", f"`{name}`.training is {module.training} after the switch to train")
        self.found, self.frozen, self.replaced, self.unfrozen = {}, set(), set(), set()
        self.wanted, self.folded = self.flags(), False
        self.set_twin_flags()

    def do_run(self, action: Action) -> None:
        if self.recompute not in ("none", "elementwise") and action.every_module.startswith("forward"):
            action = replace(action, every_module="")  # modules inside of a block are called twice, and so are hooks
        expected = self.compare_pass(self.ours, self.twin, action)
        self.report.runs += self.folded
        if self.mode != "deploy" and action.grad == "grad":
            self.attempt("a copy", lambda: compare_recomputation(self.ours, self.mode, self.scenario, action))
            forget(self.twin)
        with torch.no_grad():
            for (name, one), other in zip(self.ours.named_parameters(), self.twin.parameters(), strict=True):
                gradient = expected[f"gradient.{name}"]
                if gradient is not None:  # the same step for both, so that they stay the same to the bit
                    step = 0.05 * gradient / (1 + gradient.norm())
                    one -= step
                    other -= step
            for one, other in zip(self.ours.buffers(), self.twin.buffers(), strict=True):
                if not torch.equal(one, other):  # the statistics of what a folded pair has computed
                    one.copy_(other)
            for module, other in zip(self.ours.modules(), self.twin.modules(), strict=True):
                if isinstance(module, Interpreter):
                    module.history[:] = other.history

    def compare_pass(self, ours: Interpreter, twin: Interpreter, action: Action) -> Outcome:
        """Run both and compare. Return what the twin has computed."""
        try:
            expected = run(twin, self.scenario, action)
        except Exception as error:
            raise Ended(f"plain PyTorch raises: {type(error).__name__}: {error}") from error
        if not finite(expected):
            raise Ended("the twin's results are not finite")
        outcome = self.attempt("a run", lambda: run(ours, self.scenario, action))
        if self.mode == "train":
            compare(outcome, expected, "exact")
        else:
            compare(outcome, expected, self.scenario.precision, lambda: nudged_runs(twin, self.scenario, action))
        return expected

    def do_flags(self, action: Action) -> None:
        self.ours.train(action.training)
        self.wanted = dict.fromkeys(self.wanted, action.training)
        self.set_twin_flags()

    def do_domain(self, action: Action) -> None:
        for module in (*self.ours.modules(), *self.twin.modules()):
            if isinstance(module, Interpreter):
                module.domain = action.domain

    def do_replace(self, action: Action) -> None:
        """Put a new module in the place of one, as users do with heads; or an Identity in the place of a norm."""
        if action.layer not in self.wanted:
            return
        parent, _, name = action.layer.rpartition(".")
        for model in (self.ours, self.twin):
            fresh: nn.Module = build(replace(self.scenario.network, hooks=())).get_submodule(action.layer).eval()
            randomize(fresh, self.scenario.seed + 1)
            if is_norm(fresh) and action.domain:
                fresh = nn.Identity().eval()
            fresh.to(torch.float64 if self.scenario.precision == "float64" else torch.float32)
            setattr(model.get_submodule(parent), name, fresh)
        self.wanted = {**self.flags(), **{key: flag for key, flag in self.wanted.items() if self.is_old(key, action)}}
        self.wanted = {key: self.wanted[key] for key in self.flags()}
        self.frozen = {key for key in self.frozen if self.is_old(key, action)}
        self.replaced |= {key for key in self.wanted if not self.is_old(key, action)}

    def is_old(self, name: str, action: Action) -> bool:
        return name != action.layer and not name.startswith(f"{action.layer}.")

    def do_copy(self, action: Action) -> None:
        """A deep copy computes what the original computes, and shares nothing with it."""
        if raises(lambda: copy.deepcopy(self.twin)):
            return
        copied = self.attempt("deepcopy", lambda: copy.deepcopy(self.ours))
        self.compare_pass(copied, copy.deepcopy(self.twin), replace(action, grad="grad"))
        self.attempt("set_mode of a copy", lambda: set_mode(copied, "train"))
        compare_modules(copied, self.twin)
        scramble(copied)

    def do_fuse(self, action: Action) -> None:
        """A Deploy copy computes what the twin computes in its eval state."""
        asks = any(step.op == "ask" for step in steps_of(self.scenario.network))  # for classes that it does not have
        if asks or raises(lambda: copy.deepcopy(self.twin)):
            return
        pairs = self.pairs if action.domain and not self.ours.training else None
        action = replace(action, domain=0)  # a copy is right for the defaults of optional arguments
        fused = self.attempt("fuse_for_deploy", lambda: fuse_for_deploy(self.ours, pairs=pairs))
        twin = copy.deepcopy(self.twin).eval()
        expected = self.compare_outputs_of_copy(fused, twin, action)
        self.report.runs += bool(expected)
        scramble(fused)

    def compare_outputs_of_copy(self, fused: nn.Module, twin: Interpreter, action: Action) -> Outcome:
        """Compare all but parameters and buffers, which are others in a Deploy copy."""
        try:
            expected = run(twin, self.scenario, action)
        except Exception as error:
            raise Ended(f"plain PyTorch raises: {error}") from error
        outcome = self.attempt("a run of the Deploy copy", lambda: run(fused, self.scenario, action))
        same = [
            {k: v for k, v in one.items() if not k.startswith(("gradient", "buffer"))} for one in (outcome, expected)
        ]
        try:
            compare(*same, self.scenario.precision)
        except Wrong as wrong:
            raise Wrong(f"Deploy copy's {wrong.kind}", wrong.detail) from wrong
        return expected

    def do_load(self, action: Action) -> None:
        state = {
            key: value * 1.1 if value.is_floating_point() else value for key, value in self.twin.state_dict().items()
        }
        for model in (self.ours, self.twin):
            model.load_state_dict(state)

    def do_free(self, action: Action) -> None:
        """Freeze some parameters and free others, as fine-tuning does between two epochs."""
        for model in (self.ours, self.twin):
            for name, parameter in model.named_parameters():
                if crc32(name.encode()) % 3 == 0:
                    parameter.requires_grad_(not parameter.requires_grad)


def switch(model: nn.Module, action: Action, pairs: ConvBNPairs | None) -> ConvBNPairs:
    if action.unfreeze:
        pairs = set_mode(model, action.mode, pairs=pairs)  # type: ignore[arg-type]
        pairs = pairs.unfreeze(dict.fromkeys(half(norms_of(model)), "it is to learn its statistics"))
    within = pairs or pairs_in_force(model) or find_conv_bn_pairs(model)
    blocks = [name for name, module in model.named_modules() if any(module.children()) and not is_norm(module)]
    named = {"names": [name for name in blocks if name and why_not(model, name, within) is None], "whole": [""]}
    recompute: Any = named.get(action.recompute, action.recompute)
    return set_mode(model, action.mode, pairs=pairs, recompute=recompute)  # type: ignore[arg-type]


def half(names: Iterable[str]) -> set[str]:
    """Half of some names, the same ones each time."""
    return {name for name in names if crc32(name.encode()) % 2}
