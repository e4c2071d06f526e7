"""Compare a training step in Tune mode with the same step by another revision of this package.

    python examples/benchmarks/against_revision.py REVISION

writes `docs/benchmarks/against-revision.json` and the table in `docs/understand/design-decisions.md`. Both revisions
are imported into one process. In each round they take turns in random order, and the ratio of their times counts, so
that other work slows down both alike. Kept bytes are counted by the package of this revision, for both.
"""

from __future__ import annotations

import argparse
import importlib
import io
import random
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from examples.results_file import BENCHMARKS, ROOT, fill, markdown_table, write_json
from lightning_convbn import fuse_for_deploy, set_mode
from lightning_convbn.memory import MIB, count_saved_bytes

NETWORKS = ("resnet18", "resnet50", "mobilenet_v2", "efficientnet_b0")
RESULTS = BENCHMARKS / "against-revision.json"
PAGE, MARK = ROOT / "docs" / "understand" / "design-decisions.md", "against-revision"
WARM_UP = 2
PACKAGE = "lightning_convbn"


def other_package(revision: str, folder: Path) -> ModuleType:
    """Import the package as it is in a revision, beside the one that is imported already."""
    archive = subprocess.run(["git", "archive", revision, PACKAGE], cwd=ROOT, check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(folder, filter="data")
    mine = {name: module for name, module in sys.modules.items() if name.split(".")[0] == PACKAGE}
    for name in mine:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    try:
        importlib.invalidate_caches()
        package = importlib.import_module(PACKAGE)
        package.set_mode  # noqa: B018 - names are imported when they are first used
    finally:
        sys.path.remove(str(folder))
        for name in [name for name in sys.modules if name.split(".")[0] == PACKAGE]:
            del sys.modules[name]
        sys.modules.update(mine)
    return package


def network(name: str, switch: Callable[[nn.Module, Any], object]) -> nn.Module:
    """Build a network with the same random weights each time, and switch it to Tune mode."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(name).eval()
    switch(model, "tune")
    return model


def seconds(model: nn.Module, images: Tensor) -> float:
    """Return the duration of a forward and a backward pass."""
    start = time.perf_counter()
    model(images).sum().backward()
    elapsed = time.perf_counter() - start
    model.zero_grad()
    return elapsed


def compare(name: str, batch: int, pixels: int, rounds: int, other: ModuleType) -> dict[str, Any]:
    """Measure a network; return the row of results."""
    models = {"this": network(name, set_mode), "other": network(name, other.set_mode)}
    images = torch.randn(batch, 3, pixels, pixels)
    for _ in range(WARM_UP):
        for model in models.values():
            seconds(model, images)
    times: dict[str, list[float]] = {key: [] for key in models}
    for _ in range(rounds):
        for key in random.sample(list(models), len(models)):
            times[key].append(seconds(models[key], images))
    ratios = [mine / others for mine, others in zip(times["this"], times["other"], strict=True)]
    kept = {key: count_saved_bytes(model, images) for key, model in models.items()}
    copied = count_saved_bytes(fuse_for_deploy(models["this"]), images)
    return {
        "model": name,
        "batch": batch,
        "pixels": pixels,
        "ratio": round(median(ratios), 4),
        "quartiles": [round(value, 4) for value in quantiles(ratios, n=4)[::2]],
        "seconds": round(median(times["this"]), 4),
        "seconds_other": round(median(times["other"]), 4),
        "kept_bytes": kept["this"],
        "kept_bytes_other": kept["other"],
        "kept_bytes_deploy_copy": copied,
    }


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Lay out the results in Markdown."""
    lines = []
    for row in rows:
        low, high = row["quartiles"]
        kept = [row["kept_bytes_other"], row["kept_bytes"], row["kept_bytes_deploy_copy"]]
        cells = [row["model"], str(row["batch"]), f"{row['ratio']:.2f} ({low:.2f} to {high:.2f})"]
        lines.append([*cells, *(f"{size / MIB:.2f}" for size in kept), f"{kept[1] / kept[2]:.4f}"])
    header = ["network", "batch", "step time, ratio (quartiles)", "kept MiB: before", "now", "Deploy copy"]
    return markdown_table([*header, "now / Deploy copy"], lines)


def main() -> None:
    """Compare each network at each batch and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision", help="what to compare with, as git names it")
    parser.add_argument("--networks", nargs="+", default=NETWORKS, help="names of torchvision classifiers")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8], help="batch sizes")
    parser.add_argument("--pixels", type=int, default=224, help="edge of the square images in pixels")
    parser.add_argument("--rounds", type=int, default=25, help="rounds for each network and batch")
    parser.add_argument("--out", type=Path, default=RESULTS, help="file for the results")
    args = parser.parse_args()
    rows = []
    with TemporaryDirectory() as folder:
        other = other_package(args.revision, Path(folder))
        for batch in args.batches:
            for name in args.networks:
                rows.append(compare(name, batch, args.pixels, args.rounds, other))
                print(rows[-1], flush=True)
    resolved = subprocess.run(
        ["git", "rev-parse", args.revision], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.strip()
    write_json(args.out, rows, ["torch", "torchvision"], revision=resolved, threads=torch.get_num_threads())
    if args.out == RESULTS:
        fill(PAGE, {MARK: table(rows)})


if __name__ == "__main__":
    main()
