"""The callback in a Trainer on each device: what it logs of a GPU's memory, and training in each precision.

These tests need no other package of Lightning than the one that is installed, `lightning` or `pytorch_lightning`.
"""

from __future__ import annotations

from collections import defaultdict
from importlib import import_module
from typing import Any

import pytest
import torch
from helpers.networks import images
from helpers.smooth_network import smooth_net
from torch import Tensor
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

from lightning_convbn import ConvBNModeCallback, Recompute
from lightning_convbn.trainer.lightning_api import Callback, LightningModule, Trainer

EPOCHS = 2
PEAKS = ("convbn/peak_allocated_mib", "convbn/peak_reserved_mib")
Logger: Any = import_module(f"{Trainer.__module__.partition('.trainer')[0]}.loggers.logger").DummyLogger

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        r".isinstance\(treespec, LeafSpec\). is deprecated",
        r"Found \d+ module\(s\) in eval mode",
        r"The '\w+_dataloader' does not have many workers",
        "GPU available but not used",
        ".*precision='16-mixed'.* but AMP with fp16 is not supported on CPU",
        ".*(process group|find_unused|TCPStore|NCCL|barrier|distributed)",
    )
]


class Recorder(Logger):  # type: ignore[misc]
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, list[float]] = defaultdict(list)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        for name, value in metrics.items():
            self.values[name].append(float(value))

    @property
    def group_separator(self) -> str:
        return "/"


class Module(LightningModule):
    """Trains the smooth network on a few random images."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = smooth_net(torch.device("cpu"))
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = mse_loss(self.backbone(batch[0]).float(), batch[1].float())
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(TensorDataset(images(12, 3, 32, 32), images(12, 4, seed=2)), batch_size=4)


def fit(
    device: torch.device, *callbacks: Callback, module: Module | None = None, **options: Any
) -> tuple[Module, dict[str, list[float]]]:
    """Train on a device; return the module and what was logged."""
    module, recorder = module or Module(), Recorder()
    quiet: dict[str, Any] = {
        "accelerator": "gpu" if device.type == "cuda" else "cpu",
        "devices": 1,
        "max_epochs": EPOCHS,
        "logger": recorder,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "log_every_n_steps": 1,
    }
    Trainer(callbacks=list(callbacks), **{**quiet, **options}).fit(module)
    return module, recorder.values


def test_peaks_are_logged_on_cuda_alone_once_per_epoch(device: torch.device) -> None:
    """They are the allocator's, so the parameters and the batch count, too."""
    module, logged = fit(device, ConvBNModeCallback())
    (kept,) = logged["convbn/activations_tune_mib"]
    assert kept < logged["convbn/activations_eval_mib"][0]
    if device.type == "cpu":
        assert not set(PEAKS) & set(logged)
        return
    allocated, reserved = (logged[name] for name in PEAKS)
    assert len(allocated) == len(reserved) == EPOCHS
    parameters = sum(parameter.nbytes for parameter in module.parameters()) / 2**20
    for most, held in zip(allocated, reserved, strict=True):
        assert parameters + kept < most <= held


def test_peaks_are_of_their_own_epoch(device: torch.device) -> None:
    """What was allocated before an epoch and is gone does not count."""

    class Hog(Module):
        def on_train_start(self) -> None:
            torch.empty(2**28, dtype=torch.uint8, device=self.device)

        def on_train_epoch_end(self) -> None:  # Lightning calls it after that of the callbacks
            self.on_train_start()

    there = torch.cuda.memory_allocated(device) / 2**20 if device.type == "cuda" else 0  # of other tests
    _, logged = fit(device, ConvBNModeCallback(), module=Hog())
    assert all(max(logged[name]) < there + 256 for name in PEAKS[:1] if name in logged)
    assert bool(logged.get(PEAKS[0])) == (device.type == "cuda")


@pytest.mark.parametrize("recompute", ["none", "elementwise"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed", "bf16-true"])
def test_every_precision_trains_as_eval_does(device: torch.device, precision: Any, recompute: Recompute) -> None:
    """A loss is a mean of squares of what six layers in a row have rounded: see `test_parity.py` for the bound."""
    losses = []
    for callback in (
        ConvBNModeCallback("eval", log_memory=False),
        ConvBNModeCallback(recompute=recompute, log_memory=False, verify=precision == "32-true"),
    ):
        module, _ = fit(device, callback, precision=precision)
        losses.append(module.losses)
    assert len(set(losses[0])) == 3 * EPOCHS
    lower = torch.float16 if precision in ("32-true", "16-mixed") else torch.bfloat16  # TF32 has fp16's significand
    assert losses[1] == pytest.approx(losses[0], rel=64 * torch.finfo(lower).eps)


def test_ddp_with_one_device_trains_as_eval_does(device: torch.device) -> None:
    """Over NCCL on a GPU, over Gloo on a CPU."""
    expected, _ = fit(device, ConvBNModeCallback("eval", log_memory=False))
    ddp = {"strategy": "ddp", "use_distributed_sampler": False}  # it would shuffle
    found, logged = fit(device, ConvBNModeCallback(recompute="elementwise"), **ddp)
    torch.distributed.destroy_process_group()
    assert found.losses == pytest.approx(expected.losses, rel=64 * torch.finfo(torch.float16).eps)
    assert len(logged["convbn/activations_tune_mib"]) == 1


def test_a_budget_of_what_is_left_trains_as_eval_does(device: torch.device) -> None:
    """The smooth network fits without recomputation wherever it can be trained."""
    expected, _ = fit(device, ConvBNModeCallback("eval", log_memory=False))
    budget: Any = "auto" if device.type == "cuda" else "1GiB"
    found, logged = fit(device, ConvBNModeCallback(memory_budget=budget))
    assert found.losses == pytest.approx(expected.losses, rel=64 * torch.finfo(torch.float16).eps)
    (predicted,) = set(logged["convbn/predicted_peak_mib"])
    if device.type == "cuda":
        assert predicted <= max(logged[PEAKS[0]])  # which counts the libraries' workspaces, too
