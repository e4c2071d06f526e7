"""What recomputation saves and costs where BatchNorm uses the statistics of the batch: training from scratch.

    python examples/benchmarks/train_mode.py            # all parts
    python examples/benchmarks/train_mode.py --memory   # one part; the results of the others stay

- ``--memory``: kept bytes and peaks of a step, by the allocator and predicted; batch 4.
- ``--steps``: step times in interleaved rounds, beside a checkpoint per block; batch 8. It needs a quiet machine.
- ``--coverage``: kept bytes of the models of `coverage_of_models.py`, without data. No ratio may be above 1.
- ``--fits``: fits with SGD under a `memory_budget` of 0.6 of the peak that the allocator has seen in a plain fit.
- ``--epoch``: one epoch of `examples/finetune.py` in Train mode on one thread, with and without recomputation.

The results go to `docs/benchmarks/train_mode.json`, and as tables to `docs/use/train-from-scratch.md`.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from examples import finetune, results_file
from examples.benchmarks import all_modes, coverage_of_models, train_mode_tables
from examples.benchmarks.allocator import peak_by_allocator
from examples.benchmarks.networks import DETECTOR, MODELS, build, workload
from examples.benchmarks.summary import SETTING
from examples.benchmarks.training_step import Step
from examples.benchmarks.variants import VARIANTS
from lightning_convbn import ConvBNModeCallback, Recompute
from lightning_convbn.memory import measure_memory_abstractly
from lightning_convbn.memory.budget import fixed_bytes

NETWORKS = [*MODELS, "vgg16_bn", "timm:inception_next_tiny", "timm:convmixer_1024_20_ks9_p14"]
RECOMPUTING: dict[str, Recompute] = {"train": "none", "train_recompute": "elementwise", "train_blocks": "blocks"}
BACKBONES = ("rcnn", "retinanet", "fcos", "ssdlite")  # detectors look at values, but their backbones don't
SHARE, FIT_STEPS = 0.6, 2
CPU = torch.device("cpu")


def memory(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Count what a step keeps and its peak, by the allocator. Predict the peak, but not of a detector."""
    work = workload(name, options.batch or 4, options.pixels, CPU, channels_last=False)
    row: dict[str, Any] = {"batch": options.batch or 4, "pixels": options.pixels}
    for variant, recompute in RECOMPUTING.items():
        step = Step(work, VARIANTS[variant].build(work), CPU, "fp32")
        step()  # autograd and oneDNN allocate once what stays
        without_workspaces = peak_by_allocator(partial(step, fresh_inputs=True), count_workspaces=False)
        row[variant] = {**step.memory(), "peak_without_workspaces": without_workspaces}
        if name != DETECTOR:
            predict = partial(measure_memory_abstractly, step.model, work.inputs, {}, mode="train", pairs=work.pairs)
            row[variant]["predicted_peak"] = predict(recompute=recompute, allow_real_run=False).peak_bytes
    return row


