"""Count the BatchNorms that are folded in well-known models, and those that plain symbolic tracing finds.

    python examples/benchmarks/coverage_of_models.py

writes `docs/benchmarks/coverage.json` and `docs/benchmarks/coverage.md`. Nothing is downloaded: the weights are
random, and the pairs do not depend on them.
"""

from __future__ import annotations

import argparse
import warnings
from typing import Any

import timm
import torch
import torchvision
from torch import fx, nn

from examples.results_file import BENCHMARKS, fill, markdown_table, write_json
from lightning_convbn import find_conv_bn_pairs

MODELS = [
    "timm:efficientnet_b0",
    "timm:mobilenetv3_large_100",
    "timm:efficientnetv2_rw_s",
    "timm:regnety_004",
    "timm:levit_128",
    "timm:hrnet_w18",
    "timm:repvgg_a0",
    "timm:mixnet_s",
    "timm:ghostnet_100",
    "timm:nasnetalarge",
    "timm:tf_efficientnet_b0",
    "torchvision:resnet50",
    "torchvision:mobilenet_v2",
    "torchvision:densenet121",
    "torchvision:fasterrcnn_resnet50_fpn",
    "torchvision:fasterrcnn_resnet50_fpn_v2",
    "torchvision:maskrcnn_resnet50_fpn",
    "torchvision:retinanet_resnet50_fpn",
    "torchvision:fcos_resnet50_fpn",
    "torchvision:ssdlite320_mobilenet_v3_large",
    "torchvision:deeplabv3_resnet50",
    "torchvision:raft_large",
]


def main() -> None:
    """Count, write the JSON, write the page."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    warnings.simplefilter("ignore")
    rows = []
    for name in MODELS:
        rows.append(count(name))
        print(rows[-1], flush=True)
    write_json(BENCHMARKS / "coverage.json", rows, ("torch", "torchvision", "timm"))
    fill(BENCHMARKS / "coverage.md", {"table": table(rows)})
    print("wrote docs/benchmarks/coverage.json and docs/benchmarks/coverage.md")


def build(name: str) -> nn.Module:
    """Build an architecture on the meta device, with random weights that take no memory."""
    library, _, architecture = name.partition(":")
    with torch.device("meta"):
        if library == "timm":
            model: nn.Module = timm.create_model(architecture)
        elif "rcnn" in architecture or "_fpn" in architecture or "lite" in architecture or "deeplab" in architecture:
            model = torchvision.models.get_model(architecture, weights=None, weights_backbone=None)
        else:
            model = torchvision.models.get_model(architecture, weights=None)
    return model.eval()


def count(name: str) -> dict[str, Any]:
    """Count the folded, frozen and other BatchNorms of one model."""
    model = build(name)
    pairs = find_conv_bn_pairs(model)
    return {
        "model": name,
        "batchnorms": len(pairs) + len(pairs.unpaired),
        "folded": len(pairs),
        "frozen": len(pairs.frozen),
        "unfrozen": len(pairs.unfrozen),
        "plain": by_plain_tracing(model),
        "reasons": pairs.count_by_reason(),
    }


def by_plain_tracing(model: nn.Module) -> int | str:
    """Count the pairs that a plain symbolic trace finds, or return the name of its error."""
    try:
        graph = fx.symbolic_trace(model).graph
    except Exception as error:  # the failure is the result
        return type(error).__name__
    modules = dict(model.named_modules())
    found = 0
    for node in graph.nodes:
        if node.op == "call_module" and isinstance(modules[node.target], nn.BatchNorm2d):
            source = node.args[0]
            of_conv = source.op == "call_module" and isinstance(modules[source.target], nn.Conv2d)
            found += of_conv and len(source.users) == 1
    return found


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Draw the table of the page."""
    keys = ("batchnorms", "folded", "frozen", "unfrozen", "plain")
    lines = [
        [
            row["model"],
            *(str(row[key]) for key in keys),
            "; ".join(f"{number} × {reason}" for reason, number in row["reasons"].items()),
        ]
        for row in rows
    ]
    header = ["model", "BatchNorms", "folded", "frozen", "unfrozen", "plain tracing finds", "why not all"]
    return markdown_table(header, lines, words=(0, 6))


if __name__ == "__main__":
    main()
