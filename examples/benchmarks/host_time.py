"""Measure what the host spends for a pair: calls of Python, and what PyTorch does around its kernels.

    python examples/benchmarks/host_time.py

writes `docs/benchmarks/host_time.json` and the table in `docs/understand/what-is-saved.md`. Fifty pairs of 8 channels
run on 2 x 2 pixels, in one thread, so the kernels take next to no time. All variants take turns in one process, and the
twentieth part of each one's rounds that was fastest counts: what other programs take can only be added to a round.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from examples.results_file import BENCHMARKS, ROOT, fill, markdown_table, write_json
from lightning_convbn import fuse_for_deploy, set_mode

PAIRS, CHANNELS = 50, 8
RESULTS = BENCHMARKS / "host_time.json"
PAGE, MARK = ROOT / "docs" / "understand" / "what-is-saved.md", "host-time"


def in_mode(**options: Any) -> Callable[[nn.Module], nn.Module]:
    """Return a function that copies a network and puts the copy in a mode."""

    def make(network: nn.Module) -> nn.Module:
        copied = copy.deepcopy(network)
        set_mode(copied, **options)
        return copied

    return make


VARIANTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "Eval": copy.deepcopy,
    "Deploy copy": lambda network: fuse_for_deploy(network).requires_grad_(True),
    "Tune": in_mode(mode="tune"),
    "Tune, elementwise": in_mode(mode="tune", recompute="elementwise"),
}


def network() -> nn.Module:
    """Build pairs, one behind the other, in eval state."""
    layers = [
        layer
        for _ in range(PAIRS)
        for layer in (nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False), nn.BatchNorm2d(CHANNELS))
    ]
    return nn.Sequential(*layers).eval()


def step(model: nn.Module, input: Tensor) -> tuple[float, float]:
    """Return the seconds of a forward pass, and of a backward pass."""
    model.zero_grad()
    start = time.perf_counter()
    output = model(input)
    middle = time.perf_counter()
    output.sum().backward()
    return middle - start, time.perf_counter() - middle


def measure(rounds: int) -> list[dict[str, Any]]:
    """Measure all variants; return a row for each."""
    plain, input = network(), torch.randn(1, CHANNELS, 2, 2)
    models = {name: make(plain) for name, make in VARIANTS.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            times[name].append(step(model, input))
    best = {name: [sorted(part)[rounds // 20] for part in zip(*rows, strict=True)] for name, rows in times.items()}
    eval_time = sum(best["Eval"])
    return [
        {
            "variant": name,
            "forward us": round(forward / PAIRS * 1e6, 1),
            "backward us": round(backward / PAIRS * 1e6, 1),
            "to Eval": round((forward + backward) / eval_time, 2),
        }
        for name, (forward, backward) in best.items()
    ]


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Lay out the results in Markdown."""
    header = ["variant", "forward, µs a pair", "backward, µs a pair", "both, to Eval"]
    return markdown_table(header, [[str(cell) for cell in row.values()] for row in rows])


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=300, help="rounds of all variants")
    parser.add_argument("--out", type=Path, default=RESULTS, help="file for the results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(args.rounds)
    print("\n".join(table(rows)))
    write_json(args.out, rows, ["torch"], pairs=PAIRS, channels=CHANNELS, rounds=args.rounds)
    if args.out == RESULTS:
        fill(PAGE, {MARK: table(rows)})


if __name__ == "__main__":
    main()