def steps(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Time steps in turns, and count their peaks."""
    values = (name, options.batch or 8, options.pixels, "cpu", "fp32", False)
    setting = dict(zip(SETTING, values, strict=True))
    return all_modes.measure(setting, [*RECOMPUTING, "train_checkpoint_blocks"], options.rounds)


def coverage(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Count on tensors without data what is kept."""
    model = build(name)[0].train()
    part = cast(nn.Module, model.backbone) if any(kind in name for kind in BACKBONES) else model
    images = torch.zeros(options.batch or 4, 3, options.pixels, options.pixels)
    inputs = (images, images) if "raft" in name else (images,)
    count = partial(measure_memory_abstractly, part, inputs, {}, mode="train", allow_real_run=False)
    return {variant: count(recompute=recompute).saved_bytes for variant, recompute in RECOMPUTING.items()}


class Classifier(LightningModule):
    """A network and its losses. The callback finds the network by its name, `backbone`."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone, self.losses = backbone, list[float]()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the loss, and note it."""
        loss = nn.functional.cross_entropy(self.backbone(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD with momentum."""
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


def fits(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Fit plainly and within a share of that peak. What the allocator gave comes on top of parameters and buffers."""

    def fit(callbacks: list[Any]) -> tuple[int, list[float]]:
        torch.manual_seed(0)
        model, batch = Classifier(build(name)[0].train()), options.batch or 8
        images = torch.randn(FIT_STEPS * batch, 3, options.pixels, options.pixels)
        loader = DataLoader(TensorDataset(images, torch.arange(len(images))), batch)
        fixed, trainer = fixed_bytes(model), _trainer(callbacks)
        peak = peak_by_allocator(lambda: trainer.fit(model, loader), count_workspaces=False)
        return fixed + peak, model.losses

    plain, expected = fit([])
    budget = int(SHARE * plain)
    within, losses = fit([ConvBNModeCallback("train", memory_budget=budget, log_memory=False)])
    return {"plain_peak": plain, "budget": budget, "peak": within, "losses": losses, "equal": losses == expected}


def epoch(recompute: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train the network of `examples/finetune.py` for an epoch and test it; compare all with a run without us."""

    def run(callbacks: list[Any]) -> tuple[dict[str, float], list[Tensor]]:
        seed_everything(0, verbose=False)
        samples = finetune.find_images(None)[:: options.every]
        test, train = samples[::5], [sample for number, sample in enumerate(samples) if number % 5]
        model, trainer = finetune.Classifier(torch.ones(2)), _trainer(callbacks)
        trainer.fit(model, DataLoader(finetune.Photographs(train, 128, True), 32, shuffle=True, drop_last=True))
        (scores,) = trainer.test(model, DataLoader(finetune.Photographs(test, 128, False), 32), verbose=False)
        return dict(scores), [*model.state_dict().values()]

    asked = cast(Recompute, recompute)
    callback = ConvBNModeCallback("train", recompute=asked, eval_mode="eval", log_memory=False)
    (plain, expected), (scores, tensors) = run([]), run([callback])
    equal = scores == plain and all(map(torch.equal, tensors, expected))
    return {"recompute": recompute, **scores, "tensors": len(tensors), "equal": equal}


def _trainer(callbacks: list[Any]) -> Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return Trainer(max_epochs=1, accelerator="cpu", callbacks=callbacks, **quiet)


PARTS = {
    memory: NETWORKS,
    steps: NETWORKS,
    coverage: coverage_of_models.MODELS,
    fits: ["resnet50", "mobilenet_v2", "densenet121"],
    epoch: ["elementwise", "blocks"],
}


def main() -> None:
    """Run the parts that were asked for. Write the JSON after each row, and the tables at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for part in PARTS:
        parser.add_argument(f"--{part.__name__}", action="store_true", help="run this part; without any, all run")
    parser.add_argument("--names", nargs="+", help="others than the part's own")
    parser.add_argument("--batch", type=int, help="another than the part's own")
    parser.add_argument("--pixels", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=9, help="how often each step is timed")
    parser.add_argument("--every", type=int, default=1, help="take every n-th photograph for the epoch")
    parser.add_argument("--out", type=Path, default=train_mode_tables.RESULTS)
    options = parser.parse_args()
    found: dict[str, Any] = {"commands": {}, "machines": {}, "rows": []}
    if options.out.exists():
        found = json.loads(options.out.read_text())
    asked = [part for part in PARTS if getattr(options, part.__name__)] or list(PARTS)
    threads = torch.get_num_threads()
    for part in asked:
        torch.set_num_threads(1 if part in (fits, epoch) else threads)  # PyTorch repeats its own bits on one thread
        names = options.names or PARTS[part]
        others = [row for row in found["rows"] if row["part"] != part.__name__ or row["model"] not in names]
        own: list[dict[str, Any]] = []
        before = found["commands"].get(part.__name__, []) if options.names else []
        found["commands"][part.__name__] = [*before, results_file.command()]
        found["machines"][part.__name__] = results_file.machine(CPU)
        for name in names:
            own.append({"part": part.__name__, "model": name, **part(name, options)})
            print({key: value for key, value in own[-1].items() if key != "variants"}, flush=True)
            found["rows"] = [*others, *own]
            facts = {"commands": found["commands"], "machines": found["machines"]}
            results_file.write_json(options.out, found["rows"], ("torch", "torchvision", "timm", "lightning"), **facts)
    if options.out == train_mode_tables.RESULTS:
        train_mode_tables.write(found["rows"])


if __name__ == "__main__":
    main()
