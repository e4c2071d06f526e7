"""Time the inference of Deploy copies, of Eval mode and of torch's own fusion.

    python examples/benchmarks/deploy.py

writes `docs/benchmarks/deploy.json` and `docs/benchmarks/deploy.md`. Times are medians over interleaved rounds in one
process. They are CPU times of one thread, which other work on the machine changes least. Compare only their ratios.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
import warnings
from typing import Any

import onnx
import torch
import torchvision
from torch import nn
from torch.fx.experimental.optimization import fuse

from examples.benchmarks.random_statistics import give_statistics
from examples.results_file import BENCHMARKS, fill, markdown_table, write_json
from lightning_convbn import find_conv_bn_pairs, fuse_for_deploy
from lightning_convbn.exporting.formats import to_onnx

MODELS = ("resnet18", "resnet50", "mobilenet_v2", "efficientnet_b0", "regnet_y_400mf", "densenet121")
PIXELS = 224


def main() -> None:
    """Measure, write the JSON, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60, help="interleaved rounds of one inference per variant")
    rounds: int = parser.parse_args().rounds
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = []
    for name in MODELS:
        rows.append(measure(name, rounds))
        print(rows[-1], flush=True)
    write_json(BENCHMARKS / "deploy.json", rows, ("torch", "torchvision", "onnx", "onnxscript"), threads=1)
    fill(BENCHMARKS / "deploy.md", {"table": table(rows)})


@torch.no_grad()
def measure(name: str, rounds: int) -> dict[str, Any]:
    """Compare Eval mode, the Deploy copy and fx's fusion of one model."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None).eval()
    give_statistics(model)
    image = torch.randn(1, 3, PIXELS, PIXELS)
    variants = {"eval": model, "deploy": fuse_for_deploy(model), "fx": fuse(model)}
    expected = model(image)
    seconds: dict[str, list[float]] = {variant: [] for variant in variants}
    orders = [*itertools.permutations(variants)]  # the variant that ran before has an effect by the caches
    for number in range(rounds + 2):
        for variant in orders[number % len(orders)]:
            started = time.process_time()
            output = variants[variant](image)
            if number > 1:  # the first two rounds warm up
                seconds[variant].append(time.process_time() - started)
            torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-4)
    pairs = find_conv_bn_pairs(model)
    example = (image.expand(2, -1, -1, -1),)
    return {
        "model": name,
        "folded": len(pairs),
        "batch_norms": len(pairs) + len(pairs.unpaired),
        "eval_ms": round(1000 * statistics.median(seconds["eval"]), 1),
        **{variant: _ratio(seconds[variant], seconds["eval"]) for variant in ("deploy", "fx")},
        "deploy_to_fx": _ratio(seconds["deploy"], seconds["fx"]),
        "onnx_nodes": {variant: _count_nodes(variants[variant], example) for variant in ("deploy", "eval")},
        "rounds": rounds,
    }


def _ratio(seconds: list[float], others: list[float]) -> dict[str, float]:
    ratios = [one / other for one, other in zip(seconds, others, strict=True)]
    median = statistics.median(seconds) / statistics.median(others)
    return {"median": round(median, 3), "least": round(min(ratios), 3), "most": round(max(ratios), 3)}


def _count_nodes(model: nn.Module, example: tuple[torch.Tensor, ...]) -> int:
    return len(onnx.load_from_string(to_onnx(model, example, True)).graph.node)


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Draw the table of the page."""
    lines = []
    for row in rows:
        ratios = [row[name] for name in ("deploy", "fx", "deploy_to_fx")]
        times = [f"{one['median']:.2f} ({one['least']:.2f} to {one['most']:.2f})" for one in ratios]
        nodes = [str(row["onnx_nodes"][variant]) for variant in ("deploy", "eval")]
        lines.append([row["model"], f"{row['folded']} of {row['batch_norms']}", *times, *nodes])
    header = ["model", "folded", "Deploy / Eval", "fx fuse / Eval", "Deploy / fx fuse", "ONNX nodes, Deploy", "Eval"]
    return markdown_table(header, lines)


if __name__ == "__main__":
    main()
