"""A spy in the user's module notes all that it can see of a run: the same with the callback and without."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_training import LIGHTNING_SAYS, Backbone, BoringModule, PrintedLines, make_trainer
from lightning.pytorch import seed_everything
from torch import Tensor, nn

from lightning_convbn import ConvBNModeCallback

pytestmark = LIGHTNING_SAYS

EPOCHS = 2
STEPS = ["sanity", *["fit", "fit", "fit", "validate"] * EPOCHS]


def random_states() -> tuple[int, int, int]:
    numpy_state = np.random.get_state()[1].tobytes()  # type: ignore[union-attr, index]
    return hash(torch.get_rng_state().numpy().tobytes()), hash(random.getstate()), hash(numpy_state)


class Spy(nn.Module):
    """Notes each call: what it gets, in which state, and what hooks have seen meanwhile. It gives what it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        modes = self.training, torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        self.calls.append((type(x), tuple(x.shape), x.dtype, x.requires_grad, modes, random_states()))
        return x


class SpiedBackbone(Backbone):
    """Writes into its input, draws random numbers of three kinds, and has spies between its blocks."""

    def __init__(self) -> None:
        super().__init__(dropout=0.5)
        self.spies = nn.ModuleList(Spy() for _ in range(3))
        self.bank: list[Any] = []

    def forward(self, images: Tensor) -> Tensor:
        self.bank.append((random.random(), float(np.random.rand()), type(images)))
        images.mul_(0.5)
        features = self.spies[1](self.middle(self.stem(self.spies[0](images))))
        return self.dropout(self.spies[2](self.last(self.lone(features)))).mean((2, 3))


class UntracedBackbone(SpiedBackbone):
    """Has a branch that depends on data, so that a forward must be recorded."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images + 1 if images.sum() > 1e6 else images)


class Spied(BoringModule):
    """Notes its steps, and what has become of each batch; hooks of its backbone note their calls."""

    shuffle = True

    def __init__(self, backbone: type[SpiedBackbone]) -> None:
        super().__init__(backbone)
        self.steps: list[Any] = []
        self.hooked: list[Any] = []
        for module in (self.backbone, self.backbone.stem, self.backbone.spies[1], self.backbone.lone):
            name = type(module).__name__
            module.register_forward_pre_hook(lambda module, args, name=name: self.note("before", name, args))
            module.register_forward_hook(lambda module, args, output, name=name: self.note("after", name, (output,)))
            module.register_full_backward_hook(lambda module, ins, outs, name=name: self.note("backward", name, outs))

    def note(self, when: str, name: str, tensors: Any) -> None:
        self.hooked.append((when, name, [(type(tensor), tuple(tensor.shape)) for tensor in tensors]))

    def step(self, stage: str, batch: list[Tensor]) -> Tensor:
        loss = super().step(stage, batch)
        self.steps.append((stage, batch[0].sum().item(), type(loss), len(self.hooked), random_states()))
        return loss

    def seen(self) -> dict[str, Any]:
        spies = {f"spy {number}": spy.calls for number, spy in enumerate(self.backbone.spies)}
        return {"steps": self.steps, "hooks": self.hooked, "bank": self.backbone.bank, **spies}


def run(backbone: type[SpiedBackbone], *callbacks: Any) -> dict[str, Any]:
    seed_everything(5, verbose=False)
    module = Spied(backbone)
    make_trainer(*callbacks, max_epochs=EPOCHS, num_sanity_val_steps=1).fit(module)
    assert [step[0] for step in module.steps] == STEPS
    return module.seen()


@pytest.mark.filterwarnings(
    "ignore:Full backward hook is firing when gradients are computed with respect to module outp"
)
@pytest.mark.parametrize("backbone", [SpiedBackbone, UntracedBackbone])
@pytest.mark.parametrize(
    "arguments",
    [{}, {"mode": "eval", "eval_mode": "tune"}, {"start_epoch": 1}],
    ids=str,
)
def test_a_module_sees_one_real_forward_in_each_step_and_nothing_of_the_callback(
    backbone: type[SpiedBackbone], arguments: dict[str, Any]
) -> None:
    lines = PrintedLines()
    seen, expected = run(backbone, ConvBNModeCallback(**arguments), lines), run(backbone)
    assert "folded         3 of 4 BatchNorms" in lines.text
    assert len(seen["bank"]) == len(seen["spy 0"]) == len(STEPS)
    assert {when for when, *_ in seen["hooks"]} == {"before", "after", "backward"}
    for name, noted in expected.items():
        assert seen[name] == noted, name
